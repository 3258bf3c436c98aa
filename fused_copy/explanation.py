"""What a call would do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_copy._library import _C
from fused_copy.ops import Fills, Sources, Tensors, flatten, in_order, unflatten
from fused_copy.sources import extent_of


@dataclass(frozen=True)
class PairPlan:
    """How one pair is written.

    Attributes:
        index: the pair's place in the call.
        name: the destination's name, where the call had names.
        src_shape: the corner's, in elements.
        dst_shape: the destination's.
        src_dtype: that of the tensor or array, the table, or what is added to or summed up. Python's numbers count as
            the dtype that they become.
        dst_dtype: the destination's.
        path: how it is written, in words: the width of a unit, strides, a cast, a fill, where host values travel.
        bytes: what is written at most, fill included.
    """

    index: int
    name: str | None
    src_shape: tuple[int, ...]
    dst_shape: tuple[int, ...]
    src_dtype: torch.dtype
    dst_dtype: torch.dtype
    path: str
    bytes: int


@dataclass(frozen=True)
class Explanation:
    """What a call would do. ``str()`` gives a table.

    Attributes:
        device: the destinations', or None where there are none.
        parameter_bytes: what each launch has for parameters.
        pairs: how each pair is written, in the call's order.
    """

    device: torch.device | None
    parameter_bytes: tuple[int, ...]
    pairs: tuple[PairPlan, ...]

    @property
    def launches(self) -> int:
        """How many launches the call takes."""
        return len(self.parameter_bytes)

    @property
    def bytes(self) -> int:
        """What all pairs write at most, fills included."""
        return sum(pair.bytes for pair in self.pairs)

    def __str__(self) -> str:
        header = ("pair", "source", "destination", "bytes", "path")
        rows = [
            (
                str(pair.index) if pair.name is None else f"{pair.index} {pair.name}",
                f"{_short(pair.src_dtype)}{list(pair.src_shape)}",
                f"{_short(pair.dst_dtype)}{list(pair.dst_shape)}",
                f"{pair.bytes:,}",
                pair.path,
            )
            for pair in self.pairs
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        launches = f"{self.launches} launch{'' if self.launches == 1 else 'es'} on {self.device}, {self.bytes:,} bytes"
        parameters = f", parameters {' + '.join(map(str, self.parameter_bytes))} bytes" if self.launches else ""
        return "\n".join([launches + parameters, *lines])


def explain(dst: Tensors, src: Sources, fill: Fills | None = None) -> Explanation:
    """What :func:`fused_copy.replay` would do with these arguments, which it also checks. Nothing is written.

    A pair's path says whether host values travel in the launch's parameters or through pinned memory.

    Raises:
        RuntimeError, TypeError, KeyError: as :func:`fused_copy.replay`.
        TypeError: a tensor is a subclass or fake, or is being traced: the dispatcher decides what becomes of those.
    """
    names, dst, src, fill = in_order(dst, src, fill)
    plan = _C.explain(dst, src, fill, names)
    if plan is None:
        raise TypeError("fused_copy: explain needs plain tensors: got a subclass, a fake tensor, a mode or a transform")
    parameter_bytes, paths = plan
    return Explanation(
        device=dst[0].device if len(dst) else None,
        parameter_bytes=tuple(parameter_bytes),
        pairs=tuple(
            PairPlan(i, names[i] if names else None, shape, tuple(d.shape), dtype, d.dtype, path, size)
            for i, (d, (shape, dtype), (path, size)) in enumerate(
                zip(dst, map(extent_of, unflatten(*flatten(dst, src)), dst), paths, strict=True)
            )
        ),
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
