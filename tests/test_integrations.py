"""The patches of docs/integrations.

What a patch removes and what it adds run here side by side, on stand-ins for what surrounds them. With the engines'
sources at hand, as folders of ``$FUSED_COPY_ENGINES`` named like the patches, ``tools/check_integrations.py`` applies
them and runs mini-sglang's own graph runner.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fused_copy.decode import DecodeLoop, capture_buffers, copy_each

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


def block(patch: str, file: str, sign: str, containing: str) -> str:
    (found,) = [code for code in blocks(patch, file, sign) if containing in code]
    return found


def functions(patch: str, file: str) -> dict:
    """The functions that the patch adds to the file."""
    namespace = {"SimpleNamespace": SimpleNamespace}
    for code in blocks(patch, file, "+"):
        if code.lstrip().startswith("def "):
            exec("from __future__ import annotations\n" + code, namespace)
    return namespace


def test_every_engine_has_its_patch_and_its_page():
    pages = {page.stem for page in (ROOT / "docs" / "integrations").glob("*.md")} - {"index"}
    assert pages == set(PATCHES) == {"mini-sglang", "sglang", "vllm", "nano-vllm", "torch"}


@pytest.mark.parametrize("patch", PATCHES)
def test_it_is_a_patch(patch):
    counted = subprocess.run(["git", "apply", "--numstat", PATCHES[patch]], capture_output=True, text=True, check=True)
    for line in counted.stdout.splitlines():
        added, _, file = line.split("\t")
        assert int(added) > 0 and file.endswith(".py")


# --- mini-sglang --------------------------------------------------------------------------------------------------

BACK_ENDS = {"fa": "FAMetadata", "trtllm": "TRTLLMMetadata"}


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_minisgl_fills_what_six_copies_fill(back_end, monkeypatch):
    loop = DecodeLoop(max_bs=8, max_seq_len=64, prompt_len=(2, 40), new_tokens=(2, 20))
    expected, filled = (capture_buffers(loop.max_bs, loop.max_seq_len) for _ in range(2))
    added = functions("mini-sglang", f"python/minisgl/attention/{back_end}.py")
    added[BACK_ENDS[back_end]] = SimpleNamespace
    attention = SimpleNamespace(capture=SimpleNamespace(**filled), capture_bs=loop.capture_sizes)
    attention.replay_buffers = lambda: added["replay_buffers"](attention)
    attention.replay_sources = lambda batch: added["replay_sources"](attention, batch)
    runner = SimpleNamespace(buffer=SimpleNamespace(**filled), attn_backend=attention)
    graph = "python/minisgl/engine/graph.py"
    runner.copy_plan = functions("mini-sglang", graph)["_plan_fused_copy"](runner)
    replay = block("mini-sglang", graph, "+", "copy_plan.replay(")

    for step in islice(loop, 50):
        copy_each(expected, step.sources)
        batch = SimpleNamespace(padded_size=step.bs, **step.sources)
        names = {"cu_seqlens_k": "cu_seqlens_k", "cache_seqlens": "seq_lens", "page_table": "page_table"}
        batch.attn_metadata = SimpleNamespace(**{ours: step.sources[name] for ours, name in names.items()})
        exec(replay, {"self": runner, "batch": batch})
        assert all(torch.equal(filled[name], expected[name]) for name in expected)

    for where, name in [(batch, name) for name in ("input_ids", "out_loc", "positions")] + [
        (batch.attn_metadata, name) for name in names
    ]:
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(where, name, getattr(where, name)[:-1])
            exec(replay, {"self": runner, "batch": batch})
    assert all(torch.equal(filled[name], expected[name]) for name in expected)


def test_minisgl_back_ends_that_say_nothing_prepare_as_before():
    added = functions("mini-sglang", "python/minisgl/attention/base.py")
    prepared = []
    # The class's own methods come first in the patch, the hybrid's overrides after them.
    first, hybrid = (code for code in blocks("mini-sglang", "python/minisgl/attention/base.py", "+") if "def " in code)
    base: dict = {}
    exec("from __future__ import annotations\n" + first, base)
    back_end = SimpleNamespace(prepare_for_replay=prepared.append)
    assert base["replay_buffers"](back_end) == {}
    assert base["replay_sources"](back_end, "batch") == () and prepared == ["batch"]
    assert "self.decode_backend" in hybrid and added["replay_sources"] is not base["replay_sources"]


def test_minisgl_flag_is_off_by_default():
    (line,) = blocks("mini-sglang", "python/minisgl/env.py", "+")
    assert line == "USE_FUSED_COPY = EnvBool(False)"  # MINISGL_ comes before every name there


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


# --- nano-vllm, vLLM, torch: what is removed against what is added ------------------------------------------------


def test_nano_vllm_fills_the_same():
    file = "nanovllm/engine/model_runner.py"
    removed = block("nano-vllm", file, "-", 'graph_vars["input_ids"]')
    plan, added = block("nano-vllm", file, "+", "fused_copy.Plan("), block("nano-vllm", file, "+", "copy_plan.replay(")
    assert blocks("nano-vllm", "nanovllm/config.py", "+") == ["use_fused_copy: bool = False"]

    def buffers():
        names = {"input_ids": torch.int64, "positions": torch.int64, "slot_mapping": torch.int32}
        made = {name: torch.full((8,), 99, dtype=dtype) for name, dtype in names.items()}
        made["context_lens"] = torch.full((8,), 99, dtype=torch.int32)
        made["block_tables"] = torch.full((8, 6), 99, dtype=torch.int32)
        return made | {"outputs": torch.zeros(8, 4)}

    def run(code, runner, **names):
        exec(code, {"self": runner, "graph_vars": runner.graph_vars} | names)

    published, *patched = (
        SimpleNamespace(graph_vars=buffers(), config=SimpleNamespace(use_fused_copy=fused))
        for fused in (None, False, True)
    )
    for runner in patched:
        run(plan, runner)
        assert hasattr(runner, "copy_plan") == runner.config.use_fused_copy
    for bs, blocks_used in [(8, 6), (3, 2), (1, 1), (5, 6), (2, 3)]:
        names = {
            "bs": bs,
            "input_ids": torch.randint(1000, (bs,)),
            "positions": torch.randint(1000, (bs,)),
            "context": SimpleNamespace(
                slot_mapping=torch.randint(1000, (bs,), dtype=torch.int32),
                context_lens=torch.randint(1000, (bs,), dtype=torch.int32),
                block_tables=torch.randint(1000, (bs, blocks_used), dtype=torch.int32),
            ),
        }
        run(removed, published, **names)
        for runner in patched:
            run(added, runner, **names)
            for name, buffer in published.graph_vars.items():
                assert torch.equal(runner.graph_vars[name], buffer), name
    for name in ("slot_mapping", "context_lens", "block_tables"):
        context = SimpleNamespace(**vars(names["context"]) | {name: torch.zeros(3, 3, dtype=torch.int32)})
        with pytest.raises(AssertionError):
            run(added, runner, **names | {"context": context})


class Buffer:
    """vLLM's CpuGpuBuffer on a machine without a GPU."""

    def __init__(self, *size):
        self.cpu = torch.randint(1000, size, dtype=torch.int32)
        self.gpu = torch.zeros_like(self.cpu)

    def copy_to_gpu(self, n):
        self.gpu[:n].copy_(self.cpu[:n])


