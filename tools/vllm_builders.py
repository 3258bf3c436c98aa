"""Runs vLLM's own attention metadata builders over a recorded sequence of batches.

The builders, their common metadata and what they call come from the given source tree, published or patched; its
``VLLM_USE_FUSED_COPY`` is read from the environment. Everything else of vLLM is replaced by empty modules, so that no
more than ``FILES`` have to be there. Prints JSON, for each case: a digest of all static buffers and of the metadata
after each batch, the operators that write to a static buffer in one padded step, and on a GPU what that step launches.
With ``--against OTHER`` it times a step's builds by this tree and by another, with its flag off and on, in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import importlib.abc
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from itertools import accumulate, islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from engines import CountedOps, gpu_work, host_us_in_turn

from fused_copy.timing import Call

BACKENDS = "v1.attention.backends"
LOADED = [
    *("envs", "utils.math_utils", "utils.torch_utils", "v1.attention.backend"),
    *("v1.kv_cache_interface", "v1.kv_cache_layout", "v1.kv_cache_spec_registry"),
    *(f"{BACKENDS}.{name}" for name in ("utils", "gdn_attn", "mamba_attn", "mamba2_attn", "short_conv_attn")),
    "model_executor.layers.mamba.checkpoint",
]
"""vLLM's modules that run; ``_aiter_ops``, ``config``, ``platforms`` and hundreds more are empty."""
FILES = [Path("vllm", *module.split(".")).with_suffix(".py") for module in LOADED]


@dataclasses.dataclass(frozen=True)
class Case:
    """A builder, the drafts of each request, and where mamba's states are kept."""

    module: str
    builder: str
    drafts: int = 0
    replayssm: str | None = None
    cache_mode: str = "none"


GDN = ("gdn_attn", "GDNAttentionMetadataBuilder")
MAMBA2 = ("mamba2_attn", "Mamba2AttentionMetadataBuilder")
PLE = ("short_conv_attn", "PleShortConvAttentionMetadataBuilder")
CASES = {
    "gdn": Case(*GDN),
    "gdn-spec": Case(*GDN, drafts=3),
    "gdn-spec-align": Case(*GDN, drafts=3, cache_mode="align"),
    "mamba2": Case(*MAMBA2),
    "mamba2-spec": Case(*MAMBA2, drafts=3),
    "mamba2-replayssm": Case(*MAMBA2, replayssm="triton"),
    "mamba2-replayssm-flashinfer": Case(*MAMBA2, replayssm="flashinfer"),
    "mamba2-replayssm-flashinfer-spec": Case(*MAMBA2, drafts=3, replayssm="flashinfer"),
    "short-conv": Case("short_conv_attn", "ShortConvAttentionMetadataBuilder"),
    "ple": Case(*PLE),
    "ple-spec": Case(*PLE, drafts=3),
}
MAX_REQS = 32
CAPTURED = (1, 2, 4, 8, 16, 24, 32)
GROUPS = 2
BLOCK_SIZE = 16
TABLE_WIDTH = 20
RING = 16
POISON = 77


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="the folder that holds vllm/")
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES), dest="cases")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="a patched tree: time both")
    args = parser.parse_args()
    device = torch.device(args.device)
    with torch.inference_mode():
        if args.against is None:
            result = {name: run(args.tree, CASES[name], args.steps, device) for name in args.cases}
        else:
            result = compare_times(args.tree, args.against, args.cases, device)
    print(json.dumps(result))


def run(tree: Path, case: Case, steps: int, device: torch.device) -> dict[str, Any]:
    """What :func:`main` prints of one tree and case."""
    engine = Engine(tree, case, device)
    for size in CAPTURED:
        engine.capture(size)
    engine.poison()
    digests = []
    for batch in islice(batches(case), steps):
        digests.append(engine.digest(engine.prepare(batch)()))
    step = engine.prepare(next(batch for batch in batches(case) if not any(batch.prefilling) and batch.lens[-1] == 0))
    counter = CountedWrites(engine.buffers())
    with counter:
        step()
    result: dict[str, Any] = {"digests": digests, "ops": dict(counter.ops), "launches": None}
    if device.type == "cuda":
        result["launches"] = gpu_work(step)
    return result


