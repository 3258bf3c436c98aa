"""What importing the package costs."""

from __future__ import annotations

import subprocess
import sys

MAX_IMPORT_MS = 6

CODE = """
import time, torch
start = time.perf_counter()
import fused_copy
print((time.perf_counter() - start) * 1e3)
"""


def import_ms(samples: int) -> list[float]:
    """What ``import fused_copy`` adds to ``import torch``, in ms, sorted. Each sample is a fresh process.

    The least of them counts: whatever else the machine does only adds to a sample.
    """
    command = [sys.executable, "-c", CODE]
    return sorted(float(subprocess.check_output(command, cwd="/", text=True)) for _ in range(samples))
