"""The same cases on a GPU, eager and captured, and what only a GPU gets wrong: launches, streams, devices, memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from arena import AWKWARD_BYTES, Arena, replay_in_calls
from cases import (
    BYTE_DTYPES,
    COUNTS,
    ITEMSIZES,
    LAYOUTS,
    after_step,
    count_batch,
    decode_buffers,
    decode_step,
    dtype_batch,
    layout_batch,
    mixed_batch,
    pair,
    pair_lists,
)
from hypothesis import given
from hypothesis import strategies as st
from test_environment import run_script

import fused_copy

INT = torch.int32
GiB = 1 << 30

needs_caching = pytest.mark.skipif(
    os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING", "0") != "0", reason="is about the caching allocator, which is off"
)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

profiled = pytest.mark.not_sanitized("torch's profiler and the sanitizer cannot both follow the GPU")
too_large = pytest.mark.not_sanitized("would take the sanitizer longer than all others together")
in_its_own_process = pytest.mark.not_sanitized("the sanitizer does not follow other processes")
alone = pytest.mark.not_sanitized("looks at the GPU's free memory, which other processes change")


@contextmanager
def blocked(stream: torch.cuda.Stream, seconds: float = 0.5) -> Iterator[Callable[[], bool]]:
    """The stream does nothing for a while. Yields a question: is it still so? A test that got no yes proved nothing."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(seconds * 2e9))
        awake = torch.cuda.Event()
        awake.record()

    def still() -> bool:
        return not awake.query()

    assert still()
    yield still
    stream.synchronize()


