"""Checks that a wheel is the one that the project promises: for every torch that it supports, every CUDA 12 and 13.

usage: python tools/check_wheel.py [--cpu-only] [--platform TAG] WHEEL

Needs readelf and nm. Prints one line for each broken promise and exits with 1, or what the wheel holds.
"""

import argparse
import base64
import email
import hashlib
import re
import runpy
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "fused_copy", ROOT / "fused_copy_cli"]
MAX_BYTES = 2_000_000
MACHINE_CODE = [75, 80, 86, 89, 90, 100, 120]
PTX = [100]
LIBRARIES = re.compile(r"libtorch_cpu\.so|(libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux-.*)\.so\.\d")
# Python's C API, torch's C shim under its stable ABI, and the runtimes of C and C++; nothing of torch's C++ namespaces.
SYMBOLS = re.compile(r"(?!.*N(2at|3c10|5torch))(_?Py|aoti_torch_|torch_|_ZNK?St|_ITM_|__gmon_|.*@(GLIBC|CXXABI|GCC))")
MACHINES = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}
NAME = re.compile(r"fused_copy-(?P<version>[^-]+)-(?P<python>cp3\d+)-(?P<abi>cp3\d+t?)-(?P<platform>[^-]+)\.whl")


def problems(wheel: Path, cpu_only: bool, platform: str | None) -> Iterator[str]:
    """What is wrong with the wheel, one line each."""
    name = NAME.fullmatch(wheel.name)
    if name is None:
        yield "not named fused_copy-VERSION-PYTHON-ABI-PLATFORM.whl"
        return
    if platform not in (None, name["platform"]):
        yield f"is for {name['platform']}: expected {platform}"
    if wheel.stat().st_size > MAX_BYTES:
        yield f"{wheel.stat().st_size:,} bytes: at most {MAX_BYTES:,}"
    with ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    yield from file_problems(files)
    yield from name_problems(name, files)
    for file, content in files.items():
        if file.endswith(".so"):
            yield from binary_problems(content, cpu_only)
            yield from platform_problems(content, name["platform"])


def file_problems(files: dict[str, bytes]) -> Iterator[str]:
    info = next(name.split("/")[0] for name in files if name.endswith(".dist-info/METADATA"))
    patterns = ("*.py", "*.pyi", "py.typed")
    paths = (path for package in PACKAGES for pattern in patterns for path in package.rglob(pattern))
    sources = {str(path.relative_to(ROOT)): path.read_bytes() for path in paths}
    metadata_files = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    expected = sources.keys() | {f"{info}/{name}" for name in metadata_files}
    binaries = {name for name in files if fnmatch(name, "fused_copy/_C.*.so")}
    if len(binaries) != 1:
        yield f"{len(binaries)} binaries fused_copy/_C.*.so: expected 1"
    if missing := expected - files.keys():
        yield f"lacks {', '.join(sorted(missing))}"
    if unknown := files.keys() - expected - binaries:
        yield f"has files that do not belong there: {', '.join(sorted(unknown))}"
    if changed := [name for name in sources.keys() & files.keys() if files[name] != sources[name]]:
        yield f"has other contents than the tree in {', '.join(sorted(changed))}"

    record = f"{info}/RECORD"
    recorded = {line.rsplit(",", 2)[0]: line for line in files[record].decode().splitlines()}
    for name in sorted((files.keys() | recorded.keys()) - {record}):
        content = files.get(name, b"")
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        if recorded.get(name) != f"{name},sha256={digest},{len(content)}":
            yield f"RECORD does not describe {name}: {recorded.get(name)}"

    metadata = email.message_from_bytes(files[f"{info}/METADATA"])
    required = [line for line in metadata.get_all("Requires-Dist", []) if ";" not in line]
    for what, found, wanted in (
        ("requires", required, ["torch>=2.9"]),
        ("requires Python", metadata["Requires-Python"], ">=3.10"),
        ("has the licence", metadata["License-Expression"], "Apache-2.0"),
        ("names the licence files", metadata.get_all("License-File"), ["LICENSE"]),
        ("is of version", metadata["Version"], runpy.run_path(str(PACKAGES[0] / "_version.py"))["__version__"]),
    ):
        if found != wanted:
            yield f"{what} {found}: expected {wanted}"
    if files.get(f"{info}/licenses/LICENSE") != (ROOT / "LICENSE").read_bytes():
        yield "its LICENSE is not the project's"


