"""Casts, fills, pinned sources and long lists on a GPU: eager, captured, and replayed with other contents."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from arena import Arena
from cases import BYTE_DTYPES, LAYOUTS, decode_buffers, decode_step, pair
from entries import REFERENCE
from hypothesis import given
from hypothesis import strategies as st
from mixes import (
    CASTABLE,
    CASTS,
    aligned,
    cast_batch,
    exact_fills,
    fewer,
    fill_batch,
    inexact_fills,
    mixed_lists,
    mixed_pair,
    simple_fill,
)
from mixes import name as dtype_name
from test_casts import check_casts
from test_gpu_replay import (
    all_equal,
    blocked,
    captured,
    check,
    device_work,
    needs_caching,
    on_gpu,
    on_streams_of_their_own,
    profiled,
    run_modes,
    warm_up,
)
from test_launches import CAPACITY

import fused_copy

INT = torch.int32

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")
every_dtype = pytest.mark.parametrize("dtype", [d for d in BYTE_DTYPES if d != torch.float8_e8m0fnu], ids=dtype_name)


def kernels(call) -> list[str]:
    """The names of this package's kernels that the call launched; it may have given the GPU no other work."""
    names = [n for n in device_work(call) if "Event" not in n]  # pinned sources leave a mark behind them
    assert all("fused_copy" in n for n in names), names
    return names


# --- casts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("src", CASTABLE, ids=dtype_name)
def test_gpu_cast_of_values_that_hurt(entry, src):
    """Against `copy_` on the GPU, which rounds some NaNs and overflows otherwise than the CPU's."""
    check_casts(entry, [c for c in CASTS if c[0] == src], "cuda")


def test_gpu_all_casts_in_one_call(entry):
    check_casts(entry, CASTS, "cuda")


@run_modes
@pytest.mark.parametrize("src", CASTABLE, ids=dtype_name)
def test_gpu_cast_in_every_layout(entry, run, src):
    pairs = [p for s, d in CASTS if s == src for p in cast_batch(s, d)]
    check(Arena(pairs, "cuda"), entry, run)


@run_modes
def test_gpu_large_and_small_casts_in_one_launch(entry, run):
    """Tiles of different sizes, copies and casts side by side."""
    big = [
        (torch.int64, INT, (1 << 20) - 3),
        (torch.float32, torch.bfloat16, 1 << 20),
        (torch.bool, torch.float64, 300_001),
    ]
    rows = [cast_like(s, d, ((n + 5,), (1,), (n,), (1,))) for s, d, n in big]
    blocks = [cast_like(torch.int64, INT, ((2000, 5), (7, 1), (1999, 3), (3, 1)), fill=-1)]
    blocks += [cast_like(torch.int64, INT, ((70, 1001), (1003, 1), (69, 1000), (1, 71)), fill=-1)]
    small = [cast_like(s, d, LAYOUTS["corner"]) for s, d in CASTS[:20]]
    check(Arena([*small[:10], *rows, *small[10:], *blocks, pair(LAYOUTS["row_pitch"], INT)], "cuda"), entry, run)


def cast_like(src, dst, layout, **more):
    p = pair(layout, dst, **more)
    return replace(p, src=replace(p.src, dtype=src))


# --- fills --------------------------------------------------------------------------------------------------------


@run_modes
@every_dtype
def test_gpu_fill_in_every_layout(entry, run, dtype):
    arena = Arena(fill_batch(dtype, simple_fill(dtype)), "cuda", source_bytes=range(256))
    check(arena, entry, run)


@every_dtype
def test_gpu_numbers_that_the_dtype_holds(entry, dtype):
    """One call for all of them, so that it is one launch; the CPU's tests say what the bytes must be."""
    numbers = exact_fills(dtype)
    on_host, on_device = (
        [torch.zeros(9 * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype) for _ in numbers]
        for device in ("cpu", "cuda")
    )
    for dst in (on_host, on_device):
        entry(dst, [d[:0].clone() for d in dst], numbers)
    for a, b in zip(on_host, on_device, strict=True):
        assert torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, INT, torch.float16, torch.float32], ids=dtype_name)
def test_gpu_numbers_that_the_dtype_does_not_hold(entry, dtype):
    dst = [torch.zeros(8, device="cuda"), torch.zeros(8, dtype=dtype, device="cuda")]
    src = [torch.ones(5, device="cuda"), torch.ones(5, dtype=dtype, device="cuda")]
    for number in inexact_fills(dtype):
        with pytest.raises(RuntimeError):
            entry(dst, src, [1.0, number])
    torch.cuda.synchronize()
    assert not any(d.any() for d in dst)


