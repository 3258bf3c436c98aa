"""What a replay refuses: with which error, saying what, and without having written a byte."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence

import pytest
import torch
from cases import BYTE_DTYPES, CAST_DTYPES, decode_buffers, decode_step
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_copy

INT = torch.int32


def bytes_of(tensors: Sequence[object]) -> list[torch.Tensor]:
    """Copies of all memory behind these tensors. What is not plain (sparse, nested, meta, fake) has none to show."""
    plain = [
        t
        for t in tensors
        if type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.layout == torch.strided
        and not t.is_nested
        and t.device.type != "meta"
    ]
    return [torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).clone() for t in plain]


def refuses(entry, dst, src, *words: str, exc=RuntimeError, told: bool = True) -> str:
    """The call raises `exc`, its text holds every one of `words` (regular expressions), and no byte changed.

    told=False: torch itself may turn the raw op's call away before our code runs, so there only the type counts.
    """
    before = bytes_of([*dst, *src])
    with pytest.raises(exc) as caught:
        entry(dst, src)
    after = bytes_of([*dst, *src])
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), "the call raised, but wrote"
    text = str(caught.value)
    if entry.tells_why and (told or entry.name != "op"):
        for word in words:
            assert re.search(word, text, re.IGNORECASE), f"{word!r} is not in: {text}"
    return text


def among(dst, src, at: int = 3, of: int = 6) -> tuple[list, list]:
    """The pair in question as number `at` in a list of pairs that are all right."""
    dsts = [torch.zeros(8, dtype=INT) for _ in range(of)]
    srcs = [torch.ones(5, dtype=INT) for _ in range(of)]
    dsts[at], srcs[at] = dst, src
    return dsts, srcs


def shape(size: Sequence[int]) -> str:
    """A regular expression for a shape, in whatever brackets: (4, 1, 5), (20,), [20], [], ()."""
    return rf"[\[(]{', ?'.join(map(str, size))},?[\])]"


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- lists --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_dst, n_src", [(2, 3), (3, 2), (1, 0), (0, 1)])
def test_lists_of_different_lengths(entry, n_dst, n_src):
    dst = [torch.zeros(4) for _ in range(n_dst)]
    src = [torch.ones(4) for _ in range(n_src)]
    with pytest.raises(RuntimeError):
        torch._foreach_copy_(dst, src)
    refuses(entry, dst, src, rf"\b{n_dst}\b", rf"\b{n_src}\b")


@pytest.mark.parametrize("side, wrong", [("dst", None), ("src", object())], ids=["dst", "src"])
def test_what_is_no_tensor_in_a_list(entry, side, wrong):
    """None for a source leaves its pair out."""
    dst, src = among(torch.zeros(8), torch.ones(5))
    (dst if side == "dst" else src)[3] = wrong
    # torch.ops refuses it while it parses the arguments, with an error type of its own.
    exc = TypeError if entry.name != "op" else (TypeError, RuntimeError)
    refuses(entry, dst, src, r"\bpair 3\b", "tensor", type(wrong).__name__, exc=exc, told=False)


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dst_size, src_size", [((6, 4, 5), (20,)), ((20,), (4, 1, 5)), ((4,), ()), ((), (1,))])
def test_rank_mismatch(entry, dst_size, src_size):
    dst, src = among(torch.zeros(dst_size, dtype=INT), torch.ones(src_size, dtype=INT))
    came, expected = (rf"\b{len(size)}\b|{shape(size)}" for size in (src_size, dst_size))
    refuses(entry, dst, src, r"\bpair 3\b", "dim|rank", came, expected)


@pytest.mark.parametrize("at", [0, 3, 5])
def test_the_text_names_the_pair(entry, at):
    dst, src = among(torch.zeros(4, 4, dtype=INT), torch.ones(4, dtype=INT), at=at)
    refuses(entry, dst, src, rf"\bpair {at}\b")


@pytest.mark.parametrize(
    "dst_size, src_size, had, came",
    [((37,), (39,), 37, 39), ((6, 37), (6, 41), 37, 41), ((23, 5), (29, 5), 23, 29), ((2, 37, 3), (2, 38, 2), 37, 38)],
)
def test_source_wider_than_its_destination(entry, dst_size, src_size, had, came):
    dst, src = among(torch.zeros(dst_size, dtype=INT), torch.ones(src_size, dtype=INT))
    refuses(entry, dst, src, r"\bpair 3\b", "size|shape|wide|larg|exceed|fit", rf"\b{had}\b", rf"\b{came}\b")


def test_source_wider_than_an_empty_destination(entry):
    """An empty destination copies nothing, but a source that does not fit it is a mistake all the same."""
    refuses(entry, *among(torch.zeros(0, dtype=INT), torch.ones(5, dtype=INT)), r"\bpair 3\b")
    refuses(entry, *among(torch.zeros(4, 3, dtype=INT), torch.ones(0, 5, dtype=INT)), r"\bpair 3\b")


def test_more_than_four_dims_that_do_not_merge(entry):
    size, stride = (2, 2, 2, 2, 2), (81, 27, 9, 3, 1)
    room = torch.zeros(256, dtype=INT)
    dst, src = among(room.as_strided(size, stride), torch.ones(256, dtype=INT).as_strided(size, stride))
    refuses(entry, dst, src, r"\bpair 3\b", "dim", r"\b4\b|four", r"\b5\b|five")


# --- dtypes -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dst_dtype", BYTE_DTYPES, ids=name)
def test_dtype_pairs_outside_the_table(entry, dst_dtype):
    """Every pair of different dtypes that the contract does not convert, those of one size included."""
    others = [d for d in BYTE_DTYPES if d != dst_dtype and not {d, dst_dtype} <= CAST_DTYPES]
    for src_dtype in others:
        dst, src = among(torch.zeros(8, dtype=INT).view(dst_dtype)[:2], torch.ones(8, dtype=INT).view(src_dtype)[:2])
        refuses(entry, dst, src, r"\bpair 3\b", "dtype|type", name(src_dtype), name(dst_dtype))


SUB_BYTE = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)]


@pytest.mark.parametrize("dtype", [getattr(torch, n) for n in SUB_BYTE if hasattr(torch, n)], ids=name)
def test_sub_byte_dtypes(entry, dtype):
    dst, src = among(torch.zeros(8, dtype=torch.uint8).view(dtype), torch.ones(8, dtype=torch.uint8).view(dtype))
    refuses(entry, dst, src, r"\bpair 3\b", "dtype|type", told=False)


# --- overlap ------------------------------------------------------------------------------------------------------


def two_storages() -> tuple[torch.Tensor, torch.Tensor]:
    """One buffer, two tensors that know nothing of each other."""
    memory = bytearray(96)
    return torch.frombuffer(memory, dtype=INT), torch.frombuffer(memory, dtype=INT)


def other(n: int = 8) -> torch.Tensor:
    return torch.ones(n, dtype=INT)


def shifted_within_a_pair():
    buf = torch.arange(24, dtype=INT)
    return [buf[:16]], [buf[8:]]


def shifted_by_one_byte():
    buf = torch.arange(24, dtype=torch.uint8)
    return [buf[:16]], [buf[15:20]]


def source_inside_its_destination_off_the_corner():
    buf = torch.arange(24, dtype=INT).view(4, 6)
    return [buf], [buf[1:2, 2:4]]


def source_in_the_destinations_tail():
    """The corner is free of it, but the destination that was passed is the whole tensor."""
    buf = torch.arange(24, dtype=INT)
    return [buf], [buf[20:]]


def transposed_onto_itself():
    buf = torch.arange(25, dtype=INT).view(5, 5)
    return [buf], [buf.T]


def same_bytes_as_other_strides():
    buf = torch.arange(24, dtype=INT)
    return [buf.view(4, 6)], [buf.as_strided((4, 6), (1, 4))]


def shifted_through_two_storages():
    a, b = two_storages()
    return [a[:16]], [b[8:]]


def destination_and_another_pairs_source():
    buf = torch.arange(24, dtype=INT)
    return [buf[:16], torch.zeros(8, dtype=INT)], [other(), buf[15:20]]


def destination_and_another_pairs_source_through_two_storages():
    a, b = two_storages()
    return [a[:16], torch.zeros(8, dtype=INT)], [other(), b[15:20]]


def same_memory_across_pairs():
    """The very same memory is a no-op within one pair only: across pairs it is a race."""
    buf = torch.arange(8, dtype=INT)
    return [buf, torch.zeros(8, dtype=INT)], [other(), buf]


def exchange():
    a, b = torch.zeros(8, dtype=INT), torch.ones(8, dtype=INT)
    return [a, b], [b, a]


def duplicate_destinations():
    buf = torch.zeros(8, dtype=INT)
    return [buf, buf], [other(), other()]


def duplicate_destinations_of_the_same_source():
    buf, src = torch.zeros(8, dtype=INT), other()
    return [buf, buf], [src, src]


def duplicate_destinations_that_are_no_ops():
    buf = torch.zeros(8, dtype=INT)
    return [buf, buf], [buf, buf]


def duplicate_destinations_with_disjoint_views_of_it():
    """Whole destinations count: the second lies in the first, though outside the first's corner."""
    buf = torch.zeros(24, dtype=INT)
    return [buf, buf[16:]], [other(), other()]


