"""The ways to fill static buffers, each written as its users write it.

A peer is a function from the static buffers and several sets of sources, in the buffers' order and for their leading
corners, to a :class:`Peer`; its docstring's first line is what the report says about it. ``@peer`` names it and adds it
to ``PEERS``; in that order peers are timed and shown. Those in C++ and CUDA are in ``native/``, those that are given no
ready tensors in :mod:`fill_benchmark.sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

import fused_copy
from fill_benchmark import native
from fill_benchmark.native import Unavailable
from fused_copy import bench
from fused_copy._library import _C
from fused_copy.bench import GRAPH_REPLAY as GRAPH_REPLAY
from fused_copy.bench import SIX_COPIES as SIX_COPIES
from fused_copy.bench import UPDATE_AND_REPLAY as UPDATE_AND_REPLAY
from fused_copy.decode import capture_buffers
from fused_copy.timing import Call, calls_per_graph, capture, gpu_us

Tensors = Mapping[str, torch.Tensor]
Corner = slice | tuple[slice, ...]

CONTIGUOUS = "one contiguous copy_"
"""No way to fill buffers, but what the GPU can do: at least the same total bytes from one tensor to another."""

GRANULES = (16, 1 << 12, 1 << 16, 1 << 21)
"""What that copy's bytes are rounded up to, one of them: from some MB on ``copy_`` takes the GPU half as long again
where no large power of two divides their number, whatever the dtype and the address."""

SLICED_FOREACH = "_foreach_copy_, pre-sliced"
FOREACH = "_foreach_copy_"
TRITON = "Triton, one kernel"
TVM_FFI = "tvm-ffi, one kernel"
MEMCPY = "cudaMemcpyAsync per pair, C++"
MEMCPY_BATCH = "cudaMemcpyBatchAsync, C++"
HARD_WIRED = "hard-wired for these six, one kernel"
NOTHING_OP = "op that does nothing"
READING_OP = "op that reads its tensors alone"
READING_OP_AND_LAUNCH = "op that reads its tensors, then a bare launch"
OP = "torch.ops.fused_copy.replay"
REPLAY = "fused_copy.replay"
PLAN = "plan.replay"
BARE_LAUNCH = "bare launch"
ASKED_FOR_EXECUTABLE = "graph.raw_cuda_graph_exec() alone"
NODE_SET_AND_REPLAY = "an empty node set + graph.replay()"


@dataclass(frozen=True)
class Peer:
    """One way to fill ``buffers``: ``calls[i]`` copies the tensors of ``sets[i]`` into their leading corners."""

    calls: Sequence[Call]
    buffers: Tensors
    sets: Sequence[Tensors]
    capturable: bool = True
    copies: bool = True
    """False for what is measured to compare with, and fills no buffers."""
    fill: Mapping[str, float] = field(default_factory=dict)
    """What the rest of a buffer becomes, by its name."""
    launches: int | None = None
    """What a call enqueues at most, where no capture can count it."""


Factory = Callable[..., Peer]
"""Of buffers and sets; some take further arguments by name."""

PEERS: dict[str, Factory] = {}


def peer(name: str, among: dict[str, Factory] = PEERS) -> Callable[[Factory], Factory]:
    """Adds the function under ``name``."""

    def add(factory: Factory) -> Factory:
        among[name] = factory
        return factory

    return add


def check(name: str, peer: Peer) -> None:
    """Raises :class:`fused_copy.bench.WrongResult` unless every call leaves what ``copy_`` leaves."""
    for call, sources in zip(peer.calls, peer.sets, strict=True):
        check_call(name, peer, call, sources)


def check_call(name: str, peer: Peer, call: Call, sources: Tensors) -> None:
    """The same of one call, which copies ``sources``: one of the peer's, or the replay of a graph that ends with it."""
    if peer.copies:
        bench.check(name, peer.buffers, sources, call, peer.fill)
    else:
        call()


def _corner(source: torch.Tensor) -> Corner:
    # A bare slice, as in buffer[:bs], indexes faster than a tuple of one.
    corner = tuple(slice(size) for size in source.shape)
    return corner[0] if len(corner) == 1 else corner


def _pairs(buffers: Tensors, sources: Tensors) -> list[tuple[torch.Tensor, Corner, torch.Tensor]]:
    return [(buffer, _corner(sources[name]), sources[name]) for name, buffer in buffers.items()]


def _is_pinned(sets: Sequence[Tensors]) -> bool:
    return all(source.is_pinned() for source in sets[0].values())


def needs_gpu(buffers: Tensors) -> None:
    """Raises :class:`fill_benchmark.native.Unavailable` for buffers of the CPU."""
    if not next(iter(buffers.values())).is_cuda:
        raise Unavailable("it needs a GPU")


