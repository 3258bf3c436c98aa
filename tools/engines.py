"""What the tools share that run an engine's own code from its source tree: modules in place of what they leave out,
counted operators, and what a step puts on the GPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_copy.timing import Call, Timing, host_us, in_turn


def put_module(name: str, folder: Path | None = None, **names: Any) -> None:
    """Puts a module of these names in place; with ``folder``, a package whose other modules lie there."""
    made = ModuleType(name)
    made.__dict__.update(names)
    made.__spec__ = ModuleSpec(name, None)  # torch's compiler, which a dispatch mode imports, looks for it
    if folder is not None:
        made.__path__ = [str(folder)]
    sys.modules[name] = made


class CountedOps(TorchDispatchMode):
    """Counts the operators of these names that are called, and this package's as ``fused_copy.replay``."""

    def __init__(self, *names: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused_copy":
            self.ops["fused_copy.replay"] += 1
        elif self.counts(func, args):
            self.ops[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def counts(self, func: Any, args: Any) -> bool:
        """Whether this call of another's operator is counted."""
        return func.namespace == "aten" and func.overloadpacket.__name__ in self.names


def gpu_work(step: Call, steps: int = 16) -> dict[str, float]:
    """What a step puts on the GPU, by kind, and for how long in us: the mean of so many, after one that is not seen.

    Times are taken before: torch's profiler stays attached to CUDA, and makes every launch of the process slower from
    then on (github.com/pytorch/pytorch/issues/144455).
    """
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(str(Path(folder, "trace.json")))
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    on_gpu = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    found = {kind: n / steps for kind, n in Counter(event["cat"] for event in on_gpu).items()}
    return found | {"gpu_us": round(sum(event["dur"] for event in on_gpu) / steps, 2)}


def host_us_in_turn(ways: Mapping[str, Call], rounds: int = 20) -> dict[str, list[float]]:
    """What :func:`spread` says of the host time of a call each way, of few batches of calls in each of the rounds."""
    times = dict.fromkeys(ways, Timing())
    names = list(ways)
    timers = [lambda call=call: host_us([call], launches=16, batches=2) for call in ways.values()]
    for at, timing in in_turn(timers, rounds):
        times[names[at]] += timing
    return {way: spread(timing) for way, timing in times.items()}


def spread(timing: Timing) -> list[float]:
    """The median, the 10th and the 90th percentile."""
    return [round(us, 2) for us in (timing.median, timing.p10, timing.p90)]
