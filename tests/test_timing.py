"""How calls are timed: that the right ones are made, and divided by the right number. Not how fast anything is."""

import gc
from contextlib import nullcontext

import pytest
import torch

from fused_copy import timing


def counted(count: int):
    made = [0] * count

    def call(index: int) -> None:
        made[index] += 1

    return made, [lambda index=index: call(index) for index in range(count)]


@pytest.mark.parametrize(("launches", "per_batch"), [(0, 32), (1, 32), (16, 32), (64, 8), (512, 1), (9999, 1)])
def test_host_us_makes_the_calls_in_turn(launches, per_batch):
    made, calls = counted(4)
    result = timing.host_us(calls, launches=launches, batches=6, warm_up=2)
    assert made == [8 * per_batch // 4] * 4
    assert len(result.samples) == 6
    assert 0 < result.p10 <= result.median <= result.p90


def test_host_us_is_per_call(monkeypatch):
    now = [0]
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: now[0])

    def call():
        now[0] += 2500

    assert timing.host_us([call], batches=3).samples == (2.5, 2.5, 2.5)


@pytest.mark.parametrize("enabled", [True, False])
def test_host_us_leaves_gc_as_it_was(enabled):
    seen = []
    try:
        (gc.enable if enabled else gc.disable)()
        timing.host_us([lambda: seen.append(gc.isenabled())], batches=1)
        assert gc.isenabled() is enabled
        with pytest.raises(ZeroDivisionError):
            timing.host_us([lambda: 1 / 0])
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    assert not any(seen)


@pytest.mark.parametrize(("per_graph", "captured"), [(1, 4), (4, 4), (11, 8), (12, 12)])
def test_gpu_us_divides_by_the_calls_it_captured(monkeypatch, per_graph, captured):
    now = [0.0]  # in ms

    class Graph:
        def __init__(self, keep_graph):
            pass

        def replay(self):
            now[0] += 0.25 * captured

    class Event:
        def __init__(self, device, enable_timing):
            pass

        def record(self):
            self.time = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch, "Event", Event)
    made, calls = counted(4)
    assert timing.gpu_us(calls, per_graph=per_graph, replays=5).samples == (250,) * 5
    assert made == [captured // 4] * 4


@pytest.mark.capture
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_us_and_launches_on_a_gpu():
    source, buffer = torch.ones(1 << 24, device="cuda"), torch.zeros(1 << 24, device="cuda")
    once, twice = (lambda: buffer.copy_(source)), (lambda: buffer.copy_(source).copy_(source))
    twice()
    assert (timing.launches(once), timing.launches(twice)) == (1, 2)
    ratio = timing.gpu_us([twice], per_graph=16).median / timing.gpu_us([once], per_graph=16).median
    assert 1.6 < ratio < 2.4


def test_timing_quantiles():
    result = timing.Timing((5.0, 1.0, 2.0)) + timing.Timing((3.0, 4.0, *map(float, range(6, 12))))
    assert (result.median, result.p10, result.p90) == (6, 2, 10)


def test_in_turn_goes_back_and_forth():
    timers = [lambda us=us: timing.Timing((us,)) for us in (1.0, 2.0, 3.0)]
    taken = [(index, result.median) for index, result in timing.in_turn(timers, 3)]
    back, forth = [(2, 3), (1, 2), (0, 1)], [(0, 1), (1, 2), (2, 3)]
    assert taken == [*back, *forth, *back]
