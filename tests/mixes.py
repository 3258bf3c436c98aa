"""Casts, fills and pinned sources as pairs for an Arena, whatever its device; cases.py has what is copied plainly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from arena import Pair
from cases import BYTE_DTYPES, LAYOUTS, MISALIGNMENTS, Layout, pair, pairs
from hypothesis import settings
from hypothesis import strategies as st

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CASTABLE = [torch.bool, *INTEGERS, *FLOATS]
CASTS = list(itertools.permutations(CASTABLE, 2))

UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
COMPLEX = [torch.complex32, torch.complex64, torch.complex128]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]

INF, NAN = math.inf, math.nan


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- values that hurt in a cast -----------------------------------------------------------------------------------

# Limits and their neighbours; the first whole numbers that float16, bfloat16, float32 and float64 cannot hold; ties.
WHOLE = sorted(
    {
        sign * (2**bits + off)
        for bits in (0, 7, 8, 11, 15, 16, 24, 31, 32, 53, 62)
        for off in (-1, 0, 1)
        for sign in (1, -1)
    }
    | {65504, 65519, 65520, 2**63 - 1, -(2**63), 2**63 - 513, 2**54 + 2, 2**54 + 6, 0x0101_0101_0101, 300, -300}
)
REAL = [
    *(0.0, -0.0, 0.25, -0.5, 0.999, 1.5, -1.5, 2.5, 1 / 3, 3.4e38, -3.4e38, 1e300, INF, -INF, NAN),
    *(2.0**-24, 2.0**-25, 3 * 2.0**-26, 2.0**-14, 2.0**-133, 2.0**-149, 2.0**-150, 2.0**-126, 5e-324, 2.0**-1022),
    *(65519.996, 65520.0, 3.3895313892515355e38, 3.3961775292304957e38, 3.4028235677973366e38),
]


def values(src: torch.dtype, dst: torch.dtype) -> torch.Tensor:
    """On the CPU, of dtype `src`: whatever is defined to cast to `dst`. A multiple of 4 elements."""
    if src == torch.bool:
        return torch.tensor([0, 1, 2, 0x80, 0xFF, 0, 0, 3], dtype=torch.uint8).view(torch.bool)
    if not src.is_floating_point:
        limits = torch.iinfo(src)
        numbers = [n for n in WHOLE if limits.min <= n <= limits.max]
        found = torch.tensor(numbers, dtype=src)
    else:
        found = torch.tensor([*REAL, *map(float, WHOLE)], dtype=torch.float64).to(src)
        if not dst.is_floating_point and dst != torch.bool:
            limits = torch.iinfo(dst)
            inside = [math.isfinite(v) and limits.min <= math.trunc(v) <= limits.max for v in found.tolist()]
            found = found[torch.tensor(inside)]
    return torch.cat([found, found[: -len(found) % 4]])


# --- numbers to fill with -----------------------------------------------------------------------------------------


def exact_fills(dtype: torch.dtype) -> list[float]:
    """Numbers that the dtype holds exactly, its limits among them (as far as a double holds those)."""
    if dtype == torch.bool:
        return [0, 1, True, False, 1.0]
    if dtype in COMPLEX:
        return exact_fills({4: torch.float16, 8: torch.float32, 16: torch.float64}[dtype.itemsize])
    if dtype == torch.float8_e8m0fnu:
        return [1, 2.0**-127, 2.0**127, 0.5, NAN]  # powers of two and nothing else
    if dtype in FLOAT8:
        info = torch.finfo(dtype)
        least = info.smallest_normal / 2 ** (2 if dtype in (torch.float8_e5m2, torch.float8_e5m2fnuz) else 3)
        signed_zero = dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        infinite = [INF, -INF] if dtype == torch.float8_e5m2 else []
        return [
            0,
            1,
            -1,
            info.max,
            info.min,
            least,
            -least,
            3 * least,
            NAN,
            *([-0.0] if signed_zero else []),
            *infinite,
        ]
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        least = info.smallest_normal * info.eps
        return [0, -0.0, 1, -1, 1.5, info.max, info.min, info.smallest_normal, least, -3 * least, INF, -INF, NAN]
    limits = torch.iinfo(dtype)
    if limits.bits < 64:
        return [0, 1, limits.min, limits.max, limits.max - 1, 7.0]
    return [0, 1, limits.min, limits.max + 1 - (2**10 if limits.min else 2**11), 2**53, 2**53 + 2, 2.0**62]


def inexact_fills(dtype: torch.dtype) -> list[float]:
    """Numbers that the dtype does not hold: between two of its values, beyond the last, or of another kind."""
    if dtype == torch.bool:
        return [2, -1, 0.5, NAN, INF]
    if dtype in COMPLEX:
        return inexact_fills({4: torch.float16, 8: torch.float32, 16: torch.float64}[dtype.itemsize])
    if dtype == torch.float64:
        return []
    if dtype == torch.float8_e8m0fnu:
        return [3, -1, 1.5, INF, 2.0**128, 2.0**-128]
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        least = info.smallest_normal * info.eps
        beyond = {
            torch.float32: [2**24 + 1, 1e39, 3.4028235677973366e38],
            torch.bfloat16: [257, 2**24 + 1, 3.4e38],
            torch.float16: [1e5, 2049, 65505, 65519, 65520],
        }.get(dtype, [1e5, 17.5, info.max * 1.0625, info.max * 2])
        if dtype in FLOAT8 and dtype != torch.float8_e5m2:
            beyond += [INF, -INF]
        return [0.1, -1 / 3, least / 2, 1.5 * least, 1e300, 5e-324, *beyond]
    limits = torch.iinfo(dtype)
    return [0.5, -0.5, NAN, INF, -INF, 1e300, limits.min - 1 if limits.bits < 64 else -(2.0**64), 2.0**limits.bits] + (
        [2.0**63] if dtype == torch.int64 else [limits.max + 1]
    )


def simple_fill(dtype: torch.dtype) -> float:
    """A number with several different bytes in it, where the dtype allows that."""
    if dtype == torch.bool:
        return 1
    if dtype.is_floating_point or dtype.is_complex:
        return 0.5 if dtype == torch.float8_e8m0fnu else -1.75
    return {1: 0x5D, 2: 0x1234, 4: 0x1234_5678, 8: 0x0012_3456_789A_BCDE}[dtype.itemsize]


# --- pairs --------------------------------------------------------------------------------------------------------


def aligned(p: Pair) -> Pair:
    """The pair at multiples of its element sizes: a cast takes no other, nor do torch's own operators."""
    dst, src = (replace(side, misalign=side.misalign - side.misalign % side.dtype.itemsize) for side in (p.dst, p.src))
    return replace(p, dst=dst, src=src)


