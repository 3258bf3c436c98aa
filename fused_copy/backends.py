"""Which code copies: this package's, or torch's own operators for comparison."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, get_args

import torch

from fused_copy._library import _C

Backend = Literal["fused", "reference", "fallback"]

_RAW_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checked(name: str) -> Backend:
    if name not in get_args(Backend):
        raise ValueError(f"fused_copy: backend is {name!r}: expected one of {get_args(Backend)}")
    return name  # type: ignore[return-value]


def _use(name: Backend) -> None:
    global current
    current = name
    _C.use_backend(name)


current: Backend
_use(_checked(os.environ.get("FUSED_COPY_BACKEND", "fused")))


class backend:
    """Sets what :func:`fused_copy.replay` and plans use in this process, from here on or within a ``with`` block.

    ``"fused"`` is one launch. ``"reference"`` makes the same checks and then runs one ``copy_``, and what ``fill_`` it
    takes, for each pair: the same result from torch's own operators, for A/B runs. ``"fallback"`` is for loops that
    must not stop: it is one launch, and where that cannot do what torch's operators can (tensors that overlap, on
    another GPU, or in pageable memory, other pairs of dtypes, more dimensions, conjugate views) they do it, pair by
    pair in the list's order, with a RuntimeWarning the first time that names pair and reason;
    :func:`fused_copy.fallbacks` counts such calls. What is wrong for both, as shapes that do not fit, still raises,
    before anything is written.

    The environment variable ``FUSED_COPY_BACKEND`` gives the one to begin with. The setting is the process's, not a
    thread's. ``torch.ops.fused_copy.replay`` itself, copies inside graphs, and tensor subclasses are always fused.

    Raises:
        ValueError: there is no back end of this name.
    """

    def __init__(self, name: Backend) -> None:
        self._previous = current
        _use(_checked(name))

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _use(self._previous)


_fallbacks = 0
_warned: set[str] = set()


def fallbacks() -> int:
    """How many calls of this process the back end ``"fallback"`` left to torch's operators."""
    return _fallbacks


def fall_back(
    dst: Sequence[torch.Tensor], src: Sequence[torch.Tensor], fill: Sequence[float | None] | None, reason: str
) -> None:
    """For arguments that were checked, but for what one launch cannot do."""
    global _fallbacks
    for destination, source in zip(dst, src, strict=True):
        if destination.dtype != source.dtype:
            # Torch refuses some pairs of dtypes too: before anything is written.
            torch.zeros(1, dtype=source.dtype, device=source.device).to(destination.dtype)
    _fallbacks += 1
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"{reason}. Torch's operators copy instead, pair by pair", RuntimeWarning, stacklevel=_callers_level()
        )
    copy_each(dst, src, fill)


def _callers_level() -> int:
    """How far up the stack of the function that asks the package was called."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fused_copy."):
        level, frame = level + 1, frame.f_back
    return level


@torch.no_grad()
def copy_each(
    dst: Sequence[torch.Tensor], src: Sequence[torch.Tensor], fill: Sequence[float | None] | None = None
) -> None:
    """The reference, for arguments that were checked: a copy for each pair, a fill for each box around its corner."""
    for destination, source, number in zip(dst, src, [None] * len(dst) if fill is None else fill, strict=True):
        corner = destination[tuple(slice(0, size) for size in source.shape)]
        value = source.clone() if _may_overlap(destination, source) else source
        if source.dtype == destination.dtype and not _is_lazy(source) and not _is_lazy(destination):
            _raw(corner).copy_(_raw(value), non_blocking=True)
        else:
            # A bool's byte may be any; torch's casts take it for 0 or 1.
            corner.copy_(_raw(value) != 0 if source.dtype == torch.bool else value, non_blocking=True)
        if number is None:
            continue
        for edge, size in enumerate(source.shape):
            box = destination[(*(slice(0, n) for n in source.shape[:edge]), slice(size, None))]
            if _is_lazy(destination):
                box.fill_(number)
            elif destination.dtype == torch.complex128:
                torch.view_as_real(box)[..., 0].fill_(number)
                torch.view_as_real(box)[..., 1].zero_()
            else:
                exact = number if destination.is_floating_point() or destination.is_complex() else int(number)
                _raw(box).fill_(_raw(torch.tensor(exact, dtype=destination.dtype, device="cpu")).item())


def _may_overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """As far as their storages tell, which two tensors may have of one memory."""
    if a.device != b.device:
        return False
    (a_begin, a_bytes), (b_begin, b_bytes) = (
        (s.data_ptr(), s.nbytes()) for s in map(torch.Tensor.untyped_storage, (a, b))
    )
    return a_begin < b_begin + b_bytes and b_begin < a_begin + a_bytes


def _is_lazy(tensor: torch.Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    # torch's copy_ and fill_ normalize bools, and lack some of the rarer dtypes.
    if tensor.itemsize == 16:
        return torch.view_as_real(tensor).view(torch.int64)
    return tensor.view(_RAW_DTYPES[tensor.itemsize])