def partly_overlapping_destinations():
    buf = torch.zeros(24, dtype=INT)
    return [buf[:10], buf[9:]], [other(), other()]


def partly_overlapping_destinations_through_two_storages():
    a, b = two_storages()
    return [a[:10], b[9:]], [other(), other()]


def destinations_of_different_dtypes():
    buf = torch.zeros(24, dtype=INT)
    return [buf[:10], buf.view(torch.uint8)[39:60]], [other(), torch.ones(4, dtype=torch.uint8)]


def blocks_that_share_one_element():
    buf = torch.zeros(8, 8, dtype=INT)
    return [buf[:5, :5], buf[4:, 4:]], [torch.ones(2, 2, dtype=INT)] * 2


def columns_that_share_one_column():
    buf = torch.zeros(6, 8, dtype=INT)
    return [buf[:, :5], buf[:, 4:]], [torch.ones(6, 4, dtype=INT)] * 2


def row_across_columns():
    buf = torch.zeros(6, 8, dtype=INT)
    return [buf[:, 2:4], buf[3:4, :]], [torch.ones(6, 2, dtype=INT), torch.ones(1, 8, dtype=INT)]


OVERLAPS: list[Callable[[], tuple[list, list]]] = [
    shifted_within_a_pair,
    shifted_by_one_byte,
    source_inside_its_destination_off_the_corner,
    source_in_the_destinations_tail,
    transposed_onto_itself,
    same_bytes_as_other_strides,
    shifted_through_two_storages,
    destination_and_another_pairs_source,
    destination_and_another_pairs_source_through_two_storages,
    same_memory_across_pairs,
    exchange,
    duplicate_destinations,
    duplicate_destinations_of_the_same_source,
    duplicate_destinations_that_are_no_ops,
    duplicate_destinations_with_disjoint_views_of_it,
    partly_overlapping_destinations,
    partly_overlapping_destinations_through_two_storages,
    destinations_of_different_dtypes,
    blocks_that_share_one_element,
    columns_that_share_one_column,
    row_across_columns,
]


