"""The project's benchmark: that it runs, and that no wrong peer is timed. Not how fast anything is."""

import io
import json
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fused_copy
from fill_benchmark import answers, peers, plots, report, runner, sections, steps, targets
from fill_benchmark.model import small_model
from fill_benchmark.native import Unavailable
from fill_benchmark.peers import (
    CONTIGUOUS,
    GRAPH_REPLAY,
    OP,
    PEERS,
    PLAN,
    REPLAY,
    SIX_COPIES,
    UPDATE_AND_REPLAY,
    Peer,
    check,
)
from fill_benchmark.sources import ARRAYS, LISTS, PINNED, PLAN_ROWS, ROWS, UPDATE_LISTS, VALUES
from fused_copy import timing
from fused_copy.bench import WrongResult, plain_console
from fused_copy.decode import capture_buffers
from readme_table import newest
from run import main

HAS_GPU = torch.cuda.is_available()


def needs_gpu(test):
    return pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")(test)


@pytest.mark.parametrize("kernels", [0, 1, 2])
def test_profile_kernel_reads_the_one_kernel_of_the_trace(monkeypatch, kernels):
    facts = {"grid": [66, 1, 1], "block": [128, 1, 1], "registers per thread": 32, "est. achieved occupancy %": 25}

    class Profile(nullcontext):
        def export_chrome_trace(self, path):
            events = [
                {"cat": "cuda_runtime", "args": {}},
                *[{"cat": "kernel", "args": facts | {"stream": 7}}] * kernels,
            ]
            Path(path).write_text(json.dumps({"traceEvents": events}))

        def __enter__(self):
            return self

    monkeypatch.setattr(torch.profiler, "profile", lambda **_: Profile())
    made = []
    expected = {"blocks": [66, 1, 1], "block_size": [128, 1, 1], "registers": 32, "occupancy_percent": 25}
    assert steps.profile_kernel(partial(made.append, 1)) == (expected if kernels == 1 else None)
    assert made == [1]


def test_loop_us_makes_the_calls_in_turn_and_waits(monkeypatch):
    waits = []
    monkeypatch.setattr(steps, "synchronize", lambda: waits.append(len(made)))
    made = []
    calls = [partial(made.append, index) for index in range(4)]
    assert len(steps.loop_us(calls, steps=8).samples) == 1
    assert (made, waits) == ([0, 0, 1, 2, 3, 0, 1, 2, 3], [1, 9])
    waits.clear()
    steps.loop_us(calls, steps=3, every_step=True)
    assert waits == [10, 11, 12, 13, 13]


def test_quick_run_without_a_gpu(tmp_path, capsys):
    path = tmp_path / "results.json"
    wheel = tmp_path / "fused_copy.whl"
    wheel.write_bytes(bytes(1_500_000))
    arguments = ["--json", str(path), "--commit", "abc1234", "--wheel", str(wheel), "--build-seconds", "77"]
    assert main(["--section", "scale,host,import", "--quick", *arguments]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PEERS)
    results = report.read(path)
    assert results.quick
    assert results.machine["commit"] == "abc1234"
    assert results.machine["torch"] == torch.__version__
    assert {row.section for row in results.rows} == {"host", "scale"} <= set(results.seconds)
    assert results.package.pop("import_ms") > 0
    assert results.package == {"wheel_mb": 1.5, "build_seconds": 77}
    host = [row for row in results.rows if row.metric == "host"]
    points = [{"bs": 64, "max_seqlen_k": 1024}, {"pairs": 6}, {"pairs": 32}]
    for point in points:
        rows = [row for row in host if row.point == point]
        assert set(PEERS) - {row.peer for row in rows} <= NEED_A_GPU
        assert all(0 < row.p10 <= row.median <= row.p90 for row in rows)
    assert len(host) == len([row for row in host if row.point in points])
    assert results.rows[0].bytes == 4 * (4 * 64 + 65 + 64 * 1024)
    assert report.serialize(report.read(path)) == path.read_text()


