"""Writes the table of measured times into README.md, from a file that ``run.py --json`` wrote, and a link to the
picture of its decode step that ``--plot`` drew.

It needs nothing but Python, so that ``--check`` runs anywhere: the picture names the file that it was drawn from by its
SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"

POINT = {"bs": 64, "max_seqlen_k": 1024}
"""The decode step that the table shows."""

WAYS = {
    "slices + copy_": "six slices + `copy_`",
    "copy_, pre-sliced": "`copy_` into slices made beforehand",
    "_foreach_copy_": "six slices + `torch._foreach_copy_`",
    "_foreach_copy_, pre-sliced": "`torch._foreach_copy_` into slices made beforehand",
    "cudaMemcpyAsync per pair, C++": "`cudaMemcpyAsync` for each, from C++",
    "Triton, one kernel": "a Triton kernel for the six",
    "tvm-ffi, one kernel": "a tvm-ffi function for the six",
    "torch.ops.fused_copy.replay": "`torch.ops.fused_copy.replay`",
    "fused_copy.replay": "`fused_copy.replay`, two lists",
    "fused_copy.replay, mappings": "`fused_copy.replay`, two mappings",
    "plan.replay": "`plan.replay`",
    "copy.update": "`copy.update`, added to `graph.replay()`",
    "bare launch": "(the launch of an empty kernel)",
}
"""The benchmark's names of the table's rows, and how the table calls them. Rows that the file lacks are left out."""

README_WAYS = (
    "slices + copy_",
    "_foreach_copy_",
    "Triton, one kernel",
    "torch.ops.fused_copy.replay",
    "fused_copy.replay",
    "plan.replay",
    "copy.update",
    "bare launch",
)
"""Those that the README shows."""

BASELINE = "slices + copy_"

STEP_PICTURE = {"decode-step": "Host and GPU time of one decode step's fill, by way"}
"""The README's."""

PICTURES = {
    "batch-size": "Host and GPU time over the batch size",
    "page-table-width": "Host and GPU time over the page table's width",
    "tensors": "Host and GPU time over the number of tensors",
}
"""What pictures show, by the ends of their names. Those that lie beside the results file are linked."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description="Write the table of measured times into the README.")
    parser.add_argument("results", nargs="?", type=Path, help="default: the newest in benchmarks/results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README's table is another")
    args = parser.parse_args(argv)
    try:
        path = args.results or newest(ROOT / "benchmarks" / "results")
        file = os.path.relpath(path, args.readme.parent)
        lines = [table(json.loads(path.read_text()), file), *pictures(path, file, STEP_PICTURE)]
        new = with_table(args.readme.read_text(), "\n".join(lines))
    except (OSError, ValueError) as error:
        print(f"readme_table: {error}", file=sys.stderr)
        return 2
    return settle(args.readme, new, path, "readme_table", check=args.check)


def settle(page: Path, text: str, source: Path | None, tool: str, *, check: bool) -> int:
    """Write the page, or, to check, say that its text is another than ``source`` gives; the exit status."""
    if page.read_text() == text:
        return 0
    if check:
        print(f"{page} is not what {source} says: run python benchmarks/{tool}.py", file=sys.stderr)
        return 1
    page.write_text(text)
    return 0


def newest(folder: Path) -> Path:
    """The file of the benchmark's latest run that was not stopped; decode-*.json are of examples/decode.py."""
    found = newest_of(path for path in folder.glob("*.json") if not path.name.startswith("decode-"))
    if found is None:
        raise ValueError(f"there is no results file in {folder}")
    return found


def newest_of(files: Iterable[Path]) -> Path | None:
    """The file of the latest run, of those that were not stopped."""
    runs = {path: json.loads(path.read_text()) for path in files}
    dates = {path: run["machine"]["date"] for path, run in runs.items() if run.get("complete", True)}
    return max(dates, key=dates.__getitem__, default=None)


def with_table(page: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """The page with ``table`` between its markers."""
    before, begins, rest = page.partition(begin)
    _, ends, after = rest.partition(end)
    if not (begins and ends):
        raise ValueError(f"the page has no {begin} with {end} after it")
    return f"{before}{begin}\n{table}\n{end}{after}"


def pictures(path: Path, file: str, names: Mapping[str, str]) -> list[str]:
    """Links to the pictures of a results file, a blank line before each. One drawn from other results is an error."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = []
    for name, text in names.items():
        picture = path.with_name(f"{path.stem}-{name}.svg")
        if not picture.exists():
            continue
        if f"sha256 {digest}" not in picture.read_text():
            raise ValueError(
                f"{picture} was not drawn from {path}: run python -m fill_benchmark.plots {path.resolve()} "
                f"{path.parent.resolve()} in benchmarks/"
            )
        lines += ["", f"![{text}]({Path(file).with_name(picture.name).as_posix()})"]
    return lines


def table(results: dict[str, Any], file: str) -> str:
    """The table in Markdown, with a caption; ``file`` is where the README finds the results."""
    if results["quick"]:
        raise ValueError(f"{file} is of a quick run, which measures nothing")
    rows = [row for row in results["rows"] if row["workload"] == "decode" and row["point"] == POINT]
    # A row's metric was its section until a section measured more than one.
    metrics = [row.get("metric", row["section"]) for row in rows]
    host, gpu = (
        {row["peer"]: row for row, metric in zip(rows, metrics, strict=True) if metric == wanted}
        for wanted in ("host", "gpu")
    )
    if "copy.update + graph.replay()" in host:
        both, alone = host["copy.update + graph.replay()"], host["graph.replay() alone"]
        host["copy.update"] = {"median": both["median"] - alone["median"], "launches": 0}
    if BASELINE not in host:
        raise ValueError(f"{file} has no host time of {BASELINE!r} at {POINT}")
    lines = [
        "| | launches | host us per step | p10 to p90 | ratio | GPU us | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for way in README_WAYS:
        if way in host:
            launches = host[way]["launches"]
            us, ratio = _time(host, way)
            spread = f"{format_us(host[way]['p10'])} to {format_us(host[way]['p90'])}" if "p10" in host[way] else ""
            cells = [WAYS[way], "" if launches is None else str(launches), us, spread, ratio, *_time(gpu, way)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", caption(results["machine"], file, "; the ratio is to the first row")])


def caption(machine: Mapping[str, Any], file: str, more: str = "") -> str:
    """What was measured, where and when, with a link to the results; ``more`` is said of the medians."""
    step = f"The six tensors of a decode step, bs {POINT['bs']}, page table {POINT['max_seqlen_k']} wide"
    return f"{step}. Medians, in `torch.inference_mode()`{more}. {where_measured(machine, file)}"


def where_measured(machine: Mapping[str, Any], file: str) -> str:
    """The machine and the date, with a link to the results."""
    facts = [
        machine["gpu"] or machine["cpu"],
        machine["driver"] and f"driver {machine['driver']}",
        f"torch {machine['torch']}",
        machine["date"][:10],
        machine["commit"] and f"commit {machine['commit']}",
        f"[`{Path(file).name}`]({Path(file).as_posix()})",
    ]
    return f"{', '.join(filter(None, facts))}."


def _time(rows: dict[str, Any], way: str) -> tuple[str, str]:
    if way not in rows:
        return "", ""
    us = rows[way]["median"]
    return format_us(us), f"{rows[BASELINE]['median'] / us:.1f}x"


def format_us(us: float) -> str:
    return f"{us:.{1 if us >= 10 else 2}f}"


if __name__ == "__main__":
    sys.exit(main())
