"""What the benchmark's times are held against: each target's conditions, evaluated over the rows of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from fill_benchmark.peers import (
    ASKED_FOR_EXECUTABLE,
    BARE_LAUNCH,
    CONTIGUOUS,
    GRAPH_REPLAY,
    HARD_WIRED,
    NODE_SET_AND_REPLAY,
    NOTHING_OP,
    OP,
    PLAN,
    READING_OP,
    READING_OP_AND_LAUNCH,
    REPLAY,
    SIX_COPIES,
    SLICED_FOREACH,
    TVM_FFI,
    UPDATE_AND_REPLAY,
)
from fill_benchmark.report import Row, Verdict
from fill_benchmark.sections import CAST_OF, STEP
from fill_benchmark.sources import ARRAYS, LISTS, NP_ARRAY, PINNED, PLAN_ROWS, TRITON_ROWS, UPDATE_LISTS

LARGE_BYTES = 32_000_000


class NotMeasured(LookupError):
    """The run has no such row."""


class Medians:
    """The median times of a run, in us, and what it knows of the package."""

    def __init__(self, rows: Sequence[Row], package: Mapping[str, float]) -> None:
        self._rows = {_key(row.metric, row.workload, row.peer, row.case, row.point): row for row in rows}
        self._package = package

    def __call__(self, metric: str, workload: str, peer: str, point: dict[str, int], case: str = "") -> float:
        return self.row(metric, workload, peer, point, case).median

    def row(self, metric: str, workload: str, peer: str, point: dict[str, int], case: str = "") -> Row:
        try:
            return self._rows[_key(metric, workload, peer, case, point)]
        except KeyError:
            raise NotMeasured(peer) from None

    def points(self, metric: str, workload: str, least_bytes: int = 0) -> list[dict[str, int]]:
        """The points of a workload; none is an error."""
        points: list[dict[str, int]] = []
        for row in self._rows.values():
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
        found = {row.case: None for row in self._rows.values() if (row.metric, row.workload) == (metric, workload)}
        return list(found)

    def contiguous(self, point: dict[str, int]) -> float:
        """The GPU time of the run's fastest ``copy_`` of one dense tensor of a decode step's bytes, give or take 1 %.

        It need not be the one beside the step: some numbers of bytes make ``copy_`` slow. One of fewer bytes counts as
        if it moved all of them at its speed.
        """
        step_bytes = self.row("gpu", "decode", CONTIGUOUS, point).bytes
        return min(
            row.median * max(1, step_bytes / row.bytes)
            for row in self._rows.values()
            if row.metric == "gpu"
            and abs(row.bytes - step_bytes) <= step_bytes / 100
            and (row.peer == CONTIGUOUS or (row.peer == SIX_COPIES and row.case in CAST_OF.values()))
        )

    def package(self, name: str) -> float:
        try:
            return self._package[name]
        except KeyError:
            raise NotMeasured(name) from None


def _key(metric: str, workload: str, peer: str, case: str, point: dict[str, int]) -> tuple[object, ...]:
    return metric, workload, peer, case, frozenset(point.items())


NOT_EXPLAINED = "not explained yet"


@dataclass(frozen=True)
class Figure:
    """A figure, where it was measured, and what the run says of why it is no better."""

    value: float
    at: str
    limit: Callable[[], str] = lambda: NOT_EXPLAINED


Figures = Iterator[Figure]

Times = Callable[[str], float]
"""The median of a way, in us, where the metric, the workload and the point are given."""

Limit = Callable[[Times], str]


@dataclass(frozen=True)
class Condition:
    """One condition of a target: every figure is at most, or at least, the bound."""

    target: str
    name: str
    relation: str  # "<=" or ">="
    bound: float
    figures: Callable[[Medians], Figures]
    unit: str = "x"


def evaluate(rows: Sequence[Row], package: Mapping[str, float]) -> list[Verdict]:
    """Every condition's verdict."""
    medians = Medians(rows, package)
    return [_verdict(condition, medians) for condition in CONDITIONS]


