"""``fused-copy bench``: this machine's times of the ways to fill a decode step's six static buffers, side by side.

The project's own benchmark, in the repository's ``benchmarks/``, has more ways, more points and targets.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from json import dumps
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import fused_copy
from fused_copy.decode import capture_buffers, copy_each
from fused_copy.timing import Call, Timing, calls_per_graph, gpu_timer, host_us, in_turn, launches, machine

Tensors = Mapping[str, torch.Tensor]

SIX_COPIES = "slices + copy_"
UPDATE_AND_REPLAY, GRAPH_REPLAY = NEED_A_GPU = ("copy.update + graph.replay()", "graph.replay() alone")

BATCH_SIZES, WIDTH = (8, 64, 256), 1024
"""Of the decode steps, and how wide their page table is: half of its buffer, whose rows are then not side by side."""

SETS = 4
"""The sets of sources that take turns."""

POISON = 90
"""What buffers hold before a way is checked; fits every dtype."""


class WrongResult(Exception):
    """A way left other bytes than ``copy_`` does."""


@dataclass
class Row:
    """One way at one batch size: what a call enqueues, None where no capture can count it, and its times in us."""

    bs: int
    way: str
    launches: int | None
    host: Timing = field(default_factory=Timing)
    gpu: Timing = field(default_factory=Timing)


def check(name: str, buffers: Tensors, sources: Tensors, call: Call, fill: Mapping[str, float] | None = None) -> None:
    """Raises :class:`WrongResult` unless the call fills the buffers' leading corners as ``copy_`` of the sources does.

    Around the corners must be what was there, or a buffer's number in ``fill``.
    """
    expected = {}
    for key, buffer in buffers.items():
        buffer.fill_(POISON)
        expected[key] = torch.full_like(buffer, (fill or {}).get(key, POISON))
        expected[key][tuple(map(slice, sources[key].shape))].copy_(sources[key])
    call()
    for key, buffer in buffers.items():
        if not torch.equal(buffer, expected[key]):
            index = tuple((buffer != expected[key]).nonzero()[0].tolist())
            raise WrongResult(
                f"{name} is wrong: {key} has {buffer[index].item()} at {list(index)}, "
                f"where copy_ leaves {expected[key][index].item()}"
            )


def make_ways(buffers: dict[str, torch.Tensor], sets: Sequence[Tensors]) -> dict[str, list[Call]]:
    """By the name of each way that the buffers' device can run, the calls that copy each of the ``sets``."""
    destinations, lists = list(buffers.values()), [list(sources.values()) for sources in sets]
    plan = fused_copy.Plan(buffers)

    def foreach(sources: list[torch.Tensor]) -> None:
        corners = [to[tuple(map(slice, source.shape))] for to, source in zip(destinations, sources, strict=True)]
        torch._foreach_copy_(corners, sources)

    ways: dict[str, list[Call]] = {
        SIX_COPIES: [partial(copy_each, buffers, sources) for sources in sets],
        "_foreach_copy_": [partial(foreach, sources) for sources in lists],
        "torch.ops.fused_copy.replay": [partial(torch.ops.fused_copy.replay, destinations, one) for one in lists],
        "fused_copy.replay": [partial(fused_copy.replay, destinations, sources) for sources in lists],
        "plan.replay": [partial(plan.replay, *sources) for sources in lists],
    }
    if destinations[0].is_cuda:

        def few_kernels() -> None:  # as launching a graph of one node is a case of its own
            for buffer in destinations:
                buffer[:1].add(1)

        plan.replay(*lists[0])
        few_kernels()  # both load their kernels, which capture could not
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            copy = plan.capture(graph, *lists[0])
            few_kernels()

        def update_and_replay(sources: list[torch.Tensor]) -> None:
            copy.update(*sources)
            graph.replay()

        def replay_alone(_: list[torch.Tensor]) -> None:  # called as the other is: the difference is the update's
            graph.replay()

        ways[UPDATE_AND_REPLAY] = [partial(update_and_replay, sources) for sources in lists]
        ways[GRAPH_REPLAY] = [partial(replay_alone, sources) for sources in lists]
    return ways


def measure(bs: int, device: torch.device, quick: bool, rows: list[Row]) -> None:
    """Check every way, then time all in turn, into rows that are added to ``rows`` first."""
    buffers, like = capture_buffers(bs, 2 * WIDTH, device), capture_buffers(bs, WIDTH, device)
    sets = [{name: torch.randint_like(one, 1, 2**31 - 1) for name, one in like.items()} for _ in range(SETS)]
    ways, on_gpu = make_ways(buffers, sets), device.type == "cuda"
    for name, calls in ways.items():
        for call, sources in zip(calls, sets, strict=True):
            call() if name == GRAPH_REPLAY else check(name, buffers, sources, call)
    counts = {name: launches(calls[0]) for name, calls in ways.items() if on_gpu and name not in NEED_A_GPU}
    rows += (here := [Row(bs, name, counts.get(name)) for name in ways])
    rounds, batches, replays = (1, 3, 5) if quick else (8, 10, 8)
    host = [partial(host_us, ways[row.way], launches=row.launches or 1, batches=batches) for row in here]
    for index, timing in in_turn(host, rounds):
        here[index].host += timing
    step_bytes, gpu = sum(one.nbytes for one in like.values()), []
    for name, count in counts.items():
        per_graph = calls_per_graph(count, step_bytes)
        checked = partial(check, f"{name}, in a graph", buffers, sets[-1])
        gpu.append(partial(gpu_timer(ways[name], per_graph=per_graph, check=checked), replays))
    for index, timing in in_turn(gpu, rounds):
        here[index].gpu += timing


