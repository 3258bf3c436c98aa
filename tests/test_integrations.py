"""The patches of docs/integrations.

What a patch removes and what it adds run here side by side, on stand-ins for what surrounds them. With the engines'
sources at hand, as folders of ``$FUSED_COPY_ENGINES`` named like the patches, ``tools/check_integrations.py`` applies
them and runs the engines' own code over recorded steps.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import os
import random
import re
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import fused_copy
from fused_copy.decode import capture_buffers

ROOT = Path(__file__).parent.parent
PATCHES = {path.stem: path for path in sorted((ROOT / "docs" / "integrations").glob("*.patch"))}
ENGINES = os.environ.get("FUSED_COPY_ENGINES")


def blocks(patch: str, file: str, sign: str) -> list[str]:
    """The runs of lines that the patch adds to the file (``+``) or removes from it (``-``), as code."""
    _, _, rest = PATCHES[patch].read_text().partition(f"+++ b/{file}\n")
    assert rest, f"{patch} does not change {file}"
    lines = rest.partition("\ndiff --git ")[0].splitlines()
    runs = groupby(lines, key=lambda line: line[:1])
    return [textwrap.dedent("\n".join(line[1:] for line in run)) for kind, run in runs if kind == sign]


def defined(patch: str, file: str) -> list[str]:
    """The functions that the patch adds to the file, as code."""
    return [code for code in blocks(patch, file, "+") if code.lstrip().startswith("def ")]


def block(patch: str, file: str, sign: str, containing: str) -> str:
    (found,) = [code for code in blocks(patch, file, sign) if containing in code]
    return found


def test_every_engine_has_its_patch_and_its_page():
    pages = {page.stem for page in (ROOT / "docs" / "integrations").glob("*.md")} - {"index", "recipes"}
    assert pages == set(PATCHES) == {"mini-sglang", "sglang", "vllm", "nano-vllm", "torch"}


@pytest.mark.parametrize("patch", PATCHES)
def test_it_is_a_patch(patch):
    counted = subprocess.run(["git", "apply", "--numstat", PATCHES[patch]], capture_output=True, text=True, check=True)
    for line in counted.stdout.splitlines():
        added, _, file = line.split("\t")
        assert int(added) > 0 and file.endswith(".py")


# --- mini-sglang --------------------------------------------------------------------------------------------------

SCHEDULER, CACHE = "python/minisgl/scheduler/scheduler.py", "python/minisgl/scheduler/cache.py"


def minisgl(page_size, width=64, max_bs=8):
    """The scheduler, the cache manager and the graph runner, as far as the patch's functions use them."""
    added = {"fused_copy": fused_copy, "rows": fused_copy.rows, "cu_seqlens": fused_copy.cu_seqlens, "torch": torch}
    added |= {"ForwardInput": SimpleNamespace, "ENV": SimpleNamespace(USE_FUSED_COPY=True)}
    for file in (SCHEDULER, CACHE, "python/minisgl/engine/graph.py"):
        exec("\n".join(["from __future__ import annotations", *defined("mini-sglang", file)]), added)
    buffers = capture_buffers(max_bs, width // page_size)
    runner = SimpleNamespace(
        buffer=SimpleNamespace(**buffers),
        attn_backend=SimpleNamespace(
            replay_buffers=lambda: {name: buffers[name] for name in ("cu_seqlens_k", "seq_lens", "page_table")}
        ),
        max_graph_bs=max_bs,
        device=torch.device("cpu"),
    )
    added["_plan_inputs"](runner)
    page_table = torch.randint(width // page_size, (max_bs + 1, width), dtype=torch.int32) * page_size
    cache = SimpleNamespace(page_size=page_size)
    names = {"self": cache, "page_table": page_table, "page_size": page_size, "num_pages": 200, "device": runner.device}
    exec(block("mini-sglang", CACHE, "+", "ENV.USE_FUSED_COPY:\n    assert"), added | names)
    cache._allocate = lambda pages: torch.arange(100, 100 + pages, dtype=torch.int32) * page_size
    cache.allocate_pages_at = lambda pages: added["allocate_pages_at"](cache, pages)
    engine = SimpleNamespace(graph_runner=runner, page_table=page_table, attn_backend=runner.attn_backend)
    engine.sampler = SimpleNamespace(prepare=lambda batch: "arguments")
    tokens = torch.randint(1000, page_table.shape, dtype=torch.int32)
    scheduler = SimpleNamespace(engine=engine, cache_manager=cache, token_pool=tokens)
    scheduler.flat_tokens, scheduler.flat_table = tokens.view(-1), page_table.view(-1)
    return scheduler, lambda batch: added["_prepare_graph_inputs"](scheduler, batch)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("lens", [[17], [3, 33, 1, 64, 49], [2, 5]], ids=str)
def test_minisgl_makes_what_the_scheduler_makes(page_size, lens):
    scheduler, prepare = minisgl(page_size)
    runner, table = scheduler.engine.graph_runner, scheduler.engine.page_table

    def request(row, length):
        return SimpleNamespace(table_idx=row, cached_len=length - 1, device_len=length, can_decode=length % 2 == 0)

    reqs = [request(row, length) for row, length in enumerate(lens, start=2)]
    padded = reqs + [request(8, 1)] * (-len(reqs) % 4)
    batch = SimpleNamespace(reqs=reqs, padded_reqs=padded, size=len(reqs))
    expected, new = table.clone(), 100 * page_size
    for req in reqs:
        if req.cached_len % page_size == 0:
            expected[req.table_idx, req.cached_len :][:page_size] = torch.arange(new, new + page_size)
            new += page_size
    rows, positions = [req.table_idx for req in padded], [req.cached_len for req in padded]

    prepared = prepare(batch)
    assert torch.equal(table, expected)
    assert prepared.input_tuple is None and prepared.sample_args == "arguments" and prepared.batch is batch
    runner.input_plan.replay(batch.graph_inputs)
    buffers, bs = vars(runner.buffer), len(padded)
    assert torch.equal(buffers["input_ids"][:bs], scheduler.token_pool[rows, positions])
    assert torch.equal(buffers["out_loc"][:bs], expected[rows, positions])
    assert buffers["positions"][:bs].tolist() == positions
    assert buffers["seq_lens"][:bs].tolist() == [req.device_len for req in padded]
    assert buffers["cu_seqlens_k"][: bs + 1].tolist() == [
        sum(req.device_len for req in padded[:n]) for n in range(bs + 1)
    ]
    for row, req in zip(buffers["page_table"], padded, strict=False):
        pages = -(-req.device_len // page_size)
        assert torch.equal(row[:pages], expected[req.table_idx, ::page_size][:pages] // page_size)
    write_rows, write_positions = (written.tolist() for written in prepared.write_tuple)
    assert write_rows == rows[: len(reqs)]
    assert write_positions == [req.device_len if req.can_decode else -1 for req in reqs]


def test_minisgl_rows_hold_whole_pages():
    with pytest.raises(AssertionError, match="whole pages"):  # or a row's last page would reach into the next row
        minisgl(page_size=16, width=72, max_bs=7)  # of all rows together there are whole pages


def test_minisgl_back_ends_without_buffers_prepare_as_before():
    scheduler, prepare = minisgl(1)
    runner, prepared = scheduler.engine.graph_runner, []
    runner.attn_buffers, scheduler.engine.attn_backend.prepare_metadata = {}, prepared.append
    req = SimpleNamespace(table_idx=0, cached_len=4, device_len=5, can_decode=True)
    batch = SimpleNamespace(reqs=[req], padded_reqs=[req], size=1)
    prepare(batch)
    assert prepared == [batch] and "page_table" not in batch.graph_inputs
    filled = []
    replay = block("mini-sglang", "python/minisgl/engine/graph.py", "+", "input_plan.replay(")
    for with_buffers, graph_inputs in [(False, {}), (True, {}), (False, None), (True, None)]:
        runner = SimpleNamespace(
            buffer=SimpleNamespace(copy_from=lambda _: filled.append("copy_from")),
            input_plan=SimpleNamespace(replay=lambda _: filled.append("fused")),
            inputs_read=SimpleNamespace(record=lambda _: filled.append("read")),
            attn_backend=SimpleNamespace(prepare_for_replay=lambda _: filled.append("prepare_for_replay")),
            attn_buffers={"page_table": 0} if with_buffers else {},
            stream=None,
        )
        exec(replay, {"self": runner, "batch": SimpleNamespace(graph_inputs=graph_inputs)})
        filled.append(";")
    calls = "fused read prepare_for_replay ; fused read ; copy_from prepare_for_replay ; copy_from prepare_for_replay ;"
    assert " ".join(filled) == calls


def test_minisgl_flag_is_off_by_default():
    (line,) = blocks("mini-sglang", "python/minisgl/env.py", "+")
    assert line == "USE_FUSED_COPY = EnvBool(False)"  # MINISGL_ comes before every name there


def test_minisgl_replaces_no_more_of_what_runs_without_the_flag():
    removed = re.findall(r"^-(?!--|from typing) *(.*)", PATCHES["mini-sglang"].read_text(), re.MULTILINE)
    assert removed == [
        "self.buffer.copy_from(batch)",
        "self.attn_backend.prepare_for_replay(batch)",
        "input_tuple: Indice2D  # (token_mapping, positions)",
        "batch.input_ids = self.token_pool[input_mapping]",
    ]


# --- SGLang -------------------------------------------------------------------------------------------------------


SGLANG_PLUGIN = "python/sglang/srt/kernel_plugins/fused_copy.py"


@dataclass
class GraphSlot:
    """SGLang's, as far as the patch sees it."""

    name: str
    buffer: torch.Tensor | None
    axis: str = "bs"
    policy: str = "zero"
    device: torch.device | None = None
    copy_from_fb: bool = True
    source_fn: Callable | None = None
    post_fill: Callable | None = None
    pad_value = 1
    padding_policy = property(lambda slot: slot.policy)
    slice_fn = property(lambda slot: slot.slice_for if slot.buffer.dim() == 2 else None)

    def _raw_n(self, bs, tokens):
        return bs if self.axis == "bs" else tokens

    def slice_for(self, bs, tokens):
        return self.buffer[..., : self._raw_n(bs, tokens)]


class BufferRegistry:
    """In place of SGLang's: notes what it is left to fill."""

    def __init__(self, slots):
        self._slots, self.left = {slot.name: slot for slot in slots}, []

    def fill_from(self, batch, *, skip_slots, **sizes):
        self.left.append(sorted(set(self._slots) - skip_slots))

    def copy_slots(self, sources):
        self.left.append(sorted(sources))


@pytest.fixture
def sglang(monkeypatch):
    """The module that the patch adds; ``triton`` are the calls that it leaves to the kernel."""
    triton: list = []
    metadata = SimpleNamespace(normal_decode_set_metadata=lambda *args, **names: triton.append((args, names)))
    registry = {"CudaGraphBufferRegistry": BufferRegistry, "GraphSlot": GraphSlot}
    registry["PaddingPolicy"] = SimpleNamespace(ZERO="zero", FILL_SENTINEL="sentinel")
    modules = {
        "sglang.kernels.ops.attention": {"metadata": metadata},
        "sglang.srt.model_executor.cuda_graph_buffer_registry": registry,
        "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": SimpleNamespace},
    }
    for name, names in modules.items():
        parts = name.split(".")
        for parent in (".".join(parts[:end]) for end in range(1, len(parts))):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(names)
    plugin = ModuleType("plugin")
    exec(block("sglang", SGLANG_PLUGIN, "+", "class FusedCopyBufferRegistry"), vars(plugin))
    vars(plugin)["triton"] = triton
    return plugin


def sglang_metadata(page_size, **changed):
    """Arguments of ``normal_decode_set_metadata`` for three requests."""
    made = {
        "cache_seqlens_int32": torch.full((3,), 77, dtype=torch.int32),
        "cu_seqlens_k": torch.full((4,), 77, dtype=torch.int32),
        "page_table": torch.full((4, 90), 77, dtype=torch.int32)[:, : 2 * 40 : 2],
        "req_to_token": torch.arange(5 * 200, dtype=torch.int32).view(5, 200)[:, :130],
        "req_pool_indices": torch.tensor([4, 0, 2]),
        "max_seq_pages": 110 // page_size,
        "seq_lens": torch.tensor([33, 0, 120]),
        "seq_len_delta": 0,
        "page_size": page_size,
    }
    if page_size == 1:
        made["page_table"] = torch.full((4, 300), 77, dtype=torch.int32)[:, : 2 * 120 : 2]
    return made | changed


@pytest.mark.parametrize("zero_tail", [False, True])
@pytest.mark.parametrize("delta", [0, 3])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_sglang_sets_metadata_as_its_kernel_does(sglang, page_size, delta, zero_tail):
    args = sglang_metadata(page_size, seq_len_delta=delta, zero_tail=zero_tail)
    table = args["page_table"]
    expected = table.clone()
    for row, (request, length) in enumerate(zip([4, 0, 2], [33 + delta, delta, 120 + delta], strict=True)):
        pages = min(-(-length // page_size), args["max_seq_pages"])
        expected[row, :pages] = args["req_to_token"][request, : pages * page_size : page_size] // page_size
        if zero_tail:
            expected[row, pages : args["max_seq_pages"]] = 0
    sglang.normal_decode_set_metadata(**args)
    assert not sglang.triton
    assert torch.equal(table, expected)
    assert args["cache_seqlens_int32"].tolist() == [33 + delta, delta, 120 + delta]
    assert args["cu_seqlens_k"].tolist() == [0, 33 + delta, 33 + 2 * delta, 153 + 3 * delta]


def test_sglang_sets_lengths_alone_where_pages_are_translated(sglang):
    args = sglang_metadata(16, skip_page_table=True, swa_page_table=torch.zeros(3, 8))
    sglang.normal_decode_set_metadata(**args)
    assert not sglang.triton and args["cu_seqlens_k"].tolist() == [0, 33, 33, 153] and (args["page_table"] == 77).all()


@pytest.mark.parametrize(
    "other",
    [{"swa_page_table": torch.zeros(3, 8)}, {"full_v2p": torch.zeros(9)}, {"seq_lens": torch.ones(4).long()}],
    ids=lambda other: next(iter(other)),
)
def test_sglang_leaves_other_metadata_to_its_kernel(sglang, other, caplog):
    args = sglang_metadata(16, **other)
    sglang.normal_decode_set_metadata(**args)
    assert sglang.triton == [((), args)] and (args["cu_seqlens_k"] == 77).all() and not caplog.records


def test_sglang_leaves_what_is_refused_to_its_kernel_and_says_so_once(sglang, caplog):
    args = sglang_metadata(16)
    args["cu_seqlens_k"] = args["page_table"][0, :4]
    for calls in (1, 2):
        sglang.normal_decode_set_metadata(**args)
        assert len(sglang.triton) == calls and (args["cache_seqlens_int32"] == 77).all()
    (record,) = caplog.records
    assert "overlap" in record.message or "shares memory" in record.message


def sglang_slots():
    def slot(name, policy, axis="tokens", shape=(8,), **changed):
        return GraphSlot(name, torch.full(shape, 77), axis, policy, **changed)

    return [
        slot("input_ids", "foreach_copy"),
        slot("seq_lens", "sentinel", "bs"),
        slot("out_cache_loc", "zero"),
        slot("mrope_positions", "zero", shape=(3, 8)),
        slot("seq_lens_cpu", "sentinel", "bs", device=torch.device("cpu")),
        slot("global_num_tokens_gpu", "foreach_copy", "none", copy_from_fb=False),
        slot("rids_int", "foreach_copy", "bs", post_fill=print),
        slot("pp_proxy_tensors.residual", "keep_pad", source_fn=print),
    ]


SGLANG_LEFT = ["global_num_tokens_gpu", "pp_proxy_tensors.residual", "rids_int", "seq_lens_cpu"]


def sglang_sizes(raw_bs, padded_bs, width=1):
    return {
        "raw_bs": raw_bs,
        "padded_bs": padded_bs,
        "raw_num_tokens": raw_bs * width,
        "padded_num_tokens": padded_bs * width,
    }


@pytest.mark.parametrize("mrope", [False, True])
def test_sglang_fills_and_pads_in_one_launch(sglang, mrope):
    registry = sglang.FusedCopyBufferRegistry(slots=sglang_slots())
    names = ("input_ids", "seq_lens", "out_cache_loc", "mrope_positions")
    buffers = {name: registry._slots[name].buffer for name in names}
    tokens = torch.arange(6, dtype=torch.int32)
    batch = SimpleNamespace(input_ids=tokens, seq_lens=tokens[:3], out_cache_loc=tokens + 10, mrope_positions=None)
    if mrope:
        batch.mrope_positions = torch.arange(18).view(3, 6)
    for other in SGLANG_LEFT:
        setattr(batch, other, tokens[:3])
    registry.fill_from(batch, **sglang_sizes(3, 4, width=2))
    assert registry.left == [SGLANG_LEFT]
    assert buffers["input_ids"].tolist() == [0, 1, 2, 3, 4, 5, 77, 77]
    assert buffers["seq_lens"].tolist() == [0, 1, 2, 1, 77, 77, 77, 77]
    assert buffers["out_cache_loc"].tolist() == [10, 11, 12, 13, 14, 15, 0, 0]
    head = batch.mrope_positions if mrope else torch.full((3, 6), 77)
    assert torch.equal(buffers["mrope_positions"][:, :6], head) and not buffers["mrope_positions"][:, 6:].any()
    assert all((registry._slots[name].buffer == 77).all() for name in SGLANG_LEFT)

    registry.fill_from(batch, **sglang_sizes(3, 3, width=2), skip_slots=frozenset({"out_cache_loc"}))
    missing = [] if mrope else ["mrope_positions"]
    assert registry.left[1] == sorted([*SGLANG_LEFT, *missing])
    assert registry._plans.keys() == {(4, 8), None}


@pytest.mark.parametrize("size", [(2,), (4,), (1,), (), (1, 3), [3, 3]], ids=str)
def test_sglang_leaves_other_sizes_to_the_copy(sglang, size):
    registry = sglang.FusedCopyBufferRegistry(slots=sglang_slots()[1:3])
    source = [1, 2, 3] if isinstance(size, list) else torch.ones(size).long()
    registry.fill_from(SimpleNamespace(seq_lens=source, out_cache_loc=torch.arange(3)), **sglang_sizes(3, 4))
    assert registry.left == [["seq_lens"]]
    assert (registry._slots["seq_lens"].buffer == 77).all()


def test_sglang_leaves_a_fill_that_is_refused_to_the_copies(sglang, caplog):
    registry = sglang.FusedCopyBufferRegistry(slots=sglang_slots()[:3])
    slots = registry._slots
    crossed = SimpleNamespace(input_ids=slots["out_cache_loc"].buffer[:3], out_cache_loc=torch.arange(3))
    for calls in (1, 2):
        registry.fill_from(crossed, **sglang_sizes(3, 4))
        assert registry.left == [sorted(slots)] * calls and all((slot.buffer == 77).all() for slot in slots.values())
    assert len(caplog.records) == 1


def test_sglang_stages_slots(sglang):
    registry = sglang.FusedCopyBufferRegistry(slots=sglang_slots())
    slots = registry._slots
    same = slots["input_ids"].buffer[:3]
    registry.copy_slots({"seq_lens": torch.arange(3), "input_ids": same, "seq_lens_cpu": torch.arange(3)})
    assert registry.left == [["seq_lens_cpu"]]
    assert slots["seq_lens"].buffer.tolist() == [0, 1, 2, *[77] * 5] and (slots["input_ids"].buffer == 77).all()


@pytest.mark.parametrize(
    "flag, runs_here, installed", [(True, True, True), (False, True, True), (True, False, True), (True, True, False)]
)
def test_sglang_goes_on_without_flag_package_or_cuda(monkeypatch, caplog, flag, runs_here, installed):
    def load():
        if not installed:
            raise ImportError("No module named 'fused_copy'")
        return "fused_copy's"

    spec = SimpleNamespace(is_available=lambda platform: runs_here, load=load)
    around = {
        "lru_cache": lru_cache,
        "select_kernel": lambda op, backend: spec,
        "KernelBackend": SimpleNamespace(PLUGIN="plugin"),
        "_platform": lambda: "this",
        "logger": logging.getLogger("sglang"),
    }
    for name in ("sglang", "sglang.srt", "sglang.srt.environ"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    environ: dict = vars(sys.modules["sglang.srt.environ"])
    environ["envs"] = SimpleNamespace(SGLANG_USE_FUSED_COPY=SimpleNamespace(get=lambda: flag))
    file = "python/sglang/kernels/selector.py"
    exec("from __future__ import annotations\n" + block("sglang", file, "+", "def fused_copy_or("), around)
    chosen = [around["fused_copy_or"]("published", "attention.an_op") for _ in range(2)]
    assert chosen == [("fused_copy's" if flag and runs_here and installed else "published")] * 2
    assert len(caplog.records) == (not installed)


def test_sglang_registers_what_the_patch_adds():
    added = block("sglang", SGLANG_PLUGIN, "+", "class FusedCopyBufferRegistry")
    for group, name in (("attention", "normal_decode_set_metadata"), ("memory", "FusedCopyBufferRegistry")):
        spec = block("sglang", f"python/sglang/kernels/ops/{group}/__init__.py", "+", "KernelSpec(")
        assert f'"sglang.srt.kernel_plugins.fused_copy:{name}"' in spec and "CUDA_ONLY" in spec
        assert f"def {name}(" in added or f"class {name}(" in added
    assert "SGLANG_USE_FUSED_COPY = EnvBool(False)" in block("sglang", "python/sglang/srt/environ.py", "+", "EnvBool")


# --- nano-vllm ------------------------------------------------------------------------------------------------------


RUNNER = "nanovllm/engine/model_runner.py"


def nano_runner(use_fused_copy=True, package=fused_copy, hip=None):
    """A model runner whose graphs are captured, its graphs and model replaced."""
    buffers = {name: torch.full((8,), 99) for name in ("input_ids", "positions")}
    buffers |= {name: torch.full((8,), 99, dtype=torch.int32) for name in ("slot_mapping", "context_lens")}
    buffers["block_tables"] = torch.full((8, 6), 99, dtype=torch.int32)
    runner = SimpleNamespace(
        copy_plan=None,
        block_size=256,
        graph_vars=buffers | {"outputs": torch.arange(8)},
        graph_bs=[1, 2, 4, 8],
        graphs={},
        model=SimpleNamespace(compute_logits=torch.clone),
    )
    runner.replayed = []
    for bs in runner.graph_bs:
        runner.graphs[bs] = SimpleNamespace(replay=functools.partial(runner.replayed.append, bs))
    config = SimpleNamespace(use_fused_copy=use_fused_copy)
    version = SimpleNamespace(version=SimpleNamespace(hip=hip))
    around = {"self": runner, "config": config, "fused_copy": package, "torch": version, **buffers}
    exec(block("nano-vllm", RUNNER, "+", "fused_copy.Plan("), around)
    return runner


class NanoSequence(SimpleNamespace):
    """nano-vllm's, as a decode sees it."""

    def __len__(self):
        return self.num_tokens


def nano_sequence(num_tokens):
    blocks_used = -(-num_tokens // 256)
    return NanoSequence(
        num_tokens=num_tokens,
        last_token=random.randrange(1000),
        block_table=random.sample(range(1000), blocks_used),
        last_block_num_tokens=num_tokens - (blocks_used - 1) * 256,
    )


def nano_replay(runner, seqs):
    added = {"torch": torch, "fused_copy": fused_copy}
    exec("from __future__ import annotations\n" + block("nano-vllm", RUNNER, "+", "def replay_decode("), added)
    return added["replay_decode"](runner, seqs)


def test_nano_vllm_fills_what_its_copies_fill():
    runner = nano_runner()
    expected = {name: buffer.clone() for name, buffer in runner.graph_vars.items()}
    for lens in [(1, 256, 257, 511, 512, 513, 1536, 1281), (700, 2, 256), (1,), (300,) * 5]:
        seqs, bs = [nano_sequence(n) for n in lens], len(lens)
        logits = nano_replay(runner, seqs)
        assert torch.equal(logits, torch.arange(bs))
        assert runner.replayed.pop() == min(n for n in runner.graph_bs if n >= bs)
        expected["input_ids"][:bs] = torch.tensor([seq.last_token for seq in seqs])
        expected["positions"][:bs] = torch.tensor(lens) - 1
        expected["slot_mapping"][:] = -1
        expected["context_lens"][:] = 0
        for i, seq in enumerate(seqs):
            expected["slot_mapping"][i] = seq.block_table[-1] * 256 + seq.last_block_num_tokens - 1
            expected["context_lens"][i] = len(seq)
            expected["block_tables"][i] = -1
            expected["block_tables"][i, : len(seq.block_table)] = torch.tensor(seq.block_table)
        for name, buffer in expected.items():
            assert torch.equal(runner.graph_vars[name], buffer), name


def test_nano_vllm_refuses_a_sequence_that_is_longer_than_its_table():
    runner = nano_runner()
    with pytest.raises(AssertionError):
        nano_replay(runner, [nano_sequence(1), nano_sequence(6 * 256 + 1)])
    assert all((runner.graph_vars[name] == 99).all() for name in runner.copy_plan.names) and not runner.replayed


def test_nano_vllm_does_as_published_without_the_option_the_package_or_cuda():
    assert blocks("nano-vllm", "nanovllm/config.py", "+") == ["use_fused_copy: bool = False"]
    assert nano_runner().copy_plan is not None
    for without in ({"use_fused_copy": False}, {"package": None}, {"hip": "6.4"}):
        assert nano_runner(**without).copy_plan is None

    (chosen,) = [code for code in blocks("nano-vllm", RUNNER, "+") if "self.replay_decode(" in code]
    runner = SimpleNamespace(
        replay_decode=lambda _: "replayed",
        prepare_prefill=lambda _: ("prefill", None),
        prepare_decode=lambda _: ("decode", None),
        run_model=lambda ids, *_: ids,
    )
    for plan, is_prefill, bs, expected in [
        ("a plan", False, 512, "replayed"),
        ("a plan", False, 513, "decode"),
        ("a plan", True, 1, "prefill"),
        (None, False, 1, "decode"),
        (None, True, 1, "prefill"),
    ]:
        runner.copy_plan = plan
        names = {"self": runner, "is_prefill": is_prefill, "seqs": [None] * bs}
        exec(chosen, names)
        assert names["logits"] == expected


# --- recipes: published lines against those that take their place -----------------------------------------------------


def recipe(engine):
    """The published lines, and the others, compiled."""
    text = (ROOT / "docs" / "integrations" / "recipes.md").read_text()
    section = text.partition(f"\n## {engine}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [compile("from __future__ import annotations\n" + code, engine, "exec") for code in found]


@pytest.mark.parametrize("state_ids", [True, False])
def test_lmdeploy_recipe(state_ids):
    published, bind, replay = recipe("lmdeploy")
    if not state_ids:
        text = (ROOT / "docs" / "integrations" / "recipes.md").read_text()
        published = text.partition("```python\n")[2].partition("\ninput_buffers['state_ids']")[0]

    def buffers():
        made = {name: torch.full((1, 24), 99) for name in ("input_ids", "position_ids")}
        made |= {"block_offsets": torch.full((8, 6), 99, dtype=torch.int32)}
        made |= {"qkv_lens": torch.full((3, 8), 99, dtype=torch.int32)}
        made |= {"cu_seqlens": torch.zeros(2, 9, dtype=torch.int32)}
        made |= {"state_ids": torch.full((8,), 99)} if state_ids else {}
        made |= dict(zip(("q_start_loc", "q_seqlens", "kv_seqlens"), made["qkv_lens"], strict=True))
        made |= {"qkv_seqlens": made["qkv_lens"][1:]}
        return made | dict(zip(("cu_seqlens_q", "cu_seqlens_k"), made["cu_seqlens"], strict=True))

    expected, filled = buffers(), buffers()
    meta = SimpleNamespace(max_tokens=24, max_batchs=8, is_ssm=state_ids)
    exec(bind, {"graph_meta": meta, "input_buffers": filled, "fused_copy": fused_copy})
    for bs, num_blocks in [(8, 6), (3, 2), (1, 1), (5, 6)]:
        q_seqlens = torch.randint(1, 4, (bs,))
        step = {
            "batch_size": bs,
            "num_blocks": num_blocks,
            "num_tokens": bs * 3,
            "input_ids": torch.randint(1000, (1, bs * 3)),
            "position_ids": torch.randint(1000, (1, bs * 3)),
            "block_offsets": torch.randint(1000, (bs, num_blocks)),
            "q_seqlens": q_seqlens,
            "q_start_loc": q_seqlens.cumsum(0) - q_seqlens,
            "kv_seqlens": torch.randint(1, 1000, (bs,)),
            "state_ids": torch.randint(1000, (bs,)),
        }
        step |= {"kwargs": {"state_ids": step["state_ids"]}, "graph_meta": meta}
        step |= {"torch": torch, "fused_copy": fused_copy}
        exec(published, step | {"input_buffers": expected})
        exec(replay, step | {"input_buffers": filled})
        for name, buffer in expected.items():
            assert torch.equal(filled[name], buffer), name


def test_lightllm_recipe():
    published, *added = recipe("lightllm")
    shared = {"page_table": torch.randint(1000, (4, 9), dtype=torch.int32)}

    def state():
        lens = torch.randint(1, 1000, (4,), dtype=torch.int32)
        sums = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
        tensors = {"b_seq_len": lens, "b_kv_seq_len": lens, "b_start_loc": sums[:-1], "b1_cu_kv_seq_len": sums}
        tensors |= {"kv_starts": sums, "position_ids": lens - 1, "position_cos": torch.rand(4, 16).bfloat16()}
        return SimpleNamespace(batch_size=4, b_ready_cache_len=None, **tensors, **shared)

    expected = state()
    filled = copy.deepcopy(expected)
    filled.page_table = shared["page_table"]
    was, now = ({"torch": torch, "fused_copy": fused_copy} for _ in range(2))
    exec(published, was)
    for code in added:
        exec(code, now)
    now["bind_for_cuda_graph"](filled)
    assert len(filled.copy_plan.names) == 5  # of eight names
    filled.made_by_a_layer = torch.zeros(3)
    for _ in range(3):
        step = state()
        was["copy_for_cuda_graph"](expected, step)
        now["copy_for_cuda_graph"](filled, step)
        for name, value in vars(expected).items():
            assert value is None or torch.equal(*map(torch.as_tensor, (getattr(filled, name), value))), name
        assert torch.equal(filled.b_start_loc, step.b_start_loc) and torch.equal(filled.b_kv_seq_len, step.b_seq_len)


def test_tgi_recipe():
    published, bind, replay = recipe("Text Generation Inference")

    def graph():
        narrow = ("position_ids", "input_lengths", "cache_lengths")
        made = {name: torch.full((8,), 99) for name in ("input_ids", "slots")}
        made |= {name: torch.full((8,), 99, dtype=torch.int32) for name in narrow}
        return made | {"block_tables": torch.full((8, 6), 99, dtype=torch.int32)}

    def graphs():
        largest = graph()
        return {8: largest, 4: {name: buffer[:4] for name, buffer in largest.items()}}

    expected, filled = graphs(), graphs()
    for bs in filled:
        exec(bind, {"self": SimpleNamespace(cuda_graphs=filled), "bs": bs, "fused_copy": fused_copy})
    for size, bs, num_blocks in [(8, 8, 6), (4, 3, 2), (8, 5, 4), (4, 1, 1), (4, 4, 6)]:
        step = {
            "batch": SimpleNamespace(slots=torch.randint(1000, (64,)), slot_indices=torch.randperm(64)[:bs]),
            "input_ids": torch.randint(1000, (bs,)),
            "position_ids": torch.randint(1000, (bs,), dtype=torch.int32),
            "block_tables": torch.randint(1000, (bs, num_blocks), dtype=torch.int32),
            "input_lengths": torch.randint(1000, (bs,), dtype=torch.int32),
            "cache_lengths_tensor": torch.randint(1000, (bs,), dtype=torch.int32),
            "fused_copy": fused_copy,
        }
        exec(published, step | {"cuda_graph": expected[size]})
        exec(replay, step | {"cuda_graph": filled[size]})
        for name, buffer in expected[8].items():
            assert torch.equal(filled[8][name], buffer), name


# --- vLLM, torch: what is removed against what is added --------------------------------------------------------------


class Logger(list):
    def warning_once(self, text, *args):
        self.append(text % args)


@pytest.fixture(params=[False, True], ids=["off", "on"])
def vllm(request):
    """The names that the patch adds to vLLM's module, with its flag off and on."""
    names = {"torch": torch, "Any": typing.Any, "Literal": typing.Literal, "logger": Logger()}
    names["fused_copy"] = fused_copy if request.param else None
    exec(block("vllm", "vllm/v1/attention/backends/utils.py", "+", "class CudagraphInputs"), names)
    return SimpleNamespace(**names)


def vllm_inputs(vllm, max_reqs=8):
    buffers = {
        "state_indices": torch.full((max_reqs, 3), 77, dtype=torch.int32),
        "masks": torch.ones(max_reqs, dtype=torch.bool),
        "token_indx": torch.full((max_reqs * 3,), 77, dtype=torch.int32),
        "query_start_loc": torch.full((max_reqs + 1,), 77, dtype=torch.int32),
        "num_accepted_tokens": torch.full((max_reqs,), 77, dtype=torch.int32),
    }
    pads = (0, False, None, "last", 1)
    inputs = {name: (buffer, pad) for (name, buffer), pad in zip(buffers.items(), pads, strict=True)}
    return buffers, vllm.CudagraphInputs(**inputs)


def test_vllm_stages_copies_and_pads(vllm):
    buffers, inputs = vllm_inputs(vllm)
    sources = {
        "state_indices": torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32),
        "masks": torch.tensor([True, True]),
        "token_indx": torch.arange(6, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 3, 6], dtype=torch.int32),
        "num_accepted_tokens": torch.tensor([2, 3], dtype=torch.int32),
    }
    staged = inputs.stage(4, **sources)
    for name, size in {"state_indices": 4, "masks": 4, "token_indx": 24, "query_start_loc": 5}.items():
        assert staged[name].data_ptr() == buffers[name].data_ptr() and len(staged[name]) == size
    assert staged["state_indices"].tolist() == [[1, 2, 3], [4, 5, 6], [0, 0, 0], [0, 0, 0]]
    assert staged["masks"].tolist() == [True, True, False, False]
    assert staged["token_indx"].tolist() == [0, 1, 2, 3, 4, 5] + [77] * 18
    assert staged["query_start_loc"].tolist() == [0, 3, 6, 6, 6]
    assert buffers["num_accepted_tokens"].tolist() == [2, 3, 1, 1, 77, 77, 77, 77]

    # Some of them alone, as for another KV cache group: the others stay.
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    staged = inputs.stage(4, state_indices=sources["state_indices"][:1])
    assert staged.keys() == {"state_indices"} and staged["state_indices"][1:].tolist() == [[0, 0, 0]] * 3
    assert all(torch.equal(buffers[name], before[name]) for name in before if name != "state_indices")
    assert not vllm.logger


def test_vllm_copies_what_a_launch_refuses(vllm):
    _, inputs = vllm_inputs(vllm)
    staged = inputs.stage(4, num_accepted_tokens=torch.tensor([2, 3], dtype=torch.uint32))
    assert staged["num_accepted_tokens"].tolist() == [2, 3, 1, 1]
    assert len(vllm.logger) == (vllm.fused_copy is not None)


def test_vllm_flag_is_off_by_default_and_for_cuda_alone():
    declared, read, not_hashed = blocks("vllm", "vllm/envs.py", "+")
    assert declared == "VLLM_USE_FUSED_COPY: bool = False" and 'os.getenv("VLLM_USE_FUSED_COPY", "0")' in read
    assert not_hashed == '"VLLM_USE_FUSED_COPY",'  # a new flag would otherwise outdate everybody's compile caches
    code = block("vllm", "vllm/v1/attention/backends/utils.py", "+", "import_module(")
    for flag, is_cuda, there in [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0)]:
        warnings: list = []
        names = {
            "Any": typing.Any,
            "envs": SimpleNamespace(VLLM_USE_FUSED_COPY=flag),
            "current_platform": SimpleNamespace(is_cuda=lambda is_cuda=is_cuda: is_cuda),
            "logger": SimpleNamespace(warning=lambda *args, warnings=warnings: warnings.append(args)),
            "importlib": importlib if there else SimpleNamespace(import_module=lambda name: missing(name)),
        }
        exec(code, names)
        assert (names["fused_copy"] is fused_copy) == (flag and is_cuda and there)
        assert bool(warnings) == (not there)


def missing(name):
    raise ModuleNotFoundError(f"No module named {name!r}")


GRAPHS = "torch/cuda/graphs.py"


def run_graphed(sign, containing, **names):
    """A loop of torch's, or the call that replaces it."""
    if sign == "+":
        names |= {"typing": typing}
        exec(block("torch", GRAPHS, "+", "def fill("), names)
    exec(block("torch", GRAPHS, sign, containing), names)


def test_torch_graphed_callables_copy_the_same():
    static = [torch.zeros(3, 4), torch.zeros(5, dtype=torch.int64), torch.zeros(2)]
    inputs = (torch.rand(3, 4), static[1], torch.rand(2))  # the second is in its place already; the third a parameter
    filled = {}
    for sign in "-+":
        surface = tuple(s if s is static[1] else s.clone() for s in static)
        run_graphed(sign, "static_input_surface", static_input_surface=surface, inputs=inputs, len_user_args=2)
        filled[sign] = surface
    assert all(map(torch.equal, filled["-"], filled["+"]))
    assert torch.equal(filled["+"][0], inputs[0]) and not filled["+"][2].any()

    grads = (torch.rand(3), None, torch.rand(2, 2))
    for sign in "-+":
        into = (torch.zeros(3), None, torch.zeros(2, 2))
        run_graphed(sign, "static_grad_outputs", static_grad_outputs=into, grads=grads)
        assert torch.equal(into[0], grads[0]) and torch.equal(into[2], grads[2])


@pytest.mark.parametrize("size", [(3, 4), (2, 4), (3, 2), (4, 4), (4,), (1, 4), (3, 1), (), (1, 3, 4), (0, 4)], ids=str)
def test_torch_graphed_callables_broadcast_or_refuse_the_same(size):
    results = []
    source = torch.rand(size)
    for sign in "-+":
        for names in (
            lambda into: {"static_input_surface": (into,), "inputs": (source,), "len_user_args": 1},
            lambda into: {"static_grad_outputs": (into,), "grads": (source,)},
        ):
            into = torch.full((3, 4), 9.0)
            try:
                run_graphed(sign, next(iter(names(into))), **names(into))
            except RuntimeError:
                results.append("refused")
            else:
                results.append(into.tolist())
    assert results == [results[0]] * 4
    assert (results[0] == "refused") == (size in [(2, 4), (3, 2), (4, 4), (1, 3, 4), (0, 4)])


# --- against the engines' own sources -----------------------------------------------------------------------------


def run_check(name, source, *flags):
    command = [sys.executable, ROOT / "tools" / "check_integrations.py", f"{name}={source}", *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="the patch is for torch 2.13")
def test_torch_patch_applies_to_this_torch():
    checked = run_check("torch", Path(torch.__file__).parents[1])
    assert checked.returncode == 0, checked.stderr


needs_engines = pytest.mark.skipif(ENGINES is None, reason="needs the engines' sources in $FUSED_COPY_ENGINES")


@needs_engines
@pytest.mark.parametrize("name", sorted(set(PATCHES) - {"torch"}))
def test_patch_against_its_engine(name):
    checked = run_check(name, Path(ENGINES, name), "--steps", "100")
    assert checked.returncode == 0, checked.stderr


def test_a_patch_that_does_not_fit_is_found(tmp_path):
    (tmp_path / "torch/cuda").mkdir(parents=True)
    (tmp_path / "torch/cuda/graphs.py").write_text("another = 1\n")
    checked = run_check("torch", tmp_path)
    assert checked.returncode == 1 and "torch.patch does not apply" in checked.stderr


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("check_integrations")


def test_a_name_that_a_patch_leaves_undefined_is_found(check, tmp_path):
    patch = "--- a/pkg/a.py\n+++ b/pkg/a.py\n@@ -1,2 +1,2 @@\n import os\n-where = os.sep\n+where = sys.path + here\n"
    (tmp_path / "x.patch").write_text(patch)
    (tmp_path / "source/pkg").mkdir(parents=True)
    (tmp_path / "target").mkdir()
    (tmp_path / "source/pkg/a.py").write_text("import os\nwhere = os.sep\n")
    with pytest.raises(check.Mismatch, match=r"left pkg/a\.py without here, sys"):
        check.apply(tmp_path / "x.patch", tmp_path / "source", tmp_path / "target")


MISTAKES = {
    "mini-sglang": ('"positions": positions', '"positions": table_idx'),
    "sglang": ("PaddingPolicy.ZERO: 0", "PaddingPolicy.ZERO: 1"),
    "vllm": ("-1, 1 + self.num_spec_tokens", "-1, -1"),  # copy_ broadcasts there, and a plan does not
    "nano-vllm": ('"slot_mapping": -1', '"slot_mapping": 0'),
}


@needs_engines
@pytest.mark.parametrize("name", MISTAKES)
def test_the_comparison_finds_a_mistake(name, check, tmp_path, monkeypatch):
    patch = PATCHES[name].read_text()
    assert patch.count(MISTAKES[name][0]) == 1
    (tmp_path / f"{name}.patch").write_text(patch.replace(*MISTAKES[name]))
    monkeypatch.setitem(check.PATCHES, name, tmp_path / f"{name}.patch")
    with pytest.raises(check.Mismatch, match=r"=1: step \d+ filled other bytes"):
        check.check(name, Path(ENGINES, name), steps=20)
