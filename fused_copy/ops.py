"""The Python face of ``torch.ops.fused_copy.replay``, and the op's fake."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

from fused_copy._library import _C, missing
from fused_copy.sources import TYPES, Fill, Source, as_tensor, cu_seqlens, extent_of, plus, rows

Tensors = Iterable[torch.Tensor] | Mapping[str, torch.Tensor]
"""Destinations, one after the other or by name."""

Sources = Iterable[Source] | Mapping[str, Source]
"""A source for each destination, in their order or by name."""

Fills = Iterable[Fill] | Mapping[str, Fill]
"""A fill for each destination, in their order, or for some by name."""

Names = tuple[str, ...] | None


def replay(dst: Tensors, src: Sources, fill: Fills | None = None) -> None:
    """Copies every source into the leading corner of its destination, all in one launch.

    Equivalent to::

        for d, s, f in zip(dst, src, fill or [None] * len(dst)):
            corner = tuple(slice(0, n) for n in s.shape)
            if f is not None:
                d.fill_(f)  # but a number that d's dtype does not hold exactly is an error
            d[corner].copy_(s, non_blocking=True)

    Args:
        dst: static buffers, whole: any iterable, or a mapping whose names then appear in errors. Any strides whose
            elements do not overlap. All on one device, CPU or CUDA.
        src: one source for each destination, in the same order or under the same names, with as many dimensions as its
            destination and at most its size in each. A tensor of any non-negative strides, on the destinations' device,
            or in pinned host memory where that is a GPU; or, in any mix:

            - host values: a list or a tuple of numbers for one dimension, a NumPy array or another object with the
              buffer protocol, a CPU tensor that is not pinned; a number, for a destination of one element. They are
              taken at the call, so they may be changed or freed right after it.
            - None: that destination stays as it is, its fill left out too.
            - :class:`fused_copy.rows`, :class:`fused_copy.cu_seqlens` or :class:`fused_copy.plus`, made in the launch.
        fill: one number, ``"last"`` or None for each destination, or a mapping of names to these. A number is what the
            rest of the destination becomes; with None every byte outside the corner stays as it was. The nearest number
            that a dtype holds is ``float(torch.tensor(0.1, dtype=dtype))``. With ``"last"`` the rest of a destination
            of one dimension becomes the last value that its source yields. Where none is left, as of rows that are none
            to the GPU, the rest stays; where the host sees that there is none, it is an error.

    The dtypes of a pair are the same, copied bit for bit, or two among bool, uint8, int8, int16, int32, int64, float16,
    bfloat16, float32 and float64, with the values of :meth:`torch.Tensor.copy_`. Python's numbers become the
    destination's dtype as :func:`torch.tensor` makes them; integers must fit it.

    The launch goes to the current stream of the destinations' device, and is recorded where that stream is capturing.
    It does not synchronize, allocate device memory or wait. A source may be freed right after the call; the contents of
    a pinned one must stay until the copy has run. Under capture, keep sources alive for the graph's life.

    Host values for a GPU travel in the launch's own parameters, which take 32,764 bytes less what describes the copy.
    More go through pinned memory from torch's allocator, which is used again once the GPU has read it: no call
    allocates in steady state. A graph keeps the values that it was captured with until :meth:`GraphCopy.update` names
    others.

    Raises:
        RuntimeError: the input breaks one of the rules above, tensors overlap, a number does not fit its dtype, an
            index that the host can see lies beyond its table, a destination requires grad while grad mode is on, CUDA
            refuses the launch, or there is no pinned memory for values that a launch does not hold. The text names the
            pair, and the part of a source that is made of several. Nothing is written.
        TypeError: an argument is none of these, or a fill not a number that a float holds exactly.
        KeyError: the mappings have different names.
    """
    replay_in_order(*in_order(dst, src, fill))


def replay_in_order(
    names: Names, dst: Sequence[torch.Tensor], src: Sequence[Source], fill: Sequence[Fill] | None
) -> None:
    """:func:`replay`, of sequences."""
    if is_dynamo_compiling():
        _check_integers(fill)
        replay_dispatched(dst, src, fill)
    elif not _C.replay(dst, src, fill, names):
        replay_dispatched(dst, src, fill)


def replay_dispatched(dst: Sequence[torch.Tensor], src: Sequence[Source], fill: Sequence[Fill] | None) -> None:
    """For calls that the binary's fast path does not take: tensor subclasses, modes, transforms, traced code."""
    last = None if fill is None else [number == "last" for number in fill]
    numbers = None if fill is None else [None if number == "last" else number for number in fill]
    if all(isinstance(source, torch.Tensor) for source in src) and not (last and any(last)):
        torch.ops.fused_copy.replay(dst, src, numbers)
    else:
        torch.ops.fused_copy.replay_from(dst, *flatten(dst, src), numbers, last)


