"""What is outside a source's corner: one number, or as it was. On the CPU; tests/gpu has the same on a GPU."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from arena import Arena, encoded, replay_in_calls
from cases import BYTE_DTYPES
from entries import REFERENCE
from mixes import exact_fills, fill_batch, inexact_fills, name, simple_fill

import fused_copy

DEVICE = "cpu"
INT = torch.int32

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

FILLABLE = [pytest.param(d, id=name(d)) for d in BYTE_DTYPES]
every_dtype = pytest.mark.parametrize("dtype", FILLABLE)


def refuses(entry, dst, src, fill, *words: str, exc=RuntimeError) -> None:
    before = [d.clone() for d in dst]
    with pytest.raises(exc) as caught:
        entry(dst, src, fill)
    assert all(torch.equal(d.view(torch.uint8), b.view(torch.uint8)) for d, b in zip(dst, before, strict=True))
    if entry.tells_why:
        for word in words:
            assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


# --- where --------------------------------------------------------------------------------------------------------


def test_tail_of_a_row(any_entry):
    dst = torch.full((6,), 9)
    any_entry([dst], [torch.tensor([1, 2])], [-1])
    assert dst.tolist() == [1, 2, -1, -1, -1, -1]


def test_rows_below_and_columns_beside(any_entry):
    dst = torch.full((3, 4), 9)
    any_entry([dst], [torch.tensor([[1, 2], [3, 4]])], [0])
    assert dst.tolist() == [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_every_corner_of_a_box(any_entry, rank):
    """Sources from nothing to everything, in every combination of dimensions."""
    size = (4, 3, 2, 3)[:rank]
    for corner in itertools.product(*(range(n + 1) for n in size)):
        dst, src = torch.full(size, 9.0), torch.rand(corner)
        expected = torch.full(size, -2.0)
        expected[tuple(slice(0, n) for n in corner)] = src
        any_entry([dst], [src], [-2])
        assert torch.equal(dst, expected), corner


def test_a_scalar_has_no_outside(any_entry):
    dst = torch.tensor(9)
    any_entry([dst], [torch.tensor(1)], [-1])
    assert dst.item() == 1


def test_nothing_is_filled_where_the_source_is_as_large(any_entry):
    dst = torch.zeros(2, 3)
    any_entry([dst], [torch.ones(2, 3)], [7])
    assert (dst == 1).all()


@pytest.mark.parametrize("source", [(0,), (0, 4), (3, 0), (0, 0)], ids=str)
def test_an_empty_source_fills_everything(any_entry, source):
    dst = torch.zeros((5, 6)[: len(source)])
    any_entry([dst], [torch.zeros(source)], [7])
    assert (dst == 7).all()


def test_an_empty_destination_with_a_fill(any_entry):
    any_entry([torch.zeros(0), torch.zeros(3, 0)], [torch.zeros(0), torch.zeros(2, 0)], [1, 2])


@every_dtype
def test_every_layout(entry, dtype):
    """Strided, pitched, transposed destinations at every misalignment: gaps between the elements stay untouched."""
    arena = Arena(fill_batch(dtype, simple_fill(dtype)), DEVICE, source_bytes=range(256))
    replay_in_calls(arena, entry)
    arena.check()


@pytest.mark.parametrize("dtype", [torch.int16, torch.complex64, torch.complex128], ids=name)
def test_more_than_one_tile(entry, dtype):
    flat, block = torch.zeros(100_001, dtype=dtype)[1:], torch.zeros(300, 1001, dtype=dtype)[:, :1000]
    entry([flat, block], [torch.ones(3, dtype=dtype), torch.ones(200, 7, dtype=dtype)], [-5, 6])
    assert (flat[:3] == 1).all()
    assert (flat[3:] == -5).all()
    assert (block[:200, :7] == 1).all()
    assert (block[200:] == 6).all()
    assert (block[:, 7:] == 6).all()
    assert (block._base[:, 1000] == 0).all()


def test_only_the_view_that_was_passed_is_filled(any_entry):
    """The caller chooses the extent by the view."""
    buffer = torch.zeros(10, dtype=INT)
    any_entry([buffer[2:7]], [torch.ones(2, dtype=INT)], [-1])
    assert buffer.tolist() == [0, 0, 1, 1, -1, -1, -1, 0, 0, 0]


def test_strided_destination(any_entry):
    buffer = torch.zeros(3, 8, dtype=INT)
    any_entry([buffer[:, ::2]], [torch.ones(2, 2, dtype=INT)], [5])
    assert buffer.tolist() == [[1, 0, 1, 0, 5, 0, 5, 0], [1, 0, 1, 0, 5, 0, 5, 0], [5, 0, 5, 0, 5, 0, 5, 0]]


def test_with_a_cast(any_entry):
    """The number is the destination's: it does not pass through the source's dtype."""
    dst = [torch.zeros(4, dtype=INT), torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(3)]
    src = [torch.tensor([2**40 + 5]), torch.tensor([[3]]), torch.tensor([True])]
    any_entry(dst, src, [-1, 1.5, 0.5])
    assert dst[0].tolist() == [5, -1, -1, -1]
    assert dst[1].tolist() == [[3, 1.5, 1.5], [1.5, 1.5, 1.5]]
    assert dst[2].tolist() == [1, 0.5, 0.5]


def test_source_that_is_the_corner_itself(any_entry):
    """Nothing to copy, and the rest is filled all the same."""
    row, block = torch.arange(5), torch.arange(12).view(3, 4)
    any_entry([row, block], [row[:2], block[:2, :3]], [-1, -2])
    assert row.tolist() == [0, 1, -1, -1, -1]
    assert block.tolist() == [[0, 1, 2, -2], [4, 5, 6, -2], [-2, -2, -2, -2]]


def test_beside_pairs_without_one(any_entry):
    dst = [torch.zeros(3) for _ in range(4)]
    any_entry(dst, [torch.ones(1)] * 4, [None, 5, None, 0])
    assert [d.tolist() for d in dst] == [[1, 0, 0], [1, 5, 5], [1, 0, 0], [1, 0, 0]]


def test_stale_tail_after_a_larger_batch(any_entry):
    """What the hazard is about: a graph reads all of the buffers, so a small step after a large one must clear it."""
    seq_lens, out_loc = torch.full((8,), 77, dtype=INT), torch.full((8,), 77, dtype=INT)
    table = torch.full((8, 6), 77, dtype=INT)
    for bs, width in [(8, 6), (3, 2), (5, 1), (0, 0), (8, 6), (1, 6)]:
        step = [torch.full(size, 100 + bs, dtype=INT) for size in ((bs,), (bs,), (bs, width))]
        any_entry([seq_lens, out_loc, table], step, [1, 0, -1])
        assert seq_lens.tolist() == [100 + bs] * bs + [1] * (8 - bs)
        assert out_loc.tolist() == [100 + bs] * bs + [0] * (8 - bs)
        assert table.tolist() == [[100 + bs] * width + [-1] * (6 - width)] * bs + [[-1] * 6] * (8 - bs)


# --- which number -------------------------------------------------------------------------------------------------


@every_dtype
def test_numbers_that_the_dtype_holds(entry, dtype):
    """Bit for bit what torch makes of the number, signs of zeros, subnormals and limits included."""
    for number in exact_fills(dtype):
        dst = torch.zeros(9 * dtype.itemsize, dtype=torch.uint8).view(dtype)
        entry([dst], [dst[:0].clone()], [number])
        expected = encoded(number, dtype)
        if isinstance(number, float) and math.isnan(number):
            assert dst.to(torch.complex64 if dtype.is_complex else torch.float64).isnan().all()
        else:
            assert torch.equal(dst.view(torch.uint8), expected.repeat(9)), number


@pytest.mark.parametrize("dtype", BYTE_DTYPES, ids=name)
def test_numbers_that_the_dtype_does_not_hold(any_entry, dtype):
    """The text says which number and which dtype; the pairs before and after are left alone too."""
    for number in inexact_fills(dtype):
        odd = torch.zeros(6 * dtype.itemsize, dtype=torch.uint8).view(dtype)
        dst = [torch.zeros(3), odd, torch.zeros(3)]
        src = [torch.ones(2), odd[:2].clone(), torch.ones(2)]
        refuses(any_entry, dst, src, [None, number, 4], "pair 1", name(dtype), "exactly")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=name)
def test_minus_one_as_a_sentinel(any_entry, dtype):
    dst = torch.zeros(5, dtype=dtype)
    any_entry([dst], [torch.ones(2, dtype=dtype)], [-1])
    assert dst.tolist() == [1, 1, -1, -1, -1]


def test_a_number_is_refused_even_where_nothing_would_be_filled(any_entry):
    """Whether a call is right must not depend on this step's sizes."""
    refuses(any_entry, [torch.zeros(3, dtype=INT)], [torch.ones(3, dtype=INT)], [0.5], "pair 0", "0.5")


