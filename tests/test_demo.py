"""The demo and its decode loop, on the CPU: the loop's invariants, and that the demo notices a wrong copy."""

import json
import re
from itertools import islice

import pytest
import torch

import fused_copy
from fused_copy import demo
from fused_copy.decode import DUMMY_SLOT, DecodeLoop, capture_buffers, capture_sizes, copy_each
from fused_copy.demo import Cost, Result
from fused_copy_cli import main

NAMES = ["input_ids", "out_loc", "cu_seqlens_k", "positions", "seq_lens", "page_table"]


def small_loop(page_size: int = 1, seed: int = 0) -> DecodeLoop:
    return DecodeLoop(
        max_bs=12, max_seq_len=100, prompt_len=(1, 60), new_tokens=(1, 30), page_size=page_size, seed=seed
    )


@pytest.mark.parametrize(
    ("max_bs", "sizes"),
    [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20]), (24, [1, 2, 4, 8, 16, 24])],
)
def test_capture_sizes(max_bs, sizes):
    assert capture_sizes(max_bs) == sizes


@pytest.mark.parametrize("page_size", [1, 4])
def test_step_is_consistent(page_size):
    loop = small_loop(page_size)
    for step in islice(loop, 400):
        input_ids, out_loc, cu_seqlens_k, positions, seq_lens, page_table = step.sources.values()
        assert list(step.sources) == NAMES
        assert all(source.dtype is torch.int32 and source.is_contiguous() for source in step.sources.values())
        assert step.running == len(loop.running)
        assert step.bs == min(size for size in capture_sizes(12) if size >= step.running)
        assert input_ids.shape == out_loc.shape == positions.shape == seq_lens.shape == (step.bs,)
        assert page_table.shape == (step.bs, step.max_seqlen_k)
        assert step.max_seqlen_k == seq_lens.max() < loop.max_seq_len
        assert cu_seqlens_k.tolist() == [0, *seq_lens.cumsum(0).tolist()]
        assert torch.equal(positions, seq_lens - 1)
        assert torch.equal(out_loc, page_table.gather(1, positions[:, None].long())[:, 0])
        for row, request in enumerate(loop.running):
            assert seq_lens[row] == request.seq_len
            slots = [page * page_size + offset for page in request.pages for offset in range(page_size)]
            assert page_table[row, : request.seq_len].tolist() == slots[: request.seq_len]
        assert (seq_lens[step.running :] == 1).all()
        assert (page_table[step.running :] == DUMMY_SLOT).all()


