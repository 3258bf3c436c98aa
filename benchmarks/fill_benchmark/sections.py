"""What the benchmark measures: sections of points, each one or more sets of static buffers with their sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from fill_benchmark.model import small_model
from fill_benchmark.native import Unavailable
from fill_benchmark.peers import (
    CONTIGUOUS,
    FOREACH,
    GRAPH_REPLAY,
    MEMCPY,
    MEMCPY_BATCH,
    OP,
    PEERS,
    PLAN,
    REPLAY,
    SIX_COPIES,
    UPDATE_AND_REPLAY,
    Factory,
    ModelGraph,
    Peer,
    Tensors,
    before_model,
    check,
    check_call,
    model_alone,
    plain_kernel,
    update_and_replay,
)
from fill_benchmark.report import Row
from fill_benchmark.sources import LISTS, ROWS, VALUES, Requests
from fill_benchmark.steps import loop_us, profile_kernel
from fused_copy.bench import SETS
from fused_copy.decode import capture_buffers
from fused_copy.timing import Timing, calls_per_graph, gpu_timer, host_us, in_turn, launches

ROUNDS = {"host": 8, "gpu": 8, "step": 24, "latency": 24}
"""How often the ways are timed in turn. A loop is one sample alone, and a fill is a small part of it."""

HOST_WIDTH = 1024
"""The page table's width where the batch size varies. It is in the gpu section too, so that one step has both times."""

STEP = {"bs": 64, "max_seqlen_k": HOST_WIDTH}
"""The decode step by which the ways are compared."""

WIDER = 1024
"""By how much page-table buffers are wider than the widest source: their rows are never side by side."""


@dataclass(frozen=True)
class Workload:
    """What one point copies; ``point`` says where on the section's axes it lies, ``case`` which of its kinds it is."""

    kind: str
    point: dict[str, int]
    buffers: Tensors
    sets: Sequence[Tensors]
    case: str = ""
    ways: Mapping[str, Factory] = field(default_factory=lambda: PEERS)

    @property
    def bytes(self) -> int:
        return sum(source.nbytes for source in self.sets[0].values())


Cases = Sequence[Workload]
"""A point's workloads, which are timed in turn."""


@dataclass(frozen=True)
class Section:
    """The points, made one at a time because some take much memory, and what is measured of each.

    ``metrics``: "host" for host time, "gpu" for GPU time, "step" and "latency" for wall time until the GPU is done, at
    the end of a loop and after every step.
    """

    metrics: Sequence[str]
    points: Sequence[Callable[[], Cases]]


def host(device: torch.device, quick: bool) -> Section:
    """Host time: a decode step's six tensors over the batch size and over the page table's width."""
    batch_sizes = [64] if quick else [1, 8, 64, 256, 512]
    widths = [] if quick else [128, 4096, 32768]
    buffers = capture_buffers(max(batch_sizes), max([HOST_WIDTH, *widths]) + WIDER, device)
    steps = [(bs, HOST_WIDTH) for bs in batch_sizes] + [(STEP["bs"], width) for width in widths]
    return Section(["host"], [partial(_decode_point, buffers, *step) for step in steps])


def gpu(device: torch.device, quick: bool) -> Section:
    """GPU time: a decode step's six tensors over batch size and width; odd layouts; casts and fills."""
    batch_sizes = [8, 64] if quick else [1, 8, 64, 256, 512]
    widths = [128, HOST_WIDTH] if quick else [128, HOST_WIDTH, 4096, 32768, 131072]
    # Sources twice, for the contiguous copy too, then the buffers, what is expected of them and temporaries.
    free_bytes = torch.cuda.mem_get_info()[0]
    fitting = [width for width in widths if 4 * max(batch_sizes) * width * (2 * SETS + 6) < free_bytes]
    for width in widths[len(fitting) :]:
        print(f"left out: page tables {width} wide, which do not fit in {free_bytes / 1e9:.1f} GB of free GPU memory")
    buffers = capture_buffers(max(batch_sizes), max(fitting) + WIDER, device)
    odd_and_aligned = [((64, 1023), (66, 992)), ((256, 4095), (260, 4032))][: 1 if quick else 2]
    cast_sizes = [(64, 1024)] if quick else [(64, 1024), (256, 4096), (512, 32768)]
    cast_sizes = [(rows, columns) for rows, columns in cast_sizes if 40 * (SETS + 3) * rows * columns < free_bytes]
    return Section(
        ["gpu"],
        [
            *(partial(_decode_point, buffers, bs, width) for width in fitting for bs in batch_sizes),
            *(partial(layouts, *shapes, device) for shapes in odd_and_aligned),
            *(partial(casts, rows, columns, device) for rows, columns in cast_sizes),
        ],
    )


