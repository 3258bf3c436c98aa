"""Measures what a call costs when it raises, beside the same call when it copies.

usage: python tools/error_cost.py [--device cpu] [--json FILE]

The last of a decode step's six tensors is one column too wide, so that all checks before it pass. Medians in us.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import record
import torch

import fused_copy
from fused_copy.decode import capture_buffers

BATCHES, CALLS = 50, 200


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    record.add_arguments(parser.add_argument)
    args = parser.parse_args()
    torch.set_num_threads(1)  # or on a busy machine copy_ waits for threads to share a page table among
    buffers = capture_buffers(64, 2048, args.device)
    destinations, plan = list(buffers.values()), fused_copy.Plan(buffers)
    right = [torch.zeros((33, 1024)[: b.dim()], dtype=b.dtype, device=b.device) for b in destinations]
    wrong = [*right[:5], torch.zeros(33, 2049, dtype=torch.int32, device=args.device)]
    ways: dict[str, Callable[[list[torch.Tensor]], None]] = {
        "torch.ops.fused_copy.replay": lambda sources: torch.ops.fused_copy.replay(destinations, sources),
        "fused_copy.replay": lambda sources: fused_copy.replay(destinations, sources),
        "plan.replay": lambda sources: plan.replay(*sources),
        "slices + copy_": lambda sources: copy_each(destinations, sources),
    }
    if args.device == "cuda":
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            node = plan.capture(graph, *right)
        graph.instantiate()
        ways["copy.update"] = lambda sources: node.update(*sources)
    table: dict[str, dict[str, float]] = {}
    begin = time.monotonic()
    with torch.inference_mode():
        for name, way in ways.items():
            table[name] = {"copies": median_us(way, right, raises=False), "raises": median_us(way, wrong, raises=True)}
            print(f"{name:30} copies {table[name]['copies']:8.2f} us   raises {table[name]['raises']:8.2f} us")
    record.write(
        args,
        tool="error_cost",
        what="calls that raise, timed",
        cases=len(ways) * BATCHES * CALLS,
        unit="calls",
        seconds=time.monotonic() - begin,
        faults=0,
        median_us=table,
    )
    return 0


def copy_each(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    for destination, source in zip(destinations, sources, strict=True):
        destination[tuple(slice(size) for size in source.shape)].copy_(source)


def median_us(way: Callable[[list[torch.Tensor]], None], sources: list[torch.Tensor], *, raises: bool) -> float:
    """Of batches of calls; that each one raises, or that none does, is part of what is measured."""
    batches = []
    for _ in range(BATCHES):
        raised = 0
        begin = time.perf_counter()
        for _ in range(CALLS):
            try:
                way(sources)
            except RuntimeError:
                raised += 1
        batches.append((time.perf_counter() - begin) / CALLS * 1e6)
        if raised != (CALLS if raises else 0):
            raise AssertionError(f"{raised} of {CALLS} calls raised")
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # so that the launch queue never fills
    return statistics.median(batches)


if __name__ == "__main__":
    sys.exit(main())
