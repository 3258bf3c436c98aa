"""Replays a decode loop's changing batches for a long time, on every GPU at once, and checks what was copied.

usage: python tools/soak.py [--replays 10000000] [--seconds S] [--every 1000] [--device cpu] [--json FILE]

One thread for each GPU takes turns among the ways to copy: the op, a plan, a plan with pinned sources, and the updated
node of a graph that is then replayed. Every so many replays a step is compared, whole buffers, with ``copy_``. The
host's and the GPUs' memory must stay what it was when a tenth was done. Exits with 1 where a byte was wrong, memory
grew, or a call raised.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import record
import torch

import fused_copy
from fused_copy.decode import DecodeLoop, capture_buffers, copy_each

STEPS = 128
"""Different batches, prepared beforehand: a simulation between the replays would be most of the time."""

MAX_GROWTH = 16 << 20
"""Bytes of host memory, or of a GPU's, that may come on top after a tenth of the replays."""

Tensors = dict[str, torch.Tensor]


@dataclass
class Way:
    """One way to copy, with buffers of its own."""

    name: str
    buffers: Tensors
    steps: list[Tensors]
    copy: Callable[[Tensors], None]
    replays: int = 0


@dataclass
class Worker:
    """What one thread does on one device, and what it saw."""

    device: torch.device
    ways: list[Way]
    replays: int = 0
    checks: int = 0
    faults: list[str] = field(default_factory=list)

    def run(self, rounds: Iterator[int], every: int) -> None:
        """Take turns until ``rounds`` ends, or something is wrong."""
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            with torch.inference_mode():  # as engines run their decode loops
                for _ in rounds:
                    for way in self.ways:
                        self._run_and_check(way, every)
                    if self.faults:
                        return
        except Exception as error:
            self.faults.append(f"{self.device}: {type(error).__name__}: {error}")

    def _run_and_check(self, way: Way, every: int) -> None:
        copy = way.copy
        at = way.replays
        for sources in itertools.islice(itertools.cycle(way.steps), at % STEPS, at % STEPS + every - 1):
            copy(sources)
        sources = way.steps[(at + every - 1) % STEPS]
        expected = {name: buffer.clone() for name, buffer in way.buffers.items()}
        copy_each(expected, sources)
        copy(sources)
        way.replays += every
        self.replays += every
        self.checks += 1
        for name, buffer in way.buffers.items():
            if not torch.equal(buffer, expected[name]):
                place = f"{self.device}, {way.name}, replay {way.replays}"
                self.faults.append(f"{place}: {name} is not what copy_ makes it")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--replays", type=int, default=10_000_000, help="in all (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long, if that is sooner")
    parser.add_argument("--every", type=int, default=1000, help="check one in so many (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    record.add_arguments(parser)
    args = parser.parse_args()
    if args.device == "cuda":
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    else:
        devices = [torch.device("cpu")]
    workers = [Worker(device, make_ways(device)) for device in devices]
    names = [way.name for way in workers[0].ways]
    rounds = max(args.replays // (args.every * len(names) * len(workers)), 10)
    begin = time.monotonic()

    def until_done() -> Iterator[int]:
        return (i for i in range(rounds) if time.monotonic() - begin < args.seconds)

    threads = [threading.Thread(target=worker.run, args=(until_done(), args.every)) for worker in workers]
    for thread in threads:
        thread.start()
    # The first tenth warms up: kernels load, allocators and queues find their size.
    warm: list[int] | None = None
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.05)
        done = sum(worker.replays for worker in workers)
        if warm is None and (done > args.replays / 10 or time.monotonic() - begin > args.seconds / 10):
            warm = memory_in_use(devices)
    for thread in threads:
        thread.join()
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds = time.monotonic() - begin
    growth = [now - then for now, then in zip(memory_in_use(devices), warm or memory_in_use(devices), strict=True)]
    faults = [fault for worker in workers for fault in worker.faults]
    for place, more in zip(["the host", *map(str, devices)], growth, strict=False):
        if more > MAX_GROWTH:
            faults.append(f"memory of {place} grew by {more:,} bytes")
    replays = sum(worker.replays for worker in workers)
    checks = sum(worker.checks for worker in workers)
    print(f"{replays:,} replays on {', '.join(map(str, devices))} in {seconds:.0f} s by {', '.join(names)}")
    print(f"{checks:,} steps checked, {len(faults)} faults")
    print(f"memory grew by {', '.join(f'{more:,}' for more in growth)} bytes (host, GPUs)")
    for fault in faults:
        print(f"soak: {fault}", file=sys.stderr)
    record.write(
        args,
        tool="soak",
        what=f"replays of a decode loop on {len(devices)} device{'s' if len(devices) > 1 else ''} at once",
        cases=replays,
        unit="replays",
        seconds=seconds,
        faults=len(faults),
        ways=names,
        checked=checks,
        growth_bytes=dict(zip(["host", *map(str, devices)], growth, strict=False)),
    )
    return 1 if faults else 0


def make_ways(device: torch.device) -> list[Way]:
    """All the ways that the device has. Graphs are captured here, one after another."""
    loop = DecodeLoop(max_bs=32, max_seq_len=512, prompt_len=(4, 400), new_tokens=(4, 64), seed=1, device=device)
    steps = [next(loop).sources for _ in range(STEPS)]

    def buffers() -> Tensors:
        return capture_buffers(loop.max_bs, loop.max_seq_len, device)

    for_op, for_plan = buffers(), buffers()
    op_destinations, plan = list(for_op.values()), fused_copy.Plan(for_plan)
    ways = [
        Way("op", for_op, steps, lambda s: torch.ops.fused_copy.replay(op_destinations, list(s.values()))),
        Way("plan", for_plan, steps, lambda s: plan.replay(*s.values())),
    ]
    if device.type == "cuda":
        for_pinned, for_graph = buffers(), buffers()
        pinned_plan, graph_plan = fused_copy.Plan(for_pinned), fused_copy.Plan(for_graph)
        pinned = [{name: tensor.cpu().pin_memory() for name, tensor in step.items()} for step in steps]
        with torch.cuda.device(device):
            plan.replay(*steps[0].values())  # loads the kernel
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            # A stream of this device: torch.cuda.graph's own belongs to the GPU that it was first used on.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                node = graph_plan.capture(graph, *steps[0].values())
            graph.instantiate()

        def update_and_replay(s: Tensors) -> None:
            node.update(*s.values())
            graph.replay()

        ways += [
            Way("plan with pinned sources", for_pinned, pinned, lambda s: pinned_plan.replay(*s.values())),
            Way("update", for_graph, steps, update_and_replay),
        ]
    return ways


def memory_in_use(devices: list[torch.device]) -> list[int]:
    """Of this process on the host, and of each GPU, in bytes."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    gpus = (torch.cuda.mem_get_info(device) for device in devices if device.type == "cuda")
    return [resident, *(total - free for free, total in gpus)]


if __name__ == "__main__":
    sys.exit(main())
