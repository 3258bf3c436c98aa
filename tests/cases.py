"""What to copy: layouts, dtypes, counts and misalignments, as lists of pairs for an Arena, whatever its device."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from arena import Pair, Side, dense
from hypothesis import strategies as st

from fused_copy.decode import capture_buffers

MISALIGNMENTS = range(17)
ITEMSIZES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

# Every dtype that is a whole number of bytes per element: these are copied bit for bit.
BYTE_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.int16, torch.uint16, torch.float16, torch.bfloat16),
    *(torch.int32, torch.uint32, torch.float32, torch.complex32),
    *(torch.int64, torch.uint64, torch.float64, torch.complex64),
    torch.complex128,
]

# Among these the contract converts.
CAST_DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}

COUNTS = (0, 1, 3, 4, 15, 16, 17, 31, 32, 33, 127, 128, 129, 8191, 8192, 8193)

# name: destination size and stride, source size and stride, in elements. Odd numbers: rows start at every alignment.
Layout = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
LAYOUTS: dict[str, Layout] = {
    "whole": ((24,), (1,), (24,), (1,)),
    "corner": ((41,), (1,), (37,), (1,)),
    "full_width_rows": ((7, 16), (16, 1), (5, 16), (16, 1)),
    "row_pitch": ((5, 19), (23, 1), (3, 17), (17, 1)),
    "row_pitch_of_both": ((4, 131), (133, 1), (3, 129), (137, 1)),
    "three_dims": ((3, 4, 9), (61, 13, 1), (2, 3, 7), (41, 11, 1)),
    "four_dims": ((3, 3, 3, 7), (97, 29, 9, 1), (2, 2, 2, 5), (83, 31, 11, 1)),
    "four_dims_no_unit_stride": ((2, 3, 3, 5), (211, 61, 17, 3), (2, 3, 2, 5), (131, 37, 13, 2)),
    "five_dims_that_merge": ((3, 3, 2, 2, 5), (97, 29, 14, 7, 1), (2, 3, 2, 2, 5), (83, 26, 10, 5, 1)),
    "six_dense_dims": ((3, 1, 3, 2, 2, 2), dense((3, 1, 3, 2, 2, 2)), (2, 1, 3, 2, 2, 2), dense((2, 1, 3, 2, 2, 2))),
    "size_one_dims_of_any_stride": ((1, 9, 1), (0, 1, 1_000_003), (1, 7, 1), (1_000_003, 1, 0)),
    "expanded_rows": ((4, 9), (10, 1), (3, 7), (0, 1)),
    "expanded_columns": ((4, 9), (10, 1), (3, 7), (1, 0)),
    "expanded_scalar": ((4, 9), (10, 1), (3, 7), (0, 0)),
    "transposed_source": ((6, 9), (9, 1), (5, 7), (1, 5)),
    "transposed_destination": ((9, 6), (1, 9), (7, 5), (5, 1)),
    "transposed_both": ((9, 6), (1, 11), (7, 5), (1, 8)),
    "inner_stride": ((13,), (3,), (11,), (2,)),
    "inner_stride_of_source": ((5, 19), (23, 1), (3, 17), (53, 3)),
    "inner_stride_of_destination": ((5, 11), (37, 3), (3, 10), (10, 1)),
    "one_element": ((3, 4), (4, 1), (1, 1), (7, 5)),
    "zero_dim": ((), (), (), ()),
    "zero_size": ((7,), (1,), (0,), (1,)),
    "zero_rows": ((4, 5), (5, 1), (0, 5), (5, 1)),
    "zero_columns": ((4, 5), (5, 1), (3, 0), (1, 1)),
    "zero_size_of_both": ((0, 5), (5, 1), (0, 3), (3, 1)),
}


def pair(layout: Layout, dtype: torch.dtype, dst_misalign: int = 0, src_misalign: int = 0, **more) -> Pair:
    dst_size, dst_stride, src_size, src_stride = layout
    return Pair(
        Side(dst_size, dst_stride, dtype, dst_misalign), Side(src_size, src_stride, dtype, src_misalign), **more
    )


def layout_batch(layout: str, itemsize: int) -> list[Pair]:
    """One layout at every misalignment of the source against every misalignment of the destination."""
    return [pair(LAYOUTS[layout], ITEMSIZES[itemsize], d, s) for d in MISALIGNMENTS for s in MISALIGNMENTS]


def count_batch(count: int, itemsize: int) -> list[Pair]:
    """`count` elements in a row at every misalignment of the source against every one of the destination."""
    rng = random.Random(count * 31 + itemsize)
    return [
        pair(((count + rng.randrange(4),), (1,), (count,), (1,)), ITEMSIZES[itemsize], d, s)
        for d in MISALIGNMENTS
        for s in MISALIGNMENTS
    ]


def dtype_batch(dtype: torch.dtype) -> list[Pair]:
    """Every layout once, each at a misalignment of its own."""
    return [pair(layout, dtype, (5 * i) % 17, (3 * i + 1) % 17) for i, layout in enumerate(LAYOUTS.values())]


def mixed_batch(n: int, seed: int = 0) -> list[Pair]:
    """`n` pairs of every layout, dtype and misalignment mixed: what one call may look like at its worst."""
    rng = random.Random(seed)
    layouts = list(LAYOUTS.values())
    return [
        pair(rng.choice(layouts), rng.choice(BYTE_DTYPES), rng.choice(MISALIGNMENTS), rng.choice(MISALIGNMENTS))
        for _ in range(n)
    ]


def decode_buffers(max_bs: int, max_seq_len: int, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """The six static buffers of a decode step's graph, poisoned: what a step does not write stays recognizable."""
    return {name: buffer.fill_(-7) for name, buffer in capture_buffers(max_bs, max_seq_len, device).items()}


