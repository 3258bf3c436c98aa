"""The ways to fill buffers from what is no dense tensor on the GPU yet: host values; lengths, their sums and page rows.

They are peers as those of :mod:`fill_benchmark.peers` are. ``sets`` are the tensors that torch's operators make of the
sources: what every way must leave, and what a call with ready tensors copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad

import fused_copy
from fill_benchmark.native import Unavailable
from fill_benchmark.peers import (
    PEERS,
    PLAN,
    SIX_COPIES,
    UPDATE_AND_REPLAY,
    Factory,
    Peer,
    Tensors,
    needs_gpu,
    peer,
    tried,
)
from fused_copy import bench, cu_seqlens, rows
from fused_copy.timing import Call

VALUES: dict[str, Factory] = {}
"""The ways that take the vectors among the sources as host values."""

ROWS: dict[str, Factory] = {}
"""The ways that make the sources from :class:`Requests`, which they take as ``requests``, one for each set."""

LISTS = "plan.replay, lists"
ARRAYS = "plan.replay, NumPy arrays"
NP_ARRAY = "np.array of the lists alone"
PINNED = "torch.tensor(pin_memory=True) + copy_ each"
PACKED = "one packed pinned buffer + copy_"
UPDATE_LISTS = "copy.update, lists + graph.replay()"
PLAN_ROWS = "plan.replay, cu_seqlens and rows"
TRITON_ROWS = "Triton, one kernel for lengths, sums and rows"
STACKED = "torch.stack of the table's rows + copy_"
INDEXED = "the table indexed + copy_"
INDEX_SELECT = "index_select(out=) + copy_"


def _taken(sets: Sequence[Tensors], take: Callable[[list[int]], object]) -> list[dict[str, Any]]:
    """The sets with what ``take`` makes of a list in place of every vector."""
    return [
        {name: take(source.tolist()) if source.dim() == 1 else source for name, source in sources.items()}
        for sources in sets
    ]


def _lists(sets: Sequence[Tensors]) -> list[list[list[int]]]:
    return [[values for values in sources.values() if isinstance(values, list)] for sources in _taken(sets, list)]


def _numpy() -> Any:
    try:
        import numpy as np
    except ImportError as error:
        raise Unavailable(str(error)) from error
    return np


@peer(LISTS, VALUES)
def lists(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """``plan.replay`` with Python's integers for the vectors."""
    return replace(PEERS[PLAN](buffers, _taken(sets, list)), sets=sets)


