"""The patches of docs/integrations.

What a patch removes and what it adds run here side by side, on stand-ins for what surrounds them. With the engines'
sources at hand, as folders of ``$FUSED_COPY_ENGINES`` named like the patches, ``tools/check_integrations.py`` applies
them and runs mini-sglang's own graph runner.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import typing
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fused_copy
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


REGISTRY = "python/sglang/srt/model_executor/cuda_graph_buffer_registry.py"


@pytest.mark.parametrize("policy", ["FILL_SENTINEL", "ZERO", "KEEP_PAD", "FOREACH_COPY", "FILL_ONCE"])
def test_sglang_resets_with_the_copy_what_it_copies_and_resets(policy):
    added: dict = {}
    exec("from __future__ import annotations\n" + block("sglang", REGISTRY, "+", "def tail_fill("), added)
    names = ("FILL_SENTINEL", "ZERO", "KEEP_PAD", "FOREACH_COPY", "FILL_ONCE")
    added["PaddingPolicy"], added["torch"] = SimpleNamespace(**{name: name for name in names}), torch
    batch = SimpleNamespace(seq_lens=torch.zeros(3), without=None)

    def tail_fill(**changed):
        slot = {"buffer": SimpleNamespace(is_cuda=True), "copy_from_fb": True, "source_fn": None, "name": "seq_lens"}
        slot |= {"padding_policy": policy, "pad_value": 7}
        return added["tail_fill"](SimpleNamespace(**slot | changed), batch)

    assert tail_fill() == {"FILL_SENTINEL": 7, "ZERO": 0}.get(policy)
    for leaves_it_to_the_reset in (
        {"buffer": SimpleNamespace(is_cuda=False)},
        {"copy_from_fb": False},
        {"source_fn": print},
        {"name": "without"},
        {"name": "absent"},
    ):
        assert tail_fill(**leaves_it_to_the_reset) is None


@pytest.mark.parametrize("tail", [None, -1])
def test_sglang_copies_or_refuses_what_foreach_does(tail):
    collect = block("sglang", REGISTRY, "+", "expand_as")
    sizes = {"the batch's": (3,), "longer": (4,), "shorter": (2,), "one": (1,), "a number": (), "another rank": (1, 3)}
    for name, size in sizes.items():
        buffer, expected, src = torch.full((5,), 9), torch.full((5,), 9), torch.randint(5, size)
        slot = SimpleNamespace(tail_fill=lambda _: tail, slice_for=lambda *_, buffer=buffer: buffer[:4])
        around = {"fused": True, "slot": slot, "src": src, "dst": buffer[:3], "forward_batch": None, "gpu_fills": []}
        around |= {"padded_bs": 4, "padded_num_tokens": 4}
        try:
            torch._foreach_copy_([expected[:3]], [src])
        except RuntimeError:
            with pytest.raises(RuntimeError):
                exec(collect, around)
            continue
        exec(collect, around)
        fused_copy.replay([around["dst"]], [around["src"]], around["gpu_fills"])
        if tail is not None:
            expected[3:4] = tail
        assert torch.equal(buffer, expected), name


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


def vllm_builds(tree, flag, *cases):
    command = [sys.executable, ROOT / "tools" / "vllm_builders.py", tree, "--steps", "40", "--case", *cases]
    environment = os.environ | {"VLLM_USE_FUSED_COPY": flag}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_engines
def test_vllm_builders_stage_the_same_or_are_found_out(check, tmp_path):
    tools = importlib.import_module("vllm_builders")
    source = Path(ENGINES, "vllm")
    for file in tools.FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / file, tmp_path / file)
    check.apply(PATCHES["vllm"], source, tmp_path)
    published = vllm_builds(source, "0", *tools.CASES)
    for flag in "01":
        patched = vllm_builds(tmp_path, flag, *tools.CASES)
        for case in tools.CASES:
            assert patched[case]["digests"] == published[case]["digests"], (case, flag)
            assert ("fused_copy.replay" in patched[case]["ops"]) == (flag == "1"), case
            assert flag == "1" or patched[case]["ops"] == published[case]["ops"], case

    mamba = tmp_path / "vllm/v1/attention/backends/mamba_attn.py"
    expanded = "state_indices_tensor_d.expand(\n                    -1, 1 + self.num_spec_tokens\n                )"
    assert expanded in mamba.read_text()
    mamba.write_text(mamba.read_text().replace(expanded, "state_indices_tensor_d"))
    case = "mamba2-replayssm-flashinfer-spec"  # copy_ broadcasts there
    assert vllm_builds(tmp_path, "1", case)[case]["digests"] != published[case]["digests"]


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
