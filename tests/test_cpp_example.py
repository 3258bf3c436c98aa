"""examples/cpp: the op called from C++ through the dispatcher, built against the installed torch."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from decode_example import EXAMPLES


@pytest.mark.skipif(not (shutil.which("make") and shutil.which("g++")), reason="needs make and g++")
def test_builds_and_fills(tmp_path):
    command = ["make", "-C", EXAMPLES / "cpp", "run", f"PYTHON={sys.executable}", f"BUILD={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "filled from C++ on" in done.stdout