@pytest.mark.parametrize("overlap", OVERLAPS, ids=lambda f: f.__name__)
def test_overlap_in_every_order_of_the_pairs(entry, overlap):
    """Two more pairs that are all right, and every permutation: an overlap is found wherever its halves stand."""
    dst, src = overlap()
    dst += [torch.zeros(8, dtype=INT), torch.zeros(8, dtype=INT)]
    src += [torch.ones(8, dtype=INT), torch.ones(8, dtype=INT)]
    guilty = range(len(dst) - 2)
    for order in itertools.permutations(range(len(dst))):
        pairs = "|".join(str(order.index(i)) for i in guilty)
        refuses(entry, [dst[i] for i in order], [src[i] for i in order], "overlap", rf"\bpair ({pairs})\b")


def columns_of_one_buffer():
    buf = torch.zeros(6, 8, dtype=INT)
    return buf, [buf[:, :4], buf[:, 4:8]], [torch.full((6, 4), 1, dtype=INT), torch.full((6, 4), 2, dtype=INT)]


def quarters_of_one_buffer():
    buf = torch.zeros(8, 8, dtype=INT)
    dst = [buf[:4, :4], buf[4:, 4:], buf[:4, 4:], buf[4:, :4]]
    return buf, dst, [torch.full((4, 4), k, dtype=INT) for k in range(1, 5)]


