"""Pictures of a results file: ``run.py --plot``, or ``python -m fill_benchmark.plots FILE DIR`` in benchmarks/.

Curves are of every way that was measured. Those that are written for a decode step's six tensors are not over the
number of tensors, and those that cannot be captured have no GPU time. Bars are of what an engine chooses among, in one
step.

Each SVG names the SHA-256 of the file that it was drawn from, by which ``readme_table.py --check`` knows that the two
belong together.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fill_benchmark import report
from fill_benchmark.peers import (
    GRAPH_REPLAY,
    OP,
    PEERS,
    PLAN,
    SIX_COPIES,
    SLICED_FOREACH,
    TRITON,
    TVM_FFI,
    UPDATE_AND_REPLAY,
)
from fill_benchmark.report import Row
from fill_benchmark.sections import STEP
from fill_benchmark.sources import ROWS, VALUES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Axis:
    """What a picture shows: the workload's rows of a case over one key of their points, where the others are these."""

    workload: str
    key: str
    label: str
    others: dict[str, int] = field(default_factory=dict)
    case: str = ""
    ways: Iterable[str] = tuple(PEERS)


AXES = {
    "batch-size": Axis("decode", "bs", "batch size", {"max_seqlen_k": STEP["max_seqlen_k"]}),
    "page-table-width": Axis("decode", "max_seqlen_k", "page table's width", {"bs": STEP["bs"]}),
    "tensors": Axis("pairs", "pairs", "number of tensors, int64[256]"),
    "values": Axis("values", "bs", "requests, whose five vectors are host values", ways=(PLAN, *VALUES, GRAPH_REPLAY)),
    "rows": Axis(
        "rows", "bs", "requests of 4096 tokens", {"tokens": 4096, "page_size": 1}, "whole rows", (PLAN, *ROWS)
    ),
    "rows-width": Axis(
        "rows", "tokens", "tokens of 64 requests", {"bs": 64, "page_size": 1}, "whole rows", (PLAN, *ROWS)
    ),
}
"""By the name of the picture."""

METRICS = {"host": "host us per call", "gpu": "GPU us per call"}

STYLE: dict[Any, Any] = {"svg.hashsalt": "fused-copy", "svg.fonttype": "none"}

STEP_PICTURE = "decode-step"
STEP_WAYS = (SIX_COPIES, SLICED_FOREACH, TRITON, TVM_FFI, OP, PLAN)
"""The bars, and below them what an update of a graph's node adds to its replay."""


def draw(results_file: Path, folder: Path) -> list[Path]:
    """Draw a results file into ``folder``, named after it, as far as it has what they show: the pictures' paths."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    rows = report.read(results_file).rows
    digest = hashlib.sha256(results_file.read_bytes()).hexdigest()
    paths = []

    def save(figure: Figure, name: str) -> None:
        paths.append(folder / f"{results_file.stem}-{name}.svg")
        figure.savefig(paths[-1], metadata={"Date": None, "Description": f"sha256 {digest}"})
        pyplot.close(figure)

    if bars := _bars(rows):
        with pyplot.rc_context(STYLE | {"font.size": 9}):
            figure, panels = pyplot.subplots(1, len(METRICS), figsize=(7.5, 2.6), sharey=True, layout="constrained")
            for panel, (metric, label) in zip(panels, METRICS.items(), strict=True):
                times = {way: of[metric] for way, of in bars.items() if metric in of}
                colors = ["tab:blue" if is_ours(way) else "silver" for way in times]
                drawn = panel.barh([*times], [*times.values()], color=colors)
                panel.bar_label(drawn, [f"{us:.{1 if us >= 10 else 2}f}" for us in times.values()], padding=3)
                panel.set(xlabel=label, xlim=(0, 1.15 * max(times.values())))
                panel.spines[["top", "right"]].set_visible(False)
            panels[0].invert_yaxis()
            save(figure, STEP_PICTURE)
    for name, axis in AXES.items():
        curves = {metric: {way: _curve(rows, metric, axis, way) for way in axis.ways} for metric in METRICS}
        metrics = [metric for metric in METRICS if any(curves[metric].values())]
        if not metrics:
            continue
        colors = iter(pyplot.get_cmap("tab20").colors)  # type: ignore[attr-defined]
        strong_colors = iter(pyplot.get_cmap("Set1").colors)  # type: ignore[attr-defined]
        styles = {
            way: {"color": next(strong_colors), "linewidth": 2}
            if is_ours(way)
            else {"color": next(colors), "linewidth": 1, "linestyle": "--"}
            for way in axis.ways
        }
        with pyplot.rc_context(STYLE | {"font.size": 8}):
            size = (10, 4.2) if len(metrics) > 1 else (6.5, 4.2)
            figure, panels = pyplot.subplots(1, len(metrics), squeeze=False, figsize=size, layout="constrained")
            lines = {}
            for panel, metric in zip(panels[0], metrics, strict=True):
                for way, curve in curves[metric].items():
                    if curve:
                        x, y = zip(*curve, strict=True)
                        lines[way] = panel.plot(x, y, marker="o", markersize=3, **styles[way])[0]
                panel.set(xscale="log", yscale="log", xlabel=axis.label, ylabel=METRICS[metric])
                measured = sorted({x for curve in curves[metric].values() for x, _ in curve})
                panel.set_xticks(measured, measured)
                panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter("{x:g}")
                for line in (panel.xaxis, panel.yaxis):
                    line.set_minor_formatter(ticker.NullFormatter())
                panel.grid(alpha=0.3)
            figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False)
            save(figure, name)
    return paths


def is_ours(way: str) -> bool:
    """Whether this package offers it: drawn solid."""
    return "fused_copy" in way or way.startswith(("plan.", "copy."))


def _bars(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Medians of a decode step by way and metric. None unless all ways were measured."""
    step = {
        (row.peer, row.metric): row.median
        for row in rows
        if (row.workload, row.point) == ("decode", STEP) and not row.case
    }
    if not {(way, metric) for way in STEP_WAYS for metric in METRICS} <= step.keys():
        return {}
    bars = {way: {metric: step[way, metric] for metric in METRICS} for way in STEP_WAYS}
    return bars | {"copy.update": {"host": step[UPDATE_AND_REPLAY, "host"] - step[GRAPH_REPLAY, "host"]}}


def _curve(rows: Sequence[Row], metric: str, axis: Axis, way: str) -> list[tuple[int, float]]:
    return sorted(
        (row.point[axis.key], row.median)
        for row in rows
        if (row.metric, row.workload, row.case, row.peer) == (metric, axis.workload, axis.case, way)
        and row.point.items() >= axis.others.items()
    )


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1]), Path(sys.argv[2])):
        print(path)
