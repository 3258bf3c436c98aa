"""What may stand for a source beside a tensor, on a GPU: eager, recorded, updated; and what only a GPU gets wrong."""

from __future__ import annotations

import ctypes
import gc
import shutil

import numpy as np
import pytest
import torch
from entries import through_reference
from source_cases import random_case
from test_environment import library, run_script
from test_gpu_mixes import free_pinned_blocks
from test_gpu_replay import blocked, in_its_own_process, needs_caching, profiled, two_gpus
from test_source_errors import PARTS, SHAPES, of_pair, parts_of

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
@SIZES
def test_parts_are_taken_at_the_call(size):
    count, stream = 10, torch.cuda.Stream()
    table = torch.arange(64, **INT).view(16, 4)
    buffers = [
        [torch.zeros(size, 4, **INT), torch.zeros(size + 1, **INT), torch.zeros(size, **INT)] for _ in range(count)
    ]
    plans = [fused_copy.Plan(three) for three in buffers]
    index, lengths, counts = [0] * size, np.zeros(size, np.int64), torch.zeros(size, dtype=torch.int32)
    for plan in plans:
        plan.replay(rows(table, index, lengths), cu_seqlens(counts), plus(lengths, 1))
    torch.cuda.synchronize()
    with blocked(stream) as still:
        for i, plan in enumerate(plans):
            index[:], lengths[:], counts[:] = [i] * size, i % 5, i
            plan.replay(rows(table, index, lengths), cu_seqlens(counts), plus(lengths, 1))
        index[:], lengths[:], counts[:] = [15] * size, 9, 9
        assert still()
    for i, (pages, sums, after) in enumerate(buffers):
        expected = torch.zeros(4, **INT)
        expected[: i % 5] = table[i, : i % 5]
        assert torch.equal(pages, expected.expand_as(pages))
        assert torch.equal(sums, i * torch.arange(size + 1, **INT))
        assert torch.equal(after, torch.full_like(after, i % 5 + 1))


@pytest.mark.blocked
def test_pinned_parts_freed_right_after_the_call():
    """While the stream is blocked nothing was read yet, so nobody may get their memory and write to it."""
    n, stream = 1 << 14, torch.cuda.Stream()
    free_pinned_blocks((n,))
    places, ones = torch.arange(n, dtype=torch.int32), torch.ones(n, dtype=torch.int32)
    plan = fused_copy.Plan([torch.zeros(n, 1, **INT), torch.zeros(n + 1, **INT), torch.zeros(n, **INT)])

    def parts(step):
        return [
            torch.empty(n, dtype=torch.int32, pin_memory=True).copy_(p) for p in (places + step, places.flip(0), ones)
        ]

    def replay(table, index, lengths):
        plan.replay(rows(table[:, None], index, lengths), cu_seqlens(lengths), plus(lengths, 1))

    replay(*parts(0))
    for step in range(3):
        torch.cuda.synchronize()
        with blocked(stream) as still:
            pinned = parts(step)
            addresses = {part.data_ptr() for part in pinned}
            replay(*pinned)
            del pinned
            churn = [torch.empty(n, dtype=torch.int32, pin_memory=True).fill_(-1) for _ in range(24)]
            assert still(), "the call, or freeing its parts, waited for the stream"
            assert not addresses & {c.data_ptr() for c in churn}, "memory was handed out before it was read"
        pages, sums, after = plan.destinations
        assert torch.equal(pages[:, 0].cpu(), places.flip(0) + step)
        assert torch.equal(sums, torch.arange(n + 1, **INT))
        assert torch.equal(after, torch.full_like(after, 2))


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
    pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
    for _ in range(50):
        plan.replay(values)
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == pinned


