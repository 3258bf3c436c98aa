"""The command line: ``fused-copy``, or ``python -m fused_copy``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="fused-copy",
        description="Fill the static buffers of a decode loop's CUDA graphs with one launch per step, "
        "check every step against copy_, and print what both cost.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--steps", type=_positive, default=500, help="decode steps to run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the decode loop (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU, else cpu")
    parser.set_defaults(run=_demo)
    commands = parser.add_subparsers(title="commands", metavar="")
    bench = commands.add_parser(
        "bench",
        help="time the ways to fill static buffers on this machine",
        description="Check the ways to fill a decode step's static buffers against copy_, then time them side by side.",
    )
    bench.add_argument("--quick", action="store_true", help="one point, few samples: a check, not a measurement")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the times into this file, such as bench.svg")
    bench.set_defaults(run=_bench)
    env = commands.add_parser(
        "env",
        help="say what is installed here, for a bug report, and what is wrong with it",
        description="Print versions, GPUs, driver and what the installed binary supports; exit 1 if they do not fit.",
    )
    env.set_defaults(run=_env)
    args = parser.parse_args(argv)
    if args.version:
        print(f"fused-copy {importlib.metadata.version('fused-copy')}")
        return 0
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        print()
        status = 130
    return status


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _demo(args: argparse.Namespace) -> int:
    import torch

    from fused_copy import demo

    if args.device == "cuda" and not torch.cuda.is_available():
        print("fused-copy: --device cuda: this torch sees no GPU", file=sys.stderr)
        return 2
    device = _default_device()  # says so where the build does not fit, whatever was asked for
    return demo.run(steps=args.steps, seed=args.seed, device=args.device or device)


def _default_device() -> str:
    import torch

    from fused_copy._library import _C
    from fused_copy.environment import NO_GPU_CODE

    sees_gpu = torch.cuda.is_available()
    if sees_gpu and not _C.has_gpu_code:
        print(f"fused-copy: {NO_GPU_CODE}", file=sys.stderr)
    return "cuda" if sees_gpu and _C.has_gpu_code else "cpu"


def _bench(args: argparse.Namespace) -> int:
    needed = ["rich", "matplotlib"] if args.plot else ["rich"]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        print(f"fused-copy bench needs {' and '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    from fused_copy import bench

    return bench.run(device=_default_device(), quick=args.quick, json=args.json, plot=args.plot)


def _env(args: argparse.Namespace) -> int:
    from fused_copy import environment

    return environment.run()


if __name__ == "__main__":
    sys.exit(main())
