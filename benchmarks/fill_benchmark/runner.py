"""Runs the sections that the command line asked for."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import groupby
from pathlib import Path

import torch
from import_time import import_ms
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fill_benchmark import native, report
from fill_benchmark.answers import answer
from fill_benchmark.sections import ON_CPU, PROFILED, SECTIONS, measure, quickest_passes
from fill_benchmark.targets import evaluate
from fused_copy.bench import WrongResult, plain_console
from fused_copy.timing import machine

IMPORT = "import"
"""The section that times no calls, but ``import fused_copy``."""

PASSES = 3
"""How often host times are taken, minutes apart: a machine's host may be slower for as long as several points take."""


def run(
    *,
    sections: Sequence[str] | None,
    quick: bool,
    json: Path | None,
    plot: Path | None,
    commit: str | None,
    wheel: Path | None,
    build_seconds: float | None,
) -> int:
    """Run, print, write and draw the sections, by default all that this machine can run; the exit status."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known, on_cpu = [*SECTIONS, IMPORT], [*ON_CPU, IMPORT]
    if sections is None:
        sections = known if device.type == "cuda" else on_cpu
    if unknown := [name for name in sections if name not in known]:
        return _refuse(f"--section: no section {', '.join(unknown)}; there are {', '.join(known)}")
    if device.type != "cuda" and (need_gpu := [name for name in sections if name not in on_cpu]):
        return _refuse(f"--section {','.join(need_gpu)}: this torch sees no GPU")
    if wheel and not wheel.is_file():
        return _refuse(f"--wheel: there is no file {wheel}")
    if json and not json.parent.is_dir():
        return _refuse(f"--json: there is no directory {json.parent}")
    if plot and not plot.is_dir():
        return _refuse(f"--plot: there is no directory {plot}")

    console = plain_console()
    facts = machine(device, commit)
    report.print_machine(console, facts)
    report.print_peers(console)
    # The bar is drawn between points alone: a thread that did it would compete with the host times for the interpreter.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal)
    rows: list[report.Row] = []
    seconds: dict[str, float] = {}
    package: dict[str, float] = {}
    if wheel:
        package["wheel_mb"] = wheel.stat().st_size / 1e6
    if build_seconds:
        package["build_seconds"] = build_seconds
    left_out = cache(lambda names, reason: console.print(f"\nleft out ({reason}): {names}"))
    complete = True
    try:
        if IMPORT in sections:
            start = time.perf_counter()
            # Whatever else the machine does only adds to a sample.
            package["import_ms"] = min(import_ms(1 if quick else 9)[1])
            seconds[IMPORT] = round(time.perf_counter() - start, 1)
        with torch.inference_mode(), _own_stream(device), progress:
            if device.type == "cuda":
                start = time.perf_counter()
                native.compile_all()
                seconds["compile"] = round(time.perf_counter() - start, 1)
            for name, number in _order(sections, 1 if quick else PASSES):
                start = time.perf_counter()
                _run_section(name, device, quick, number, progress, left_out, rows)
                seconds[name] = round(seconds.get(name, 0) + time.perf_counter() - start, 1)
    except WrongResult as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        complete = False
        console.print("\nstopped; what was measured until then:")
    rows = quickest_passes(rows)
    verdicts = evaluate(rows, package) if device.type == "cuda" else []  # the targets are a GPU's
    results = report.Results(facts, quick, rows, verdicts, answer(rows), seconds, package, complete)
    report.print_answers(console, results.answers)
    if verdicts:
        report.print_targets(console, verdicts)
    if package:
        measured = ", ".join(f"{name} {value:.2f}" for name, value in package.items())
        console.print(f"\npackage: {measured}")
    console.print("\nseconds: " + ", ".join(f"{name} {took:.0f}" for name, took in seconds.items()))
    text = report.serialize(results)
    if json:
        json.write_text(text)
        print(f"wrote {json}")
    if plot:
        _draw(text, json, plot)
    return 0 if complete else 130


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    # As engines do. cudaMemcpyBatchAsync refuses the default stream.
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def _order(sections: Sequence[str], passes: int) -> list[tuple[str, int]]:
    """Each section with the number of its pass; only those of host times have more than one."""
    names = [name for name in SECTIONS if name in sections]
    timed = [name for name in names if name not in PROFILED]
    again = [name for name in timed if name in ON_CPU]
    return [
        *((name, 0) for name in timed),
        *((name, number) for number in range(1, passes) for name in again),
        *((name, 0) for name in names if name in PROFILED),
    ]


def _run_section(
    name: str,
    device: torch.device,
    quick: bool,
    number: int,
    progress: Progress,
    left_out: Callable[[str, str], object],
    rows: list[report.Row],
) -> None:
    """Adds each point's rows to ``rows`` once it is measured; passes but the first are of host times alone."""
    section = SECTIONS[name](device, quick)
    metrics = [metric for metric in section.metrics if number == 0 or metric == "host"]
    for make_point in progress.track(section.points, description=f"{name}, pass {number + 1}"):
        progress.refresh()
        point = measure(name, metrics, make_point(), quick=quick, profiled=name in PROFILED, left_out=left_out)
        for _, of_metric in groupby(point, key=lambda row: row.metric):
            report.print_point(progress.console, list(of_metric))
        rows += point


def _draw(text: str, json: Path | None, folder: Path) -> None:
    from fill_benchmark import plots

    with tempfile.TemporaryDirectory() as scratch:
        if json is None:
            json = Path(scratch, "bench.json")
            json.write_text(text)
        for path in plots.draw(json, folder):
            print(f"wrote {path}")


def _refuse(reason: str) -> int:
    print(f"benchmark: {reason}", file=sys.stderr)
    return 2
