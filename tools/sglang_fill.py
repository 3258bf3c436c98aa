"""Runs what fills SGLang's decode metadata and graph inputs over a recorded sequence of made-up steps.

``build_decode_registry`` and what it makes, ``normal_decode_set_metadata``, the FlashAttention back end's method that
calls it, the kernel registry and the flags come from the given source tree; what else they import is replaced. Without
a GPU torch's operators stand in for the Triton kernel, and the platform says it is CUDA's. Steps are the same on all
machines. Prints JSON: a digest of all static buffers after each step, and the operators that one step calls; on a GPU
also its launches, and whether metadata is the same from a graph that recorded it. With ``--time`` it adds what calls
take by the published functions, and in turn with these by those that the flag chooses.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import islice, product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from engines import CountedOps, gpu_work, host_us_in_turn, spread
from torch.utils._python_dispatch import _disable_current_modes

from fused_copy.timing import gpu_us

BACK_END = "srt/layers/attention/flashattention_backend.py"
MAX_BS, MAX_LEN, TOKENS_PER_REQUEST = 24, 200, 2
CAPTURED = (1, 2, 4, 8, 16, 24, 64, 256)
PAGE_SIZES = (1, 16, 64)
POISON = 77
STAGED = ("positions", "out_cache_loc", "req_pool_indices", "seq_lens")
"""What SGLang gives to ``copy_slots`` before some steps, and has ``fill_from`` skip then."""

Fill = Callable[..., list[torch.Tensor]]
"""Fills buffers and returns them."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path, help="the folder that SGLang's package lies in, or that of python/sglang")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    tree = args.tree / "python" if (args.tree / "python").exists() else args.tree
    with torch.inference_mode():
        print(json.dumps(run(tree / "sglang", args.steps, torch.device(args.device), args.time)))


def run(package: Path, steps: int, device: torch.device, timed: bool) -> dict[str, Any]:
    """What :func:`main` prints."""
    engine = Engine(package, device)
    result: dict[str, Any] = {"digests": [digest(fill()) for fill in islice(engine.steps(), steps)]}
    if timed:
        result |= {"host_us": {}, "gpu_us": {}}
        for name, ways in engine.timed():
            result["host_us"] |= {f"{name}, {way}": times for way, times in host_us_in_turn(ways).items()}
            if device.type == "cuda":
                result["gpu_us"] |= {f"{name}, {way}": spread(gpu_us([fill])) for way, fill in ways.items()}
    fill = engine.usual_step()
    fill()  # binds and compiles
    if device.type == "cuda":
        kinds = product((16,), (0, 3), ("", "zero_tail", "translated", "swa", "strided"))
        metadata = (engine.set_metadata(MAX_BS, MAX_LEN, *kind) for kind in kinds)
        result |= {"launches": gpu_work(fill), "recorded": all(map(does_the_same_recorded, metadata))}
    with CountedCalls(engine) as counter:
        fill()
    return result | {"ops": dict(counter.ops)}


