"""Writes the tables and pictures of one run into docs/performance.md, from a file that ``run.py --json`` wrote.

usage: python benchmarks/performance_tables.py [--check]

It needs what the benchmark needs: the targets are evaluated anew, as they stand there.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fill_benchmark import peers, report, sources
from fill_benchmark.targets import Medians, evaluate, place, share
from readme_table import (
    PICTURES,
    POINT,
    ROOT,
    STEP_PICTURE,
    WAYS,
    caption,
    format_us,
    newest,
    pictures,
    settle,
    with_table,
)

WORDS = {True: "met", False: "**missed**", None: "not measured"}
CODE = re.compile(r"[a-z_]*(?:[a-z]_|\.[a-z])[a-z_]*(?:\([\w=]*\))?")
"""What the page shows as code: a name with an underscore or a dot, and the parentheses of its call."""

HOST = WAYS | {
    peers.NOTHING_OP: "an op of the same schema that does nothing",
    peers.READING_OP: "an op of the same schema that reads its tensors alone",
    peers.READING_OP_AND_LAUNCH: "that op, then a launch",
    peers.BARE_LAUNCH: "floor: the launch of an empty kernel from C++",
    peers.UPDATE_AND_REPLAY: "`copy.update` + `graph.replay()`",
    peers.NODE_SET_AND_REPLAY: "a node that does nothing set instead + `graph.replay()`",
    peers.GRAPH_REPLAY: "floor: `graph.replay()` alone",
}
"""The rows of the host times: the README's, and what they are measured against."""

FLOORS = {
    **dict.fromkeys(
        (peers.TVM_FFI, peers.OP, peers.REPLAY, "fused_copy.replay, mappings", peers.PLAN), peers.BARE_LAUNCH
    ),
    **dict.fromkeys((peers.UPDATE_AND_REPLAY, peers.NODE_SET_AND_REPLAY), peers.GRAPH_REPLAY),
}


