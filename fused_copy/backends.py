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
from fused_copy.sources import Fill, Source, Values, as_tensor, cu_seqlens, plus, rows

Backend = Literal["fused", "reference", "fallback"]
"""The name of a back end, as :class:`fused_copy.backend` explains them."""

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
    takes, for each pair: the same result from torch's own operators, for A/B runs. What is no tensor becomes one first.
    ``"fallback"`` is for loops that must not stop: it is one launch, and where that cannot do what torch's operators
    can (tensors that overlap or lie on another GPU, tables in pageable memory, other pairs of dtypes, more dimensions,
    conjugate views) they do it, pair by pair in the list's order, with a RuntimeWarning the first time that names pair
    and reason; :func:`fused_copy.fallbacks` counts such calls. What is wrong for both, as shapes that do not fit, still
    raises, before anything is written.

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


def fall_back(dst: Sequence[torch.Tensor], src: Sequence[Source], fill: Sequence[Fill] | None, reason: str) -> None:
    """For arguments that were checked, but for what one launch cannot do."""
    global _fallbacks
    for destination, source in zip(dst, src, strict=True):
        if isinstance(source, torch.Tensor) and destination.dtype != source.dtype:
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
def copy_each(dst: Sequence[torch.Tensor], src: Sequence[Source], fill: Sequence[Fill] | None = None) -> None:
    """The reference, for arguments that were checked: torch's operators for each pair, one pair after the other."""
    for destination, source, rest in zip(dst, src, [None] * len(dst) if fill is None else fill, strict=True):
        if source is None:
            continue
        value, taken = _yielded(destination, source)
        corner = destination[tuple(slice(0, size) for size in value.shape)]
        if value.device == destination.device and _may_overlap(destination, value):
            value = value.clone()
        last = None
        if rest == "last":
            yields = value if taken is None else value[taken]
            last = yields[-1:].clone() if yields.numel() else None
        _copy(corner, value, taken)
        if last is not None:
            _copy(destination[value.shape[0] :], last.expand(destination.shape[0] - value.shape[0]), None)
            if taken is not None:
                _copy(corner, last.expand_as(corner), ~taken)
        if rest is None or rest == "last":
            continue
        number = float(rest)
        for edge, size in enumerate(value.shape):
            _fill(destination[(*(slice(0, n) for n in value.shape[:edge]), slice(size, None))], number)
        if taken is not None:
            filled = corner.clone()
            _fill(filled, number)
            _copy(corner, filled, ~taken)


def _yielded(destination: torch.Tensor, source: Source) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a source yields, of its corner's shape, and which of it: all where that is None."""
    device = destination.device
    if isinstance(source, rows):
        picked, there = _pick(source.table, source.index, device)
        if source.page_size != 1:
            step = min(source.page_size, max(picked.shape[1], 1))  # torch's own arithmetic of steps overflows
            picked = picked[:, ::step].to(torch.int64).div(source.page_size, rounding_mode="floor")
        taken = there.view(-1, *[1] * (picked.dim() - 1)).expand_as(picked)
        if source.lengths is not None:
            if isinstance(source.lengths, rows):
                lengths, known = _pick(source.lengths.table, source.lengths.index, device)
                lengths = lengths.where(known, 0)
            else:
                lengths = as_tensor(source.lengths).to(device)
            pages = lengths.to(torch.int64).clamp(min=0).sub(1).div(source.page_size, rounding_mode="floor").add(1)
            columns = torch.arange(picked.shape[1], device=device) < pages[:, None]
            taken = taken & columns.view(*columns.shape, *[1] * (picked.dim() - 2))
        return picked, taken
    if isinstance(source, cu_seqlens):
        lengths = as_tensor(source.lengths).to(device)
        return torch.cat([lengths.new_zeros(1, dtype=torch.int64), lengths.cumsum(0, dtype=torch.int64)]), None
    if isinstance(source, plus):
        return as_tensor(source.source).to(device) + source.n, None
    if not isinstance(source, torch.Tensor):
        source = as_tensor(source, destination).to(device)
    return source, None


def _pick(table: Values, index: Values, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a table, and which of them are there."""
    table, index = as_tensor(table).to(device), as_tensor(index).to(device)
    there = (index >= 0) & (index < table.shape[0])
    if table.shape[0] == 0:  # of which torch picks no rows, not even none
        table = table.new_zeros((1, *table.shape[1:]))
    return table.index_select(0, index.where(there, 0)), there


def _copy(corner: torch.Tensor, value: torch.Tensor, taken: torch.Tensor | None) -> None:
    """Copies what is taken of a value of the corner's shape."""
    if value.dtype == corner.dtype and not _is_lazy(value) and not _is_lazy(corner):
        corner, value = _raw(corner), _raw(value)
    elif value.dtype == torch.bool:
        value = _raw(value) != 0  # a bool's byte may be any; torch's casts take it for 0 or 1
    if taken is None:
        corner.copy_(value, non_blocking=True)
    else:
        corner.copy_(torch.where(_items(taken, corner), value.to(corner.dtype), corner))


def _items(taken: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
    """For elements of 16 bytes, which go as two integers each."""
    return taken if taken.dim() == corner.dim() else taken.unsqueeze(-1)


def _fill(box: torch.Tensor, number: float) -> None:
    if _is_lazy(box):
        box.fill_(number)
    elif box.dtype == torch.complex128:
        torch.view_as_real(box)[..., 0].fill_(number)
        torch.view_as_real(box)[..., 1].zero_()
    else:
        exact = number if box.is_floating_point() or box.is_complex() else int(number)
        _raw(box).fill_(_raw(torch.tensor(exact, dtype=box.dtype, device="cpu")).item())


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
