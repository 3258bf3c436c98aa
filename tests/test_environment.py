"""Where the machine is not what one expects: no GPU, a driver that is too old, a process that was forked."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
import torch

from fused_copy._library import _C

ROOT = Path(__file__).parents[1]


def run_script(script: str, folder: Path, **environment: str) -> str:
    """What it printed, in a process of its own and away from the clone. Its last line must be "done"."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("done\n"), run.stdout
    return run.stdout


WITHOUT_A_GPU = """
    import fused_copy, torch
    assert not torch.cuda.is_available()
    dst = torch.zeros(4)
    torch.ops.fused_copy.replay([dst], [torch.ones(3)])
    plan = fused_copy.Plan([dst])
    plan.replay(torch.full((2,), 2.0))
    assert dst.tolist() == [2, 2, 1, 0]
    try:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
    except RuntimeError:  # a torch without CUDA, or one that asks for a driver here already, as 2.15 does
        pass
    else:
        try:
            plan.capture(graph, torch.ones(2))
        except RuntimeError as error:
            assert "destinations on a GPU: these are on cpu" in str(error), error
        else:
            raise AssertionError("captured")
    print("done")
"""


def test_no_gpu_is_visible(tmp_path):
    """Whatever the build and the machine have: CPU tensors are copied, and a capture says where the buffers are."""
    run_script(WITHOUT_A_GPU, tmp_path, CUDA_VISIBLE_DEVICES="")


def test_no_gpu_for_the_command_line(tmp_path):
    command = [sys.executable, "-m", "fused_copy", "--device", "cuda", "--steps", "3"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2
    assert "sees no GPU" in run.stderr


def test_skipped_tests_are_one_line_for_each_reason(tmp_path):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", ROOT / "tests/gpu/test_gpu_graph_copy.py"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "FUSED_COPY_EXPECT_GPUS": "0", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    skipped = re.findall(r"^SKIPPED \[(\d+)\] tests: (.*)$", run.stdout, re.MULTILINE)
    assert sorted(reason for _, reason in skipped) == ["needs a GPU", "needs two GPUs"], run.stdout + run.stderr
    assert f"= {sum(int(count) for count, _ in skipped)} skipped in" in run.stdout


def test_nvcc_too_old(tmp_path):
    """Building stops before anything is compiled, and says how to go on without that nvcc."""
    pytest.importorskip("setuptools")
    for name, content in {"bin/nvcc": "#!/bin/sh\necho release 12.8, V12.8.93", "include/cuda_runtime.h": ""}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    (tmp_path / "bin/nvcc").chmod(0o755)
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "FUSED_COPY_CPU_ONLY": "0"}
    setup = [sys.executable, "setup.py", "--version"]
    run = subprocess.run(setup, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert f"{tmp_path}/bin/nvcc is of CUDA 12.8, and GPU code needs 12.9 or newer" in run.stderr
    assert "FUSED_COPY_CPU_ONLY=1" in run.stderr


ENOUGH_TO_BUILD = {"setuptools": "77.0.3", "torch": "2.10.0+cpu", "pybind11": "3.0.0", "packaging": "26.4"}


def refusal_to_build(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], **environment: str) -> str:
    """What setup.py says where these packages are installed."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    pytest.importorskip("setuptools")
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.chdir(ROOT)
    for name, value in {"FUSED_COPY_CPU_ONLY": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as refused:
        runpy.run_path("setup.py", run_name="__main__")
    assert "\n" not in refused.value.code
    return refused.value.code


def test_links_of_what_an_index_shows(monkeypatch, tmp_path):
    """Built for a release, none is to a file beside the README; built elsewhere the README stays."""
    pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("FUSED_COPY_REPOSITORY", raising=False)
    index_metadata = runpy.run_path("setup.py")["index_metadata"]
    readme = (ROOT / "README.md").read_text()
    assert (index_metadata()["long_description"], index_metadata()["project_urls"]) == (readme, {})

    repository = "https://github.com/someone/fused-copy"
    monkeypatch.setenv("FUSED_COPY_REPOSITORY", repository)
    monkeypatch.setenv("FUSED_COPY_REVISION", "v1.2.3")
    found = index_metadata()
    assert found["project_urls"]["Repository"] == repository
    assert found["project_urls"]["Changelog"] == f"{repository}/blob/v1.2.3/CHANGELOG.md"
    links = re.findall(r"\]\(([^)]+)\)", found["long_description"])
    for link in links:
        file = re.sub(rf"^{repository}/(raw|blob)/v1.2.3/", "", link).partition("#")[0]
        assert link.startswith("#") or (file != link and (ROOT / file).exists()), link
    assert any("/raw/" in link for link in links) and any("#" in link[1:] for link in links)

    monkeypatch.chdir(tmp_path)
    fence = "```python\nrow = table[0](1)\n```"
    kept = f"[a](https://a.b/c) [d](#e) [f](mailto:g@h)\n\n{fence}\n"
    Path("README.md").write_text(f"[![i](https://a.b/j.svg)](docs/k.md#l) ![m](n.svg)\n{kept}")
    badge = f"[![i](https://a.b/j.svg)]({repository}/blob/v1.2.3/docs/k.md#l)"
    assert index_metadata()["long_description"] == f"{badge} ![m]({repository}/raw/v1.2.3/n.svg)\n{kept}"


@pytest.mark.parametrize(
    ("changes", "needs", "here"),
    [
        ({"torch": "2.9.1+cu130"}, "torch>=2.10", "torch 2.9.1+cu130"),
        ({"torch": None}, "torch>=2.10", "no torch"),
        ({"pybind11": None}, "pybind11>=3.0", "no pybind11"),
        ({"setuptools": "65.5.0", "pybind11": None}, "setuptools>=77, pybind11>=3.0", "setuptools 65.5.0, no pybind11"),
        ({"packaging": None}, "packaging", "no packaging"),
    ],
)
def test_packages_that_a_build_lacks(monkeypatch, changes, needs, here):
    found = {name: version for name, version in {**ENOUGH_TO_BUILD, **changes}.items() if version is not None}
    message = refusal_to_build(monkeypatch, found)
    assert message.startswith(f"fused_copy: building needs {needs}, and here is {here}")
    assert "pip install '" in message or needs == "packaging"
    assert "leave out --no-build-isolation" in message


def test_no_compiler(monkeypatch):
    message = refusal_to_build(monkeypatch, ENOUGH_TO_BUILD, CXX="g++-nowhere -m64")
    assert "needs gcc 11 or newer, and there is no g++-nowhere: install it" in message


@pytest.mark.parametrize(
    ("macros", "message"),
    [
        ("#define __GNUC__ 10", "needs gcc 11 or newer, and {folder}/g++ is of gcc 10: install a newer one"),
        ("#define __GNUC__ 11", "needs Python's headers, and there is no {folder}/Python.h: install them"),
        ("#define __GNUC__ 4\n#define __clang__ 1", "needs Python's headers"),
    ],
)
def test_compiler_too_old_and_no_headers(monkeypatch, tmp_path, macros, message):
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\necho '{macros}'\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    refusal = refusal_to_build(monkeypatch, ENOUGH_TO_BUILD, CXX=str(compiler))
    assert message.format(folder=tmp_path) in refusal


@pytest.mark.skipif(_C.has_gpu_code, reason="the build has GPU code")
def test_cpu_only_build_says_what_to_install():
    with pytest.raises(RuntimeError, match="has no GPU code") as error:
        _C._testing.launch_nothing(0)
    for way in ("pip install --force-reinstall --no-deps .", "nvcc 12.9 or newer on PATH"):
        assert way in str(error.value)


OLD_DRIVER = """
    int cuDriverGetVersion(int* version) { *version = 11000; return 0; }
    int cuInit(unsigned flags) { return 0; }