def scale(device: torch.device, quick: bool) -> Section:
    """Host and GPU time of dense pairs over their number."""
    counts = [6, 32] if quick else [6, 16, 32, 64, 128, 256, 512]
    return Section(_host_and_gpu(device), [partial(_dense_point, count, device) for count in counts])


def _host_and_gpu(device: torch.device) -> Sequence[str]:
    return ["host", "gpu"] if device.type == "cuda" else ["host"]


def values(device: torch.device, quick: bool) -> Section:
    """Host and GPU time of host values: a decode step's five vectors over the batch size, and vectors over bytes."""
    batch_sizes = [8, 64] if quick else [8, 64, 256]
    buffers = capture_buffers(max(batch_sizes), HOST_WIDTH + WIDER, device)
    return Section(
        _host_and_gpu(device),
        [
            *(partial(_values_point, buffers, bs) for bs in batch_sizes),
            *(partial(_parameters_point, step_bytes, device) for step_bytes in (2048, 16384)),
        ],
    )


def rows(device: torch.device, quick: bool) -> Section:
    """Host and GPU time of lengths, their sums and page rows, by requests, tokens of a row and tokens of a page."""
    # A processor takes as long as the bytes do: few are enough to see what a call takes.
    batch_sizes, tokens = ([8], [1024]) if quick or device.type == "cpu" else ([8, 64, 256], [1024, 4096, 32768])
    page_sizes = [1, 16] if quick else [1, 16, 64]
    buffers = capture_buffers(max(batch_sizes), max(tokens) + WIDER, device)
    buffers = {name: buffers[name] for name in ("seq_lens", "cu_seqlens_k", "page_table")}
    # The sets have no row in common, or those of one would be in the cache for the next.
    table = _random((SETS * max(batch_sizes), max(tokens)), torch.int32, device)
    steps = [(bs, width, page_size) for width in tokens for bs in batch_sizes for page_size in page_sizes]
    return Section(_host_and_gpu(device), [partial(page_rows, buffers, table, *step) for step in steps])


def decode(device: torch.device, quick: bool) -> Section:
    """End to end: fill and graph of a small model over the batch size; pinned sources over the page table's width."""
    batch_sizes = [8, 64] if quick else [1, 8, 64, 256]
    widths = [HOST_WIDTH] if quick else [128, HOST_WIDTH, 4096]
    buffers = capture_buffers(max(batch_sizes), max(widths) + WIDER, device)
    return Section(
        ["step", "latency"],
        [
            *(partial(_model_point, buffers, bs) for bs in batch_sizes),
            *(partial(_pinned_point, buffers, width) for width in widths),
        ],
    )


def threading(device: torch.device, quick: bool) -> Section:
    """GPU time of a plain kernel for the six tensors: a thread, a warp or a block for each piece, by block size."""
    steps = [(64, 1024)] if quick else [(8, 1024), (64, 1024), (64, 4096), (256, 32768)]
    sizes = [128, 256] if quick else [64, 128, 256, 512, 1024]
    buffers = capture_buffers(max(bs for bs, _ in steps), max(width for _, width in steps) + WIDER, device)
    ways: dict[str, Factory] = {
        f"{way}, blocks of {size}": partial(plain_kernel, threading=way, block_size=size)
        for way in ("element", "warp", "block")
        for size in sizes
    }
    ways |= _pick(OP, SIX_COPIES, CONTIGUOUS)

    def point(bs: int, width: int) -> Cases:
        step = decode_step(buffers, bs, width)
        return [Workload("threading", step.point, buffers, step.sets, ways=ways)]

    return Section(["gpu"], [partial(point, *step) for step in steps])


