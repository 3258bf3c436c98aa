"""The benchmark's results: the machine they belong to, their file, and tables of them."""

from __future__ import annotations

import ctypes
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fused_copy._version import __version__
from fused_copy.bench.peers import CONTIGUOUS, PEERS, SIX_COPIES


@dataclass(frozen=True)
class Row:
    """One peer at one point of one section: times in us per call, ``bytes`` and ``launches`` per call too."""

    section: str
    workload: str
    point: dict[str, int]
    bytes: int
    peer: str
    launches: int | None
    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Results:
    """One run. A ``quick`` one shows that everything works, not how fast it is."""

    machine: dict[str, str | None]
    quick: bool
    rows: Sequence[Row]


def machine(device: torch.device, commit: str | None) -> dict[str, str | None]:
    """What the times depend on."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _driver_version() if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "fused_copy": __version__,
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _driver_version() -> str | None:
    version = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    failed = nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(version, len(version))
    return None if failed else version.value.decode()


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def write(results: Results, path: Path) -> None:
    """Write a results file: JSON, each row on a line of its own."""
    rounded = [{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()} for row in results.rows]
    rows = ",\n".join(f"    {json.dumps(row)}" for row in rounded)
    head = json.dumps({"machine": results.machine, "quick": results.quick}, indent=2).removesuffix("\n}")
    path.write_text(f'{head},\n  "rows": [\n{rows}\n  ]\n}}\n')


def read(path: Path) -> Results:
    """Read what :func:`write` wrote."""
    content = json.loads(path.read_text())
    return Results(content["machine"], content["quick"], [Row(**row) for row in content["rows"]])


def print_machine(console: Console, machine: dict[str, str | None]) -> None:
    """Print the machine's facts."""
    console.print(", ".join(f"{key} {value}" for key, value in machine.items() if value), highlight=False)


def print_peers(console: Console) -> None:
    """Print every way's name and what it is."""
    table = Table.grid(padding=(0, 2))
    for name, factory in PEERS.items():
        table.add_row(name, (factory.__doc__ or "").partition("\n")[0].replace("``", ""))
    console.print(table, "")


def print_point(console: Console, rows: Sequence[Row], progress: str) -> None:
    """Print the peers at one point, each with its spread and its ratios to the six copies and the contiguous copy."""
    medians = {row.peer: row.median for row in rows}
    first = rows[0]
    point = ", ".join(f"{key} {value}" for key, value in first.point.items())
    title = f"{progress}: {first.workload}, {point}, {first.bytes:,} bytes"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("way", min_width=max(map(len, medians)), no_wrap=True)
    for name in ("launches", f"{first.section} us", "p10-p90", "vs slices", "of contiguous"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.peer,
            "" if row.launches is None else str(row.launches),
            f"{row.median:.2f}",
            f"{row.p10:.2f}-{row.p90:.2f}",
            f"{medians[SIX_COPIES] / row.median:.2f}x",
            f"{row.median / medians[CONTIGUOUS]:.2f}x",
        )
    console.print(table, "")
