"""What the benchmark's times are held against: each target's conditions, evaluated over the rows of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fused_copy.bench.peers import (
    BARE_LAUNCH,
    CONTIGUOUS,
    FOREACH,
    GRAPH_REPLAY,
    NOTHING_OP,
    OP,
    PLAN,
    REPLAY,
    SIX_COPIES,
    SLICED_FOREACH,
    TVM_FFI,
    UPDATE_AND_REPLAY,
)
from fused_copy.bench.report import Row, Verdict
from fused_copy.bench.sections import CAST_OF, STEP

LARGE_BYTES = 32_000_000


class NotMeasured(LookupError):
    """The run has no such row."""


class Medians:
    """The median times of a run, in us."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._medians = {_key(row.metric, row.workload, row.peer, row.case, row.point): row.median for row in rows}

    def __call__(self, metric: str, workload: str, peer: str, point: dict[str, int], case: str = "") -> float:
        try:
            return self._medians[_key(metric, workload, peer, case, point)]
        except KeyError:
            raise NotMeasured(peer) from None

    def points(self, metric: str, workload: str, least_bytes: int = 0) -> list[dict[str, int]]:
        """The points of a workload; none is an error."""
        points: list[dict[str, int]] = []
        for row in self._rows:
            if (
                (row.metric, row.workload) == (metric, workload)
                and row.bytes >= least_bytes
                and row.point not in points
            ):
                points.append(row.point)
        if not points:
            raise NotMeasured(workload)
        return points

    def cases(self, metric: str, workload: str) -> list[str]:
        """The cases of a workload, in the order of the rows."""
        found = {row.case: None for row in self._rows if (row.metric, row.workload) == (metric, workload)}
        return list(found)


def _key(metric: str, workload: str, peer: str, case: str, point: dict[str, int]) -> tuple[object, ...]:
    return metric, workload, peer, case, frozenset(point.items())


Values = Iterator[tuple[float, str]]
"""Figures, and where each was measured."""


@dataclass(frozen=True)
class Condition:
    """One condition of a target: every figure is at most, or at least, the bound."""

    target: str
    figure: str
    relation: str  # "<=" or ">="
    bound: float
    values: Callable[[Medians], Values]
    unit: str = "x"


def evaluate(rows: Sequence[Row]) -> list[Verdict]:
    """Every condition's verdict."""
    return [_verdict(condition, Medians(rows)) for condition in CONDITIONS]


def _verdict(condition: Condition, medians: Medians) -> Verdict:
    at_most = condition.relation == "<="
    bound = f"{condition.relation} {condition.bound:g}{' us' if condition.unit == 'us' else condition.unit}"
    try:
        measured, at = (max if at_most else min)(condition.values(medians))
    except NotMeasured as missing:
        return Verdict(condition.target, condition.figure, bound, None, f"not measured: {missing}", None)
    met = measured <= condition.bound if at_most else measured >= condition.bound
    return Verdict(condition.target, condition.figure, bound, measured, at, met)


def place(point: dict[str, int], case: str = "") -> str:
    """A point in words."""
    return ", ".join([*(f"{name} {value}" for name, value in point.items()), *([case] if case else [])])


def _host(figure: Callable[[Callable[[str], float]], float]) -> Callable[[Medians], Values]:
    """A figure of the host times of the one step by which ways are compared."""

    def values(medians: Medians) -> Values:
        yield figure(lambda peer: medians("host", "decode", peer, STEP)), place(STEP)

    return values


def _pairs(metric: str, least: int, figure: Callable[[Callable[[str], float]], float]) -> Callable[[Medians], Values]:
    """A figure over the numbers of dense pairs, from ``least``."""

    def values(medians: Medians) -> Values:
        points = [point for point in medians.points(metric, "pairs") if point["pairs"] >= least]
        if not points:
            raise NotMeasured(f"{least} pairs")
        for point in points:
            yield figure(lambda peer, point=point: medians(metric, "pairs", peer, point)), place(point)  # type: ignore[misc]

    return values


def _added(us: Callable[[str], float]) -> float:
    return us(UPDATE_AND_REPLAY) - us(GRAPH_REPLAY)


def _of_contiguous(least_bytes: int) -> Callable[[Medians], Values]:
    def values(medians: Medians) -> Values:
        for point in medians.points("gpu", "decode", least_bytes):
            us = medians("gpu", "decode", OP, point)
            yield us / medians("gpu", "decode", CONTIGUOUS, point), place(point)

    return values


def _odd_layouts(medians: Medians) -> Values:
    for point in medians.points("gpu", "layout"):
        for case in medians.cases("gpu", "layout"):
            if case.startswith("odd"):
                aligned = medians("gpu", "layout", OP, point, "aligned")
                yield medians("gpu", "layout", OP, point, case) / aligned, place(point, case)