@peer(ARRAYS, VALUES)
def arrays(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """The same with arrays of int64, as ``np.array`` makes them of lists."""
    return replace(PEERS[PLAN](buffers, _taken(sets, _numpy().array)), sets=sets)


@peer(NP_ARRAY, VALUES)
def np_array(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """``np.array`` of each list, which fills no buffer: what reading lists costs others."""
    array = _numpy().array

    def step(lists: list[list[int]]) -> None:
        for values in lists:
            array(values)

    return Peer([partial(step, one) for one in _lists(sets)], buffers, sets, capturable=False, copies=False)


def _vectors_and_rest(buffers: Tensors, sets: Sequence[Tensors]) -> tuple[Tensors, Tensors, Sequence[Call]]:
    """The buffers of vectors, the others, and calls that copy the others' sources."""
    vectors = {name: buffer for name, buffer in buffers.items() if buffer.dim() == 1}
    rest = {name: buffer for name, buffer in buffers.items() if name not in vectors}
    return vectors, rest, PEERS[SIX_COPIES](rest, [{name: sources[name] for name in rest} for sources in sets]).calls


@peer(PINNED, VALUES)
def pinned(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """``torch.tensor(list, pin_memory=True)`` and a ``copy_`` that does not wait, for each list."""
    needs_gpu(buffers)
    vectors, _, copy_rest = _vectors_and_rest(buffers, sets)

    def step(lists: list[list[int]], rest: Call) -> None:
        for buffer, values in zip(vectors.values(), lists, strict=True):
            source = torch.tensor(values, dtype=buffer.dtype, pin_memory=True)
            buffer[: len(values)].copy_(source, non_blocking=True)
        rest()

    calls = [partial(step, one, rest) for one, rest in zip(_lists(sets), copy_rest, strict=True)]
    return Peer(calls, buffers, sets, capturable=False, launches=len(buffers))


@peer(PACKED, VALUES)
def packed(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """All lists into one pinned buffer and one ``copy_`` of it, of which the static buffers are views."""
    needs_gpu(buffers)
    _numpy()
    vectors, others, copy_rest = _vectors_and_rest(buffers, sets)
    sizes = [buffer.numel() for buffer in vectors.values()]
    one = next(iter(vectors.values()))
    whole = one.new_zeros(sum(sizes))

    # A pinned buffer for each set, as engines take turns with some: none is written while the GPU still reads it.
    def call(lists: list[list[int]], rest: Call) -> Call:
        host = torch.zeros(sum(sizes), dtype=one.dtype, pin_memory=True)
        parts = [part.numpy() for part in host.split(sizes)]

        def step() -> None:
            for part, values in zip(parts, lists, strict=True):
                part[: len(values)] = values
            whole.copy_(host, non_blocking=True)
            rest()

        return step

    calls = [call(one, rest) for one, rest in zip(_lists(sets), copy_rest, strict=True)]
    views = dict(zip(vectors, whole.split(sizes), strict=True))
    # The whole of it is copied, so the rest of each view becomes what the pinned buffer began with.
    return Peer(calls, views | dict(others), sets, capturable=False, fill=dict.fromkeys(views, 0), launches=2)


@peer(UPDATE_LISTS, VALUES)
def update_lists(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """``copy.update`` with lists, then ``graph.replay()``."""
    return replace(PEERS[UPDATE_AND_REPLAY](buffers, _taken(sets, list)), sets=sets)


@dataclass(frozen=True)
class Requests:
    """A step's requests: where their rows of the table of slots are, and how many tokens they have."""

    table: torch.Tensor
    index: torch.Tensor
    lengths: torch.Tensor
    page_size: int
    cut: bool
    """Whether rows end at their lengths; whole otherwise."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the buffers' corners become, by torch's operators: where a row is cut, what a check finds there."""
        pages = self.table[:, :: self.page_size][self.index] // self.page_size
        if self.cut:
            kept = (self.lengths + self.page_size - 1) // self.page_size
            columns = torch.arange(pages.shape[1], device=pages.device)
            pages = torch.where(columns < kept[:, None], pages, bench.POISON)
        return {"seq_lens": self.lengths.int(), "cu_seqlens_k": _sums(self.lengths), "page_table": pages}


def _sums(lengths: torch.Tensor) -> torch.Tensor:
    return pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))


@peer(PLAN_ROWS, ROWS)
def plan_rows(buffers: Tensors, sets: Sequence[Tensors], requests: Sequence[Requests]) -> Peer:
    """``plan.replay`` of the lengths, ``cu_seqlens`` of them, and ``rows`` of the table, all made anew in each call."""
    replay = fused_copy.Plan(buffers).replay

    def step(table: torch.Tensor, index: torch.Tensor, lengths: torch.Tensor, page_size: int, cut: bool) -> None:
        replay(lengths, cu_seqlens(lengths), rows(table, index, lengths if cut else None, page_size))

    return Peer([partial(step, *vars(one).values()) for one in requests], buffers, sets)


@peer(TRITON_ROWS, ROWS)
def triton_rows(buffers: Tensors, sets: Sequence[Tensors], requests: Sequence[Requests]) -> Peer:
    """A Triton kernel for the three, as engines write theirs: a program for each block of a page-table row."""
    needs_gpu(buffers)
    try:
        from fill_benchmark.triton_kernel import make_metadata
    except ImportError as error:
        raise Unavailable(str(error)) from error
    arguments: list[list[Any]] = [[*buffers.values(), *vars(one).values()] for one in requests]
    return tried(Peer([partial(make_metadata, *one) for one in arguments], buffers, sets))


@peer(STACKED, ROWS)
def stacked(buffers: Tensors, sets: Sequence[Tensors], requests: Sequence[Requests]) -> Peer:
    """``torch.stack`` of a row of the table for each request, whose rows Python knows, and ``cumsum``, both copied."""

    def copy_rows(corner: torch.Tensor, table: torch.Tensor, index: list[int], page_size: int) -> None:
        pages = torch.stack([table[row] for row in index])
        corner.copy_(pages // page_size if page_size > 1 else pages)

    return _by_operators(buffers, sets, requests, copy_rows, torch.Tensor.tolist)


@peer(INDEXED, ROWS)
def indexed(buffers: Tensors, sets: Sequence[Tensors], requests: Sequence[Requests]) -> Peer:
    """The table indexed by a tensor, and ``cumsum`` of the lengths, each copied into its buffer."""

    def copy_rows(corner: torch.Tensor, table: torch.Tensor, index: torch.Tensor, page_size: int) -> None:
        pages = table[index]
        corner.copy_(pages // page_size if page_size > 1 else pages)

    return _by_operators(buffers, sets, requests, copy_rows)


@peer(INDEX_SELECT, ROWS)
def index_select(buffers: Tensors, sets: Sequence[Tensors], requests: Sequence[Requests]) -> Peer:
    """``torch.index_select`` straight into the buffer, and ``cumsum``, which is copied."""

    def copy_rows(corner: torch.Tensor, table: torch.Tensor, index: torch.Tensor, page_size: int) -> None:
        torch.index_select(table, 0, index, out=corner)
        if page_size > 1:
            corner.floor_divide_(page_size)

    return _by_operators(buffers, sets, requests, copy_rows)


def _by_operators(
    buffers: Tensors,
    sets: Sequence[Tensors],
    requests: Sequence[Requests],
    copy_rows: Callable[[torch.Tensor, torch.Tensor, Any, int], None],
    known: Callable[[torch.Tensor], object] = lambda index: index,
) -> Peer:
    """``known`` is what the step has of an index at its beginning."""
    if requests[0].cut:
        raise Unavailable("where lengths cut rows, as it copies whole ones")
    seq_lens, cu_seqlens_k, page_table = buffers.values()

    def step(one: Requests, index: object) -> None:
        bs = one.index.shape[0]
        table = one.table[:, :: one.page_size]
        seq_lens[:bs].copy_(one.lengths)
        cu_seqlens_k[: bs + 1].copy_(_sums(one.lengths))
        copy_rows(page_table[:bs, : table.shape[1]], table, index, one.page_size)

    return Peer([partial(step, one, known(one.index)) for one in requests], buffers, sets)
