"""What a check found, as a JSON file. docs/reliability.md has a table of those in benchmarks/results/reliability."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path


def add_arguments(add: Callable[..., object]) -> None:
    """``--json`` and ``--commit``, the same in all tools, by what adds an option to a parser."""
    add("--json", type=Path, metavar="FILE", help="write what was found to this file")
    add(
        "--commit",
        metavar="SHA",
        default=os.environ.get("FUSED_COPY_COMMIT"),
        help="the commit that was checked, for that file (default: $FUSED_COPY_COMMIT)",
    )


def write(
    args: argparse.Namespace,
    *,
    tool: str,
    what: str,
    cases: int,
    unit: str,
    seconds: float,
    faults: int,
    **details: object,
) -> None:
    """Write the file, if one was asked for. ``cases`` counts what ``unit`` names."""
    if args.json is None:
        return
    found = {
        "tool": tool,
        "what": what,
        "cases": cases,
        "unit": unit,
        "seconds": round(seconds, 1),
        "faults": faults,
        "commit": args.commit,
        "tool_sha256": hashlib.sha256(Path(__file__).with_name(f"{tool}.py").read_bytes()).hexdigest(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"gpus": gpus(), "processor": platform.machine(), "python": platform.python_version()},
        **details,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")


def gpus() -> list[str]:
    """Names and driver of the GPUs of this machine; empty where there is no driver."""
    if not (smi := shutil.which("nvidia-smi")):
        return []
    query = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
