"""What the benchmark measures: sections of points, each one set of static buffers and several sets of sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from fused_copy.bench.peers import PEERS, Peer, Tensors, Unavailable, check
from fused_copy.bench.report import Row
from fused_copy.bench.timing import Timing, gpu_us, host_us, launches
from fused_copy.decode import capture_buffers

SETS = 4
"""The sets of sources that take turns."""

HOST_WIDTH = 1024
"""The page table's width where the batch size varies. It is in the gpu section too, so that one step has both times."""


@dataclass(frozen=True)
class Workload:
    """What one point copies; ``point`` says where on the section's axes it lies."""

    kind: str
    point: dict[str, int]
    buffers: Tensors
    sets: Sequence[Tensors]


@dataclass(frozen=True)
class Section:
    """The points, made one at a time because some take much memory, and how one of them is measured."""

    workloads: Sequence[Callable[[], Workload]]
    measure: Callable[[Workload], list[Row]]


def host(device: torch.device, quick: bool) -> Section:
    """Host time: a decode step's six tensors over the batch size, and dense pairs over their number."""
    batch_sizes = [64] if quick else [1, 8, 64, 256]
    counts = [6, 32] if quick else [6, 32, 64, 256, 512]
    buffers = capture_buffers(max(batch_sizes), 4 * HOST_WIDTH, device)
    workloads = [partial(decode_step, buffers, bs, HOST_WIDTH) for bs in batch_sizes]

    def time(peer: Peer, launches: int | None) -> Timing:
        return host_us(peer.calls, launches=launches or 1, batches=3 if quick else 20)

    return Section(
        [*workloads, *(partial(dense_pairs, count, device) for count in counts)],
        partial(measure, "host", time=time, rounds=1 if quick else 5),
    )


def gpu(device: torch.device, quick: bool) -> Section:
    """GPU time: a decode step's six tensors over batch size and page-table width, and dense pairs over their number."""
    batch_sizes = [8, 64] if quick else [1, 8, 64, 256, 512]
    widths = [128, HOST_WIDTH] if quick else [128, HOST_WIDTH, 4096, 16384, 32768, 131072]
    counts = [6, 64] if quick else [6, 32, 64, 256, 512]
    # Sources twice, for the contiguous copy too, then the buffers, what is expected of them and temporaries.
    free_bytes = torch.cuda.mem_get_info()[0]
    fitting = [width for width in widths if 4 * max(batch_sizes) * width * (2 * SETS + 6) < free_bytes]
    for width in widths[len(fitting) :]:
        print(f"left out: page tables {width} wide, which do not fit in {free_bytes / 1e9:.1f} GB of free GPU memory")
    buffers = capture_buffers(max(batch_sizes), max(fitting), device)
    workloads = [partial(decode_step, buffers, bs, width) for width in fitting for bs in batch_sizes]

    def time(peer: Peer, launches: int | None) -> Timing:
        step_bytes = sum(source.nbytes for source in peer.sets[0].values())
        # Enough calls to hide the gap between two graphs, few enough to capture quickly and to replay in some ms.
        calls = min(256, 2048 // max(1, launches or 1), 2**32 // step_bytes)
        return gpu_us(peer.calls, per_graph=calls, replays=5 if quick else 20)

    return Section(
        [*workloads, *(partial(dense_pairs, count, device) for count in counts)],
        partial(measure, "gpu", time=time, rounds=1 if quick else 3),
    )


SECTIONS: dict[str, Callable[[torch.device, bool], Section]] = {"host": host, "gpu": gpu}


def decode_step(buffers: Tensors, bs: int, max_seqlen_k: int) -> Workload:
    """The six tensors of a decode step, into the leading corners of ``buffers``."""
    shapes: dict[str, tuple[int, ...]] = {name: (bs,) for name in buffers}
    shapes |= {"cu_seqlens_k": (bs + 1,), "page_table": (bs, max_seqlen_k)}
    device = buffers["page_table"].device
    sets = [{name: _random(shape, torch.int32, device) for name, shape in shapes.items()} for _ in range(SETS)]
    return Workload("decode", {"bs": bs, "max_seqlen_k": max_seqlen_k}, buffers, sets)


def dense_pairs(count: int, device: torch.device) -> Workload:
    """``count`` pairs of int64[256], the best case of ``_foreach_copy_``."""
    buffers, *sets = (
        {f"tensor {i}": _random((256,), torch.int64, device) for i in range(count)} for _ in range(1 + SETS)
    )
    return Workload("pairs", {"pairs": count}, buffers, sets)


def measure(section: str, workload: Workload, *, time: Callable[[Peer, int | None], Timing], rounds: int) -> list[Row]:
    """Check every peer, then time them in turn, ``rounds`` times over so that drift meets all of them alike."""
    peers: dict[str, Peer] = {}
    for name, factory in PEERS.items():
        try:
            peer = factory(workload.buffers, workload.sets)
        except Unavailable as reason:
            _left_out(name, str(reason))
            continue
        check(name, peer)
        if peer.capturable or section != "gpu":
            peers[name] = peer
    on_gpu = next(iter(workload.buffers.values())).is_cuda
    counts = {name: launches(peer.calls[0]) if on_gpu and peer.capturable else None for name, peer in peers.items()}
    timings = dict.fromkeys(peers, Timing())
    for _ in range(rounds):
        for name, peer in peers.items():
            timings[name] += time(peer, counts[name])
    step_bytes = sum(source.nbytes for source in workload.sets[0].values())
    return [
        Row(section, workload.kind, workload.point, step_bytes, name, counts[name], t.median, t.p10, t.p90)
        for name, t in timings.items()
    ]


@cache
def _left_out(name: str, reason: str) -> None:
    print(f"left out: {name}: {reason}")


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randint(1, torch.iinfo(dtype).max, shape, dtype=dtype, device=device)  # never zero
