"""What is measured of whole steps and of kernels, beside the host and GPU times of :mod:`fused_copy.timing`."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import torch

from fused_copy.timing import Call, Timing, gc_off, synchronize


def loop_us(calls: Sequence[Call], *, steps: int, every_step: bool = False) -> Timing:
    """Wall time of one call until the GPU is done: one sample, of a loop of ``steps`` calls.

    The loop synchronizes at its end, so that host and GPU overlap as in a pipelined engine, or after ``every_step``, as
    where the host waits for each step's tokens.
    """
    turns = list(islice(cycle(calls), steps))
    turns[0]()
    with gc_off():
        synchronize()
        start = time.perf_counter_ns()
        for call in turns:
            call()
            if every_step:
                synchronize()
        synchronize()
        return Timing(((time.perf_counter_ns() - start) / (1e3 * steps),))


def profile_kernel(call: Call) -> dict[str, object] | None:
    """Launch parameters and occupancy of the one kernel that a call launches, as the profiler's trace has them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        synchronize()
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
