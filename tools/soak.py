"""Replays a decode loop's changing batches for a long time, on every GPU at once, and checks what was copied.

usage: python tools/soak.py [--replays 10000000] [--updates 1000000] [--seconds S] [--every 1000] [--device cpu]
    [--json FILE]

One thread for each GPU takes turns among the ways to copy: the op, plans whose sources are made anew for each step and
freed right after the call, on the GPU and in pinned memory, a plan with casts and fills, a plan whose sources are host
values that are rewritten right after the call, rows, sums, integers plus a number and None, and the updated nodes of
graphs that are then replayed; and among inference mode, no_grad and grad mode. Every so many replays a step is
compared, whole buffers, with ``copy_``.

Before that, updates by host values are queued in batches behind a stream that stands still, each with a launch of its
graph, which also adds what it read to a checksum. Every batch the checksum is compared with the host's. On the CPU it
is a plan's calls instead, with nothing that stands still.

The host's and the GPUs' memory must stay what it was when a tenth was done. Exits with 1 where a byte was wrong, memory
grew, or a call raised.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch

import fused_copy
from fused_copy import cu_seqlens, plus, rows
from fused_copy.decode import DecodeLoop, capture_buffers
from fused_copy.decode import Step as DecodeStep

STEPS = 128
"""Different batches, prepared beforehand: a simulation between the replays would be most of the time."""

MAX_GROWTH = 16 << 20
"""Bytes of host memory, or of a GPU's, that may come on top after a tenth of the replays."""

MODES = (torch.inference_mode, torch.no_grad, torch.enable_grad)

FILL = {"out_loc": 0, "seq_lens": 1, "page_table": -1}
FILL_LAST: dict[str, Any] = {**FILL, "cu_seqlens_k": "last"}
WIDE = ("input_ids", "out_loc", "positions")  # int64 in most engines

Tensors = dict[str, torch.Tensor]


def renewed(source: Any, host: list[Any]) -> Any:
    """The same source of memory that nobody else holds; that of host values is in ``host``, too."""
    if isinstance(source, tuple):
        return type(source)(*[renewed(part, host) for part in source])
    if source is None or isinstance(source, int):
        return source
    if isinstance(source, torch.Tensor):
        if source.is_pinned():
            return torch.empty_like(source, pin_memory=True).copy_(source)
        new = source.clone()
        if new.is_cpu:
            host.append(new)
        return new
    host.append(source.copy())
    return host[-1]


def rewrite(host: list[Any]) -> None:
    for values in host:
        values[:] = [-7] * len(values) if isinstance(values, list) else -7


@dataclass(frozen=True)
class Step:
    """A batch's sources, and one tensor of all their elements, from which they can be made anew.

    ``made_of`` has them as what an engine has. Where that is None for one of them, it is not among ``sources``.
    """

    sources: Tensors
    packed: torch.Tensor
    sizes: list[int]
    pin: bool = False
    made_of: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, sources: Tensors, *, pin: bool = False) -> Step:
        flat = [tensor.flatten() for tensor in sources.values()]
        return cls(sources, torch.cat(flat), [len(tensor) for tensor in flat], pin)

    @classmethod
    def made(cls, step: DecodeStep, rng: random.Random, device: torch.device) -> Step:
        """Of host values, rows, sums and additions, all in forms that ``rng`` chooses."""

        def some(numbers: list[int]) -> Any:
            form = rng.randrange(5 if device.type == "cuda" else 3)
            if form < 2:
                return np.array(numbers, dtype=rng.choice((np.int32, np.int64))) if form else numbers
            values = torch.tensor(numbers, dtype=rng.choice((torch.int32, torch.int64)))
            return values if form == 2 else values.to(device) if form == 3 else values.pin_memory()

        numbers = {name: tensor.tolist() for name, tensor in step.sources.items() if name != "page_table"}
        sources, lengths, padding = dict(step.sources), numbers["seq_lens"], [-1] * (step.bs - step.running)
        of_requests: Any = step.made_of["page_table"]
        table, index = of_requests.table, of_requests.index[: step.running] + padding
        columns = torch.arange(step.max_seqlen_k, device=device) < sources["seq_lens"][:, None]
        columns[step.running :] = False  # "no row"
        pages = sources["page_table"] = torch.where(columns, sources["page_table"], FILL["page_table"])
        of_rows = [0] * len(table)
        for row, length in zip(index[: step.running], lengths, strict=False):
            of_rows[row] = length
        made_of: dict[str, Any] = {
            "input_ids": some(numbers["input_ids"]),
            "out_loc": None if rng.random() < 0.25 else some(numbers["out_loc"]),
            "cu_seqlens_k": cu_seqlens(some(lengths)),
            "positions": plus(some(lengths), -1),
            "seq_lens": some(lengths),
            # As host values these are often more than a launch's parameters hold.
            "page_table": pages.cpu()
            if rng.random() < 0.2
            # The loop's own table changes with its next step.
            else rows(table.clone(), some(index), rng.choice((some(lengths), rows(some(of_rows), some(index))))),
        }
        return cls(
            {name: tensor for name, tensor in sources.items() if made_of[name] is not None}, pages, [], False, made_of
        )

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
    fill: dict[str, Any] = field(default_factory=dict)
    replays: int = 0

    def expected(self, step: Step) -> Tensors:
        """What the buffers must be after this step."""
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        for name, source in step.sources.items():
            if (number := self.fill.get(name)) is not None:
                buffers[name].fill_(source[-1] if number == "last" else number)
            buffers[name][tuple(map(slice, source.shape))].copy_(source)
        return buffers


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
        expected = way.expected(step)
        copy(step)
        way.replays += every
        self.replays += every
        self.checks += 1
        for name, buffer in way.buffers.items():
            if not torch.equal(buffer, expected[name]):
                place = f"{self.device}, {way.name}, replay {way.replays}"
                self.faults.append(f"{place}: {name} is not what copy_ makes it")


