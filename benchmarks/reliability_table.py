"""Writes what was run into docs/reliability.md, from the files in benchmarks/results/reliability.

usage: python benchmarks/reliability_table.py [--check]

It needs nothing but Python. The files are what the tools' ``--json`` wrote; tools/record.py has their form.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from readme_table import ROOT, settle, with_table

RESULTS = ROOT / "benchmarks" / "results" / "reliability"
BEGIN, END = "<!-- recorded:begin -->", "<!-- recorded:end -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reliability.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page's table is another")
    args = parser.parse_args(argv)
    new = with_table(args.page.read_text(), table(sorted(args.results.glob("*.json"))), BEGIN, END)
    return settle(args.page, new, args.results, "reliability_table", check=args.check)


def table(files: Iterable[Path]) -> str:
    """A row for each file, and what raising calls cost where that was measured."""
    found = [(path, json.loads(path.read_text())) for path in files]
    if not found:
        return "No run has been recorded yet."
    lines = ["| what | cases | seconds | faults | where | file |", "|---|---:|---:|---:|---|---|"]
    for path, one in found:
        cells = [one["what"], f"{one['cases']:,} {one['unit']}", f"{one['seconds']:,.0f}", str(one["faults"])]
        lines.append(f"| {' | '.join([*cells, where(one), f'`{path.name}`'])} |")
    for path, one in found:
        if costs := one.get("median_us"):
            lines += ["", f"Medians in us, from `{path.name}`:", "", "| | copies | raises |", "|---|---:|---:|"]
            lines += [f"| `{way}` | {us['copies']:.1f} | {us['raises']:.1f} |" for way, us in costs.items()]
    return "\n".join(lines)


def where(one: dict[str, Any]) -> str:
    gpus = one["machine"]["gpus"] or [f"no GPU, {one['machine']['processor']}"]
    counted = f"{len(gpus)} x {gpus[0]}" if len(gpus) > 1 else gpus[0]
    return ", ".join(filter(None, [counted, one["date"][:10], one["commit"] and f"commit {one['commit']}"]))


if __name__ == "__main__":
    sys.exit(main())
