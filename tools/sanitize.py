"""Runs the GPU tests under NVIDIA's compute-sanitizer, in parts that each stay below ten minutes, several at once.

usage: python tools/sanitize.py [--tool memcheck|initcheck|synccheck] [--part 3/8] [--tests gpu] [--json FILE]

Needs a GPU, compute-sanitizer (part of the CUDA toolkit) and the installed package. Without --tool all three run,
without --part all parts, a result line for each. Exits with 1 where a kernel of this package was at fault, a test
failed, a part took too long, or ran no test.

Most parts run with torch's caching allocator off, so that an access beyond a tensor leaves its allocation and is seen.
A capture needs that allocator, so tests marked ``capture`` are parts of their own with it on. Left out are:

- tests marked ``blocked``: they time a stream that is held back, and the sanitizer may serialize launches;
- tests marked ``not_sanitized``, whose marks say why: they count kernels by torch's profiler, which cannot run beside
  the sanitizer; move several GiB, run thousands of steps or have inductor compile, which takes longer than all others
  together; run in processes of their own, which are not followed; or look at the GPU's free memory, which those beside
  them change;
- reports about other kernels than this package's: they are counted, but torch's are torch's.
"""

from __future__ import annotations

import argparse
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import record
import torch

TESTS = Path(__file__).resolve().parents[1] / "tests"
TOOLS = ("memcheck", "initcheck", "synccheck")
PARTS = 8
LIMIT = 590  # seconds
SHOWN = 6000  # characters at the end of what a part printed that went wrong
FAULT = 9  # compute-sanitizer's exit status where it found something

# As python -P -m pytest, which Python 3.10 does not know.
PYTEST = [sys.executable, "-c", "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main(sys.argv[1:]))"]
LEFT_OUT = "blocked or not_sanitized"
ALLOCATORS = {  # name: environment, marks of the tests
    "caching off": ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, f"not capture and not ({LEFT_OUT})"),
    "caching on": ({}, f"capture and not ({LEFT_OUT})"),
}


