"""Fuzzes the planner under AddressSanitizer and UndefinedBehaviorSanitizer, and tells how much of it was reached.

usage: python tools/fuzz_planner.py [--seconds 60] [--corpus DIR] [--min-branches 99]

Any tensor metadata must give launches that write exactly what the contract says, or an error: tests/fuzz has the target
and its reference. Needs clang++ with libFuzzer, llvm-profdata and llvm-cov of its version (Debian and Ubuntu: clang-19,
libclang-rt-19-dev, llvm-19); CXX names another one. The corpus begins with random inputs and grows where --corpus keeps
it. An input that fails is left in the current directory as planner-*, with how to run it again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "tests/fuzz/planner_fuzz.cpp"
PLANNER = [
    ROOT / "csrc" / f"{part}.cpp"
    for part in (
        "planner",
        "derived_planner",
        "sources",
        "launch_layout",
        "destinations",
        "checks",
        "overlap",
        "fill_pattern",
        "tensor_view",
    )
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SEEDS = 200
WHAT = "planner fuzzed with ASan and UBSan"
TRIAL = '#include <span>\nextern "C" int LLVMFuzzerTestOneInput(const char*, long) { return 0; }\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="how long to fuzz (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the fuzzer and its first inputs (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="keep the inputs here, and begin with those that are here")
    parser.add_argument("--min-branches", type=float, default=0, metavar="PERCENT", help="fail where fewer were taken")
    record.add_arguments(parser.add_argument)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        clang = find_clang(work)
        if clang is None:
            print("fuzz_planner: found no clang++ with libFuzzer and llvm-cov (set CXX): see --help", file=sys.stderr)
            return 2
        corpus: Path = args.corpus or work / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        if not any(corpus.iterdir()):
            write_seeds(corpus, args.seed)
        begin = time.monotonic()
        inputs = fuzz(clang, work, corpus, args.seconds, args.seed)
        seconds = time.monotonic() - begin
        if inputs is None:
            record.write(args, tool="fuzz_planner", what=WHAT, cases=0, unit="inputs", seconds=seconds, faults=1)
            return 1
        branches, missed = measure_coverage(clang, work, corpus, args.seed)
    taken = 100 * (branches - len(missed)) / branches
    print(f"{branches - len(missed)} of the planner's {branches} branches taken ({taken:.1f} %)")
    for line in missed:
        print(f"  never: {line}")
    record.write(
        args,
        tool="fuzz_planner",
        what=WHAT,
        cases=inputs,
        unit="inputs",
        seconds=seconds,
        faults=0,
        branches=branches,
        branches_taken=branches - len(missed),
    )
    if taken < args.min_branches:
        print(f"fuzz_planner: expected {args.min_branches} % of the branches", file=sys.stderr)
        return 1
    return 0


def find_clang(work: Path) -> str | None:
    """The first compiler that links a fuzz target and whose coverage tools are there."""
    (work / "trial.cpp").write_text(TRIAL)
    names = [os.environ.get("CXX"), *(f"clang++-{version}" for version in range(22, 13, -1)), "clang++"]
    for name in filter(None, names):
        if not all(map(shutil.which, (name, llvm(name, "cov"), llvm(name, "profdata")))):
            continue
        command = [name, "-std=c++20", "-fsanitize=fuzzer,address", str(work / "trial.cpp"), "-o", str(work / "trial")]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return name
    return None


def llvm(clang: str, tool: str) -> str:
    return re.sub(r"clang\+\+(-\d+)?$", rf"llvm-{tool}\1", clang)


def write_seeds(corpus: Path, seed: int) -> None:
    """Random bytes: the target makes plausible tensors of any."""
    rng = random.Random(seed)
    for i in range(SEEDS):
        (corpus / f"seed-{i:03}").write_bytes(rng.randbytes(rng.randrange(256)))


def build(clang: str, work: Path, name: str, target: list[str], planner: list[str], link: list[str]) -> Path:
    """The target, with flags of its own for the planner: what guides the fuzzer is the planner's coverage alone."""
    base = [clang, "-std=c++20", "-O2", "-g", f"-I{ROOT / 'csrc'}"]
    flags = {TARGET: target} | dict.fromkeys(PLANNER, planner)
    objects = [work / f"{name}-{source.stem}.o" for source in flags]
    for source, output in zip(flags, objects, strict=True):
        subprocess.run([*base, *flags[source], "-c", source, "-o", output], check=True)
    subprocess.run([*base, *link, *objects, "-o", work / name], check=True)
    return work / name


def fuzz(clang: str, work: Path, corpus: Path, seconds: int, seed: int) -> int | None:
    """How many inputs were tried. None, and what was found is printed, where one failed."""
    link = ["-fsanitize=fuzzer,address,undefined"]
    fuzzer = build(clang, work, "fuzzer", SANITIZERS, [*SANITIZERS, "-fsanitize=fuzzer-no-link"], link)
    limits = [f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=512", "-timeout=20"]
    command = [str(fuzzer), *limits, "-print_final_stats=1", "-artifact_prefix=planner-", str(corpus)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        print(run.stdout + run.stderr[-8000:])
        kept = Path("planner_fuzz").resolve()
        shutil.copy(fuzzer, kept)
        print(f"fuzz_planner: FOUND A FAULT; again: {kept} planner-...", file=sys.stderr)
        return None
    (inputs,) = re.findall(r"number_of_executed_units:\s*(\d+)", run.stderr)
    print(f"{inputs} inputs in {seconds} s with ASan and UBSan, no fault; the corpus has {len(list(corpus.iterdir()))}")
    return int(inputs)


def measure_coverage(clang: str, work: Path, corpus: Path, seed: int) -> tuple[int, list[str]]:
    """The number of the planner's branches, and those that the corpus and more random inputs never took."""
    counted = ["-fprofile-instr-generate", "-fcoverage-mapping"]
    binary = build(clang, work, "covered", ["-DFUSED_COPY_FUZZ_MAIN"], counted, ["-fprofile-instr-generate"])
    raw, profile = work / "covered.profraw", work / "covered.profdata"
    environment = {**os.environ, "LLVM_PROFILE_FILE": str(raw)}
    command = [str(binary), "10", str(seed), *map(str, sorted(corpus.iterdir()))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    print(f"coverage of: {run.stdout.strip()}")
    subprocess.run([llvm(clang, "profdata"), "merge", raw, "-o", profile], check=True)
    command = [llvm(clang, "cov"), "export", str(binary), f"-instr-profile={profile}", *map(str, PLANNER)]
    exported = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # A branch is a line, three more numbers of its place, how often it was true, how often false. Templates repeat it.
    taken: dict[tuple[str, int, int, bool], int] = {}
    for file in exported["data"][0]["files"]:
        for line, column, _, _, true, false, *_ in file["branches"]:
            for outcome, count in ((True, true), (False, false)):
                branch = (file["filename"], line, column, outcome)
                taken[branch] = taken.get(branch, 0) + count
    sources = {str(path): path.read_text().splitlines() for path in PLANNER}
    missed = [
        f"{Path(file).name}:{line}:{column} {str(outcome).lower()} in `{sources[file][line - 1].strip()}`"
        for (file, line, column, outcome), count in sorted(taken.items())
        if count == 0
    ]
    return len(taken), missed


if __name__ == "__main__":
    sys.exit(main())
