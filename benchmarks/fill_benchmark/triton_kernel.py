"""A decode step's six tensors in one Triton kernel: a program for each block of a page-table row."""

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
