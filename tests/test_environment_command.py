"""``fused-copy env``: what it prints here, and what it finds wrong on machines that are not here."""

from __future__ import annotations

import dataclasses
import json
import platform
from types import SimpleNamespace

import pytest
import torch

import fused_copy
from fused_copy import _library
from fused_copy_cli import environment, main
from fused_copy_cli.environment import Binary, Driver, Environment, Gpu

H200 = Gpu("NVIDIA H200", (9, 0), 150 << 30)
BINARY = Binary(True, (12, 9), (75, 80, 86, 89, 90, 100, 120), (100,))
GOOD = Environment(BINARY, Driver("580.10", (13, 0), (H200,)), "2.11.0+cu130", "13.0", torch_sees_gpus=True)


def problems(**changes: object) -> list[str]:
    return list(dataclasses.replace(GOOD, **changes).problems())


def on(capability: tuple[int, int], cuda: tuple[int, int] = (13, 0), binary: Binary = BINARY) -> list[str]:
    return problems(binary=binary, driver=Driver("1.0", cuda, (Gpu("some GPU", capability, 1 << 30),)))


def test_prints_what_a_bug_report_needs(capsys, monkeypatch):
    monkeypatch.setenv("FUSED_COPY_BACKEND", "fused")
    monkeypatch.setenv("HOME_OF_SECRETS", "not for a bug report")
    status = main(["env"])
    out = capsys.readouterr().out
    facts = {line[:20].strip(): line[21:] for line in out.splitlines()}
    assert facts["fused-copy"].startswith(f"{fused_copy.__version__}, ")
    assert facts["torch"].startswith(f"{torch.__version__}, ")
    assert facts["Python"].startswith(platform.python_version())
    assert facts["binary"].startswith("_C.")
    assert facts["op"] in ("registered by C++, through torch's stable ABI", "registered by Python")
    assert facts["backend"] == fused_copy.backends.current
    assert facts["FUSED_COPY_BACKEND"] == "fused"
    assert {"OS", "libc", "driver"} < facts.keys()
    assert "not for a bug report" not in out
    assert status == ("wrong: " in out)


def test_json_has_the_same(capsys):
    status = main(["env"])
    lines = capsys.readouterr().out.splitlines()
    assert main(["env", "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert [f"{name:<20} {text}" for name, text in found["facts"].items()] + [
        f"wrong: {problem}" for problem in found["wrong"]
    ] == lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_nothing_is_wrong_without_a_gpu(capsys):
    assert main(["env"]) == 0
    assert "wrong: " not in capsys.readouterr().out


def test_problems_come_last_and_set_the_status(monkeypatch, capsys):
    broken = dataclasses.replace(GOOD, binary=Binary(False))
    monkeypatch.setattr(Environment, "here", lambda: broken)
    assert main(["env"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"{'GPU 0':20} NVIDIA H200, compute capability 9.0, 150.0 GiB" in lines
    assert lines[-1].startswith("wrong: this fused-copy has no GPU code, but this machine has a GPU")


def test_nothing_is_wrong_on_a_good_machine():
    assert problems() == []
    assert problems(driver=Driver("525.60", (12, 0), (H200,))) == []  # CUDA's minor versions are compatible
    assert problems(binary=Binary(True)) == []  # a binary that does not tell


def test_cpu_only_builds_on_a_gpu_machine():
    assert problems(torch_version="2.13.0+cpu", torch_cuda=None, torch_sees_gpus=False) == [
        "torch 2.13.0+cpu, a build for no CUDA, is on a machine with a GPU: install a CUDA build of torch"
    ]
    (problem,) = problems(binary=Binary(False))
    assert "has no GPU code" in problem and "nvcc 12.9" in problem


@pytest.mark.parametrize("command", [["--steps", "1"], ["bench", "--quick"]], ids=["demo", "bench"])
def test_the_first_run_says_that_a_build_has_no_gpu_code(monkeypatch, capsys, command):
    """On a machine with a GPU: the command then goes on with CPU tensors."""
    monkeypatch.setattr(_library._C, "has_gpu_code", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == f"fused-copy: {environment.NO_GPU_CODE}\n"
    assert "cpu" in out.lower()


def test_an_import_that_failed_comes_first():
    found = problems(binary=None, import_error="no torch", driver=Driver("580.10", error="cuInit: unknown error (999)"))
    assert found == ["no torch", "the NVIDIA driver does not work: cuInit: unknown error (999)"]
    assert problems(binary=None, import_error="no torch") == ["no torch"]


def test_driver_too_old():
    driver = Driver("470.10", (11, 4), (H200,))
    (problem,) = problems(driver=driver)
    assert problem == (
        "the driver runs CUDA up to 11.4, but this fused-copy was built with CUDA 12.9: install a driver for CUDA 12"
    )
    of_torch, _ = problems(driver=driver, torch_sees_gpus=False)
    assert "torch 2.11.0+cu130, a build for CUDA 13.0, sees no GPU; the driver runs CUDA up to 11.4" in of_torch


def test_driver_that_does_not_work():
    assert problems(driver=Driver("580.10", error="cuInit: unknown error (999)")) == [
        "the NVIDIA driver does not work: cuInit: unknown error (999)"
    ]


@pytest.mark.parametrize(
    "capability", [(7, 5), (8, 0), (8, 6), (8, 7), (9, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)]
)
def test_covered_architectures(capability):
    assert on(capability) == []


@pytest.mark.parametrize("capability", [(7, 0), (6, 1)])
def test_uncovered_architectures(capability):
    (problem,) = on(capability)
    assert problem.startswith(f"GPU 0 (some GPU): compute capability {capability[0]}.{capability[1]}: ")
    assert "machine code for sm 75, 80, 86, 89, 90, 100, 120 and PTX 100, none of which runs there" in problem


def test_ptx_needs_a_driver_as_new_as_its_cuda():
    assert on((13, 0), cuda=(12, 9)) == []
    (problem,) = on((13, 0), cuda=(12, 8))
    assert "the driver, of CUDA 12.8, cannot compile its PTX of CUDA 12.9" in problem
    assert on((9, 0), cuda=(12, 8)) == []
    (problem,) = on((9, 0), binary=dataclasses.replace(BINARY, machine_code=(), ptx=()))
    assert "machine code for sm none and PTX none" in problem


def test_what_the_binary_tells(monkeypatch):
    info = {"cuda": 12090, "machine_code": (75, 90), "ptx": (90,)}
    monkeypatch.setattr(_library, "_C", SimpleNamespace(has_gpu_code=True, build_info=info))
    assert environment.installed_binary() == Binary(True, (12, 9), (75, 90), (90,))
    monkeypatch.setattr(_library, "_C", SimpleNamespace(has_gpu_code=False, build_info=None))
    assert environment.installed_binary() == Binary(False)


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue Sep  2 10:00:00 UTC 2026",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root@host)",
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.159.04  Release Build  (root@host)",
    ],
)
def test_the_driver_s_release(text):
    assert environment.release_of(text) == "580.159.04"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_driver_tells_what_torch_tells():
    driver = environment.installed_driver()
    assert driver.error is None and driver.cuda is not None
    assert len(driver.gpus) == torch.cuda.device_count()
    for index, gpu in enumerate(driver.gpus):
        properties = torch.cuda.get_device_properties(index)
        assert (gpu.name, gpu.capability) == (properties.name, (properties.major, properties.minor))
        assert gpu.bytes >= properties.total_memory
