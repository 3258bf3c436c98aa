"""The demo and its decode loop, on the CPU: the loop's invariants, and that the demo notices a wrong copy."""

import importlib.metadata
from itertools import islice

import pytest
import torch

import fused_copy
from fused_copy.__main__ import main
from fused_copy.decode import DUMMY_SLOT, DecodeLoop, capture_buffers, capture_sizes, copy_each

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


def demo(steps: int = 20) -> int:
    return main(["--device", "cpu", "--steps", str(steps)])


def test_demo_passes(capsys):
    assert demo() == 0
    out = capsys.readouterr().out
    assert "step 20/20" in out
    assert "every step matched" in out
    calls = {line[:17]: int(line[17:].split()[0]) for line in out.splitlines()[-3:-1]}
    assert calls["torch's operators"] > 15 and calls["fused_copy.replay"] == 1


@pytest.mark.parametrize("skipped", NAMES)
def test_demo_notices_a_skipped_tensor(monkeypatch, capsys, skipped):
    replay, calls = fused_copy.replay, []

    def sabotaged(dst, src):
        calls.append(src)
        kept = [name for name in src if name != skipped or len(calls) < 4]
        replay({name: dst[name] for name in kept}, {name: src[name] for name in kept})

    monkeypatch.setattr(fused_copy, "replay", sabotaged)
    assert demo() == 1
    out = capsys.readouterr().out
    assert "step 3 " in out and f"{skipped} is not its source" in out
    assert "every step matched" not in out


@pytest.mark.parametrize("name", NAMES)
def test_demo_notices_a_write_outside_the_corner(monkeypatch, capsys, name):
    replay = fused_copy.replay

    def sabotaged(dst, src):
        replay(dst, src)
        dst[name].view(-1)[-1] = 0

    monkeypatch.setattr(fused_copy, "replay", sabotaged)
    assert demo() == 1
    assert f"{name} changed outside the leading corner: 0 instead of" in capsys.readouterr().out


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    def interrupted(dst, src):
        raise KeyboardInterrupt

    monkeypatch.setattr(fused_copy, "replay", interrupted)
    assert demo() == 130
    assert capsys.readouterr().err == ""


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fused-copy {importlib.metadata.version('fused-copy')}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_steps_must_be_positive(steps):
    with pytest.raises(SystemExit) as exit:
        main(["--steps", steps])
    assert exit.value.code == 2