def columns_of_different_dtypes():
    """A struct of arrays in one block of memory: 16 bytes to a row, an int64 column and two int32 columns."""
    buf = torch.zeros(5, 4, dtype=INT)
    long = buf.view(torch.int64)
    dst = [long[:, 1:2], buf[:, 0:1], buf[:, 1:2]]
    return buf, dst, [torch.full((5, 1), k, dtype=d.dtype) for k, d in enumerate(dst, 1)]


def planes_of_one_buffer():
    buf = torch.zeros(3, 4, 6, dtype=INT)
    return (
        buf,
        [buf[:, :2, :3], buf[:, :2, 3:], buf[:, 2:]],
        [torch.full(size, k, dtype=INT) for k, size in enumerate([(3, 2, 3), (3, 2, 3), (3, 2, 6)], 1)],
    )


def even_and_odd_elements():
    buf = torch.zeros(12, dtype=INT)
    return buf, [buf[::2], buf[1::2]], [torch.full((6,), 1, dtype=INT), torch.full((6,), 2, dtype=INT)]


def columns_into_columns():
    """A source beside its destination in one buffer."""
    buf = torch.zeros(6, 8, dtype=INT)
    buf[:, 4:] = 3
    return buf, [buf[:, :4]], [buf[:, 4:]]


def neighbours():
    buf = torch.zeros(12, dtype=INT)
    buf[8:] = 3
    return buf, [buf[:4], buf[4:8]], [other(4), buf[8:]]


def neighbours_through_two_storages():
    a, b = two_storages()
    return a, [a[:10], b[10:]], [other(), other()]


def empty_views_inside_a_destination():
    """Without elements there is nothing to overlap."""
    buf = torch.zeros(12, dtype=INT)
    return buf, [buf, buf[4:4]], [other(), buf[6:6]]


@pytest.mark.parametrize(
    "case",
    [
        columns_of_one_buffer,
        quarters_of_one_buffer,
        columns_of_different_dtypes,
        planes_of_one_buffer,
        even_and_odd_elements,
        columns_into_columns,
        neighbours,
        neighbours_through_two_storages,
        empty_views_inside_a_destination,
    ],
    ids=lambda f: f.__name__,
)
def test_interleaved_is_not_overlapping(entry, case):
    buf, dst, src = case()
    wanted_buf, wanted_dst, wanted_src = case()
    for d, s in zip(wanted_dst, wanted_src, strict=True):
        d[tuple(slice(0, n) for n in s.shape)].copy_(s)
    assert not torch.equal(buf, wanted_buf), "the case copies nothing"
    entry(dst, src)
    assert torch.equal(buf, wanted_buf)


@pytest.mark.parametrize("size", [(2**31, 2**31, 0), (2**31, 0, 2**31), (0, 2**31, 2**31)], ids=str)
def test_empty_beside_sizes_that_no_memory_holds(entry, size):
    dst, src = among(torch.zeros(size, dtype=INT), torch.zeros(size, dtype=INT))
    entry(dst, src)
    assert all(d[:5].eq(1).all() for d in dst if d.dim() == 1)


def stride_zero():
    return torch.zeros(1, 4, dtype=INT).expand(3, 4)


def stride_zero_of_a_scalar():
    return torch.zeros((), dtype=INT).expand(4)


def windows():
    return torch.zeros(16, dtype=INT).as_strided((4, 4), (2, 1))


def two_strides_that_meet():
    """No stride is zero, no row begins inside another's first run, and still element (2, 0) is element (0, 3)."""
    return torch.zeros(32, dtype=INT).as_strided((4, 4), (3, 2))


def windows_of_rows():
    return torch.zeros(64, dtype=INT).as_strided((3, 2, 4), (4, 8, 1))


@pytest.mark.parametrize(
    "make",
    [stride_zero, stride_zero_of_a_scalar, windows, two_strides_that_meet, windows_of_rows],
    ids=lambda f: f.__name__,
)
def test_destination_that_overlaps_itself(entry, make):
    dst = make()
    refuses(entry, *among(dst, torch.ones(dst.shape, dtype=INT)), r"\bpair 3\b", "overlap")


def test_destination_that_overlaps_itself_outside_the_corner(entry):
    dst = torch.zeros(1, 8, dtype=INT).expand(3, 8)
    refuses(entry, *among(dst, torch.ones(1, 4, dtype=INT)), r"\bpair 3\b", "overlap")