"""
STREAM_OF_TORCH = """
    int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = 0; return 0; }
"""
LAUNCH = """
    import ctypes, fused_copy, torch
    from fused_copy._library import _C
    if torch.version.cuda is None:
        ctypes.CDLL("libtorch_cuda.so", mode=ctypes.RTLD_GLOBAL)  # stands for the library that a CUDA torch has loaded
    assert not torch.cuda.is_available()
    dst = torch.zeros(4)
    fused_copy.replay([dst], [torch.ones(3)])
    assert dst.tolist() == [1, 1, 1, 0]
    for _ in range(2):
        try:
            _C._testing.launch_nothing(0)
        except RuntimeError as error:
            print(error)
        else:
            raise AssertionError("launched")
    print("done")
"""


def library(folder: Path, name: str, code: str) -> None:
    source = folder / f"{name}.c"
    source.write_text(textwrap.dedent(code))
    subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", source, "-o", folder / name], check=True)


@pytest.mark.skipif(not _C.has_gpu_code, reason="the build has no GPU code")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, for a driver that says it is an old one")
def test_driver_too_old(tmp_path):
    """The CUDA runtime inside the binary meets a libcuda.so.1 that reports CUDA 11.0."""
    library(tmp_path, "libcuda.so.1", OLD_DRIVER)
    if torch.version.cuda is None:
        library(tmp_path, "libtorch_cuda.so", STREAM_OF_TORCH)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("LD_LIBRARY_PATH")]))
    first, second, _ = run_script(LAUNCH, tmp_path, LD_LIBRARY_PATH=path).splitlines()
    assert first == second
    if torch.version.cuda is None:
        assert "driver" in first
        assert "cudaErrorInsufficientDriver" in first
        assert "update" in first


FORKED = """
    import fused_copy, os, torch
    dst, src = torch.zeros(4), torch.ones(3)
    plan = fused_copy.Plan([dst])
    plan.replay(src)
    child = os.fork()
    if child == 0:
        try:
            plan.replay(torch.full((2,), 2.0))
            torch.ops.fused_copy.replay([dst[2:]], [torch.full((1,), 3.0)])
            os._exit(0 if dst.tolist() == [2, 2, 3, 0] else 1)
        except BaseException:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    plan.replay(torch.full((1,), 4.0))
    assert dst.tolist() == [4, 1, 1, 0]
    print("done")
"""


def test_fork(tmp_path):
    """Both processes go on, each with memory of its own. tests/gpu has what a fork does to a GPU's tensors."""
    run_script(FORKED, tmp_path)
