"""The project's benchmark: every way to fill static buffers, and its peers, checked and timed side by side.

usage: python benchmarks/run.py [--section NAME,...] [--quick] [--json FILE] [--plot DIR] ...

It measures the installed fused_copy. benchmarks/README.md says what else it needs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))  # for import_time

from fill_benchmark import runner


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="run.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--section",
        metavar="NAME,...",
        help="host, gpu, scale, values, rows, decode, threading, import; default: all that this machine can run",
    )
    parser.add_argument("--quick", action="store_true", help="few points and samples: a check, not a measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw curves of the results into this folder")
    parser.add_argument(
        "--commit",
        metavar="SHA",
        default=os.environ.get("FUSED_COPY_COMMIT"),
        help="the measured commit, for the results file (default: $FUSED_COPY_COMMIT)",
    )
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the wheel that is measured, whose size is a target")
    parser.add_argument("--build-seconds", type=float, metavar="N", help="what building it took, which is another")
    args = parser.parse_args(argv)
    return runner.run(
        sections=args.section.split(",") if args.section else None,
        quick=args.quick,
        json=args.json,
        plot=args.plot,
        commit=args.commit,
        wheel=args.wheel,
        build_seconds=args.build_seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