@needs_gpu
def test_quick_gpu_run(tmp_path):
    path = tmp_path / "results.json"
    assert main(["--quick", "--json", str(path), "--plot", str(tmp_path)]) == 0
    results = report.read(path)
    assert {row.section for row in results.rows} == set(sections.SECTIONS)
    assert {row.metric for row in results.rows} == {"host", "gpu", "step", "latency"}
    assert results.machine["gpu"] == torch.cuda.get_device_name()
    assert {row.launches for row in results.rows if row.peer == REPLAY and row.metric == "gpu"} == {1}
    assert {row.launches for row in results.rows if row.peer == SIX_COPIES and row.workload == "decode"} == {6}
    # A quick run has one pass, and need not be disturbed.
    perhaps = {"Where did the machine disturb most ways?", "How much do the passes of host times differ?"}
    assert set(results.answers) | perhaps == set(answers.QUESTIONS)
    unmeasured = [v.figure for v in results.targets if v.met is None]
    # Too large for a quick run, or compiled, or not on its command line, or not resolved by one sample.
    not_here = ("32 MB", "tvm-ffi", "reads its tensors", "wheel", "build")
    assert all(any(part in text for part in not_here) for text in unmeasured)
    drawn = ("batch-size", "page-table-width", "tensors", "values")
    assert {picture.name for picture in tmp_path.glob("*.svg")} == {f"{path.stem}-{name}.svg" for name in drawn}