def name_problems(name: re.Match[str], files: dict[str, bytes]) -> Iterator[str]:
    """Where the file's name, what WHEEL says and what Python looks for do not agree; free-threaded names end in t."""
    if name["abi"].rstrip("t") != name["python"]:
        yield f"is for {name['python']} with ABI {name['abi']}"
    wheel = next(email.message_from_bytes(content) for file, content in files.items() if file.endswith("/WHEEL"))
    expected = sorted(f"{name['python']}-{name['abi']}-{tag}" for tag in name["platform"].split("."))
    if (tags := sorted(wheel.get_all("Tag", []))) != expected:
        yield f"WHEEL has the tags {tags}: expected {expected}"
    binary = f"fused_copy/_C.cpython-{name['abi'][2:]}-{machine_of(name['platform'])}-linux-gnu.so"
    if binary not in files:
        yield f"lacks {binary}"


def machine_of(platform: str) -> str:
    return next((machine for machine in MACHINES if platform.endswith(f"_{machine}")), "unknown")


def platform_problems(binary: bytes, platform: str) -> Iterator[str]:
    """What the binary needs that the platform does not promise: another processor, or a newer glibc."""
    header = inspect(binary, "readelf", "--file-header", "--wide")
    if (expected := MACHINES.get(machine_of(platform))) is None or f"Machine: {expected}" not in " ".join(
        header.split()
    ):
        yield f"is for {platform}, but its binary is of another machine: {header}"
    symbols = inspect(binary, "nm", "--dynamic", "--undefined-only")
    needed = max(tuple(map(int, version)) for version in re.findall(r"@GLIBC_(\d+)\.(\d+)", symbols))
    for tag in platform.split("."):
        match = re.fullmatch(r"manylinux_(\d+)_(\d+)_.*", tag)
        if match and needed > (promised := (int(match[1]), int(match[2]))):
            yield "is for {}, so for glibc {}.{}, but its binary needs {}.{}".format(tag, *promised, *needed)


def binary_problems(binary: bytes, cpu_only: bool) -> Iterator[str]:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", inspect(binary, "readelf", "--dynamic", "--wide"))
    if foreign := [name for name in needed if not LIBRARIES.fullmatch(name)]:
        yield f"the binary needs {', '.join(foreign)}"
    symbols = [line.split()[-1] for line in inspect(binary, "nm", "--dynamic", "--undefined-only").splitlines()]
    if foreign := [name for name in symbols if not SYMBOLS.match(name)]:
        yield f"the binary has undefined symbols outside of torch's stable ABI: {', '.join(foreign)}"
    expected = ([], []) if cpu_only else (MACHINE_CODE, PTX)
    if (found := gpu_code(binary)) != expected:
        yield "the binary has machine code for sm {} and PTX {}: expected {} and {}".format(*found, *expected)


def gpu_code(binary: bytes) -> tuple[list[int], list[int]]:
    """The GPU architectures of the machine code and of the PTX, from the headers in the section .nv_fatbin.

    A fat binary is a header (magic, version, header size, size of the entries) and its entries, each again with a
    header (kind, version, header size, size; 28 bytes into it the architecture). NVIDIA does not document this; a
    layout that changed would fail the check, not pass it.
    """
    machine_code: set[int] = set()
    ptx: set[int] = set()
    section = re.search(r" \.nv_fatbin +\S+ +\S+ +(\S+) +(\S+)", inspect(binary, "readelf", "--sections", "--wide"))
    at, end = (0, 0) if section is None else (int(section[1], 16), int(section[1], 16) + int(section[2], 16))
    while (at := binary.find(struct.pack("<I", 0xBA55ED50), at, end)) >= 0:
        _, _, header_size, size = struct.unpack_from("<IHHQ", binary, at)
        at += header_size
        stop = at + size
        while at < stop:
            kind, _, header_size, size = struct.unpack_from("<HHIQ", binary, at)
            (architecture,) = struct.unpack_from("<I", binary, at + 28)
            (ptx if kind == 1 else machine_code).add(architecture)
            at += header_size + size
    return sorted(machine_code), sorted(ptx)


def inspect(binary: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary)
        file.flush()
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cpu-only", action="store_true", help="expect no GPU code")
    parser.add_argument(
        "--platform", metavar="TAG", help="expect a wheel for this platform, such as manylinux_2_28_x86_64"
    )
    parser.add_argument("wheel", type=Path)
    args = parser.parse_args()
    found = list(problems(args.wheel, args.cpu_only, args.platform))
    for problem in found:
        print(f"{args.wheel.name}: {problem}", file=sys.stderr)
    if not found:
        code = "no GPU code" if args.cpu_only else f"machine code for sm {MACHINE_CODE}, PTX {PTX}"
        print(f"{args.wheel.name}: {args.wheel.stat().st_size:,} bytes, {code}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
