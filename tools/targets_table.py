"""Writes the table of targets into docs/performance.md, from the rows of a file that ``fused-copy bench --json`` wrote.

usage: python tools/targets_table.py [--check]

It needs the installed package with its extra "bench": the targets are evaluated anew, as they stand there.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from readme_table import ROOT, newest, settle, with_table

from fused_copy.bench import report
from fused_copy.bench.targets import evaluate

BEGIN, END = "<!-- targets:begin -->", "<!-- targets:end -->"
WORDS = {True: "met", False: "**missed**", None: "not measured"}
CODE = re.compile(r"[a-z_]*(?:[a-z]_|\.[a-z])[a-z_]*(?:\([\w=]*\))?")
"""What the page shows as code: a name with an underscore or a dot, and the parentheses of its call."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", nargs="?", type=Path, help="default: the newest in benchmarks/results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page's table is another")
    args = parser.parse_args(argv)
    path = args.results or newest(ROOT / "benchmarks" / "results")
    new = with_table(args.page.read_text(), table(report.read(path)), BEGIN, END)
    return settle(args.page, new, path, "targets_table", check=args.check)


def table(results: report.Results) -> str:
    """The table in Markdown: every condition of every target."""
    heads = ["", "figure", "aim", "measured", "", "worst at", "what the run says of a miss"]
    rows = [heads, ["---", "---", "---", "---:", "---", "---", "---"]]
    for verdict in evaluate(results.rows, results.package):
        measured = "" if verdict.measured is None else f"{verdict.measured:.2f}"
        at = verdict.at.removeprefix("not measured: ")
        cells = [verdict.target, verdict.figure, verdict.condition, measured, WORDS[verdict.met], at, verdict.limit]
        rows.append([CODE.sub(r"`\g<0>`", cell) for cell in cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
