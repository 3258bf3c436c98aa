"""Everything at once from several threads. On a free-threaded Python they run truly at the same time."""

from __future__ import annotations

import gc
import subprocess
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Callable

import pytest
import torch
from arena import Arena
from cases import after_step, decode_buffers, decode_step, mixed_batch

import fused_copy

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
ROUNDS = 40


def run_together(*jobs: Callable[[], object]) -> None:
    """Each job ROUNDS times in a thread of its own, all begun at once. The first failure stops them and is raised."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(jobs))

    def loop(job: Callable[[], object]) -> None:
        try:
            barrier.wait(timeout=60)
            for _ in range(ROUNDS):
                if failures:
                    return
                job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=loop, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def own_arena(way: Callable[..., None], seed: int) -> Callable[[], None]:
    """A job that replays, through `way`, tensors that no other thread has, and compares every byte."""
    arena = Arena(mixed_batch(12, seed=seed), "cpu", seed=seed)

    def job() -> None:
        arena.reset_destinations()
        way(arena.dst, arena.src)
        arena.check()

    return job


def bound_each_time(dst, src) -> None:
    fused_copy.Plan(dst).replay(*src)


def test_everything_at_once():
    """The op, the function, plans made and shared, errors, explain, and the garbage collector."""
    buffers, step = decode_buffers(8, 64), decode_step(8, 64)
    shared, sources = fused_copy.Plan(buffers), list(step.values())
    expected = after_step(buffers, step)
    shared.replay(*sources)

    def share() -> None:
        shared.replay(*sources)  # all threads write the same, as their copies have no order
        assert all(torch.equal(buffers[name], expected[name]) for name in buffers)

    def fail() -> None:
        with pytest.raises(RuntimeError, match=r"pair 0 \('input_ids'\)"):
            shared.replay(torch.zeros(9, dtype=torch.int32), *sources[1:])
        with pytest.raises(RuntimeError, match="pair 1"):
            fused_copy.replay([torch.zeros(4), torch.zeros(4)], [torch.ones(4), torch.ones(5)])

    def explain() -> None:
        assert fused_copy.explain(buffers, step).launches == 1

    def collect() -> None:
        cycle = [torch.zeros(5), fused_copy.Plan([torch.zeros(5)])]
        cycle.append(cycle)
        del cycle
        gc.collect()

    run_together(
        own_arena(torch.ops.fused_copy.replay, 1),
        own_arena(fused_copy.replay, 2),
        own_arena(bound_each_time, 3),
        share,
        share,
        fail,
        explain,
        collect,
    )


def test_a_backend_is_switched_under_way():
    """Among aligned tensors: torch's own operators crash on others."""
    buffers, step = decode_buffers(8, 64), decode_step(8, 64)
    expected = after_step(buffers, step)
    plan = fused_copy.Plan(buffers)

    def switch() -> None:
        with fused_copy.backend("reference"):
            fused_copy.replay([torch.zeros(3)], [torch.ones(3)])

    def share() -> None:
        plan.replay(*step.values())
        assert all(torch.equal(buffers[name], expected[name]) for name in buffers)

    share()
    try:
        run_together(switch, share, share)
    finally:
        fused_copy.backend("fused")


@pytest.mark.parametrize(
    "way", [torch.ops.fused_copy.replay, fused_copy.replay, bound_each_time], ids=["op", "python", "plan"]
)
def test_others_run_python_during_a_copy(way):
    """As during torch's own copies."""
    dst, src = [torch.zeros(1 << 24)], [torch.ones(1 << 24)]
    way(dst, src)
    done = True

    def copy() -> None:
        nonlocal done
        begun.set()
        try:
            way(dst, src)
        finally:
            done = True

    seen = 0
    for _ in range(20):
        begun, done = threading.Event(), False
        thread = threading.Thread(target=copy)
        thread.start()
        begun.wait()
        while not done:
            seen += 1
            time.sleep(1e-4)
        thread.join()
    assert seen > 20 * 3, f"woke {seen} times in 20 copies of {dst[0].nbytes >> 20} MB"


def test_a_finalizer_may_copy():
    """A tensor's last reference may die within a call, and what runs then may itself call: a call within a call."""
    dst = torch.zeros(4)

    class Last:
        pass

    def copy(_: object) -> None:
        fused_copy.replay([dst], [torch.full((2,), 5.0)])

    def job() -> None:
        last = Last()
        alive = weakref.ref(last, copy)

        class Sources(list):
            def __iter__(self):  # asked for the fills while the call's workspace is in use
                nonlocal last
                last = None
                return super().__iter__()

        out = torch.zeros(3)
        fused_copy.replay([out], [torch.ones(2)], Sources([7.0]))
        assert out.tolist() == [1, 1, 7]
        assert alive() is None
        assert dst.tolist() == [5, 5, 0, 0]

    run_together(job)


def test_a_fill_that_empties_the_lists():
    """A number's `__float__` is Python code, and here it drops the lists' references to the call's tensors."""
    dst, src = [torch.zeros(4) for _ in range(100)], [torch.ones(2) for _ in range(100)]
    kept = list(dst)

    class Number:
        def __float__(self) -> float:
            dst.clear()
            src.clear()
            return 7.0

    fused_copy.replay(dst, src, [*[None] * 99, Number()])
    assert [tensor.tolist() for tensor in kept] == [*[[1, 1, 0, 0]] * 99, [1, 1, 7, 7]]


FREED = """if True:
    import gc, sys, torch, fused_copy

    POISON = 7.0
    gc.freeze()  # or each collection looks at all of torch

    class Trap:
        # Frees the call's memory, and takes what was freed.
        def __init__(self, tensors):
            self.tensors, self.cycle = tensors, self

        def __del__(self):
            for tensor in self.tensors:
                if not freed:
                    tensor.untyped_storage().resize_(0)
            freed.append([torch.full((1 << 12,), POISON) for _ in self.tensors])

    def of_a_plan(dst, src):
        fused_copy.Plan(dst).replay(*src)

    with torch.no_grad():
        for way in fused_copy.replay, of_a_plan, torch.ops.fused_copy.replay:
            for allocations in range(1, 80):
                freed = []
                dst = [torch.zeros(1 << 12) for _ in range(3)]
                src = [torch.ones(1 << 12) for _ in range(3)]
                gc.collect()
                gc.disable()
                Trap([src[-1]])
                gc.set_threshold(allocations)
                gc.enable()
                try:
                    way(dst, src)
                except RuntimeError as error:
                    assert "storage" in str(error), error
                gc.disable()
                gc.set_threshold(700)
                for tensor in dst:
                    assert set(tensor.unique().tolist()) <= {0.0, 1.0}, (way, allocations, "copied what was freed")
    print("done")
"""


def test_a_finalizer_that_frees_a_source_within_the_call(tmp_path):
    """Garbage is collected at any allocation up to Python 3.11: nothing may be allocated between checks and copy."""
    command = [sys.executable, "-c", FREED]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.stdout == "done\n", run.stdout + run.stderr


@pytest.mark.skipif(not FREE_THREADED, reason="needs a free-threaded Python")
def test_importing_keeps_the_gil_off(tmp_path):
    script = """if True:
        import sys, torch
        before = sys._is_gil_enabled()
        import fused_copy
        assert sys._is_gil_enabled() == before
    """
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", script]  # Python warns where a module turns it on
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
