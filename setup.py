"""Builds the binary: with GPU code where nvcc is found, for the CPU alone where it is not or FUSED_COPY_CPU_ONLY=1."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

# Machine code for every GPU generation that CUDA 12.9 and 13 both know, under the oldest whose PTX becomes the same
# machine code as their own: making PTX takes longest. PTX for the one that they name differently, of compute capability
# 11.0, and for those to come: the driver compiles PTX for any newer GPU.
MACHINE_CODE = {"75": ["75"], "80": ["80", "86", "89"], "90": ["90"], "100": ["100", "120"]}
PTX = "100"
OLDEST_CUDA = (12, 9)
OLDEST_GCC = 11
IN_ALL_PYTHON = {"bindings", "plan", "python_sources", "python_tensors"}  # all_python.cpp includes them
NOT_IN_EVERY_BUILD = {"gpu", "no_gpu", *IN_ALL_PYTHON}
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp") if path.stem not in NOT_IN_EVERY_BUILD)
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-Wall",
    "-Werror=switch",
    f"-ffile-prefix-map={Path.cwd()}=.",
]


def find_cuda_home() -> str | None:
    """The toolkit that nvcc belongs to. nvcc on PATH may be a wrapper outside of it, so the headers decide."""
    if os.environ.get("FUSED_COPY_CPU_ONLY") == "1":
        return None
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        nvcc and Path(nvcc).resolve().parent.parent,
        "/usr/local/cuda",
    ]
    for candidate in filter(None, candidates):
        if Path(candidate, "bin/nvcc").exists() and Path(candidate, "include/cuda_runtime.h").exists():
            return str(candidate)
    return None


def checked_version(nvcc: Path) -> tuple[int, ...]:
    release = re.search(r"release (\d+)\.(\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    found = tuple(map(int, release.groups()))
    if found < OLDEST_CUDA:
        sys.exit(
            "fused_copy: {} is of CUDA {}.{}, and GPU code needs {}.{} or newer: set CUDA_HOME to such a CUDA, or "
            "FUSED_COPY_CPU_ONLY=1 to build for CPU tensors alone".format(nvcc, *found, *OLDEST_CUDA)
        )
    return found


def check_packages() -> None:
    """With --no-build-isolation pip installs none of those that pyproject.toml asks for, and does not look."""
    (listed,) = re.findall(r"^requires = \[(.*)\]$", Path("pyproject.toml").read_text(), re.MULTILINE)
    missing = {}
    for requirement, name, oldest in re.findall(r'"((\w+)(?:>=([\d.]+))?)"', listed):
        if name == "ninja":
            continue  # torch takes any that is on PATH, and does without
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing[requirement] = f"no {name}"
        else:
            if release(version) < release(oldest):
                missing[requirement] = f"{name} {version}"
    if missing:
        sys.exit(
            f"fused_copy: building needs {', '.join(missing)}, and here is {', '.join(missing.values())}: pip install "
            f"{shlex.join(missing)}, or leave out --no-build-isolation, and pip gets what the build needs for it alone"
        )


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def check_compiler() -> None:
    """It would be missed late, and by an error of many lines."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        sys.exit(
            f"fused_copy: building needs gcc {OLDEST_GCC} or newer, and there is no {compiler[0]}: install it "
            "(apt-get install g++, say), or set CXX to a C++ compiler"
        )
    macros = subprocess.check_output([*compiler, "-dM", "-E", "-x", "c++", "/dev/null"], text=True)
    gcc = re.search(r"__GNUC__ (\d+)", macros)  # clang says 4
    if gcc and "__clang__" not in macros and int(gcc[1]) < OLDEST_GCC:
        sys.exit(
            f"fused_copy: building needs gcc {OLDEST_GCC} or newer, and {compiler[0]} is of gcc {gcc[1]}: install a "
            "newer one, and set CXX to it"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        sys.exit(
            f"fused_copy: building needs Python's headers, and there is no {header}: install them "
            "(apt-get install python3-dev, say)"
        )


def build() -> dict[str, object]:
    cuda_home = find_cuda_home()
    cuda_version = checked_version(Path(cuda_home, "bin/nvcc")) if cuda_home else None
    check_packages()
    check_compiler()
    import pybind11
    from torch.utils import cpp_extension

    arguments = {
        "name": "fused_copy._C",
        "include_dirs": ["csrc", pybind11.get_include()],
        "extra_compile_args": {"cxx": CXX_FLAGS},
        "extra_link_args": ["-Wl,--no-undefined-version", "-Wl,--exclude-libs,ALL", "-s", "-ldl"],
    }
    if cuda_version is None:
        print("fused_copy: building for CPU tensors alone: no nvcc was found (set CUDA_HOME), or FUSED_COPY_CPU_ONLY=1")
        built = cpp_extension.CppExtension(sources=[*SOURCES, "csrc/no_gpu.cpp"], **arguments)
    else:
        # torch only provides headers here: the CUDA runtime is linked statically and the ABI is the stable one, so a
        # torch without CUDA, or with another CUDA version than nvcc's, builds the same binary.
        cpp_extension.CUDA_HOME = cuda_home
        cpp_extension._check_cuda_version = lambda *_: None
        pairs = [(ptx, sm) for ptx, made in MACHINE_CODE.items() for sm in made]
        arguments["extra_compile_args"]["nvcc"] = [
            "-std=c++20",
            "-O3",
            "--threads=2",
            "-Xfatbin=-compress-all",
            # Drivers older than CUDA 12.4 cannot read it: those that run what CUDA 13 builds all can.
            *(["--compress-mode=size"] if cuda_version >= (13, 0) else []),
            "-Xcompiler=-fvisibility=hidden",
            *(f"-gencode=arch=compute_{ptx},code=sm_{sm}" for ptx, sm in pairs),
            f"-gencode=arch=compute_{PTX},code=compute_{PTX}",
            r"-DFUSED_COPY_MACHINE_CODE=" + r"\,".join(sm for _, sm in pairs),  # a comma alone begins another macro
            f"-DFUSED_COPY_PTX={PTX}",
        ]
        arguments["extra_link_args"] += ["-lcudart_static", "-lrt", "-lpthread"]
        built = cpp_extension.CUDAExtension(sources=[*SOURCES, "csrc/gpu.cpp", "csrc/kernel.cu"], **arguments)
    # Everything else that torch's helpers link would tie the binary to one torch or one CUDA.
    built.libraries = ["torch_cpu"]
    return {"ext_modules": [built], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


def index_metadata() -> dict[str, object]:
    """The README, whose links lead to the repository where its release is built, as an index has no other files."""
    readme = Path("README.md").read_text()
    urls = {}
    if repository := os.environ.get("FUSED_COPY_REPOSITORY"):
        revision = os.environ.get("FUSED_COPY_REVISION", "main")
        urls = {
            "Repository": repository,
            "Documentation": f"{repository}/tree/{revision}/docs",
            "Changelog": f"{repository}/blob/{revision}/CHANGELOG.md",
            "Issues": f"{repository}/issues",
        }

        def from_anywhere(code_or_link: re.Match[str]) -> str:
            file = code_or_link["file"]
            kind = "raw" if file and file.endswith(".svg") else "blob"
            return f"]({repository}/{kind}/{revision}/{file})" if file else code_or_link[0]

        code_or_link = r"^```.*?^```$|\]\((?!https?:|mailto:|#)(?P<file>[^)\s]+)\)"
        readme = re.sub(code_or_link, from_anywhere, readme, flags=re.MULTILINE | re.DOTALL)
    return {"long_description": readme, "long_description_content_type": "text/markdown", "project_urls": urls}


if __name__ == "__main__":
    setup(**index_metadata(), **build())