def test_expanded_over_a_size_of_one_is_not_an_overlap(entry):
    dst = torch.zeros(4, dtype=INT).as_strided((1, 4), (0, 1))
    entry([dst], [torch.ones(1, 3, dtype=INT)])
    assert dst.tolist() == [[1, 1, 1, 0]]


ROOM = 96


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """Any view of a buffer of ROOM bytes, as a recipe: dtype, size, stride, offset."""
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32]))
    room = ROOM // dtype.itemsize
    size, stride, reach = [], [], 0
    for _ in range(draw(st.integers(0, 3))):
        n = draw(st.integers(1, 5))
        step = draw(st.integers(0, 12))
        if reach + (n - 1) * step < room:
            reach += (n - 1) * step
            size.append(n)
            stride.append(step)
    return dtype, tuple(size), tuple(stride), draw(st.integers(0, room - 1 - reach))


def addresses(view) -> list[int]:
    """Every byte of every element, as often as elements lie on it."""
    dtype, size, stride, offset = view
    starts = [
        (offset + sum(k * s for k, s in zip(index, stride, strict=True))) * dtype.itemsize
        for index in itertools.product(*map(range, size))
    ]
    return [start + b for start in starts for b in range(dtype.itemsize)]


def plainly_distinct(view) -> bool:
    """Each stride steps over all that the smaller ones reach: anyone can see that no two elements meet."""
    _, size, stride, _ = view
    reach = 0
    for s, n in sorted((s, n) for s, n in zip(stride, size, strict=True) if n > 1):
        if s <= reach:
            return False
        reach += (n - 1) * s
    return True


@given(first=views(), second=views(), second_is_source=st.booleans())
def test_no_overlap_goes_unnoticed(entry, first, second, second_is_source):
    """Against brute force: every byte of every element. What shares a byte is refused; what is copied is right."""
    buf = torch.arange(ROOM, dtype=torch.uint8) % 63 + 1

    def view(of, recipe):
        dtype, size, stride, offset = recipe
        return of.view(dtype).as_strided(size, stride, offset)

    def lists(of):
        a, b = view(of, first), view(of, second)
        if second_is_source:
            return [a, torch.zeros_like(b)], [torch.full_like(a, 77, memory_format=torch.contiguous_format), b]
        return [a, b], [torch.full(t.shape, 70 + k, dtype=t.dtype) for k, t in enumerate((a, b))]

    one, two = addresses(first), addresses(second)
    writes_twice = len(set(one)) < len(one) or (not second_is_source and len(set(two)) < len(two))
    if writes_twice or set(one) & set(two):
        refuses(entry, *lists(buf), "overlap")
        return
    wanted = buf.clone()
    for d, s in zip(*lists(wanted), strict=True):
        d.copy_(s)
    try:
        entry(*lists(buf))
    except RuntimeError as error:
        # Allowed only where patterns of strides interleave: deciding all of those exactly is not promised.
        apart = max(one) < min(two) or max(two) < min(one)
        distinct = plainly_distinct(first) and (second_is_source or plainly_distinct(second))
        assert not (apart and distinct), f"disjoint, but refused: {error}"
    else:
        assert torch.equal(buf, wanted)


# --- meta, fake, other devices ------------------------------------------------------------------------------------


def test_meta_destination_with_a_real_source(entry):
    dst, src = among(torch.zeros(8, dtype=INT, device="meta"), torch.ones(5, dtype=INT))
    refuses(entry, dst, src, r"\bpair 3\b", "meta", "cpu")


def test_meta_source_with_a_real_destination(entry):
    dst, src = among(torch.zeros(8, dtype=INT), torch.ones(5, dtype=INT, device="meta"))
    refuses(entry, dst, src, r"\bpair 3\b", "meta", "cpu")


def test_meta_pair_among_real_ones(entry):
    dst, src = among(torch.zeros(8, dtype=INT, device="meta"), torch.ones(5, dtype=INT, device="meta"))
    refuses(entry, dst, src, r"\bpair 3\b", "meta", "cpu")


def test_real_pair_among_meta_ones(entry):
    dst = [torch.zeros(8, dtype=INT, device="meta"), torch.zeros(8, dtype=INT)]
    src = [torch.zeros(5, dtype=INT, device="meta"), torch.ones(5, dtype=INT)]
    refuses(entry, dst, src, "meta", "cpu")