@pytest.mark.capture
def test_gpu_stale_tail_after_a_larger_batch(entry):
    """Graph or not, a small step after a large one leaves nothing of it; between steps somebody scribbles."""
    buffers = on_gpu(decode_buffers(8, 64))
    for seed, (bs, width) in enumerate([(8, 64), (3, 17), (6, 1), (8, 64), (1, 3)]):
        for b in buffers:
            b.fill_(77)
        step = on_gpu(decode_step(bs, width, seed=seed))
        fill = [0, 0, -1, -1, 1, -1]
        expected = []
        for b, s, f in zip(buffers, step, fill, strict=True):
            expected.append(torch.full_like(b, f))
            expected[-1][tuple(slice(0, n) for n in s.shape)] = s
        entry(buffers, step, fill)
        assert all_equal(buffers, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            entry(buffers, step, fill)
        for b in buffers:
            b.fill_(78)
        graph.replay()
        assert all_equal(buffers, expected)


# --- pinned sources -----------------------------------------------------------------------------------------------


def pinned(t: torch.Tensor) -> torch.Tensor:
    out = t.pin_memory()
    assert out.is_pinned()
    return out


def test_pinned_sources(entry):
    buffers, step = decode_buffers(8, 64), decode_step(5, 40)
    dst = on_gpu(buffers)
    entry(dst, [pinned(s) for s in step.values()])
    torch.cuda.synchronize()
    for d, s in zip(dst, step.values(), strict=True):
        corner = tuple(slice(0, n) for n in s.shape)
        assert torch.equal(d[corner].cpu(), s)
        rest = torch.ones(d.shape, dtype=torch.bool)
        rest[corner] = False
        assert (d.cpu()[rest] == -7).all()


def test_pinned_beside_device_sources(entry):
    dst = [torch.zeros(6, dtype=INT, device="cuda") for _ in range(4)]
    src = [torch.full((4,), k, dtype=torch.int64 if k > 2 else INT) for k in range(1, 5)]
    entry(dst, [pinned(s) if k % 2 else s.cuda() for k, s in enumerate(src)], [None, -1, -1, None])
    torch.cuda.synchronize()
    tails = [0, -1, -1, 0]
    assert [d.tolist() for d in dst] == [[k] * 4 + [t] * 2 for k, t in zip(range(1, 5), tails, strict=True)]


@run_modes
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_pinned_in_every_layout(entry, run, itemsize):
    """Strided, expanded, transposed and misaligned views of pinned memory, every other source on the GPU."""
    dtype = {1: torch.uint8, 2: torch.int16, 4: INT, 8: torch.int64, 16: torch.complex128}[itemsize]
    where = [(d, s) for d in (0, 4, 5, 16) for s in (0, 1, 8, 16)]
    pairs = [pair(layout, dtype, d, s, pinned=(d + s) % 3 > 0) for layout in LAYOUTS.values() for d, s in where]
    check(Arena(pairs, "cuda"), entry, run)


@run_modes
@pytest.mark.parametrize("src", CASTABLE, ids=dtype_name)
def test_pinned_with_a_cast(entry, run, src):
    pairs = [replace(p, pinned=True) for s, d in CASTS if s == src for p in cast_batch(s, d)[::2]]
    check(Arena(pairs, "cuda"), entry, run)


@run_modes
def test_pinned_with_a_fill(entry, run):
    pairs = [replace(p, pinned=k % 3 > 0) for k, p in enumerate(fill_batch(INT, -1))]
    check(Arena(pairs, "cuda"), entry, run)


@run_modes
def test_large_pinned_source(entry, run):
    """More than one pinned block's usual size, and read across its whole length."""
    n = (1 << 22) + 5
    check(Arena([pair(((n + 3,), (1,), (n,), (1,)), torch.uint8, 3, 3, pinned=True)], "cuda"), entry, run)


@pytest.mark.parametrize("make", [torch.Tensor.pin_memory, lambda t: t.pin_memory()[1:][:3]], ids=["whole", "view"])
def test_explain_says_pinned(make):
    plan = fused_copy.explain([torch.zeros(8, device="cuda")], [make(torch.ones(5))])
    assert "pinned" in plan.pairs[0].path
    assert plan.launches == 1
    assert "pinned" not in fused_copy.explain([torch.zeros(8)], [make(torch.ones(5))]).pairs[0].path


@pytest.mark.parametrize("at", [0, 3])
def test_pageable_among_pinned(entry, at):
    """The pageable one is read at the call, the others when the launch runs."""
    dst = [torch.zeros(8, device="cuda") for _ in range(4)]
    src = [torch.ones(5) if k == at else pinned(torch.ones(5)) for k in range(4)]
    entry(dst, src)
    src[at].fill_(7)
    assert [d.tolist() for d in dst] == [[1] * 5 + [0] * 3] * 4


def test_pageable_with_a_cast_or_a_fill(any_entry):
    for dtype, fill, rest in ((INT, None, 0), (torch.float32, [3], 3), (torch.int64, [3], 3)):
        dst = torch.zeros(8, device="cuda")
        any_entry([dst], [torch.ones(5, dtype=dtype)], fill)
        assert dst.tolist() == [1] * 5 + [rest] * 3


def test_empty_host_source(entry):
    """Pinned or not, there is nothing to read. An empty pinned tensor is a usual thing: a step without new requests."""
    dst = torch.zeros(4, device="cuda")
    entry([dst], [torch.ones(0, pin_memory=True)], [3])
    assert dst.tolist() == [3] * 4


def test_cpu_destination_from_pinned_memory(entry):
    """Pinned memory is plain memory to the CPU."""
    dst = torch.zeros(4)
    entry([dst], [pinned(torch.ones(3))])
    assert dst.tolist() == [1, 1, 1, 0]


def free_pinned_blocks(size: tuple[int, ...]) -> None:
    """So many that the allocator needs no new ones for a while: making one may wait for the GPU."""
    blocks = [torch.empty(size, dtype=INT, pin_memory=True) for _ in range(48)]
    del blocks


@pytest.mark.blocked
def test_pinned_source_freed_right_after_the_call(entry):
    """While the stream is blocked nothing was read yet, so nobody may get the memory and write to it."""
    warm_up(entry)
    n = 1 << 16
    free_pinned_blocks((n,))
    dst = [torch.zeros(n, dtype=INT, device="cuda") for _ in range(3)]
    stream = torch.cuda.Stream()
    entry([torch.zeros(1, device="cuda")], [pinned(torch.ones(1))])
    for step in range(3):
        torch.cuda.synchronize()
        with blocked(stream) as still, torch.cuda.stream(stream):
            src = [torch.empty(n, dtype=INT, pin_memory=True).fill_(10 * step + k) for k in range(3)]
            addresses = {s.data_ptr() for s in src}
            entry(dst, src)
            del src
            # Several rounds, held: whatever the allocator believes to be free comes back here and is overwritten.
            churn = [torch.empty(n, dtype=INT, pin_memory=True).fill_(-1) for _ in range(24)]
            assert still(), "the call, or freeing the source, waited for the stream"
            assert not addresses & {c.data_ptr() for c in churn}, "memory was handed out before it was read"
        stream.synchronize()
        del churn
        assert [d.unique().tolist() for d in dst] == [[10 * step + k] for k in range(3)]


@pytest.mark.blocked
def test_pinned_view_outlives_its_base(entry):
    warm_up(entry)
    free_pinned_blocks((120, 64))
    stream = torch.cuda.Stream()
    dst = torch.zeros(100, 60, dtype=INT, device="cuda")
    torch.cuda.synchronize()
    with blocked(stream) as still, torch.cuda.stream(stream):
        base = torch.empty(120, 64, dtype=INT, pin_memory=True).fill_(5)
        entry([dst], [base.T[:60, :60].T])
        del base
        churn = [torch.empty(120, 64, dtype=INT, pin_memory=True).fill_(-1) for _ in range(16)]
        assert still()
    del churn
    assert (dst[:60] == 5).all()
    assert (dst[60:] == 0).all()


def test_threads_with_pinned_sources_on_streams_of_their_own(entry):
    """Each source is freed right after its call, long before its stream has read it: no thread may get its memory."""
    warm_up(entry)
    steps, n = 200, 1 << 12

    def work(k: int) -> None:
        dst = torch.zeros(steps, n, dtype=INT, device="cuda")
        torch.cuda._sleep(20_000_000 * (k + 1))
        values = range(steps * k, steps * (k + 1))
        for row, value in zip(dst, values, strict=True):
            entry([row], [torch.empty(n, dtype=INT, pin_memory=True).fill_(value)])
        assert torch.equal(dst.cpu(), torch.tensor(values, dtype=INT)[:, None].expand(steps, n))

    on_streams_of_their_own(work)


@needs_caching
def test_pinned_memory_comes_back(entry):
    """Held until it was read and no longer: a step loop must not eat the host's memory."""
    dst = torch.zeros(1 << 14, dtype=INT, device="cuda")
    addresses = set()
    for step in range(200):
        src = torch.empty(1 << 14, dtype=INT, pin_memory=True).fill_(step)
        addresses.add(src.data_ptr())
        entry([dst], [src])
        del src
        torch.cuda.synchronize()
    assert (dst == 199).all()
    assert len(addresses) < 20


@pytest.mark.blocked
@needs_caching
def test_pinned_does_not_wait_and_allocates_no_device_memory(entry):
    warm_up(entry)
    stream = torch.cuda.Stream()
    dst = [torch.zeros(64, dtype=INT, device="cuda") for _ in range(4)]
    src = [pinned(torch.full((48,), k, dtype=torch.int64)) for k in range(4)]
    entry(dst, src)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    with blocked(stream) as still:
        with torch.cuda.stream(stream):
            for _ in range(10):
                entry(dst, src, [-1] * 4)
        assert still(), "the call waited for the stream"
        after = torch.cuda.memory_stats()
    for key in ("allocation.all.allocated", "allocation.all.freed", "segment.all.allocated"):
        assert after[key] == before[key], key
    assert [d.tolist() for d in dst] == [[k] * 48 + [-1] * 16 for k in range(4)]


@pytest.mark.capture
def test_capture_after_pinned_calls_that_are_still_in_flight(entry):
    """Looking whether those are done must not happen under capture: cudaEventQuery would invalidate it."""
    staging = pinned(torch.ones(6))
    dst = torch.zeros(8, device="cuda")
    for _ in range(3):
        torch.cuda._sleep(50_000_000)
        entry([dst], [staging])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        entry([dst], [staging], [2])
        entry([torch.zeros(8, device="cuda")], [staging])
    graph.replay()
    assert dst.tolist() == [1] * 6 + [2] * 2


@pytest.mark.capture
def test_captured_pinned_sources_are_read_at_every_replay(entry):
    """An engine's host-side step: it rewrites pinned memory, then replays."""
    staging = torch.zeros(6, dtype=torch.int64).pin_memory()
    dst = torch.zeros(8, dtype=INT, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        entry([dst], [staging], [-1])
    for step in range(5):
        torch.cuda.synchronize()  # contents must stay until they were read
        staging.fill_(step)
        graph.replay()
        assert dst.tolist() == [step] * 6 + [-1] * 2


# --- launches -----------------------------------------------------------------------------------------------------


@profiled
@pytest.mark.parametrize("n", [1, 6, 24])
def test_one_kernel_for_any_mix(entry, n):
    """Copies, casts, fills and pinned sources, all layouts: counted by the profiler, by name."""
    rng = random.Random(n)
    arena = Arena([mixed_pair(i, rng, pinned=True) for i in range(n)], "cuda")
    assert fused_copy.explain(arena.dst, arena.src, arena.fill).launches == 1, "the case is too long for one launch"
    names = kernels(lambda: entry(arena.dst, arena.src, arena.fill))
    assert len(names) == 1, names
    arena.check()


@profiled
@pytest.mark.parametrize("n", [CAPACITY - 1, CAPACITY, CAPACITY + 1, 2 * CAPACITY + 1, 5000])
def test_as_few_kernels_as_fit(entry, n):
    buffer = torch.zeros(n, 4, dtype=INT, device="cuda")
    source = torch.arange(1, 3 * n + 1, dtype=INT, device="cuda").view(n, 3)
    dst, src = list(buffer.unbind()), list(source.unbind())
    assert fused_copy.explain(dst, src).launches == -(-n // CAPACITY)
    names = kernels(lambda: entry(dst, src))
    assert len(names) == -(-n // CAPACITY), names
    assert torch.equal(buffer[:, :3], source)
    assert not buffer[:, 3].any()


@pytest.fixture
def long_mix() -> Arena:
    """Far beyond one launch."""
    rng = random.Random(0)
    arena = Arena([mixed_pair(i, rng, pinned=True) for i in range(1500)], "cuda")
    assert fused_copy.explain(arena.dst, arena.src, arena.fill).launches > 1
    return arena


@profiled
def test_gpu_thousands_of_mixed_pairs_in_one_call(entry, long_mix):
    names = kernels(lambda: entry(long_mix.dst, long_mix.src, long_mix.fill))
    assert len(names) == fused_copy.explain(long_mix.dst, long_mix.src, long_mix.fill).launches
    long_mix.check()


@pytest.mark.capture
def test_gpu_several_launches_of_a_call_in_a_graph(entry, long_mix):
    warm_up(entry)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        entry(long_mix.dst, long_mix.src, long_mix.fill)
    for seed in range(3):
        torch.cuda.synchronize()
        long_mix.rewrite_sources(seed)
        long_mix.reset_destinations()
        graph.replay()
        torch.cuda.synchronize()
        long_mix.check()


# --- any mix ------------------------------------------------------------------------------------------------------


@given(pairs=mixed_lists(pinned=True), seed=st.integers(0, 99))
def test_gpu_any_mix(entry, pairs, seed):
    arena = Arena(pairs, "cuda", seed=seed, source_bytes=range(256))
    entry(arena.dst, arena.src, arena.fill)
    torch.cuda.synchronize()
    arena.check()


@pytest.mark.capture
@fewer  # a graph each
@given(pairs=mixed_lists(pinned=True), seed=st.integers(0, 99))
def test_gpu_any_captured_mix(entry, pairs, seed):
    check(Arena(pairs, "cuda", seed=seed, source_bytes=range(256)), entry, captured)


@given(pairs=mixed_lists(pinned=True, for_torch=True), seed=st.integers(0, 99))
def test_gpu_any_mix_through_the_reference(pairs, seed):
    arena = Arena(pairs, "cuda", seed=seed, source_bytes=range(256))
    REFERENCE(arena.dst, arena.src, arena.fill)
    torch.cuda.synchronize()
    arena.check()


@pytest.mark.capture
@fewer
@given(pairs=mixed_lists(for_torch=True), seed=st.integers(0, 99))
def test_gpu_any_captured_mix_through_the_reference(pairs, seed):
    """For A/B runs of a captured loop. Not from pinned memory: torch stages what is strided there, which no graph can
    hold."""
    check(Arena(pairs, "cuda", seed=seed, source_bytes=range(256)), REFERENCE, captured)


@given(pairs=mixed_lists(pinned=True, for_torch=True), seed=st.integers(0, 99))
def test_gpu_fused_and_reference_write_the_same_bytes(pairs, seed):
    fused, reference = (Arena(pairs, "cuda", seed=seed, source_bytes=range(256)) for _ in range(2))
    fused_copy.replay(fused.dst, fused.src, fused.fill)
    REFERENCE(reference.dst, reference.src, reference.fill)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(fused.found(), reference.found(), strict=True))


@given(pairs=mixed_lists(pinned=True), seed=st.integers(0, 99))
def test_gpu_any_mix_through_a_plan(pairs, seed):
    arena = Arena(pairs, "cuda", seed=seed, source_bytes=range(256))
    plan = fused_copy.Plan(arena.dst, arena.fill)
    for again in range(2):
        arena.rewrite_sources(seed + again)
        arena.reset_destinations()
        plan.replay(*arena.src)
        torch.cuda.synchronize()
        arena.check()


@pytest.mark.capture
@fewer
@given(pairs=mixed_lists(pinned=True), seed=st.integers(0, 99))
def test_gpu_any_mix_through_a_captured_plan(pairs, seed):
    arena = Arena(pairs, "cuda", seed=seed, source_bytes=range(256))
    plan = fused_copy.Plan(arena.dst, arena.fill)
    check(arena, lambda dst, src, fill=None: plan.replay(*src), captured)


@pytest.mark.capture
@fewer
@given(pairs=mixed_lists(pinned=True), seed=st.integers(0, 99))
def test_gpu_any_mix_through_an_updated_node(pairs, seed):
    """Captured with sources of no rows, then given the real ones: before and after the graph was instantiated."""
    arena = Arena(pairs, "cuda", seed=seed, source_bytes=range(256))
    if not pairs:
        return
    rows_of_none = [s[:0] if s.dim() else s for s in arena.src]
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        copy = fused_copy.Plan(arena.dst, arena.fill).capture(graph, *rows_of_none)
    for again in range(2):
        copy.update(*rows_of_none)
        copy.update(*arena.src)
        arena.rewrite_sources(seed + again)  # what counts is what lies there when the graph runs
        arena.reset_destinations()
        graph.replay()
        torch.cuda.synchronize()
        arena.check()


def test_gpu_reference_for_a_long_mix():
    rng = random.Random(1)
    arena = Arena([aligned(mixed_pair(i, rng)) for i in range(60)], "cuda")
    REFERENCE(arena.dst, arena.src, arena.fill)
    torch.cuda.synchronize()
    arena.check()
