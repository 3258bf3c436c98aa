"""Writes the decode example's table into docs/performance.md, from the newest file of ``examples/decode.py --json``.

Without such a file in benchmarks/results there is no table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from readme_table import ROOT, newest_of, settle, with_table

BEGIN, END = "<!-- decode:begin -->", "<!-- decode:end -->"
SCRIPT = ROOT / "examples" / "decode.py"
LABELS = {
    "copy_": "six slices + `copy_`",
    "foreach": "`torch._foreach_copy_`",
    "op": "`torch.ops.fused_copy.replay`",
    "plan": "`plan.replay`",
    "update": "`copy.update`",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="the folder")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page's table is another")
    args = parser.parse_args(argv)
    newest = newest_of(args.results.glob("decode-*.json"))
    text = ""
    if newest is not None:
        files = (os.path.relpath(path, args.page.parent) for path in (newest, SCRIPT))
        text = table(json.loads(newest.read_text()), *files)
    new = with_table(args.page.read_text(), text, BEGIN, END)
    return settle(args.page, new, newest, "decode_table", check=args.check)


def table(results: dict[str, Any], file: str, script: str) -> str:
    """The table in Markdown, with a caption; ``file`` and ``script`` are where the page finds results and example."""
    machine, loop, rows = results["machine"], results["loop"], results["rows"]
    if machine["gpu"] is None:
        raise ValueError(f"{file} was not measured on a GPU")
    lines = ["| fill | launches | host us of the fill | ms per step | the fill's share |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        fill, step = f"{row['fill']['median']:.1f}", f"{row['step']['median'] / 1e3:.3f}"
        lines.append(f"| {LABELS[row['way']]} | {row['launches']} | {fill} | {step} | {row['share']:.1%} |")
    model = results["model"]
    form = results.get("script_sha256")
    told = f"the script's SHA-256 {form[:12]}..." if form else "the script's form not recorded"
    caption = (
        f"[`examples/decode.py`]({script}): {results['steps']} steps with each fill, {results['requests']} "
        f"requests, up to {loop['max_bs']} at a time, {model['layers']} layers of {model['hidden']}; all "
        f"{results['tokens']} tokens the same in every row. A step lasts from the fill to the tokens on the host. "
        f"Times are medians; the share is of the time of all steps together. {machine['gpu']}, torch "
        f"{machine['torch']}, {machine['date'][:10]}, the package of commit {machine['commit']}, {told}, "
        f"[`{Path(file).name}`]({Path(file).as_posix()})."
    )
    return "\n".join([*lines, "", caption])


if __name__ == "__main__":
    sys.exit(main())