def as_casts_need_it(p: Pair) -> Pair:
    return p if p.src.dtype == p.dst.dtype else aligned(p)


def cast_pair(layout: Layout, src: torch.dtype, dst: torch.dtype, *misalign: int, **more) -> Pair:
    p = pair(layout, dst, *misalign, **more)
    return as_casts_need_it(replace(p, src=replace(p.src, dtype=src)))


ROW_COUNTS = (0, 1, 3, 4, 5, 8, 31, 32, 33, 127, 128, 129, 1028)


def row(n: int, slack: int = 3) -> Layout:
    return (n + slack,), (1,), (n,), (1,)


def cast_batch(src: torch.dtype, dst: torch.dtype) -> list[Pair]:
    """One cast in every layout, and rows of every count at aligned and shifted addresses."""
    misalign = itertools.cycle([(0, 0), (16, 0), (0, 16), (8, 8), (24, 4), (12, 2), (1, 3)])
    layouts = [*LAYOUTS.values(), *(row(n) for n in ROW_COUNTS for _ in range(3))]
    # whole rows of a multiple of four elements, at a pitch that is one too: the vector path with strides
    layouts += [((5, 16), (32, 1), (3, 8), (64, 1)), ((5, 16), (20, 1), (3, 8), (12, 1)), row(40_000)]
    return [cast_pair(layout, src, dst, *next(misalign)) for layout in layouts]


def fill_batch(dtype: torch.dtype, fill: float) -> list[Pair]:
    """Every layout at several misalignments, with nothing, some and all of the destination outside the corner."""
    out = []
    for k, layout in enumerate(LAYOUTS.values()):
        dst_size, dst_stride, src_size, src_stride = layout
        nothing = (*src_size[:-1], 0)[: len(src_size)]  # an empty source: all of the destination is filled
        for size in (src_size, nothing):
            where = (5 * k) % 17, (3 * k + 1) % 17
            out.append(pair((dst_size, dst_stride, size, src_stride), dtype, *where, fill=fill))
    out += [pair(row(n, slack), dtype, n % 16, slack % 16, fill=fill) for n, slack in FILLED_ROWS]
    return out


FILLED_ROWS = [(0, 1), (0, 17), (1, 15), (3, 4), (16, 16), (5, 129), (31, 1), (1000, 3), (3, 1000), (7, 70_001)]


def mixed_pair(i: int, rng, pinned: bool = False) -> Pair:
    """Some copy, cast, or either with a fill."""
    layout = rng.choice(list(LAYOUTS.values()))
    where = rng.choice(MISALIGNMENTS), rng.choice(MISALIGNMENTS)
    src, dst = rng.choice(CASTS) if i % 2 else (rng.choice(FILLABLE),) * 2
    fill = rng.choice([None, simple_fill(dst)])
    return cast_pair(layout, src, dst, *where, fill=fill, pinned=pinned and rng.random() < 0.5)


FILLABLE = [d for d in BYTE_DTYPES if d != torch.float8_e8m0fnu]


@st.composite
def mixed_pairs(draw: st.DrawFn, pinned: bool = False) -> Pair:
    """Any pair the contract allows, whatever it mixes."""
    p = draw(pairs(FILLABLE))
    if draw(st.booleans()):
        src, dst = draw(st.sampled_from(CASTS))
        p = as_casts_need_it(replace(p, src=replace(p.src, dtype=src), dst=replace(p.dst, dtype=dst)))
    if draw(st.booleans()):
        # Not NaN, of which there are many; whole numbers as integers, the way callers write them.
        number = draw(st.sampled_from([f for f in exact_fills(p.dst.dtype) if not math.isnan(f)]))
        real = p.dst.dtype.is_floating_point or p.dst.dtype.is_complex
        p = replace(p, fill=number if real else int(number))
    return replace(p, pinned=pinned and draw(st.booleans()))


def mixed_lists(pinned: bool = False, for_torch: bool = False) -> st.SearchStrategy[Sequence[Pair]]:
    """for_torch: only such pairs as the reference, made of torch's operators, takes too."""
    one = mixed_pairs(pinned)
    return st.lists(one.map(aligned) if for_torch else one, max_size=10)


# For what takes much longer than the rest. A share of what the profile says, so that a long run is long here too.
fewer = settings(max_examples=max(settings.default.max_examples * 3 // 10, 1))
