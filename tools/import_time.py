"""Measures what ``import fused_copy`` adds to ``import torch``; exits with 1 if it is more than MAX_SHARE of asyncio's.

usage: python tools/import_time.py
"""

import subprocess
import sys

# A share, as shared machines are up to three times as slow at times: 10 ms where importing asyncio takes 60.
MAX_SHARE = 1 / 6

CODE = """
from time import perf_counter
start = perf_counter()
import asyncio
asyncio_ms = (perf_counter() - start) * 1e3
import torch
start = perf_counter()
import fused_copy
print(asyncio_ms, (perf_counter() - start) * 1e3)
"""


def import_ms(samples: int) -> tuple[list[float], list[float]]:
    """What asyncio, and fused_copy after torch, take to import, in ms, each sorted. Each sample is a fresh process.

    The least of them counts: whatever else the machine does only adds to a sample.
    """
    command = [sys.executable, "-c", CODE]
    outputs = [subprocess.check_output(command, cwd="/", text=True) for _ in range(samples)]
    of_asyncio, of_fused_copy = zip(*(map(float, output.split()) for output in outputs), strict=True)
    return sorted(of_asyncio), sorted(of_fused_copy)


def main() -> int:
    of_asyncio, of_fused_copy = import_ms(9)
    most = MAX_SHARE * of_asyncio[0]
    times = ", ".join(f"{ms:.1f}" for ms in of_fused_copy)
    limit = f"at most {most:.1f}, as asyncio takes {of_asyncio[0]:.1f}"
    print(f"import fused_copy: {times} ms beyond import torch; {limit}")
    return of_fused_copy[0] > most


if __name__ == "__main__":
    sys.exit(main())
