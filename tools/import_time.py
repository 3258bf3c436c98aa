"""Measures what ``import fused_copy`` adds to ``import torch``; exits with 1 if it is more than MAX_IMPORT_MS.

usage: python tools/import_time.py
"""

import sys

from fused_copy.bench.package import MAX_IMPORT_MS, import_ms


def main() -> int:
    ms = import_ms(9)
    times = ", ".join(f"{sample:.1f}" for sample in ms)
    print(f"import fused_copy: {times} ms beyond import torch, at most {MAX_IMPORT_MS}")
    return ms[0] > MAX_IMPORT_MS


if __name__ == "__main__":
    sys.exit(main())
