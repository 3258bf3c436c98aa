"""Measures what ``import fused_copy`` adds to ``import torch``; exits with 1 if it is more than MAX_MS.

usage: python tools/import_time.py

Each sample is a fresh process. The least of them counts: whatever else the machine does only adds to a sample.
"""

import subprocess
import sys

MAX_MS = 10
SAMPLES = 9
CODE = """
import time, torch
start = time.perf_counter()
import fused_copy
print((time.perf_counter() - start) * 1e3)
"""


def main() -> int:
    command = [sys.executable, "-c", CODE]
    ms = sorted(float(subprocess.check_output(command, cwd="/", text=True)) for _ in range(SAMPLES))
    print(f"import fused_copy: {', '.join(f'{sample:.1f}' for sample in ms)} ms beyond import torch, at most {MAX_MS}")
    return ms[0] > MAX_MS


if __name__ == "__main__":
    sys.exit(main())
