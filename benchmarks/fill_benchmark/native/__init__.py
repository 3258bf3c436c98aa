"""The peers in C++ and CUDA, compiled where the benchmark runs: both builds at once, and once in a process."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent
FLAGS = ["-std=c++20", "-O2"]


class Unavailable(Exception):
    """The peer cannot run on this machine, or does not copy tensors like these."""


def extension() -> Any:
    """The C++ extension's module; loading it registers ``torch.ops.fused_copy_bench.nothing``."""
    return _result("extension")


def tvm_ffi_module() -> Any:
    """The tvm-ffi module of ``copy_six_by_element`` and so on."""
    return _result("tvm-ffi")


def _result(name: str) -> Any:
    try:
        return compile_all()[name].result()
    except Exception as error:  # no compiler, no ninja, another CUDA's nvcc, or a package that is not installed
        text = " ".join(str(error).split())
        text = text if len(text) < 600 else f"{text[:300]} ... {text[-300:]}"
        raise Unavailable(f"{type(error).__name__}: {text}") from error


@cache
def compile_all() -> dict[str, Future[Any]]:
    """Compile what can be compiled here: before anything is timed. A build that failed holds its exception."""
    # Both compilers would otherwise build for every GPU they know, or ask a tool that need not be there.
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", capability)
    os.environ.setdefault("TVM_FFI_CUDA_ARCH_LIST", capability)
    with ThreadPoolExecutor(2) as pool:
        return {"extension": pool.submit(_build_extension), "tvm-ffi": pool.submit(_build_tvm_ffi)}


def _build_extension() -> Any:
    from torch.utils import cpp_extension

    sources = [str(SOURCES / name) for name in ("extension.cpp", "nothing_op.cpp", "six_tensors.cu")]
    return cpp_extension.load("fused_copy_bench", sources, extra_cflags=FLAGS, extra_cuda_cflags=FLAGS)


def _build_tvm_ffi() -> Any:
    import tvm_ffi.cpp  # type: ignore[import-not-found, unused-ignore]
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or shutil.which("ninja") is None:
        raise RuntimeError("it needs nvcc (set CUDA_HOME) and ninja")
    return tvm_ffi.cpp.load(
        "fused_copy_bench_tvm_ffi",
        cpp_files=[str(SOURCES / "tvm_function.cpp")],
        cuda_files=[str(SOURCES / "six_tensors.cu")],
        extra_cflags=FLAGS,
        extra_cuda_cflags=FLAGS,
        extra_include_paths=[str(Path(CUDA_HOME, "include"))],
    )
