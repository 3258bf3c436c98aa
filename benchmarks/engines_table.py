"""Writes what steps of real engines take into the pages of docs/integrations and the README, from results/engines.

usage: python benchmarks/engines_table.py [--check]

It needs nothing but Python. A file has ``machine``, ``what`` was measured, and ``runs``: what processes printed that
ran one after the other. Tables give the least and the most of the runs' medians, as one process may be slower than the
next.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from readme_table import ROOT, format_us, newest_of, settle, where_measured, with_table

RESULTS = ROOT / "benchmarks" / "results" / "engines"
PAGES = ROOT / "docs" / "integrations"
BEGIN, END = "<!-- times:begin -->", "<!-- times:end -->"
README_MARKERS = ("<!-- engine:begin -->", "<!-- engine:end -->")

BATCH_SIZES = (1, 8, 32)
"""Those that tools/vllm_builders.py times."""

Run = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page's table is another")
    args = parser.parse_args(argv)
    settled = []
    for page, engine, table, markers in (
        *((PAGES / f"{engine}.md", engine, table, (BEGIN, END)) for engine, table in TABLES.items()),
        (ROOT / "README.md", "mini-sglang", steps, README_MARKERS),
    ):
        newest = newest_of(RESULTS.glob(f"{engine}-*.json"))
        assert newest is not None, f"{RESULTS} has no file of {engine}"
        results = json.loads(newest.read_text())
        where = where_measured(results["machine"], os.path.relpath(newest, page.parent))
        text = "\n".join([*table(results["runs"]), "", where])
        new = with_table(page.read_text(), text, *markers)
        settled.append(settle(page, new, newest, "engines_table", check=args.check))
    return max(settled)


def microseconds(us: float) -> str:
    """Three digits of it, or more."""
    return f"{us:,.0f}" if us >= 100 else format_us(us)


def span(values: Sequence[float], form: Callable[[float], str] = microseconds) -> str:
    """The least and the most."""
    return " to ".join(dict.fromkeys([form(min(values)), form(max(values))]))


def times(ratio: float) -> str:
    """A ratio."""
    return f"{ratio:.1f}x"


def before_and_after(befores: Sequence[float], afters: Sequence[float]) -> list[str]:
    """Three cells; the ratio is of the two of each run."""
    ratios = [before / after for before, after in zip(befores, afters, strict=True)]
    return [span(befores), span(afters), span(ratios, times)]


def rows_of(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown, whose first column is text."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def batches(runs: Sequence[Run], part: str) -> list[list[str]]:
    """Of the decode steps with padded batches of so many requests."""
    return [
        [
            " to ".join(dict.fromkeys(batch.split("-"))),
            *before_and_after(*([run[tree][batch][part] for run in runs] for tree in ("published", "patched"))),
        ]
        for batch in runs[0]["published"]
    ]


def made_and_whole(runs: Sequence[Run], patched: str) -> list[str]:
    """Making a step's inputs, and whole steps, by batch."""
    made, whole = (batches(runs, part) for part in ("made", "step"))
    heads = ["requests", "inputs made, us", patched, "", "whole step, us", patched, ""]
    return rows_of(heads, (row + more[1:] for row, more in zip(made, whole, strict=True)))


def steps(runs: Sequence[Run]) -> list[str]:
    """What the README shows of mini-sglang."""
    return made_and_whole([run for run in runs if kind_of(run) == (16, 1)], "with fused-copy")


def mini_sglang(runs: Sequence[Run]) -> list[str]:
    """The same of each kind of run."""
    lines = []
    for layers, page_size in dict.fromkeys(map(kind_of, runs)):
        of_kind = [run for run in runs if kind_of(run) == (layers, page_size)]
        pairs = f"{len(of_kind)} pair{'s' * (len(of_kind) > 1)} of processes"
        lines += ["", f"{layers} layers, pages of {page_size}, {pairs}:", "", *made_and_whole(of_kind, "with the flag")]
    return lines[1:]


def kind_of(run: Run) -> tuple[int, int]:
    """The model's layers and the tokens of a page."""
    return run["layers"], run["page_size"]


def ways(runs: Sequence[Run], metric: str, name: str, one: str, other: str) -> list[str]:
    """Medians of a case's two ways."""
    return before_and_after(*([run[metric][f"{name}, {way}"][0] for run in runs] for way in (one, other)))


def sglang(runs: Sequence[Run]) -> list[str]:
    """Host and GPU time of each size."""
    names = dict.fromkeys(name.rpartition(", ")[0] for name in runs[0]["host_us"])
    heads = ["", "host us, published", "with the flag", "", "GPU us, published", "with the flag", ""]
    both = ("published", "fused_copy")
    return rows_of(
        heads, ([name, *ways(runs, "host_us", name, *both), *ways(runs, "gpu_us", name, *both)] for name in names)
    )


def vllm(runs: Sequence[Run]) -> list[str]:
    """Host time of a step of two KV cache groups by the number of requests, and what the largest puts on the GPU."""
    both = ("published", "patched, flag on")

    def row(case: str, bs: int) -> list[str]:
        host = ([run[case]["host_us"][f"{way}, {bs} requests"][0] for run in runs] for way in both)
        gpu = ([run[case]["launches"][way]["gpu_us"] for run in runs] for way in both)
        on_gpu = before_and_after(*gpu) if bs == BATCH_SIZES[-1] else ["", "", ""]
        return [f"{case}, {bs} request{'s' * (bs > 1)}", *before_and_after(*host), *on_gpu]

    heads = ["", "host us, published", "with the flag", "", "GPU us, published", "with the flag", ""]
    return rows_of(heads, (row(case, bs) for case in runs[0] for bs in BATCH_SIZES))


def nano_vllm(runs: Sequence[Run]) -> list[str]:
    """Host time of a decode up to its graph's replay and with it, and what comes before the graph on the GPU."""

    def row(name: str) -> list[str]:
        host = ([run[tree]["host_us"][name][0] for run in runs] for tree in ("published", "patched"))
        part, _, sequences = name.rpartition(", ")
        gpu = ([run[tree]["launches"][sequences]["gpu_us"] for run in runs] for tree in ("published", "patched"))
        on_gpu = before_and_after(*gpu) if part == "before the graph" else ["", "", ""]
        return [name, *before_and_after(*host), *on_gpu]

    heads = ["", "host us, published", "with the option", "", "GPU us, published", "with the option", ""]
    return rows_of(heads, map(row, runs[0]["published"]["host_us"]))


TABLES: dict[str, Callable[[Sequence[Run]], list[str]]] = {
    "mini-sglang": mini_sglang,
    "sglang": sglang,
    "vllm": vllm,
    "nano-vllm": nano_vllm,
}

if __name__ == "__main__":
    sys.exit(main())
