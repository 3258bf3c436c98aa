"""Runs nano-vllm's own scheduler and model runner over a recorded sequence of steps.

Its scheduler, block manager, sequences, configuration and ``ModelRunner`` come from the given source tree; the model,
the sampler, the process group and what else needs weights are replaced. Without a GPU a CUDA graph is replaced too: by
what was captured, run again. ``NANOVLLM_USE_FUSED_COPY=1`` sets the patch's option ``use_fused_copy``.

Prints JSON: for each decode step a digest of its buffers and tokens; the operators that one step calls before its graph
is replayed; on a GPU what these launch. A digest holds ``input_ids``, ``positions``, ``slot_mapping`` and
``context_lens`` whole, and of ``block_tables`` the corner that the published code writes: what lies outside of it is
left from earlier steps, and no sequence's length reaches there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from engines import CountedOps, gpu_work, put_module, spread
from torch.utils._python_dispatch import _disable_current_modes

from fused_copy.timing import host_us

BLOCK_SIZE = 256
VOCAB_SIZE = 997
POISON = 77
TIMED_BATCHES = (8, 64, 256)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="nano-vllm's source tree")
    parser.add_argument("--steps", type=int, default=300, help="decode steps (default: %(default)s)")
    parser.add_argument("--seqs", type=int, default=32, help="most sequences of a step (default: %(default)s)")
    parser.add_argument("--max-model-len", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--time", action="store_true", help="what steps cost, and nothing else")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    engine = Engine(args.tree, torch.device(args.device), args.seqs, args.max_model_len)
    print(json.dumps(timed(engine) if args.time else recorded(engine, args.steps)))


def recorded(engine: Engine, steps: int) -> dict[str, Any]:
    """The digests of that many decode steps, and what one more calls."""
    with torch.inference_mode():
        for name, buffer in engine.buffers().items():
            if name != "block_tables":  # the model reads the rest of it too, and takes none of what it finds
                buffer.fill_(POISON)
    digests: list[str] = []
    while len(digests) < steps:
        digests += engine.step()
    engine.leave_out_graphs()
    seqs = engine.batch(min(8, engine.config.max_num_seqs))
    counter = CountedOps("_to_copy", "copy_", "fill_", "zero_")
    with counter:
        engine.runner.run(seqs, False)
    result: dict[str, Any] = {"digests": digests, "ops": dict(counter.ops)}
    if engine.device.type == "cuda":
        result["launches"] = gpu_work(functools.partial(engine.runner.run, seqs, False))
    return result


def timed(engine: Engine) -> dict[str, Any]:
    """Host time in us of decode steps up to their graph's replay, and what they launch; on a GPU the replay's too."""
    gpu = engine.device.type == "cuda"
    engine.runner.rank = 1  # samples nothing, so that no step waits for the GPU
    sizes = [bs for bs in TIMED_BATCHES if bs <= engine.config.max_num_seqs]
    calls = {bs: [functools.partial(engine.runner.run, engine.batch(bs), False) for _ in range(4)] for bs in sizes}
    result = {}
    for point in ["with the graph's launch", "before the graph"] if gpu else ["before the graph"]:
        if point == "before the graph":
            engine.leave_out_graphs()
        for bs in sizes:
            result[f"{point}, {bs} sequences"] = spread(host_us(calls[bs], launches=16))
    on_gpu = {"launches": {f"{bs} sequences": gpu_work(calls[bs][0]) for bs in sizes}} if gpu else {}
    return {"host_us": result} | on_gpu


class Engine:
    """The parts of nano-vllm that schedule and run decode steps, and requests for them."""

    def __init__(self, tree: Path, device: torch.device, max_num_seqs: int, max_model_len: int) -> None:
        self.device = device
        self.random = random.Random(0)
        self.width = -(-max_model_len // BLOCK_SIZE)
        replace_heavy_modules(tree / "nanovllm", max_model_len)
        model_runner = importlib.import_module("nanovllm.engine.model_runner")
        self.context: Any = importlib.import_module("nanovllm.utils.context")
        self.sequence = importlib.import_module("nanovllm.engine.sequence").Sequence
        self.sampling = importlib.import_module("nanovllm.sampling_params").SamplingParams
        # Too few blocks for all sequences, so that some are preempted.
        memory = max_num_seqs * self.width // 5 * 2 * BLOCK_SIZE * torch.float64.itemsize
        model_runner.torch = self._torch(memory)  # type: ignore[attr-defined]
        model_runner.dist = SimpleNamespace(init_process_group=lambda *_, **__: None)  # type: ignore[attr-defined]
        option = {"use_fused_copy": True} if os.environ.get("NANOVLLM_USE_FUSED_COPY") == "1" else {}
        self.config = importlib.import_module("nanovllm.config").Config(
            str(tree), max_num_seqs=max_num_seqs, max_model_len=max_model_len, gpu_memory_utilization=1.0, **option
        )
        self.runner = model_runner.ModelRunner(self.config, 0, [])
        self.config.num_kvcache_blocks -= 1  # the last one is the model's
        self.scheduler = importlib.import_module("nanovllm.engine.scheduler").Scheduler(self.config)

    def step(self) -> list[str]:
        """One step of the engine; its digest if it was a decode."""
        unfinished = len(self.scheduler.waiting) + len(self.scheduler.running)
        if not unfinished or self.random.random() < 0.03:
            for _ in range(self.random.randint(unfinished == 0, self.config.max_num_seqs - unfinished)):
                self.scheduler.add(self.request())
        seqs, is_prefill = self.scheduler.schedule()
        tokens = self.runner.run(seqs, is_prefill)
        digest = [] if is_prefill else [self.digest(seqs, tokens)]
        self.scheduler.postprocess(seqs, tokens, is_prefill)
        return digest

    def request(self) -> Any:
        """A prompt of any length, its beginning at times that of another one, for the prefix cache."""
        new_tokens = self.random.randint(2, 80)
        length = self.random.randint(2, self.random.randint(2, self.config.max_model_len - new_tokens))
        shared = min(length, self.random.choice((0, 0, 2 * BLOCK_SIZE)))
        prompt = [1] * shared + self.random.choices(range(VOCAB_SIZE), k=length - shared)
        return self.sequence(prompt, self.sampling(max_tokens=new_tokens, ignore_eos=True))

    def buffers(self) -> dict[str, torch.Tensor]:
        """What a step fills."""
        return {name: buffer for name, buffer in self.runner.graph_vars.items() if name != "outputs"}

    def digest(self, seqs: list[Any], tokens: list[int]) -> str:
        """Of a step's buffers and tokens."""
        longest = max(len(seq.block_table) for seq in seqs)
        buffers = self.buffers()
        buffers["block_tables"] = buffers["block_tables"][: len(seqs), :longest].contiguous()
        read = [buffer.cpu().numpy().tobytes() for buffer in buffers.values()]
        return hashlib.sha256(b"".join([*read, repr(tokens).encode()])).hexdigest()

    def batch(self, bs: int) -> list[Any]:
        """Sequences of any length that decode, outside of the scheduler."""
        seqs = []
        for _ in range(bs):
            seq = self.sequence([1] * self.random.randint(2, self.width * BLOCK_SIZE))
            seq.block_table = [self.random.randrange(self.config.num_kvcache_blocks) for _ in range(seq.num_blocks)]
            seqs.append(seq)
        return seqs

    def leave_out_graphs(self) -> None:
        """Makes a step end where its graph would be replayed, and sample nothing, as on ranks other than 0."""
        self.runner.rank = 1
        self.runner.graphs = dict.fromkeys(self.runner.graphs, SimpleNamespace(replay=lambda: None))
        self.runner.model.compute_logits = lambda _: None

    def _torch(self, memory: int) -> Any:
        """The module ``torch`` as the runner sees it: with that much memory, and on machines without a GPU too."""
        stats = {f"allocated_bytes.all.{kind}": 0 for kind in ("peak", "current")}
        cuda = Overlay(torch.cuda, mem_get_info=lambda: (memory, memory), memory_stats=lambda: stats)
        if self.device.type == "cuda":
            return Overlay(torch, cuda=cuda)

        def tensor(data: Any, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
            return torch.tensor(data, dtype=dtype)

        def to_gpu(host: torch.Tensor, non_blocking: bool) -> torch.Tensor:
            copied: torch.Tensor = torch.ops.aten._to_copy(host, non_blocking=non_blocking)
            return copied

        torch.Tensor.cuda = to_gpu  # type: ignore[assignment,method-assign]
        for name in ("set_device", "empty_cache", "reset_peak_memory_stats", "synchronize"):
            setattr(cuda, name, lambda *_: None)
        cuda.CUDAGraph = lambda: SimpleNamespace(pool=lambda: 0)
        cuda.graph = self._record
        return Overlay(torch, cuda=cuda, tensor=tensor, set_default_device=lambda _: None)

    @contextlib.contextmanager
    def _record(self, graph: Any, _: Any) -> Iterator[None]:
        captured = self.context.get_context()
        bs = len(captured.slot_mapping)

        def replay() -> None:
            buffers = self.runner.graph_vars
            before = self.context.get_context()
            self.context._CONTEXT = captured
            with _disable_current_modes():  # no step counts what a graph does
                buffers["outputs"][:bs] = self.runner.model(buffers["input_ids"][:bs], buffers["positions"][:bs])
            self.context._CONTEXT = before

        graph.replay = replay
        yield


class Overlay:
    """A module, some of its names replaced."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value


class Model(torch.nn.Module):
    """A number for each token that any wrong element of a graph's buffers changes, in exact arithmetic.

    Every token leaves one in the cache, at its slot, and a decode sums up those of its sequence.
    """

    def __init__(self, _: Any) -> None:
        super().__init__()
        self.k_cache = self.v_cache = torch.tensor([])
        self.get_context = importlib.import_module("nanovllm.utils.context").get_context

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        context = self.get_context()
        hidden = (input_ids * 7 + positions * 11).double()
        if self.k_cache.numel():
            slots = self.k_cache.view(-1)
            # Lanes without a token write where no sequence's blocks are.
            slots[context.slot_mapping.masked_fill(context.slot_mapping < 0, len(slots) - 1)] = hidden
        if not context.is_prefill:
            inside = torch.arange(BLOCK_SIZE, device=input_ids.device)
            attended = (context.block_tables.clamp(min=0)[:, :, None] * BLOCK_SIZE + inside).flatten(1)
            live = torch.arange(attended.size(1), device=input_ids.device) < context.context_lens[:, None]
            hidden = hidden + slots[attended].masked_fill(~live, 0).sum(1)
        return hidden[:, None]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        context = self.get_context()
        return hidden[context.cu_seqlens_q[1:] - 1] if context.is_prefill else hidden


class Sampler:
    """In place of the engine's: the token that a number stands for."""

    def __call__(self, logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return logits[:, 0].remainder(VOCAB_SIZE).long()


def replace_heavy_modules(package: Path, max_model_len: int) -> None:
    """Makes the engine's files importable without its ``__init__``, its model's layers and what these need."""

    def xxh64() -> Any:
        digest = hashlib.sha256()
        return SimpleNamespace(update=digest.update, intdigest=lambda: int.from_bytes(digest.digest()[:8]))

    hf_config = SimpleNamespace(
        dtype=torch.float64,
        max_position_embeddings=max_model_len,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=1,
        hidden_size=1,
    )
    for part in ("", "engine", "utils", "models", "layers"):
        put_module(".".join(filter(None, ["nanovllm", part])), package / part)
    put_module("nanovllm.models.qwen3", Qwen3ForCausalLM=Model)
    put_module("nanovllm.layers.sampler", Sampler=Sampler)
    put_module("nanovllm.utils.loader", load_model=lambda *_: None)
    put_module("transformers", AutoConfig=type("AutoConfig", (), {"from_pretrained": lambda _: hf_config}))
    put_module("xxhash", xxh64=xxh64)


if __name__ == "__main__":
    main()
