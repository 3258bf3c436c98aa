"""Runs the sections that the command line asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from fused_copy.bench import report
from fused_copy.bench.peers import WrongResult
from fused_copy.bench.sections import SECTIONS


def run(*, sections: Sequence[str] | None, quick: bool, json: Path | None, commit: str | None) -> int:
    """Run, print and write the sections, by default all that this machine can run; the exit status."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if sections is None:
        sections = [name for name in SECTIONS if name != "gpu" or device.type == "cuda"]
    if unknown := [name for name in sections if name not in SECTIONS]:
        return _refuse(f"--section: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if "gpu" in sections and device.type != "cuda":
        return _refuse("--section gpu: this torch sees no GPU")
    if json and not json.parent.is_dir():
        return _refuse(f"--json: there is no directory {json.parent}")

    # No progress bar: a thread that redraws it would compete with the host times for the interpreter.
    console = Console(width=None if sys.stdout.isatty() else 110)
    machine = report.machine(device, commit)
    report.print_machine(console, machine)
    report.print_peers(console)
    rows: list[report.Row] = []
    with torch.inference_mode():  # as engines run their decode loops
        for name in sections:
            section = SECTIONS[name](device, quick)
            for index, make_workload in enumerate(section.workloads, 1):
                try:
                    point = section.measure(make_workload())
                except WrongResult as error:
                    print(f"fused-copy bench: {error}", file=sys.stderr)
                    return 1
                report.print_point(console, point, f"{name} {index}/{len(section.workloads)}")
                rows += point
    if json:
        report.write(report.Results(machine, quick, rows), json)
        print(f"wrote {json}")
    return 0


def _refuse(reason: str) -> int:
    print(f"fused-copy bench: {reason}", file=sys.stderr)
    return 2
