"""Runs mini-sglang's own graph runner and attention back end over a recorded sequence of batches.

Its graph runner, its attention back ends, its batches and its environment flags come from the given source tree; the
model, the KV cache, FlashInfer and what else needs weights or a compiler are replaced. Without a GPU a CUDA graph is
replaced too: by what was captured, run again. Prints JSON: a digest of all static buffers and of the model's output
after each replay, and the operators that one replay's fill calls.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fused_copy.decode import DUMMY_SLOT, DecodeLoop, Step

BACK_ENDS = {"fa": "FlashAttentionBackend", "trtllm": "TensorRTLLMBackend", "fi": "FlashInferBackend"}
HYBRID = "hybrid"
"""FlashAttention for the decode, and a back end for the prefill that is never called."""
PAGE_SIZE = {"trtllm": 16}
VOCAB_SIZE = 8
POISON = 77


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path, help="mini-sglang's source tree")
    parser.add_argument("--back-end", choices=[*BACK_ENDS, HYBRID], required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with torch.inference_mode():
        print(json.dumps(run(args.tree, args.back_end, args.steps, torch.device(args.device))))


def run(tree: Path, back_end: str, steps: int, device: torch.device) -> dict[str, Any]:
    """What :func:`main` prints."""
    loop = DecodeLoop(
        max_bs=24,
        max_seq_len=512,
        prompt_len=(4, 400),
        new_tokens=(2, 60),
        page_size=PAGE_SIZE.get(back_end, 1),
        device=device,
    )
    engine = Engine(tree, back_end, loop, device)
    for buffer in engine.buffers().values():
        buffer.fill_(POISON)
    digests = []
    for step in islice(loop, steps):
        batch = engine.batch(step)
        digests.append(engine.digest(engine.runner.replay(batch)))
    batch, counter = engine.batch(next(loop)), CountedOps()
    with counter:
        engine.runner.replay(batch)
    return {"digests": digests, "ops": dict(counter.ops), "batches": sorted(engine.runner.graph_map)}


class Engine:
    """The parts of mini-sglang that fill static buffers, around one graph runner."""

    def __init__(self, tree: Path, back_end: str, loop: DecodeLoop, device: torch.device) -> None:
        replace_heavy_modules(tree / "python" / "minisgl")
        self.core = importlib.import_module("minisgl.core")
        decode_back_end = "fa" if back_end == HYBRID else back_end
        attention = importlib.import_module(f"minisgl.attention.{decode_back_end}")
        graph = importlib.import_module("minisgl.engine.graph")
        importlib.import_module("minisgl.distributed.info").set_tp_info(0, 1)

        self.loop = loop
        self.context = self.core.Context(loop.page_size)
        self.context.page_table = torch.full(
            (loop.max_bs + 1, loop.max_seq_len), DUMMY_SLOT, dtype=torch.int32, device=device
        )
        self.context.kv_cache = SimpleNamespace(device=device, dtype=torch.bfloat16)
        self.core.set_global_ctx(self.context)
        if device.type == "cpu":
            for module in (attention, graph):
                module.torch = TorchWithoutGpu(self)  # type: ignore[attr-defined]
            if back_end == "fi":  # it asserts that tensors are on a GPU
                attention.FIMetadata.__post_init__ = lambda metadata: None
        config = SimpleNamespace(head_dim=64, num_qo_heads=4, num_kv_heads=4)
        self.back_end = decode = getattr(attention, BACK_ENDS[decode_back_end])(config)
        if back_end == HYBRID:
            self.back_end = importlib.import_module("minisgl.attention.base").HybridBackend(None, decode)
        self.decode_back_end = decode
        self.runner = graph.GraphRunner(
            stream=torch.cuda.Stream(device) if device.type == "cuda" else None,
            device=device,
            model=SimpleNamespace(forward=self.model),
            attn_backend=self.back_end,
            cuda_graph_bs=loop.capture_sizes,
            cuda_graph_max_bs=None,
            free_memory=0,
            max_seq_len=loop.max_seq_len,
            vocab_size=VOCAB_SIZE,
            dummy_req=self.request(table_idx=0, seq_len=1),
        )

    def request(self, table_idx: int, seq_len: int) -> Any:
        """A request that decodes its token number ``seq_len``."""
        return self.core.Req(torch.zeros(seq_len, dtype=torch.int32), table_idx, seq_len - 1, 1, 0, None, None)

    def batch(self, step: Step) -> Any:
        """The loop's step as mini-sglang's scheduler prepares it."""
        running = self.loop.running
        rows = [request.row for request in running]
        width = step.max_seqlen_k
        self.context.page_table[rows, :width] = step.sources["page_table"][: len(rows)]
        batch = self.core.Batch([self.request(r.row, r.seq_len) for r in running], "decode")
        self.runner.pad_batch(batch)
        assert batch.padded_size == step.bs
        for name in ("input_ids", "positions", "out_loc"):
            setattr(batch, name, step.sources[name])
        self.back_end.prepare_metadata(batch)
        return batch

    def model(self) -> torch.Tensor:
        """A number for each request that any wrong element changes, in exact arithmetic."""
        batch = self.context.batch
        bs, metadata = len(batch.input_ids), batch.attn_metadata
        if wrapper := getattr(metadata, "wrapper", None):
            indptr, slots, last_page_len = wrapper.indptr.long(), wrapper.indices, wrapper.last_page_len
            until = slots.long().cumsum(0)
            attended = until[indptr[1:] - 1] - until[indptr[:-1]] + slots[indptr[:-1]] + last_page_len
        else:
            table, lens = metadata.page_table, metadata.cache_seqlens
            pages = -(-lens // self.context.page_size)
            live = torch.arange(table.shape[1], device=table.device) < pages[:, None]
            attended = (table * live).sum(dim=1) * 3 + lens * 5 + metadata.cu_seqlens_k[1:]
        mixed = attended + batch.input_ids * 7 + batch.positions * 11 + batch.out_loc * 13
        logits: torch.Tensor = mixed[:bs, None] * torch.arange(1, VOCAB_SIZE + 1, device=mixed.device)
        return logits.remainder(1 << 20).float()

    def buffers(self) -> dict[str, torch.Tensor]:
        """Every static buffer that a replay may write or read."""
        capture, buffer = self.decode_back_end.capture, self.runner.buffer
        return {
            "input_ids": buffer.input_ids,
            "out_loc": buffer.out_loc,
            "positions": buffer.positions,
            "cu_seqlens_k": capture.cu_seqlens_k,
            "seq_lens": capture.seq_lens,
            "page_table": capture.page_table,
        }

    def digest(self, logits: torch.Tensor) -> str:
        """Of all buffers' bytes and the output."""
        tensors = [*self.buffers().values(), logits]
        return hashlib.sha256(b"".join(t.contiguous().cpu().numpy().tobytes() for t in tensors)).hexdigest()