@contextmanager
def full(stream: torch.cuda.Stream, launch: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """As ``blocked``, while a thread waits within a launch, as the stream's queue takes no more of them."""
    launched, more_than_fit = 0, 10_000

    def launch_many() -> None:
        nonlocal launched
        with torch.cuda.stream(stream):
            for _ in range(more_than_fit):
                launch()
                launched += 1

    launch()  # a kernel's first launch waits for the GPU
    thread = threading.Thread(target=launch_many)
    with blocked(stream, seconds=2) as still:
        thread.start()
        before = -1
        while launched != before:
            before = launched
            time.sleep(0.1)
        try:
            assert still(), "this thread did not run while the other's launch waited"
            yield still
        finally:
            thread.join()
    assert 0 < before < more_than_fit == launched


def on_gpu(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [t.cuda() for t in tensors.values()]


def decode(bs: int = 5, width: int = 40, seed: int = 0) -> tuple[list, list, list]:
    """Six buffers, six sources, and what the buffers must be afterwards."""
    buffers, step = decode_buffers(8, 64), decode_step(bs, width, seed=seed)
    return on_gpu(buffers), on_gpu(step), on_gpu(after_step(buffers, step))


def all_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(f.cpu(), e.cpu()) for f, e in zip(found, expected, strict=True))


def warm_up(entry, device: str = "cuda") -> None:
    """The first launch on a GPU loads the kernels, which may wait and allocate as much as it likes."""
    for pairs in (mixed_batch(96), [pair(LAYOUTS["corner"], INT)] * 6):
        arena = Arena(pairs, device)
        entry(arena.dst, arena.src)
    torch.cuda.synchronize(device)


# --- the matrix ---------------------------------------------------------------------------------------------------


def eager(arena: Arena, entry) -> None:
    replay_in_calls(arena, entry)


def captured(arena: Arena, entry) -> None:
    replay_in_calls(arena, entry)  # loads the kernels: whether that may happen under capture is a test of its own
    torch.cuda.synchronize()
    arena.reset_destinations()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replay_in_calls(arena, entry)
    torch.cuda.synchronize()
    arena.check_untouched()  # recorded, not run
    graph.replay()
    torch.cuda.synchronize()
    arena.check()
    # A graph holds addresses, not contents: the next replay reads what lies there by then.
    arena.rewrite_sources(seed=1)
    arena.reset_destinations()
    graph.replay()


run_modes = pytest.mark.parametrize(
    "run", [eager, pytest.param(captured, marks=pytest.mark.capture)], ids=lambda f: f.__name__
)


def check(arena: Arena, entry, run) -> None:
    run(arena, entry)
    torch.cuda.synchronize()
    arena.check()


@run_modes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_every_layout_at_every_misalignment(entry, run, layout):
    pairs = [p for itemsize in ITEMSIZES for p in layout_batch(layout, itemsize)]
    check(Arena(pairs, "cuda"), entry, run)


@run_modes
@pytest.mark.parametrize("count", COUNTS)
def test_gpu_every_count_at_every_misalignment(entry, run, count):
    pairs = [p for itemsize in ITEMSIZES for p in count_batch(count, itemsize)]
    check(Arena(pairs, "cuda"), entry, run)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("alphabet", [range(256), AWKWARD_BYTES], ids=["all_bytes", "nans_and_odd_bools"])
@pytest.mark.parametrize("dtype", BYTE_DTYPES, ids=str)
def test_gpu_every_dtype_is_copied_bit_for_bit(entry, dtype, alphabet):
    check(Arena(dtype_batch(dtype), "cuda", source_bytes=alphabet), entry, eager)


@run_modes
@pytest.mark.parametrize("n", [1, 6, 96])
def test_gpu_lists_of_mixed_layouts_and_dtypes(entry, run, n):
    check(Arena(mixed_batch(n), "cuda"), entry, run)


@given(pairs=pair_lists, seed=st.integers(0, 99))
def test_gpu_any_list_of_pairs(entry, pairs, seed):
    check(Arena(pairs, "cuda", seed=seed, source_bytes=range(256)), entry, eager)


ROWS = {
    "row of 4095, pitch 8191": ((64, 8190), (8191, 1), (64, 4095), (4095, 1)),
    "one row of 4 MiB": ((1 << 20,), (1,), ((1 << 20) - 1,), (1,)),
    "many short rows": ((50_000, 5), (7, 1), (49_999, 3), (3, 1)),
    "large transpose": ((700, 1001), (1003, 1), (699, 1000), (1, 701)),
    "expanded to 3 MiB": ((900, 901), (901, 1), (899, 900), (0, 1)),
    "last dim of one": ((70_000, 1), (3, 1), (69_999, 1), (1, 1)),
    "many planes": ((3000, 5, 7), (41, 8, 1), (2999, 4, 6), (24, 6, 1)),
}


@run_modes
@pytest.mark.parametrize("rows", ROWS)
def test_gpu_large_and_small_pairs_in_one_launch(entry, run, rows):
    """Work of very different sizes side by side: a split by bytes or by tiles has to get its seams right."""
    small = [pair(LAYOUTS["corner"], INT, k, 3 * k % 17) for k in range(8)]
    large = [pair(ROWS[rows], INT, d, s) for d, s in [(0, 0), (4, 0), (0, 4), (4, 12), (1, 2)]]
    check(Arena(small[:4] + large + small[4:], "cuda"), entry, run)


# --- the six tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bs, width", [(1, 1), (3, 17), (5, 64), (8, 64), (8, 1)])
def test_gpu_decode_step_takes_whole_buffers(entry, bs, width):
    dst, src, expected = decode(bs, width)
    entry(dst, src)
    assert all_equal(dst, expected)
    outside = torch.ones(8, 64, dtype=torch.bool, device="cuda")
    outside[:bs, :width] = False
    assert (dst[5][outside] == -7).all()


@pytest.mark.capture
def test_gpu_captured_step_reads_new_contents(entry):
    """One graph, many steps: the sources' buffers are rewritten between replays."""
    dst, src, expected = decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        entry(dst, src)
    for seed in range(1, 6):
        _, step, expected = decode(seed=seed)
        for old, new in zip(src, step, strict=True):
            old.copy_(new)
        graph.replay()
        assert all_equal(dst, expected)


@pytest.mark.capture
def test_gpu_capture_among_other_kernels(entry):
    """Inside a graph it runs after what was recorded before it and before what was recorded after it."""
    src, dst, out = (torch.zeros(1 << 18, device="cuda") for _ in range(3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        src.add_(1)
        entry([dst], [src])
        # A kernel: initcheck reports a graph's copy node whose source is first written by the same graph.
        torch.mul(dst, 2, out=out)
    for n in range(1, 4):
        graph.replay()
        assert (out == 2 * n).all()


FIRST_CALL_IS_CAPTURED = """
    import fused_copy, torch
    dst, src = torch.zeros(64, device="cuda"), torch.ones(48, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.fused_copy.replay([dst], [src])
    graph.replay()
    assert dst.tolist() == [1] * 48 + [0] * 16
    print("done")
"""


@in_its_own_process
@pytest.mark.capture
def test_gpu_first_call_of_the_process_may_be_under_capture(tmp_path):
    run_script(FIRST_CALL_IS_CAPTURED, tmp_path)


# --- launches -----------------------------------------------------------------------------------------------------


def device_work(call: Callable[[], object]) -> list[str]:
    """Everything the GPU was given to do by this call: kernels, copies and memsets, by name."""
    call()  # so that loading the kernel is not part of what is seen
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if "Sync" not in name]  # a wait is no work: some versions list ours


@profiled
def test_the_profiler_sees_the_copies():
    """The counter counts: without this, the next tests would pass on a profiler that sees nothing."""
    dst, src, _ = decode()
    names = device_work(lambda: [d[: s.shape[0]].copy_(s) for d, s in zip(dst[:5], src[:5], strict=True)])
    assert len(names) == 5


def one_launch(names: list[str]) -> bool:
    return len(names) == 1 and "fused_copy" in names[0]


@profiled
def test_one_kernel_for_the_six_tensors(entry):
    dst, src, _ = decode()
    names = device_work(lambda: entry(dst, src))
    assert one_launch(names), names


@profiled
@pytest.mark.parametrize("n", [1, 2, 32, 200])
def test_one_kernel_for_lists_of_dense_pairs(entry, n):
    dst = [torch.zeros(256, dtype=torch.int64, device="cuda") for _ in range(n)]
    src = [torch.ones(256, dtype=torch.int64, device="cuda") for _ in range(n)]
    names = device_work(lambda: entry(dst, src))
    assert one_launch(names), names


@profiled
def test_one_kernel_for_mixed_layouts_and_dtypes(entry):
    arena = Arena(mixed_batch(64), "cuda")
    names = device_work(lambda: entry(arena.dst, arena.src))
    assert one_launch(names), names


@profiled
@pytest.mark.parametrize(
    "size, offset",
    [((0,), 0), ((1,), 0), ((1 << 22,), 0), ((1 << 22,), 1)],
    ids=["empty", "one element", "large", "large, misaligned"],
)
def test_one_kernel_at_most_whatever_the_size(entry, size, offset):
    dst = torch.zeros(size[0] + 8, device="cuda")
    src = torch.ones(size[0] + 8, device="cuda")[offset : offset + size[0]]
    names = device_work(lambda: entry([dst], [src]))
    assert one_launch(names) or (size == (0,) and not names), names


@profiled
def test_nothing_to_copy_is_no_work(entry):
    same = torch.zeros(64, device="cuda")
    assert len(device_work(lambda: entry([same], [same]))) <= 1
    assert device_work(lambda: entry([], [])) == []


@profiled
@pytest.mark.capture
def test_one_node_per_call_in_a_captured_graph(entry):
    dst, src, _ = decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        entry(dst, src)
    names = device_work(graph.replay)
    assert one_launch(names), names


# --- streams, synchronization, memory -----------------------------------------------------------------------------


@pytest.mark.blocked
def test_launches_on_the_current_stream(entry):
    """The current stream is blocked: nothing may be written until it is free, and the call comes back at once."""
    warm_up(entry)
    stream, watcher = torch.cuda.Stream(), torch.cuda.Stream()
    dst, src, expected = decode()
    poisoned = [d.cpu() for d in dst]
    torch.cuda.synchronize()
    with blocked(stream) as still:
        with torch.cuda.stream(stream):
            entry(dst, src)
        with torch.cuda.stream(watcher):
            seen = [d.cpu() for d in dst]
        assert still()
        assert all_equal(seen, poisoned), "written by another stream than the current one"
    assert all_equal(dst, expected)


@pytest.mark.blocked
def test_does_not_wait_for_other_streams(entry):
    """The other way round: everything but the current stream is blocked."""
    warm_up(entry)
    stream = torch.cuda.Stream()
    dst, src, expected = decode()
    torch.cuda.synchronize()
    with blocked(torch.cuda.default_stream()) as still:
        with torch.cuda.stream(stream):
            entry(dst, src)
            stream.synchronize()
            seen = [d.cpu() for d in dst]
        assert still()
    assert all_equal(seen, expected)


@pytest.mark.blocked
def test_does_not_wait_and_does_not_allocate(entry):
    warm_up(entry)
    dst, src, expected = decode()
    arena = Arena(mixed_batch(96), "cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    with blocked(torch.cuda.current_stream()) as still:
        entry(dst, src)
        entry(arena.dst, arena.src)
        assert still(), "the call waited for the stream"
        after = torch.cuda.memory_stats()
    for key in ("allocation.all.allocated", "allocation.all.freed", "segment.all.allocated", "num_alloc_retries"):
        assert after[key] == before[key], key
    assert all_equal(dst, expected)
    arena.check()


@pytest.mark.blocked
def test_a_full_queue_does_not_keep_python(entry):
    """A launch waits where the queue is full. Other threads, for one of which the GPU may wait, must run meanwhile."""
    warm_up(entry)
    dst, src, expected = decode()
    plan = fused_copy.Plan(dst)
    for sources in src, [s.cpu().pin_memory() for s in src]:
        for way in partial(entry, dst, sources), partial(plan.replay, *sources):
            with full(torch.cuda.Stream(), way):
                pass
    assert all_equal(dst, expected)


@alone
def test_no_device_memory_outside_the_allocator_either(entry):
    warm_up(entry)
    arena = Arena(mixed_batch(96), "cuda")
    entry(arena.dst, arena.src)
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(200):
        entry(arena.dst, arena.src)
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] >= free - (8 << 20)  # other processes may share the GPU: allow them a little


@needs_caching
def test_source_freed_right_after_the_call(entry):
    """Freed means handed out again, to work that comes later on the same stream."""
    warm_up(entry)
    n = 1 << 20
    dst = [torch.zeros(n, dtype=INT, device="cuda") for _ in range(3)]
    for step in range(20):
        torch.cuda._sleep(20_000_000)
        src = [torch.full((n,), 3 * step + k, dtype=INT, device="cuda") for k in range(3)]
        addresses = {s.data_ptr() for s in src}
        entry(dst, src)
        del src
        churn = [torch.full((n,), -1, dtype=INT, device="cuda") for _ in range(6)]
        assert addresses & {c.data_ptr() for c in churn}, "the allocator did not hand the memory out again"
        del churn
        assert [int(d.unique()) for d in dst] == [3 * step + k for k in range(3)]


def on_streams_of_their_own(work: Callable[[int], None], count: int = 4) -> None:
    """work(0), work(1) and so on at once, each in a thread and on a stream of its own."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(k: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                barrier.wait(timeout=60)
                work(k)
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_threads_with_streams_of_their_own(entry):
    warm_up(entry)

    def work(k: int) -> None:
        arena = Arena(mixed_batch(32, seed=k), "cuda", seed=k)
        for seed in range(10):
            arena.rewrite_sources(seed)
            arena.reset_destinations()
            for _ in range(20):
                entry(arena.dst, arena.src)
            arena.check()

    on_streams_of_their_own(work)


# --- devices ------------------------------------------------------------------------------------------------------


@two_gpus
@pytest.mark.blocked
def test_destinations_on_a_gpu_that_is_not_current(entry):
    """Blocked is the current stream of the destinations' GPU; a launch on the current GPU would not wait for it."""
    torch.cuda.set_device(0)
    dst, src, expected = ([t.to("cuda:1") for t in part] for part in decode())
    entry(dst, src)
    assert all_equal(dst, expected)
    for d in dst:
        d.fill_(-9)
    reading = torch.cuda.Stream(1)
    torch.cuda.synchronize(1)
    with blocked(torch.cuda.current_stream(1)) as still:
        entry(dst, src)
        assert torch.cuda.current_device() == 0
        with torch.cuda.stream(reading):
            seen = [d.cpu() for d in dst]
        assert still()
        assert all(bool((s == -9).all()) for s in seen), "launched on another stream than the destinations' current one"
    corners = [d.cpu()[tuple(slice(0, n) for n in s.shape)] for d, s in zip(dst, src, strict=True)]
    assert all_equal(corners, src)


@two_gpus
@pytest.mark.blocked
def test_side_stream_of_a_gpu_that_is_not_current(entry):
    side, usual = torch.cuda.Stream(1), torch.cuda.current_stream(1)
    dst, src, expected = ([t.to("cuda:1") for t in part] for part in decode())
    entry(dst, src)
    for d in dst:
        d.fill_(-7)
    torch.cuda.synchronize(1)
    try:
        torch.cuda.set_stream(side)  # of GPU 1, and makes that one current
        torch.cuda.set_device(0)
        with blocked(usual) as still:
            torch.cuda.set_device(0)
            entry(dst, src)
            side.synchronize()
            assert still(), "waited for a stream that is not the current one"
            with torch.cuda.stream(torch.cuda.Stream(1)):
                seen = [d.cpu() for d in dst]
    finally:
        torch.cuda.set_stream(usual)
        torch.cuda.set_device(0)
    assert all_equal(seen, expected)


ANOTHER_GPU_IN_A_NEW_THREAD = """
    import fused_copy, threading, torch
    dst, src = torch.zeros(64, device="cuda:1"), torch.ones(48, device="cuda:1")
    plan = fused_copy.Plan([dst])
    ways = [lambda: torch.ops.fused_copy.replay([dst], [src]), lambda: plan.replay(src)]
    devices = []
    for way in ways:
        thread = threading.Thread(target=lambda: (way(), devices.append(torch.cuda.current_device())))
        thread.start()
        thread.join()
    torch.cuda.synchronize(1)
    assert devices == [0, 0], devices
    assert dst.tolist() == [1] * 48 + [0] * 16
    assert not torch._C._cuda_hasPrimaryContext(0), "GPU 0 has got a context, of half a gigabyte"
    print("done")
"""


@two_gpus
@in_its_own_process
def test_gpu_that_is_current_and_not_used_gets_no_context(tmp_path):
    """Device 0 is the current one of a thread that did nothing yet."""
    run_script(ANOTHER_GPU_IN_A_NEW_THREAD, tmp_path)


@two_gpus
@pytest.mark.capture
def test_capture_on_a_gpu_that_is_not_current(entry):
    warm_up(entry, "cuda:1")
    dst, src, expected = ([t.to("cuda:1") for t in part] for part in decode())
    poisoned = [d.clone() for d in dst]
    torch.cuda.synchronize(1)
    stream = torch.cuda.Stream(1)  # torch.cuda.graph's own stream may belong to the other GPU
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), torch.cuda.device(0):
        entry(dst, src)
    assert all_equal(dst, poisoned), "launched, not recorded"
    with torch.cuda.device(1):
        graph.replay()
        torch.cuda.synchronize()
    assert all_equal(dst, expected)


def refused_untouched(entry, dst, src, *words: str) -> None:
    before = [d.clone() for d in dst]
    with pytest.raises(RuntimeError) as caught:
        entry(dst, src)
    torch.cuda.synchronize()
    assert all_equal(dst, before), "the call raised, but wrote"
    if entry.tells_why:
        for word in words:
            assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def zeros_and_ones(at: int, dst_device: str, src_device: str, device: str = "cuda:0") -> tuple[list, list]:
    """Four pairs on `device`, one of which, number `at`, is elsewhere."""
    dst = [torch.zeros(8, device=dst_device if k == at else device) for k in range(4)]
    src = [torch.ones(5, device=src_device if k == at else device) for k in range(4)]
    return dst, src


@two_gpus
@pytest.mark.parametrize("dst_device, src_device", [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0"), ("cuda:1", "cuda:1")])
def test_tensors_on_two_gpus(entry, dst_device, src_device):
    refused_untouched(entry, *zeros_and_ones(3, dst_device, src_device), "pair 3", "cuda:0", "cuda:1")


@pytest.mark.parametrize("at", [0, 3])
def test_pageable_source_for_a_gpu(entry, at):
    """Host values, which are read at the call."""
    dst, src = zeros_and_ones(at, "cuda:0", "cpu")
    entry(dst, src)
    src[at].fill_(7)
    assert [d.tolist() for d in dst] == [[1] * 5 + [0] * 3] * 4


def test_gpu_source_for_a_cpu_destination(entry):
    refused_untouched(entry, *zeros_and_ones(3, "cpu", "cuda:0", device="cpu"), "pair 3", "cpu", "cuda")


def test_cpu_destination_among_gpu_ones(entry):
    refused_untouched(entry, *zeros_and_ones(3, "cpu", "cpu"), "pair 3", "cpu", "cuda")


def test_gpu_pair_among_cpu_ones(entry):
    refused_untouched(entry, *zeros_and_ones(3, "cuda:0", "cuda:0", device="cpu"), "pair 3", "cpu", "cuda")


def test_meta_source_for_a_gpu(entry):
    refused_untouched(entry, *zeros_and_ones(3, "cuda:0", "meta"), "pair 3", "meta")


def test_gpu_overlap(entry):
    buf = torch.arange(24.0, device="cuda")
    refused_untouched(entry, [buf[:10], buf[9:]], [torch.ones(4, device="cuda")] * 2, "overlap", "pair ")
    refused_untouched(entry, [torch.zeros(8, device="cuda"), buf[:16]], [buf[12:20], buf[20:]], "overlap", "pair ")


def test_gpu_interleaved_columns(entry):
    buf = torch.zeros(6, 8, device="cuda")
    entry([buf[:, :4], buf[:, 4:]], [torch.full((6, 4), 1.0, device="cuda"), torch.full((5, 4), 2.0, device="cuda")])
    assert buf.tolist() == [[1] * 4 + [2] * 4] * 5 + [[1] * 4 + [0] * 4]


FREED_ON_GPU = """
    import fused_copy, torch
    for name, replay in ("op", torch.ops.fused_copy.replay), ("python", fused_copy.replay):
        for side in "dst", "src":
            dst = [torch.zeros(64, device="cuda") for _ in range(3)]
            src = [torch.ones(48, device="cuda") for _ in range(3)]
            (dst if side == "dst" else src)[1].untyped_storage().resize_(0)
            try:
                replay(dst, src)
            except RuntimeError:
                torch.cuda.synchronize()
                assert dst[0].sum() == 0 and dst[2].sum() == 0, "written"
            else:
                raise AssertionError(f"{name}, {side}: no error")
    print("done")
"""


@in_its_own_process
def test_gpu_freed_storage(tmp_path):
    """In a process of its own: an illegal access leaves the whole process without a GPU."""
    run_script(FREED_ON_GPU, tmp_path)


def test_a_refused_call_leaves_the_gpu_usable(entry):
    refused_untouched(entry, *zeros_and_ones(3, "cuda:0", "meta"))
    dst, src, expected = decode()
    entry(dst, src)
    assert all_equal(dst, expected)


# --- more than 32 bits --------------------------------------------------------------------------------------------


@pytest.fixture
def big() -> Iterator[Callable[[int], torch.Tensor]]:
    """Byte buffers of several GiB, if there is room for two of them and a little."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 12 * GiB:
        pytest.skip("needs 12 GiB of free GPU memory")
    yield lambda n: torch.empty(n, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()


POISON = 0xAB


def pattern(buffer: torch.Tensor) -> torch.Tensor:
    """Numbers them: every 8 bytes differ from all others, 4 GiB away too."""
    buffer[-8:] = 0x5C
    first = 0x0123_4567_0123_4567
    words = buffer[: buffer.numel() // 8 * 8].view(torch.int64)
    torch.arange(first, first + words.numel(), out=words)
    return buffer


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """torch.equal in pieces along the first dimension."""
    step = max(1, (1 << 28) // max(1, a[0].numel()))
    return all(torch.equal(a[i : i + step], b[i : i + step]) for i in range(0, len(a), step))


def only(buffer: torch.Tensor, value: int) -> bool:
    step = 1 << 28
    return all(bool((buffer[i : i + step] == value).all()) for i in range(0, buffer.numel(), step))


@too_large
@pytest.mark.parametrize("lead", [0, 3], ids=["aligned", "misaligned"])
def test_more_than_4_gib_in_one_run(entry, big, lead):
    n, guard = 4 * GiB + 4097, 1 << 20
    dst, src = big(lead + n + guard).fill_(POISON), pattern(big(n))
    entry([dst[lead:]], [src])
    assert same(dst[lead : lead + n], src)
    assert only(dst[:lead], POISON)
    assert only(dst[lead + n :], POISON)


@too_large
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 40 * GiB,
    reason="needs a GPU of 40 GiB",
)
def test_more_rows_than_32_bits_count(entry, big):
    rows = 2**32 + 5
    dst, src = big(4 * rows).fill_(POISON).view(rows, 4), pattern(big(3 * rows)).view(rows, 3)
    entry([dst[:, :3]], [src])
    assert same(dst[:, :3], src)
    assert same(dst[:, 3:], torch.full((1, 1), POISON, dtype=torch.uint8, device="cuda").expand(rows, 1))


@too_large
def test_rows_more_than_4_gib_apart(entry, big):
    """Little to copy, but far apart: the offsets, not the counts, need 64 bits."""
    pitch, width = 2 * GiB + 12345, 1001
    dst = big(2 * pitch + 4096).fill_(POISON)
    src = pattern(big(3 * width + 5)).as_strided((3, width), (width + 2, 1))
    entry([dst.as_strided((3, 2000), (pitch, 1))], [src])
    for row in range(3):
        assert torch.equal(dst[row * pitch :][:width], src[row])
        end = (row + 1) * pitch if row < 2 else dst.numel()
        assert only(dst[row * pitch + width : end], POISON)


@too_large
def test_source_rows_more_than_4_gib_apart(entry, big):
    pitch, width = 2 * GiB + 12345, 1001
    far = pattern(big(2 * pitch + 4096)).as_strided((3, width), (pitch, 1))
    dst = torch.full((4, 1003), POISON, dtype=torch.uint8, device="cuda")
    entry([dst], [far])
    assert torch.equal(dst[:3, :width], far)
    assert only(dst[3], POISON)
    assert only(dst[:, width:].contiguous(), POISON)


@too_large
def test_more_than_2_to_the_31_elements_in_many_rows(entry, big):
    rows, width, pitch = (1 << 22) + 3, 1021, 1024
    dst = big((rows + 1) * pitch).fill_(POISON).view(rows + 1, pitch)
    src = pattern(big(rows * width)).view(rows, width)
    entry([dst], [src])
    assert same(dst[:rows, :width], src)
    assert only(dst[rows], POISON)
    step = 1 << 18
    assert all(bool((dst[i : i + step, width:] == POISON).all()) for i in range(0, rows, step))