@pytest.mark.parametrize("page_size", [1, 4])
def test_pages_are_never_shared_and_always_returned(page_size):
    loop = small_loop(page_size)
    dummy_page = DUMMY_SLOT // page_size
    for _ in islice(loop, 2000):  # many times the requests that the pool could hold, were pages not returned
        pages = [page for request in loop.running for page in request.pages]
        assert len({dummy_page, *pages}) == len(pages) + 1
        assert max(pages) < loop.num_slots // page_size
        assert all(len(request.pages) == -(-request.seq_len // page_size) for request in loop.running)
    assert loop.served > 500


def test_batch_reaches_every_size():
    assert {step.bs for step in islice(small_loop(), 500)} == set(capture_sizes(12))


def test_deterministic_by_seed():
    def lists(seed: int) -> list[list[list[int]]]:
        return [[source.tolist() for source in step.sources.values()] for step in islice(small_loop(seed=seed), 100)]

    assert lists(1) == lists(1)
    assert lists(1) != lists(2)


def test_requests_must_fit():
    with pytest.raises(ValueError, match="can reach 90 tokens, but max_seq_len is 89"):
        DecodeLoop(max_seq_len=89, prompt_len=(1, 60), new_tokens=(1, 30))
    with pytest.raises(ValueError, match="start at 1"):
        DecodeLoop(new_tokens=(0, 30))


def test_copy_each_fills_the_corners_alone():
    loop = small_loop()
    buffers = capture_buffers(loop.max_bs, loop.max_seq_len)
    assert list(buffers) == NAMES
    for buffer in buffers.values():
        buffer.fill_(-7)
    step = next(loop)
    copy_each(buffers, step.sources)
    for name, source in step.sources.items():
        corner = tuple(slice(size) for size in source.shape)
        outside = torch.ones_like(buffers[name], dtype=torch.bool)
        outside[corner] = False
        assert torch.equal(buffers[name][corner], source)
        assert (buffers[name][outside] == -7).all()


def run_demo(*arguments: str) -> int:
    return main(["--device", "cpu", "--steps", "20", *arguments])


def test_without_a_gpu_it_says_what_was_checked_and_no_times(capsys, tmp_path):
    path = tmp_path / "demo.json"
    assert run_demo("--json", str(path)) == 0
    out = capsys.readouterr().out
    said = " ".join(out.split())
    assert "step 20/20" in out
    assert "Checked: 20 steps, bs " in said and "each byte of the buffers of fused_copy.replay and plan.replay" in said
    assert all(f"\n{name} " in out for name in NAMES)
    assert "There are no times here, as they mean something on a GPU only" in said
    assert not re.search(r"ratio|\dx\b|\bus\b", out)
    assert max(map(len, out.splitlines())) <= 80
    found = json.loads(path.read_text())
    assert found["steps"] == 20 and found["machine"]["torch"] == torch.__version__
    assert [cost["way"] for cost in found["costs"]] == ["torch's operators", "fused_copy.replay", "plan.replay"]
    calls = [cost["calls"] for cost in found["costs"]]
    assert calls[0] > 15 and calls[1:] == [1, 1]
    assert f"Python makes {calls[0]} calls of torch's operators, or one of fused_copy.replay or plan.replay" in said


def cost(way: str, calls: int, launches: float | None, us: float, gpu_us: float | None) -> Cost:
    return Cost(way, calls, launches, {"median": us, "p10": us - 1, "p90": us + 10}, gpu_us)


def on_gpu(*costs: Cost) -> Result:
    return Result({"gpu": "some GPU", "torch": "2.11.0"}, 500, 259, (1, 64), (142, 1513), costs)


def test_on_a_gpu_it_says_what_each_way_costs():
    text = demo.conclusion(
        on_gpu(
            cost("torch's operators", 24, 14.0, 180.34, 12.3),
            cost("fused_copy.replay", 1, 1.0, 9.1, 3.2),
            cost("plan.replay", 1, 1.0, 7.0, 3.15),
        )
    )
    rows = [line.split() for line in text.splitlines()]
    assert ["torch's", "operators", "24", "14", "180.3", "179.3-190.3", "1.0x", "12.30", "1.0x"] in rows
    assert ["fused_copy.replay", "1", "1", "9.1", "8.1-19.1", "19.8x", "3.20", "3.8x"] in rows
    assert ["plan.replay", "1", "1", "7.0", "6.0-17.0", "25.8x", "3.15", "3.9x"] in rows
    said = " ".join(text.split())
    assert "medians over the steps" in said and "Checked: 500 steps, bs 1 to 64" in said
    assert "plan.replay is 1 call, 1 launch and 7.0 us of the host; torch's operators are 24 calls, 14 launches" in said
    assert max(map(len, text.splitlines())) <= 80


def test_what_a_way_costs_on_a_gpu(monkeypatch):
    """Over all steps but the first tenth, which load what they use."""
    loop = small_loop()
    way, step = demo.Way(demo.PLAN, loop), next(loop)
    assert way.cost(step) == Cost("plan.replay", 1)
    way.graphs = {step.bs: None}
    way.host_us = [1000.0, 1000.0, *map(float, range(18))]
    filled = []
    monkeypatch.setattr(demo, "_gpu_cost", lambda fill, step: filled.append(fill) or (1.0, 2.5))
    assert way.cost(step) == Cost("plan.replay", 1, 1.0, {"median": 8.5, "p10": 2.0, "p90": 15.0}, 2.5)
    assert filled == [way.fill]


def test_a_profiler_that_sees_nothing_of_the_gpu():
    costs = [cost(way, calls, 0.0, us, 0.0) for way, calls, us in (("a", 24, 8.0), ("b", 1, 4.0), ("c", 1, 2.0))]
    text = demo.conclusion(on_gpu(*costs))
    assert ["c", "1", "2.0", "1.0-12.0", "4.0x"] in [line.split() for line in text.splitlines()]
    assert "c is 1 call and 2.0 us of the host; a are 24 calls and 8.0 us." in " ".join(text.split())


@pytest.mark.parametrize(("gpu", "how"), [("some GPU", "replaying a CUDA graph, one of 5"), (None, "eagerly on this")])
def test_it_begins_with_what_a_step_is(gpu, how):
    text = demo.introduction({"gpu": gpu, "cpu": "some CPU", "torch": "2.11.0"}, small_loop())
    assert text.startswith(f"{gpu or 'some CPU'}, torch 2.11.0\n")
    assert how in " ".join(text.split())
    assert [line.split()[0] for line in text.splitlines()[-7:-1]] == NAMES
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("skipped", NAMES)
def test_demo_notices_a_skipped_tensor(monkeypatch, capsys, skipped):
    replay, calls = fused_copy.replay, []

    def sabotaged(dst, src):
        calls.append(src)
        kept = [name for name in src if name != skipped or len(calls) < 4]
        replay({name: dst[name] for name in kept}, {name: src[name] for name in kept})

    monkeypatch.setattr(fused_copy, "replay", sabotaged)
    assert run_demo() == 1
    out = capsys.readouterr().out
    assert "step 3 " in out and f"fused_copy.replay: {skipped} is not its source" in out
    assert "Checked" not in out


@pytest.mark.parametrize("name", NAMES)
def test_demo_notices_a_write_outside_the_corner(monkeypatch, capsys, name):
    replay = fused_copy.replay

    def sabotaged(dst, src):
        replay(dst, src)
        dst[name].view(-1)[-1] = 0

    monkeypatch.setattr(fused_copy, "replay", sabotaged)
    assert run_demo() == 1
    assert f"{name} changed outside the leading corner: 0 instead of" in capsys.readouterr().out


def test_demo_notices_a_wrong_plan(monkeypatch, capsys):
    class Sabotaged(fused_copy.Plan):
        def __init__(self, buffers):
            super().__init__(buffers | {"out_loc": buffers["out_loc"].clone()})

    monkeypatch.setattr(fused_copy, "Plan", Sabotaged)
    assert run_demo() == 1
    assert "plan.replay: out_loc is not its source" in capsys.readouterr().out


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    def interrupted(dst, src):
        raise KeyboardInterrupt

    monkeypatch.setattr(fused_copy, "replay", interrupted)
    assert run_demo() == 130
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_steps_must_be_positive(steps):
    with pytest.raises(SystemExit) as exit:
        main(["--steps", steps])
    assert exit.value.code == 2
