"""Destinations bound once, and their copy inside a CUDA graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, overload

import torch
from torch.compiler import is_dynamo_compiling

from fused_copy._library import _C
from fused_copy.ops import Fills, Names, Tensors, bound_in_order, replay_in_order, sources_in_order
from fused_copy.sources import Fill, Source

StepSource = Source | Mapping[str, Source]
"""What a plan is called with: a source for each destination, or one mapping of all their names to sources."""


class StepCall(Protocol):
    """Takes a step: one mapping of the destinations' names to sources, or the sources in the destinations' order."""

    @overload
    def __call__(self, step: Mapping[str, Source], /) -> None: ...
    @overload
    def __call__(self, *sources: Source) -> None: ...


class _Replay(property):
    """Read by C code: a getter in Python would take a fifth of a call. ``torch.compile`` looks at ``fget`` instead."""

    if TYPE_CHECKING:

        def __get__(self, plan: Plan, owner: type[Plan]) -> StepCall: ...  # type: ignore[override]

    @staticmethod
    def fget(plan: Plan) -> Callable[..., None]:
        return plan._replay_traced


class Plan:
    """Static buffers, checked and held once, so that a call only reads its sources.

    Args:
        dst: the static buffers, as for :func:`fused_copy.replay`: a sequence, or a mapping whose names then appear in
            errors. Their shapes and strides are frozen, and their memory is held: once a tensor has come to lie
            elsewhere (``.data =``, ``set_``, ``resize_``, ``share_memory_``), every call raises, and says to bind anew.
        fill: as for :func:`fused_copy.replay`.

    A plan may be shared by threads, deep-copied and pickled: copies are made anew from destinations and fill. (To hand
    CPU tensors to another process moves them to shared memory, after which this plan raises.) Fake tensors, subclasses
    and code under ``torch.compile`` go through ``torch.ops.fused_copy.replay``, and the repr says so. With grad mode
    on, each call asks whether a destination has come to require grad, and outside of inference mode it moves the
    destinations' version counters, as autograd could notice: both cost more than the copy, so replay in inference mode.

    Raises:
        RuntimeError, TypeError, KeyError: as :func:`fused_copy.replay`, for what concerns the destinations alone.
    """

    def __init__(self, dst: Tensors, fill: Fills | None = None) -> None:
        names, destinations, fills = bound_in_order(dst, fill)
        self.names = names
        self.destinations = tuple(destinations)
        self.fill = None if fills is None else tuple(fills)
        self._bound, self._unbound_because = (
            (None, "made under torch.compile")
            if is_dynamo_compiling()
            else _C.bind(self.destinations, self.fill, names)
        )
        # Not a method of the plan, which would then hold itself.
        self._replay = (
            functools.partial(_replay_unbound, names, self.destinations, self.fill)
            if self._bound is None
            else self._bound.replay
        )

    replay = _Replay(
        operator.attrgetter("_replay"),
        doc="""``replay(step)`` or ``replay(*sources)`` copies every source into the leading corner of its destination,
        in one launch: a mapping by the destinations' names, in any order, or the sources in the destinations' order.

        Sources, shapes, dtypes, devices, stream, capture and errors are those of :func:`fused_copy.replay`. A list of
        numbers is one source: ``plan.replay([7, 8], [3, 5])``. What the attribute yields is a C function that may be
        kept for the plan's life; ``torch.compile`` sees one that calls the op.
        """,
    )

    def _replay_traced(self, *sources: StepSource) -> None:
        _replay_unbound(self.names, self.destinations, self.fill, *sources)

    def capture(self, graph: torch.cuda.CUDAGraph, *sources: StepSource) -> GraphCopy:
        """Records the copy as a node of the graph that is being captured on the destinations' device's current stream.

        Args:
            graph: the graph under capture, made with ``keep_graph=True``.
            sources: as for :meth:`replay`, one by one or as one mapping. The graph copies these until
                :meth:`GraphCopy.update` names others: tensors as they are at each launch, host values as they are now.
                The returned object holds them, as a graph that is instantiated anew begins with them.

        Raises:
            RuntimeError: as :meth:`replay`; the destinations are not on a GPU; the stream is not capturing; the graph
                was not made with ``keep_graph=True``.
            TypeError: the graph is no ``torch.cuda.CUDAGraph``, or destinations or sources are not plain tensors.
        """
        if not isinstance(graph, torch.cuda.CUDAGraph):
            raise TypeError(f"fused_copy: graph is {type(graph).__name__}: expected a torch.cuda.CUDAGraph")
        if self._bound is None:
            raise TypeError(
                "fused_copy: capture needs plain destinations that one launch can copy to, and a torch whose tensors "
                f"this package can read: {self._unbound_because}, torch {torch.__version__}"
            )
        return GraphCopy(
            self, self._bound.capture(graph, tuple(sources_in_order(self.names, sources, len(self.destinations))))
        )

    def __reduce__(self) -> tuple[type[Plan], tuple[Tensors, Fills | None]]:
        """Copies and pickles are made anew from destinations and fill."""
        if self.names is None:
            return Plan, (self.destinations, self.fill)
        fill = (
            None
            if self.fill is None
            else {name: number for name, number in zip(self.names, self.fill, strict=True) if number is not None}
        )
        return Plan, (dict(zip(self.names, self.destinations, strict=True)), fill)

    def __repr__(self) -> str:
        device = self.destinations[0].device if self.destinations else "no device"
        rows = [
            (
                str(i if self.names is None else self.names[i]),
                f"{str(buffer.dtype).removeprefix('torch.')}{list(buffer.shape)}",
                "" if buffer.is_contiguous() else f"strides {tuple(buffer.stride())}",
                "" if self.fill is None or self.fill[i] is None else f"fill {self.fill[i]!r}",
            )
            for i, buffer in enumerate(self.destinations)
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        unbound = "" if self._bound is not None else f", not on the fast path: {self._unbound_because}"
        return "\n  ".join([f"fused_copy.Plan of {len(rows)} destinations on {device}{unbound}", *lines])


class GraphCopy:
    """A plan's copy inside a CUDA graph. Made by :meth:`Plan.capture`.

    ``update(step)`` or ``update(*sources)`` makes the graph's next launches copy these sources: new addresses, sizes,
    strides, dtypes and kinds of sources, as far as the plan allows. It launches nothing; launches already enqueued keep
    the sources they had. Host values are taken at the call, and reach the GPU as the node's parameters, without a
    launch or a transfer of their own, unless there are more than these hold. What lies on the GPU needs no update where
    its contents alone change, be it a tensor, a table, an index or lengths: each launch reads it anew. Before the graph
    is instantiated an update changes what every executable of the graph begins with, later the executable alone.

    The sources of the last update are held until the next one, those that executables begin with as long as this object
    lives: keep it while the graph may be launched. It does not keep the graph: an update after that is gone raises.
    Update and drop it on the stream that launches the graph, or when that is idle: pinned sources are let go once the
    work is done that the current stream has then. Device sources of another stream need ``record_stream``, as
    everywhere in torch. Nothing waits, but where pinned sources are let go while the GPU's queue is full: marking where
    the stream's work ends takes a place in the queue, as a launch does. Other threads run Python meanwhile.

    ``update`` raises RuntimeError as :meth:`Plan.replay` does, where the sources need more launches than the graph
    holds, while the graph is still being captured, after it was reset, where the copy was captured in another graph
    than the one that was named, and where another thread is within it; TypeError where it does, and for subclasses.
    The graph then stays as it was, unless CUDA itself refuses one of several nodes. A copy belongs to one capture:
    after ``graph.reset()`` capture a new one. Two threads must not update and launch one graph at the same time.
    """

    update: StepCall

    def __init__(self, plan: Plan, bound: _C.BoundGraphCopy) -> None:
        self.plan = plan
        self.launches = bound.launches
        self.update = bound.update

    def __repr__(self) -> str:
        return f"fused_copy.GraphCopy with {self.launches} launches of\n{self.plan!r}"


def _replay_unbound(
    names: Names,
    destinations: tuple[torch.Tensor, ...],
    fill: tuple[Fill, ...] | None,
    *sources: StepSource,
    **keywords: object,
) -> None:
    replay_in_order(names, destinations, sources_in_order(names, sources, len(destinations), bool(keywords)), fill)
