"""The demo: the static buffers of a decode loop's CUDA graphs, filled by torch's operators and by one launch.

A step begins as Python lists and as rows of a page table. Torch's operators make six tensors of them, and copy each;
``fused_copy.replay`` and ``plan.replay`` do all of it in one launch.

Each way fills its own set of buffers, which its own graphs consume (on a CPU the same model runs eagerly). After every
step the sets must be the same to the last byte, and so must what the graphs computed from them.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import fused_copy
from fused_copy.decode import DecodeLoop, Step, capture_buffers, copy_each, make_each
from fused_copy.sources import Source
from fused_copy.timing import Timing, machine

Tensors = Mapping[str, torch.Tensor]
Fill = Callable[[Mapping[str, Source]], object]

POISON = 0x5A5A5A5A
"""What the static buffers hold before the first step: no token, slot, position or length of the loop."""

MADE_OF = {
    "input_ids": ("its last token", "a list"),
    "out_loc": ("the KV slot of that token", "a list"),
    "cu_seqlens_k": ("the sum of the lengths so far", "the list of lengths"),
    "positions": ("the position of that token", "that list, less 1"),
    "seq_lens": ("the length of its sequence", "the list of lengths"),
    "page_table": ("the KV slots of its tokens", "rows of a page table"),
}
"""What each buffer holds for a request, and what an engine makes it of."""


def _by_operators(buffers: Tensors) -> Fill:
    return lambda made_of: copy_each(buffers, make_each(made_of))


def _by_function(buffers: Tensors) -> Fill:
    return partial(fused_copy.replay, buffers)


def _by_plan(buffers: Tensors) -> Fill:
    fill: Fill = fused_copy.Plan(buffers).replay
    return fill


OPERATORS, FUNCTION, PLAN = "torch's operators", "fused_copy.replay", "plan.replay"
WAYS = {OPERATORS: _by_operators, FUNCTION: _by_function, PLAN: _by_plan}


class Mismatch(Exception):
    """A way left other bytes than torch's operators do."""


@dataclass(frozen=True)
class Cost:
    """One way's fill of a step: the calls that Python makes and, on a GPU, what they launch and how long they take.

    ``host_us`` is over all steps but the first tenth, ``launches`` and ``gpu_us`` are means of the last one's fills.
    """

    way: str
    calls: int
    launches: float | None = None
    host_us: dict[str, float] | None = None
    gpu_us: float | None = None


@dataclass(frozen=True)
class Result:
    """A run whose every step matched. ``bs`` and ``max_seqlen_k`` are the smallest and the largest."""

    machine: dict[str, str | None]
    steps: int
    requests: int
    bs: tuple[int, int]
    max_seqlen_k: tuple[int, int]
    costs: Sequence[Cost]


class Way:
    """One way to fill static buffers, with its own buffers, its own graphs and its host time in us per step."""

    def __init__(self, label: str, loop: DecodeLoop) -> None:
        self.label = label
        self.buffers = capture_buffers(loop.max_bs, loop.max_seq_len, loop.device)
        self.fill = WAYS[label](self.buffers)
        self.output = torch.zeros(loop.max_bs, dtype=torch.int64, device=loop.device)
        self.kv_cache = torch.arange(loop.num_slots, device=loop.device)
        self.host_us: list[float] = []
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if loop.device.type == "cuda":
            self._model(loop.max_bs)  # loads its kernels, which capture could not
            pool = torch.cuda.graph_pool_handle()
            for bs in reversed(loop.capture_sizes):
                self.graphs[bs] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graphs[bs], pool=pool):
                    self._model(bs)
        for buffer in self.buffers.values():
            buffer.fill_(POISON)

    def step(self, step: Step) -> None:
        """Fill the buffers, timed, and run the model on them."""
        if self.graphs:
            torch.cuda.synchronize()  # a full launch queue would be timed as host work
        start = time.perf_counter_ns()
        self.fill(step.made_of)
        self.host_us.append((time.perf_counter_ns() - start) / 1e3)
        if self.graphs:
            self.graphs[step.bs].replay()
        else:
            self._model(step.bs)

    def cost(self, step: Step) -> Cost:
        """Of the steps taken; ``step`` is the one whose calls and launches are counted."""
        calls = _torch_calls(self.fill, step) if self.label == OPERATORS else 1
        if not self.graphs:
            return Cost(self.label, calls)
        launches, gpu_us = _gpu_cost(self.fill, step)
        warm_up = len(self.host_us) // 10
        return Cost(self.label, calls, launches, Timing(tuple(self.host_us[warm_up:])).plain(), gpu_us)

    def _model(self, bs: int) -> None:
        """A stand-in for a decoder: store each token's KV, then reduce over each request's KV, in exact arithmetic."""
        input_ids, out_loc, cu_seqlens_k, positions, seq_lens, page_table = self.buffers.values()
        # A wrong slot must show as a wrong output; an index out of range would end the process instead.
        slots = page_table[:bs].remainder(len(self.kv_cache))
        self.kv_cache[out_loc[:bs].remainder(len(self.kv_cache))] = input_ids[:bs] + positions[:bs].long()
        live = torch.arange(slots.shape[1], device=slots.device) < seq_lens[:bs, None]
        attended = (self.kv_cache[slots] * live).sum(dim=1)
        self.output[:bs] = attended * (cu_seqlens_k[1 : bs + 1] - cu_seqlens_k[:bs]) + cu_seqlens_k[:bs]