@pytest.mark.parametrize("side", ["dst", "src", "both"])
@pytest.mark.parametrize("inside", [True, False], ids=["mode_on", "mode_off"])
def test_fake_mixed_with_real(entry, side, inside):
    """torch's own fake mode refuses it, by AssertionError; a careless fast path would read an address that is none."""
    mode = FakeTensorMode()
    dst, src = among(torch.zeros(8, dtype=INT), torch.ones(5, dtype=INT))
    if side in ("dst", "both"):
        dst[3] = mode.from_tensor(dst[3])
    if side in ("src", "both"):
        src[3] = mode.from_tensor(src[3])

    def call(d, s):
        if not inside:
            return entry(d, s)
        with mode:
            return entry(d, s)

    before = bytes_of([*dst, *src])
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)fake"):
        call(dst, src)
    assert all(torch.equal(a, b) for a, b in zip(bytes_of([*dst, *src]), before, strict=True))


# --- memory that is not there -------------------------------------------------------------------------------------

FREED = """
    import fused_copy, torch

    def freed(t): t.untyped_storage().resize_(0)
    def shortened(t): t.untyped_storage().resize_(t.untyped_storage().nbytes() - 1)

    for name, replay in ("op", torch.ops.fused_copy.replay), ("python", fused_copy.replay):
        for harm in freed, shortened:
            for side in "dst", "src":
                dst = [torch.zeros(1 << 16) for _ in range(4)]
                src = [torch.ones(1 << 16) for _ in range(4)]
                if side == "dst":
                    src[3] = src[3][:8]  # the corner alone would still fit a shortened destination
                harm((dst if side == "dst" else src)[3])
                print(name, harm.__name__, side, end=": ", flush=True)
                try:
                    replay(dst, src)
                except RuntimeError as error:
                    print(error, flush=True)
                else:
                    print("NO ERROR", flush=True)
                assert all((d == 0).all() for d in dst[:3]), "written"
    print("done")
"""


