"""Whether the fast path is whole, however the package was first imported, and that it says so where it is not."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fused_copy
from fused_copy._library import _C, missing

CONTEXTS = {
    "none": "contextlib.nullcontext()",
    "device": "torch.device('meta')",
    "fake": "torch._subclasses.fake_tensor.FakeTensorMode()",
    "dispatch mode": "Mode()",
    "function mode": "FunctionMode()",
    "inference mode": "torch.inference_mode()",
    "no grad": "torch.no_grad()",
    "default device": "set_globally(torch.set_default_device, 'meta', None)",
    "default dtype": "set_globally(torch.set_default_dtype, torch.float64, torch.float32)",
}

TRANSFORMS = {
    "grad": "torch.func.grad(body)(torch.ones(3))",
    "vmap": "torch.vmap(body)(torch.ones(3))",
    "jvp": "torch.func.jvp(body, (torch.ones(3),), (torch.ones(3),))",
    "make_fx": "make_fx(body)(torch.ones(3))",
    "jit.trace": "torch.jit.trace(body, torch.ones(3))",
}

# Each first import is in a child of one process, as importing torch takes longer than all else.
SCRIPT = """
    import contextlib, os, sys, traceback, warnings
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class FunctionMode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def set_globally(setter, value, back):
        setter(value)
        yield
        setter(back)

    def body(x):
        import fused_copy
        return x.sum()

    def check():
        assert "fused_copy" in sys.modules
        import fused_copy
        from fused_copy._library import _C, missing
        assert _C.fast_path_problem() is None, _C.fast_path_problem()
        assert missing == MISSING, missing
        dst = torch.zeros(3)
        plan = fused_copy.Plan([dst])
        assert "not on the fast path" not in repr(plan)
        plan.replay(torch.ones(2))
        assert _C.replay([dst[2:]], [torch.ones(1)], None, None), "was left to the dispatcher"
        assert dst.tolist() == [1, 1, 1]

    warnings.simplefilter("ignore")
    for name, first in FIRST.items():
        if os.fork() == 0:
            try:
                assert "fused_copy" not in sys.modules
                exec(first, globals())
                check()
                print(name, "is whole", flush=True)
            except BaseException:
                print(name, "is not:", traceback.format_exc(), flush=True)
            os._exit(0)
        os.wait()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> str:
    first = {name: f"with {context}: import fused_copy" for name, context in CONTEXTS.items()} | TRANSFORMS
    script = f"FIRST, MISSING = {first!r}, {missing!r}\n" + textwrap.dedent(SCRIPT)
    folder = tmp_path_factory.mktemp("elsewhere")  # -c imports from where it runs
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("context", [*CONTEXTS, *TRANSFORMS])
def test_first_import_within_a_context(said, context):
    assert f"{context} is whole\n" in said, said


def test_the_fast_path_is_whole_here():
    assert _C.fast_path_problem() is None
    assert all("raw_cuda_graph" in text for text in missing), "only an older torch lacks anything"


# --- private names of torch that may go ---------------------------------------------------------------------------

NEEDED = ["_len_torch_dispatch_stack", "_increment_version"]
WITHOUT = """
    import torch
    {without}
    import fused_copy
    from fused_copy._library import _C, missing
    dst = torch.zeros(3)
    plan = fused_copy.Plan([dst], [7])
    plan.replay(torch.ones(2))
    assert dst.tolist() == [1, 1, 7]
    fused_copy.replay([dst], [torch.full((1,), 5.0)], [2])
    assert dst.tolist() == [5, 2, 2]
    try:
        fused_copy.replay([dst], [torch.ones(4)])
    except RuntimeError as error:
        print(error)
    else:
        raise AssertionError("not refused")
    odd = torch.ones(3, dtype=torch.cfloat).conj()
    try:
        fused_copy.replay([torch.zeros_like(odd)], [odd])
    except RuntimeError:
        pass
    else:
        raise AssertionError("not refused")
    print(repr(plan))
    print(missing)
    from fused_copy_cli import environment
    environment.run(as_json=False)
"""


def without(folder: Path, statement: str) -> str:
    script = textwrap.dedent(WITHOUT).format(without=statement)
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not _C.registers_op, reason="torch 2.9 has the op from the same lookups")
@pytest.mark.parametrize("name", NEEDED)
def test_without_a_name_that_the_fast_path_needs(tmp_path, name):
    """Slower, not broken; the plan and the environment say so."""
    said = without(tmp_path, f"del torch._C.{name}")
    assert f"not on the fast path: this torch has no {name}" in said
    assert f"fast path            no: this torch has no {name}" in said


def test_without_the_dispatch_keys(tmp_path):
    said = without(tmp_path, "del torch._neg_view")
    assert "conjugate and negative bits" in said
    assert "not on the fast path" not in said


def test_without_the_profilers_flag(tmp_path):
    said = without(tmp_path, "import torch.autograd.profiler as p; del p._is_profiler_enabled")
    assert "profiler" in said
    assert "not on the fast path" not in said


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2, by which only what is used is looked at."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("a", "b", "c", "d", "mapped", "e", "f", "allocated", "g", "h")]


def used() -> int:
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    return mallinfo().allocated + mallinfo().mapped


def test_a_thread_keeps_no_memory_of_its_largest_call():
    """What a thread keeps to not allocate in each call is bounded."""
    room = torch.zeros(40_000, 2)
    dst, src = list(room[:, :1].unbind()), list(torch.ones(40_000, 1).unbind())
    fused_copy.replay(dst[:6], src[:6])
    before = used()
    fused_copy.replay(dst, src)
    assert bool((room[:, 0] == 1).all())
    assert used() - before < 2 << 20
