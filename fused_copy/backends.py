"""Which code copies: this package's, or torch's own operators for comparison."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, get_args

import torch

from fused_copy._library import _C

Backend = Literal["fused", "reference"]

_RAW_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checked(name: str) -> Backend:
    if name not in get_args(Backend):
        raise ValueError(f"fused_copy: backend is {name!r}: expected one of {get_args(Backend)}")
    return name  # type: ignore[return-value]


def _use(name: Backend) -> None:
    global current
    current = name
    _C.use_reference(name == "reference")


current: Backend
_use(_checked(os.environ.get("FUSED_COPY_BACKEND", "fused")))


class backend:
    """Sets what :func:`fused_copy.replay` and plans use in this process, from here on or within a ``with`` block.

    ``"fused"`` is one launch. ``"reference"`` makes the same checks and then runs one ``copy_``, and what ``fill_`` it
    takes, for each pair: the same result from torch's own operators, for A/B runs. The environment variable
    ``FUSED_COPY_BACKEND`` gives the one to begin with. The setting is the process's, not a thread's.
    ``torch.ops.fused_copy.replay`` itself, and copies inside graphs, are always fused.

    Raises:
        ValueError: the name is neither.
    """

    def __init__(self, name: Backend) -> None:
        self._previous = current
        _use(_checked(name))

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _use(self._previous)


def copy_each(
    dst: Sequence[torch.Tensor], src: Sequence[torch.Tensor], fill: Sequence[float | None] | None = None
) -> None:
    """The reference, for arguments that were checked: a copy for each pair, a fill for each box around its corner."""
    for destination, source, number in zip(dst, src, [None] * len(dst) if fill is None else fill, strict=True):
        corner = destination[tuple(slice(0, size) for size in source.shape)]
        if source.dtype == destination.dtype:
            _raw(corner).copy_(_raw(source), non_blocking=True)
        else:
            # A bool's byte may be any; torch's casts take it for 0 or 1.
            corner.copy_(_raw(source) != 0 if source.dtype == torch.bool else source, non_blocking=True)
        if number is None:
            continue
        for edge, size in enumerate(source.shape):
            box = destination[(*(slice(0, n) for n in source.shape[:edge]), slice(size, None))]
            if destination.dtype == torch.complex128:
                torch.view_as_real(box)[..., 0].fill_(number)
                torch.view_as_real(box)[..., 1].zero_()
            else:
                exact = number if destination.is_floating_point() or destination.is_complex() else int(number)
                _raw(box).fill_(_raw(torch.tensor(exact, dtype=destination.dtype)).item())


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    # torch's copy_ and fill_ normalize bools, and lack some of the rarer dtypes.
    if tensor.itemsize == 16:
        return torch.view_as_real(tensor).view(torch.int64)
    return tensor.view(_RAW_DTYPES[tensor.itemsize])