def _verdict(condition: Condition, medians: Medians) -> Verdict:
    at_most = condition.relation == "<="
    bound = f"{condition.relation} {condition.bound:g}{'' if condition.unit == 'x' else ' '}{condition.unit}"
    try:
        worst = (max if at_most else min)(condition.figures(medians), key=lambda figure: figure.value)
    except NotMeasured as missing:
        return Verdict(condition.target, condition.name, bound, None, f"not measured: {missing}", None)
    met = worst.value <= condition.bound if at_most else worst.value >= condition.bound
    limit = "" if met else NOT_EXPLAINED
    if not met:
        with suppress(NotMeasured):
            limit = worst.limit()
    return Verdict(condition.target, condition.name, bound, worst.value, worst.at, met, limit)


def place(point: dict[str, int], case: str = "") -> str:
    """A point in words."""
    return ", ".join([*(f"{name} {value}" for name, value in point.items()), *([case] if case else [])])


def _unexplained(us: Times) -> str:
    return NOT_EXPLAINED


def _by(peer: str, us: Times, whole: float) -> str:
    return f"{us(peer) / whole:.2f}x by {peer}"


def _beside(peer: str, us: Times, whole: float) -> str:
    return f"{NOT_EXPLAINED}; {peer}: {us(peer) / whole:.2f}x"


def _host(figure: Callable[[Times], float], limit: Limit = _unexplained) -> Callable[[Medians], Figures]:
    """A figure of the host times of the one step by which ways are compared."""

    def figures(medians: Medians) -> Figures:
        us = partial(medians, "host", "decode", point=STEP)
        yield Figure(figure(us), place(STEP), partial(limit, us))

    return figures


def _pairs(
    metric: str, least: int, figure: Callable[[Times], float], limit: Limit = _unexplained
) -> Callable[[Medians], Figures]:
    """A figure over the numbers of dense pairs, from ``least``."""

    def figures(medians: Medians) -> Figures:
        points = [point for point in medians.points(metric, "pairs") if point["pairs"] >= least]
        if not points:
            raise NotMeasured(f"{least} pairs")
        for point in points:
            us = partial(medians, metric, "pairs", point=point)
            yield Figure(figure(us), place(point), partial(limit, us))

    return figures


def _each(
    metric: str,
    workload: str,
    figure: Callable[[Times], float],
    limit: Limit = _unexplained,
    only: Callable[[dict[str, int]], bool] = lambda point: True,
) -> Callable[[Medians], Figures]:
    """A figure over a workload's points, or ``only`` some, and its cases."""

    def figures(medians: Medians) -> Figures:
        points = [point for point in medians.points(metric, workload) if only(point)]
        if not points:
            raise NotMeasured(workload)
        for point in points:
            for case in medians.cases(metric, workload):
                us = partial(medians, metric, workload, point=point, case=case)
                yield Figure(figure(us), place(point, case), partial(limit, us))

    return figures


def _up_to_4_kb(point: dict[str, int]) -> bool:
    return 4 * (5 * point["bs"] + 1) <= 4096  # cu_seqlens_k has one value more


def _by_ready_tensors(peer: str) -> Limit:
    return lambda us: f"{us(peer) / us(PLAN):.2f}x by plan.replay of ready tensors"


def _of_contiguous(least_bytes: int, beside: str) -> Callable[[Medians], Figures]:
    def figures(medians: Medians) -> Figures:
        for point in medians.points("gpu", "decode", least_bytes):
            us, whole = partial(medians, "gpu", "decode", point=point), medians.contiguous(point)
            yield Figure(us(OP) / whole, place(point), partial(_by, beside, us, whole))

    return figures


def _odd_layouts(medians: Medians) -> Figures:
    for point in medians.points("gpu", "layout"):
        for case in medians.cases("gpu", "layout"):
            if case.startswith("odd"):
                aligned = medians("gpu", "layout", OP, point, "aligned")
                yield Figure(medians("gpu", "layout", OP, point, case) / aligned, place(point, case))


