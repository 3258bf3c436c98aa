"""The six tensors of mini-sglang's decode step in one call."""

from __future__ import annotations

import torch

from fused_copy.ops import replay_in_order

_NAMES = ("input_ids", "out_loc", "cu_seqlens_k", "positions", "seq_lens", "page_table")


def fused_copy_replay_data(
    src_input_ids: torch.Tensor,
    src_out_loc: torch.Tensor,
    src_cu_seqlens_k: torch.Tensor,
    src_positions: torch.Tensor,
    src_seq_lens: torch.Tensor,
    src_page_table: torch.Tensor,
    dst_input_ids: torch.Tensor,
    dst_out_loc: torch.Tensor,
    dst_cu_seqlens_k: torch.Tensor,
    dst_positions: torch.Tensor,
    dst_seq_lens: torch.Tensor,
    dst_page_table: torch.Tensor,
    batch_size: int,
    max_seqlen_k: int,
) -> None:
    """Fills the capture buffers of mini-sglang's graph runner and attention back end in one launch.

    Equivalent to::

        dst_input_ids[:batch_size].copy_(src_input_ids[:batch_size])
        dst_out_loc[:batch_size].copy_(src_out_loc[:batch_size])
        dst_cu_seqlens_k[:batch_size + 1].copy_(src_cu_seqlens_k[:batch_size + 1])
        dst_positions[:batch_size].copy_(src_positions[:batch_size])
        dst_seq_lens[:batch_size].copy_(src_seq_lens[:batch_size])
        dst_page_table[:batch_size, :max_seqlen_k].copy_(src_page_table[:batch_size, :max_seqlen_k])

    Args:
        src_input_ids: this step's tensors: ``input_ids``, ``out_loc``, ``positions`` and ``seq_lens`` of shape
            [batch_size], ``cu_seqlens_k`` of [batch_size + 1], ``page_table`` of [batch_size, max_seqlen_k], or larger
            ones, of which the leading corner of that shape is read.
        dst_input_ids: the capture buffers, whole: [max_bs], [max_bs + 1] and [max_bs, max_seq_len]. What lies outside
            of the corner stays as it was.
        batch_size: rows to copy, padding included. With 0, ``cu_seqlens_k[:1]`` is all that is copied.
        max_seqlen_k: columns of the page table to copy, as they are in the table: pages where it holds pages. May be 0.

    Strides, dtypes, devices, stream and capture are those of :func:`fused_copy.replay`; a
    :class:`fused_copy.Plan` over the same buffers does the same with less host time.

    Raises:
        RuntimeError: ``batch_size`` or ``max_seqlen_k`` is negative or larger than a source or a buffer can hold, or as
            :func:`fused_copy.replay`. The text names the tensor. Nothing is written.
        TypeError: an argument is not a tensor.
    """
    if batch_size < 0 or max_seqlen_k < 0:
        raise RuntimeError(
            f"fused_copy: batch_size is {batch_size} and max_seqlen_k is {max_seqlen_k}: expected no negative number"
        )
    rows = (batch_size,)
    sources = (
        _corner("input_ids", src_input_ids, rows),
        _corner("out_loc", src_out_loc, rows),
        _corner("cu_seqlens_k", src_cu_seqlens_k, (batch_size + 1,)),
        _corner("positions", src_positions, rows),
        _corner("seq_lens", src_seq_lens, rows),
        _corner("page_table", src_page_table, (batch_size, max_seqlen_k)),
    )
    destinations = (
        dst_input_ids,
        dst_out_loc,
        dst_cu_seqlens_k,
        dst_positions,
        dst_seq_lens,
        dst_page_table,
    )
    replay_in_order(_NAMES, destinations, sources, None)


def _corner(name: str, source: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    if not isinstance(source, torch.Tensor):
        raise TypeError(f"fused_copy: source {name} is {type(source).__name__}: expected a torch.Tensor")
    shape = source.shape
    if shape == sizes:  # as engines pass them; a slice costs as much as the rest of this function
        return source
    if len(shape) != len(sizes) or any(has < size for has, size in zip(shape, sizes, strict=True)):
        raise RuntimeError(
            f"fused_copy: source {name} has shape {tuple(shape)}: expected {sizes} or larger, as batch_size and "
            "max_seqlen_k say"
        )
    return source[tuple(map(slice, sizes))]
