"""``tools/check_wheel.py`` passes the installed files as a wheel, and names each promise that a wheel breaks."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZIP_DEFLATED, ZipFile

import pytest

from fused_copy._library import _C

pytestmark = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("readelf")), reason="needs binutils")

ROOT = Path(__file__).parents[1]
check_wheel = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "check_wheel.py")))
PYTHON, ABI = (
    f"cp{sysconfig.get_config_var('py_version_nodot')}",
    "cp" + sysconfig.get_config_var("SOABI").split("-")[1],
)
MACHINE = platform.machine()
INFO = f"fused_copy-{importlib.metadata.version('fused-copy')}.dist-info"


def installed() -> dict[str, bytes]:
    """What the wheel had, but its RECORD: not what pip and Python added. In an editable install, what it would have."""
    kept = [path for path in importlib.metadata.files("fused-copy") if path.suffix != ".pyc"]
    added = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json"}
    files = {path.as_posix(): path.read_binary() for path in kept if path.name not in added and path.parts[0] != ".."}
    if f"fused_copy/{Path(_C.__file__).name}" in files:
        return files
    found = (path for package in check_wheel.PACKAGES for path in package.rglob("*.*"))
    sources = (path for path in found if path.suffix not in (".pyc", ".so"))
    package = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (Path(_C.__file__), *sources)}
    return package | {name: content for name, content in files.items() if name.startswith(INFO)}


def record(files: dict[str, bytes]) -> bytes:
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).decode().rstrip("=") for name in files
    }
    lines = [f"{name},sha256={digests[name]},{len(files[name])}" for name in files]
    return "\n".join([*lines, f"{INFO}/RECORD,,"]).encode()


def problems(folder: Path, files: dict[str, bytes], tag: str, expected: str | None = None) -> list[str]:
    """What the tool says of the files as a wheel of this tag, which WHEEL then has too."""
    kept = [line for line in files[f"{INFO}/WHEEL"].splitlines() if line and not line.startswith(b"Tag:")]
    tags = [f"Tag: {tag.rsplit('-', 1)[0]}-{one}".encode() for one in tag.rsplit("-", 1)[1].split(".")]
    files = {**files, f"{INFO}/WHEEL": b"\n".join([*kept, *tags]) + b"\n"}
    files = {f"{INFO}/RECORD": record(files), **files}
    wheel = folder / f"{INFO.removesuffix('.dist-info')}-{tag}.whl"
    with ZipFile(wheel, "w", ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return list(check_wheel.problems(wheel, not _C.has_gpu_code, expected))


def tag(system: str = "linux") -> str:
    return f"{PYTHON}-{ABI}-{system}_{MACHINE}"


def test_the_installed_files_are_good(tmp_path):
    assert problems(tmp_path, installed(), tag()) == []
    assert problems(tmp_path, installed(), tag("manylinux_2_99")) == []


def test_a_platform_older_than_the_binary(tmp_path):
    older = f"{tag('manylinux_2_99')}.manylinux_2_5_{MACHINE}"
    (problem,) = problems(tmp_path, installed(), older)
    assert problem.startswith(f"is for manylinux_2_5_{MACHINE}, so for glibc 2.5, but its binary needs 2.")


def test_another_platform_than_expected(tmp_path):
    expected = f"manylinux_2_28_{MACHINE}"
    assert problems(tmp_path, installed(), tag(), expected) == [f"is for linux_{MACHINE}: expected {expected}"]


def test_another_machine_or_abi_than_the_binary(tmp_path):
    other = "aarch64" if MACHINE == "x86_64" else "x86_64"
    lacks, machine = problems(tmp_path, installed(), f"{PYTHON}-{ABI}-linux_{other}")
    assert lacks == f"lacks fused_copy/_C.cpython-{ABI[2:]}-{other}-linux-gnu.so"
    assert "its binary is of another machine" in machine
    free_threaded = problems(tmp_path, installed(), f"cp399-cp399t-linux_{MACHINE}")
    assert free_threaded == [f"lacks fused_copy/_C.cpython-399t-{MACHINE}-linux-gnu.so"]
    assert f"is for cp399 with ABI {ABI}" in problems(tmp_path, installed(), f"cp399-{ABI}-linux_{MACHINE}")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"Requires-Dist: torch>=2.9\n", b"Requires-Dist: torch<3,>=2.9\n", "requires ['torch<3,>=2.9']: expected"),
        (b"License-Expression: Apache-2.0\n", b"", "has the licence None: expected Apache-2.0"),
        (b"Requires-Python: >=3.10\n", b"Requires-Python: >=3.9\n", "requires Python >=3.9: expected >=3.10"),
    ],
)
def test_metadata(tmp_path, old, new, problem):
    files = installed()
    assert old in files[f"{INFO}/METADATA"]
    files[f"{INFO}/METADATA"] = files[f"{INFO}/METADATA"].replace(old, new)
    (found,) = problems(tmp_path, files, tag())
    assert found.startswith(problem)


def test_contents(tmp_path):
    files = installed()
    files["fused_copy/notes.txt"] = b"left over"
    files["fused_copy/ops.py"] += b"# edited"
    del files["fused_copy/py.typed"]
    files[f"{INFO}/licenses/LICENSE"] += b"and more"
    assert problems(tmp_path, files, tag()) == [
        "lacks fused_copy/py.typed",
        "has files that do not belong there: fused_copy/notes.txt",
        "has other contents than the tree in fused_copy/ops.py",
        "its LICENSE is not the project's",
    ]


def test_size(tmp_path):
    size, _ = problems(tmp_path, installed() | {"fused_copy/noise": os.urandom(2_000_000)}, tag())
    assert size.endswith(" bytes: at most 2,000,000")


def test_record(tmp_path, monkeypatch):
    whole = record
    monkeypatch.setitem(
        globals(), "record", lambda files: whole(files).replace(b"fused_copy/ops.py,", b"elsewhere.py,")
    )
    listed, unlisted = problems(tmp_path, installed(), tag())
    assert listed.startswith("RECORD does not describe elsewhere.py: elsewhere.py,sha256=")
    assert unlisted == "RECORD does not describe fused_copy/ops.py: None"


def test_name(tmp_path):
    assert problems(tmp_path, installed(), f"py3-none-linux_{MACHINE}") == [
        "not named fused_copy-VERSION-PYTHON-ABI-PLATFORM.whl"
    ]


def test_what_an_editable_install_built_stays_out(tmp_path):
    """Its binary lies in the package's folder, and is of any age."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("torch", minversion="2.10")
    pytest.importorskip("pybind11")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "fused_copy", "fused_copy_cli", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name)
        (tmp_path / name / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    command = [sys.executable, "setup.py", "sdist", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"FUSED_COPY_CPU_ONLY": "1"}, check=True, timeout=300)
    with tarfile.open(next(tmp_path.glob("dist/*.tar.gz"))) as archive:
        names = archive.getnames()
    names += map(str, (tmp_path / "built").rglob("*"))
    for file in ("fused_copy/ops.py", "fused_copy_cli/environment.py"):
        assert sum(name.endswith(file) for name in names) == 2
    assert not [name for name in names if name.endswith(".so")]