def decode_step(
    bs: int, max_seqlen_k: int, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, torch.Tensor]:
    """One step's sources for those buffers."""
    gen = torch.Generator().manual_seed(seed)
    sizes = {
        "input_ids": (bs,),
        "out_loc": (bs,),
        "cu_seqlens_k": (bs + 1,),
        "positions": (bs,),
        "seq_lens": (bs,),
        "page_table": (bs, max_seqlen_k),
    }
    return {
        name: torch.randint(0, 2**31 - 1, size, dtype=torch.int32, generator=gen).to(device)
        for name, size in sizes.items()
    }


def after_step(buffers: dict[str, torch.Tensor], step: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The buffers as six slices and six `copy_` leave them."""
    out = {name: t.clone() for name, t in buffers.items()}
    for name, src in step.items():
        out[name][tuple(slice(0, n) for n in src.shape)].copy_(src)
    return out


def _stride(size: Sequence[int], order: Sequence[int], inner: int, pads: Sequence[int]) -> tuple[int, ...]:
    """Strides in which no two elements meet: along `order`, each dimension steps over all that came before it."""
    stride = [0] * len(size)
    step = inner
    for d, pad in zip(order, pads, strict=True):
        stride[d] = step
        step = step * max(size[d], 1) + pad
    return tuple(stride)


@st.composite
def pairs(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = tuple(BYTE_DTYPES)) -> Pair:
    """Any pair the contract allows. The Arena keeps it disjoint from all others: each tensor has its own place."""
    rank = draw(st.integers(0, 4))
    longest = (0, 300, 24, 9, 5)[rank]
    src_size = tuple(draw(st.lists(st.integers(0, longest), min_size=rank, max_size=rank)))
    dst_size = tuple(n + draw(st.integers(0, 3)) for n in src_size)
    backwards = list(range(rank))[::-1]
    orders = st.one_of(st.just(backwards), st.permutations(backwards))
    pads = st.lists(st.integers(0, 5), min_size=rank, max_size=rank)
    inner = st.one_of(st.just(1), st.integers(1, 3))
    dst_stride = _stride(dst_size, draw(orders), draw(inner), draw(pads))
    src_stride = _stride(src_size, draw(orders), draw(inner), draw(pads))
    expanded = draw(st.lists(st.integers(0, 4).map(lambda n: n == 0), min_size=rank, max_size=rank))
    src_stride = tuple(0 if e else s for e, s in zip(expanded, src_stride, strict=True))
    dtype = draw(st.sampled_from(dtypes))
    misalign = st.integers(0, 31)
    return pair((dst_size, dst_stride, src_size, src_stride), dtype, draw(misalign), draw(misalign))


pair_lists = st.lists(pairs(), max_size=12)
