"""Runs mini-sglang's own scheduler, graph runner and attention back end over a recorded sequence of decode steps.

What prepares a step and fills the static buffers comes from the given source tree: ``Scheduler._prepare_batch`` and
``_forward``, ``CacheManager``, ``GraphRunner``, the attention back ends, batches and environment flags. The model, the
radix cache, FlashInfer and what else needs weights or a compiler are replaced. Without a GPU a CUDA graph is replaced
too: by what was captured, run again. Prints JSON: a digest of what the graphs read, of the token pool and of the
model's output after each step, and the operators that one step's preparation and fill call.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from engines import CountedOps, put_module
from torch.utils._python_dispatch import _disable_current_modes

BACK_ENDS = {"fa": "FlashAttentionBackend", "trtllm": "TensorRTLLMBackend", "fi": "FlashInferBackend"}
HYBRID = "hybrid"
"""FlashAttention for the decode, and a back end for the prefill that is never called."""
MAX_RUNNING, MAX_SEQ_LEN, CAPTURE_SIZES = 24, 512, [1, 2, 4, 8, 16, 24]
VOCAB_SIZE = 8
COUNTED = ("copy_", "_to_copy", "fill_", "index", "index_put_", "index_copy_", "stack", "cumsum_", "arange")
"""The operators that move or make elements."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path, help="mini-sglang's source tree")
    parser.add_argument("--back-end", choices=[*BACK_ENDS, HYBRID], required=True)
    parser.add_argument("--page-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with torch.inference_mode():
        print(json.dumps(run(args.tree, args.back_end, args.page_size, args.steps, torch.device(args.device))))


def run(tree: Path, back_end: str, page_size: int, steps: int, device: torch.device) -> dict[str, Any]:
    """What :func:`main` prints."""
    engine = Engine(tree, back_end, page_size, device)
    rng, digests = random.Random(0), []
    for _ in range(steps):
        engine.admit(rng)
        digests.append(engine.digest(engine.step()))
    counter = CountedOps(*COUNTED)
    engine.admit(rng)
    with counter:
        engine.step()
    return {"digests": digests, "ops": dict(counter.ops), "batches": sorted(engine.runner.graph_map)}


class Engine:
    """The parts of mini-sglang that prepare a decode step, around one graph runner."""

    def __init__(self, tree: Path, back_end: str, page_size: int, device: torch.device) -> None:
        replace_heavy_modules(tree / "python" / "minisgl")
        self.core = importlib.import_module("minisgl.core")
        decode_back_end = "fa" if back_end == HYBRID else back_end
        attention = importlib.import_module(f"minisgl.attention.{decode_back_end}")
        graph = importlib.import_module("minisgl.engine.graph")
        cache = importlib.import_module("minisgl.scheduler.cache")
        scheduler = importlib.import_module("minisgl.scheduler.scheduler")
        importlib.import_module("minisgl.distributed.info").set_tp_info(0, 1)

        self.device, self.output = device, torch.empty(0)
        self.context = self.core.Context(page_size)
        pages = MAX_RUNNING * MAX_SEQ_LEN // page_size
        page_table = torch.zeros(MAX_RUNNING + 1, MAX_SEQ_LEN, dtype=torch.int32, device=device)
        page_table[MAX_RUNNING] = pages * page_size
        self.context.page_table = page_table
        self.context.kv_cache = SimpleNamespace(device=device, dtype=torch.bfloat16)
        self.core.set_global_ctx(self.context)
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(device))
        else:
            for module in (attention, graph, cache, scheduler):
                module.torch = TorchWithoutGpu(self)  # type: ignore[attr-defined]
            if back_end == "fi":  # it asserts that tensors are on a GPU
                attention.FIMetadata.__post_init__ = lambda metadata: None
        config = SimpleNamespace(head_dim=64, num_qo_heads=4, num_kv_heads=4)
        self.back_end = decode = getattr(attention, BACK_ENDS[decode_back_end])(config)
        if back_end == HYBRID:
            self.back_end = importlib.import_module("minisgl.attention.base").HybridBackend(None, decode)
        self.decode_back_end = decode
        self.runner = graph.GraphRunner(
            stream=torch.cuda.current_stream(device) if device.type == "cuda" else None,
            device=device,
            model=SimpleNamespace(forward=self.model),
            attn_backend=self.back_end,
            cuda_graph_bs=CAPTURE_SIZES,
            cuda_graph_max_bs=None,
            free_memory=0,
            max_seq_len=MAX_SEQ_LEN,
            vocab_size=VOCAB_SIZE,
            dummy_req=self.request(MAX_RUNNING, 1, 1),
        )
        self.scheduler = self.make_scheduler(scheduler.Scheduler, cache.CacheManager, pages, page_size)

    def make_scheduler(self, scheduler: Any, cache: Any, pages: int, page_size: int) -> Any:
        """One without processes, sockets and weights: what ``Scheduler.__init__`` makes, as far as steps use it."""
        table = self.context.page_table
        made = scheduler.__new__(scheduler)
        made.device, made.stream = self.device, self.runner.stream
        made.engine = SimpleNamespace(
            graph_runner=self.runner,
            page_table=table,
            attn_backend=self.back_end,
            sampler=SimpleNamespace(prepare=lambda batch: None),
            forward_batch=self.forward,
        )
        made.token_pool = torch.zeros_like(table)
        made.flat_tokens, made.flat_table = made.token_pool.view(-1), table.view(-1)
        made.cache_manager = cache(pages, page_size, table, "radix")
        made.cache_manager.free_slots = made.cache_manager.free_slots[
            torch.randperm(pages, generator=torch.Generator().manual_seed(0))
        ]
        made.decode_manager = SimpleNamespace(filter_reqs=self.finish)
        self.running: list[Any] = []
        self.rows = list(range(MAX_RUNNING))
        return made

    def request(self, table_idx: int, length: int, tokens: int) -> Any:
        """A request with a prompt of this length, of which all but the last token is cached, and so many to come."""
        return self.core.Req(torch.zeros(length, dtype=torch.int32), table_idx, length - 1, tokens, 0, None, None)

    def admit(self, rng: random.Random) -> None:
        """Requests whose prompts have been computed join."""
        while self.rows and (not self.running or rng.random() < 0.3):
            row, prompt = self.rows.pop(rng.randrange(len(self.rows))), rng.randint(4, 400)
            request = self.request(row, prompt, rng.randint(2, 60))
            request.cached_len = 0
            self.scheduler.cache_manager.allocate_paged([request])
            self.scheduler.token_pool[row, :prompt] = torch.arange(row, row + prompt, device=self.device)
            request.complete_one()
            self.running.append(request)

    def step(self) -> Any:
        """A decode step as the scheduler's loop takes it; its batch."""
        batch = self.core.Batch(list(self.running), "decode")
        self.scheduler._forward(self.scheduler._prepare_batch(batch))
        return batch

    def forward(self, batch: Any, _: Any) -> Any:
        """As ``Engine.forward_batch`` does for a batch that has a graph."""
        self.output = self.runner.replay(batch)
        for request in batch.reqs:
            request.complete_one()
        return SimpleNamespace(next_tokens_gpu=self.output.sum(dim=1).remainder(1000).int())

    def finish(self, requests: list[Any]) -> None:
        """The rows and pages of requests that are done are free again."""
        self.running = [request for request in requests if request.can_decode]
        page_size = self.context.page_size
        for request in requests:
            if request.can_decode:
                continue
            self.rows.append(request.table_idx)
            held = -(-request.cached_len // page_size) * page_size
            self.scheduler.cache_manager._free(self.context.page_table[request.table_idx, :held])

    def model(self) -> torch.Tensor:
        """A number for each request that any wrong element changes, in exact arithmetic."""
        batch = self.context.batch
        metadata = batch.attn_metadata
        if wrapper := getattr(metadata, "wrapper", None):
            indptr, slots, last_page_len = wrapper.indptr.long(), wrapper.indices, wrapper.last_page_len
            until = slots.long().cumsum(0)
            attended = until[indptr[1:] - 1] - until[indptr[:-1]] + slots[indptr[:-1]] + last_page_len
        else:
            lens = metadata.cache_seqlens
            attended = self.live(metadata.page_table, lens).sum(dim=1) * 3 + lens * 5 + metadata.cu_seqlens_k[1:]
        mixed = attended + batch.input_ids * 7 + batch.positions * 11 + batch.out_loc * 13
        logits: torch.Tensor = mixed[:, None] * torch.arange(1, VOCAB_SIZE + 1, device=mixed.device)
        return logits.remainder(1 << 20).float()

    def live(self, pages: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        """The page table as far as attention reads it, zeros beyond."""
        until = -(-lens // self.context.page_size)
        return pages.where(torch.arange(pages.shape[1], device=pages.device) < until[:, None], 0)

    def digest(self, batch: Any) -> str:
        """Of the bytes that the batch's graph reads, the token pool and the output."""
        bs, buffer, capture = batch.padded_size, self.runner.buffer, self.decode_back_end.capture
        tensors = [buffer.input_ids[:bs], buffer.out_loc[:bs], buffer.positions[:bs], self.scheduler.token_pool]
        if capture.page_table.dim() == 2:  # FlashInfer's wrappers have buffers of their own, which the output shows
            lens = capture.seq_lens[:bs]
            tensors += [capture.cu_seqlens_k[: bs + 1], lens, self.live(capture.page_table[:bs], lens)]
        tensors += [self.output]
        return hashlib.sha256(b"".join(t.contiguous().cpu().numpy().tobytes() for t in tensors)).hexdigest()


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
            Event=lambda: SimpleNamespace(record=lambda *_: None, synchronize=lambda: None),
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

    def init_logger(name: str) -> logging.Logger:
        logger = logging.getLogger(name)
        logger.info_rank0 = logger.info  # type: ignore[attr-defined]
        return logger

    for part in ("", "attention", "engine", "distributed", "scheduler"):
        put_module(".".join(filter(None, ["minisgl", part])), package / part)
    messages = ("AbortBackendMsg", "BaseBackendMsg", "BatchBackendMsg", "DetokenizeMsg", "ExitMsg", "UserMsg")
    put_module("minisgl.message", **dict.fromkeys(messages))
    put_module("minisgl.kvcache", BaseCacheHandle=None, MatchResult=None, create_prefix_cache=lambda **_: None)
    put_module("minisgl.scheduler.config", SchedulerConfig=None)
    put_module("minisgl.scheduler.io", SchedulerIOMixin=object)
    put_module("minisgl.scheduler.prefill", ChunkedReq=None, PrefillManager=None)
    put_module(
        "minisgl.utils",
        init_logger=init_logger,
        is_sm100_supported=lambda: False,
        div_even=lambda a, b, **_: a // b,
        div_ceil=lambda a, b: -(-a // b),
        load_tokenizer=None,
    )
    sys.modules["minisgl.distributed"].__dict__["get_tp_info"] = importlib.import_module(
        "minisgl.distributed.info"
    ).get_tp_info
    put_module("tqdm", tqdm=Progress)
    wrappers = ("BatchDecode", "BatchPrefill", "CUDAGraphBatchDecode")
    classes: dict[str, Any] = {f"{name}WithPagedKVCacheWrapper": type(name, (Wrapper,), {}) for name in wrappers[:2]}
    decode = classes["BatchDecodeWithPagedKVCacheWrapper"]
    classes["CUDAGraphBatchDecodeWithPagedKVCacheWrapper"] = type(wrappers[2], (decode,), {})
    put_module("flashinfer", **classes)


if __name__ == "__main__":
    main()