def run(*, device: str, quick: bool, json: Path | None, plot: Path | None) -> int:
    """Measure, print, and write the files that were asked for; the exit status. Ctrl-C keeps what was measured."""
    console = plain_console()
    facts = machine(torch.device(device), commit=None)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items() if value))
    if device == "cpu":
        console.print("without a GPU: no copy.update, no launches, no GPU times")
    rows: list[Row] = []
    status = 0
    try:
        # On a stream that is not the default one, as engines run their decode loops.
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
            for bs in (64,) if quick else BATCH_SIZES:
                measure(bs, torch.device(device), quick, rows)
                show(console, [row for row in rows if row.bs == bs])
    except WrongResult as error:
        print(f"fused-copy bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        status = 130
        rows = [row for row in rows if row.host.samples]
        console.print("\nstopped; what was measured until then:" if rows else "\nstopped before anything was measured")
        show(console, [row for row in rows if row.bs == rows[-1].bs])
    if json:
        head = {"machine": facts, "quick": quick, "complete": status == 0, "max_seqlen_k": WIDTH}
        json.write_text(dumps(head | {"rows": [plain(row) for row in rows]}, indent=1) + "\n")
    if plot and rows:
        draw(rows, plot)
    return status


def plain_console() -> Console:
    """Prints text as it is: brackets and colons are no markup. As wide as the terminal or COLUMNS, else 80."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 80
    return Console(width=width, highlight=False, markup=False, emoji=False)


def print_table(console: Console, title: str, columns: Mapping[str, Sequence[str]], style: str = "") -> None:
    """Print the columns by their headings, the first aligned left; without those that are empty throughout."""
    filled = {heading: cells for heading, cells in columns.items() if any(cells)}
    (first, labels), *others = filled.items()
    widths = {heading: max(map(len, [*heading.split("\n"), *cells])) for heading, cells in others}
    left = console.width - sum(widths.values())
    padding = (0, 0, 0, int(left - 2 * len(others) >= max(map(len, labels))))  # one space between columns, or two
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding)
    table.add_column(first, overflow="fold")
    for heading in widths:
        table.add_column(heading, justify="right", no_wrap=True)
    room = left - (1 + padding[3]) * len(others)
    for cells in zip((_folded(label, room) for label in labels), *(cells for _, cells in others), strict=True):
        table.add_row(*cells)
    console.print(f"\n{title}", style=style)
    console.print(table)


def _folded(label: str, width: int) -> str:
    """In lines of at most that width, where they can be, cut behind spaces and dots."""
    lines = [""]
    for piece in re.findall(r"[^ .]*[ .]*", label):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append(" ")
        lines[-1] += piece
    return "\n".join(map(str.rstrip, lines))


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the rows of one batch size, if there are any."""
    if not rows:
        return
    host = {row.way: row.host.median for row in rows}
    columns = {
        "way": [row.way for row in rows],
        "launches": ["" if row.launches is None else str(row.launches) for row in rows],
        "host us": [format_us(row.host.median) for row in rows],
        "p10-p90": [f"{format_us(row.host.p10)}-{format_us(row.host.p90)}" for row in rows],
        "ratio": [format_ratio(host[SIX_COPIES] / row.host.median) if SIX_COPIES in host else "" for row in rows],
        "GPU us": [format_us(row.gpu.median) if row.gpu.samples else "" for row in rows],
    }
    print_table(console, f"bs {rows[0].bs}, page table {WIDTH} wide", columns)
    if host.keys() >= set(NEED_A_GPU):
        console.print(f"copy.update adds {host[UPDATE_AND_REPLAY] - host[GRAPH_REPLAY]:.2f} us and no launch")


def format_ratio(ratio: float) -> str:
    return f"{ratio:.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}x"


def format_us(us: float) -> str:
    return f"{us:.{2 if us < 10 else 1 if us < 1000 else 0}f}"


def plain(row: Row) -> dict[str, object]:
    """A row as JSON has it."""
    host, gpu = (timing.plain() if timing.samples else None for timing in (row.host, row.gpu))
    return {"bs": row.bs, "way": row.way, "launches": row.launches, "host_us": host, "gpu_us": gpu}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the times over the batch size: of the host, and of the GPU if there is one."""
    from matplotlib.figure import Figure

    metrics = [name for name in ("host", "gpu") if any(getattr(row, name).samples for row in rows)]
    sizes = sorted({row.bs for row in rows})
    figure = Figure(figsize=(1 + 4.5 * len(metrics), 4), layout="constrained")
    ways = list(dict.fromkeys(row.way for row in rows))
    for index, metric in enumerate(metrics, 1):
        panel = figure.add_subplot(1, len(metrics), index)
        for way in ways:
            times = {row.bs: getattr(row, metric) for row in rows if row.way == way}
            medians = {bs: timing.median for bs, timing in times.items() if timing.samples}
            panel.plot(list(medians), list(medians.values()), marker="o")
        panel.set(xscale="log", yscale="log", xlabel="batch size", ylabel=f"{metric} us per call")
        panel.set_xticks(sizes, [str(bs) for bs in sizes])
    figure.legend(figure.axes[0].lines, ways, loc="outside right center")
    figure.savefig(path)
