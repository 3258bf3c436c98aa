"""How the benchmark measures: host time between synchronizations, GPU time of many calls in one CUDA graph, wall time
of a loop that ends when the GPU is done.

All take several calls that do the same on different tensors and make them in turn, so that no time rests on sources
that are always the same.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path

import torch

Call = Callable[[], object]

LAUNCHES_PER_BATCH = 512
"""Half of the launches that a stream takes before the next one waits for the GPU."""


@dataclass(frozen=True)
class Timing:
    """Times of one call in us: each sample is the mean over a batch of calls."""

    samples: tuple[float, ...] = ()

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.samples + other.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p10(self) -> float:
        return self._quantile(0.1)

    @property
    def p90(self) -> float:
        return self._quantile(0.9)

    def _quantile(self, q: float) -> float:
        return sorted(self.samples)[round(q * (len(self.samples) - 1))]


def host_us(calls: Sequence[Call], *, launches: int = 1, batches: int = 40, warm_up: int = 2) -> Timing:
    """Host time of one call, one sample for each batch.

    A batch has up to 32 calls, fewer where one call makes many ``launches``: a call that met a full launch queue would
    wait for the GPU. The loop and a ``functools.partial`` take about 0.05 us of each call and are not subtracted.
    """
    size = max(1, min(32, LAUNCHES_PER_BATCH // max(1, launches)))
    turns = cycle(calls)
    samples = []
    with _gc_off():
        for _ in range(warm_up + batches):
            batch = list(islice(turns, size))
            _synchronize()
            start = time.perf_counter_ns()
            for call in batch:
                call()
            samples.append((time.perf_counter_ns() - start) / (1e3 * size))
        _synchronize()
    return Timing(tuple(samples[warm_up:]))


def gpu_us(calls: Sequence[Call], *, per_graph: int = 256, replays: int = 20) -> Timing:
    """GPU time of one call, one sample for each replay of a graph of at most ``per_graph`` calls, all ``calls`` alike.

    The calls must have run before: what they load or compile on first use cannot be captured.
    """
    return gpu_timer(calls, per_graph=per_graph)(replays)


def calls_per_graph(launches: int, step_bytes: int) -> int:
    """Enough calls to hide the gap between two graphs, few enough to capture quickly and to replay in some ms."""
    return min(256, 2048 // max(1, launches), 2**32 // step_bytes)


def gpu_timer(
    calls: Sequence[Call], *, per_graph: int, check: Callable[[Call], object] | None = None
) -> Callable[[int], Timing]:
    """:func:`gpu_us` in two steps: captures the graph, and returns what times a number of its replays.

    ``check`` gets the graph's replay, before anything is timed: the last of its calls is the last of ``calls``.
    """
    per_graph = len(calls) * max(1, per_graph // len(calls))
    graph = capture(islice(cycle(calls), per_graph))
    if check:
        check(graph.replay)

    def time_replays(replays: int) -> Timing:
        events = [torch.Event("cuda", enable_timing=True) for _ in range(replays + 1)]
        graph.replay()  # keeps the GPU busy while the host enqueues the timed ones
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        events[-1].synchronize()
        return Timing(tuple(start.elapsed_time(end) * 1e3 / per_graph for start, end in pairwise(events)))

    return time_replays


def loop_us(calls: Sequence[Call], *, steps: int, every_step: bool = False) -> Timing:
    """Wall time of one call until the GPU is done: one sample, of a loop of ``steps`` calls.

    The loop synchronizes at its end, so that host and GPU overlap as in a pipelined engine, or after ``every_step``, as
    where the host waits for each step's tokens.
    """
    turns = list(islice(cycle(calls), steps))
    turns[0]()
    with _gc_off():
        _synchronize()
        start = time.perf_counter_ns()
        for call in turns:
            call()
            if every_step:
                _synchronize()
        _synchronize()
        return Timing(((time.perf_counter_ns() - start) / (1e3 * steps),))


def profile_kernel(call: Call) -> dict[str, object] | None:
    """Launch parameters and occupancy of the one kernel that a call launches, as the profiler's trace has them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        _synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if len(kernels) != 1:
        return None
    facts: dict[str, object] = kernels[0]["args"]
    return {name: facts[key] for name, key in _KERNEL_FACTS.items() if key in facts}


_KERNEL_FACTS = {
    "blocks": "grid",
    "block_size": "block",
    "registers": "registers per thread",
    "occupancy_percent": "est. achieved occupancy %",
}


def capture(calls: Iterable[Call]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the calls, one after the other."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def launches(call: Call) -> int:
    """The kernels, memcpys and memsets that one call enqueues: the nodes of its graph."""
    graph = capture([call])
    nodes = ctypes.c_size_t()
    raw_graph = ctypes.c_void_p(graph.raw_cuda_graph())
    if error := ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(raw_graph, None, ctypes.byref(nodes)):
        raise RuntimeError(f"cuGraphGetNodes failed with error {error}")
    return nodes.value


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def _gc_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