def flatten(dst: Sequence[torch.Tensor], src: Sequence[Source]) -> tuple[list[str], list[torch.Tensor], list[int]]:
    """Sources as ``torch.ops.fused_copy.replay_from`` takes them: what each is, their tensors, a number for each."""
    names: list[str] = []
    parts: list[torch.Tensor] = []
    numbers: list[int] = []
    for pair, source in enumerate(src):
        number = 0
        if source is None:
            names.append("none")
        elif isinstance(source, rows):
            names.append("rows" if source.lengths is None else "rows_lengths")
            parts += [source.table, as_tensor(source.index)]
            number = source.page_size
            if isinstance(source.lengths, rows):
                if source.lengths.lengths is not None or source.lengths.page_size != 1:
                    raise TypeError(
                        f"fused_copy: lengths of pair {pair} are rows with lengths or pages of their own: expected "
                        "rows(table, index) alone"
                    )
                names[-1] = "rows_lengths_rows"
                parts += [as_tensor(source.lengths.table), as_tensor(source.lengths.index)]
            elif source.lengths is not None:
                parts.append(as_tensor(source.lengths))
        elif isinstance(source, cu_seqlens):
            names.append("cu_seqlens")
            parts.append(as_tensor(source.lengths))
        elif isinstance(source, plus):
            names.append("plus")
            parts.append(as_tensor(source.source))
            number = source.n
        else:
            names.append("tensor")
            parts.append(as_tensor(source, dst[pair] if pair < len(dst) else None))
        numbers.append(number)
    return names, parts, numbers


_ROWS = ("table", "index")
_PARTS = {
    "none": (),
    "tensor": ("source",),
    "cu_seqlens": ("lengths",),
    "plus": ("source",),
    "rows": _ROWS,
    "rows_lengths": (*_ROWS, "lengths"),
    "rows_lengths_rows": (*_ROWS, "table of the lengths", "index of the lengths"),
}


def unflatten(names: Sequence[str], parts: Sequence[torch.Tensor], numbers: Sequence[int]) -> list[Source]:
    """What :func:`flatten` was given, of tensors."""
    needed = [len(_PARTS.get(name, ())) for name in names]
    if len(names) != len(numbers) or sum(needed) != len(parts) or not _PARTS.keys() >= set(names):
        raise RuntimeError(
            f"fused_copy: got {len(numbers)} numbers and {len(parts)} parts for sources {names}: pass a number for "
            f"each source, and the parts that it has: {_PARTS}"
        )
    left = iter(parts)
    made: list[Source] = []
    for name, number in zip(names, numbers, strict=True):
        if name == "none":
            made.append(None)
        elif name == "cu_seqlens":
            made.append(cu_seqlens(next(left)))
        elif name == "plus":
            made.append(plus(next(left), number))
        elif name == "tensor":
            made.append(next(left))
        else:
            table, index = next(left), next(left)
            lengths: Any = None if name == "rows" else next(left)
            made.append(
                rows(table, index, rows(lengths, next(left)) if name == "rows_lengths_rows" else lengths, number)
            )
    return made


def in_order(
    dst: Tensors, src: Sources, fill: Fills | None
) -> tuple[Names, Sequence[torch.Tensor], Sequence[Source], Sequence[Fill] | None]:
    """The names, if the destinations are a mapping, and all arguments as sequences in its order."""
    names, destinations, fills = bound_in_order(dst, fill)
    if names is None:
        if isinstance(src, (list, tuple)):
            return None, destinations, src, fills
        if isinstance(src, Mapping):
            raise TypeError(
                "fused_copy: sources are a mapping but destinations are not: pass two mappings or two lists"
            )
        return None, destinations, _sequence(src, "source"), fills
    if not isinstance(src, Mapping):
        raise TypeError("fused_copy: destinations are a mapping: pass a mapping with their names for sources")
    return names, destinations, _by_name(names, src), fills