class CountedOps(TorchDispatchMode):
    """Counts what a fill calls: copies, fills and this package's op."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__ if func.namespace == "aten" else f"{func.namespace}.replay"
        if name in ("copy_", "fill_", "fused_copy.replay"):
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))


class Progress(list[int]):
    """In place of tqdm's bar."""

    desc = ""

    def __init__(self, items: list[int], **_: Any) -> None:
        super().__init__(items)

    def refresh(self) -> None: ...


class Wrapper:
    """In place of FlashInfer's wrappers: ``plan`` copies into the buffers that a CUDA graph reads, as theirs does.

    In FlashInfer 0.5.3 and 0.6.17, ``BatchDecodeWithPagedKVCacheWrapper.plan`` (flashinfer/decode.py) makes these three
    copies, in this order, ``if self.is_cuda_graph_enabled``.
    """

    _int_workspace_buffer = None

    def __init__(
        self,
        *_: Any,
        indptr_buffer: torch.Tensor | None = None,
        indices_buffer: torch.Tensor | None = None,
        last_page_len_buffer: torch.Tensor | None = None,
        **__: Any,
    ) -> None:
        self.indptr, self.indices, self.last_page_len = indptr_buffer, indices_buffer, last_page_len_buffer

    def plan(self, *, indptr: Any, indices: Any, last_page_len: Any, **_: Any) -> None:
        assert self.indptr is not None and self.indices is not None and self.last_page_len is not None
        self.indptr.copy_(indptr, non_blocking=True)
        self.last_page_len.copy_(last_page_len, non_blocking=True)
        self.indices[: len(indices)].copy_(indices, non_blocking=True)


class TorchWithoutGpu:
    """The module ``torch`` as the engine sees it on a machine without a GPU."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.cuda = SimpleNamespace(
            CUDAGraph=lambda: SimpleNamespace(pool=lambda: None),
            graph=self._record,
            Event=lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None),
            synchronize=lambda _: None,
            empty_cache=lambda: None,
            reset_peak_memory_stats=lambda _: None,
            mem_get_info=lambda _: (0, 0),
        )

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("tensor", "arange", "ones", "empty"):
            return found
        return lambda *args, pin_memory=False, **kwargs: found(*args, **kwargs)

    @contextlib.contextmanager
    def _record(self, graph: Any, **_: Any) -> Iterator[None]:
        batch = self._engine.context.batch

        def replay() -> None:
            # No fill counts what a graph does.
            with _disable_current_modes(), self._engine.context.forward_batch(batch):
                self._engine.runner.buffer.logits[: batch.size] = self._engine.model()

        graph.replay = replay
        yield


def replace_heavy_modules(package: Path) -> None:
    """Makes the engine's files importable without its ``__init__`` files, which import all of it."""

    def module(name: str, folder: Path | None = None, **names: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(names)
        made.__spec__ = ModuleSpec(name, None)  # torch's compiler, which a dispatch mode imports, looks for it
        if folder is not None:
            made.__path__ = [str(folder)]
        sys.modules[name] = made

    def init_logger(name: str) -> logging.Logger:
        logger = logging.getLogger(name)
        logger.info_rank0 = logger.info  # type: ignore[attr-defined]
        return logger

    for part in ("", "attention", "engine", "distributed"):
        module(".".join(filter(None, ["minisgl", part])), package / part)
    module(
        "minisgl.utils",
        init_logger=init_logger,
        is_sm100_supported=lambda: False,
        div_even=lambda a, b, **_: a // b,
    )
    sys.modules["minisgl.distributed"].__dict__["get_tp_info"] = importlib.import_module(
        "minisgl.distributed.info"
    ).get_tp_info
    module("tqdm", tqdm=Progress)
    wrappers = ("BatchDecode", "BatchPrefill", "CUDAGraphBatchDecode")
    classes: dict[str, Any] = {f"{name}WithPagedKVCacheWrapper": type(name, (Wrapper,), {}) for name in wrappers[:2]}
    decode = classes["BatchDecodeWithPagedKVCacheWrapper"]
    classes["CUDAGraphBatchDecodeWithPagedKVCacheWrapper"] = type(wrappers[2], (decode,), {})
    module("flashinfer", **classes)


if __name__ == "__main__":
    main()