class Engine:
    """The parts of SGLang that fill static buffers."""

    def __init__(self, package: Path, device: torch.device) -> None:
        sys.meta_path.insert(0, stand_ins := StandIns(package))
        self.selector = importlib.import_module("sglang.kernels.selector")
        self.metadata = importlib.import_module("sglang.kernels.ops.attention.metadata")
        self.small_copy = importlib.import_module("sglang.kernels.ops.memory.small_copy")
        self.registry = importlib.import_module("sglang.srt.model_executor.cuda_graph_buffer_registry")
        stand_ins.leave_triton_alone()
        self.set_page_metadata = self.method(package / BACK_END, "_set_decode_page_metadata")
        self.device, self.random = device, torch.Generator().manual_seed(0)
        if device.type == "cpu":
            platform = importlib.import_module("sglang.kernels.spec").PlatformInfo(device_type="cuda")
            vars(self.selector)["_platform"] = lambda: platform
            if "TRITON_INTERPRET" not in os.environ:
                vars(self.metadata)["_fused_decode_metadata_kernel"] = Kernel(decode_metadata)

    def method(self, file: Path, name: str) -> Callable[..., None]:
        """A method of a file that as a whole would need all of SGLang."""
        functions = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef))
        (found,) = (function for function in functions if function.name == name)
        names = {**vars(self.metadata), "fused_copy_or": getattr(self.selector, "fused_copy_or", None)}
        exec("from __future__ import annotations\n" + ast.unparse(found), names)
        method: Callable[..., None] = names[name]
        return method

    def chosen(self) -> Callable[..., None]:
        """``normal_decode_set_metadata``, or what the flag chooses in its place."""
        choose = getattr(self.selector, "fused_copy_or", lambda published, _: published)
        function: Callable[..., None] = choose(
            self.metadata.normal_decode_set_metadata, "attention.normal_decode_set_metadata"
        )
        return function

    def steps(self) -> Iterator[Fill]:
        """One step after the other, of any kind."""
        registries = [self.inputs(torch.int64, others=False), self.inputs(torch.int32, others=True)]
        while True:
            fill = self.fill_from(self.pick(*registries), self.below(MAX_BS) + 1)
            kind = self.pick("", "", "cut", "zero_tail", "translated", "swa", "strided")
            bs, page_size, delta = self.below(MAX_BS) + 1, self.pick(*PAGE_SIZES), self.pick(0, 0, 3)
            lens_dtype = self.pick(torch.int64, torch.int32)
            yield both(fill, self.set_metadata(bs, MAX_LEN, page_size, delta, kind, lens_dtype))

    def usual_step(self) -> Fill:
        """A decode step of text, of fewer requests than its graph has."""
        fill = self.fill_from(self.inputs(torch.int64, others=False), 13, usual=True)
        return both(fill, self.set_metadata(16, MAX_LEN, 16))

    def timed(self) -> Iterator[tuple[str, dict[str, Fill]]]:
        """What to time: a name, and the ways to do it."""
        ways = {"published": self.metadata.normal_decode_set_metadata, "fused_copy": self.chosen()}
        if ways["published"] is ways["fused_copy"]:
            del ways["fused_copy"]
        sizes = [*product(((8, 1024), (64, 4096), (256, 32768)), PAGE_SIZES, (0,)), ((64, 4096), 16, 3)]
        for (bs, tokens), page_size, delta in sizes:
            fill = self.set_metadata(bs, tokens, page_size, delta)
            name = f"set_metadata {bs} x {tokens}, page {page_size}, delta {delta}"
            yield name, {way: partial(fill, function) for way, function in ways.items()}
        for bs, missing in product((8, 64, 256), (0, 3)):
            fills = {}
            for way in ways:
                inputs = self.inputs(torch.int64, others=False, max_bs=bs)
                if way == "published":
                    inputs.__class__ = self.registry.CudaGraphBufferRegistry
                fills[way] = self.fill_from(inputs, bs - missing, usual=True)
            yield f"fill_from {bs - missing} of {bs}", fills

    def inputs(self, loc_dtype: torch.dtype, others: bool, max_bs: int = MAX_BS) -> Any:
        """A registry of a decode graph's inputs as SGLang builds it, with or without what some models add."""
        made = self.registry.build_decode_registry(
            device=self.device,
            max_bs=max_bs,
            max_num_token=max_bs * TOKENS_PER_REQUEST,
            seq_len_fill_value=1,
            cache_loc_dtype=loc_dtype,
            enable_mamba_track=others,
            is_encoder_decoder=others,
            require_gathered_buffer=others,
            share_pool=False,
        )
        for slot in made._slots.values():
            slot.buffer.fill_(POISON)
        return made

    def fill_from(self, registry: Any, bs: int, usual: bool = False) -> Fill:
        """Fills the inputs of the smallest graph that the batch fits."""
        padded_bs = min(size for size in CAPTURED if size >= bs)
        width = 1 if usual else self.pick(1, TOKENS_PER_REQUEST)
        sizes = {"raw_bs": bs, "raw_num_tokens": bs * width}
        sizes |= {"padded_bs": padded_bs, "padded_num_tokens": padded_bs * width}
        batch, slots = SimpleNamespace(), registry._slots.values()
        for slot in slots:
            head = slot.slice_for(bs, bs * width)
            dtype = slot.dtype if usual or slot.dtype == torch.bool else self.pick(slot.dtype, slot.dtype, torch.int32)
            source = self.integers(2 if dtype == torch.bool else 1 << 20, head.shape, dtype).to(head.device)
            # Some batches are views of the buffers.
            setattr(batch, slot.name, source if usual or self.below(8) else head)
        if usual or self.below(2):
            batch.mrope_positions = None
        staged = {}
        if not usual and bs == padded_bs and self.below(2):
            staged = {name: vars(batch)[name] for name in STAGED}
            vars(batch).update({name: torch.zeros_like(source) for name, source in staged.items()})

        def fill() -> list[torch.Tensor]:
            if staged:
                registry.copy_slots(staged)
            registry.fill_from(batch, **sizes, skip_slots=frozenset(staged))
            return [slot.buffer for slot in slots]

        return fill

    def set_metadata(
        self,
        bs: int,
        tokens: int,
        page_size: int,
        delta: int = 0,
        kind: str = "",
        lens_dtype: torch.dtype = torch.int64,
    ) -> Fill:
        """Sets lengths, their sums and page rows, by the back end's method or the function that is given."""
        width = -(-tokens // page_size)
        max_pages = width // 2 if kind == "cut" else width
        slots = self.integers(1 << 20, (bs + 8, width * page_size + 4), torch.int32).to(self.device)
        requests = torch.randperm(bs + 8, generator=self.random)[:bs].to(self.device)
        lens = self.integers(tokens - 2, (bs,), lens_dtype).to(self.device)
        table, swa_table = self.poisoned(bs, 2 * width + 3), self.poisoned(bs, width + 1)
        page_table = table[:, ::2] if kind == "strided" else table[:, : width + 1]
        wanted = SimpleNamespace(
            cache_seqlens_int32=self.poisoned(bs),
            cu_seqlens_k=self.poisoned(bs + 1),
            page_table=page_table,
            swa_page_table=swa_table if kind == "swa" else None,
        )
        mapping = self.integers(1 << 20, (1 << 20 if kind == "swa" else 0,), torch.int64).to(self.device)
        translator = SimpleNamespace(reads_are_translated=kind == "translated", copy_page_table=lambda *_, **__: None)
        back_end = SimpleNamespace(
            kv_index_translator=translator,
            max_num_pages=max_pages,
            page_size=page_size,
            req_to_token=slots,
            token_to_kv_pool=SimpleNamespace(full_to_swa_index_mapping=mapping),
            use_sliding_window_kv_pool=kind == "swa",
        )

        def fill(function: Callable[..., None] | None = None) -> list[torch.Tensor]:
            if kind == "zero_tail" or function is not None:
                function = function or self.chosen()
                dst = (wanted.cache_seqlens_int32, wanted.cu_seqlens_k, page_table)
                zero_tail = kind == "zero_tail"
                function(*dst, slots, requests, max_pages, lens, delta, page_size, zero_tail=zero_tail)
            else:
                self.set_page_metadata(back_end, None, wanted, requests, lens, delta)
            return [wanted.cache_seqlens_int32, wanted.cu_seqlens_k, table, swa_table]

        return fill

    def pick(self, *choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def below(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self.random))

    def integers(self, bound: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(bound, shape, generator=self.random, dtype=dtype)

    def poisoned(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, POISON, dtype=torch.int32, device=self.device)


def both(one: Fill, other: Fill) -> Fill:
    """One after the other."""
    return lambda: [*one(), *other()]


class Kernel:
    """In place of a Triton kernel: ``run`` gets the grid and the arguments of a launch."""

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self.run, grid)


def decode_metadata(
    _grid: Any, seq_lens: Any, _0: Any, slots: Any, _1: Any, _2: Any, requests: Any, _3: Any, cache_seqlens: Any,
    _4: Any, cu_seqlens: Any, _5: Any, page_table: Any, _6: Any, _7: Any, swa_table: Any, _8: Any, _9: Any,
    mapping: Any, _10: Any, _11: Any, _12: Any, _13: Any, _14: Any, bs: int, max_pages: int,
    *, PAGE_SIZE: int, SEQ_LEN_DELTA: int, SKIP_PAGE_TABLE: bool, ZERO_TAIL: bool, **_: Any,
) -> None:  # fmt: skip
    """What SGLang's ``_fused_decode_metadata_kernel`` writes."""
    lens = (seq_lens + SEQ_LEN_DELTA).int()
    cache_seqlens[:bs] = lens
    cu_seqlens[0] = 0
    cu_seqlens[1 : bs + 1] = lens.cumsum(0)
    for row, length in enumerate([] if SKIP_PAGE_TABLE else lens.tolist()):
        pages = min(-(-length // PAGE_SIZE), max_pages)
        first_slots = slots[requests[row], : pages * PAGE_SIZE : PAGE_SIZE]
        page_table[row, :pages] = first_slots // PAGE_SIZE
        if swa_table is not None:
            swa_table[row, :pages] = mapping[first_slots.long()] // PAGE_SIZE
        if ZERO_TAIL:
            page_table[row, pages:max_pages] = 0


class CountedCalls(CountedOps):
    """Counts what writes in a step: copies and fills, SGLang's Triton kernels, this package's op."""

    def __init__(self, engine: Engine) -> None:
        super().__init__("copy_", "_foreach_copy_", "fill_", "zero_")
        kernels = {"_fused_decode_metadata_kernel": engine.metadata, "_small_copy_kernel": engine.small_copy}
        for name, module in kernels.items():
            setattr(module, name, Kernel(partial(self._run, name, getattr(module, name))))

    def _run(self, name: str, kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        self.ops[name] += 1
        with _disable_current_modes():
            kernel[grid](*args, **kwargs)


def digest(buffers: Sequence[torch.Tensor]) -> str:
    """Of all the buffers' bytes."""
    return hashlib.sha256(b"".join(t.contiguous().cpu().numpy().tobytes() for t in buffers)).hexdigest()


def does_the_same_recorded(fill: Fill) -> bool:
    """Whether a graph that recorded a call writes what the call wrote, into buffers that are poisoned again."""
    buffers = fill()
    wanted = digest(buffers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fill()
    for buffer in buffers:
        buffer.fill_(POISON)
    graph.replay()
    return digest(buffers) == wanted


class StandIns(MetaPathFinder, Loader):
    """Leaves SGLang's few modules to its package, and finds others that have any class that is asked for."""

    OWN = (
        "kernels.registry",
        "kernels.selector",
        "kernels.spec",
        "kernels.ops.attention",
        "kernels.ops.attention.metadata",
        "kernels.ops.memory",
        "kernels.ops.memory.small_copy",
        "srt.environ",
        "srt.kernel_plugins.fused_copy",
        "srt.model_executor.cuda_graph_buffer_registry",
        "srt.model_executor.input_buffers",
    )

    def __init__(self, package: Path) -> None:
        self.package = package
        self.replaced = {"sglang", "msgspec"} | ({"triton"} if importlib.util.find_spec("triton") is None else set())

    def leave_triton_alone(self) -> None:
        """Torch looks for it later, and must not find one that is none."""
        if "triton" in self.replaced:
            self.replaced.remove("triton")
            del sys.modules["triton"], sys.modules["triton.language"]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        root, *parts = name.split(".")
        if root not in self.replaced or ".".join(parts) in self.OWN:
            return None
        spec = ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(self.package.joinpath(*parts))]
        return spec

    def exec_module(self, module: ModuleType) -> None:
        def made(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__dict__["__getattr__"] = made
        if module.__name__ == "msgspec":
            module.__dict__["Struct"] = Struct
        if module.__name__ == "triton":
            jit = {"jit": lambda function=None, **_: function or (lambda function: function)}
            module.__dict__.update(jit, cdiv=lambda a, b: -(-a // b))


class Struct:
    """In place of msgspec's."""

    def __init_subclass__(cls, frozen: bool = False) -> None:
        dataclasses.dataclass(frozen=frozen)(cls)


if __name__ == "__main__":
    main()