def bound_in_order(dst: Tensors, fill: Fills | None) -> tuple[Names, Sequence[torch.Tensor], Sequence[Fill] | None]:
    """The part of a call's arguments that a plan binds, as :func:`in_order`."""
    if isinstance(dst, (list, tuple)) or not isinstance(dst, Mapping):
        destinations = dst if isinstance(dst, (list, tuple)) else _sequence(dst, "destination")
        if fill is None:
            return None, destinations, None
        if isinstance(fill, Mapping):
            raise TypeError(
                "fused_copy: fills are a mapping but destinations are not: pass a sequence of numbers and None"
            )
        return None, destinations, _sequence(fill, "fill")
    names = tuple(dst)
    if fill is None:
        return names, list(dst.values()), None
    if not isinstance(fill, Mapping):
        raise TypeError("fused_copy: destinations are a mapping: pass a mapping of their names to numbers for fills")
    if unknown := [name for name in fill if name not in dst]:
        raise KeyError(f"fused_copy: fill for {unknown}, which no destination is named: expected {list(names)}")
    return names, list(dst.values()), [fill.get(name) for name in names]


def sources_in_order(
    names: Names, sources: tuple[Source | Mapping[str, Source], ...], destinations: int, keywords: bool = False
) -> Sequence[Source]:
    """A plan's sources in its order, which a call gave one by one or as one mapping."""
    if keywords:
        raise TypeError("fused_copy: takes no keyword arguments: pass the mapping itself, plan.replay(step)")
    only = sources[0] if len(sources) == 1 else None
    if isinstance(only, Mapping):
        if names is None:
            raise TypeError(
                "fused_copy: sources are a mapping but the plan's destinations have no names: make the plan with a "
                "mapping, or pass the sources one by one"
            )
        return _by_name(names, only)
    if isinstance(only, Iterable) and not isinstance(only, (torch.Tensor, *TYPES)) and destinations != 1:
        raise TypeError(
            f"fused_copy: sources are one {type(only).__name__}: pass them one by one, plan.replay(*sources), or as a "
            "mapping of the destinations' names"
        )
    return sources  # type: ignore[return-value]  # the binary refuses what is no tensor


def _check_integers(fill: Sequence[object] | None) -> None:
    """For traced code, whose numbers the op's schema makes floats. By arithmetic that holds for symbolic ones too."""
    for pair, number in enumerate(fill or ()):
        if not isinstance(number, int):
            continue
        apart = 1  # floats are so far apart there
        while not -(2**53) * apart <= number <= 2**53 * apart:
            apart *= 2
        if number % apart != 0:
            raise TypeError(
                f"fused_copy: pair {pair}: fill is {number}: expected None or a number that a float holds exactly"
            )


Item = TypeVar("Item")


def _sequence(items: Iterable[Item], role: str) -> Sequence[Item]:
    """The items, which an iterator tells only once."""
    if isinstance(items, (list, tuple)):
        return items
    # A tensor would be taken for a list of its rows, a string for one of its letters.
    if isinstance(items, (torch.Tensor, str)) or not isinstance(items, Iterable):
        kind = "numbers and None" if role == "fill" else "tensors"
        raise TypeError(
            f"fused_copy: {role} is {type(items).__name__}: expected a list, a tuple or a mapping of {kind}"
        )
    return tuple(items)


def _by_name(names: tuple[str, ...], sources: Mapping[str, Source]) -> list[Source]:
    missing = [name for name in names if name not in sources]
    unknown = [name for name in sources if name not in names] if missing or len(sources) != len(names) else []
    if not missing and not unknown:
        return [sources[name] for name in names]
    wrong = [
        *([f"no source for {missing}"] if missing else []),
        *([f"source for {unknown}, which no destination is named"] if unknown else []),
    ]
    raise KeyError(f"fused_copy: {', and '.join(wrong)}: expected one for each of {list(names)}")


