"""Checks the patches of docs/integrations against the engines' sources.

    python tools/check_integrations.py mini-sglang=PATH sglang=PATH vllm=PATH nano-vllm=PATH torch=PATH

PATH is a checkout, an unpacked sdist or the folder that an unpacked wheel's package lies in. Every patch has to apply
and leave files that compile and lack no name. mini-sglang's graph runner then fills its buffers over a recorded
sequence of batches, as published, patched with the flag off and patched with it on: all static buffers and outputs have
to be the same after every replay.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATCHES = {path.stem: path for path in sorted((ROOT / "docs" / "integrations").glob("*.patch"))}
MINISGL_BACK_ENDS = ("fa", "trtllm", "fi", "hybrid")


class Mismatch(Exception):
    """A patch does not fit its source, or changes what an engine computes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="NAME=PATH", help=f"NAME is one of {', '.join(PATCHES)}")
    parser.add_argument("--steps", type=int, default=300, help="mini-sglang's replays (default: %(default)s)")
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
    with tempfile.TemporaryDirectory() as folder:
        patched = Path(folder)
        if name == "mini-sglang":
            shutil.copytree(source / "python", patched / "python")
        files = apply(PATCHES[name], source, patched)
        result = f"the patch applies to {len(files)} files"
        if name == "mini-sglang":
            result += "".join(
                f"\n  {back_end}: {compare(source, patched, back_end, steps)}" for back_end in MINISGL_BACK_ENDS
            )
    return result


def apply(patch: Path, source: Path, target: Path) -> list[Path]:
    """Puts the files that the patch changes into ``target``, patched; their paths there."""
    named = re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE)
    # A wheel lacks the folder that the package lies in within its repository.
    strip = 1 if (source / named[0]).exists() else 2
    files = [Path(*Path(name).parts[strip - 1 :]) for name in named]
    for file in files:
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
        was, now = (source / file).read_text(), (target / file).read_text()
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


def compare(source: Path, patched: Path, back_end: str, steps: int) -> str:
    """What mini-sglang's replays call, if all three ways fill the same. Raises :class:`Mismatch`."""
    published = minisgl_replays(source, back_end, steps, fused=False)
    if len(set(published["digests"])) != steps:
        raise Mismatch("the recorded steps are not all different")
    for fused in (False, True):
        other = minisgl_replays(patched, back_end, steps, fused)
        for step, (was, now) in enumerate(zip(published["digests"], other["digests"], strict=True)):
            if was != now:
                raise Mismatch(f"{back_end}, MINISGL_USE_FUSED_COPY={fused:d}: step {step} filled other bytes")
        if ("fused_copy.replay" in other["ops"]) != fused:
            raise Mismatch(f"{back_end}, MINISGL_USE_FUSED_COPY={fused:d}: the fill called {other['ops']}")
    replays = f"{steps} replays of {len(published['batches'])} graphs fill the same bytes"
    return f"{replays}; {published['ops']} become {other['ops']}"


def minisgl_replays(tree: Path, back_end: str, steps: int, fused: bool) -> dict[str, Any]:
    """What tools/minisgl_replay.py prints."""
    command = [sys.executable, str(ROOT / "tools" / "minisgl_replay.py"), str(tree)]
    done = subprocess.run(
        [*command, "--back-end", back_end, "--steps", str(steps)],
        env=os.environ | {"MINISGL_USE_FUSED_COPY": str(int(fused))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Mismatch(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    sys.exit(main())
