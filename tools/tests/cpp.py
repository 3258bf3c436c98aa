"""Small C++ programs around parts of the package that no test in Python reaches."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def output_of(
    folder: Path,
    program: str,
    sources: Sequence[Path] = (),
    includes: Sequence[str] = (),
    arguments: Sequence[object] = (),
) -> str:
    """What the program prints, compiled together with these sources."""
    (folder / "main.cpp").write_text(program)
    flags = ["-std=c++20", "-O1", "-w", f"-I{CSRC}", *(f"-I{include}" for include in includes)]
    subprocess.run(["g++", *flags, folder / "main.cpp", *sources, "-o", folder / "program"], check=True)
    return subprocess.check_output([folder / "program", *map(str, arguments)], text=True)
