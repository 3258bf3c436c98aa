"""Checks the patches of docs/integrations against the engines' sources.

    python tools/check_integrations.py mini-sglang=PATH sglang=PATH vllm=PATH nano-vllm=PATH torch=PATH

PATH is a checkout, an unpacked sdist or the folder that an unpacked wheel's package lies in. Every patch has to apply
and leave files that compile and lack no name. Where a tool runs the engine's own code over recorded steps, it runs the
published source, the patched one with its flag off and with it on: what they leave in the static buffers has to be the
same after every step.
"""

from __future__ import annotations

import argparse
import builtins
import json
import os
import re
import shutil
import subprocess
import symtable
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATCHES = {path.stem: path for path in sorted((ROOT / "docs" / "integrations").glob("*.patch"))}


@dataclass(frozen=True)
class Comparison:
    """A tool that runs an engine's own code, the variable that turns the patch on, and the options to try."""

    tool: str
    flag: str
    options: tuple[str, ...] = ("",)


COMPARISONS = {
    "mini-sglang": Comparison(
        "minisgl_replay.py",
        "MINISGL_USE_FUSED_COPY",
        (
            "--back-end fa",
            "--back-end fa --page-size 16",
            "--back-end trtllm --page-size 16",
            "--back-end fi",
            "--back-end hybrid",
        ),
    ),
    "sglang": Comparison("sglang_fill.py", "SGLANG_USE_FUSED_COPY"),
    "vllm": Comparison("vllm_builders.py", "VLLM_USE_FUSED_COPY"),
    "nano-vllm": Comparison("nanovllm_decode.py", "NANOVLLM_USE_FUSED_COPY"),
}


class Mismatch(Exception):
    """A patch does not fit its source, or changes what an engine computes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="NAME=PATH", help=f"NAME is one of {', '.join(PATCHES)}")
    parser.add_argument("--steps", type=int, default=300, help="of each comparison (default: %(default)s)")
    args = parser.parse_args(argv)
    for item in args.sources:
        name, _, path = item.partition("=")
        if name not in PATCHES or not path:
            parser.error(f"{item!r}: expected NAME=PATH with one of {', '.join(PATCHES)}")
        try:
            print(f"{name}: {check(name, Path(path), args.steps)}", flush=True)
        except Mismatch as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    return 0


def check(name: str, source: Path, steps: int) -> str:
    """What was found to be right. Raises :class:`Mismatch`."""
    comparison = COMPARISONS.get(name)
    with tempfile.TemporaryDirectory() as folder:
        patched = Path(folder)
        if comparison:
            shutil.copytree(source, patched, ignore=all_but_python, dirs_exist_ok=True)
        files = apply(PATCHES[name], source, patched)
        result = f"the patch applies to {len(files)} files"
        if comparison:
            for options in comparison.options:
                result += "".join(f"\n  {line}" for line in compare(comparison, options, source, patched, steps))
    return result


def all_but_python(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == ".git" or not (name.endswith(".py") or Path(folder, name).is_dir())]


def apply(patch: Path, source: Path, target: Path) -> list[Path]:
    """Puts the files that the patch changes into ``target``, patched; their paths there."""
    named = re.findall(r"^--- (.+)\n\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE)
    # A wheel lacks the folder that the package lies in within its repository.
    strip = 1 if any((source / name).exists() for _, name in named) else 2
    files = [Path(*Path(name).parts[strip - 1 :]) for _, name in named]
    new = {file for file, (old, _) in zip(files, named, strict=True) if old == "/dev/null"}
    for file in set(files) - new:
        if not (source / file).exists():
            raise Mismatch(f"{source} has no {file}")
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / file, target / file)
    command = ["git", "apply", f"-p{strip}", "--whitespace=nowarn", str(patch)]
    # git would look for a repository around the folder.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(target.parent)}
    applied = subprocess.run(command, cwd=target, env=environment, capture_output=True, text=True)
    if applied.returncode:
        raise Mismatch(f"{patch.name} does not apply to {source}:\n{applied.stderr}")
    for file in files:
        was, now = "" if file in new else (source / file).read_text(), (target / file).read_text()
        if now == was:
            raise Mismatch(f"{patch.name} left {file} as it was")
        compile(now, file, "exec")
        if lacking := undefined_names(now) - undefined_names(was):
            raise Mismatch(f"{patch.name} left {file} without {', '.join(sorted(lacking))}")
    return [target / file for file in files]


def undefined_names(code: str) -> set[str]:
    """The globals that the code reads and does not define, among them what star imports bring."""
    read: set[str] = set()
    defined = set(dir(builtins))
    tables = [symtable.symtable(code, "file", "exec")]
    for table in tables:
        tables += table.get_children()
        for symbol in filter(symtable.Symbol.is_global, table.get_symbols()):
            (defined if symbol.is_assigned() or symbol.is_imported() else read).add(symbol.get_name())
    return read - defined


def compare(comparison: Comparison, options: str, source: Path, patched: Path, steps: int) -> list[str]:
    """What a step of each case calls, if all three ways leave the same bytes. Raises :class:`Mismatch`."""
    published = run(comparison, options, source, steps, fused=False)
    ways = {fused: run(comparison, options, patched, steps, fused) for fused in (False, True)}
    lines = []
    for case, was in published.items():
        if len(set(was["digests"])) != len(was["digests"]):
            raise Mismatch(f"{case}: the recorded steps are not all different")
        for fused, results in ways.items():
            way, now = f"{case}, {comparison.flag}={fused:d}", results[case]
            for step, (expected, found) in enumerate(zip(was["digests"], now["digests"], strict=True)):
                if expected != found:
                    raise Mismatch(f"{way}: step {step} filled other bytes")
            if ("fused_copy.replay" in now["ops"]) != fused:
                raise Mismatch(f"{way}: a step called {now['ops']}")
        calls = f"{was['ops']} become {ways[True][case]['ops']}"
        lines.append(f"{case}: {len(was['digests'])} steps leave the same bytes; {calls}")
    return lines


def run(comparison: Comparison, options: str, tree: Path, steps: int, fused: bool) -> dict[str, Any]:
    """What the tool prints of each case."""
    command = [
        sys.executable,
        str(ROOT / "tools" / comparison.tool),
        str(tree),
        *options.split(),
        "--steps",
        str(steps),
    ]
    environment = os.environ | {comparison.flag: str(int(fused))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Mismatch(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return {options or "a step": result} if "digests" in result else result


if __name__ == "__main__":
    sys.exit(main())
