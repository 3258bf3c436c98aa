"""The command line: ``fused-copy``, or ``python -m fused_copy``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
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
        help="time every way to fill static buffers, side by side",
        description="Check every way to fill static buffers against copy_, then time them side by side.",
    )
    bench.add_argument(
        "--section",
        metavar="NAME,...",
        help="host, gpu, scale, decode, threading, import; default: all that this machine can run",
    )
    bench.add_argument("--quick", action="store_true", help="few points and samples: a check, not a measurement")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    bench.add_argument("--plot", type=Path, metavar="DIR", help="draw curves of the results into this folder")
    bench.add_argument(
        "--commit",
        metavar="SHA",
        default=os.environ.get("FUSED_COPY_COMMIT"),
        help="the measured commit, for the results file (default: $FUSED_COPY_COMMIT)",
    )
    bench.add_argument("--wheel", type=Path, metavar="FILE", help="the wheel that is measured, whose size is a target")
    bench.add_argument("--build-seconds", type=float, metavar="N", help="what building it took, which is another")
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
    from fused_copy._library import _C

    sees_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not sees_gpu:
        print("fused-copy: --device cuda: this torch sees no GPU", file=sys.stderr)
        return 2
    device = args.device or ("cuda" if sees_gpu and _C.has_gpu_code else "cpu")
    if sees_gpu and not _C.has_gpu_code:
        print("fused-copy: built without nvcc, so for CPU tensors alone", file=sys.stderr)
    return demo.run(steps=args.steps, seed=args.seed, device=device)


def _bench(args: argparse.Namespace) -> int:
    needed = ["rich", "matplotlib"] if args.plot else ["rich"]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        print(f"fused-copy bench needs {' and '.join(missing)}: pip install 'fused-copy[bench]'", file=sys.stderr)
        return 2
    from fused_copy.bench import runner

    sections = args.section.split(",") if args.section else None
    return runner.run(
        sections=sections,
        quick=args.quick,
        json=args.json,
        plot=args.plot,
        commit=args.commit,
        wheel=args.wheel,
        build_seconds=args.build_seconds,
    )


def _env(args: argparse.Namespace) -> int:
    from fused_copy import environment

    return environment.run()


if __name__ == "__main__":
    sys.exit(main())
