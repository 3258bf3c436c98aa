"""What may stand for a source beside a tensor: host values, rows of a table, sums of lengths, integers plus a number.

Parts of theirs that are host values are taken at the call, as :func:`fused_copy.replay` says.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from fused_copy._library import _C

if TYPE_CHECKING:
    import numpy as np

    Values = torch.Tensor | np.ndarray | Sequence[int] | Sequence[float]
    """A tensor, or host values in a list or tuple, a NumPy array or another object with the buffer protocol."""
else:
    Values = torch.Tensor | Sequence[int] | Sequence[float]


class rows(NamedTuple):
    """Stands for a source: row ``i`` of the destination's corner is ``table[index[i]]``.

    The corner has the shape ``[len(index), *table.shape[1:]]``. A negative index means "no row", and so does one beyond
    the table that only the GPU can see: that row is outside of the corner, so it becomes the fill, or stays as it was.
    One beyond the table that the host can see raises. Nothing is read outside of the table.

    Attributes:
        table: a tensor of one dimension or more, any strides, on the destinations' device or in pinned memory. Its
            dtype is the destination's, or each of the two is int32 or int64.
        index: one dimension, int32 or int64: a tensor on that device, a pinned one, or host values.
        lengths: as ``index``, one for each row, or one-dimensional ``rows`` of a table of lengths. Of row ``i`` only
            the first ``lengths[i]`` columns are in the corner. Lengths below zero count as zero, those beyond the table
            as all of its columns, those of "no row" as zero.
        page_size: for tables of two dimensions with a slot for each token: column ``j`` is the page ``table[index[i],
            j * page_size] // page_size`` (floor), of ``ceil(columns / page_size)`` columns, and lengths count tokens:
            ``ceil(length / page_size)`` columns.

    In a CUDA graph, table, index and lengths on the GPU, or pinned, are read anew at every replay.
    """

    table: torch.Tensor
    index: Values  # type: ignore[assignment]  # hides the method of tuples
    lengths: Values | rows | None = None
    page_size: int = 1


class cu_seqlens(NamedTuple):
    """Stands for a source: the sums ``[0, l0, l0 + l1, ...]`` of ``lengths``, one value more than these have.

    With ``fill="last"`` the rest of the buffer becomes the total, as attention kernels want of padded rows: that these
    have no tokens.

    Attributes:
        lengths: one dimension, integers: a tensor on the destinations' device, a pinned one, or host values.

    Sums wrap in the destination's dtype, which is one of integers, as ``torch.cumsum(lengths, 0, dtype=...)`` does.
    """

    lengths: Values


class plus(NamedTuple):
    """Stands for a source: every value of ``source`` plus the integer ``n``.

    Attributes:
        source: integers of any shape and strides: a tensor on the destinations' device, a pinned one, or host values.
        n: added in the source's dtype, where sums wrap as torch's do. Then they are cast to the destination's.
    """

    source: Values
    n: int


Source = Values | rows | cu_seqlens | plus | float | int | None
"""Values, a number for a destination of one element, what is made in the launch, or None to leave a destination out."""

Fill = float | Literal["last"] | None
"""What the rest of a destination becomes. That is a number, the last value that its source yields, or what it was."""


def as_tensor(values: Any, destination: torch.Tensor | None = None) -> torch.Tensor:
    """Host values as a CPU tensor: for a destination of its dtype where they are Python's, and of its shape if one."""
    if isinstance(values, torch.Tensor):
        return values
    if isinstance(values, (list, tuple)):
        values = [_plain_number(number) for number in values]
    elif not isinstance(values, (int, float)):
        import numpy as np  # which torch does not need

        array = np.array(values)  # a copy, as torch takes no negative strides, and warns of memory that is read-only
        if array.dtype != object or array.ndim > 0:
            return _of_shape(torch.as_tensor(array, device="cpu"), destination)
        values = _plain_number(values)
    # Those that are no source by themselves are integers: floats show as such, to be refused.
    dtype = destination.dtype if destination is not None else None if values else torch.int64
    return _of_shape(torch.tensor(values, dtype=dtype, device="cpu"), destination)


def _of_shape(tensor: torch.Tensor, destination: torch.Tensor | None) -> torch.Tensor:
    return tensor.expand_as(destination) if destination is not None and tensor.dim() == 0 else tensor


def _plain_number(number: Any) -> float:
    """A number of any type as one of Python's own."""
    if isinstance(number, (int, float)):
        return number
    if isinstance(number, (list, tuple)):
        raise TypeError("fused_copy: a list has lists in it: pass a tensor or an array")
    return operator.index(number) if hasattr(number, "__index__") else float(number)


def extent_of(source: Any, destination: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape of the corner that a source made of tensors has, and its dtype."""
    if source is None:
        return (0,) * destination.dim(), destination.dtype
    kind = type(source)
    first: torch.Tensor = source[0] if kind in TYPES else source
    if kind is rows:
        columns: Sequence[int] = first.shape[1:]
        if source.page_size != 1:
            columns = ((columns[0] + source.page_size - 1) // source.page_size,)
        return (source.index.shape[0], *columns), first.dtype
    return (first.shape[0] + 1,) if kind is cu_seqlens else tuple(first.shape), first.dtype


TYPES = (rows, cu_seqlens, plus)
_C.use_source_types(rows, cu_seqlens, plus)
