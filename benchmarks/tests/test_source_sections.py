"""The benchmark's sections of host values and of page rows: every way fills the buffers, and wrong ones fail."""

import sys

import pytest
import torch

from fill_benchmark import report, sections, sources
from fill_benchmark.native import Unavailable
from fill_benchmark.peers import GRAPH_REPLAY, PEERS, PLAN, UPDATE_AND_REPLAY, Peer, check
from fill_benchmark.sources import ROWS, VALUES
from fused_copy.bench import POISON, SETS, WrongResult
from fused_copy.decode import capture_buffers
from run import main

HAS_GPU = torch.cuda.is_available()

NEED_A_GPU = {
    sources.PINNED,
    sources.PACKED,
    sources.UPDATE_LISTS,
    sources.TRITON_ROWS,
    UPDATE_AND_REPLAY,
    GRAPH_REPLAY,
}


@pytest.mark.skipif(HAS_GPU, reason="needs a machine without a GPU")
def test_quick_run_without_a_gpu(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert main(["--section", "values,rows", "--quick", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in VALUES | ROWS)
    results = report.read(path)
    ways = {}
    for row in results.rows:
        assert row.metric == "host" and 0 < row.p10 <= row.median <= row.p90
        ways.setdefault((row.workload, *row.point.values(), row.case), set()).add(row.peer)
    host_values = {*VALUES, PLAN} - NEED_A_GPU
    made = {*ROWS, PLAN} - NEED_A_GPU
    assert ways == {
        ("values", 8, 1024, ""): host_values,
        ("values", 64, 1024, ""): host_values,
        **{("parameters", size, ""): {sources.LISTS, PLAN} for size in (2048, 16384)},
        **{("rows", 8, 1024, page_size, "whole rows"): made for page_size in (1, 16)},
        **{("rows", 8, 1024, page, "cut at lengths"): {sources.PLAN_ROWS, PLAN} for page in (1, 16)},
    }
    assert {row.bytes for row in results.rows if row.workload == "parameters"} == {2048, 16384}


def test_wrong_values_and_rows_fail_the_run(monkeypatch, capsys):
    def late(buffers, sets):
        right = VALUES[sources.LISTS](buffers, sets)
        return Peer([*right.calls[1:], right.calls[0]], buffers, sets)

    def uncut(buffers, sets, requests):
        whole = [sources.Requests(**vars(one) | {"cut": False}) for one in requests]
        return ROWS[sources.PLAN_ROWS](buffers, sets, whole)

    monkeypatch.setitem(VALUES, "late", late)
    assert main(["--section", "values", "--quick"]) == 1
    assert "late is wrong: input_ids has" in capsys.readouterr().err
    monkeypatch.setitem(ROWS, "uncut", uncut)
    assert main(["--section", "rows", "--quick"]) == 1
    assert "uncut, cut at lengths is wrong: page_table has" in capsys.readouterr().err


@pytest.mark.parametrize("way", [sources.PINNED, sources.PACKED])
def test_pinned_ways_fill_the_buffers(monkeypatch, way):
    """As far as a processor can tell, for which memory is not pinned."""
    monkeypatch.setattr(sources, "needs_gpu", lambda buffers: None)
    for name in ("tensor", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, pin_memory=False, **kwargs: make(*args, **kwargs))
    buffers = capture_buffers(6, 32)
    workload = sections.decode_step(buffers, 4, 17)
    peer = VALUES[way](buffers, workload.sets)
    check(way, peer)
    assert list(peer.buffers) == list(buffers)
    assert [buffer.shape for buffer in peer.buffers.values()] == [buffer.shape for buffer in buffers.values()]
    with pytest.raises(WrongResult):
        check(way, Peer(peer.calls[::-1], peer.buffers, peer.sets, fill=peer.fill))


def test_what_is_not_installed_is_left_out(monkeypatch):
    workload = sections.decode_step(capture_buffers(2, 4), 2, 4)
    monkeypatch.setattr(sources, "needs_gpu", lambda buffers: None)
    for package in ("numpy", "triton"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fill_benchmark.triton_kernel", raising=False)
    for way in (sources.ARRAYS, sources.NP_ARRAY, sources.PACKED):
        with pytest.raises(Unavailable, match="numpy"):
            VALUES[way](workload.buffers, workload.sets)
    with pytest.raises(Unavailable, match="triton"):
        ROWS[sources.TRITON_ROWS](workload.buffers, workload.sets, [])


def test_values_leave_the_page_table_a_tensor():
    step = sections.decode_step(capture_buffers(4, 8), 3, 8)
    taken = sources._taken(step.sets, list)
    assert [type(value) for value in taken[0].values()] == [list] * 5 + [torch.Tensor]
    assert taken[1]["positions"] == step.sets[1]["positions"].tolist()
    assert [len(values) for values in sources._lists(step.sets)[0]] == [3, 3, 4, 3, 3]


def page_rows(bs=3, tokens=256, page_size=16):
    buffers = capture_buffers(bs + 1, tokens + 1)
    buffers = {name: buffers[name] for name in ("seq_lens", "cu_seqlens_k", "page_table")}
    table = torch.randint(1, 1 << 30, (SETS * (bs + 1), tokens + 8), dtype=torch.int32)
    cases = sections.page_rows(buffers, table, bs, tokens, page_size)
    return table, {workload.case: workload for workload in cases}


@pytest.mark.parametrize("page_size", [1, 16])
def test_page_rows_are_what_they_say(page_size):
    table, cases = page_rows(page_size=page_size)
    requests = {case: w.ways[sources.PLAN_ROWS].keywords["requests"] for case, w in cases.items()}
    assert len(torch.cat([one.index for one in requests["whole rows"]]).unique()) == SETS * 3
    for case, made in requests.items():
        for one, tensors in zip(made, cases[case].sets, strict=True):
            lengths = one.lengths.tolist()
            assert all(0 < length <= 256 and length % (4 * page_size) == 0 for length in lengths)
            assert tensors["seq_lens"].tolist() == lengths
            assert tensors["cu_seqlens_k"].tolist() == [sum(lengths[:i]) for i in range(4)]
            for row, index, length in zip(tensors["page_table"].tolist(), one.index, lengths, strict=True):
                pages = (table[index, :256:page_size] // page_size).tolist()
                kept = -(-length // page_size) if one.cut else len(pages)
                assert row == pages[:kept] + [POISON] * (len(pages) - kept)
            assert {tensor.dtype for tensor in tensors.values()} == {torch.int32}
    assert {one.cut for one in requests["cut at lengths"]} == {True}


@pytest.mark.parametrize("way", [way for way in ROWS if way not in NEED_A_GPU] + [PLAN])
@pytest.mark.parametrize("page_size", [1, 16])
def test_ways_make_page_rows(way, page_size):
    for workload in page_rows(page_size=page_size)[1].values():
        try:
            peer = workload.ways[way](workload.buffers, workload.sets)
        except Unavailable as reason:
            assert workload.case == "cut at lengths" and "whole" in str(reason)
        else:
            check(way, peer)


def test_a_full_run_has_every_point(full_rows):
    points = {}
    for row in full_rows:
        points.setdefault(row.workload, {}).setdefault((*row.point.values(), row.case), set()).add(
            (row.metric, row.peer)
        )
    assert list(points["values"]) == [(bs, 1024, "") for bs in (8, 64, 256)]
    assert list(points["parameters"]) == [(size, "") for size in (2048, 16384)]
    assert len(points["rows"]) == 3 * 3 * 3 * 2
    ways = {"values": {*VALUES, PLAN, UPDATE_AND_REPLAY, GRAPH_REPLAY}, "rows": {*ROWS, PLAN}}
    for workload, names in ways.items():
        for measured in points[workload].values():
            assert measured == {(metric, name) for metric in ("host", "gpu") for name in names}


def test_no_way_has_another_ones_name():
    assert len(PEERS | VALUES | ROWS) == len(PEERS) + len(VALUES) + len(ROWS)
