"""Triton kernels: a decode step's six tensors; lengths, their sums and page rows. A program for each block of a row."""

from collections.abc import Mapping

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

BLOCK = 1024


@triton.jit
def _copy_six(  # type: ignore[no-untyped-def]
    input_ids,
    out_loc,
    cu_seqlens_k,
    positions,
    seq_lens,
    page_table,
    to_input_ids,
    to_out_loc,
    to_cu_seqlens_k,
    to_positions,
    to_seq_lens,
    to_page_table,
    width,
    to_row_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    source = page_table + row.to(tl.int64) * width + column
    destination = to_page_table + row.to(tl.int64) * to_row_stride + column
    tl.store(destination, tl.load(source, column < width), column < width)
    if block == 0:
        tl.store(to_input_ids + row, tl.load(input_ids + row))
        tl.store(to_out_loc + row, tl.load(out_loc + row))
        tl.store(to_positions + row, tl.load(positions + row))
        tl.store(to_seq_lens + row, tl.load(seq_lens + row))
        tl.store(to_cu_seqlens_k + row, tl.load(cu_seqlens_k + row))
        if row == tl.num_programs(0) - 1:
            tl.store(to_cu_seqlens_k + row + 1, tl.load(cu_seqlens_k + row + 1))


def copy_six(buffers: Mapping[str, torch.Tensor], sources: Mapping[str, torch.Tensor]) -> None:
    """Fill the buffers' leading corners; both mappings in the order of ``decode.capture_buffers``."""
    bs, width = sources["page_table"].shape
    grid = (bs, triton.cdiv(width, BLOCK))
    _copy_six[grid](*sources.values(), *buffers.values(), width, buffers["page_table"].stride(0), BLOCK=BLOCK)


@triton.jit
def _make_metadata(  # type: ignore[no-untyped-def]
    to_seq_lens,
    to_cu_seqlens_k,
    to_page_table,
    table,
    index,
    lengths,
    bs,
    width,
    row_stride,
    to_row_stride,
    CUT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    REQUESTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0)
    block = tl.program_id(1)
    if request == bs:
        if block == 0:
            each = tl.arange(0, REQUESTS)
            seq_lens = tl.load(lengths + each, each < bs, 0).to(tl.int32)
            tl.store(to_seq_lens + each, seq_lens, each < bs)
            tl.store(to_cu_seqlens_k + 1 + each, tl.cumsum(seq_lens, 0), each < bs)
            tl.store(to_cu_seqlens_k, 0)
    else:
        row = tl.load(index + request).to(tl.int64)
        pages = (tl.load(lengths + request) + PAGE_SIZE - 1) // PAGE_SIZE if CUT else width
        column = block * BLOCK + tl.arange(0, BLOCK)
        slots = tl.load(table + row * row_stride + column.to(tl.int64) * PAGE_SIZE, column < pages, 0)
        tl.store(to_page_table + request.to(tl.int64) * to_row_stride + column, slots // PAGE_SIZE, column < pages)


def make_metadata(
    seq_lens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    page_table: torch.Tensor,
    table: torch.Tensor,
    index: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    cut: bool,
) -> None:
    """Fill the first three with lengths, their sums, and the pages of the table's rows at ``index``."""
    bs, width = index.shape[0], triton.cdiv(table.shape[1], page_size)
    block = min(BLOCK, triton.next_power_of_2(width))
    _make_metadata[(bs + 1, triton.cdiv(width, block))](
        seq_lens,
        cu_seqlens_k,
        page_table,
        table,
        index,
        lengths,
        bs,
        width,
        table.stride(0),
        page_table.stride(0),
        CUT=cut,
        PAGE_SIZE=page_size,
        REQUESTS=triton.next_power_of_2(bs),
        BLOCK=block,
    )
