"""The ways to fill static buffers, each written as its users write it.

A peer is a function from the static buffers and several sets of sources, in the buffers' order and for their leading
corners, to a :class:`Peer`; its docstring's first line is what the report says about it. ``@peer`` names it and adds it
to ``PEERS``; in that order peers are timed and shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import fused_copy
from fused_copy._library import _C
from fused_copy.bench.timing import Call

Tensors = Mapping[str, torch.Tensor]
Corner = slice | tuple[slice, ...]

SIX_COPIES = "slices + copy_"
"""What engines do today: the peer that the others are compared with."""

CONTIGUOUS = "one contiguous copy_"
"""No way to fill buffers, but what the GPU can do: the same total bytes from one tensor to another."""

BARE_LAUNCH = "bare launch"
GRAPH_REPLAY = "graph.replay() alone"
UPDATE_AND_REPLAY = "copy.update + graph.replay()"

POISON = 90
"""What buffers hold before a peer is checked; fits every dtype."""


@dataclass(frozen=True)
class Peer:
    """One way to fill ``buffers``: ``calls[i]`` copies the tensors of ``sets[i]`` into their leading corners."""

    calls: Sequence[Call]
    buffers: Tensors
    sets: Sequence[Tensors]
    capturable: bool = True
    copies: bool = True
    """False for what is measured to compare with, and fills no buffers."""


class Unavailable(Exception):
    """The peer cannot run on this machine, or does not copy tensors like these."""


class WrongResult(Exception):
    """A peer left other bytes than ``copy_`` does."""


Factory = Callable[[Tensors, Sequence[Tensors]], Peer]
PEERS: dict[str, Factory] = {}


def peer(name: str) -> Callable[[Factory], Factory]:
    """Adds the function to ``PEERS`` under ``name``."""

    def add(factory: Factory) -> Factory:
        PEERS[name] = factory
        return factory

    return add


def check(name: str, peer: Peer) -> None:
    """Raises :class:`WrongResult` unless every call leaves what ``copy_`` leaves, in the corners and around them."""
    for call, sources in zip(peer.calls, peer.sets, strict=True):
        if not peer.copies:
            call()
            continue
        expected = {}
        for key, buffer in peer.buffers.items():
            buffer.fill_(POISON)
            expected[key] = buffer.clone()
            expected[key][_corner(sources[key])].copy_(sources[key])
        call()
        for key, buffer in peer.buffers.items():
            if not torch.equal(buffer, expected[key]):
                index = tuple((buffer != expected[key]).nonzero()[0].tolist())
                raise WrongResult(
                    f"{name} is wrong: {key} has {buffer[index].item()} at {list(index)}, "
                    f"where copy_ leaves {expected[key][index].item()}"
                )


def _corner(source: torch.Tensor) -> Corner:
    # A bare slice, as in buffer[:bs], indexes faster than a tuple of one.
    corner = tuple(slice(size) for size in source.shape)
    return corner[0] if len(corner) == 1 else corner


def _pairs(buffers: Tensors, sources: Tensors) -> list[tuple[torch.Tensor, Corner, torch.Tensor]]:
    return [(buffer, _corner(sources[name]), sources[name]) for name, buffer in buffers.items()]


def _sliced(buffers: Tensors, sources: Tensors) -> list[torch.Tensor]:
    return [buffer[corner] for buffer, corner, _ in _pairs(buffers, sources)]


@peer(SIX_COPIES)
def slices_and_copy(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """A slice and a ``copy_`` for each tensor, at less than an engine's price: no attributes read, no slices made."""

    def step(pairs: list[tuple[torch.Tensor, Corner, torch.Tensor]]) -> None:
        for buffer, corner, source in pairs:
            buffer[corner].copy_(source)

    return Peer([partial(step, _pairs(buffers, sources)) for sources in sets], buffers, sets)