SECTIONS: dict[str, Callable[[torch.device, bool], Section]] = {
    "host": host,
    "gpu": gpu,
    "scale": scale,
    "values": values,
    "rows": rows,
    "decode": decode,
    "threading": threading,
}

ON_CPU = ("host", "scale", "values", "rows")
"""The sections that need no GPU: those of host times."""

PROFILED = ("threading",)
"""The sections whose kernels are looked at with torch's profiler, too, which come last: it stays attached to CUDA, and
makes every launch of the process slower from then on (github.com/pytorch/pytorch/issues/144455)."""


def decode_step(buffers: Tensors, bs: int, max_seqlen_k: int, *, pinned: bool = False) -> Workload:
    """The six tensors of a decode step, into the leading corners of ``buffers``."""
    shapes: dict[str, tuple[int, ...]] = {name: (bs,) for name in buffers}
    shapes |= {"cu_seqlens_k": (bs + 1,), "page_table": (bs, max_seqlen_k)}
    device = torch.device("cpu") if pinned else buffers["page_table"].device
    sets = [{name: _random(shape, torch.int32, device) for name, shape in shapes.items()} for _ in range(SETS)]
    if pinned:
        sets = [{name: source.pin_memory() for name, source in sources.items()} for sources in sets]
    return Workload("decode", {"bs": bs, "max_seqlen_k": max_seqlen_k}, buffers, sets)


def dense_pairs(count: int, device: torch.device) -> Workload:
    """``count`` pairs of int64[256], the best case of ``_foreach_copy_``."""
    buffers, *sets = (
        {f"tensor {i}": _random((256,), torch.int64, device) for i in range(count)} for _ in range(1 + SETS)
    )
    return Workload("pairs", {"pairs": count}, buffers, sets)


def page_rows(buffers: Tensors, table: torch.Tensor, bs: int, tokens: int, page_size: int) -> Cases:
    """``bs`` requests' lengths, their sums, and the pages of their rows of ``table``, cut at the lengths and whole.

    Rows are cut at whole units of 16 bytes, alike in all sets, as a buffer keeps what a longer row has left. Ready
    tensors are copied whole: with pages of one token that is at most 1.2 % more, and a fair comparison.
    """
    device = table.device
    indices = torch.randperm(table.shape[0], device=device)[: SETS * bs].view(SETS, bs)
    lengths = tokens - 4 * page_size * torch.randint(4, (bs,), device=device)

    def case(name: str, cut: bool) -> Workload:
        requests = [Requests(table[:, :tokens], index, lengths, page_size, cut) for index in indices]
        ways = {name: partial(factory, requests=requests) for name, factory in ROWS.items()} | _pick(PLAN)
        point = {"bs": bs, "tokens": tokens, "page_size": page_size}
        return Workload("rows", point, buffers, [one.tensors() for one in requests], name, ways)

    return [case("cut at lengths", cut=True), case("whole rows", cut=False)]