def compare_times(published: Path, patched: Path, cases: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Host time of one step's builds in microseconds, in turn: median, 10th and 90th percentile; on a GPU its work."""
    ways = {"published": (published, False), "patched, flag off": (patched, False), "patched, flag on": (patched, True)}
    report: dict[str, Any] = {}
    steps: dict[str, dict[str, Call]] = {}
    for name in cases:
        engines = {}
        for way, (tree, fused) in ways.items():
            os.environ["VLLM_USE_FUSED_COPY"] = str(int(fused))
            engines[way] = Engine(tree, CASES[name], device)
        report[name] = {"host_us": {}}
        for size in (1, 8, 32):
            lens = [1 + CASES[name].drafts] * -(-size * 3 // 4)
            batch = Batch.made_up(random.Random(0), CASES[name], lens, 0, size)
            steps[name] = {way: engine.prepare(batch) for way, engine in engines.items()}
            times = host_us_in_turn(steps[name])
            report[name]["host_us"] |= {f"{way}, {size} requests": spread for way, spread in times.items()}
    if device.type == "cuda":  # after all times
        for name in cases:
            report[name]["launches"] = {way: gpu_work(step) for way, step in steps[name].items()}
    return report


@dataclasses.dataclass
class Batch:
    """A step as the scheduler decided it, padded to the size that a graph was captured with."""

    lens: list[int]
    seq_lens: list[int]
    prefilling: list[bool]
    ring_origins: list[int]
    accepted: list[int]
    drafts: list[int]
    blocks: list[list[list[int]]]

    @classmethod
    def made_up(cls, rng: random.Random, case: Case, lens: Sequence[int], prefills: int, size: int) -> Batch:
        """The last ``prefills`` of the requests are prefills."""
        decodes, empty = len(lens) - prefills, [0] * (size - len(lens))
        computed = [rng.randrange(40, 200) for _ in range(decodes)] + [rng.choice([0, 0, 33]) for _ in range(prefills)]
        # Beside prefills some decodes have no drafts, and are no speculative rows.
        drafts = [n - 1 if not prefills or rng.random() < 0.7 else -1 for n in lens[:decodes]]
        used = [[[rng.randrange(1, 1000) for _ in range(TABLE_WIDTH)] for _ in lens] for _ in range(GROUPS)]
        return cls(
            lens=[*lens, *empty],
            seq_lens=[done + new for done, new in zip(computed, lens, strict=True)] + empty,
            prefilling=[False] * decodes + [True] * prefills + [False] * len(empty),
            ring_origins=[rng.randrange(done + 1) for done in computed] + empty,
            accepted=[rng.randrange(1, case.drafts + 2) for _ in range(decodes)] + [1] * (size - decodes),
            drafts=drafts + [-1] * (size - decodes),
            blocks=[[*rows, *([0] * TABLE_WIDTH for _ in empty)] for rows in used],
        )


def batches(case: Case) -> Iterator[Batch]:
    """The recorded sequence: of a captured size, padded, with fewer drafts, with prefills."""
    rng = random.Random(19)
    while True:
        size, kind, longest = rng.choice(CAPTURED), rng.choice(["full", "padded", "ragged", "prefill"]), case.drafts + 1
        real = size if kind == "full" else rng.randint(1, size)
        lens = [rng.randint(1, longest) if kind == "ragged" else longest for _ in range(real)]
        prefills = rng.randint(1, real) if kind == "prefill" else 0
        lens[real - prefills :] = [rng.randint(longest + 1, 40) for _ in range(prefills)]
        yield Batch.made_up(rng, case, lens, prefills, real if prefills else size)


class Engine:
    """The builders of a model's KV cache groups, and what model runner V2 calls them with."""

    def __init__(self, tree: Path, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        replace_heavy_modules(tree)
        self.backend = importlib.import_module("vllm.v1.attention.backend")
        spec = importlib.import_module("vllm.v1.kv_cache_interface").MambaSpec(
            block_size=BLOCK_SIZE,
            shapes=((4, 3), (4, 8), (4, 8), (4, 8), (2, 8)),
            dtypes=(torch.float32,) * 5,
            mamba_cache_mode=case.cache_mode,
            num_speculative_blocks=0 if case.replayssm else case.drafts,
        )
        speculative = SimpleNamespace(
            num_speculative_tokens=case.drafts, parallel_drafting=False, use_eagle_block_drop=lambda: False
        )
        mamba_backends = importlib.import_module("vllm.config.mamba").MambaBackendEnum
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(
                cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: True),
                max_cudagraph_capture_size=MAX_REQS * (case.drafts + 1),
            ),
            speculative_config=speculative if case.drafts else None,
            num_speculative_tokens=case.drafts,
            num_hash_lookahead_tokens=0,
            scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQS, async_scheduling=False),
            cache_config=SimpleNamespace(
                mamba_cache_mode=case.cache_mode,
                use_replayssm=case.replayssm is not None,
                replayssm_buffer_len=RING,
            ),
            mamba_config=SimpleNamespace(
                backend=mamba_backends.FLASHINFER if case.replayssm == "flashinfer" else mamba_backends.TRITON
            ),
            model_config=SimpleNamespace(get_mamba_chunk_size=lambda: 8, dtype=torch.bfloat16),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            use_v2_model_runner=True,
        )
        builder = getattr(importlib.import_module(f"vllm.{BACKENDS}.{case.module}"), case.builder)
        self.builders = [builder(spec, [], config, device) for _ in range(GROUPS)]
        # GDN's want it on a GPU alone.
        self.reuses = case.module == "gdn_attn" or self.builders[0].supports_update_block_table
        self.state_slots = 1 + spec.num_speculative_blocks
        self.table_width = TABLE_WIDTH if case.cache_mode == "align" else self.state_slots

    def buffers(self) -> dict[str, torch.Tensor]:
        """Every static buffer of both builders."""
        return {
            f"{group}.{name}": value
            for group, builder in enumerate(self.builders)
            for name, value in vars(builder).items()
            if isinstance(value, torch.Tensor) and name != "mamba_aligned_state_indices"
        }

    def poison(self) -> None:
        """Makes every byte known that no batch has written."""
        for buffer in self.buffers().values():
            buffer.fill_(POISON)

    def capture(self, size: int) -> None:
        """Builds what a graph of this size is captured with."""
        lens, no = [1 + self.case.drafts] * size, [0] * size
        batch = Batch(lens, lens, [False] * size, no, no, no, [[[0] * TABLE_WIDTH] * size] * GROUPS)
        for builder, metadata in zip(self.builders, self.common(batch), strict=True):
            builder.build_for_cudagraph_capture(metadata)

    def common(self, batch: Batch) -> list[Any]:
        """Each group's common metadata, which differ in the block table."""
        offsets = on_host([0, *accumulate(batch.lens)])
        seq_lens = on_host(batch.seq_lens)
        size = len(batch.lens)
        shared: dict[str, Any] = {
            "query_start_loc": offsets.to(self.device),
            "query_start_loc_cpu": offsets,
            "seq_lens": seq_lens.to(self.device),
            "seq_lens_cpu_upper_bound": seq_lens,
            "is_prefilling": on_host(batch.prefilling, torch.bool),
            "replayssm_decode_base_cpu": on_host(batch.ring_origins),
            "slot_mapping": None,
            "num_reqs": size,
            "num_actual_tokens": int(offsets[-1]) if any(batch.prefilling) else size * (1 + self.case.drafts),
            "max_query_len": max(batch.lens),
            "max_seq_len": max(batch.seq_lens),
        }
        tables = [on_host(rows)[:, : self.table_width].to(self.device) for rows in batch.blocks]
        return [self.backend.CommonAttentionMetadata(block_table_tensor=table, **shared) for table in tables]

    def prepare(self, batch: Batch) -> Callable[[], list[Any]]:
        """The step's builds, of tensors that are there already; they return each group's metadata."""
        groups, extra = self.common(batch), {}
        if self.case.drafts:
            extra["num_accepted_tokens"] = on_host(batch.accepted).to(self.device)
            extra["num_decode_draft_tokens_cpu"] = on_host(batch.drafts)
        if self.case.cache_mode == "align":
            for builder, common in zip(self.builders, groups, strict=True):
                columns = (common.seq_lens.long() - 1).clamp(min=0)[:, None] // BLOCK_SIZE
                columns = columns + torch.arange(self.state_slots, device=self.device)
                builder.mamba_aligned_state_indices = common.block_table_tensor.gather(1, columns)

        def step() -> list[Any]:
            for common in groups:
                common._num_computed_tokens_cache = None
            built = [self.builders[0].build(0, groups[0], **extra)]
            for builder, common in zip(self.builders[1:], groups[1:], strict=True):
                if self.reuses:
                    built.append(builder.update_block_table(built[0], common.block_table_tensor, None))
                else:
                    built.append(builder.build(0, common, **extra))
            return built

        return step

    def digest(self, built: list[Any]) -> str:
        """Of all buffers' bytes, and of the metadata: its values, and which buffers they lie in."""
        buffers = self.buffers()
        owners = {buffer.untyped_storage().data_ptr(): name for name, buffer in buffers.items()}
        digest = hashlib.sha256()

        def add(value: Any) -> None:
            if isinstance(value, torch.Tensor):
                owner = owners.get(value.untyped_storage().data_ptr()) if value.numel() else None
                add((str(value.dtype), tuple(value.shape), owner))
                # What scratch holds is the model's.
                if not value.is_floating_point() or owner is not None:
                    digest.update(value.cpu().numpy().tobytes())
            elif dataclasses.is_dataclass(value):
                add([getattr(value, field.name) for field in dataclasses.fields(value)])
            elif isinstance(value, dict):
                add(list(value.items()))
            elif isinstance(value, (list, tuple)):
                digest.update(f"{len(value)} of".encode())
                for item in value:
                    add(item)
            else:
                digest.update(repr(value).encode())

        add(buffers)
        for metadata in built:
            # Uninitialized beyond what a prefill uses.
            add([v for k, v in vars(metadata).items() if k not in ("nums_dict", "batch_ptr", "token_chunk_offset_ptr")])
        return digest.hexdigest()