def run(*, steps: int, seed: int, device: str, json: Path | None) -> int:
    """Take ``steps`` decode steps on ``device`` in every way, and print what was found; 0 if every step matched."""
    loop = DecodeLoop(seed=seed, device=device)
    facts = machine(loop.device, commit=None)
    print(introduction(facts, loop))
    try:
        result = measure(loop, steps, facts)
    except Mismatch as mismatch:
        print(f"\n{mismatch}")
        return 1
    print(conclusion(result))
    if json:
        json.write_text(dumps(result))
    return 0


def measure(loop: DecodeLoop, steps: int, facts: dict[str, str | None]) -> Result:
    """Take the steps. Raises :class:`Mismatch`."""
    threads = torch.get_num_threads()
    if loop.device.type == "cpu":
        torch.set_num_threads(1)  # on a busy machine operators would wait for threads that share so little out
    try:
        operators, *others = ways = [Way(label, loop) for label in WAYS]
        sizes: list[tuple[int, int]] = []
        for index, step in enumerate(islice(loop, steps)):
            turn = index % len(ways)  # whoever comes first finds the caches cold
            for way in ways[turn:] + ways[:turn]:
                way.step(step)
            for way in others:
                if difference := _first_difference(operators, way, step):
                    raise Mismatch(
                        f"step {index} (bs {step.bs}, max_seqlen_k {step.max_seqlen_k}), {way.label}: {difference}"
                    )
            sizes.append((step.bs, step.max_seqlen_k))
            _show_progress(index + 1, steps, step)
        bs, widths = zip(*sizes, strict=True)
        costs = [way.cost(step) for way in ways]
    finally:
        torch.set_num_threads(threads)
    return Result(facts, steps, loop.served, (min(bs), max(bs)), (min(widths), max(widths)), costs)


def dumps(result: Result) -> str:
    """What ``--json`` writes."""
    return json.dumps(asdict(result), indent=1) + "\n"


def introduction(facts: Mapping[str, str | None], loop: DecodeLoop) -> str:
    """What a decode step is made of, for whom it is new."""
    how = (
        f"by replaying a CUDA graph, one of {len(loop.capture_sizes)} for as many batch sizes"
        if facts["gpu"]
        else "with a CUDA graph on a GPU, and eagerly on this CPU"
    )
    table = [("static buffer", "size", "holds of each request", "made of")]
    for name, buffer in capture_buffers(loop.max_bs, loop.max_seq_len, "meta").items():
        table.append((name, " x ".join(map(str, buffer.shape)), *MADE_OF[name]))
    return "\n\n".join(
        [
            f"{facts['gpu'] or facts['cpu']}, torch {facts['torch']}",
            _wrapped(
                f"A decode step makes the next token of every running request, here of up to {loop.max_bs}, {how}. "
                "A graph reads the same memory at every replay, its static buffers, which must be filled before:"
            ),
            _aligned(table, left=4),
            "",
        ]
    )