def layouts(odd_shape: tuple[int, int], aligned_shape: tuple[int, int], device: torch.device) -> Cases:
    """An int32 matrix of odd rows, in odd places, and one of as many elements and aligned rows, in several layouts."""
    (rows, columns), (aligned_rows, aligned_columns) = odd_shape, aligned_shape
    assert rows * columns == aligned_rows * aligned_columns
    odd_pitch, pitch = 2 * columns + 1, 2 * aligned_columns
    at = {"rows": rows, "columns": columns}
    ways = _pick(SIX_COPIES, CONTIGUOUS, OP)

    def case(name: str, buffer: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> Workload:
        def source() -> torch.Tensor:
            return make(_random((rows * columns + 1,), torch.int32, device))

        return Workload("layout", at, {"matrix": buffer}, [{"matrix": source()} for _ in range(SETS)], name, ways)

    def matrix(rows: int, pitch: int, offset: int = 0) -> torch.Tensor:
        return torch.zeros(rows * pitch + offset, dtype=torch.int32, device=device)[offset:].view(rows, pitch)

    def dense(flat: torch.Tensor) -> torch.Tensor:
        return flat[:-1].view(aligned_rows, aligned_columns)

    def transposed(flat: torch.Tensor) -> torch.Tensor:
        return flat[:-1].view(aligned_columns, aligned_rows).T

    def odd(flat: torch.Tensor) -> torch.Tensor:
        return flat[:-1].view(rows, columns)

    def odd_and_off(flat: torch.Tensor) -> torch.Tensor:
        return flat[1:].view(rows, columns)

    return [
        case("aligned", matrix(aligned_rows, pitch), dense),
        case("aligned, dense buffer", matrix(aligned_rows, aligned_columns), dense),
        case("odd, both 4 bytes off", matrix(rows, odd_pitch, 1), odd_and_off),
        case("odd, buffer 4 bytes off", matrix(rows, odd_pitch, 1), odd),
        case("transposed source", matrix(aligned_rows, pitch), transposed),
    ]


def casts(rows: int, columns: int, device: torch.device) -> Cases:
    """Casts and a fill of dense matrices, and the copies of the larger side's bytes that they are compared with."""

    def case(name: str, source: torch.dtype, destination: torch.dtype, fill: float | None = None) -> Workload:
        buffers = {"matrix": torch.zeros(rows, columns, dtype=destination, device=device)}
        shape = (rows if fill is None else rows // 2, columns)
        sets = [{"matrix": _random(shape, source, device)} for _ in range(SETS)]
        ways = {OP: partial(PEERS[OP], fill={"matrix": fill})} if fill is not None else _pick(SIX_COPIES, OP)
        return Workload("cast", {"rows": rows, "columns": columns}, buffers, sets, name, ways)

    return [
        case("int64", torch.int64, torch.int64),
        case("int64 to int32", torch.int64, torch.int32),
        case("int32 to int64", torch.int32, torch.int64),
        case("float32", torch.float32, torch.float32),
        case("float32 to bfloat16", torch.float32, torch.bfloat16),
        case("int32", torch.int32, torch.int32),
        case("int32, half filled", torch.int32, torch.int32, fill=-1),
    ]


CAST_OF = {
    "int64 to int32": "int64",
    "int32 to int64": "int64",
    "float32 to bfloat16": "float32",
    "int32, half filled": "int32",
}
"""What each case is compared with: the same-dtype copy of the larger side's bytes."""


def _decode_point(buffers: Tensors, bs: int, width: int) -> Cases:
    return [decode_step(buffers, bs, width)]


def _dense_point(count: int, device: torch.device) -> Cases:
    return [dense_pairs(count, device)]


def _values_point(buffers: Tensors, bs: int) -> Cases:
    step = decode_step(buffers, bs, HOST_WIDTH)
    ways = VALUES | _pick(PLAN, UPDATE_AND_REPLAY, GRAPH_REPLAY)
    return [Workload("values", step.point, buffers, step.sets, ways=ways)]


def _parameters_point(step_bytes: int, device: torch.device) -> Cases:
    names, size = [f"vector {i}" for i in range(4)], step_bytes // 16
    buffers = {name: torch.zeros(2 * size, dtype=torch.int32, device=device) for name in names}
    sets = [{name: _random((size,), torch.int32, device) for name in names} for _ in range(SETS)]
    ways = {LISTS: VALUES[LISTS]} | _pick(PLAN)
    return [Workload("parameters", {"bytes": step_bytes}, buffers, sets, ways=ways)]


def _model_point(buffers: Tensors, bs: int) -> Cases:
    step = decode_step(buffers, bs, HOST_WIDTH)
    model = ModelGraph(small_model(buffers, bs))
    ways: dict[str, Factory] = {
        name: partial(before_model, factory=PEERS[name], model=model)
        for name in (SIX_COPIES, FOREACH, OP, REPLAY, PLAN)
    }
    ways |= {
        UPDATE_AND_REPLAY: partial(update_and_replay, model=model),
        GRAPH_REPLAY: partial(model_alone, model=model),
    }
    return [Workload("model", step.point, buffers, step.sets, ways=ways)]


def _pinned_point(buffers: Tensors, width: int) -> Cases:
    step = decode_step(buffers, STEP["bs"], width, pinned=True)
    ways = _pick(SIX_COPIES, CONTIGUOUS, MEMCPY, MEMCPY_BATCH, OP, REPLAY, PLAN)
    return [Workload("pinned", step.point, buffers, step.sets, ways=ways)]


def _pick(*names: str) -> dict[str, Factory]:
    return {name: PEERS[name] for name in names}


def measure(
    section: str,
    metrics: Sequence[str],
    cases: Cases,
    *,
    quick: bool,
    profiled: bool = False,
    left_out: Callable[[str, str], object] = lambda names, reason: None,
) -> list[Row]:
    """Check every way of every case, then time them in turn, over and over, so that drift meets all of them alike.

    ``left_out`` gets the names of ways that cannot be run, those of one reason together.
    """
    cannot: dict[str, list[str]] = {}
    peers = [(workload, name, peer) for workload in cases for name, peer in _checked(workload, cannot)]
    for reason, names in cannot.items():
        left_out("; ".join(dict.fromkeys(names)), reason)
    count_launches = "host" in metrics or "gpu" in metrics
    counts = [
        launches(peer.calls[0]) if count_launches and _on_gpu(peer) and peer.capturable else peer.launches
        for *_, peer in peers
    ]
    kernels = [
        profile_kernel(peer.calls[0]) if profiled and count == 1 else None
        for (*_, peer), count in zip(peers, counts, strict=True)
    ]
    rows = []
    for metric in metrics:
        timed = [i for i, (*_, peer) in enumerate(peers) if peer.capturable or metric != "gpu"]
        timers = [_timer(metric, *peers[i], counts[i], quick) for i in timed]
        timings = dict.fromkeys(timed, Timing())
        for turn, timing in in_turn(timers, 1 if quick else ROUNDS[metric]):
            timings[timed[turn]] += timing
        rows += [
            Row(
                section,
                metric,
                peers[i][0].kind,
                peers[i][0].point,
                peers[i][0].case,
                peers[i][0].bytes,
                peers[i][1],
                counts[i],
                timing.median,
                timing.p10,
                timing.p90,
                kernels[i],
            )
            for i, timing in timings.items()
        ]
    return rows


def quickest_passes(rows: Iterable[Row]) -> list[Row]:
    """One row for each way at each point: of the pass in which all ways of the point together took least."""
    points: dict[tuple[object, ...], dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        ways = points.setdefault((row.section, row.metric, row.workload, *row.point.items()), {})
        ways.setdefault((row.case, row.peer), []).append(row)
    found = []
    for ways in points.values():
        totals = [sum(row.median for row in rows_of_pass) for rows_of_pass in zip(*ways.values(), strict=False)]
        quickest = totals.index(min(totals))
        for passes in ways.values():
            medians = [round(row.median, 4) for row in passes]
            found.append(replace(passes[quickest], passes=medians) if len(passes) > 1 else passes[0])
    return found


def _checked(workload: Workload, cannot: dict[str, list[str]]) -> Iterable[tuple[str, Peer]]:
    for name, factory in workload.ways.items():
        try:
            peer = factory(workload.buffers, workload.sets)
        except Unavailable as reason:
            cannot.setdefault(str(reason), []).append(name)
            continue
        check(_title(workload, name), peer)
        yield name, peer


def _title(workload: Workload, name: str) -> str:
    return f"{name}, {workload.case}" if workload.case else name


def _on_gpu(peer: Peer) -> bool:
    return next(iter(peer.buffers.values())).is_cuda


def _timer(
    metric: str, workload: Workload, name: str, peer: Peer, count: int | None, quick: bool
) -> Callable[[], Timing]:
    if metric == "host":
        return partial(host_us, peer.calls, launches=count or 1, batches=3 if quick else 10, warm_up=2)
    if metric == "gpu":
        per_graph = calls_per_graph(count or 1, workload.bytes)
        check_replay = partial(check_call, f"{_title(workload, name)}, in a graph", peer, sources=peer.sets[-1])
        return partial(gpu_timer(peer.calls, per_graph=per_graph, check=check_replay), 5 if quick else 8)
    return partial(loop_us, peer.calls, steps=20 if quick else 300, every_step=metric == "latency")


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers, never zero."""
    if dtype.is_floating_point:
        return torch.rand(shape, dtype=dtype, device=device) + 1
    return torch.randint(1, torch.iinfo(dtype).max, shape, dtype=dtype, device=device)