SOURCES = {
    "values": "Host and GPU time of host values over the number of requests",
    "rows": "Host and GPU time of lengths, sums and page rows over the number of requests",
    "rows-width": "Host and GPU time of lengths, sums and page rows over the tokens of a row",
}
"""What pictures show of sources that are made in the launch, as ``PICTURES`` does of copies."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", nargs="?", type=Path, help="default: the newest in benchmarks/results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page has other tables")
    args = parser.parse_args(argv)
    path = args.results or newest(ROOT / "benchmarks" / "results")
    results, page = report.read(path), args.page.read_text()
    medians, file = Medians(results.rows, results.package), os.path.relpath(path, args.page.parent)
    for name, table in TABLES.items():
        lines = [f"| {' | '.join(row)} |" for row in table(results, medians)]
        page = with_table(page, "\n".join(lines), *markers(name))
    step = [*pictures(path, file, STEP_PICTURE), "", caption(results.machine, file)]
    page = with_table(page, "\n".join(step), *markers("step"))
    for name, names in (("curves", PICTURES), ("sources", SOURCES)):
        page = with_table(page, "\n".join(pictures(path, file, names)), *markers(name))
    return settle(args.page, page, path, "performance_tables", check=args.check)


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a table, or pictures, in the page."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


Cells = list[list[str]]


def targets(results: report.Results, medians: Medians) -> Cells:
    """Every condition of every target."""
    heads = ["", "figure", "aim", "measured", "", "worst at", "what the times say of a miss"]
    rows = [heads, ["---", "---", "---", "---:", "---", "---", "---"]]
    for verdict in evaluate(results.rows, results.package):
        measured = "" if verdict.measured is None else f"{verdict.measured:.2f}"
        at = verdict.at.removeprefix("not measured: ")
        cells = [verdict.target, verdict.figure, verdict.condition, measured, WORDS[verdict.met], at, verdict.limit]
        rows.append([CODE.sub(r"`\g<0>`", cell) for cell in cells])
    return rows


def host(results: report.Results, medians: Medians) -> Cells:
    """The decode step of the README, with the floors, and what is over them."""
    step = ("host", "decode", POINT)
    here = {row.peer: row for row in results.rows if (row.metric, row.workload, row.point) == step}
    rows = [["way", "us", "p10 to p90", "over the floor"], ["---", "---:", "---:", "---:"]]
    for way, label in HOST.items():
        if row := here.get(way):
            over = f"{row.median - here[FLOORS[way]].median:.2f}" if way in FLOORS else ""
            rows.append([label, format_us(row.median), f"{format_us(row.p10)} to {format_us(row.p90)}", over])
    return rows


def pairs(results: report.Results, medians: Medians) -> Cells:
    """Host times over the number of dense pairs."""
    ways = {
        peers.SLICED_FOREACH: "`_foreach_copy_`",
        peers.OP: "op",
        peers.NOTHING_OP: "op that does nothing",
        peers.REPLAY: "`fused_copy.replay`",
        peers.PLAN: "`plan.replay`",
        peers.BARE_LAUNCH: "bare launch",
    }
    rows = [["pairs", *ways.values()], ["---:"] * (1 + len(ways))]
    for point in medians.points("host", "pairs"):
        rows.append([str(point["pairs"]), *(format_us(medians("host", "pairs", way, point)) for way in ways)])
    return rows


def gpu(results: report.Results, medians: Medians) -> Cells:
    """GPU times of every decode step, beside a contiguous copy of as many bytes."""
    ways = {
        peers.SIX_COPIES: "six `copy_`",
        peers.TRITON: "Triton",
        peers.TVM_FFI: "tvm-ffi",
        peers.OP: "fused",
        peers.HARD_WIRED: "hard-wired",
    }
    heads = ["bs", "wide", "kB", *ways.values(), "contiguous", "fused / contiguous", "hard-wired / contiguous"]
    rows = [heads, ["---:"] * len(heads)]
    for point in medians.points("gpu", "decode"):
        times = {way: medians("gpu", "decode", way, point) for way in ways}
        contiguous = medians.contiguous(point)
        kilobytes = medians.row("gpu", "decode", peers.OP, point).bytes / 1e3
        ratios = [f"{times[way] / contiguous:.2f}" for way in (peers.OP, peers.HARD_WIRED)]
        step = [str(point["bs"]), str(point["max_seqlen_k"]), f"{kilobytes:,.0f}"]
        rows.append([*step, *map(format_us, times.values()), format_us(contiguous), *ratios])
    return rows


def steps(results: report.Results, medians: Medians) -> Cells:
    """A decode step with a small model: each in turn waited for, and many in a loop."""
    ways = {
        peers.GRAPH_REPLAY: "none: `graph.replay()` alone",
        peers.SIX_COPIES: "six slices + `copy_`",
        peers.PLAN: "`plan.replay`",
        peers.UPDATE_AND_REPLAY: "`copy.update`",
    }
    rows = [["bs", "fill", "latency", "its share", "in a loop", "its share"], ["---:", "---", *["---:"] * 4]]
    for point in medians.points("step", "model"):
        for way, label in ways.items():
            cells = [str(point["bs"]), label]
            for metric in ("latency", "step"):
                part = None if way == peers.GRAPH_REPLAY else share(medians, metric, way, point)
                hidden = "" if way == peers.GRAPH_REPLAY else "not resolved"
                cells += [format_us(medians(metric, "model", way, point)), hidden if part is None else f"{part:.1%}"]
            rows.append(cells)
    return rows


def values(results: report.Results, medians: Medians) -> Cells:
    """Host times of a decode step whose vectors are lists, over the batch size. None in a run without the section."""
    if not any(row.workload == "values" for row in results.rows):
        return []
    ways = {
        peers.PLAN: "`plan.replay`, ready tensors",
        sources.LISTS: "lists",
        sources.ARRAYS: "NumPy arrays",
        sources.NP_ARRAY: "`np.array` of the lists alone, no copy",
        sources.PINNED: "`torch.tensor(pin_memory=True)` + `copy_`",
        sources.PACKED: "one packed pinned buffer",
    }
    added = {peers.UPDATE_AND_REPLAY: "ready tensors", sources.UPDATE_LISTS: "lists"}
    heads = ["bs", *ways.values(), *(f"added by `copy.update`, {what}" for what in added.values())]
    rows = [heads, ["---:"] * len(heads)]
    for point in medians.points("host", "values"):
        us = partial(medians, "host", "values", point=point)
        times = [*map(us, ways), *(us(way) - us(peers.GRAPH_REPLAY) for way in added)]
        rows.append([str(point["bs"]), *map(format_us, times)])
    return rows


def page_rows(results: report.Results, medians: Medians) -> Cells:
    """GPU and host times of lengths, sums and page rows cut at the lengths. None in a run without the section."""
    if not any(row.workload == "rows" for row in results.rows):
        return []
    case = "cut at lengths"
    ways = {sources.PLAN_ROWS: "fused", sources.TRITON_ROWS: "Triton", peers.PLAN: "ready tensors"}
    heads = ["bs", "tokens", "page", *(f"{way}, {metric}" for metric in ("GPU", "host") for way in ways.values())]
    rows = [heads, ["---:"] * len(heads)]
    for point in medians.points("gpu", "rows"):
        times = (medians(metric, "rows", way, point, case) for metric in ("gpu", "host") for way in ways)
        rows.append([*map(str, point.values()), *map(format_us, times)])
    return rows


def occupancy(results: report.Results, medians: Medians) -> Cells:
    """How the op is launched, by the profiler."""
    rows = [["", "blocks", "threads in each", "registers", "occupancy"], ["---", *["---:"] * 4]]
    for row in results.rows:
        if row.kernel and row.peer == peers.OP:
            facts = [row.kernel.get(name, "") for name in ("blocks", "block_size", "registers", "occupancy_percent")]
            cells = [str(fact[0] if isinstance(fact, list) else fact) for fact in facts]
            rows.append([CODE.sub(r"`\g<0>`", place(row.point)), *cells[:3], f"{cells[3]} %"])
    return rows


TABLES: dict[str, Callable[[report.Results, Medians], Cells]] = {
    "targets": targets,
    "host": host,
    "pairs": pairs,
    "gpu": gpu,
    "values": values,
    "rows": page_rows,
    "occupancy": occupancy,
    "steps": steps,
}

if __name__ == "__main__":
    sys.exit(main())
