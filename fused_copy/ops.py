"""The Python face of ``torch.ops.fused_copy.replay``, and the op's fake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.compiler import is_dynamo_compiling

from fused_copy import backends
from fused_copy._library import _C

Tensors = Sequence[torch.Tensor] | Mapping[str, torch.Tensor]
Fills = Sequence[float | None] | Mapping[str, float]

CASTABLE = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    }
)


def replay(dst: Tensors, src: Tensors, fill: Fills | None = None) -> None:
    """Copies every source into the leading corner of its destination, all in one launch.

    Equivalent to::

        for d, s, f in zip(dst, src, fill or [None] * len(dst)):
            corner = tuple(slice(0, n) for n in s.shape)
            if f is not None:
                d.fill_(f)
            d[corner].copy_(s, non_blocking=True)

    Args:
        dst: static buffers, whole: a sequence, or a mapping whose names then appear in errors. Any strides whose
            elements do not overlap. All on one device, CPU or CUDA.
        src: one tensor for each destination, in the same order or under the same names, with as many dimensions as its
            destination and at most its size in each. Any non-negative strides. On the destinations' device, or in
            pinned host memory where that is a GPU.
        fill: one number or None for each destination, or a mapping of names to numbers. A number is what the rest of
            the destination becomes; with None every byte outside the corner stays as it was.

    The dtypes of a pair are the same, copied bit for bit, or two among bool, uint8, int8, int16, int32, int64, float16,
    bfloat16, float32 and float64, with the values of :meth:`torch.Tensor.copy_`.

    The launch goes to the current stream of the destinations' device, and is recorded where that stream is capturing.
    It does not synchronize, allocate device memory or wait. A source may be freed right after the call; the contents of
    a pinned one must stay until the copy has run. Under capture, keep sources alive for the graph's life.

    Raises:
        RuntimeError: the input breaks one of the rules above, tensors overlap, a destination requires grad while grad
            mode is on, or CUDA refuses the launch. The text names the pair. Nothing is written.
        TypeError: an argument is not a tensor, or a fill not a number.
        KeyError: the mappings have different names.
    """
    names, dst, src, fill = in_order(dst, src, fill)
    if is_dynamo_compiling() or not _C.replay(dst, src, fill, names):
        replay_elsewhere(dst, src, fill, names)


def replay_elsewhere(
    dst: Sequence[torch.Tensor],
    src: Sequence[torch.Tensor],
    fill: Sequence[float | None] | None,
    names: tuple[str, ...] | None,
) -> None:
    """For calls that the binary's fast door does not take."""
    if not is_dynamo_compiling() and backends.current == "reference" and _C.explain(dst, src, fill, names) is not None:
        backends.copy_each(dst, src, fill)
    else:
        torch.ops.fused_copy.replay(dst, src, fill)


def in_order(
    dst: Tensors, src: Tensors, fill: Fills | None
) -> tuple[tuple[str, ...] | None, Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[float | None] | None]:
    """The names, if the destinations are a mapping, and all arguments as sequences in its order."""
    names, destinations, fills = bound_in_order(dst, fill)
    if names is None:
        return None, destinations, src, fills  # type: ignore[return-value]  # the binary refuses a mapping here
    if not isinstance(src, Mapping):
        raise TypeError("fused_copy: destinations are a mapping: pass a mapping with their names for sources")
    if missing := [name for name in names if name not in src]:
        raise KeyError(f"fused_copy: no source for {missing}: expected one for each of {list(names)}")
    if len(src) != len(names):
        _check_names("source", src, dst)
    return names, destinations, [src[name] for name in names], fills


def bound_in_order(
    dst: Tensors, fill: Fills | None
) -> tuple[tuple[str, ...] | None, Sequence[torch.Tensor], Sequence[float | None] | None]:
    """The part of a call's arguments that a plan binds, as :func:`in_order`."""
    if isinstance(dst, (list, tuple)) or not isinstance(dst, Mapping):
        if fill is not None and isinstance(fill, Mapping):
            raise TypeError(
                "fused_copy: fills are a mapping but destinations are not: pass a sequence of numbers and None"
            )
        return None, dst, fill
    names = tuple(dst)
    if fill is None:
        return names, list(dst.values()), None
    if not isinstance(fill, Mapping):
        raise TypeError("fused_copy: destinations are a mapping: pass a mapping of their names to numbers for fills")
    _check_names("fill", fill, dst)
    return names, list(dst.values()), [fill.get(name) for name in names]


def _check_names(role: str, given: Mapping[str, object], dst: Tensors) -> None:
    if unknown := [name for name in given if name not in dst]:
        raise KeyError(f"fused_copy: {role} for {unknown}, which no destination is named: expected {list(dst)}")


if not _C.registers_op:  # torch 2.9, whose stable ABI has no lists of tensors
    _library = torch.library.Library("fused_copy", "IMPL")  # what it registers lives as long as it
    for _key in ("CompositeExplicitAutograd", "AutogradNestedTensor", "Conjugate", "Negative"):
        _library.impl("replay", lambda dst, src, fill=None: _C.replay_dispatched(dst, src, fill), _key)


@torch.library.register_fake("fused_copy::replay")
def _replay_fake(dst: list[torch.Tensor], src: list[torch.Tensor], fill: list[float | None] | None = None) -> None:
    # The planner's checks of what a fake tensor knows; sizes may be symbolic, so torch._check states them.
    torch._check(
        len(dst) == len(src),
        lambda: f"fused_copy: got {len(dst)} destinations and {len(src)} sources: pass one source for each destination",
    )
    torch._check(
        fill is None or len(fill) == len(dst),
        lambda: f"fused_copy: got {len(fill or ())} fills for {len(dst)} destinations: pass one for each",
    )
    for pair, (to, source) in enumerate(zip(dst, src, strict=True)):
        torch._check(
            # A host source may be pinned, which only a real tensor can tell: the op itself checks it.
            to.device == dst[0].device
            and (source.device == to.device or (source.device.type == "cpu" and to.device.type == "cuda")),
            lambda pair=pair, to=to, source=source: (
                f"fused_copy: pair {pair}: source is on {source.device} and the destination on {to.device}, "
                f"destination 0 on {dst[0].device}: pass tensors of one device, or pinned sources for a GPU"
            ),
        )
        torch._check(
            source.dtype == to.dtype or (source.dtype in CASTABLE and to.dtype in CASTABLE),
            lambda pair=pair, to=to, source=source: (
                f"fused_copy: pair {pair}: source is {source.dtype} but the destination is {to.dtype}: pass the same "
                "dtype"
            ),
        )
        torch._check(
            source.dim() == to.dim(),
            lambda pair=pair, to=to, source=source: (
                f"fused_copy: pair {pair}: source has shape {tuple(source.shape)} but the destination has shape "
                f"{tuple(to.shape)}: expected the same number of dimensions (no broadcasting)"
            ),
        )
        for size, limit in zip(source.shape, to.shape, strict=True):
            torch._check(
                size <= limit,
                lambda pair=pair, to=to, source=source: (
                    f"fused_copy: pair {pair}: source has shape {tuple(source.shape)}, larger than the destination's "
                    f"{tuple(to.shape)}"
                ),
            )
