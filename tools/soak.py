"""Replays a decode loop's changing batches for a long time, on every GPU at once, and checks what was copied.

usage: python tools/soak.py [--replays 10000000] [--seconds S] [--every 1000] [--device cpu] [--json FILE]

One thread for each GPU takes turns among the ways to copy: the op, plans whose sources are made anew for each step and
freed right after the call, on the GPU and in pinned memory, a plan with casts and fills, and the updated node of a
graph that is then replayed; and among inference mode, no_grad and grad mode. Every so many replays a step is compared,
whole buffers, with ``copy_``. The host's and the GPUs' memory must stay what it was when a tenth was done. Exits with 1
where a byte was wrong, memory grew, or a call raised.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
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

MODES = (torch.inference_mode, torch.no_grad, torch.enable_grad)

FILL = {"out_loc": 0, "seq_lens": 1, "page_table": -1}
WIDE = ("input_ids", "out_loc", "positions")  # int64 in most engines

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """A batch's sources, and one tensor of all their elements, from which they can be made anew."""

    sources: Tensors
    packed: torch.Tensor
    sizes: list[int]
    pin: bool = False

    @classmethod
    def of(cls, sources: Tensors, *, pin: bool = False) -> Step:
        flat = [tensor.flatten() for tensor in sources.values()]
        return cls(sources, torch.cat(flat), [len(tensor) for tensor in flat], pin)

    def anew(self) -> list[torch.Tensor]:
        """Tensors of the same contents that nobody else holds."""
        packed = torch.empty_like(self.packed, pin_memory=True).copy_(self.packed) if self.pin else self.packed.clone()
        # Tensor.split ends in the same operator, after Python of its own.
        *rows, page_table = torch.split_with_sizes(packed, self.sizes)
        return [*rows, page_table.view(self.sources["page_table"].shape)]


@dataclass
class Way:
    """One way to copy, with buffers of its own."""

    name: str
    buffers: Tensors
    steps: list[Step]
    copy: Callable[[Step], None]
    fill: dict[str, int] = field(default_factory=dict)
    replays: int = 0


@dataclass
class Worker:
    """What one thread does on one device, and what it saw."""

    device: torch.device
    ways: list[Way]
    rounds: int = 0
    replays: int = 0
    checks: int = 0
    faults: list[str] = field(default_factory=list)

    def run(self, rounds: int, every: int, end: float) -> None:
        """Take turns until there were so many ``rounds`` in all, or something is wrong, or after ``end``."""
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            while self.rounds < rounds and not self.faults and time.monotonic() < end:
                with MODES[self.rounds % len(MODES)]():
                    for way in self.ways:
                        self._run_and_check(way, every)
                self.rounds += 1
        except Exception as error:
            self.faults.append(f"{self.device}: {type(error).__name__}: {error}")

    def _run_and_check(self, way: Way, every: int) -> None:
        copy = way.copy
        at = way.replays
        for step in itertools.islice(itertools.cycle(way.steps), at % STEPS, at % STEPS + every - 1):
            copy(step)
        step = way.steps[(at + every - 1) % STEPS]
        expected = {name: buffer.clone() for name, buffer in way.buffers.items()}
        for name, number in way.fill.items():
            expected[name].fill_(number)
        copy_each(expected, step.sources)
        copy(step)
        way.replays += every
        self.replays += every
        self.checks += 1
        for name, buffer in way.buffers.items():
            if not torch.equal(buffer, expected[name]):
                place = f"{self.device}, {way.name}, replay {way.replays}"
                self.faults.append(f"{place}: {name} is not what copy_ makes it")


def run_together(workers: list[Worker], rounds: int, every: int, end: float) -> None:
    """On every device at once until it had so many rounds, none of which begins after the monotonic clock's ``end``."""
    threads = [threading.Thread(target=worker.run, args=(rounds, every, end)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--replays", type=int, default=10_000_000, help="in all (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long, if that is sooner")
    parser.add_argument("--every", type=int, default=1000, help="check one in so many (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    record.add_arguments(parser.add_argument)
    args = parser.parse_args()
    if args.device == "cuda":
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    else:
        devices = [torch.device("cpu")]
    workers = [Worker(device, make_ways(device)) for device in devices]
    names = [way.name for way in workers[0].ways]
    rounds = max(args.replays // (args.every * len(names) * len(workers)), 10)
    begin = time.monotonic()
    # The first tenth warms up: kernels load, allocators and queues find their size.
    run_together(workers, rounds // 10, args.every, begin + args.seconds / 10)
    warm = memory_in_use(devices)
    run_together(workers, rounds, args.every, begin + args.seconds)
    growth = [now - then for now, then in zip(memory_in_use(devices), warm, strict=True)]
    seconds = time.monotonic() - begin
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
    steps = [Step.of(next(loop).sources) for _ in range(STEPS)]
    wide = [
        Step.of({name: tensor.long() if name in WIDE else tensor for name, tensor in step.sources.items()})
        for step in steps
    ]

    def buffers() -> Tensors:
        return capture_buffers(loop.max_bs, loop.max_seq_len, device)

    for_op, for_plan, for_fills = buffers(), buffers(), buffers()
    op_destinations = list(for_op.values())
    plan, filling_plan = fused_copy.Plan(for_plan), fused_copy.Plan(for_fills, FILL)
    ways = [
        Way("op", for_op, steps, lambda s: torch.ops.fused_copy.replay(op_destinations, list(s.sources.values()))),
        Way("plan with new sources", for_plan, steps, lambda s: plan.replay(*s.anew())),
        Way("casts and fills", for_fills, wide, lambda s: filling_plan.replay(*s.sources.values()), FILL),
    ]
    if device.type == "cuda":
        for_pinned, for_graph = buffers(), buffers()
        pinned_plan, graph_plan = fused_copy.Plan(for_pinned), fused_copy.Plan(for_graph)
        on_host = ({name: tensor.cpu() for name, tensor in step.sources.items()} for step in steps)
        pinned = [Step.of(sources, pin=True) for sources in on_host]
        with torch.cuda.device(device):
            plan.replay(*steps[0].anew())  # loads the kernel
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            # A stream of this device: torch.cuda.graph's own belongs to the GPU that it was first used on.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                node = graph_plan.capture(graph, *steps[0].sources.values())
            graph.instantiate()

        def update_and_replay(s: Step) -> None:
            node.update(*s.anew())
            graph.replay()

        ways += [
            Way("plan with new pinned sources", for_pinned, pinned, lambda s: pinned_plan.replay(*s.anew())),
            Way("update with new sources", for_graph, steps, update_and_replay),
        ]
    return ways


def memory_in_use(devices: list[torch.device]) -> list[int]:
    """Of this process on the host, and of each GPU, in bytes, once all work is done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    gpus = (torch.cuda.mem_get_info(device) for device in devices if device.type == "cuda")
    return [resident, *(total - free for free, total in gpus)]


if __name__ == "__main__":
    sys.exit(main())
