"""The demo: the static buffers of a decode loop's CUDA graphs, filled by torch's operators and by one ``replay``.

A step begins as Python lists and as rows of a page table. Torch's operators make six tensors of them, and copy each;
``replay`` does both in one launch.

Each way fills its own set of buffers, which its own graphs consume (on a CPU the same model runs eagerly). After every
step the two sets must be the same to the last byte, and so must what the graphs computed from them.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping
from itertools import islice
from statistics import fmean, median
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import fused_copy
from fused_copy.decode import DecodeLoop, Step, capture_buffers, copy_each, make_each
from fused_copy.sources import Source

Tensors = Mapping[str, torch.Tensor]
Sources = Mapping[str, Source]

POISON = 0x5A5A5A5A
"""What the static buffers hold before the first step: no token, slot, position or length of the loop."""


def make_and_copy(buffers: Tensors, made_of: Sources) -> None:
    """The fill by torch's operators."""
    copy_each(buffers, make_each(made_of))


class Way:
    """One way to fill static buffers, with its own buffers, its own graphs and its host time in us per step."""

    def __init__(self, label: str, fill: Callable[[Tensors, Sources], None], loop: DecodeLoop) -> None:
        self.label = label
        self.fill = fill
        self.buffers = capture_buffers(loop.max_bs, loop.max_seq_len, loop.device)
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
        self.fill(self.buffers, step.made_of)
        self.host_us.append((time.perf_counter_ns() - start) / 1e3)
        if self.graphs:
            self.graphs[step.bs].replay()
        else:
            self._model(step.bs)

    def _model(self, bs: int) -> None:
        """A stand-in for a decoder: store each token's KV, then reduce over each request's KV, in exact arithmetic."""
        input_ids, out_loc, cu_seqlens_k, positions, seq_lens, page_table = self.buffers.values()
        # A wrong slot must show as a wrong output; an index out of range would end the process instead.
        slots = page_table[:bs].remainder(len(self.kv_cache))
        self.kv_cache[out_loc[:bs].remainder(len(self.kv_cache))] = input_ids[:bs] + positions[:bs].long()
        live = torch.arange(slots.shape[1], device=slots.device) < seq_lens[:bs, None]
        attended = (self.kv_cache[slots] * live).sum(dim=1)
        self.output[:bs] = attended * (cu_seqlens_k[1 : bs + 1] - cu_seqlens_k[:bs]) + cu_seqlens_k[:bs]


def run(*, steps: int, seed: int, device: str) -> int:
    """Run ``steps`` decode steps on ``device``, print what each way cost, and return 0 if every step matched."""
    loop = DecodeLoop(seed=seed, device=device)
    classic, fused = Way("torch's operators", make_and_copy, loop), Way("fused_copy.replay", fused_copy.replay, loop)
    print(f"{_device_name(loop.device)}, torch {torch.__version__}")
    print(f"decode loop: up to {loop.max_bs} requests, page table buffer {loop.max_bs} x {loop.max_seq_len}, ", end="")
    print(f"{len(fused.graphs)} CUDA graphs a way" if fused.graphs else "no CUDA graphs")
    print("a step begins as lists of ids, slots, lengths and rows, and a page table, and ends in six buffers")

    batch_sizes: set[int] = set()
    widths: set[int] = set()
    step_bytes: list[int] = []
    for index, step in enumerate(islice(loop, steps)):
        for way in (classic, fused) if index % 2 else (fused, classic):
            way.step(step)
        if difference := _first_difference(classic, fused, step):
            print(f"\nstep {index} (bs {step.bs}, max_seqlen_k {step.max_seqlen_k}): {difference}")
            return 1
        batch_sizes.add(step.bs)
        widths.add(step.max_seqlen_k)
        step_bytes.append(sum(source.nbytes for source in step.sources.values()))
        _show_progress(index + 1, steps, step)

    print(f"{loop.served} requests served, bs {', '.join(map(str, sorted(batch_sizes)))}, ", end="")
    print(f"page table {min(widths)} to {max(widths)} wide")
    print("every step matched: each byte of the six buffers, and the output computed from them\n")
    _print_costs((classic, fused), fmean(step_bytes), step)
    return 0


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _first_difference(classic: Way, fused: Way, step: Step) -> str | None:
    for name, source in step.sources.items():
        corner = fused.buffers[name][tuple(slice(size) for size in source.shape)]
        if difference := _difference(source, corner):
            return f"{name} is not its source: {difference}"
        if difference := _difference(classic.buffers[name], fused.buffers[name]):
            return f"{name} changed outside the leading corner: {difference}"
    if difference := _difference(classic.output, fused.output):
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


def _print_costs(ways: tuple[Way, Way], step_bytes: float, step: Step) -> None:
    """Print one row per way and their ratio; ``step`` is the one whose calls, launches and GPU time are counted."""
    warm_up = len(ways[0].host_us) // 10
    host_us = [sorted(way.host_us[warm_up:]) for way in ways]
    columns = [
        ["way", *(way.label for way in ways), "ratio"],
        ["bytes/step", *(f"{step_bytes:,.0f}" for _ in ways), ""],
        ["host us/step", *(f"{median(times):.1f}" for times in host_us), _ratio(*map(median, host_us))],
        ["p10-p90", *(f"{_quantile(times, 0.1):.1f}-{_quantile(times, 0.9):.1f}" for times in host_us), ""],
    ]
    calls = _torch_calls(ways[0], step), 1  # replay itself
    columns.insert(1, ["calls/step", *map(str, calls), _ratio(*calls)])
    if ways[0].graphs:
        counts, times = zip(*(_gpu_cost(way, step) for way in ways), strict=True)
        columns.insert(2, ["launches/step", *(f"{count:.0f}" for count in counts), _ratio(*counts)])
        columns.append(["GPU us, last step", *(f"{us:.2f}" for us in times), _ratio(*times)])
    widths = [max(map(len, column)) for column in columns]
    for label, *cells in zip(*columns, strict=True):
        print("  ".join([label.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip())


def _ratio(classic: float, fused: float) -> str:
    return f"{classic / fused:.1f}x" if fused else ""  # a profiler may see nothing of a GPU


def _quantile(ordered: list[float], q: float) -> float:
    return ordered[round(q * (len(ordered) - 1))]


def _torch_calls(way: Way, step: Step) -> int:
    """The calls of torch's functions that Python makes for one fill by its operators."""

    class Counter(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func.__name__ != "__get__"  # of an attribute
            return func(*args, **(kwargs or {}))

    counter = Counter()
    with counter:
        way.fill(way.buffers, step.made_of)
    return counter.calls


def _gpu_cost(way: Way, step: Step) -> tuple[float, float]:
    """Launches (kernels, memcpys and memsets) and GPU time in us of one fill."""
    fills = 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(fills):
            way.fill(way.buffers, step.made_of)
        torch.cuda.synchronize()
    events = [e for e in profiler.events() or () if "CUDA" in str(e.device_type) and "Sync" not in e.name]
    return len(events) / fills, sum(e.time_range.elapsed_us() for e in events) / fills