def _needs_decode_step(buffers: Tensors) -> None:
    needs_gpu(buffers)
    if list(buffers) != list(capture_buffers(1, 1)):
        raise Unavailable("it copies the six tensors of a decode step alone")


def tried(peer: Peer) -> Peer:
    """The peer, or :class:`fill_benchmark.native.Unavailable` where its first call raises."""
    # Raised here: no C compiler, a GPU that it does not support, another CUDA than the driver's.
    try:
        peer.calls[0]()
    except Exception as error:
        raise Unavailable(f"{type(error).__name__}: {str(error).strip()}") from error
    return peer


def _fastest(peers: Sequence[Peer]) -> Peer:
    """The one that takes the GPU the least time; the first where not all tensors are the GPU's."""
    first = peers[0]
    if not all(tensor.is_cuda for tensors in (first.buffers, first.sets[0]) for tensor in tensors.values()):
        return first
    per_graph = calls_per_graph(1, sum(source.nbytes for source in first.sets[0].values()))

    def us(peer: Peer) -> float:
        peer.calls[0]()
        return gpu_us(peer.calls, per_graph=per_graph, replays=5).median

    return min(peers, key=us)


def _sliced(buffers: Tensors, sources: Tensors) -> list[torch.Tensor]:
    return [buffer[corner] for buffer, corner, _ in _pairs(buffers, sources)]