@pytest.mark.parametrize("enabled", [False, True])
def test_vllm_copies_the_same(enabled):
    added = functions("vllm", "vllm/v1/utils.py")
    added |= {"envs": SimpleNamespace(VLLM_USE_FUSED_COPY=enabled), "PIN_MEMORY": True}
    removed = block("vllm", "vllm/v1/worker/block_table.py", "-", "commit_block_table")
    committed = block("vllm", "vllm/v1/worker/block_table.py", "+", "copy_to_gpu_together(*")
    tables = [Buffer(6, 9), Buffer(6, 4), Buffer(6, 1)]
    for rows in (2, 6, 1):
        for table in tables:
            table.cpu.add_(1)
        exec(
            committed,
            added
            | {
                "self": SimpleNamespace(block_tables=[SimpleNamespace(block_table=t) for t in tables]),
                "num_reqs": rows,
            },
        )
        filled = [table.gpu.clone() for table in tables]
        owners = [SimpleNamespace(commit_block_table=table.copy_to_gpu) for table in tables]
        exec(removed, {"self": SimpleNamespace(block_tables=owners), "num_reqs": rows})
        assert all(torch.equal(table.gpu, before) for table, before in zip(tables, filled, strict=True))


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


@needs_engines
def test_minisgl_check_finds_a_wrong_fill(check, tmp_path, monkeypatch):
    """The comparison would notice two sources in each other's place."""
    names = "batch.input_ids, batch.{}, batch.{}\n"
    patch = PATCHES["mini-sglang"].read_text()
    wrong = patch.replace(names.format("out_loc", "positions"), names.format("positions", "out_loc"))
    assert wrong != patch
    (tmp_path / "mini-sglang.patch").write_text(wrong)
    monkeypatch.setitem(check.PATCHES, "mini-sglang", tmp_path / "mini-sglang.patch")
    with pytest.raises(check.Mismatch, match="step 0 filled other bytes"):
        check.check("mini-sglang", Path(ENGINES, "mini-sglang"), steps=5)
