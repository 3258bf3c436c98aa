"""``fused-copy env``: what a bug report should say about a machine, and what is wrong with it where something is."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fused_copy_cli import PACKAGE, version

Version = tuple[int, int]

NO_GPU_CODE = (
    "this fused-copy has no GPU code, but this machine has a GPU: put nvcc 12.9 or newer on PATH and install again, in "
    "a clone: pip install --force-reinstall --no-deps ."
)

NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE"""


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: Version
    bytes: int


@dataclass(frozen=True)
class Driver:
    """What libcuda tells, whatever torch was built for. ``cuda`` is the newest CUDA that it runs."""

    release: str | None = None
    cuda: Version | None = None
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Binary:
    """What the compiled module was built with. ``cuda`` is None where it has no GPU code or does not tell."""

    has_gpu_code: bool
    cuda: Version | None = None
    machine_code: tuple[int, ...] = ()
    ptx: tuple[int, ...] = ()


@dataclass(frozen=True)
class Environment:
    """The facts that decide whether fused-copy works here. No ``binary`` where the package's import failed: why."""

    binary: Binary | None
    driver: Driver
    torch_version: str | None
    torch_cuda: str | None = None
    torch_sees_gpus: bool = False
    import_error: str | None = None

    @classmethod
    def here(cls) -> Environment:
        driver = installed_driver()
        try:
            from fused_copy import _library as _library
        except Exception as error:  # whatever keeps torch or the package from loading is what is asked for
            known = getattr(error, "name", None) == "fused_copy"
            text = str(error) if known else f"import fused_copy: {type(error).__name__}: {error}"
            version = getattr(sys.modules.get("torch"), "__version__", None)
            return cls(None, driver, version, import_error=text)
        import torch

        return cls(installed_binary(), driver, torch.__version__, torch.version.cuda, torch.cuda.is_available())

    def problems(self) -> Iterator[str]:
        """What keeps tensors, or GPU tensors where there is a GPU, from being copied, one sentence each."""
        driver, binary = self.driver, self.binary
        if self.import_error:
            yield self.import_error
        if driver.error:
            yield f"the NVIDIA driver does not work: {driver.error}"
        if binary is None or not driver.gpus:
            return
        build = f"torch {self.torch_version}, a build for {f'CUDA {self.torch_cuda}' if self.torch_cuda else 'no CUDA'}"
        if self.torch_cuda is None:
            yield f"{build}, is on a machine with a GPU: install a CUDA build of torch"
        elif not self.torch_sees_gpus:
            yield (
                f"{build}, sees no GPU; the driver runs CUDA up to {_dotted(driver.cuda)}: "
                "install a torch for that, or a newer driver"
            )
        if not binary.has_gpu_code:
            yield NO_GPU_CODE
        elif binary.cuda is not None and driver.cuda is not None:
            if driver.cuda[0] < binary.cuda[0]:
                yield (
                    f"the driver runs CUDA up to {_dotted(driver.cuda)}, but this fused-copy was built with CUDA "
                    f"{_dotted(binary.cuda)}: install a driver for CUDA {binary.cuda[0]}"
                )
            for index, gpu in enumerate(driver.gpus):
                if problem := uncovered(gpu.capability, binary, driver.cuda):
                    yield f"GPU {index} ({gpu.name}): {problem}"


