"""What fails on a GPU fails with an error of its own, and leaves no error behind for the next call."""

from __future__ import annotations

import mmap

import pytest
import torch
from test_environment import run_script
from test_gpu_replay import all_equal, decode, in_its_own_process, two_gpus

import fused_copy
from fused_copy import backends, rows

# Each in a process of its own: these leave captures broken, or a process without a GPU.

BAD_LAUNCH = """
    import fused_copy, os, torch
    dst, src = torch.zeros(8, device="cuda"), torch.ones(5, device="cuda")
    plan = fused_copy.Plan([dst])
    way = {
        "op": lambda: torch.ops.fused_copy.replay([dst], [src]),
        "python": lambda: fused_copy.replay([dst], [src]),
        "plan": lambda: plan.replay(src),
    }[os.environ["WAY"]]
    way()
    dst.zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            try:
                torch.cuda.synchronize()  # forbidden here, which breaks the capture: the next launch is a bad one
            except RuntimeError:
                pass
            try:
                way()
            except RuntimeError as error:
                print(error, flush=True)
            else:
                raise AssertionError("launched into a broken capture")
    except RuntimeError:
        pass  # the capture's own end
    torch.cuda.synchronize()  # would tell of an error that was left behind
    assert dst.sum() == 0, "written"
    way()
    torch.cuda.synchronize()
    assert dst.tolist() == [1] * 5 + [0] * 3
    print("done")
"""


@in_its_own_process
def test_a_launch_that_cuda_refuses_is_an_error_and_leaves_none_behind(entry, tmp_path):
    told = run_script(BAD_LAUNCH, tmp_path, WAY=entry.name)
    if entry.tells_why:
        assert "fused_copy: the launch failed: cudaError" in told


@in_its_own_process
def test_a_plans_launch_that_cuda_refuses(tmp_path):
    assert "fused_copy: the launch failed: cudaError" in run_script(BAD_LAUNCH, tmp_path, WAY="plan")


OUT_OF_MEMORY = """
    import fused_copy, torch
    buffer = torch.zeros(8, device="cuda")
    plan = fused_copy.Plan([buffer])
    plan.replay(torch.ones(8, device="cuda"))
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    source = torch.full((5,), 2.0, device="cuda")
    try:
        with torch.cuda.graph(graph):
            copy = plan.capture(graph, source)
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        print("out of memory")
    # What was recorded before is a graph all the same. It works, or the error is ours.
    try:
        copy.update(source[:4])
    except RuntimeError as error:
        assert "fused_copy: " in str(error), error
    else:
        graph.replay()
        assert buffer.tolist() == [2] * 4 + [1] * 4
    try:
        plan.capture(graph, source)
    except RuntimeError as error:
        print(error)
    buffer.fill_(1)
    plan.replay(source)
    again = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(again):
        copy = plan.capture(again, source)
    copy.update(torch.full((3,), 3.0, device="cuda"))
    again.replay()
    assert buffer.tolist() == [3, 3, 3, 2, 2, 1, 1, 1]
    print("done")
"""


@in_its_own_process
@pytest.mark.capture
def test_out_of_memory_during_a_capture(tmp_path):
    """The copy allocates nothing, so it is the model that runs out. What the capture left behind must not be used."""
    printed = run_script(OUT_OF_MEMORY, tmp_path)
    assert printed.startswith("out of memory\n")
    assert "captured already" in printed or "not capturing" in printed, printed


DROPPED = """
    import fused_copy, os, torch
    plan = fused_copy.Plan([torch.zeros(8, device="cuda")])
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        copy = plan.capture(graph, torch.ones(8).pin_memory())
    copy.update(torch.ones(5).pin_memory())
    graph.replay()
    copy.update(torch.ones(6).pin_memory())
    try:
        torch.zeros(4, device="cuda")[torch.tensor([1 << 20], device="cuda")]
        torch.cuda.synchronize()
    except RuntimeError:
        print("an error that stays")
    del copy
    print("done", flush=True)
    os._exit(0)  # torch's own objects may not get over it
"""


@pytest.mark.capture
@in_its_own_process
def test_a_copy_that_is_dropped_after_an_error_that_stays(tmp_path):
    """CUDA then tells no more when pinned sources were read: they must not be given back, and nobody must throw."""
    assert run_script(DROPPED, tmp_path) == "an error that stays\ndone\n"


FORKED = """
    import fused_copy, os, torch
    dst, src, pinned = torch.zeros(4, device="cuda"), torch.ones(3, device="cuda"), torch.ones(3).pin_memory()
    plan = fused_copy.Plan([dst])
    plan.replay(src)
    plan.replay(pinned)
    torch.cuda.synchronize()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        told = []
        for call in (
            lambda: plan.replay(src),
            lambda: fused_copy.replay([dst], [src]),
            lambda: torch.ops.fused_copy.replay([dst], [src]),
            lambda: plan.replay(pinned),
        ):
            try:
                call()
                told.append("NO ERROR")
            except BaseException as error:
                told.append(f"{type(error).__name__} {error}".splitlines()[0])
        host = torch.zeros(2)
        fused_copy.replay([host], [torch.ones(2)])
        told.append(f"host {host.tolist()}")
        os.write(write, chr(10).join(told).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        print(pipe.read())
    assert os.waitpid(child, 0)[1] == 0
    plan.replay(torch.full((2,), 2.0, device="cuda"))
    assert dst.tolist() == [2, 2, 1, 0]
    print("done")
"""