BATCH = 240
"""Updates that wait behind a stream that stands still: a queue has room for more."""

IDS, MANY, LENGTHS, ROWS, WIDTH = 64, 8192, 32, 8, 64  # so MANY are more than a launch's parameters hold
FACTOR = 6364136223846793005  # odd, so that no launch's part of the checksum is lost
LONGEST = 2.0  # seconds


class Updates:
    """Updates by host values, each with a launch that adds up, in an order that counts, what the buffers hold then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.updates = 0
        self.faults: list[str] = []
        self._pause = 0.02
        self._rng = np.random.default_rng(1)
        sizes = [MANY, LENGTHS + 8, LENGTHS, ROWS * WIDTH]
        self._weights = self._rng.integers(-(2**62), 2**62, sum(sizes))
        self._table = self._rng.integers(0, 2**40, (16, WIDTH))
        self._total = self._ids = 0
        memory = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._checksum = torch.zeros(1, dtype=torch.int64, device=device)
        self._on_device = torch.from_numpy(self._table).to(device), torch.from_numpy(self._weights).to(device)
        ids, sums, after, pages = torch.split(memory, sizes)
        plan = fused_copy.Plan([ids, sums, after, pages.view(ROWS, WIDTH)], [0, "last", None, 0])

        def add_up() -> None:
            self._checksum.mul_(FACTOR).add_((memory * self._on_device[1]).sum())

        self._update: Callable[..., None] = plan.replay
        self._launch: Callable[[], None] = add_up
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._stream = torch.cuda.Stream(device)
                self._graph = torch.cuda.CUDAGraph(keep_graph=True)
                with torch.cuda.stream(self._stream):
                    add_up()  # loads its kernels
                    self._checksum.zero_()
                torch.cuda.synchronize()
                with torch.cuda.graph(self._graph, stream=self._stream):
                    node = plan.capture(self._graph, *[None] * 4)
                    add_up()
                self._graph.instantiate()
            self._update, self._launch = node.update, self._graph.replay

    def run(self, updates: int, end: float) -> None:
        """Until there were so many in all, or something is wrong, or after ``end``."""
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
                torch.cuda.set_stream(self._stream)
            while self.updates < updates and not self.faults and time.monotonic() < end:
                self._run_batch()
        except Exception as error:
            self.faults.append(f"{self.device}: {type(error).__name__}: {error}")

    def _run_batch(self) -> None:
        draw = self._rng.integers
        ids = list(draw(-(2**40), 2**40, (BATCH, IDS)))
        ids[::50] = [draw(-(2**40), 2**40, MANY) for _ in ids[::50]]
        lengths, tokens = draw(0, 2**40, (BATCH, LENGTHS)), draw(-2, WIDTH + 3, (BATCH, ROWS))
        index = draw(-1, len(self._table), (BATCH, ROWS))
        kept = draw(0, 8, BATCH) == 0
        forms = (np.ndarray.tolist, np.ndarray.copy, torch.tensor)
        steps = [
            [forms[i % 3](part) for part in parts]
            for i, parts in enumerate(zip(ids, lengths, index, tokens, strict=True))
        ]
        if self.device.type == "cuda":
            torch.cuda._sleep(int(self._pause * 2e9))
            awake = torch.cuda.Event()
            awake.record()
        for (numbers, counts, at, limits), same in zip(steps, kept, strict=True):
            self._update(
                None if same else numbers, cu_seqlens(counts), plus(counts, 1), rows(self._on_device[0], at, limits)
            )
            self._launch()
            rewrite([numbers, counts, at, limits])
        if self.device.type == "cpu" or not awake.query():
            self.updates += BATCH
        elif self._pause < LONGEST:
            self._pause *= 2
        else:
            self.faults.append(f"{self.device}: {BATCH} launches did not fit behind a stream that stands still")
        self._add_up(ids, lengths, index, tokens, kept)
        # Waits for the launches.
        if int(self._checksum) % 2**64 != self._total:
            self.faults.append(f"{self.device}, update {self.updates}: a launch before it did not read its own values")

    def _add_up(self, ids: list[Any], lengths: Any, index: Any, tokens: Any, kept: Any) -> None:
        """The same checksum of the same values."""
        for_sums, for_after, for_pages = np.split(self._weights[MANY:], [LENGTHS + 8, 2 * LENGTHS + 8])
        sums = np.pad(np.pad(np.cumsum(lengths, 1), ((0, 0), (1, 0))), ((0, 0), (0, 7)), mode="edge")
        there = (np.arange(WIDTH) < tokens[..., None]) & (index >= 0)[..., None]
        pages = np.where(there, self._table[index], 0).reshape(BATCH, -1)
        others = (sums * for_sums).sum(1) + ((lengths + 1) * for_after).sum(1) + (pages * for_pages).sum(1)
        for numbers, other, same in zip(ids, others.tolist(), kept, strict=True):
            if not same:
                self._ids = int((numbers * self._weights[: len(numbers)]).sum())
            self._total = (self._total * FACTOR + self._ids + other) % 2**64


def run_together(workers: list[Worker], rounds: int, every: int, end: float) -> None:
    """On every device at once until it had so many rounds, none of which begins after the monotonic clock's ``end``."""
    in_threads([functools.partial(worker.run, rounds, every, end) for worker in workers])