def conclusion(result: Result) -> str:
    """What was checked, and on a GPU what each way costs."""
    operators, *others = result.costs
    names = " and ".join(cost.way for cost in others)
    checked = _wrapped(
        f"Checked: {result.steps} steps, bs {_range(result.bs)}, page tables {_range(result.max_seqlen_k)} wide, "
        f"{result.requests} requests served. After every step each byte of the buffers of {names} was that of torch's "
        "operators, and so was what the model computed from them."
    )
    if operators.host_us is None:
        calls = (
            f"To fill the buffers for a step, Python makes {operators.calls} calls of torch's operators, or one of "
            f"{names.replace(' and ', ' or ')}, which on a GPU is one launch. There are no times here, as they mean "
            "something on a GPU only."
        )
        return f"\n{checked}\n\n{_wrapped(calls)}"
    table = [("way", "calls", "launches", "host us", "p10-p90", "ratio", "GPU us", "ratio")]
    for cost in result.costs:
        host = cost.host_us or {}
        table.append(
            (
                cost.way,
                str(cost.calls),
                f"{cost.launches:g}" if cost.launches else "",  # a profiler may see nothing of a GPU
                f"{host['median']:.1f}",
                f"{host['p10']:.1f}-{host['p90']:.1f}",
                f"{operators.host_us['median'] / host['median']:.1f}x",
                f"{cost.gpu_us:.2f}" if cost.gpu_us else "",
                f"{operators.gpu_us / cost.gpu_us:.1f}x" if operators.gpu_us and cost.gpu_us else "",
            )
        )
    heading = "To fill the buffers for a step takes, host us as medians over the steps:"
    summary = (
        f"{others[-1].way} is {_spent(others[-1])} of the host; {operators.way} are {_spent(operators)}. GPU us are "
        "means over ten fills for the last step."
    )
    return "\n\n".join(["\n" + checked, heading, _aligned(table, left=1), _wrapped(summary)])


def _spent(cost: Cost) -> str:
    launches = f", {cost.launches:g} launch{'' if cost.launches == 1 else 'es'}" if cost.launches else ""
    median = f"{cost.host_us['median']:.1f} us" if cost.host_us else ""
    return f"{cost.calls} call{'' if cost.calls == 1 else 's'}{launches} and {median}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 80, break_on_hyphens=False)


def _aligned(table: Sequence[Sequence[str]], left: int) -> str:
    """Each column as wide as need be, the first ``left`` of them aligned there."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    align = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    rows = (zip(align, row, widths, strict=True) for row in table)
    return "\n".join("  ".join(to(cell, width) for to, cell, width in row).rstrip() for row in rows)


def _range(ends: tuple[int, int]) -> str:
    return f"{ends[0]} to {ends[1]}"


def _first_difference(operators: Way, way: Way, step: Step) -> str | None:
    for name, source in step.sources.items():
        corner = way.buffers[name][tuple(slice(size) for size in source.shape)]
        if difference := _difference(source, corner):
            return f"{name} is not its source: {difference}"
        if difference := _difference(operators.buffers[name], way.buffers[name]):
            return f"{name} changed outside the leading corner: {difference}"
    if difference := _difference(operators.output, way.output):
        return f"the model's output: {difference}"
    return None


def _difference(expected: torch.Tensor, actual: torch.Tensor) -> str | None:
    if torch.equal(expected, actual):
        return None
    index = tuple((expected != actual).nonzero()[0].tolist())
    return f"{actual[index].item()} instead of {expected[index].item()} at {list(index)}"


def _show_progress(done: int, steps: int, step: Step) -> None:
    live = sys.stdout.isatty()
    if done % max(1, steps // (100 if live else 4)) and done != steps:
        return
    line = f"step {done}/{steps}: {step.running:2} requests, bs {step.bs:2}, page table {step.max_seqlen_k:4} wide"
    print(f"\r{line}" if live else line, end="" if live and done != steps else "\n", flush=True)


def _torch_calls(fill: Fill, step: Step) -> int:
    """The calls of torch's functions that Python makes for one fill by its operators."""

    class Counter(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func.__name__ != "__get__"  # of an attribute
            return func(*args, **(kwargs or {}))

    counter = Counter()
    with counter:
        fill(step.made_of)
    return counter.calls


def _gpu_cost(fill: Fill, step: Step) -> tuple[float, float]:
    """Launches (kernels, memcpys and memsets) and GPU time in us of one fill."""
    fills = 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(fills):
            fill(step.made_of)
        torch.cuda.synchronize()
    events = [e for e in profiler.events() or () if "CUDA" in str(e.device_type) and "Sync" not in e.name]
    return len(events) / fills, sum(e.time_range.elapsed_us() for e in events) / fills
