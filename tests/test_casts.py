"""Casts on the CPU: every pair of castable dtypes gives what `Tensor.copy_` gives. tests/gpu has the same on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from arena import Arena, replay_in_calls
from mixes import CASTS, cast_batch, name, values

import fused_copy

DEVICE = "cpu"
every_cast = pytest.mark.parametrize("src, dst", CASTS, ids=[f"{name(s)}-{name(d)}" for s, d in CASTS])


def same_values(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Bit for bit, except that one NaN is as good as another: torch's vector code and scalar code differ in theirs."""
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.itemsize]
    same = found.view(raw) == expected.view(raw)
    return same | (found.isnan() & expected.isnan()) if found.is_floating_point() else same


def by_copy(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if values.dtype == torch.bool:
        values = values.view(torch.uint8) != 0  # the value of a bool's byte is false or true, also if it is 2
    return torch.empty(values.shape, dtype=dtype, device=values.device).copy_(values)


def spread(v: torch.Tensor) -> torch.Tensor:
    """The same values with others between them."""
    wide = torch.zeros(2 * len(v), dtype=v.dtype, device=v.device)
    wide[1::2].view(torch.uint8 if v.dtype == torch.bool else v.dtype).copy_(
        v.view(torch.uint8) if v.dtype == torch.bool else v
    )
    return wide[1::2]


# A multiple of four aligned elements is cast by vectors, all else one by one. `copy_` of a bool would tidy its byte.
SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "vectors": lambda v: v,
    "odd_size": lambda v: v[:-1],
    "odd_address": lambda v: v[1:],
    "strided": spread,
    "expanded_rows": lambda v: v.expand(3, -1),
    "expanded_columns": lambda v: v[:, None].expand(-1, 5),
    "transposed": lambda v: v.view(-1, 2).T,
    "one": lambda v: v[-1],
    "none": lambda v: v[:0],
}


def check_casts(replay, casts, device: str) -> None:
    """All shapes of all these casts in the same call."""
    src, dst, expected = [], [], []
    for from_dtype, to_dtype in casts:
        v = values(from_dtype, to_dtype).to(device)
        for shape in SHAPES.values():
            src.append(shape(v))
            dst.append(torch.zeros(src[-1].shape, dtype=to_dtype, device=device))
            expected.append(by_copy(src[-1], to_dtype))
    replay(dst, src)
    for s, d, e in zip(src, dst, expected, strict=True):
        wrong = (~same_values(d, e)).nonzero()
        assert not len(wrong), f"{s.dtype} {s[tuple(wrong[0])]} became {d[tuple(wrong[0])]}, not {e[tuple(wrong[0])]}"


@every_cast
def test_values_that_hurt(any_entry, src, dst):
    """Wrap-around, rounding and its ties, overflow to infinity, subnormals, -0.0, NaN, the limits of every integer."""
    check_casts(any_entry, [(src, dst)], DEVICE)


def test_all_casts_in_one_call(any_entry):
    check_casts(any_entry, CASTS, DEVICE)


@every_cast
def test_every_layout(src, dst):
    arena = Arena(cast_batch(src, dst), DEVICE)
    replay_in_calls(arena, fused_copy.replay)
    arena.check()


def test_the_numbers_themselves(any_entry):
    """Not only equal to copy_: what a reader expects."""
    big = torch.tensor([2**24 + 1, 2**53 + 1, -1, 300], dtype=torch.int64)
    dst = [torch.zeros(4, dtype=d) for d in (torch.int32, torch.float32, torch.float64, torch.uint8, torch.bool)]
    any_entry(dst, [big] * 5)
    assert dst[0].tolist() == [2**24 + 1, 1, -1, 300]
    assert dst[1].tolist() == [2**24, 2**53, -1, 300]
    assert dst[2].tolist() == [2**24 + 1, 2**53, -1, 300]
    assert dst[3].tolist() == [1, 1, 255, 44]
    assert dst[4].tolist() == [True] * 4
    halves = [torch.zeros(4, dtype=torch.float16), torch.zeros(4, dtype=torch.int8)]
    real = torch.tensor([65519.0, 65520.0, 2.0**-25, -0.0])
    any_entry(halves, [real, torch.tensor([1.9, -1.9, 127.5, -128.9])])
    assert halves[0].tolist() == [65504, float("inf"), 0, 0]
    assert halves[0].signbit().tolist() == [False, False, False, True]
    assert halves[1].tolist() == [1, -1, 127, -128]


def test_bool_bytes_above_one_count_as_one(any_entry):
    odd = torch.tensor([0, 1, 2, 0x80, 0xFF], dtype=torch.uint8).view(torch.bool)
    dst = [torch.zeros(5, dtype=d) for d in (torch.uint8, torch.int64, torch.bfloat16, torch.float64)]
    any_entry(dst, [odd] * 4)
    assert all(d.tolist() == [0, 1, 1, 1, 1] for d in dst)


def test_only_zero_becomes_false(any_entry):
    dst = torch.ones(6, dtype=torch.bool)
    any_entry([dst], [torch.tensor([0.0, -0.0, 1e-45, float("nan"), float("-inf"), 0.5])])
    assert dst.view(torch.uint8).tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("src, dst", [(torch.int64, torch.int32), (torch.uint8, torch.float64)], ids=name)
def test_more_than_one_tile(entry, src, dst):
    long = torch.arange(200_003, dtype=torch.int64).to(src)
    to = [torch.zeros(200_000, dtype=dst), torch.zeros(200_003, dtype=dst), torch.zeros(1000, 300, dtype=dst)]
    entry(to, [long[:200_000], long, long[:200_000].view(1000, 200)])
    assert torch.equal(to[0], long[:200_000].to(dst))
    assert torch.equal(to[1], long.to(dst))
    assert torch.equal(to[2][:, :200], long[:200_000].view(1000, 200).to(dst))
    assert not to[2][:, 200:].any()


@pytest.mark.parametrize("side", ["src", "dst"])
def test_a_cast_needs_aligned_elements(any_entry, side):
    """Copies of equal dtypes take any address; a cast reads and writes whole elements, and says so."""
    off = torch.zeros(41, dtype=torch.uint8)[1:]
    misaligned = torch.from_numpy(off.numpy()).view(torch.int32)
    other = torch.ones(10, dtype=torch.int64)
    dst, src = ([misaligned], [other]) if side == "dst" else ([other], [misaligned])
    with pytest.raises(RuntimeError) as caught:
        any_entry(dst, src)
    if any_entry.tells_why:
        assert "pair 0" in str(caught.value)
        assert "aligned" in str(caught.value)
    assert not misaligned.any()
    assert other.tolist() == [1] * 10


def test_a_cast_is_no_no_op_on_the_same_memory(entry):
    """int32 memory viewed as float32 is an overlap, not the very same tensor."""
    numbers = torch.arange(4, dtype=torch.int32)
    with pytest.raises(RuntimeError):
        entry([numbers], [numbers.view(torch.float32)])
    assert numbers.tolist() == [0, 1, 2, 3]


def test_casts_beside_copies_and_names():
    buffers = {"ids": torch.zeros(4, dtype=torch.int32), "scale": torch.zeros(2), "same": torch.zeros(3)}
    step = {"same": torch.ones(3), "scale": torch.ones(2, dtype=torch.bfloat16), "ids": torch.arange(3)}
    fused_copy.replay(buffers, step)
    assert [t.tolist() for t in buffers.values()] == [[0, 1, 2, 0], [1, 1], [1, 1, 1]]