def _casts(medians: Medians) -> Values:
    for point in medians.points("gpu", "cast"):
        for case, plain in CAST_OF.items():
            us = medians("gpu", "cast", OP, point, case)
            yield us / medians("gpu", "cast", OP, point, plain), place(point, case)


def _pinned(width: int) -> Callable[[Medians], Values]:
    def values(medians: Medians) -> Values:
        point = STEP | {"max_seqlen_k": width}
        us = {peer: medians("step", "pinned", peer, point) for peer in (SIX_COPIES, PLAN)}
        yield us[SIX_COPIES] / us[PLAN], place(point)

    return values


def share(medians: Medians, metric: str, peer: str, point: dict[str, int]) -> float:
    """What part of a step with the model is the fill's."""
    step = medians(metric, "model", peer, point)
    return 1 - medians(metric, "model", GRAPH_REPLAY, point) / step


def _shares(metric: str) -> Callable[[Medians], Values]:
    def values(medians: Medians) -> Values:
        for point in medians.points(metric, "model"):
            copies = share(medians, metric, SIX_COPIES, point)
            yield share(medians, metric, UPDATE_AND_REPLAY, point) / copies, place(point)

    return values


CONDITIONS = (
    Condition("H1", "op / (op that does nothing + bare launch), host", "<=", 1.10,
              _host(lambda us: us(OP) / (us(NOTHING_OP) + us(BARE_LAUNCH)))),
    Condition("H1", "six slices + copy_ / op, host", ">=", 6, _host(lambda us: us(SIX_COPIES) / us(OP))),
    Condition("H1", "_foreach_copy_ / op, host", ">=", 4, _host(lambda us: us(FOREACH) / us(OP))),
    Condition("H2", "plan.replay - bare launch, host", "<=", 0.6, _host(lambda us: us(PLAN) - us(BARE_LAUNCH)), "us"),
    Condition("H2", "six slices + copy_ / plan.replay, host", ">=", 12, _host(lambda us: us(SIX_COPIES) / us(PLAN))),
    Condition("H2", "plan.replay / tvm-ffi, host", "<=", 1, _host(lambda us: us(PLAN) / us(TVM_FFI))),
    Condition("H3", "update + graph.replay() - graph.replay(), host", "<=", 1.2, _host(_added), "us"),
    Condition("H3", "six slices + copy_ / what update adds, host", ">=", 35,
              _host(lambda us: us(SIX_COPIES) / _added(us))),
    Condition("H4", "_foreach_copy_ / plan.replay, from 32 pairs, host", ">=", 4,
              _pairs("host", 32, lambda us: us(SLICED_FOREACH) / us(PLAN))),
    Condition("H4", "_foreach_copy_ / fused_copy.replay, from 32 pairs, host", ">=", 2,
              _pairs("host", 32, lambda us: us(SLICED_FOREACH) / us(REPLAY))),
    Condition("H4", "op / _foreach_copy_, host", "<=", 1.4,
              _pairs("host", 6, lambda us: us(OP) / us(SLICED_FOREACH))),
    Condition("G1", "fused / one contiguous copy_, GPU", "<=", 1.15, _of_contiguous(0)),
    Condition("G1", "fused / one contiguous copy_ from 32 MB, GPU", "<=", 1.03, _of_contiguous(LARGE_BYTES)),
    Condition("G2", "fused / _foreach_copy_, GPU", "<=", 1, _pairs("gpu", 6, lambda us: us(OP) / us(SLICED_FOREACH))),
    Condition("G2", "fused / _foreach_copy_ at 512 pairs, GPU", "<=", 0.25,
              _pairs("gpu", 512, lambda us: us(OP) / us(SLICED_FOREACH))),
    Condition("G3", "fused, odd rows / aligned rows, GPU", "<=", 1.3, _odd_layouts),
    Condition("G4", "fused, cast or fill / copy of the larger side, GPU", "<=", 1.15, _casts),
    Condition("P1", "copy_(non_blocking=True) / plan.replay, pinned, loop", ">=", 3, _pinned(STEP["max_seqlen_k"])),
    Condition("P1", "the same with a page table of 1 MB", ">=", 1, _pinned(4096)),
    Condition("E1", "update's share of a step / copy_'s, loop", "<=", 0.1, _shares("step")),
    Condition("E1", "the same where every step is waited for", "<=", 0.1, _shares("latency")),
)  # fmt: skip
"""The targets H1 to E1. "Fused" is the op: on the GPU every way of this package launches the same kernel."""
