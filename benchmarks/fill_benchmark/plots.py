"""Curves of a results file: ``run.py --plot``, or ``python -m fill_benchmark.plots FILE DIR`` in benchmarks/.

Every way that was measured is drawn. Those that are written for a decode step's six tensors are not over the number of
tensors, and those that cannot be captured have no GPU time.

Each SVG names the SHA-256 of the file that it was drawn from, by which ``readme_table.py --check`` knows that the two
belong together.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from fill_benchmark import report
from fill_benchmark.peers import PEERS
from fill_benchmark.report import Row
from fill_benchmark.sections import STEP

AXES = {
    "batch-size": ("decode", "bs", "batch size", {"max_seqlen_k": STEP["max_seqlen_k"]}),
    "page-table-width": ("decode", "max_seqlen_k", "page table's width", {"bs": STEP["bs"]}),
    "tensors": ("pairs", "pairs", "number of tensors, int64[256]", {}),
}
"""By the name of the picture: the workload, the point's key along x, its label, and what the other keys are."""

METRICS = {"host": "host us per call", "gpu": "GPU us per call"}


def draw(results_file: Path, folder: Path) -> list[Path]:
    """Draw a results file into ``folder``, named after it: the pictures' paths."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    rows = report.read(results_file).rows
    digest = hashlib.sha256(results_file.read_bytes()).hexdigest()
    colors = iter(pyplot.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    strong_colors = iter(pyplot.get_cmap("Set1").colors)  # type: ignore[attr-defined]
    styles = {
        peer: {"color": next(strong_colors), "linewidth": 2}
        if peer in OURS
        else {"color": next(colors), "linewidth": 1, "linestyle": "--"}
        for peer in PEERS
    }
    paths = []
    for name, (workload, key, label, others) in AXES.items():
        with pyplot.rc_context({"svg.hashsalt": "fused-copy", "svg.fonttype": "none", "font.size": 8}):
            figure, panels = pyplot.subplots(1, len(METRICS), figsize=(10, 4.2), layout="constrained")
            lines = {}
            for panel, (metric, y_label) in zip(panels, METRICS.items(), strict=True):
                curves = {peer: _curve(rows, metric, workload, peer, key, others) for peer in PEERS}
                for peer, curve in curves.items():
                    if curve:
                        x, y = zip(*curve, strict=True)
                        lines[peer] = panel.plot(x, y, marker="o", markersize=3, **styles[peer])[0]
                panel.set(xscale="log", yscale="log", xlabel=label, ylabel=y_label)
                panel.set_xticks(measured := sorted({x for curve in curves.values() for x, _ in curve}), measured)
                panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter("{x:g}")
                for axis in (panel.xaxis, panel.yaxis):
                    axis.set_minor_formatter(ticker.NullFormatter())
                panel.grid(alpha=0.3)
            figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False)
            paths.append(folder / f"{results_file.stem}-{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None, "Description": f"sha256 {digest}"})
            pyplot.close(figure)
    return paths


OURS = [peer for peer in PEERS if "fused_copy" in peer or peer.startswith(("plan.", "copy."))]
"""What this package offers: drawn solid."""


def _curve(
    rows: Sequence[Row], metric: str, workload: str, peer: str, key: str, others: dict[str, int]
) -> list[tuple[int, float]]:
    return sorted(
        (row.point[key], row.median)
        for row in rows
        if (row.metric, row.workload, row.peer) == (metric, workload, peer) and row.point.items() >= others.items()
    )


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1]), Path(sys.argv[2])):
        print(path)