def on_host(values: Sequence[Any], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """As the scheduler has it."""
    return torch.tensor(values, dtype=dtype)


class CountedWrites(CountedOps):
    """Counts the operators that write to a static buffer, and this package's."""

    def __init__(self, buffers: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.storages = {buffer.untyped_storage().data_ptr() for buffer in buffers.values()}

    def counts(self, func: Any, args: Any) -> bool:
        """Whether it writes there."""
        return bool(
            func._schema.is_mutable and args[0].untyped_storage().data_ptr() in self.storages and args[0].numel()
        )


class StandIn(type):
    """A class whose every attribute is another one: for annotations, base classes and decorators' arguments."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = StandIn(name, (), {})
        setattr(cls, name, made)
        return made


class StandInModule(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = StandIn(name, (), {})
        setattr(self, name, made)
        return made


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of vLLM but those of ``LOADED``, and FlashInfer's, and makes them of the given names."""

    def __init__(self, tree: Path, names: dict[str, dict[str, Any]]) -> None:
        self.tree, self.names = tree, names

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """A stand-in's, or None for a module of ``LOADED``."""
        package, _, rest = name.partition(".")
        if package not in ("vllm", "flashinfer") or (package == "vllm" and rest in LOADED):
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty one, whose folder the modules of ``LOADED`` are looked for in."""
        module = StandInModule(spec.name)
        module.__path__ = [str(self.tree.joinpath(*spec.name.split(".")))]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Gives it the names that have to be something."""
        module.__dict__.update(self.names.get(module.__name__, {}))


def replace_heavy_modules(tree: Path) -> None:
    """Makes the tree's modules importable without the rest of vLLM, in place of those of another tree."""
    for name in list(sys.modules):
        # That one registers a type with torch, which a process can do once.
        if name.partition(".")[0] in ("vllm", "flashinfer") and name != "vllm.utils.torch_utils":
            del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, StandIns)]

    def init_logger(name: str) -> logging.Logger:
        logger = logging.getLogger(name)
        logger.warning_once = logger.warning  # type: ignore[attr-defined]
        return logger

    def scratch(**_: Any) -> tuple[torch.Tensor, ...]:
        return torch.zeros(MAX_REQS, 2), torch.zeros(MAX_REQS, 2), torch.zeros(MAX_REQS, 2)

    try:
        language: dict[str, Any] = {
            "triton": importlib.import_module("triton"),
            "tl": importlib.import_module("triton.language"),
        }
    except ImportError:
        jit = lambda kernel=None, **_: kernel or (lambda later: later)  # noqa: E731
        language = {"triton": SimpleNamespace(jit=jit), "tl": StandIn("tl", (), {})}
    platform = SimpleNamespace(is_cuda=lambda: True, is_rocm=lambda: False)
    gdn = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
    names: dict[str, dict[str, Any]] = {
        "vllm.logger": {"init_logger": init_logger},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": language,
        "vllm.utils.platform_utils": {"is_pin_memory_available": torch.cuda.is_available},
        "vllm.utils.torch_version": {
            "is_torch_equal_or_newer": torch.torch_version.TorchVersion(torch.__version__).__ge__
        },
        "vllm.utils.gpu_sync_debug": {"gpu_sync_allowed": nullcontext},
        # With FlashInfer's, prefills need no metadata of chunks.
        gdn: {"_resolve_gdn_prefill_backend": lambda _: ("auto", "flashinfer")},
        "flashinfer.mamba.checkpointing_ssu": {"allocate_checkpointing_ssu_scratch": scratch},
    }
    sys.meta_path.insert(0, StandIns(tree, names))


if __name__ == "__main__":
    main()
