"""How calls are timed: host time between synchronizations, GPU time of many calls in one CUDA graph.

Both take several calls that do the same on different tensors and make them in turn, so that no time rests on sources
that are always the same. And what a machine's times depend on.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import cycle, islice, pairwise
from pathlib import Path

import torch

from fused_copy._version import __version__

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

    def plain(self) -> dict[str, float]:
        """As JSON has it."""
        return {name: round(getattr(self, name), 4) for name in ("median", "p10", "p90")}

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
    with gc_off():
        for _ in range(warm_up + batches):
            batch = list(islice(turns, size))
            synchronize()
            start = time.perf_counter_ns()
            for call in batch:
                call()
            samples.append((time.perf_counter_ns() - start) / (1e3 * size))
        synchronize()
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


def in_turn(timers: Sequence[Callable[[], Timing]], rounds: int) -> Iterator[tuple[int, Timing]]:
    """Times all over and over, back and forth, so that drift meets them alike: which it was, and what it took."""
    for round in range(rounds):
        order = range(len(timers))
        for index in order if round % 2 else reversed(order):
            yield index, timers[index]()


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


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def gc_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def machine(device: torch.device, commit: str | None) -> dict[str, str | None]:
    """What times on this device depend on, for a results file; ``commit`` is the package's, where it is known."""
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
