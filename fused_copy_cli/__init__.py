"""The command line: ``fused-copy``.

It lies beside the package, whose import takes torch and the binary, to say what is wrong where these do not load.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fused_copy"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    # Of a torch without NumPy, which the commands do not use.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:  # closed by whoever began this process
                sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads on, as of `| head`. Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    except ImportError as error:
        if error.name != "fused_copy":
            raise
        print(error, file=sys.stderr)
        return 1


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="fused-copy",
        description="Without a command: fill the static buffers of a decode loop's CUDA graphs with one launch per "
        "step, check every step against torch's operators, and print what each costs on a GPU.",
    )
    parser.add_argument("--version", action="version", version=f"fused-copy {version()}")
    parser.add_argument("--steps", type=_positive, default=500, help="decode steps to run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the decode loop (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--json", dest="results", type=_writable, metavar="FILE", help="write the results to this file")
    parser.set_defaults(run=_demo)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="{bench,env}")
    bench = commands.add_parser(
        "bench",
        help="time the ways to fill static buffers on this machine",
        description="Check the ways to fill a decode step's static buffers against copy_, then time them side by side.",
    )
    bench.add_argument("--quick", action="store_true", help="one point, few samples: a check, not a measurement")
    bench.add_argument("--json", type=_writable, metavar="FILE", help="write the results to this file")
    bench.add_argument("--plot", type=_picture, metavar="FILE", help="draw the times into this file, such as bench.svg")
    bench.set_defaults(run=_bench)
    env = commands.add_parser(
        "env",
        help="say what is installed here, for a bug report, and what is wrong with it",
        description="Print versions, GPUs, driver and what the installed binary supports; exit 1 if they do not fit.",
    )
    env.add_argument("--json", action="store_true", help="print it as JSON")
    env.set_defaults(run=_env)
    args = parser.parse_args(argv)
    of_demo = ("steps", "seed", "device", "results")
    if args.command and any(getattr(args, name) != parser.get_default(name) for name in of_demo):
        parser.error(f"options before {args.command} are for the run without a command: put its own behind it")
    status: int = args.run(args)
    return status


def version() -> str:
    """Of the package beside this one, which need not be importable."""
    found: str = runpy.run_path(str(PACKAGE / "_version.py"))["__version__"]
    return found


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _writable(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no directory {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: cannot be written")
    return path


def _picture(text: str) -> Path:
    path = _writable(text)
    if path.suffix not in (".pdf", ".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text}: expected a .pdf, .png or .svg file")
    return path


def _demo(args: argparse.Namespace) -> int:
    default = _default_device()  # says so where the build does not fit, whatever was asked for
    import torch

    from fused_copy import demo

    if args.device == "cuda" and default != "cuda":
        if not torch.cuda.is_available():
            print("fused-copy: --device cuda: this torch sees no GPU: `fused-copy env` says more", file=sys.stderr)
        return 2
    return demo.run(steps=args.steps, seed=args.seed, device=args.device or default, json=args.results)


def _default_device() -> str:
    from fused_copy._library import _C  # before torch: says what is wrong with that

    has_gpu_code: bool = _C.has_gpu_code
    import torch

    from fused_copy_cli.environment import NO_GPU_CODE

    sees_gpu = torch.cuda.is_available()
    if sees_gpu and not has_gpu_code:
        print(f"fused-copy: {NO_GPU_CODE}", file=sys.stderr)
    return "cuda" if sees_gpu and has_gpu_code else "cpu"


def _bench(args: argparse.Namespace) -> int:
    needed = ["rich", "matplotlib"] if args.plot else ["rich"]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        print(f"fused-copy bench needs {' and '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    from fused_copy import bench

    return bench.run(device=_default_device(), quick=args.quick, json=args.json, plot=args.plot)


def _env(args: argparse.Namespace) -> int:
    from fused_copy_cli import environment

    return environment.run(as_json=args.json)