def _casts(medians: Medians) -> Figures:
    for point in medians.points("gpu", "cast"):
        for case, plain in CAST_OF.items():
            us = partial(medians, "gpu", "cast", point=point, case=case)
            whole = medians("gpu", "cast", OP, point, plain)
            yield Figure(us(OP) / whole, place(point, case), partial(_beside, SIX_COPIES, us, whole))


def _pinned(medians: Medians) -> Figures:
    us = partial(medians, "step", "pinned", point=STEP)
    yield Figure(us(SIX_COPIES) / us(PLAN), place(STEP))


def share(medians: Medians, metric: str, peer: str, point: dict[str, int]) -> float | None:
    """What part of a step with the model is the fill's; None where the spreads of the steps hide it."""
    step, alone = (medians.row(metric, "model", name, point) for name in (peer, GRAPH_REPLAY))
    return 1 - alone.median / step.median if step.p10 > alone.p90 else None


def _of_package(name: str) -> Callable[[Medians], Figures]:
    def figures(medians: Medians) -> Figures:
        yield Figure(medians.package(name), "")

    return figures


def _reading_sources(us: Times) -> str:
    reading = (us(READING_OP) - us(NOTHING_OP)) / 2
    rest = us(PLAN) - us(BARE_LAUNCH) - reading
    return f"{reading:.2f} us read the sources, {rest:.2f} check and plan six pairs"


def _updating(us: Times) -> str:
    parts = [
        (us(NODE_SET_AND_REPLAY) - us(GRAPH_REPLAY), "by a node that does nothing"),
        (us(PLAN) - us(BARE_LAUNCH), "read, check and plan as plan.replay does"),
        (us(ASKED_FOR_EXECUTABLE), "ask torch for the executable"),
    ]
    rest = us(UPDATE_AND_REPLAY) - us(GRAPH_REPLAY) - sum(part for part, _ in parts)
    return ", ".join(f"{part:.2f} us {what}" for part, what in [*parts, (rest, "hold the sources and the rest")])


