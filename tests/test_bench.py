"""``fused-copy bench``: that it runs, keeps what it measured, and times no wrong way. Not how fast anything is."""

import io
import json
import sys

import pytest
import torch

import fused_copy
from fused_copy import bench
from fused_copy.timing import Timing
from fused_copy_cli import main

HAS_GPU = torch.cuda.is_available()
ON_CPU = ["slices + copy_", "_foreach_copy_", "torch.ops.fused_copy.replay", "fused_copy.replay", "plan.replay"]
WAYS = [*ON_CPU, *bench.NEED_A_GPU] if HAS_GPU else ON_CPU
pytestmark = pytest.mark.capture  # on a GPU


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # or on a busy machine copy_ waits for threads to share a page table among
    yield
    torch.set_num_threads(threads)


def test_a_run_prints_writes_and_draws(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "BATCH_SIZES", (2, 8))
    path, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    assert main(["bench", "--json", str(path), "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split("  ")[0] for line in lines if line.startswith(tuple(WAYS))] == 2 * WAYS
    assert ("without a GPU: no copy.update, no launches, no GPU times" in lines) != HAS_GPU
    found = json.loads(path.read_text())
    assert found["complete"] and not found["quick"] and found["machine"]["torch"] == torch.__version__
    assert [(row["bs"], row["way"]) for row in found["rows"]] == [(bs, way) for bs in (2, 8) for way in WAYS]
    for row in found["rows"]:
        assert 0 < row["host_us"]["p10"] <= row["host_us"]["median"] <= row["host_us"]["p90"]
        counted = HAS_GPU and row["way"] in ON_CPU
        assert (row["gpu_us"] is not None) == (row["launches"] is not None) == counted
        if counted and row["way"] != "_foreach_copy_":
            assert row["launches"] == (6 if row["way"] == bench.SIX_COPIES else 1)
    assert "</svg>" in plot.read_text()


def test_quick_is_one_step(capsys):
    assert main(["bench", "--quick"]) == 0
    assert capsys.readouterr().out.count("page table 1024 wide") == 1


@pytest.mark.parametrize("timed", [0, 2, len(WAYS) + 1], ids=["at once", "early", "later"])
def test_ctrl_c_keeps_what_was_measured(monkeypatch, tmp_path, capsys, timed):
    left = [timed]

    def host_us(calls, **_):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return Timing((float(len(calls)),))

    monkeypatch.setattr(bench, "host_us", host_us)
    path = tmp_path / "bench.json"
    assert main(["bench", "--json", str(path), "--plot", str(tmp_path / "bench.png")]) == 130
    found = json.loads(path.read_text())
    assert not found["complete"]
    kept = WAYS[max(0, len(WAYS) - timed) :]  # the first round begins with the last way
    assert [row["way"] for row in found["rows"]] == kept
    _, stopped, table = capsys.readouterr().out.partition("stopped")
    assert stopped
    assert [line.split("  ")[0] for line in table.splitlines() if line.startswith(tuple(WAYS))] == kept


def printed(width: int, rows: list[bench.Row], monkeypatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    bench.show(bench.plain_console(), rows)
    return text.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_console_cuts_nothing_off(width, monkeypatch):
    rows = [
        bench.Row(64, way, 6, Timing((12.5, 20990.0, 21000.0)), Timing((7.25,))) for way in (*ON_CPU, *bench.NEED_A_GPU)
    ]
    lines = printed(width, rows, monkeypatch)
    text = "\n".join(lines)
    assert "…" not in text and max(map(len, lines)) <= width
    assert text.count("12.5-21000") == text.count("7.25") == len(rows)
    assert "copy.update adds 0.00 us and no launch" in text
    if width == 60:  # names are cut where words end
        assert [line.split("  ")[0].strip() for line in lines if line.startswith(("torch.ops", " "))] == [
            "torch.ops.", "fused_copy.replay", "graph.replay()", "alone",
        ]  # fmt: skip
    else:
        assert [line.split("  ")[0] for line in lines[4:-1]] == [row.way for row in rows]


def test_names_are_no_markup_and_empty_columns_are_left_out(monkeypatch):
    lines = printed(80, [bench.Row(1, "x[:bs] in [bold] :rows:", None, Timing((2.0,)))], monkeypatch)
    assert lines[-1].split() == ["x[:bs]", "in", "[bold]", ":rows:", "2.00", "2.00-2.00"]
    assert lines[2].split() == ["way", "host", "us", "p10-p90"]


@pytest.mark.parametrize("wrong", ["does nothing", "writes beside it"])
def test_a_wrong_way_fails_the_run(monkeypatch, tmp_path, capsys, wrong):
    replay = fused_copy.replay

    def sloppy(dst, src):
        if wrong != "does nothing":
            replay(dst, src)
            dst[-1][0, -1] = 1

    monkeypatch.setattr(fused_copy, "replay", sloppy)
    path = tmp_path / "bench.json"
    assert main(["bench", "--quick", "--json", str(path)]) == 1
    place = "input_ids has 90 at [0]" if wrong == "does nothing" else "page_table has 1 at [0, 2047]"
    assert f"fused_copy.replay is wrong: {place}" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "nowhere/bench.json"], "there is no directory nowhere"),
        (["--plot", "nowhere/bench.svg"], "there is no directory nowhere"),
        (["--plot", "bench.txt"], "expected a .pdf, .png or .svg file"),
        (["--json", "."], ".: cannot be written"),
    ],
)
def test_refuses_before_it_measures(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(["bench", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_says_what_to_install(monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["bench", *(["--plot", "bench.svg"] if missing == "matplotlib" else [])]) == 2
    assert f"needs {missing}: pip install {missing}\n" in capsys.readouterr().err