@peer("copy_, pre-sliced")
def sliced_copy(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """The same with every slice kept from an earlier step, which needs a cache keyed by batch size and width."""

    def step(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for corner, source in pairs:
            corner.copy_(source)

    calls = [partial(step, list(zip(_sliced(buffers, sources), sources.values(), strict=True))) for sources in sets]
    return Peer(calls, buffers, sets)


@peer("_foreach_copy_")
def foreach(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """``torch._foreach_copy_`` on fresh slices. One strided destination makes it a loop of copies."""

    def step(pairs: list[tuple[torch.Tensor, Corner, torch.Tensor]]) -> None:
        torch._foreach_copy_([buffer[corner] for buffer, corner, _ in pairs], [source for *_, source in pairs])

    return Peer([partial(step, _pairs(buffers, sources)) for sources in sets], buffers, sets)


@peer("_foreach_copy_, pre-sliced")
def sliced_foreach(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """``torch._foreach_copy_`` on slices kept from an earlier step."""
    calls = [partial(torch._foreach_copy_, _sliced(buffers, sources), list(sources.values())) for sources in sets]
    return Peer(calls, buffers, sets)


@peer("_foreach_copy_, by dtypes")
def grouped_foreach(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """``torch._foreach_copy_`` once for each pair of dtypes, on fresh slices, as SGLang fills its decode buffers."""

    def step(pairs: list[tuple[torch.Tensor, Corner, torch.Tensor]]) -> None:
        groups: dict[tuple[torch.dtype, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for buffer, corner, source in pairs:
            destinations, sources = groups.setdefault((buffer.dtype, source.dtype), ([], []))
            destinations.append(buffer[corner])
            sources.append(source)
        for destinations, sources in groups.values():
            torch._foreach_copy_(destinations, sources)

    return Peer([partial(step, _pairs(buffers, sources)) for sources in sets], buffers, sets)


@peer("Triton, one kernel")
def triton(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """A Triton kernel written for the six tensors of a decode step."""
    if not next(iter(buffers.values())).is_cuda:
        raise Unavailable("it needs a GPU")
    if "page_table" not in buffers:
        raise Unavailable("it copies the six tensors of a decode step alone")
    try:
        from fused_copy.bench.triton_kernel import copy_six

        calls = [partial(copy_six, buffers, sources) for sources in sets]
        calls[0]()
    except Exception as error:  # not installed, or no C compiler, or a GPU that it does not support
        raise Unavailable(f"{type(error).__name__}: {str(error).strip()}") from error
    return Peer(calls, buffers, sets)


@peer(CONTIGUOUS)
def contiguous(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """One ``copy_`` of the same total bytes."""
    flat = [torch.cat([source.reshape(-1).view(torch.uint8) for source in sources.values()]) for sources in sets]
    buffer = torch.empty_like(flat[0])
    return Peer([partial(buffer.copy_, source) for source in flat], {"all": buffer}, [{"all": s} for s in flat])


@peer("torch.ops.fused_copy.replay")
def op(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """The op itself, on lists."""
    destinations = list(buffers.values())
    calls = [partial(torch.ops.fused_copy.replay, destinations, list(sources.values())) for sources in sets]
    return Peer(calls, buffers, sets)


@peer("fused_copy.replay")
def replay(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """The op's Python face, on lists."""
    destinations = list(buffers.values())
    return Peer([partial(fused_copy.replay, destinations, list(sources.values())) for sources in sets], buffers, sets)


@peer("fused_copy.replay, mappings")
def replay_mappings(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """The op's Python face, on mappings, whose names it matches."""
    return Peer([partial(fused_copy.replay, buffers, sources) for sources in sets], buffers, sets)


@peer("plan.replay")
def plan_replay(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """Destinations bound in a :class:`fused_copy.Plan`."""
    plan = fused_copy.Plan(buffers)
    return Peer([partial(plan.replay, *sources.values()) for sources in sets], buffers, sets)


@peer(BARE_LAUNCH)
def bare_launch(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """One launch of a kernel that does nothing, from C++: the floor of every way that launches."""
    device = next(iter(buffers.values())).device
    if device.type != "cuda":
        raise Unavailable("it needs a GPU")
    call = partial(_C.launch_nothing, torch.cuda.current_device())
    return Peer([call] * len(sets), buffers, sets, copies=False)


def _capture(buffers: Tensors, sets: Sequence[Tensors]) -> tuple[torch.cuda.CUDAGraph, fused_copy.GraphCopy]:
    if not next(iter(buffers.values())).is_cuda:
        raise Unavailable("it needs a GPU")
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        copy = fused_copy.Plan(buffers).capture(graph, *sets[0].values())
    return graph, copy


@peer(GRAPH_REPLAY)
def graph_replay(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """``graph.replay()`` alone, of a graph that holds one copy: what ``copy.update`` adds to."""
    graph, _ = _capture(buffers, sets)
    return Peer([graph.replay] * len(sets), buffers, sets, capturable=False, copies=False)


@peer(UPDATE_AND_REPLAY)
def update_and_replay(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """``copy.update`` on the copy inside that graph, then ``graph.replay()``."""
    graph, copy = _capture(buffers, sets)

    def step(sources: Sequence[torch.Tensor]) -> None:
        copy.update(*sources)
        graph.replay()

    return Peer([partial(step, list(sources.values())) for sources in sets], buffers, sets, capturable=False)