def _refuse_to_be_traced(*_: object) -> None:
    raise RuntimeError(
        "fused_copy: torch.jit.trace would lose the copy, as TorchScript does not see that items of a list are "
        "written: export with torch.export, or copy outside of what is traced"
    )


def _in_transform(op: Any, dst: list[torch.Tensor], src: Any, *others: Any) -> None:
    functorch = torch._C._functorch
    named = (
        (("destination", dst), ("source", src))
        if op is torch.ops.fused_copy.replay
        else (("destination", dst), ("part", others[0]))
    )
    for role, tensors in named:
        for number, tensor in enumerate(tensors):
            if (level := functorch.maybe_get_level(tensor)) > 0:
                transform = functorch.get_interpreter_stack()[level - 1].key().name
                which = f"part {number}" if role == "part" else f"pair {number}: {role}"
                raise RuntimeError(
                    f"fused_copy: {which} belongs to the {transform} transform of torch.func, which cannot see through "
                    "the copy: copy outside of the transform"
                )
    # What is left are plain tensors, which are copied as outside of all transforms.
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode)
    with torch._C._ExcludeDispatchKeyGuard(keys.add(torch._C.DispatchKey.FuncTorchDynamicLayerBackMode)):
        op(dst, src, *others)


def _functionalize(
    mode: Any, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> None:
    # For autograd, which while torch.compile traces has not seen the op write what it saved.
    torch.autograd.graph.increment_version(args[0])
    mode.__torch_dispatch__(func, types, args, kwargs)


def _register_functionalize() -> None:
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    for name in OPS:
        torch.library.register_torch_dispatch(f"fused_copy::{name}", FunctionalTensorMode, _functionalize)


OPS = ("replay", "replay_from")
_library = torch.library.Library("fused_copy", "IMPL")  # what it registers lives as long as it


def _register(what_is_missed: str, register: Callable[[], object]) -> None:
    """By names that are torch's own, and may go."""
    try:
        register()
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        missing.append(f"{what_is_missed} ({error})")


_register(
    "no refusal of torch.jit.trace",
    lambda: [_library.impl(name, _refuse_to_be_traced, "Tracer") for name in OPS],
)
_register(
    "no refusal of torch.func's transforms",
    lambda: [
        _library.impl(
            name,
            functools.partial(_in_transform, getattr(torch.ops.fused_copy, name)),
            "FuncTorchDynamicLayerFrontMode",
        )
        for name in OPS
    ],
)
_register("no refusal of what torch.compile saved for backward and overwrites", _register_functionalize)


def _fills(numbers: list[float | None] | None, last: list[bool] | None, count: int) -> list[Fill] | None:
    """What the two lists of the op say about each destination."""
    if numbers is None and last is None:
        return None
    numbers = [None] * count if numbers is None else numbers
    last = [False] * len(numbers) if last is None else last
    return ["last" if is_last else number for number, is_last in zip(numbers, last, strict=True)]


def _replay_from_dispatched(
    dst: list[torch.Tensor],
    src: list[str],
    parts: list[torch.Tensor],
    numbers: list[int],
    fill: list[float | None] | None = None,
    fill_last: list[bool] | None = None,
) -> None:
    _C.replay_dispatched(dst, unflatten(src, parts, numbers), _fills(fill, fill_last, len(dst)))


if not _C.registers_op:  # torch 2.9, whose stable ABI has no lists of tensors
    for _key in ("CompositeExplicitAutograd", "AutogradNestedTensor", "Conjugate", "Negative"):
        _library.impl("replay", lambda dst, src, fill=None: _C.replay_dispatched(dst, src, fill), _key)
        _library.impl("replay_from", _replay_from_dispatched, _key)


def _describe(tensor: torch.Tensor, written: bool, whole: bool) -> tuple[Any, ...]:
    """What ``_C.check_metadata`` reads of a tensor. Unless it is whole, it passes for an empty one."""
    strided = tensor.layout is torch.strided
    return (
        str(tensor.dtype).removeprefix("torch."),
        tensor.device.type,
        tensor.device.index or 0,
        strided,
        written and tensor.requires_grad and torch.is_grad_enabled(),
        tensor.shape if whole and strided else [0] * tensor.dim(),
        tensor.stride() if whole and strided else [1] * tensor.dim(),
    )


def _check_device(pair: int, role: str, source: torch.Tensor, to: torch.Tensor, first: torch.Tensor) -> None:
    torch._check(
        # A host source may be pinned, which only a real tensor can tell: the op itself checks it.
        to.device == first.device
        and (source.device == to.device or (source.device.type == "cpu" and to.device.type == "cuda")),
        lambda: (
            f"fused_copy: {f'pair {pair}: source' if role == 'source' else f'{role} of pair {pair}'} is on "
            f"{source.device} and the destination on {to.device}, destination 0 on {first.device}: pass tensors of one "
            "device, or pinned sources for a GPU"
        ),
    )


def _check_corner(pair: int, to: torch.Tensor, shape: Sequence[int]) -> None:
    torch._check(
        len(shape) == to.dim(),
        lambda: (
            f"fused_copy: pair {pair}: source has shape {tuple(shape)} but the destination has shape "
            f"{tuple(to.shape)}: expected the same number of dimensions (no broadcasting)"
        ),
    )
    for size, limit in zip(shape, to.shape, strict=True):
        torch._check(
            size <= limit,
            lambda: (
                f"fused_copy: pair {pair}: source has shape {tuple(shape)}, larger than the destination's "
                f"{tuple(to.shape)}"
            ),
        )


# To note where the fake stands, torch has inspect look for the module of this file among all that are loaded, which
# takes half of the time of importing the package: the answer, where inspect would keep it.
getattr(inspect, "modulesbyfile", {})[__file__] = __name__


@torch.library.register_fake("fused_copy::replay")
def _replay_fake(dst: list[torch.Tensor], src: list[torch.Tensor], fill: list[float | None] | None = None) -> None:
    # The planner's checks of what a fake tensor knows. Where sizes are symbolic, those of shapes are stated here.
    for pair, (to, source) in enumerate(zip(dst, src, strict=False)):
        _check_device(pair, "source", source, to, dst[0])
        torch._check(
            source.dim() == to.dim(),
            lambda pair=pair, to=to, source=source: (
                f"fused_copy: pair {pair}: source has shape {tuple(source.shape)} but the destination has shape "
                f"{tuple(to.shape)}: expected the same number of dimensions (no broadcasting)"
            ),
        )
    whole_dst = [not to._has_symbolic_sizes_strides for to in dst]
    whole_src = [not source._has_symbolic_sizes_strides for source in src]
    # A source of a size that is known does not fit a destination that passes for an empty one.
    whole_src[: len(dst)] = map(operator.and_, whole_src, whole_dst)
    _C.check_metadata(
        [_describe(to, True, whole) for to, whole in zip(dst, whole_dst, strict=True)],
        [_describe(source, False, whole) for source, whole in zip(src, whole_src, strict=True)],
        fill and [f if isinstance(f, (int, float)) else None for f in fill],
    )
    for pair, (to, source) in enumerate(zip(dst, src, strict=True)):
        _check_corner(pair, to, source.shape)


@torch.library.register_fake("fused_copy::replay_from")
def _replay_from_fake(
    dst: list[torch.Tensor],
    src: list[str],
    parts: list[torch.Tensor],
    numbers: list[int],
    fill: list[float | None] | None = None,
    fill_last: list[bool] | None = None,
) -> None:
    # What the planner checks of tensors that are copied as they lie; of others their devices and shapes.
    sources = unflatten(src, parts, numbers)
    if len(dst) != len(src):
        raise RuntimeError(f"fused_copy: got {len(dst)} destinations and {len(src)} sources: pass one for each")
    roles = [(pair, role) for pair, name in enumerate(src) for role in _PARTS[name]]
    for (pair, role), part in zip(roles, parts, strict=True):
        _check_device(pair, role, part, dst[pair], dst[0])
    tensors, corners = [], {}
    for pair, (to, source) in enumerate(zip(dst, sources, strict=True)):
        if isinstance(source, torch.Tensor):
            tensors.append(source)
            continue
        tensors.append(to.new_empty([0] * to.dim()))
        corners[pair], _ = extent_of(source, to)
    _replay_fake(dst, tensors, fill)
    for pair, shape in corners.items():
        _check_corner(pair, dst[pair], shape)