def test_freed_or_shortened_storage(tmp_path):
    """In a process of its own: the mistake to find is a segfault. Not in the clone: -c imports from where it runs."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FREED)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    *lines, last = run.stdout.splitlines()
    assert last == "done"
    told = [line for line in lines if line.startswith(("op ", "python "))]
    assert len(told) == 8
    assert "NO ERROR" not in run.stdout
    for line in told:
        if line.startswith("python "):
            assert re.search(r"\bpair 3\b.*storage", line), line


def test_empty_tensor_needs_no_storage(entry):
    empty = torch.zeros(0)
    empty.untyped_storage().resize_(0)
    dst = torch.zeros(3)
    entry([empty, dst], [empty.clone(), torch.ones(2)])
    assert dst.tolist() == [1, 1, 0]


def test_an_offset_whose_bytes_no_number_holds(entry):
    far = torch.zeros(4, dtype=torch.float64).as_strided((0,), (1,), 2**62)
    dst = torch.zeros(3, dtype=torch.float64)
    entry([far, dst], [far, torch.ones(2, dtype=torch.float64)])
    assert dst.tolist() == [1, 1, 0]


# --- autograd -----------------------------------------------------------------------------------------------------


def leaf() -> torch.Tensor:
    return torch.zeros(4, requires_grad=True)


def parameter() -> torch.Tensor:
    return torch.nn.Parameter(torch.zeros(4))


def non_leaf() -> torch.Tensor:
    return torch.zeros(4, requires_grad=True) * 2


def view_of_a_leaf() -> torch.Tensor:
    return torch.zeros(8, requires_grad=True)[:4]


@pytest.mark.parametrize("make", [leaf, parameter, non_leaf, view_of_a_leaf], ids=lambda f: f.__name__)
def test_destination_requires_grad(entry, make):
    dst, src = among(make(), torch.ones(3))
    refuses(entry, dst, src, r"\bpair 3\b", "grad")
    with torch.no_grad():
        entry(dst, src)
    assert dst[3].tolist() == [1, 1, 1, 0]


def test_detached_destination_is_fine(entry):
    weight = leaf()
    entry([weight.detach()], [torch.ones(3)])
    assert weight.tolist() == [1, 1, 1, 0]


def replay_of_a_plan(dst, src):
    fused_copy.Plan(dst).replay(*src)


# Outside of these, moving the counters would cost as much as the copy.
MOVES_VERSIONS = {
    torch.ops.fused_copy.replay: [torch.enable_grad],
    replay_of_a_plan: [torch.enable_grad, torch.no_grad],
    fused_copy.replay: [torch.enable_grad, torch.no_grad, torch.inference_mode],
}


@pytest.mark.parametrize("overwrite_a_view", [False, True], ids=["itself", "view"])
@pytest.mark.parametrize(
    ("replay", "mode"),
    [
        pytest.param(replay, mode, id=f"{getattr(replay, '__name__', 'op')}-{mode.__name__}")
        for replay, modes in MOVES_VERSIONS.items()
        for mode in modes
    ],
)
def test_saved_for_backward_is_protected(replay, mode, overwrite_a_view):
    """The version counter must move, or backward computes with the new values and says nothing."""
    saved, weight = torch.ones(4), torch.ones(4, requires_grad=True)
    loss = (saved * weight).sum()
    with mode():
        replay([saved[:2] if overwrite_a_view else saved], [torch.full((2,), 5.0)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_source_saved_for_backward_stays_usable(entry):
    """Only what is written counts as modified."""
    saved, weight = torch.full((4,), 3.0), torch.ones(4, requires_grad=True)
    loss = (saved * weight).sum()
    entry([torch.zeros(4)], [saved])
    loss.backward()
    assert weight.grad.tolist() == [3, 3, 3, 3]


def test_a_refused_call_moves_no_version(entry):
    dst, src = among(torch.zeros(4, 4), torch.ones(3))
    before = [d._version for d in dst]
    refuses(entry, dst, src)
    assert [d._version for d in dst] == before


def test_inference_tensor_outside_inference_mode(entry):
    with torch.inference_mode():
        frozen = torch.zeros(4, dtype=INT)
    with pytest.raises(RuntimeError):
        frozen.copy_(torch.ones(4))
    refuses(entry, *among(frozen, torch.ones(3, dtype=INT)), r"\bpair 3\b", "inference")


def test_inference_tensors_where_they_are_allowed(entry):
    """Read anywhere, written inside inference mode: what an engine does with its step's tensors."""
    normal = torch.zeros(4)
    with torch.inference_mode():
        frozen, src = torch.zeros(4), torch.ones(3)
        entry([frozen, normal], [src, src])
    assert frozen.tolist() == normal.tolist() == [1, 1, 1, 0]
    other_normal = torch.zeros(4)
    entry([other_normal], [src])
    assert other_normal.tolist() == [1, 1, 1, 0]


# --- tensors that are not plain memory ----------------------------------------------------------------------------


def conjugate():
    t = torch.zeros(4, dtype=torch.complex64).conj()
    assert t.is_conj()
    return t, torch.zeros(4, dtype=torch.complex64)


def negative():
    t = torch.zeros(4, dtype=torch.complex64).conj().imag
    assert t.is_neg()
    return t, torch.zeros(4)


def sparse_coo():
    return torch.eye(4).to_sparse(), torch.zeros(4, 4)


def sparse_csr():
    return torch.eye(4).to_sparse_csr(), torch.zeros(4, 4)


def quantized():
    # same dtype on both sides, so that nothing but being quantized can be wrong
    return tuple(torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8) for _ in range(2))


def nested():
    return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)]), torch.zeros(2, 4)


def nested_jagged():
    return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)], layout=torch.jagged), torch.zeros(2, 4)


