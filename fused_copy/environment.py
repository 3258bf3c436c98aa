"""``fused-copy env``: what a bug report should say about a machine, and what is wrong with it where something is."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

from fused_copy import _library, _version, backends

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
    """The facts that decide whether fused-copy works here."""

    binary: Binary
    driver: Driver = field(default_factory=Driver)
    torch_version: str = torch.__version__
    torch_cuda: str | None = torch.version.cuda
    torch_sees_gpus: bool = False

    @classmethod
    def here(cls) -> Environment:
        return cls(installed_binary(), installed_driver(), torch_sees_gpus=torch.cuda.is_available())

    def problems(self) -> Iterator[str]:
        """What keeps GPU tensors from being copied, one sentence each; nothing where there is no GPU."""
        driver, binary = self.driver, self.binary
        if driver.error:
            yield f"the NVIDIA driver does not work: {driver.error}"
        if not driver.gpus:
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
    where = re.search(r"debug: registered at .*\.cpp:\d+", torch._C._dispatch_dump("fused_copy::replay"))
    return "C++, through torch's stable ABI" if where else "Python"


def machine(device: torch.device, commit: str | None) -> dict[str, str | None]:
    """What times on this device depend on, for a results file; ``commit`` is the package's, where it is known."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _driver_version() if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "fused_copy": _version.__version__,
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _driver_version() -> str | None:
    version = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    failed = nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(version, len(version))
    return None if failed else version.value.decode()


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def run() -> int:
    """Print the environment, then its problems; 1 if there are any."""
    environment = Environment.here()
    for name, text in _lines(environment):
        print(f"{name:<20} {text}")
    problems = list(environment.problems())
    for problem in problems:
        print(f"wrong: {problem}")
    return bool(problems)


def _lines(environment: Environment) -> Iterator[tuple[str, str]]:
    binary, driver = environment.binary, environment.driver
    yield "fused-copy", f"{_version.__version__}, {Path(__file__).parent}"
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
    for text in _library.missing:
        yield "missing in torch", text
    yield "backend", backends.current
    yield (
        "torch",
        f"{environment.torch_version}, " + (f"CUDA {environment.torch_cuda}" if environment.torch_cuda else "no CUDA"),
    )
    threading = "free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else "with GIL"
    yield "Python", f"{platform.python_version()} {threading}, {sys.executable}"
    yield "OS", f"{_os_name()}, {platform.system()} {platform.release()} {platform.machine()}"
    yield "libc", " ".join(platform.libc_ver()) or "unknown"
    cuda = f"runs CUDA up to {_dotted(driver.cuda)}" if driver.cuda else "no libcuda"
    yield "driver", ", ".join(filter(None, [driver.release or "no kernel module", cuda]))
    for index, gpu in enumerate(driver.gpus):
        memory = f"{gpu.bytes / 2**30:.1f} GiB"
        yield f"GPU {index}", f"{gpu.name}, compute capability {_dotted(gpu.capability)}, {memory}"
    for name in sorted(os.environ):
        if name.startswith("FUSED_COPY_") or name in ("CUDA_VISIBLE_DEVICES", "LD_PRELOAD"):
            yield name, os.environ[name]


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