@in_its_own_process
def test_fork_after_cuda_was_used(tmp_path):
    """CUDA does not survive a fork: the child is told so, can still copy on the CPU, and the parent goes on."""
    *told, host, _ = run_script(FORKED, tmp_path).splitlines()
    assert len(told) == 4
    assert all(line.startswith("RuntimeError") for line in told), told
    assert all("fork" in line for line in told[:2]), told
    assert host == "host [1.0, 1.0]"


@pytest.mark.parametrize("inside", [True, False], ids=["within", "across_the_end"])
def test_memory_that_is_pinned_in_part(entry, inside):
    """The driver is asked about the first and the last byte: is_pinned() of the tensor only looks at the first.

    What it does not know to be pinned is read by the host, at the call.
    """
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 4 * page)
    host = torch.frombuffer(memory, dtype=torch.uint8).fill_(7)
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(host.data_ptr(), 2 * page, 0)) == 0
    try:
        dst = torch.zeros(4 * page, dtype=torch.uint8, device="cuda")
        source = host[page : 2 * page] if inside else host[page : 3 * page]
        entry([dst], [source])
        if not inside:
            host.fill_(9)
        torch.cuda.synchronize()
        assert dst.sum(dtype=torch.int64) == 7 * source.numel()
    finally:
        torch.cuda.synchronize()
        runtime.cudaHostUnregister(host.data_ptr())


@two_gpus
def test_pinned_source_for_a_gpu_that_is_not_current(entry):
    """Which is not the GPU that was current when it was pinned, either."""
    torch.cuda.set_device(0)
    source = torch.arange(100.0).pin_memory()
    dst = torch.zeros(128, device="cuda:1")
    entry([dst], [source])
    assert torch.cuda.current_device() == 0
    assert torch.equal(dst[:100].cpu(), source)
    assert not dst[100:].any()


def test_errors_in_a_row_leave_no_error_behind(entry):
    """A thousand refused calls between good ones: wrong input is found before CUDA hears of the call."""
    dst, src, expected = decode()
    wrong = [*src[:5], torch.ones(9, 65, dtype=torch.int32, device="cuda")]
    of_no_pair = [*src[:5], src[5].to(torch.complex64)]
    for _ in range(500):
        for sources in (wrong, of_no_pair):
            with pytest.raises(RuntimeError):
                entry(dst, sources)
    torch.cuda.synchronize()
    entry(dst, src)
    torch.cuda.synchronize()
    assert all_equal(dst, expected)


@pytest.mark.capture
def test_refused_calls_do_not_break_a_capture(entry):
    """An engine that falls back when a call raises must be able to do so while it captures."""
    dst, src, expected = decode()
    plan = fused_copy.Plan(dst)
    plan.replay(*src)
    for d in dst:
        d.fill_(-7)
    of_no_pair, wide = src[5].to(torch.complex64), torch.ones(9, 65, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for sources in ([*src[:5], of_no_pair], [*src[:5], wide]):
            with pytest.raises(RuntimeError, match="pair 5" if entry.tells_why else None):
                entry(dst, sources)
            with pytest.raises(RuntimeError, match="pair 5"):
                plan.replay(*sources)
        entry(dst, src)
    graph.replay()
    assert all_equal(dst, expected)


# --- the back end for loops that must not stop --------------------------------------------------------------------


def test_fallback_takes_pageable_tables():
    """Torch's copy stages them."""
    dst = torch.zeros(6, dtype=torch.int32, device="cuda")
    table = rows(torch.arange(4), [0, 1, 2, 3])
    backends._warned.clear()
    with fused_copy.backend("fallback"), pytest.warns(RuntimeWarning, match=r"table of pair 1 \(x\).*pin it"):
        other = torch.zeros(3, device="cuda")
        fused_copy.replay({"y": other, "x": dst}, {"y": torch.ones(2, device="cuda"), "x": table}, {"x": -1})
    assert dst.tolist() == [0, 1, 2, 3, -1, -1]
    assert other.tolist() == [1, 1, 0]


@two_gpus
def test_fallback_copies_between_gpus():
    dst = [torch.zeros(3, device=f"cuda:{i}") for i in range(2)]
    src = [torch.ones(2, device=f"cuda:{1 - i}") for i in range(2)]
    backends._warned.clear()
    with fused_copy.backend("fallback"), pytest.warns(RuntimeWarning, match="pair 0"):
        fused_copy.Plan(dst[:1]).replay(src[0])
    with fused_copy.backend("fallback"), pytest.warns(RuntimeWarning, match="pair"):
        fused_copy.replay(dst, src)
    assert [d.tolist() for d in dst] == [[1, 1, 0]] * 2
