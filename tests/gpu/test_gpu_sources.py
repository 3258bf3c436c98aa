"""What may stand for a source beside a tensor, on a GPU: eager, recorded, updated; host values are taken at the call."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from source_cases import random_case
from test_gpu_replay import blocked, needs_caching, profiled

import fused_copy
from fused_copy import cu_seqlens, plus, rows

INT = {"dtype": torch.int32, "device": "cuda"}
LARGE = 40_000  # int32 values: more than the parameters of a kernel hold
SIZES = pytest.mark.parametrize("size", [64, LARGE], ids=["in the launch", "through pinned memory"])


@pytest.mark.parametrize("seed", range(200))
def test_random_calls(seed):
    case = random_case(seed, "cuda")
    fused_copy.replay(case.dst, case.src, case.fill)
    torch.cuda.synchronize()
    case.check()
    case.rewind()
    with fused_copy.backend("reference"):
        fused_copy.replay(case.dst, case.src, case.fill)
    torch.cuda.synchronize()
    case.check()


@pytest.mark.capture
@pytest.mark.parametrize("seed", range(200))
def test_random_calls_in_graphs(seed):
    case = random_case(seed, "cuda")
    plan = fused_copy.Plan(case.dst, case.fill)
    plan.replay(*case.src)
    torch.cuda.synchronize()
    case.check()
    case.rewind()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        nothing = plan.capture(graph, *[None] * len(case.dst))
        recorded = torch.zeros(1, device="cuda")  # no graph is empty
        plan.replay(*case.src)
    graph.instantiate()
    graph.replay()
    torch.cuda.synchronize()
    case.check()
    case.rewind()
    updated = torch.cuda.CUDAGraph(keep_graph=True)
    torch.cuda.synchronize()
    with torch.cuda.graph(updated):
        recorded.add_(1)
        copy = plan.capture(updated, *[None] * len(case.dst))
    updated.instantiate()
    updated.replay()
    nothing.update(*[None] * len(case.dst))
    copy.update(*case.src)
    updated.replay()
    torch.cuda.synchronize()
    case.check()


@pytest.mark.blocked
@SIZES
@pytest.mark.parametrize("kind", ["list", "array", "tensor"])
def test_values_are_taken_at_the_call(size, kind):
    count, stream = 20, torch.cuda.Stream()
    buffers = [torch.zeros(size, **INT) for _ in range(count)]
    plans = [fused_copy.Plan([buffer]) for buffer in buffers]
    values = {"list": [0] * size, "array": np.zeros(size, np.int64), "tensor": torch.zeros(size, dtype=torch.int64)}[
        kind
    ]
    for plan in plans:
        plan.replay(values)
    torch.cuda.synchronize()
    with blocked(stream) as still:
        for i, plan in enumerate(plans):
            values[:] = [i + 1] * size if kind == "list" else i + 1
            plan.replay(values)
        values[:] = [99] * size if kind == "list" else 99
        assert still()
    for i, buffer in enumerate(buffers):
        assert torch.equal(buffer, torch.full_like(buffer, i + 1))


@pytest.mark.blocked
@pytest.mark.capture
@SIZES
def test_updates_in_flight_keep_their_values(size):
    count, stream = 300, torch.cuda.Stream()
    with torch.cuda.stream(stream):
        buffer, at = torch.zeros(size, **INT), torch.zeros(1, dtype=torch.int64, device="cuda")
        history = torch.zeros(count + 1, size, **INT)
        plan = fused_copy.Plan([buffer])
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=stream):
            copy = plan.capture(graph, [0] * size)
            history.index_copy_(0, at, buffer[None])
            at.add_(1)
        graph.instantiate()
        graph.replay()
        values = np.zeros(size, np.int32)
        with blocked(stream, 2) as still:
            for i in range(count):
                values[:] = np.arange(size) + i
                copy.update(values)
                graph.replay()
            assert still()
    expected = torch.arange(size, **INT) + torch.arange(count, **INT)[:, None]
    assert torch.equal(history[1:], expected) and not history[0].any()


@pytest.mark.capture
@SIZES
def test_a_graph_keeps_the_values_that_were_recorded(size):
    buffer = torch.zeros(size, **INT)
    plan = fused_copy.Plan([buffer])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.replay(list(range(size)))
    for i in range(20):  # memory that was given back would be theirs
        plan.replay([i] * size)
    torch.cuda.synchronize()
    graph.replay()
    assert torch.equal(buffer, torch.arange(size, **INT))
    del graph
    gc.collect()
    plan.replay([3] * size)  # what a graph that is gone kept is given back here
    assert torch.equal(buffer, torch.full_like(buffer, 3))


@pytest.mark.capture
def test_a_graph_reads_table_index_and_lengths_anew():
    table = torch.arange(80, **INT).view(8, 10)
    index, lengths = torch.tensor([1, 2], device="cuda"), torch.tensor([3, 4], **INT)
    pages, sums, positions = torch.full((4, 10), -1, **INT), torch.zeros(5, **INT), torch.zeros(4, **INT)
    plan = fused_copy.Plan([pages, sums, positions], [-1, "last", 0])
    graph = torch.cuda.CUDAGraph()
    step = (rows(table, index, lengths), cu_seqlens(lengths), plus(lengths, -1))
    plan.replay(*step)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        plan.replay(*step)
    for at, counts in (([5, -1], [1, 7]), ([7, 100], [-3, 2]), ([0, 6], [10, 100])):
        index.copy_(torch.tensor(at))
        lengths.copy_(torch.tensor(counts))
        table.add_(1)
        graph.replay()
        expected = torch.full((4, 10), -1, **INT)
        for row, (place, count) in enumerate(zip(at, counts, strict=True)):
            if 0 <= place < 8:
                expected[row, : max(count, 0)] = table[place, : max(count, 0)]
        total = counts[0] + counts[1]
        assert torch.equal(pages, expected)
        assert sums.tolist() == [0, counts[0], total, total, total]
        assert positions.tolist() == [counts[0] - 1, counts[1] - 1, 0, 0]


@profiled
def test_one_launch_and_nothing_else():
    from torch.profiler import ProfilerActivity, profile

    table, index = torch.zeros(8, 100, **INT), torch.arange(4, device="cuda")
    plan = fused_copy.Plan(
        [torch.zeros(8, **INT), torch.zeros(9, **INT), torch.zeros(8, 100, **INT)], [1, "last", None]
    )
    step = ([1, 2, 3, 4], cu_seqlens([1, 2, 3, 4]), rows(table, index, lengths=[1, 2, 3, 4]))
    plan.replay(*step)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        plan.replay(*step)
        torch.cuda.synchronize()
    assert [event.name.split("<")[0] for event in profiler.events() if event.device_type.name == "CUDA"] == [
        "void fused_copy::(anonymous namespace)::fused_copy_kernel"
    ]


@needs_caching
@SIZES
def test_no_device_memory_is_allocated_and_little_pinned(size):
    plan = fused_copy.Plan([torch.zeros(size, **INT)])
    values = list(range(size))
    for _ in range(3):
        plan.replay(values)
        torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    print(sorted(torch.cuda.host_memory_stats()))
    pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
    for _ in range(50):
        plan.replay(values)
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == pinned
