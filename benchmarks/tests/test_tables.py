"""What is made of results files: the documents' tables and pictures."""

import argparse
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import record

import decode_table
import engines_table
import performance_tables
import readme_table
import reliability_table
from fill_benchmark import plots, report, sections, targets
from fill_benchmark.peers import CONTIGUOUS, PEERS, SIX_COPIES
from fill_benchmark.sources import ROWS, VALUES

RESULTS = Path(__file__).parents[1] / "results"


def test_plots_are_the_same_for_the_same_file(full_rows, tmp_path):
    path = tmp_path / "run.json"
    absent = "_foreach_copy_, by dtypes"
    path.write_text(report.serialize(replace(results(), rows=[row for row in full_rows if row.peer != absent])))
    (tmp_path / "again").mkdir()
    first, second = plots.draw(path, tmp_path), plots.draw(path, tmp_path / "again")
    assert [p.name for p in first] == [f"run-{name}.svg" for name in (plots.STEP_PICTURE, *plots.AXES)]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    bars, *curves = (set(re.findall(r"<text[^>]*>([^<]+)</text>", picture.read_text())) for picture in first)
    assert bars > {*plots.STEP_WAYS, "copy.update", "60.0", "50.0", "5.00", "1.00"}
    for texts, axis in zip(curves, plots.AXES.values(), strict=True):
        assert texts & (PEERS | VALUES | ROWS).keys() == set(axis.ways) - {absent}


def test_only_what_was_measured_is_drawn(tmp_path):
    path = tmp_path / "run.json"
    write(results(), path)
    assert [p.name for p in plots.draw(path, tmp_path)] == ["run-batch-size.svg", "run-page-table-width.svg"]


def results(date: str = "2026-03-14T15:09:26+00:00", quick: bool = False, gpu: bool = True) -> report.Results:
    machine = {"gpu": "NVIDIA H200" if gpu else None, "driver": "580.1" if gpu else None, "torch": "2.11.0+cu130"}
    machine |= {"cpu": "a CPU", "date": date, "commit": None}
    times = {SIX_COPIES: (6, 50.0), CONTIGUOUS: (1, 5.0), "fused_copy.replay": (1, 4.0)}
    graph_times = {"graph.replay() alone": (None, 2.0), "copy.update + graph.replay()": (None, 3.25)}
    rows = [
        report.Row(section, section, "decode", {"bs": 64, "max_seqlen_k": width}, "", 4, name, n, us * factor, us, us)
        for section in (("host", "gpu") if gpu else ("host",))
        for width, factor in ((128, 0.5), (1024, 1), (4096, 2))
        for name, (n, us) in (times | (graph_times if section == "host" else {})).items()
    ]
    return report.Results(machine, quick, rows)


def write(of: report.Results, path: Path) -> None:
    path.write_text(report.serialize(of))


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{readme_table.BEGIN}\nold\n{readme_table.END}\n\nThe rest.\n")
    return path


def test_readme_table(readme, tmp_path, capsys):
    path = tmp_path / "h200-2026-03-14.json"
    write(results(), path)
    arguments = [str(path), "--readme", str(readme)]
    assert readme_table.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text()
    assert readme_table.main(arguments) == 0
    assert readme.read_text() == (
        "# Title\n\n<!-- measured:begin -->\n"
        "| | launches | host us per step | p10 to p90 | ratio | GPU us | ratio |\n"
        "|---|---:|---:|---:|---:|---:|---:|\n"
        "| six slices + `copy_` | 6 | 50.0 | 50.0 to 50.0 | 1.0x | 50.0 | 1.0x |\n"
        "| `fused_copy.replay`, two lists | 1 | 4.00 | 4.00 to 4.00 | 12.5x | 4.00 | 12.5x |\n"
        "| `copy.update`, added to `graph.replay()` | 0 | 1.25 |  | 40.0x |  |  |\n"
        "\n"
        "The six tensors of a decode step, bs 64, page table 1024 wide. Medians, in "
        "`torch.inference_mode()`; the ratio is to the first row. NVIDIA H200, driver 580.1, "
        "torch 2.11.0+cu130, 2026-03-14, [`h200-2026-03-14.json`](h200-2026-03-14.json).\n"
        "<!-- measured:end -->\n\nThe rest.\n"
    )
    assert readme_table.main([*arguments, "--check"]) == 0