@dataclass(frozen=True)
class Part:
    """Some of the tests with one of the allocators: every ``of``-th, beginning with the ``index``-th, from 1."""

    allocator: str
    index: int
    of: int


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tool", choices=TOOLS, action="append", help="default: all")
    parser.add_argument("--part", metavar="K/N", help=f"the K-th of N parts alone (default: all of {PARTS})")
    parser.add_argument("--tests", default="gpu", help="the folder or file of tests/ (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="on each GPU at once (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a part (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="for all parts; what is not done by then is a fault"
    )
    record.add_arguments(parser.add_argument)
    args = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print("sanitize: found no compute-sanitizer: put the CUDA toolkit's bin folder on PATH", file=sys.stderr)
        return 2
    if args.part is None:
        chosen = [(k, PARTS) for k in range(1, PARTS + 1)]
    elif match := re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", args.part):
        chosen = [(int(match[1]), int(match[2]))]
    else:
        parser.error(f"--part {args.part}: expected K/N, such as 3/{PARTS}")
    lists = {name: collect(marks, args.tests) for name, (_, marks) in ALLOCATORS.items()}
    jobs = [
        (tool, Part(allocator, index, of), tests[index - 1 :: of])
        for tool in args.tool or TOOLS
        for index, of in chosen
        for allocator, tests in lists.items()
    ]
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for order in gpu_orders() * args.processes:
        free.put(order)

    begin = time.monotonic()

    def run_on_a_free_gpu(job: tuple[str, Part, list[str]]) -> tuple[int, bool, str]:
        order = free.get()
        try:
            left = begin + args.seconds - time.monotonic()
            if left <= 0:
                outcome = 0, True, f"{heading(*job[:2])}: NOT BEGUN after {args.seconds:.0f} s"
            else:
                outcome = run(sanitizer, *job, min(args.limit, left), order)
            print(outcome[2], flush=True)
            return outcome
        finally:
            free.put(order)

    with ThreadPoolExecutor(free.qsize()) as pool:
        outcomes = list(pool.map(run_on_a_free_gpu, jobs))
    faults = sum(problem for _, problem, _ in outcomes)
    record.write(
        args,
        tool="sanitize",
        what=f"tests of {args.tests} under compute-sanitizer {', '.join(args.tool or TOOLS)}",
        cases=sum(passed for passed, _, _ in outcomes),
        unit="tests",
        seconds=time.monotonic() - begin,
        faults=faults,
        parts=[line for _, _, line in outcomes],
    )
    return 1 if faults else 0


def gpu_orders() -> list[str]:
    """CUDA_VISIBLE_DEVICES for as many processes as there are GPUs: each sees them all, and a different one first."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = named.split(",")
    return [",".join(gpus[k:] + gpus[:k]) for k in range(len(gpus))]


def collect(marks: str, place: str = "gpu") -> list[str]:
    """The tests there with these marks, in the order in which pytest has them."""
    command = [*PYTEST, "--collect-only", "-q", "-m", marks, place]
    found = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    # Named from the folder above, where pytest finds its settings.
    tests = [line.removeprefix("tests/") for line in found.stdout.splitlines() if "::" in line]
    if found.returncode != 0 or not tests:
        sys.exit(f"sanitize: pytest collects nothing:\n{found.stdout}{found.stderr}")
    return tests


def heading(tool: str, part: Part) -> str:
    return f"{tool}, {part.allocator}, part {part.index}/{part.of}"


def run(sanitizer: str, tool: str, part: Part, tests: list[str], limit: float, gpus: str) -> tuple[int, bool, str]:
    """How many tests passed, whether anything is wrong, and the line that says so."""
    head = heading(tool, part)
    if not tests:
        return 0, False, f"{head}: no test"
    check = [sanitizer, "--tool", tool, "--error-exitcode", str(FAULT), "--target-processes", "application-only"]
    # Its backtraces of the host keep Python's frames and what they name, so that a graph would outlive its last user.
    check += ["--show-backtrace", "device"]
    check += ["--max-connections", "1000"]  # ports, of which each sanitizer on the machine takes one
    # By default it waits ten seconds for the first use of CUDA, and after that the tests never end
    # (github.com/proteneer/timemachine/pull/668). Many imports of torch at once take longer.
    check += ["--launch-timeout", f"{math.ceil(limit)}"]
    # Where a test hangs is printed. No values in tracebacks: torch's printing of a misaligned tensor is itself an
    # illegal access.
    command = [*check, *PYTEST, "-v", "--tb=line", "-o", f"faulthandler_timeout={limit / 4}", *tests]
    environment = {**os.environ, **ALLOCATORS[part.allocator][0], "CI": "1", "CUDA_VISIBLE_DEVICES": gpus}
    begin = time.monotonic()
    # A group of its own, as the tests would outlive the sanitizer that is killed.
    process = subprocess.Popen(
        command,
        cwd=TESTS,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        print(output[-SHOWN:])
        return 0, True, f"{head}: NOT DONE after {limit:.0f} s: give more time or take more parts"
    seconds = time.monotonic() - begin
    # The sanitizer's own count, "ERROR SUMMARY: 2 errors", is not pytest's.
    passed, failed = (
        sum(map(int, re.findall(rf"(?<!SUMMARY: )\b(\d+) {word}", output))) for word in ("passed", "(?:failed|error)")
    )
    ours, others = reports(output)
    unexplained = process.returncode not in (0, FAULT) or (process.returncode == FAULT and not others)
    wrong = bool(ours or failed or not passed or unexplained)
    counts = f"{passed} passed, {failed} failed, {ours} faults in this package's kernels and calls, {others} in others"
    line = f"{head}: {counts}, {seconds:.0f} s"
    if wrong:
        print(*re.findall(r"^========= \S.*", output, flags=re.MULTILINE), output[-SHOWN:], sep="\n")
        line += f", EXIT STATUS {process.returncode}"
    return passed, wrong, line


def reports(output: str) -> tuple[int, int]:
    """How many of the sanitizer's reports are about this package's kernels, and how many about others'.

    A report is a line that names a fault, and then lines with two more blanks, the first of which says where. One about
    a call of CUDA's API says nowhere whose it was, so it counts as this package's.
    """
    ours = others = 0
    for report in re.split(r"^========= (?=\S)", output, flags=re.MULTILINE)[1:]:
        place = re.search(r"^=========\s+at (.*)", report, flags=re.MULTILINE)
        if place is None and not report.startswith("Program hit"):
            continue  # the banner, the summary
        if place is None or "fused_copy" in place[1]:
            ours += 1
        else:
            others += 1
    return ours, others


if __name__ == "__main__":
    sys.exit(main())
