"""How many launches a call takes, and what `explain` says of it before."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from arena import Arena
from cases import LAYOUTS, decode_buffers, decode_step, pair
from mixes import mixed_pair

import fused_copy

INT = torch.int32

# A kernel takes 32,764 bytes of parameters, of which launches use pairs of words; CUDA 12.1 brought that limit.
LIMIT = 32_752
STRIDED = 96  # a pair of several rows
EXTENT = 24  # of each dimension beyond the second
BEYOND = 32  # the last pair: a kernel reads of every pair as much as one of several rows has
NUMBERS = 32  # where the tiles of eight pairs begin


def first_tiles_bytes(n: int) -> int:
    """Where the tiles of `n` pairs begin, above that every eighth of these, and so on until there are eight."""
    eights = -(-n // 8)
    return NUMBERS * eights + (first_tiles_bytes(eights) if n > 8 else 0)


def dense_bytes(n: int) -> int:
    """A header, the pairs' first tiles, and `n` pairs of rows that lie side by side."""
    return 16 + first_tiles_bytes(n) + 32 * n + BEYOND


CAPACITY = max(n for n in range(2000) if dense_bytes(n) <= LIMIT)


def dense_pairs(n: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`n` rows of four, of which three are copied: each destination has an element that must stay."""
    buffer, source = torch.zeros(n, 4, dtype=INT), torch.arange(1, 3 * n + 1, dtype=INT).view(n, 3)
    return list(buffer.unbind()), list(source.unbind())


# --- long lists ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [CAPACITY - 1, CAPACITY, CAPACITY + 1, 2 * CAPACITY, 2 * CAPACITY + 1, 5000])
def test_as_few_launches_as_fit(entry, n):
    dst, src = dense_pairs(n)
    plan = fused_copy.explain(dst, src)
    assert plan.launches == -(-n // CAPACITY)
    full, rest = divmod(n, CAPACITY)
    assert plan.parameter_bytes == (dense_bytes(CAPACITY),) * full + ((dense_bytes(rest),) if rest else ())
    entry(dst, src)
    found, expected = torch.stack(dst), torch.stack(src)
    assert torch.equal(found[:, :3], expected)
    assert not found[:, 3].any()


@pytest.mark.parametrize("position", ["first", "last", "throughout"])
def test_strided_pairs_among_dense_ones(entry, position):
    """A strided pair takes more room: the boundary between two launches falls elsewhere, and nothing is lost there."""
    n = 1500
    strided = {"first": range(40), "last": range(n - 40, n), "throughout": range(0, n, 7)}[position]
    pairs = [pair(LAYOUTS["row_pitch"] if i in strided else LAYOUTS["corner"], INT) for i in range(n)]
    arena = Arena(pairs, "cpu")
    check_packing(fused_copy.explain(arena.dst, arena.src), largest=STRIDED + NUMBERS)
    entry(arena.dst, arena.src)
    arena.check()


def check_packing(plan: fused_copy.Explanation, largest: int) -> None:
    """No launch is beyond the limit, and none was closed while the next piece of work would have fitted."""
    assert plan.launches > 1
    assert max(plan.parameter_bytes) <= LIMIT
    assert min(plan.parameter_bytes[:-1]) > LIMIT - largest


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_thousands_of_mixed_pairs(entry):
    """Copies, casts and fills of every layout: a pair's own copy and fills may lie in different launches."""
    rng = random.Random(0)
    arena = Arena([mixed_pair(i, rng) for i in range(2000)], "cpu")
    check_packing(fused_copy.explain(arena.dst, arena.src, arena.fill), largest=STRIDED + 3 * EXTENT + NUMBERS)
    entry(arena.dst, arena.src, arena.fill)
    arena.check()


def test_a_late_mistake_in_a_long_list_writes_nothing(entry):
    """All launches are planned and checked before the first one starts."""
    dst, src = dense_pairs(3 * CAPACITY)
    src[-1] = torch.ones(5, dtype=INT)
    with pytest.raises(RuntimeError) as caught:
        entry(dst, src)
    assert not torch.stack(dst).any()
    if entry.tells_why:
        assert f"pair {3 * CAPACITY - 1}" in str(caught.value)


def test_a_short_list_after_a_long_one(entry):
    """Planning keeps its memory from call to call; a short call must not repeat the rest of a long one."""
    dst, src = dense_pairs(2 * CAPACITY)
    entry(dst, src)
    for d in dst:
        d.zero_()
    entry(dst[:1], src[:1])
    assert torch.stack(dst).sum() == src[0].sum()
    assert fused_copy.explain(dst[:1], src[:1]).launches == 1


# --- explain ------------------------------------------------------------------------------------------------------


def test_the_six_tensors_are_one_launch():
    buffers, step = decode_buffers(8, 40), decode_step(3, 17)
    plan = fused_copy.explain(buffers, step)
    assert plan.launches == 1
    assert plan.device == torch.device("cpu")
    assert plan.bytes == 4 * sum(t.numel() for t in step.values())
    assert [p.name for p in plan.pairs] == list(buffers)
    assert [p.index for p in plan.pairs] == list(range(6))
    assert [p.src_shape for p in plan.pairs] == [tuple(t.shape) for t in step.values()]
    assert [p.dst_shape for p in plan.pairs] == [tuple(t.shape) for t in buffers.values()]


def one(dst: torch.Tensor, src: torch.Tensor, fill: float | None = None):
    return fused_copy.explain([dst], [src], [fill]).pairs[0]


def test_the_path_says_how_a_pair_is_written():
    dense = one(torch.zeros(8), torch.ones(8))
    assert "copy" in dense.path and "16" in dense.path
    assert "strided" in one(torch.zeros(8, 8), torch.ones(4, 4).T).path
    cast = one(torch.zeros(8, dtype=INT), torch.ones(8, dtype=torch.int64))
    assert "cast" in cast.path
    assert (cast.src_dtype, cast.dst_dtype, cast.bytes) == (torch.int64, INT, 32)
    filled = one(torch.zeros(8), torch.ones(3), -1)
    assert "copy" in filled.path and "fill" in filled.path
    assert "fill" in one(torch.zeros(8), torch.ones(0), -1).path
    same = torch.zeros(8)
    assert one(same, same).path == "nothing to do"


@pytest.mark.parametrize(
    "dst, src, fill, nbytes",
    [
        ((8,), (3,), None, 12),
        ((8,), (3,), 1, 32),
        ((8,), (0,), 1, 32),
        ((4, 5), (2, 3), None, 24),
        ((4, 5), (2, 3), 1, 80),
        ((2, 3, 4, 5), (1, 2, 3, 4), 1, 480),
        ((700, 131), (600, 129), None, 4 * 600 * 129),
        ((), (), 1, 4),
        ((0,), (0,), 1, 0),
    ],
)
def test_bytes_are_what_is_written(dst, src, fill, nbytes):
    """With a fill, that is every element of the destination once."""
    plan = fused_copy.explain([torch.zeros(dst)], [torch.ones(src)], [fill])
    assert plan.bytes == plan.pairs[0].bytes == nbytes


def test_ragged_rows_count_their_bytes_once():
    source = torch.ones(4001, dtype=torch.uint8)
    assert one(torch.zeros(4003, dtype=torch.uint8)[3:], source[3:]).bytes == 3998


def test_str_is_a_table():
    buffers, step = decode_buffers(8, 40), decode_step(3, 17)
    text = str(fused_copy.explain(buffers, step, fill={"seq_lens": 1}))
    head, columns, *rows = text.splitlines()
    assert "1 launch on cpu" in head
    assert columns.split() == ["pair", "source", "destination", "bytes", "path"]
    assert len(rows) == 6
    for row, name in zip(rows, buffers, strict=True):
        assert name in row
    assert "int32[3, 17]" in rows[-1] and "int32[8, 40]" in rows[-1]
    assert "fill" in rows[4]


def test_str_counts_launches():
    assert str(fused_copy.explain(*dense_pairs(CAPACITY + 1))).startswith("2 launches on cpu")


def test_explaining_nothing():
    plan = fused_copy.explain([], [])
    assert (plan.launches, plan.bytes, plan.pairs, plan.device) == (0, 0, (), None)
    assert "0 launches" in str(plan)
    assert fused_copy.explain([torch.zeros(3)], [torch.ones(0)]).launches == 0


def test_explain_writes_nothing():
    buffers, step = decode_buffers(8, 40), decode_step(3, 17)
    versions = [b._version for b in buffers.values()]
    fused_copy.explain(buffers, step, fill=dict.fromkeys(buffers, 1))
    assert all((b == -7).all() for b in buffers.values())
    assert [b._version for b in buffers.values()] == versions


def test_an_explanation_cannot_be_changed():
    plan = fused_copy.explain([torch.zeros(3)], [torch.ones(2)])
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.pairs = ()


def test_explain_needs_plain_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.zeros(3))
    with pytest.raises(TypeError, match="plain"):
        fused_copy.explain([fake], [fake])