def test_readme_links_the_picture_of_its_results_alone(readme, tmp_path, capsys):
    path = tmp_path / "run.json"
    write(results(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "run-tensors.svg").write_text("")
    picture = tmp_path / "run-decode-step.svg"
    picture.write_text(f"<svg>sha256 {digest}</svg>")
    arguments = [str(path), "--readme", str(readme)]
    assert readme_table.main(arguments) == readme_table.main([*arguments, "--check"]) == 0
    assert readme.read_text().count("![") == 1
    assert "\n\n![Host and GPU time of one decode step's fill, by way](run-decode-step.svg)\n<!--" in readme.read_text()
    write(results("2026-03-15"), path)
    assert readme_table.main([*arguments, "--check"]) == 2
    assert "run-decode-step.svg was not drawn from" in capsys.readouterr().err


def test_readme_table_without_gpu_times(readme, tmp_path):
    path = tmp_path / "cpu.json"
    write(results(gpu=False), path)
    assert readme_table.main([str(path), "--readme", str(readme)]) == 0
    assert "| six slices + `copy_` | 6 | 50.0 | 50.0 to 50.0 | 1.0x |  |  |" in readme.read_text()
    assert "a CPU, torch" in readme.read_text()


def test_readme_table_takes_the_newest(tmp_path):
    for name, date in [("b", "2026-03-14T00:00:00+00:00"), ("a", "2026-05-01T00:00:00+00:00"), ("c", "2025-12-31")]:
        write(results(date), tmp_path / f"{name}.json")
    assert readme_table.newest(tmp_path).name == "a.json"


def test_readme_table_says_what_is_missing(readme, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        assert readme_table.main([*map(str, arguments), "--readme", str(readme)]) == 2
        return capsys.readouterr().err

    path = tmp_path / "results.json"
    assert "results.json" in refused(path)
    write(results(quick=True), path)
    assert "quick run" in refused(path)
    path.write_text(json.dumps({"machine": {}, "quick": False, "rows": []}))
    assert "no host time of 'slices + copy_'" in refused(path)
    write(results(), path)
    readme.write_text("# Title\n")
    assert "has no <!-- measured:begin -->" in refused(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no results file"):
        readme_table.newest(tmp_path / "empty")


def test_readme_table_and_benchmark_agree():
    """On the names of the ways, of those to come apart, and on the point that both sections measure."""
    assert set(readme_table.WAYS) - {"plan.replay", "copy.update"} <= set(PEERS)
    assert readme_table.BASELINE == SIX_COPIES
    assert sections.STEP == readme_table.POINT
    assert set(readme_table.PICTURES) <= set(plots.AXES)
    assert [*readme_table.STEP_PICTURE] == [plots.STEP_PICTURE]


def test_the_page_has_the_tables_of_the_newest_run():
    assert performance_tables.main(["--check"]) == 0


def test_performance_tables_are_made_of_the_rows(full_rows, tmp_path, capsys):
    path, page = tmp_path / "run.json", tmp_path / "page.md"
    write(replace(results(), rows=full_rows, package={"import_ms": 12.345}), path)
    blocks = [*performance_tables.TABLES, "step", "curves", "sources"]
    places = ["\nold\n".join(performance_tables.markers(name)) for name in blocks]
    page.write_text("\n".join(["before", *places, "after\n"]))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    drawn = (plots.STEP_PICTURE, *readme_table.PICTURES, *performance_tables.SOURCES)
    for name in drawn:
        (tmp_path / f"run-{name}.svg").write_text(f"<svg>sha256 {digest}</svg>")
    arguments = [str(path), "--page", str(page)]
    assert performance_tables.main([*arguments, "--check"]) == 1
    assert "run python benchmarks/performance_tables.py" in capsys.readouterr().err
    assert performance_tables.main(arguments) == performance_tables.main([*arguments, "--check"]) == 0
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after") and "old" not in lines
    assert lines.index("<!-- targets:end -->") == 4 + len(targets.CONDITIONS)
    missed = "| I1 | import `fused_copy` beyond import torch | <= 6 ms | 12.35 | **missed** |  | not explained yet |"
    assert missed in lines
    assert "| B1 | wheel | <= 1.3 MB |  | not measured | `wheel_mb` |  |" in lines
    at = "bs 64, `max_seqlen_k` 1024"
    assert f"| H2 | six slices + `copy_` / `plan.replay`, host | >= 11x | 12.00 | met | {at} |  |" in lines
    assert "| `copy.update` + `graph.replay()` | 3.00 | 3.00 to 3.00 | 1.00 |" in lines
    assert "| 512 | 50.0 | 5.00 | 5.00 | 5.00 | 5.00 | 5.00 |" in lines
    assert "| 64 | 1024 | 263 | 60.0 | 5.00 | 5.00 | 5.00 | 5.00 | 4.00 | 1.25 | 1.25 |" in lines
    assert "| 8 | `copy.update` | 3.00 | 33.3% | 3.00 | 33.3% |" in lines
    assert "| 64 | 5.00 | 5.00 | 5.00 | 5.00 | 5.00 | 5.00 | 1.00 | 3.00 |" in lines
    assert "| 256 | 32768 | 64 | 5.00 | 5.00 | 5.00 | 5.00 | 5.00 | 5.00 |" in lines
    linked = [line.partition("](run-")[2] for line in lines if line.startswith("![")]
    assert linked == [f"{name}.svg)" for name in drawn]
    assert "; the ratio is" not in page.read_text() and "[`run.json`](run.json)." in page.read_text()
    for picture in tmp_path.glob("run-*.svg"):
        picture.unlink()
    older = [row for row in full_rows if row.section not in ("values", "rows")]
    write(replace(results(), rows=older), path)
    assert performance_tables.main(arguments) == 0
    for name in ("values", "rows"):
        assert f"<!-- {name}:begin -->\n\n<!-- {name}:end -->" in page.read_text()


def test_decode_table_is_made_of_a_run(tmp_path, capsys):
    """With a run on a GPU there is its table, without any there is none, and --check tells one from the other."""
    page, folder = tmp_path / "page.md", tmp_path / "results"
    folder.mkdir()
    page.write_text("before\n<!-- decode:begin -->\n\n<!-- decode:end -->\nafter\n")
    arguments = ["--page", str(page), "--results", str(folder)]
    empty = page.read_text()
    assert decode_table.main([*arguments, "--check"]) == 0

    run = json.loads(min(RESULTS.glob("decode-*.json")).read_text())
    run["machine"] |= {"date": "2026-01-01T00", "commit": "abc"}
    (folder / "decode-gpu-2026-01-01.json").write_text(json.dumps(run | {"script_sha256": None}))
    assert decode_table.main([*arguments, "--check"]) == 1
    assert page.read_text() == empty
    assert decode_table.main(arguments) == decode_table.main([*arguments, "--check"]) == 0
    lines = page.read_text().splitlines()
    launches = [str(row["launches"]) for row in run["rows"]]
    assert [line.split(" | ")[1] for line in lines if line.startswith("| ")] == ["launches", *launches]
    assert f"all {run['tokens']} tokens the same" in page.read_text()
    assert "commit abc, the script's form not recorded," in page.read_text()
    (folder / "decode-gpu-2026-01-01.json").write_text(json.dumps(run | {"script_sha256": "0123456789abcd"}))
    assert decode_table.main(arguments) == 0
    assert "commit abc, the script's SHA-256 0123456789ab...," in page.read_text()
    assert lines[0] == "before" and lines[-1] == "after"


def test_the_pages_have_the_newest_times_of_each_engine(tmp_path, monkeypatch, capsys):
    assert engines_table.main(["--check"]) == 0
    pages = {page: page.read_text() for page in (engines_table.PAGES / f"{name}.md" for name in engines_table.TABLES)}
    for page, text in pages.items():
        begin, _, rest = text.partition(engines_table.BEGIN)
        rest = rest[rest.index(engines_table.END) :]
        (tmp_path / page.name).write_text(f"{begin}{engines_table.BEGIN}\nold\n{rest}")
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(engines_table.README_MARKERS))
    monkeypatch.setattr(engines_table, "PAGES", tmp_path)
    monkeypatch.setattr(engines_table, "ROOT", tmp_path)
    assert engines_table.main(["--check"]) == 1
    assert "run python benchmarks/engines_table.py" in capsys.readouterr().err
    assert engines_table.main([]) == engines_table.main(["--check"]) == 0
    for page, text in pages.items():
        links = re.compile(r"\]\([^)]*\)")  # from another folder
        assert links.sub("", (tmp_path / page.name).read_text()) == links.sub("", text)
    assert readme.read_text().count("| 33 to 64 |") == 1


def test_a_span_is_of_the_runs_and_a_ratio_of_one_run():
    cells = engines_table.before_and_after([2000.0, 10.0], [200.0, 5.0])
    assert cells == ["10.0 to 2,000", "5.00 to 200", "2.0x to 10.0x"]
    assert engines_table.before_and_after([6.0, 6.0], [2.0, 2.0]) == ["6.00", "2.00", "3.0x"]


def test_reliability_table_is_made_of_the_files(tmp_path, capsys):
    folder, page = tmp_path / "results", tmp_path / "page.md"
    page.write_text("before\n<!-- recorded:begin -->\nold\n<!-- recorded:end -->\nafter\n")
    arguments = ["--page", str(page), "--results", str(folder)]
    assert reliability_table.main([*arguments, "--check"]) == 1
    assert reliability_table.main(arguments) == 0
    assert "No run has been" in page.read_text()
    to = argparse.Namespace(json=folder / "soak.json", commit="abc")
    record.write(to, tool="soak", what="a loop", cases=3000, unit="replays", seconds=1, faults=0)
    assert reliability_table.main([*arguments, "--check"]) == 1
    assert reliability_table.main(arguments) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 3,000 replays |" in text and "commit abc" in text and "`soak.json`" in text
    assert reliability_table.main([*arguments, "--check"]) == 0