# What the text has to say, and whether the raw op gets to say it: torch turns nested tensors away itself.
ODD = {
    conjugate: ("conj", True),
    negative: ("neg", True),
    sparse_coo: ("sparse", False),
    sparse_csr: ("sparse", False),
    quantized: ("quantized|qint8", False),
    nested: ("nested", False),
    nested_jagged: ("nested|jagged", False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", ["dst", "src"])
@pytest.mark.parametrize("make", ODD, ids=lambda f: f.__name__)
def test_tensors_that_are_not_plain_memory(entry, make, side):
    odd, plain = make()
    word, told = ODD[make]
    dst, src = among(*((odd, plain) if side == "dst" else (plain, odd)))
    # A subclass goes through torch's dispatcher on every way in, which refuses it without naming the pair.
    named = [] if make is nested_jagged else [r"\bpair 3\b"]
    refuses(entry, dst, src, word, *named, told=told)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("side", ["dst", "src"])
@pytest.mark.parametrize("dtype", BYTE_DTYPES, ids=name)
def test_the_negative_bit_of_any_dtype(entry, dtype, side):
    """Torch sets it on floats alone, but anybody can."""
    plain = torch.zeros(64, dtype=torch.uint8).view(dtype)
    odd = torch._neg_view(plain.clone())
    assert odd.is_neg()
    dst, src = among(*((odd, plain) if side == "dst" else (plain, odd)))
    with pytest.raises(RuntimeError) as caught:
        entry(dst, src)
    if entry.tells_why:
        assert re.search("pair 3.*negative bit", str(caught.value))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", ["dst", "src", "both"])
def test_vmap(entry, side):
    batch, plain = torch.ones(3, 4), torch.zeros(4)

    def body(t):
        entry([t if side != "src" else plain], [t.clone() if side != "dst" else plain])
        return t

    with pytest.raises(RuntimeError):
        torch.vmap(body)(batch)
    assert (plain == 0).all()
    assert (batch == 1).all()


# --- mappings -----------------------------------------------------------------------------------------------------


def by_name(bs: int = 3, width: int = 17):
    return decode_buffers(8, 40), decode_step(bs, width)


def refuses_mapping(dst: dict, src: dict, *words: str, exc=RuntimeError) -> None:
    before = bytes_of(list(dst.values()))
    with pytest.raises(exc) as caught:
        fused_copy.replay(dst, src)
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(list(dst.values())), before, strict=True))
    for word in words:
        assert re.search(word, str(caught.value), re.IGNORECASE), f"{word!r} is not in: {caught.value}"


def test_missing_key():
    buffers, step = by_name()
    del step["positions"]
    refuses_mapping(buffers, step, "positions", exc=(KeyError, ValueError, RuntimeError))


def test_extra_key():
    buffers, step = by_name()
    step["block_table"] = torch.zeros(3, dtype=INT)
    refuses_mapping(buffers, step, "block_table", exc=(KeyError, ValueError, RuntimeError))


def test_mistyped_key_names_both():
    buffers, step = by_name()
    step["page_tabel"] = step.pop("page_table")
    refuses_mapping(buffers, step, "page_table|page_tabel", exc=(KeyError, ValueError, RuntimeError))


def test_error_in_a_mapping_names_the_key():
    """The number counts in the destinations' order, whatever the sources' order."""
    buffers, step = by_name(width=41)
    refuses_mapping(buffers, dict(reversed(step.items())), r"\bpair 5 \('page_table'\)", r"\b40\b", r"\b41\b")


def test_rank_error_in_a_mapping_names_the_key():
    buffers, step = by_name()
    step["positions"] = step["positions"][None]
    refuses_mapping(buffers, step, r"\bpair 3 \('positions'\)", "dim|rank")


def test_overlap_in_a_mapping_names_a_key():
    buffers, step = by_name()
    step["out_loc"] = buffers["positions"][:2]
    refuses_mapping(buffers, step, r"\bpair (1 \('out_loc'\)|3 \('positions'\))", "overlap")


def test_what_is_no_tensor_in_a_mapping():
    buffers, step = by_name()
    step["seq_lens"] = object()
    refuses_mapping(buffers, step, "seq_lens", exc=TypeError)


@pytest.mark.parametrize("key", ["\ud800", b"bytes", ("a", 1), None], ids=ascii)
def test_names_that_no_text_holds(key):
    """The error comes through, whatever the pair is called."""
    with pytest.raises(RuntimeError, match=r"pair 0 \(.*\): source has shape"):
        fused_copy.replay({key: torch.zeros(2)}, {key: torch.ones(3)})
    with pytest.raises(RuntimeError, match=r"pair 0 \(.*\): source has shape"):
        fused_copy.Plan({key: torch.zeros(2)}).replay({key: torch.ones(3)})


def test_a_name_whose_text_raises():
    class Key:
        def __str__(self):
            raise ZeroDivisionError

    key = Key()
    with pytest.raises(RuntimeError, match=r"pair 0 \('Key'\): source has shape"):
        fused_copy.replay({key: torch.zeros(2)}, {key: torch.ones(3)})