CONDITIONS = (
    Condition("H1", "op / (op that reads its tensors, then a bare launch), host", "<=", 1.10,
              _host(lambda us: us(OP) / us(READING_OP_AND_LAUNCH),
                    lambda us: f"{us(OP) - us(READING_OP_AND_LAUNCH):.2f} us check and plan six pairs")),
    Condition("H1", "six slices + copy_ / op, host", ">=", 5,
              _host(lambda us: us(SIX_COPIES) / us(OP),
                    lambda us: f"{us(SIX_COPIES) / us(READING_OP_AND_LAUNCH):.2f}x by {READING_OP_AND_LAUNCH}")),
    Condition("H2", "plan.replay - bare launch, host", "<=", 0.9,
              _host(lambda us: us(PLAN) - us(BARE_LAUNCH), _reading_sources), "us"),
    Condition("H2", "six slices + copy_ / plan.replay, host", ">=", 11,
              _host(lambda us: us(SIX_COPIES) / us(PLAN),
                    lambda us: f"{us(SIX_COPIES) / us(BARE_LAUNCH):.2f}x by bare launch")),
    Condition("H2", "plan.replay / tvm-ffi, host", "<=", 1, _host(lambda us: us(PLAN) / us(TVM_FFI))),
    Condition("H3", "update + graph.replay() - graph.replay(), host", "<=", 2,
              _host(lambda us: us(UPDATE_AND_REPLAY) - us(GRAPH_REPLAY), _updating), "us"),
    Condition("H4", "_foreach_copy_ / plan.replay, from 32 pairs, host", ">=", 1.8,
              _pairs("host", 32, lambda us: us(SLICED_FOREACH) / us(PLAN),
                     lambda us: f"{us(SLICED_FOREACH) / us(BARE_LAUNCH):.2f}x by bare launch")),
    Condition("H4", "_foreach_copy_ / fused_copy.replay, from 32 pairs, host", ">=", 1,
              _pairs("host", 32, lambda us: us(SLICED_FOREACH) / us(REPLAY),
                     lambda us: f"{us(SLICED_FOREACH) / us(PLAN):.2f}x by plan.replay, which reads sources alone")),
    Condition("G1", "fused / one contiguous copy_, GPU", "<=", 1.15, _of_contiguous(0, HARD_WIRED)),
    Condition("G1", "fused / one contiguous copy_ from 32 MB, GPU", "<=", 1.03,
              _of_contiguous(LARGE_BYTES, HARD_WIRED)),
    Condition("G2", "fused / _foreach_copy_, GPU", "<=", 1,
              _pairs("gpu", 6, lambda us: us(OP) / us(SLICED_FOREACH),
                     lambda us: _beside(BARE_LAUNCH, us, us(SLICED_FOREACH)))),
    Condition("G3", "fused, odd rows / aligned rows, GPU", "<=", 1.15, _odd_layouts),
    Condition("G4", "fused, cast or fill / copy of the larger side, GPU", "<=", 1.06, _casts),
    Condition("P1", "copy_(non_blocking=True) / plan.replay, pinned, loop", ">=", 3.5, _pinned),
    Condition("V1", "(plan.replay of lists - of tensors) / np.array of the lists, host", "<=", 0.3,
              _each("host", "values", lambda us: (us(LISTS) - us(PLAN)) / us(NP_ARRAY))),
    Condition("V1", "torch.tensor(pin_memory=True) + copy_ / plan.replay of lists, host", ">=", 10,
              _each("host", "values", lambda us: us(PINNED) / us(LISTS), _by_ready_tensors(PINNED))),
    Condition("V1", "plan.replay of NumPy arrays - of tensors, host", "<=", 1,
              _each("host", "values", lambda us: us(ARRAYS) - us(PLAN)), "us"),
    Condition("V2", "what update of up to 4 KB of lists adds / plan.replay of them, host", "<=", 1,
              _each("host", "values", lambda us: (us(UPDATE_LISTS) - us(GRAPH_REPLAY)) / us(LISTS), only=_up_to_4_kb)),
    Condition("V3", "plan.replay of lists / of tensors, GPU", "<=", 1.15,
              _each("gpu", "parameters", lambda us: us(LISTS) / us(PLAN))),
    Condition("R1", "lengths, cu_seqlens and rows / Triton, GPU", "<=", 1,
              _each("gpu", "rows", lambda us: us(PLAN_ROWS) / us(TRITON_ROWS),
                    lambda us: _beside(PLAN, us, us(TRITON_ROWS)))),
    Condition("R1", "(the same, pages of one token - 0.5 us) / dense copy of the bytes, GPU", "<=", 1.2,
              _each("gpu", "rows", lambda us: (us(PLAN_ROWS) - 0.5) / us(PLAN),
                    only=lambda point: point["page_size"] == 1)),
    Condition("R2", "lengths, cu_seqlens and rows / plan.replay of tensors, host", "<=", 1.15,
              _each("host", "rows", lambda us: us(PLAN_ROWS) / us(PLAN))),
    Condition("R2", "Triton / lengths, cu_seqlens and rows, host", ">=", 6,
              _each("host", "rows", lambda us: us(TRITON_ROWS) / us(PLAN_ROWS), _by_ready_tensors(TRITON_ROWS))),
    Condition("I1", "import fused_copy beyond import torch", "<=", 6, _of_package("import_ms"), "ms"),
    Condition("B1", "wheel", "<=", 1.3, _of_package("wheel_mb"), "MB"),
    Condition("B1", "full build on 2 cores", "<=", 90, _of_package("build_seconds"), "s"),
)  # fmt: skip
"""The targets. "Fused" is the op: on the GPU every way of this package launches the same kernel."""
