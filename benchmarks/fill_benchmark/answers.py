"""The questions an engine developer has before switching, answered from the rows of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from statistics import median

from fill_benchmark.peers import CONTIGUOUS, GRAPH_REPLAY, OP, PLAN, SIX_COPIES, UPDATE_AND_REPLAY
from fill_benchmark.report import Row
from fill_benchmark.sections import STEP
from fill_benchmark.targets import Medians, NotMeasured, place, share

Lines = Iterator[str]


def answer(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What the rows say, by question; questions they say nothing to are left out."""
    medians = Medians(rows, {})
    answers: dict[str, list[str]] = {}
    for question, lines in QUESTIONS.items():
        answers[question] = []
        with suppress(NotMeasured):
            answers[question].extend(lines(medians, rows))
    return {question: lines for question, lines in answers.items() if lines}


def _cost_today(medians: Medians, rows: Sequence[Row]) -> Lines:
    host, gpu = (medians(metric, "decode", SIX_COPIES, STEP) for metric in ("host", "gpu"))
    yield f"{host:.1f} us of host time for {gpu:.2f} us of GPU time ({place(STEP)})"


def _threading(medians: Medians, rows: Sequence[Row]) -> Lines:
    for point in medians.points("gpu", "threading"):
        here = [row for row in rows if row.workload == "threading" and row.point == point]
        plain = sorted((row for row in here if ", blocks of " in row.peer), key=lambda row: row.median)
        best = {row.peer.partition(",")[0]: row for row in reversed(plain)}
        ways = "; ".join(f"{row.peer} {row.median:.2f}" for row in sorted(best.values(), key=lambda row: row.median))
        yield f"{place(point)}: {ways}; this package {medians('gpu', 'threading', OP, point):.2f} us"


def _block_size(medians: Medians, rows: Sequence[Row]) -> Lines:
    for point in medians.points("gpu", "threading"):
        times: dict[str, list[str]] = {}
        for row in rows:
            way, blocks, size = row.peer.partition(", blocks of ")
            if row.workload == "threading" and row.point == point and blocks:
                times.setdefault(way, []).append(f"{size}: {row.median:.2f}")
        yield f"{place(point)}: " + "; ".join(f"{way} {', '.join(sizes)} us" for way, sizes in times.items())


def _strides(medians: Medians, rows: Sequence[Row]) -> Lines:
    cases = [case for case in medians.cases("gpu", "layout") if case != "aligned, dense buffer"]
    for point in medians.points("gpu", "layout"):
        for way in (OP, SIX_COPIES):
            dense = medians("gpu", "layout", way, point, "aligned, dense buffer")
            times = (f"{case} {medians('gpu', 'layout', way, point, case) / dense:.2f}x" for case in cases)
            yield f"{place(point)}, {way}: dense {dense:.2f} us; {'; '.join(times)}"


def _launches(medians: Medians, rows: Sequence[Row]) -> Lines:
    for row in rows:
        if row.kernel:
            facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in row.kernel.items())
            yield f"{place(row.point)}, {row.peer}: {facts}"


def _utilization(medians: Medians, rows: Sequence[Row]) -> Lines:
    for way in (SIX_COPIES, OP, PLAN):
        host, gpu = (medians(metric, "decode", way, STEP) for metric in ("host", "gpu"))
        yield f"{way}, nothing but fills ({place(STEP)}): busy {100 * min(1, gpu / host):.0f} % of the time"
    largest = max((row for row in rows if (row.metric, row.workload) == ("gpu", "decode")), key=lambda row: row.bytes)
    for way in (SIX_COPIES, OP, CONTIGUOUS):
        rate = 2 * largest.bytes / medians("gpu", "decode", way, largest.point) / 1e6
        yield f"{way}, {place(largest.point)}: {rate:.2f} TB/s read and written"


def _latency(medians: Medians, rows: Sequence[Row]) -> Lines:
    for point in medians.points("step", "model"):
        for way in (GRAPH_REPLAY, SIX_COPIES, PLAN, UPDATE_AND_REPLAY):
            loop, latency = (medians(metric, "model", way, point) for metric in ("step", "latency"))
            shares = ["", ""]
            if way != GRAPH_REPLAY:
                both = [share(medians, metric, way, point) for metric in ("latency", "step")]
                shares = [f", the fill's share {'not resolved' if one is None else f'{one:.1%}'}" for one in both]
            yield (
                f"bs {point['bs']}, {way}: {latency:.1f} us a step{shares[0]}; "
                f"{1e6 / loop:,.0f} replays/s in a loop{shares[1]}"
            )


def _unsteady(medians: Medians, rows: Sequence[Row]) -> Lines:
    points: dict[str, list[Row]] = {}
    for row in rows:
        points.setdefault(f"{row.metric}, {row.workload}, {place(row.point, row.case)}", []).append(row)
    for point, ways in points.items():
        wide = [row for row in ways if row.p90 > UNSTEADY * row.p10]
        if 2 * len(wide) >= len(ways):
            yield f"{point}: p90 is above {UNSTEADY} x p10 for {len(wide)} of {len(ways)} ways"


def _passes(medians: Medians, rows: Sequence[Row]) -> Lines:
    ratios = [max(row.passes) / min(row.passes) for row in rows if row.passes]
    if ratios:
        yield f"a way's slowest pass takes {median(ratios):.2f} x its quickest (median), {max(ratios):.2f} x at most"


UNSTEADY = 1.25

QUESTIONS: dict[str, Callable[[Medians, Sequence[Row]], Lines]] = {
    "What do the six copies cost today?": _cost_today,
    "Which threading is best: element, warp or block?": _threading,
    "Which block size?": _block_size,
    "Do tensors that are not contiguous cost more on the GPU?": _strides,
    "Launch parameters, and occupancy as the profiler estimates it": _launches,
    "How busy is the GPU during the copies, by its time over the host's?": _utilization,
    "Latency and replays per second of a decode step with a small model": _latency,
    "How much do the passes of host times differ?": _passes,
    "Where did the machine disturb most ways?": _unsteady,
}
