"""Measures what ``import fused_copy`` adds to ``import torch``; exits with 1 if it is more than MAX_SHARE of asyncio's.

usage: python tools/import_time.py
"""

import statistics
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
    """What asyncio, and fused_copy after torch, take to import, in ms. Each sample is a fresh process."""
    command = [sys.executable, "-c", CODE]
    outputs = [subprocess.check_output(command, cwd="/", text=True) for _ in range(samples)]
    of_asyncio, of_fused_copy = zip(*(map(float, output.split()) for output in outputs), strict=True)
    return list(of_asyncio), list(of_fused_copy)


def main() -> int:
    of_asyncio, of_fused_copy = import_ms(9)
    # Of the same process, as a machine may be slow for one process and not for the next.
    share = statistics.median(ours / asyncio for ours, asyncio in zip(of_fused_copy, of_asyncio, strict=True))
    times = ", ".join(f"{ms:.1f}" for ms in sorted(of_fused_copy))
    print(f"import fused_copy: {times} ms beyond import torch; {share:.3f} of asyncio's, at most {MAX_SHARE:.3f}")
    return share > MAX_SHARE


if __name__ == "__main__":
    sys.exit(main())