# --- what only the GPU sees ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("pin", [False, True], ids=["on the GPU", "pinned"])
def test_garbage_in_an_index_and_in_lengths(dtype, pin):
    """Neither what lies beside the table nor anything farther off is read, and nothing of it arrives."""
    limits = torch.iinfo(dtype)
    garbage = [-1, -2, 5, 6, 2**31 - 1, -(2**31), limits.max, limits.min, limits.max // 4, limits.max // 16]

    def part(numbers):
        values = torch.tensor(numbers, dtype=dtype)
        return values.pin_memory() if pin else values.cuda()

    around = torch.full((9, 12), -777, **INT)
    table = around[2:7, 3:11].copy_(torch.arange(40, **INT).view(5, 8))
    index, lengths = [*garbage, *[4] * len(garbage)], [*[8] * len(garbage), *garbage]
    wanted = torch.full((len(index) + 1, 9), 55, **INT)
    for i, length in enumerate(garbage, len(garbage)):
        columns = min(max(length, 0), 8)
        wanted[i, :columns] = table[4, :columns]
    for of_lengths in (part(lengths), rows(part([*lengths, 3]), part(range(len(lengths))))):
        found = torch.full_like(wanted, 99)
        fused_copy.replay([found], [rows(table, part(index), of_lengths)], [55])
        assert torch.equal(found, wanted)
    found = torch.full_like(wanted, 99)
    of_lengths = rows(part([8] * 5), part(garbage))
    fused_copy.replay([found], [rows(table, part([4] * len(garbage)), of_lengths)], [55])
    assert (found == 55).all(), "rows without a length have none"


def test_last_of_nothing_that_only_the_gpu_sees():
    """An error where the host sees it; here the rest stays as it was."""
    table, found = torch.arange(5, **INT), torch.full((6,), 9, **INT)
    for index in ([-1, 1000], [5, -(2**31), 2**31 - 1]):
        fused_copy.replay([found], [rows(table, torch.tensor(index, **INT))], ["last"])
        assert found.tolist() == [9] * 6
    fused_copy.replay([found], [rows(table, torch.tensor([-1, 3, 1000], **INT))], ["last"])
    assert found.tolist() == [3] * 6


@pytest.mark.parametrize("to", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_sums_that_wrap(to):
    top = torch.iinfo(to).max
    for numbers in ([], [top], [top, 1], [top, top, top, 7], [-top, -2, -1], [top // 3 + 1] * 1000):
        lengths = torch.tensor(numbers, dtype=torch.int64, device="cuda")
        found = torch.full((len(numbers) + 1,), 9, dtype=to, device="cuda")
        fused_copy.replay([found], [cu_seqlens(lengths)])
        assert found[0] == 0
        assert torch.equal(found[1:], lengths.cumsum(0).to(to))


@pytest.mark.parametrize("to", [torch.int32, torch.int64])
@pytest.mark.parametrize("source", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 127, 128, 129, 256, 257, 1000])
def test_sums_of_many_lengths_that_differ(count, source, to):
    """With nothing else in the launch, so that the kernel of plain tasks makes them."""
    random = torch.Generator().manual_seed(count)
    bound = 2 ** (30 if source == torch.int32 else 62)
    numbers = torch.randint(-bound, bound, (count,), generator=random, dtype=source)
    spread = torch.zeros(count, 3, dtype=source, device="cuda")
    spread[:, 1] = numbers.cuda()
    wanted = torch.cat([torch.zeros(1, dtype=torch.int64), numbers.long().cumsum(0)]).to(to)
    for lengths in (numbers.cuda(), spread[:, 1], numbers):
        around = torch.full((count + 9, 2), 9, dtype=to, device="cuda")
        fused_copy.replay([around[:-2, 1]], [cu_seqlens(lengths)], ["last"])
        assert torch.equal(around[: count + 1, 1].cpu(), wanted)
        assert (around[count + 1 : -2, 1] == wanted[-1].item()).all()
        assert (around[:, 0] == 9).all() and (around[-2:] == 9).all()


# --- memory that the GPU cannot read, or may not ------------------------------------------------------------------


@pytest.fixture
def managed():
    """Memory of the host and of the GPU, as what is asked for as pinned is under confidential computing."""
    driver, address, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64(), 64
    torch.zeros(1, device="cuda")  # makes the context
    attach_global = 1
    assert driver.cuMemAllocManaged(ctypes.byref(address), ctypes.c_size_t(8 * count), attach_global) == 0
    yield torch.frombuffer((ctypes.c_int64 * count).from_address(address.value), dtype=torch.int64)
    torch.cuda.synchronize()
    assert driver.cuMemFree_v2(address) == 0


@pytest.mark.parametrize("way", [fused_copy.replay, through_reference], ids=["fused", "reference"])
def test_memory_that_passes_for_pinned(managed, way):
    """What may be host values is read by the host, and what may not is refused with its name."""
    assert not managed.is_pinned()
    index, lengths, table = managed[:3], managed[3:6], managed[6:18].view(3, 4)
    on_gpu = torch.arange(12, device="cuda").view(3, 4)
    names = ("values", "pages", "sums", "after")
    buffers = dict(zip(names, (torch.full(n, 99, device="cuda") for n in ((3,), (3, 4), (4,), (3,))), strict=True))
    managed.copy_(torch.arange(64) % 3)
    way(
        buffers,
        dict(zip(names, (index, rows(on_gpu, index, lengths), cu_seqlens(lengths), plus(index, 1)), strict=True)),
    )
    torch.cuda.synchronize()
    managed.fill_(2)
    assert buffers["values"].tolist() == [0, 1, 2]
    assert buffers["pages"].tolist() == [[99] * 4, [4, 99, 99, 99], [8, 9, 99, 99]]
    assert buffers["sums"].tolist() == [0, 0, 1, 3]
    assert buffers["after"].tolist() == [1, 2, 3]
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    with pytest.raises(
        RuntimeError, match=r"table of pair 1 \(pages\) is on cpu but the destination is on cuda:0: pin it"
    ):
        way(buffers, {"values": [5], "pages": rows(table, [0]), "sums": None, "after": None})
    torch.cuda.synchronize()
    assert all(torch.equal(buffer, before[name]) for name, buffer in buffers.items())


MANAGED_FOR_PINNED = """
    #define _GNU_SOURCE
    #include <dlfcn.h>
    #include <stddef.h>
    int cudaHostAlloc(void** memory, size_t size, unsigned flags) {
        int (*managed)(void**, size_t, unsigned);
        *(void**)&managed = dlsym(RTLD_DEFAULT, "cudaMallocManaged");
        return managed(memory, size, 1);
    }
"""
NOT_PINNED = """
    import fused_copy, torch
    from fused_copy import cu_seqlens, rows
    like = {"dtype": torch.int32, "device": "cuda"}
    table = torch.arange(64, **like).view(8, 8)
    dst = {"ids": torch.zeros(40_000, **like), "pages": torch.zeros(8, 8, **like), "sums": torch.zeros(9, **like)}
    asked = torch.empty(8, dtype=torch.int32, pin_memory=True)
    assert not asked.is_pinned(), "it is pinned after all"
    asked.copy_(torch.arange(8))
    plan = fused_copy.Plan(dst)
    plan.replay({"ids": asked, "pages": rows(table, asked, asked), "sums": cu_seqlens(asked)})
    asked.fill_(3)
    assert dst["ids"][:9].tolist() == [*range(8), 0]
    assert torch.equal(dst["pages"], table.tril(-1))
    assert dst["sums"].tolist() == [0, 0, 1, 3, 6, 10, 15, 21, 28]
    before = {name: buffer.clone() for name, buffer in dst.items()}
    for wrong in ({"ids": list(range(40_000))}, {"pages": rows(asked.view(2, 4), [1])}):
        try:
            plan.replay({"ids": None, "pages": None, "sums": [7], **wrong})
        except RuntimeError as error:
            print(error)
        else:
            raise AssertionError("taken")
    assert all(torch.equal(buffer, before[name]) for name, buffer in dst.items())
    plan.replay({"ids": [5], "pages": None, "sums": None})
    assert dst["ids"][:2].tolist() == [5, 1]
    print("done")
"""


@in_its_own_process
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, for a runtime that pins nothing")
def test_memory_asked_for_as_pinned_that_is_not(tmp_path):
    """Torch's allocator of pinned memory gets managed memory: values in the launch work, and the rest says so."""
    library(tmp_path, "managed.so", MANAGED_FOR_PINNED)
    too_many, table, _ = run_script(NOT_PINNED, tmp_path, LD_PRELOAD=str(tmp_path / "managed.so")).splitlines()
    assert "pinned is not pinned here: pass fewer values in one call" in too_many
    assert "table of pair 1 (pages) is on cpu but the destination is on cuda:0: pin it" in table


@two_gpus
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("here, there", [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")])
def test_parts_on_another_gpu(part, here, there):
    dst = [torch.zeros(2, device=here), torch.zeros(SHAPES.get(part, (4,)), dtype=torch.int64, device=here)]
    src = [[1.0, 2.0], parts_of(torch.zeros(3, dtype=torch.int64, device=there), here)[part]()]
    for way in (fused_copy.replay, lambda d, s: fused_copy.Plan(d).replay(*s), through_reference):
        with pytest.raises(RuntimeError, match=f"{of_pair(part, 1)}is on {there} but the destination is on {here}"):
            way(dst, src)
        assert not any(d.any() for d in dst)