def in_threads(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--replays", type=int, default=10_000_000, help="in all (default: %(default)s)")
    parser.add_argument(
        "--updates", type=int, default=1_000_000, help="of host values, queued, in all (default: %(default)s)"
    )
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
    queues = [Updates(device) for device in devices]
    updates = -(-args.updates // len(devices))

    def queue_updates(count: int, end: float) -> None:
        in_threads([functools.partial(queue.run, count, end) for queue in queues])

    names = [way.name for way in workers[0].ways]
    rounds = max(args.replays // (args.every * len(names) * len(workers)), 10)
    begin = time.monotonic()
    # The first tenth warms up: kernels load, allocators and queues find their size.
    queue_updates(updates // 10, begin + args.seconds / 20)
    run_together(workers, rounds // 10, args.every, begin + args.seconds / 10)
    warm = memory_in_use(devices)
    queue_updates(updates, begin + args.seconds / 2)
    run_together(workers, rounds, args.every, begin + args.seconds)
    growth = [now - then for now, then in zip(memory_in_use(devices), warm, strict=True)]
    seconds = time.monotonic() - begin
    faults = [fault for worker in workers for fault in worker.faults]
    faults += [fault for queue in queues for fault in queue.faults]
    for place, more in zip(["the host", *map(str, devices)], growth, strict=False):
        if more > MAX_GROWTH:
            faults.append(f"memory of {place} grew by {more:,} bytes")
    replays = sum(worker.replays for worker in workers)
    checks = sum(worker.checks for worker in workers)
    queued = sum(queue.updates for queue in queues)
    print(f"{replays:,} replays on {', '.join(map(str, devices))} in {seconds:.0f} s by {', '.join(names)}")
    print(f"{checks:,} steps checked, {len(faults)} faults")
    print(f"{queued:,} updates by host values, each of which kept its own" if queued else "no update was queued")
    print(f"memory grew by {', '.join(f'{more:,}' for more in growth)} bytes (host, GPUs)")
    for fault in faults:
        print(f"soak: {fault}", file=sys.stderr)
    record.write(
        args,
        tool="soak",
        what=f"replays of a decode loop on {len(devices)} device{'s' if len(devices) > 1 else ''} at once, "
        f"and {queued:,} updates by host values, queued",
        cases=replays,
        unit="replays",
        seconds=seconds,
        faults=len(faults),
        ways=names,
        checked=checks,
        queued_updates=queued,
        growth_bytes=dict(zip(["host", *map(str, devices)], growth, strict=False)),
    )
    return 1 if faults else 0


def make_ways(device: torch.device) -> list[Way]:
    """All the ways that the device has. Graphs are captured here, one after another."""
    loop = DecodeLoop(max_bs=32, max_seq_len=512, prompt_len=(4, 400), new_tokens=(4, 64), seed=1, device=device)
    rng = random.Random(1)
    made: list[Step] = []
    steps: list[Step] = []
    for _ in range(STEPS):
        step = next(loop)
        made.append(Step.made(step, rng, device))
        steps.append(Step.of(step.sources))
    wide = [
        Step.of({name: tensor.long() if name in WIDE else tensor for name, tensor in step.sources.items()})
        for step in steps
    ]

    def buffers() -> Tensors:
        return capture_buffers(loop.max_bs, loop.max_seq_len, device)

    def renew_for(call: Callable[..., object], s: Step, then: Callable[[], None] | None = None) -> None:
        host: list[Any] = []
        call(*[renewed(source, host) for source in s.made_of.values()])
        if then is not None:
            then()
        rewrite(host)

    for_op, for_plan, for_fills, for_made = buffers(), buffers(), buffers(), buffers()
    op_destinations = list(for_op.values())
    plan, filling_plan = fused_copy.Plan(for_plan), fused_copy.Plan(for_fills, FILL)
    making_plan = fused_copy.Plan(for_made, FILL_LAST)
    ways = [
        Way("op", for_op, steps, lambda s: torch.ops.fused_copy.replay(op_destinations, list(s.sources.values()))),
        Way("plan with new sources", for_plan, steps, lambda s: plan.replay(*s.anew())),
        Way("casts and fills", for_fills, wide, lambda s: filling_plan.replay(*s.sources.values()), FILL),
        Way("host values, rows and sums", for_made, made, lambda s: renew_for(making_plan.replay, s), FILL_LAST),
    ]
    if device.type == "cuda":
        for_pinned, for_graph, for_made_graph = buffers(), buffers(), buffers()
        pinned_plan, graph_plan = fused_copy.Plan(for_pinned), fused_copy.Plan(for_graph)
        made_plan = fused_copy.Plan(for_made_graph, FILL_LAST)
        on_host = ({name: tensor.cpu() for name, tensor in step.sources.items()} for step in steps)
        pinned = [Step.of(sources, pin=True) for sources in on_host]
        with torch.cuda.device(device):
            plan.replay(*steps[0].anew())  # loads the kernel
            renew_for(making_plan.replay, made[0])
            torch.cuda.synchronize()
            graph, made_graph = (torch.cuda.CUDAGraph(keep_graph=True) for _ in range(2))
            # A stream of this device: torch.cuda.graph's own belongs to the GPU that it was first used on.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                node = graph_plan.capture(graph, *steps[0].sources.values())
            with torch.cuda.graph(made_graph, stream=torch.cuda.Stream(device)):
                made_node = made_plan.capture(made_graph, *made[0].made_of.values())
            graph.instantiate()
            made_graph.instantiate()

        def update_and_replay(s: Step) -> None:
            node.update(*s.anew())
            graph.replay()

        ways += [
            Way("plan with new pinned sources", for_pinned, pinned, lambda s: pinned_plan.replay(*s.anew())),
            Way("update with new sources", for_graph, steps, update_and_replay),
            Way(
                "update with host values, rows and sums",
                for_made_graph,
                made,
                lambda s: renew_for(made_node.update, s, made_graph.replay),
                FILL_LAST,
            ),
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