def uncovered(capability: Version, binary: Binary, driver_cuda: Version) -> str | None:
    """Why the binary has nothing to run on a GPU of this compute capability; None where it has."""
    major, minor = capability
    # Machine code runs within its major version upwards; PTX runs upwards, compiled by the driver.
    if any(code // 10 == major and code % 10 <= minor for code in binary.machine_code):
        return None
    covered = (
        f"compute capability {_dotted(capability)}: the binary has machine code for sm {_listed(binary.machine_code)}"
    )
    if not any(code <= major * 10 + minor for code in binary.ptx):
        return f"{covered} and PTX {_listed(binary.ptx)}, none of which runs there: build from source for it"
    if binary.cuda is not None and driver_cuda < binary.cuda:
        return (
            f"{covered}, and the driver, of CUDA {_dotted(driver_cuda)}, cannot compile its PTX of CUDA "
            f"{_dotted(binary.cuda)}: install a newer driver"
        )
    return None


def installed_binary() -> Binary:
    from fused_copy import _library

    info = _library._C.build_info
    if info is None:
        return Binary(False)
    return Binary(True, _version_of(info["cuda"]), tuple(info["machine_code"]), tuple(info["ptx"]))


def release_of(module_version: str) -> str | None:
    """The driver's release in what its kernel module says of itself, the open one or the other."""
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", module_version)
    return match and match[1]


def installed_driver() -> Driver:
    module = Path("/proc/driver/nvidia/version")
    release = release_of(module.read_text()) if module.exists() else None
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return Driver(release, error=f"its kernel module is loaded, but {error}" if module.exists() else None)
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = _version_of(number.value)
    if status := cuda.cuInit(0):
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(status, ctypes.byref(text))
        said = (text.value or b"unknown error").decode()
        return Driver(release, version, error=None if status == NO_DEVICE else f"cuInit: {said} ({status})")
    cuda.cuDeviceGetCount(ctypes.byref(number))
    return Driver(release, version, tuple(_gpu(cuda, index) for index in range(number.value)))


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    for number, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    return Gpu(name.value.decode(), (major.value, minor.value), memory.value)


def registered_by() -> str:
    """Which code registered the op: the binary, or Python where torch's stable ABI lacks what it needs."""
    import torch

    where = re.search(r"debug: registered at .*\.cpp:\d+", torch._C._dispatch_dump("fused_copy::replay"))
    return "C++, through torch's stable ABI" if where else "Python"


def run(*, as_json: bool) -> int:
    """Print the environment, then its problems; 1 if there are any."""
    environment = Environment.here()
    facts, problems = dict(_facts(environment)), list(environment.problems())
    if as_json:
        print(json.dumps({"facts": facts, "wrong": problems}, indent=1))
        return bool(problems)
    for name, text in facts.items():
        print(f"{name:<20} {text}")
    for problem in problems:
        print(f"wrong: {problem}")
    return bool(problems)


def _facts(environment: Environment) -> Iterator[tuple[str, str]]:
    yield "fused-copy", f"{version()}, {PACKAGE}"
    if environment.binary is None:
        yield "binary", f"not loaded, of {', '.join(sorted(path.name for path in PACKAGE.glob('_C.*.so'))) or 'none'}"
        yield "torch", environment.torch_version or "not loaded"
    else:
        yield from _loaded_facts(environment, environment.binary)
    threading = "free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else "with GIL"
    yield "Python", f"{platform.python_version()} {threading}, {sys.executable}"
    yield "OS", f"{_os_name()}, {platform.system()} {platform.release()} {platform.machine()}"
    yield "libc", " ".join(platform.libc_ver()) or "unknown"
    driver = environment.driver
    cuda = f"runs CUDA up to {_dotted(driver.cuda)}" if driver.cuda else "no libcuda"
    yield "driver", ", ".join(filter(None, [driver.release or "no kernel module", cuda]))
    for index, gpu in enumerate(driver.gpus):
        memory = f"{gpu.bytes / 2**30:.1f} GiB"
        yield f"GPU {index}", f"{gpu.name}, compute capability {_dotted(gpu.capability)}, {memory}"
    for name in sorted(os.environ):
        if name.startswith("FUSED_COPY_") or name in ("CUDA_VISIBLE_DEVICES", "LD_PRELOAD"):
            yield name, os.environ[name]


def _loaded_facts(environment: Environment, binary: Binary) -> Iterator[tuple[str, str]]:
    from fused_copy import _library, backends

    if not binary.has_gpu_code:
        supports = "CPU tensors alone: no GPU code"
    elif binary.cuda is None:
        supports = "has GPU code"
    else:
        supports = f"machine code for sm {_listed(binary.machine_code)}, PTX {_listed(binary.ptx)}"
        supports += f", built with CUDA {_dotted(binary.cuda)}"
    yield "binary", f"{Path(_library._C.__file__ or '').name}: {supports}"
    yield "op", f"registered by {registered_by()}"
    problem = _library._C.fast_path_problem()
    yield "fast path", "yes" if problem is None else f"no: {problem}; every call goes through torch's dispatcher"
    if _library.missing:
        yield "missing in torch", "; ".join(_library.missing)
    yield "backend", backends.current
    cuda = f"CUDA {environment.torch_cuda}" if environment.torch_cuda else "no CUDA"
    yield "torch", f"{environment.torch_version}, {cuda}"


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return "unknown distribution"


def _version_of(number: int) -> Version:
    return number // 1000, number % 1000 // 10


def _dotted(version: Version | None) -> str:
    return "unknown" if version is None else f"{version[0]}.{version[1]}"


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) or "none"