@pytest.mark.parametrize("points", [0, 1])
def test_ctrl_c_keeps_what_was_measured(monkeypatch, tmp_path, capsys, points):
    measure, left = sections.measure, [points]

    def interrupted(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr("fill_benchmark.runner.measure", interrupted)
    path = tmp_path / "results.json"
    assert main(["--section", "scale", "--quick", "--json", str(path), "--plot", str(tmp_path)]) == 130
    results = report.read(path)
    assert not results.complete
    assert len({str(row.point) for row in results.rows}) == points
    assert "stopped; what was measured until then" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.svg"))) == points
    with pytest.raises(ValueError, match="no results file"):
        newest(tmp_path)


def test_each_points_quickest_pass_counts(monkeypatch, tmp_path):
    us = iter([(5.0, 9.0), (8.0, 2.0), (6.0, 6.0)])  # in the second the two ways together take least
    row = report.Row("scale", "host", "pairs", {"pairs": 6}, "", 8, "way", 1, 0.0, 0.0, 0.0)

    def measured(section, metrics, cases, **options):
        assert (section, list(metrics)) == ("scale", ["host"])
        return [replace(row, peer=peer, median=time) for peer, time in zip("ab", next(us), strict=True)]

    monkeypatch.setattr("fill_benchmark.runner.measure", measured)
    one_point = sections.Section(["host"], [lambda: ()])
    monkeypatch.setitem(sections.SECTIONS, "scale", lambda device, quick: one_point)
    path = tmp_path / "results.json"
    assert main(["--section", "scale", "--json", str(path)]) == 0
    results = report.read(path)
    assert [(row.peer, row.median, row.passes) for row in results.rows] == [
        ("a", 8.0, [5.0, 8.0, 6.0]),
        ("b", 2.0, [9.0, 2.0, 6.0]),
    ]
    assert results.answers["How much do the passes of host times differ?"] == [
        "a way's slowest pass takes 3.05 x its quickest (median), 4.50 x at most"
    ]


def test_later_passes_take_host_times_alone(monkeypatch, tmp_path):
    passes = []

    def measured(section, metrics, cases, **options):
        passes.append(list(metrics))
        row = report.Row(section, "", "pairs", {"pairs": 6}, "", 8, "way", 1, 1.0, 1.0, 1.0)
        return [replace(row, metric=metric) for metric in metrics]

    monkeypatch.setattr("fill_benchmark.runner.measure", measured)
    section = sections.Section(["host", "gpu"], [lambda: ()])
    monkeypatch.setitem(sections.SECTIONS, "scale", lambda device, quick: section)
    path = tmp_path / "results.json"
    assert main(["--section", "scale", "--json", str(path)]) == 0
    assert passes == [["host", "gpu"], ["host"], ["host"]]
    assert [(row.metric, row.passes) for row in report.read(path).rows] == [("host", [1.0, 1.0, 1.0]), ("gpu", None)]


def test_sections_without_host_times_have_one_pass(monkeypatch):
    order = [("gpu", 0), ("scale", 0), ("scale", 1), ("scale", 2), ("threading", 0)]
    assert runner._order(["threading", "scale", "gpu"], 3) == order
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    made = {name: make(torch.device("meta"), quick=True) for name, make in sections.SECTIONS.items()}
    assert {name for name, section in made.items() if "host" in section.metrics} == set(sections.ON_CPU)


def test_the_profiler_comes_after_all_times(monkeypatch):
    made, profiled = [], []

    def measured(section, metrics, cases, **options):
        profiled.append(options["profiled"])
        return []

    monkeypatch.setattr("fill_benchmark.runner.measure", measured)
    for name in sections.SECTIONS:
        section = sections.Section([], [partial(made.append, name)])
        monkeypatch.setitem(sections.SECTIONS, name, lambda device, quick, section=section: section)
    monkeypatch.setattr("fill_benchmark.runner.ON_CPU", tuple(sections.SECTIONS))
    assert main(["--section", ",".join(sections.SECTIONS)]) == 0
    assert profiled == [name in sections.PROFILED for name in made]
    assert profiled.index(True) == len(made) - sum(profiled)


def test_any_part_of_a_run_can_be_evaluated(full_rows):
    for end in range(0, len(full_rows), 97):
        targets.evaluate(full_rows[:end], {})
        answers.answer(full_rows[:end])


def test_ways_that_cannot_run_are_named_in_one_line_for_each_reason(monkeypatch, capsys):
    def needs_a_gpu(buffers, sets):
        raise Unavailable("it needs a GPU")

    cannot = {"a [bold] way": needs_a_gpu, "b": needs_a_gpu}
    left_out = []
    workload = replace(sections.dense_pairs(2, torch.device("cpu")), ways=cannot | {REPLAY: PEERS[REPLAY]})
    rows = sections.measure("scale", ["host"], [workload], quick=True, left_out=lambda *said: left_out.append(said))
    assert [row.peer for row in rows] == [REPLAY]
    assert left_out == [("a [bold] way; b", "it needs a GPU")]

    monkeypatch.setitem(PEERS, "a [bold] way", needs_a_gpu)
    monkeypatch.setitem(PEERS, "b", needs_a_gpu)
    monkeypatch.setenv("COLUMNS", "2000")
    assert main(["--section", "scale", "--quick"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "it needs a GPU" in line]
    assert len(lines) == 1 and "a [bold] way; b" in lines[0]


@pytest.mark.parametrize("width", [60, 80])
def test_tables_are_readable_on_narrow_consoles(monkeypatch, width, full_rows):
    monkeypatch.setenv("COLUMNS", str(width))
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    console = plain_console()
    report.print_peers(console)
    measured = [replace(row, median=20990.0, p10=12.0, p90=23999.0, launches=6) for row in full_rows]
    points = [list(rows) for _, rows in groupby(measured, key=lambda row: (row.section, row.metric, str(row.point)))]
    for rows in points:
        report.print_point(console, rows)
    report.print_answers(console, answers.answer(full_rows))
    verdicts = targets.evaluate(full_rows, PACKAGE)
    report.print_targets(console, verdicts)
    printed = text.getvalue()
    assert "…" not in printed and max(map(len, printed.splitlines())) <= width
    assert printed.count("12.0-23999") == len(measured)
    assert {*PEERS, *VALUES, *ROWS} <= set(printed.splitlines())
    assert not re.search(r":\w+:`|``", printed)
    assert printed.count("MISSED") == sum(verdict.met is False for verdict in verdicts)


def test_only_measured_metrics_have_a_panel(tmp_path, full_rows):
    for metrics, labels in ((("host",), 1), (("host", "gpu"), 2)):
        rows = [row for row in full_rows if row.metric in metrics]
        path = tmp_path / f"{len(metrics)}.json"
        path.write_text(report.serialize(report.Results({"date": "2026"}, False, rows)))
        for picture in plots.draw(path, tmp_path):
            assert picture.read_text().count("us per call") == labels


@pytest.mark.parametrize(
    "section", ["host", pytest.param("gpu", marks=pytest.mark.skipif(not HAS_GPU, reason="needs a GPU"))]
)
def test_a_wrong_peer_fails_the_run(monkeypatch, tmp_path, capsys, section):
    def sloppy(buffers, sets):
        def step(sources):
            for name, source in sources.items():
                if name != "positions":
                    buffers[name].view(-1)[: source.numel()].copy_(source.view(-1))

        return Peer([lambda sources=sources: step(sources) for sources in sets], buffers, sets)

    monkeypatch.setitem(PEERS, "sloppy", sloppy)
    path = tmp_path / "results.json"
    assert main(["--section", section, "--quick", "--json", str(path)]) == 1
    assert "sloppy is wrong: positions has 90 at [0]" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("wrong_set", range(sections.SETS))
@pytest.mark.parametrize("index", [(0, 0), (2, 6), (2, 7), (3, 0)], ids=["first", "last", "right of it", "below it"])
def test_check_looks_at_every_set_and_all_around(wrong_set, index):
    buffers = capture_buffers(4, 8)
    workload = sections.decode_step(buffers, 3, 7)
    calls = list(PEERS[SIX_COPIES](buffers, workload.sets).calls)
    check("right", Peer(calls, buffers, workload.sets))

    def wrong(right=calls[wrong_set]):
        right()
        buffers["page_table"][index] += 1

    calls[wrong_set] = wrong
    with pytest.raises(WrongResult, match=rf"page_table has -?\d+ at \[{index[0]}, {index[1]}\]"):
        check("wrong", Peer(calls, buffers, workload.sets))


def test_a_graph_that_copies_nothing_is_a_wrong_result(monkeypatch):
    monkeypatch.setattr(timing, "capture", lambda calls: SimpleNamespace(replay=lambda: None))
    workload = replace(sections.dense_pairs(2, torch.device("cpu")), ways={REPLAY: PEERS[REPLAY]})
    with pytest.raises(WrongResult, match=r"fused_copy\.replay, in a graph is wrong: tensor 0 has 90"):
        sections.measure("scale", ["gpu"], [workload], quick=True)


@pytest.mark.parametrize("columns", [1, 5, 1 << 19])
def test_the_contiguous_copy_is_aligned_and_moves_all_bytes(columns):
    buffers = {"odd": torch.zeros(3, dtype=torch.uint8), "matrix": torch.zeros(2, columns, dtype=torch.int32)}
    sets = [{key: torch.ones_like(buffer) for key, buffer in buffers.items()} for _ in range(2)]
    peer = PEERS[CONTIGUOUS](buffers, sets)
    check(CONTIGUOUS, peer)
    for tensor in (peer.buffers["all"], *(one["all"] for one in peer.sets)):
        assert 0 <= tensor.nbytes - (3 + 8 * columns) < 16
        assert tensor.data_ptr() % 16 == tensor.nbytes % 16 == 0


def test_the_fastest_of_several_is_taken_on_a_gpu(monkeypatch):
    seen = []
    monkeypatch.setattr(peers, "gpu_us", lambda calls, **_: timing.Timing((calls[0](),)))

    def peer(us, on_gpu):
        tensors = {"a": SimpleNamespace(is_cuda=on_gpu, nbytes=4)}
        return Peer([lambda: seen.append(us) or us], tensors, [tensors])

    assert peers._fastest([peer(us, True) for us in (3.0, 1.0, 2.0)]).calls[0]() == 1
    assert seen[:4] == [3, 3, 1, 1]
    assert peers._fastest([peer(us, False) for us in (3.0, 1.0)]).calls[0]() == 3


@pytest.mark.parametrize("name", PEERS)
def test_peers_take_mixed_shapes_and_dtypes(name):
    pairs = {
        "vector": (torch.int32, (8,), (5,)),
        "matrix": (torch.int64, (3, 8), (3, 5)),
        "scalar": (torch.uint8, (), ()),
        "cube": (torch.int32, (2, 3, 4), (2, 1, 3)),
    }
    buffers = {key: torch.zeros(whole, dtype=dtype) for key, (dtype, whole, _) in pairs.items()}
    sets = [{key: torch.randint(1, 89, size, dtype=dtype) for key, (dtype, _, size) in pairs.items()} for _ in range(2)]
    try:
        peer = PEERS[name](buffers, sets)
    except Unavailable:
        pytest.skip("not for these tensors")
    check(name, peer)


def test_sources_are_never_zero_and_differ():
    for workload in (
        sections.decode_step(capture_buffers(8, 64), 5, 33),
        sections.dense_pairs(3, torch.device("cpu")),
        *sections.layouts((6, 15), (10, 9), torch.device("cpu")),
        *sections.casts(4, 16, torch.device("cpu")),
    ):
        assert len(workload.sets) == sections.SETS
        first, second, *_ = workload.sets
        for name, source in first.items():
            assert source.all()
            assert not torch.equal(source, second[name])


@pytest.mark.parametrize("odd", [True, False], ids=["odd", "small"])
def test_layouts_are_what_they_say(odd):
    shapes = ((256, 4095), (260, 4032)) if odd else ((64, 1023), (66, 992))
    layouts = {workload.case: workload for workload in sections.layouts(*shapes, torch.device("cpu"))}
    assert len({workload.bytes for workload in layouts.values()}) == 1
    phases = {
        case: [(m.data_ptr() % 16, m.stride(0) % 4) for m in (w.buffers["matrix"], w.sets[0]["matrix"])]
        for case, w in layouts.items()
    }
    assert phases["aligned"] == phases["aligned, dense buffer"] == [(0, 0), (0, 0)]
    assert phases["odd, both 4 bytes off"] == [(4, 3), (4, 3)]
    assert phases["odd, buffer 4 bytes off"] == [(4, 3), (0, 3)]
    assert layouts["transposed source"].sets[0]["matrix"].stride(0) == 1
    narrow = [case for case, w in layouts.items() if w.buffers["matrix"].shape == w.sets[0]["matrix"].shape]
    assert narrow == ["aligned, dense buffer"]


@pytest.mark.parametrize("make", [sections.layouts, sections.casts], ids=lambda f: f.__name__)
def test_every_case_is_checked_and_timed(make):
    arguments = ((6, 15), (10, 9)) if make is sections.layouts else (4, 16)
    cases = make(*arguments, torch.device("cpu"))
    rows = sections.measure("gpu", ["host", "step"], cases, quick=True)
    expected = {(metric, w.case, way) for w in cases for way in w.ways for metric in ("host", "step")}
    assert {(row.metric, row.case, row.peer) for row in rows} == expected
    assert len(rows) == len(expected)


def test_a_fill_that_is_not_made_is_a_wrong_result():
    workload = next(w for w in sections.casts(4, 16, torch.device("cpu")) if "filled" in w.case)
    filling = workload.ways[OP](workload.buffers, workload.sets)
    check("fills", filling)
    plain = PEERS[OP](workload.buffers, workload.sets)
    with pytest.raises(WrongResult, match=r"matrix has 90 at \[2, 0\], where copy_ leaves -1"):
        check("does not", Peer(plain.calls, plain.buffers, plain.sets, fill=filling.fill))


def test_a_step_fills_and_then_replays_the_model(monkeypatch):
    order = []
    monkeypatch.setattr(peers, "capture", lambda calls: SimpleNamespace(replay=calls[0]))
    model = peers.ModelGraph(lambda: order.append("model"))
    workload = sections.dense_pairs(2, torch.device("cpu"))

    def factory(buffers, sets):
        return Peer([lambda i=i: order.append(i) for i in range(len(sets))], buffers, sets)

    step = peers.before_model(workload.buffers, workload.sets, factory, model)
    step.calls[2]()
    step.calls[0]()
    peers.model_alone(workload.buffers, workload.sets, model).calls[1]()
    assert order == [2, "model", 0, "model", "model"]


def test_a_compiled_peer_that_does_not_run_is_left_out():
    def fails():
        raise RuntimeError("no such kernel")

    with pytest.raises(Unavailable, match="RuntimeError: no such kernel"):
        peers.tried(Peer([fails], {}, []))


def test_the_model_runs_and_leaves_the_buffers():
    buffers = capture_buffers(4, 32)
    for name, source in sections.decode_step(buffers, 3, 32).sets[0].items():
        buffers[name][tuple(map(slice, source.shape))] = source
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    small_model(buffers, 3)()
    assert all(torch.equal(buffers[name], before[name]) for name in buffers)


def test_replay_is_looked_up_when_the_peer_is_made(monkeypatch):
    monkeypatch.setattr(fused_copy, "replay", lambda dst, src: None)
    with pytest.raises(WrongResult, match=r"fused_copy\.replay is wrong"):
        workload = sections.dense_pairs(2, torch.device("cpu"))
        check("fused_copy.replay", PEERS["fused_copy.replay"](workload.buffers, workload.sets))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--section", "host,nothing"],
            "no section nothing; there are host, gpu, scale, values, rows, decode, threading, import",
        ),
        (["--json", "nowhere/results.json"], "there is no directory nowhere"),
        (["--plot", "nowhere"], "there is no directory nowhere"),
        (["--wheel", "nowhere.whl"], "there is no file nowhere.whl"),
        pytest.param(
            ["--section", "host,decode"],
            "sees no GPU",
            marks=pytest.mark.skipif(HAS_GPU, reason="needs a machine without a GPU"),
        ),
    ],
)
def test_refuses_before_it_measures(capsys, arguments, message):
    assert main(["--quick", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_commit_from_the_environment(monkeypatch):
    monkeypatch.setenv("FUSED_COPY_COMMIT", "fedcba9")
    seen = []
    monkeypatch.setattr("fill_benchmark.runner.run", lambda **arguments: seen.append(arguments["commit"]) or 0)
    assert main([]) == main(["--commit", "1234567"]) == 0
    assert seen == ["fedcba9", "1234567"]


NEED_A_GPU = {
    "Triton, one kernel",
    "tvm-ffi, one kernel",
    "cudaMemcpyAsync per pair, C++",
    "cudaMemcpyBatchAsync, C++",
    "hard-wired for these six, one kernel",
    "op that does nothing",
    "op that reads its tensors alone",
    "op that reads its tensors, then a bare launch",
    "bare launch",
    "graph.raw_cuda_graph_exec() alone",
    "graph.replay() alone",
    "copy.update + graph.replay()",
    "an empty node set + graph.replay()",
}


PACKAGE = {"import_ms": 5.0, "wheel_mb": 1.25, "build_seconds": 91.0}


def with_time(rows, us, metric, way, /, p10=None, p90=None, **point):
    times = {"median": us, "p10": us if p10 is None else p10, "p90": us if p90 is None else p90}
    return [
        replace(row, **times) if (row.metric, row.peer) == (metric, way) and row.point.items() >= point.items() else row
        for row in rows
    ]


def test_a_full_run_measures_every_target_and_answers_every_question(full_rows):
    measured = targets.evaluate(full_rows, PACKAGE)
    assert [v.figure for v in measured if v.met is None] == []
    names = "H1 H2 H3 H4 G1 G2 G3 G4 P1 V1 V2 V3 R1 R2 I1 B1"
    assert {v.target for v in measured} == set(names.split())
    assert all(bool(v.limit) != v.met for v in measured)
    disturbed = with_time(full_rows, 5.0, "host", OP, p90=6.3, bs=8)
    disturbed = with_time(disturbed, 2.0, "host", GRAPH_REPLAY, p90=2.5, pairs=6)
    unsteady = "Where did the machine disturb most ways?"
    assert set(answers.answer(disturbed)) == set(answers.QUESTIONS) - {unsteady}
    for way in PEERS:
        disturbed = with_time(disturbed, 5.0, "host", way, p90=6.3, bs=8)
    ways = len(PEERS)
    assert answers.answer(disturbed)[unsteady] == [
        f"host, decode, bs 8, max_seqlen_k 1024: p90 is above 1.25 x p10 for {ways} of {ways} ways"
    ]


def verdicts(rows, target):
    return [(v.measured, v.met, v.at) for v in targets.evaluate(rows, PACKAGE) if v.target == target]


def limits(rows, target):
    return [v.limit for v in targets.evaluate(rows, PACKAGE) if v.target == target]


def test_targets_take_the_worst_point(full_rows):
    assert verdicts(full_rows, "H3") == [(1.0, True, "bs 64, max_seqlen_k 1024")]
    assert {met for _, met, _ in verdicts(full_rows, "G2")} == {True}
    assert [met for _, met, _ in verdicts(full_rows, "G1")] == [False, False]

    slow = with_time(full_rows, 49.0, "host", PLAN, pairs=64)
    assert verdicts(slow, "H4")[0] == (pytest.approx(50 / 49), False, "pairs 64")
    slow = with_time(full_rows, 5.5, "gpu", OP, bs=8, max_seqlen_k=4096)
    assert verdicts(slow, "G1")[0][1:] == (False, "bs 8, max_seqlen_k 4096")
    slow_when_large = with_time(full_rows, 99.0, "gpu", OP, bs=512, max_seqlen_k=131072)
    assert verdicts(slow_when_large, "G1")[1] == (99 / 4, False, "bs 512, max_seqlen_k 131072")
    slow_when_small = with_time(full_rows, 99.0, "gpu", OP, bs=1, max_seqlen_k=128)
    assert verdicts(slow_when_small, "G1")[1][0] == 5 / 4
    assert verdicts(full_rows, "I1") == [(5, True, "")]
    assert verdicts(full_rows, "B1") == [(1.25, True, ""), (91, False, "")]


def test_the_yardstick_is_the_fastest_contiguous_copy_of_about_the_bytes(full_rows):
    medians = targets.Medians(with_time(full_rows, 2.0, "gpu", SIX_COPIES, rows=512, columns=32768), PACKAGE)
    near = {"bs": 512, "max_seqlen_k": 32768}  # 67,119,108 bytes, and int32[512, 32768] has 67,108,864
    assert medians.contiguous(near) == 2 * 67_119_108 / 67_108_864
    assert medians.contiguous(near | {"bs": 64}) == 4


def test_limits_are_those_of_the_worst_point(full_rows):
    rows = with_time(full_rows, 40.0, "host", PLAN, pairs=64)
    rows = with_time(rows, 20.0, "host", "bare launch", pairs=64)
    rows = with_time(rows, 90.0, "host", REPLAY, pairs=512)
    assert limits(rows, "H4") == ["2.50x by bare launch", "10.00x by plan.replay, which reads sources alone"]
    assert limits(full_rows, "H1")[0] == ""
    assert limits(full_rows, "G1")[0] == "1.25x by hard-wired for these six, one kernel"
    without = [row for row in full_rows if row.peer != "hard-wired for these six, one kernel"]
    assert limits(without, "G1")[0] == "not explained yet"


def test_limits_in_parts_add_up_to_what_was_missed(full_rows):
    host = {OP: 18.0, "op that does nothing": 4.0, "op that reads its tensors alone": 7.0, "bare launch": 4.0}
    host |= {PLAN: 6.0, UPDATE_AND_REPLAY: 7.0, "graph.raw_cuda_graph_exec() alone": 0.5}
    host |= {"an empty node set + graph.replay()": 3.0}
    host |= {"op that reads its tensors, then a bare launch": 14.0}
    rows = full_rows
    for way, us in host.items():
        rows = with_time(rows, us, "host", way)
    assert limits(rows, "H1") == [
        "4.00 us check and plan six pairs",
        "4.29x by op that reads its tensors, then a bare launch",
    ]
    assert limits(rows, "H2")[0] == "1.50 us read the sources, 0.50 check and plan six pairs"
    assert limits(rows, "H3")[0] == (
        "1.00 us by a node that does nothing, 2.00 us read, check and plan as plan.replay does, "
        "0.50 us ask torch for the executable, 1.50 us hold the sources and the rest"
    )


def test_targets_of_sources_take_the_worst_point(full_rows):
    # What reading a list adds to a launch of 5 us, where np.array takes as long.
    slow = with_time(full_rows, 7.0, "host", LISTS, bs=64)
    slow = with_time(slow, 6.5, "host", ARRAYS, bs=256)
    slow = with_time(slow, 350.0, "host", PINNED)
    slow = with_time(slow, 30.0, "host", PINNED, bs=8)
    step = "bs {}, max_seqlen_k 1024"
    assert verdicts(slow, "V1") == [
        (pytest.approx(2 / 5), False, step.format(64)),
        (30 / 5, False, step.format(8)),
        (1.5, False, step.format(256)),
    ]
    added = with_time(slow, 9.0, "host", UPDATE_LISTS, bs=64)
    assert verdicts(added, "V2") == [(1.0, True, step.format(64))]
    beyond_4_kb = with_time(added, 99.0, "host", UPDATE_LISTS, bs=256)
    assert verdicts(beyond_4_kb, "V2") == verdicts(added, "V2")
    assert verdicts(with_time(full_rows, 6.0, "gpu", LISTS, bytes=16384), "V3") == [(1.2, False, "bytes 16384")]

    slow = with_time(full_rows, 5.5, "gpu", PLAN_ROWS, bs=64, tokens=4096, page_size=16)
    slow = with_time(slow, 7.0, "host", PLAN_ROWS, bs=8, tokens=1024, page_size=64)
    at = "bs {}, tokens {}, page_size {}, cut at lengths"
    assert verdicts(slow, "R1") == [
        (1.1, False, at.format(64, 4096, 16)),
        (pytest.approx(4.5 / 5), True, at.format(8, 1024, 1)),
    ]
    assert verdicts(slow, "R2") == [
        (1.4, False, at.format(8, 1024, 64)),
        (pytest.approx(5 / 7), False, at.format(8, 1024, 64)),
    ]


def test_targets_of_a_part_of_a_run_are_not_measured(full_rows):
    host = [row for row in full_rows if row.section == "host"]
    measured = targets.evaluate(host, {})
    assert {v.target for v in measured if v.met is not None} == {"H1", "H2", "H3"}
    assert all(v.measured is None and v.at for v in measured if v.met is None)


def test_a_share_within_the_spread_is_not_resolved(full_rows):
    rows = with_time(full_rows, 3.0, "step", UPDATE_AND_REPLAY, p10=2.0, bs=64)
    rows = with_time(rows, 2.5, "step", UPDATE_AND_REPLAY, bs=8)
    said = answers.answer(rows)["Latency and replays per second of a decode step with a small model"]
    assert [line for line in said if "not resolved" in line] == [
        f"bs 64, {UPDATE_AND_REPLAY}: 3.0 us a step, the fill's share 33.3%; "
        "333,333 replays/s in a loop, the fill's share not resolved"
    ]