def test_integers_beyond_a_double():
    """2**53 + 1 would arrive as 2**53, so it is refused and not rounded."""
    dst = torch.zeros(3, dtype=torch.int64)
    for number in (2**53 + 1, 2**63 - 1, 10**400, -(10**400)):
        with pytest.raises((TypeError, RuntimeError), match="pair 0"):
            fused_copy.replay([dst], [torch.ones(1, dtype=torch.int64)], [number])
    assert dst.tolist() == [0, 0, 0]


class Exact:
    """A number of any kind that knows what it is equal to."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __float__(self) -> float:
        return float(self.number)

    def __eq__(self, other: object) -> bool:
        return self.number == other

    __hash__ = None


ODD = 2**53 + 1
INEXACT = {
    "np.int64": lambda: np.int64(ODD),
    "np.uint64": lambda: np.uint64(2**64 - 1),
    "np.longdouble": lambda: np.longdouble(1) + np.finfo(np.longdouble).eps,
    "tensor": lambda: torch.tensor(ODD),
    "Fraction": lambda: Fraction(ODD),
    "a third": lambda: Fraction(1, 3),
    "Decimal": lambda: Decimal(ODD),
    "a tenth": lambda: Decimal("0.1"),
    "object": lambda: Exact(ODD),
}


@pytest.mark.parametrize("kind", INEXACT)
@pytest.mark.parametrize("way", ["function", "plan", "reference"])
def test_a_number_of_any_kind_is_compared_exactly(kind, way):
    """Whatever is not a float could become another number on its way to one, as an int could."""
    number = INEXACT[kind]()
    if kind == "np.longdouble" and number == 1:
        pytest.skip("a long double is a double here")
    dst, source = torch.zeros(3, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"pair 0: fill is .* a number that a float holds exactly"):
        if way == "plan":
            fused_copy.Plan([dst], [number]).replay(source)
        else:
            (fused_copy.replay if way == "function" else REFERENCE)([dst], [source], [number])
    assert dst.tolist() == [0, 0, 0]


class Bare:
    def __float__(self) -> float:
        return 7.0


EXACT = [np.int64(7), np.uint8(7), np.float32(7), np.float16(7), np.longdouble(7), torch.tensor(7), torch.tensor(7.0)]
EXACT += [Fraction(7), Decimal(7), Exact(7), Bare(), torch.tensor([7])]


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("number", EXACT, ids=lambda number: type(number).__name__)
def test_a_number_of_any_kind_that_is_exact(number):
    dst = torch.zeros(3, dtype=torch.int64)
    fused_copy.replay([dst], [torch.ones(1, dtype=torch.int64)], [number])
    assert dst.tolist() == [1, 7, 7]


def test_nan_of_any_kind():
    for number in (np.float32("nan"), Decimal("nan"), torch.tensor(math.nan)):
        dst = torch.zeros(2)
        fused_copy.replay([dst], [torch.ones(1)], [number])
        assert dst[1].isnan()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RecursionError, ZeroDivisionError])
def test_errors_of_a_number_pass(error):
    class Number:
        def __float__(self) -> float:
            raise error

    class Index:
        def __float__(self) -> float:
            return 7.0

        def __index__(self) -> int:
            raise error

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None

    dst = torch.zeros(3)
    for number in (Number(), Index()):
        with pytest.raises(error):
            fused_copy.replay([dst], [torch.ones(1)], [number])
        with pytest.raises(error):
            fused_copy.Plan([dst], [number])
    assert not dst.any()


def test_the_text_says_how_to_get_a_number_that_fits():
    with pytest.raises(RuntimeError, match=r"fill 0\.1 .* float\(torch\.tensor\(0\.1, dtype=torch\.float32\)\)"):
        fused_copy.replay([torch.zeros(2)], [torch.ones(1)], [0.1])
    dst = torch.zeros(2)
    fused_copy.replay([dst], [torch.ones(1)], [float(torch.tensor(0.1, dtype=torch.float32))])
    assert torch.equal(dst[1], torch.tensor(0.1))


def test_the_raw_op_is_given_floats():
    """Its schema says so, and torch's parser makes them before the op sees a number; the function and plans compare."""
    dst, source = torch.zeros(3, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    torch.ops.fused_copy.replay([dst], [source], [ODD])
    assert dst.tolist() == [1, 2**53, 2**53]


@pytest.mark.parametrize("dynamic", [False, True], ids=["constant", "symbolic"])
def test_traced_code_refuses_integers_beyond_a_double(dynamic):
    """The op's schema makes floats of them."""
    torch.compiler.reset()
    dst, source = torch.zeros(3, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    compiled = torch.compile(lambda d, s, n: fused_copy.replay([d], [s], [n]), backend="eager", dynamic=dynamic)
    for exact in (5, 2**53, 2**53 + 2, 2**60, -(2**63)):
        compiled(dst, source, exact)
        assert dst.tolist() == [1, exact, exact]
    dst.zero_()
    for number in (ODD, -ODD, 2**54 + 2, 2**60 + 1):
        with pytest.raises((TypeError, RuntimeError), match=f"pair 0: fill is {number}"):
            compiled(dst, source, number)
    assert dst.tolist() == [0, 0, 0]


@pytest.mark.parametrize("fill", [["1"], [[1]], [1j], [object], "1", 5], ids=str)
def test_fills_that_are_no_numbers(any_entry, fill):
    exc = (TypeError, RuntimeError) if any_entry.name == "op" else TypeError  # torch.ops parses its arguments itself
    refuses(any_entry, [torch.zeros(3)], [torch.ones(1)], fill, exc=exc)


# --- how many, and for whom ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 7])
def test_wrong_number_of_fills(any_entry, n):
    dst, src = [torch.zeros(3), torch.zeros(3)], [torch.ones(2), torch.ones(2)]
    refuses(any_entry, dst, src, [1.0] * n, str(n), "2", "fill")
    refuses(any_entry, dst, src, [None] * n, str(n), "2", "fill")


def test_no_fills_for_some_destinations(any_entry):
    refuses(any_entry, [torch.zeros(3)], [torch.ones(2)], [], "0", "1", "fill")


def test_no_fills_for_no_destinations(any_entry):
    any_entry([], [], [])


def test_fills_by_name():
    buffers = {name: torch.full((4,), 9, dtype=INT) for name in ("ids", "seq_lens", "out_loc")}
    step = {name: torch.ones(2, dtype=INT) for name in reversed(buffers)}
    fused_copy.replay(buffers, step, fill={"out_loc": 0, "seq_lens": 5})
    assert {k: v.tolist() for k, v in buffers.items()} == {
        "ids": [1, 1, 9, 9],
        "seq_lens": [1, 1, 5, 5],
        "out_loc": [1, 1, 0, 0],
    }


def test_a_refused_number_names_its_buffer():
    with pytest.raises(RuntimeError, match=r"pair 1.*seq_lens.*0\.5.*int32"):
        fused_copy.replay(
            {"ids": torch.zeros(3), "seq_lens": torch.zeros(3, dtype=INT)},
            {"ids": torch.ones(1), "seq_lens": torch.ones(1, dtype=INT)},
            fill={"seq_lens": 0.5},
        )


def test_a_fill_for_a_name_that_is_not_there():
    with pytest.raises(KeyError, match="slots"):
        fused_copy.replay({"ids": torch.zeros(3)}, {"ids": torch.ones(1)}, fill={"slots": -1})


def test_a_sequence_of_fills_for_named_destinations():
    with pytest.raises(TypeError, match="mapping"):
        fused_copy.replay({"ids": torch.zeros(3)}, {"ids": torch.ones(1)}, fill=[-1])


def test_named_fills_for_a_sequence_of_destinations():
    dst = torch.zeros(3)
    with pytest.raises(TypeError):
        fused_copy.replay([dst], [torch.ones(1)], fill={0: -1})


@pytest.mark.parametrize("number", [1, 1.0, True], ids=repr)
def test_numbers_of_any_kind(any_entry, number):
    dst = torch.zeros(3, dtype=INT)
    any_entry([dst], [torch.full((1,), 7, dtype=INT)], (number,))
    assert dst.tolist() == [7, 1, 1]


def test_numpy_numbers():
    np = pytest.importorskip("numpy")
    dst = [torch.zeros(2, dtype=INT), torch.zeros(2)]
    fused_copy.replay(dst, [d[:0].clone() for d in dst], [np.int64(-1), np.float32(0.5)])
    assert [d.tolist() for d in dst] == [[-1, -1], [0.5, 0.5]]


def test_a_fill_counts_as_a_write_for_autograd(entry):
    saved, weight = torch.ones(4), torch.ones(4, requires_grad=True)
    loss = (saved * weight).sum()
    entry([saved], [torch.ones(0)], [5])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_source_in_the_part_that_is_filled(any_entry):
    buffer = torch.arange(8)
    refuses(any_entry, [buffer], [buffer[6:]], [0], "pair 0", "shares memory")