@peer(SIX_COPIES)
def slices_and_copy(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """A slice and a ``copy_`` for each tensor, at less than an engine's price: no attributes read, no slices made."""
    non_blocking = _is_pinned(sets)

    def step(pairs: list[tuple[torch.Tensor, Corner, torch.Tensor]]) -> None:
        for buffer, corner, source in pairs:
            buffer[corner].copy_(source, non_blocking)

    return Peer([partial(step, _pairs(buffers, sources)) for sources in sets], buffers, sets)


@peer("copy_, pre-sliced")
def sliced_copy(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """The same with every slice kept from an earlier step, which needs a cache keyed by batch size and width."""

    def step(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for corner, source in pairs:
            corner.copy_(source)

    calls = [partial(step, list(zip(_sliced(buffers, sources), sources.values(), strict=True))) for sources in sets]
    return Peer(calls, buffers, sets)


@peer(FOREACH)
def foreach(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """``torch._foreach_copy_`` on fresh slices. One strided destination makes it a loop of copies."""

    def step(pairs: list[tuple[torch.Tensor, Corner, torch.Tensor]]) -> None:
        torch._foreach_copy_([buffer[corner] for buffer, corner, _ in pairs], [source for *_, source in pairs])

    return Peer([partial(step, _pairs(buffers, sources)) for sources in sets], buffers, sets)


@peer(SLICED_FOREACH)
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


@peer(TRITON)
def triton(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """A Triton kernel written for the six tensors of a decode step."""
    _needs_decode_step(buffers)
    try:
        from fill_benchmark.triton_kernel import copy_six
    except ImportError as error:
        raise Unavailable(str(error)) from error
    return tried(Peer([partial(copy_six, buffers, sources) for sources in sets], buffers, sets))


@peer(CONTIGUOUS)
def contiguous(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """One ``copy_`` of at least the same total bytes, aligned: of several numbers of bytes the fastest."""
    total = sum(source.nbytes for source in sets[0].values())
    sizes = sorted({-(-total // granule) * granule for granule in GRANULES})
    pinned = _is_pinned(sets)
    flat = []
    for sources in sets:
        parts = [source.reshape(-1).view(torch.uint8) for source in sources.values()]
        all_parts = torch.cat([*parts, parts[0].new_ones(sizes[-1] - total)])
        flat.append(all_parts.pin_memory() if pinned else all_parts)
    buffer = torch.empty_like(flat[0], device=next(iter(buffers.values())).device)

    def copies(size: int) -> Peer:
        to, *views = (whole[:size].view(torch.int32) for whole in (buffer, *flat))
        return Peer([partial(to.copy_, view, pinned) for view in views], {"all": to}, [{"all": view} for view in views])

    return _fastest([copies(size) for size in sizes])


@peer(TVM_FFI)
def tvm_ffi(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """A tvm-ffi function of twelve tensors over the plain kernel for a decode step's six, at its fastest threading."""
    _needs_decode_step(buffers)
    module = native.tvm_ffi_module()
    functions = (module.copy_six_by_element, module.copy_six_by_warp, module.copy_six_by_block)
    return _fastest(
        [
            tried(Peer([partial(one, *buffers.values(), *sources.values()) for sources in sets], buffers, sets))
            for one in functions
        ]
    )


@peer(HARD_WIRED)
def hard_wired(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """A kernel for five aligned vectors and a matrix, which looks nothing up: the least that one launch takes."""
    _needs_decode_step(buffers)
    destinations = list(buffers.values())
    copy_six = native.extension().copy_six_hard_wired
    return tried(Peer([partial(copy_six, destinations, list(sources.values())) for sources in sets], buffers, sets))


@peer(MEMCPY)
def memcpy_each(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """``cudaMemcpyAsync`` for each tensor from a C++ extension, ``cudaMemcpy2DAsync`` for the page table."""
    _needs_runtime_copies(buffers, sets)
    destinations = list(buffers.values())
    copy_each = native.extension().copy_each
    calls = [partial(copy_each, destinations, list(sources.values())) for sources in sets]
    return tried(Peer(calls, buffers, sets))


@peer(MEMCPY_BATCH)
def memcpy_batch(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """``cudaMemcpyBatchAsync`` from a C++ extension, each row of the page table an entry. It cannot be captured."""
    _needs_runtime_copies(buffers, sets)
    if tuple(map(int, (torch.version.cuda or "0.0").split("."))) < (12, 8):
        raise Unavailable("it came with CUDA 12.8")
    destinations = list(buffers.values())
    copy_batch = native.extension().copy_batch
    calls = [partial(copy_batch, destinations, list(sources.values())) for sources in sets]
    entries = sum(source.shape[0] if source.dim() == 2 else 1 for source in sets[0].values())
    return tried(Peer(calls, buffers, sets, capturable=False, launches=entries))


def _needs_runtime_copies(buffers: Tensors, sets: Sequence[Tensors]) -> None:
    needs_gpu(buffers)
    for name, source in sets[0].items():
        dense_rows = source.is_contiguous() and buffers[name].stride(-1) == 1 and source.dim() in (1, 2)
        if source.dtype != buffers[name].dtype or not dense_rows:
            raise Unavailable("it copies vectors and matrices of dense rows, bytes as they are")


@peer(NOTHING_OP)
def nothing_op(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """An op of the same schema, registered in the same way, that does nothing: with the bare launch, the op's floor."""
    return _op_of_the_benchmark("nothing", buffers, sets)


@peer(READING_OP)
def reading_op(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """The same, that asks torch for what a copy must know of its tensors: the floor of an op that checks them."""
    return _op_of_the_benchmark("reading", buffers, sets)


@peer(READING_OP_AND_LAUNCH)
def reading_op_and_launch(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """Both in turn, as each finds the processor's caches full of the other: more than the sum of the two."""
    reading = _op_of_the_benchmark("reading", buffers, sets)
    launch = partial(_C._testing.launch_nothing, torch.cuda.current_device())

    def step(read: Call) -> None:
        read()
        launch()

    return Peer([partial(step, read) for read in reading.calls], buffers, sets, capturable=False, copies=False)


def _op_of_the_benchmark(name: str, buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    needs_gpu(buffers)
    native.extension()
    function = getattr(torch.ops.fused_copy_bench, name)
    destinations = list(buffers.values())
    calls = [partial(function, destinations, list(sources.values())) for sources in sets]
    return Peer(calls, buffers, sets, capturable=False, copies=False)


@peer(OP)
def op(buffers: Tensors, sets: Sequence[Tensors], fill: Mapping[str, float] | None = None) -> Peer:
    """The op itself, on lists."""
    destinations = list(buffers.values())
    rest = () if fill is None else ([fill.get(name) for name in buffers],)
    calls = [partial(torch.ops.fused_copy.replay, destinations, list(sources.values()), *rest) for sources in sets]
    return Peer(calls, buffers, sets, fill=fill or {})


@peer(REPLAY)
def replay(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """The op's Python face, on lists."""
    destinations = list(buffers.values())
    return Peer([partial(fused_copy.replay, destinations, list(sources.values())) for sources in sets], buffers, sets)


@peer("fused_copy.replay, mappings")
def replay_mappings(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """The op's Python face, on mappings, whose names it matches."""
    return Peer([partial(fused_copy.replay, buffers, sources) for sources in sets], buffers, sets)


@peer(PLAN)
def plan_replay(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """Destinations bound in a :class:`fused_copy.Plan`."""
    plan = fused_copy.Plan(buffers)
    return Peer([partial(plan.replay, *sources.values()) for sources in sets], buffers, sets)


@peer(BARE_LAUNCH)
def bare_launch(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """One launch of a kernel that does nothing, from C++: the floor of every way that launches."""
    needs_gpu(buffers)
    call = partial(_C._testing.launch_nothing, torch.cuda.current_device())
    return Peer([call] * len(sets), buffers, sets, copies=False)


class ModelGraph:
    """What ``run`` enqueues, and a graph of it, in whose memory that of ``copy.update`` computes too.

    Elsewhere in the GPU's memory the same kernels may take some per cent more or less: more than a fill does.
    """

    def __init__(self, run: Call) -> None:
        self.run = run

    @cached_property
    def graph(self) -> torch.cuda.CUDAGraph:
        return capture([self.run])


def _capture_copy(
    buffers: Tensors, sets: Sequence[Tensors], model: ModelGraph | None = None
) -> tuple[torch.cuda.CUDAGraph, fused_copy.GraphCopy]:
    needs_gpu(buffers)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, pool=model.graph.pool() if model else None):
        copy = fused_copy.Plan(buffers).capture(graph, *sets[0].values())
        model.run() if model else _few_kernels(buffers)
    return graph, copy


def _few_kernels(buffers: Tensors) -> None:
    # What is behind the copy, as launching a graph of one node is a case of its own.
    for buffer in buffers.values():
        buffer[:1].add(1)


@peer(GRAPH_REPLAY)
def graph_replay(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """``graph.replay()`` alone, of a graph of a copy and a few kernels: what ``copy.update`` adds to."""
    graph, _ = _capture_copy(buffers, sets)

    def step(_: Sequence[torch.Tensor]) -> None:  # called as the other is, so that the difference is the update's
        graph.replay()

    calls = [partial(step, list(sources.values())) for sources in sets]
    return Peer(calls, buffers, sets, capturable=False, copies=False)


@peer(UPDATE_AND_REPLAY)
def update_and_replay(buffers: Tensors, sets: Sequence[Tensors], model: ModelGraph | None = None) -> Peer:
    """``copy.update`` on the copy inside that graph, then ``graph.replay()``."""
    graph, copy = _capture_copy(buffers, sets, model)

    def step(sources: Sequence[torch.Tensor]) -> None:
        copy.update(*sources)
        graph.replay()

    return Peer([partial(step, list(sources.values())) for sources in sets], buffers, sets, capturable=False)


@peer(ASKED_FOR_EXECUTABLE)
def asked_for_executable(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """What an update has to ask of torch each time, as the graph may have been reset or instantiated anew."""
    graph, _ = _capture_copy(buffers, sets)
    graph.instantiate()
    return Peer([graph.raw_cuda_graph_exec] * len(sets), buffers, sets, capturable=False, copies=False)


@peer(NODE_SET_AND_REPLAY)
def node_set_and_replay(buffers: Tensors, sets: Sequence[Tensors]) -> Peer:
    """A node that does nothing, set to new parameters by C++, then ``graph.replay()``: an update's floor."""
    needs_gpu(buffers)
    device = torch.cuda.current_device()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        node = _C._testing.capture_nothing(device)
        _few_kernels(buffers)
    graph.instantiate()
    executable = graph.raw_cuda_graph_exec()

    def step(_: Sequence[torch.Tensor]) -> None:
        _C._testing.set_nothing(executable, node, device)
        graph.replay()

    calls = [partial(step, list(sources.values())) for sources in sets]
    return Peer(calls, buffers, sets, capturable=False, copies=False)


def before_model(buffers: Tensors, sets: Sequence[Tensors], factory: Factory, model: ModelGraph) -> Peer:
    """A peer's fill, then ``graph.replay()`` of a graph of the model, which reads the buffers."""
    fill = factory(buffers, sets)
    graph = model.graph

    def step(call: Call) -> None:
        call()
        graph.replay()

    return Peer([partial(step, call) for call in fill.calls], buffers, sets, capturable=False)


def model_alone(buffers: Tensors, sets: Sequence[Tensors], model: ModelGraph) -> Peer:
    """``graph.replay()`` of the model's graph, whose buffers stay as they are."""
    return Peer([model.graph.replay] * len(sets), buffers, sets, capturable=False, copies=False)


def plain_kernel(buffers: Tensors, sets: Sequence[Tensors], threading: str, block_size: int) -> Peer:
    """The plain kernel of ``native/six_tensors.cu``, a thread, a warp or a block for each piece of a row."""
    _needs_decode_step(buffers)
    copy_six = native.extension().copy_six
    destinations = list(buffers.values())
    calls = [partial(copy_six, destinations, list(sources.values()), threading, block_size) for sources in sets]
    return Peer(calls, buffers, sets)
