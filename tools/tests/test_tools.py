"""The tools that look for faults find them: at a small size, on the CPU."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import release_notes
import torch

import fused_copy

TOOLS = Path(__file__).parents[1]


def run_tool(name: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Not in the clone, whose package has no binary."""
    command = [sys.executable, TOOLS / name, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


# --- soak ---------------------------------------------------------------------------------------------------------


def test_soak(tmp_path):
    small = ("--device", "cpu", "--replays", 24_000, "--every", 100, "--updates", 500)
    run = run_tool("soak.py", *small, "--json", tmp_path / "soak.json", "--commit", "abc", folder=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "soak.json").read_text())
    assert (found["cases"], found["checked"], found["faults"]) == (24_000, 240, 0)
    assert found["ways"] == ["op", "plan with new sources", "casts and fills", "host values, rows and sums"]
    assert found["queued_updates"] >= 500
    assert found["commit"] == "abc"
    assert found["tool_sha256"] == hashlib.sha256((TOOLS / "soak.py").read_bytes()).hexdigest()


def test_soak_makes_sources_anew():
    import soak

    step = soak.make_ways(torch.device("cpu"))[0].steps[0]
    for kept, new in zip(step.sources.values(), step.anew(), strict=True):
        assert torch.equal(kept, new) and kept.data_ptr() != new.data_ptr()


def test_soak_renews_and_rewrites_host_values():
    import soak

    steps = soak.make_ways(torch.device("cpu"))[3].steps
    kinds = {
        type(part)
        for step in steps
        for source in step.made_of.values()
        for part in (source if isinstance(source, tuple) else (source,))
    }
    assert {list, np.ndarray, torch.Tensor, type(None), fused_copy.rows} <= kinds
    assert any("out_loc" not in step.sources for step in steps)
    for kept in (source for step in steps for source in step.made_of.values()):
        before, host = str(kept), []
        new = soak.renewed(kept, host)
        assert str(new) == before
        soak.rewrite(host)
        assert str(kept) == before
        assert kept is None or "-7" in str(new)


def test_soak_notices_host_values_of_the_step_before():
    import soak

    way = soak.make_ways(torch.device("cpu"))[3]
    copy, last = way.copy, way.steps[:1]

    def late(step) -> None:
        copy(last[0])
        last[0] = step

    way.copy = late
    worker = soak.Worker(torch.device("cpu"), [way])
    worker.run(3, every=5, end=math.inf)
    assert worker.faults and "host values" in worker.faults[0]


def test_soak_adds_up_what_updates_must_write():
    import soak

    queue = soak.Updates(torch.device("cpu"))
    queue.run(2 * soak.BATCH, math.inf)
    assert (queue.updates, queue.faults) == (2 * soak.BATCH, [])


@pytest.mark.parametrize("at", range(4))
def test_soak_notices_an_update_that_got_anothers_values(at):
    import soak

    queue, calls = soak.Updates(torch.device("cpu")), []
    update = queue._update

    def mixed_up(*sources):
        calls.append(sources)
        update(*sources[:at], calls[3][at] if len(calls) == 5 else sources[at], *sources[at + 1 :])

    queue._update = mixed_up
    queue.run(2 * soak.BATCH, math.inf)
    assert len(queue.faults) == 1 and len(calls) == soak.BATCH


def test_soak_notices_a_byte_that_is_wrong():
    import soak

    ways = soak.make_ways(torch.device("cpu"))
    right = ways[1].copy

    def wrong(step) -> None:
        right(step)
        ways[1].buffers["page_table"][-1, -1] ^= 1

    ways[1].copy = wrong
    worker = soak.Worker(torch.device("cpu"), ways)
    worker.run(3, every=5, end=math.inf)
    (fault,) = worker.faults
    assert "plan" in fault and "page_table" in fault


def test_soak_notices_a_call_that_raises():
    import soak

    def fail(step) -> None:
        raise RuntimeError("fused_copy: pair 3")

    way = soak.make_ways(torch.device("cpu"))[0]
    way.copy = fail
    worker = soak.Worker(torch.device("cpu"), [way])
    worker.run(3, every=5, end=math.inf)
    assert worker.faults == ["cpu: RuntimeError: fused_copy: pair 3"]


def test_soak_makes_up_for_a_warm_up_that_was_cut_short():
    import soak

    worker = soak.Worker(torch.device("cpu"), soak.make_ways(torch.device("cpu")))
    soak.run_together([worker], 3, 5, end=time.monotonic())
    assert worker.replays == 0
    soak.run_together([worker], 3, 5, end=math.inf)
    assert worker.replays == 3 * 5 * len(worker.ways) and not worker.faults


def test_soak_notices_memory_that_grows(tmp_path, monkeypatch, capsys):
    import soak

    hoard = []
    way = soak.make_ways(torch.device("cpu"))[0]
    copy = way.copy

    def keep(step) -> None:
        copy(step)
        hoard.append(bytearray(b"x" * (1 << 20)))

    way.copy = keep
    monkeypatch.setattr(soak, "make_ways", lambda device: [way])
    arguments = ["soak", "--device", "cpu", "--replays", "400", "--every", "10"]
    arguments += ["--updates", "0", "--json", str(tmp_path / "soak.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert soak.main() == 1
    assert "memory of the host grew" in capsys.readouterr().err
    assert json.loads((tmp_path / "soak.json").read_text())["faults"] == 1


# --- error_cost ---------------------------------------------------------------------------------------------------


def test_error_cost(tmp_path):
    run = run_tool("error_cost.py", "--device", "cpu", "--json", tmp_path / "cost.json", folder=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "cost.json").read_text())["median_us"]
    assert {"torch.ops.fused_copy.replay", "fused_copy.replay", "plan.replay"} <= found.keys()
    assert all(us["copies"] > 0 and us["raises"] > 0 for us in found.values())


# --- record_tests -------------------------------------------------------------------------------------------------

OF_EVERY_OUTCOME = """
    import pytest
    def test_passes(): pass
    def test_passes_too(): pass
    def test_fails(): assert False
    def test_fails_earlier(absent): pass
    @pytest.mark.skip
    def test_skipped(): pass
"""


@pytest.mark.parametrize(
    "chosen, outcomes, faults",
    [
        ([], {"passed": 2, "failed": 1, "error": 1, "skipped": 1}, 2),
        (["-k", "passes"], {"passed": 2, "deselected": 3}, 0),
        (["-k", "absent"], {"deselected": 5}, 1),
    ],
    ids=["all", "some", "none"],
)
def test_a_run_of_tests_is_recorded(tmp_path, chosen, outcomes, faults):
    (tmp_path / "test_x.py").write_text(textwrap.dedent(OF_EVERY_OUTCOME))
    command = [sys.executable, "-m", "pytest", "-p", "record_tests", "--json", "run.json", "test_x.py", *chosen]
    environment = os.environ | {"PYTHONPATH": str(TOOLS), "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = json.loads((tmp_path / "run.json").read_text())
    assert (found["cases"], found["faults"]) == (outcomes.get("passed", 0), faults), run.stdout + run.stderr
    assert found["outcomes"] == outcomes and found["what"].startswith("test_x.py")


# --- release_notes ------------------------------------------------------------------------------------------------

CHANGELOG = """# Changelog

## [Unreleased]

## [0.2.0] - 2027-01-31

### Added

- Something.

## [0.1.0] - 2026-12-24

The first.
"""


def test_release_notes():
    assert release_notes.notes(CHANGELOG, "0.2.0") == "### Added\n\n- Something."
    assert release_notes.notes(CHANGELOG, "0.1.0") == "The first."


@pytest.mark.parametrize("version", ["0.3.0", "0.1", "Unreleased"], ids=["unknown", "cut off", "empty"])
def test_a_release_needs_notes(version):
    with pytest.raises(SystemExit, match=re.escape(f"nothing under '## [{version}]'")):
        release_notes.notes(CHANGELOG, version)


# --- sanitize -----------------------------------------------------------------------------------------------------

REPORTS = """
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void fused_copy::<unnamed>::fused_copy_kernel<(int)64, (bool)0>(fused_copy::Launch<T1>)+0x4b0
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f is out of bounds
=========
========= Uninitialized __global__ memory read of size 8 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4>+0x90
=========     by thread (5,0,0) in block (0,0,0)
=========
========= Program hit cudaErrorInvalidValue (error 1) due to "invalid argument" on CUDA API call to cudaLaunchKernel.
=========
========= ERROR SUMMARY: 3 errors
3 passed in 1.00s
"""


def test_sanitize_tells_whose_fault_it_is():
    import sanitize

    assert sanitize.reports(REPORTS) == (2, 1)
    assert sanitize.reports("========= COMPUTE-SANITIZER\n3 passed\n========= ERROR SUMMARY: 0 errors\n") == (0, 0)


@pytest.mark.parametrize(
    "output, status, wrong",
    [
        ("3 passed in 1 s", 0, False),
        (REPORTS, 9, True),
        ("3 passed in 1 s\n========= Race\n=========     at void at::native::fill+0x1\n", 9, False),
        ("3 passed in 1 s", 9, True),
        ("3 passed in 1 s\n========= Host API memory access error\n========= ERROR SUMMARY: 16 errors\n", 9, True),
        ("2 passed, 1 failed in 1 s", 1, True),
        ("3 skipped in 1 s", 0, True),
        ("", 139, True),
    ],
    ids=["clean", "ours", "torch's", "without a report", "unexplained", "failed test", "no test", "crash"],
)
def test_sanitize_takes_nothing_for_success(tmp_path, output, status, wrong):
    import sanitize

    script = tmp_path / "compute-sanitizer"
    script.write_text(f"#!{sys.executable}\nprint({output!r})\nraise SystemExit({status})\n")
    script.chmod(0o755)
    part = sanitize.Part("caching off", 1, 1)
    _, found, line = sanitize.run(str(script), "memcheck", part, ["gpu/test_x.py::test_y"], 60, "0")
    assert found == wrong
    assert ("0 failed" in line) == ("failed" not in output), "the sanitizer's errors are not failed tests"


def test_sanitize_stops_a_part_that_takes_too_long(tmp_path, monkeypatch):
    import sanitize

    script = tmp_path / "compute-sanitizer"
    script.write_text("#!/bin/sh\nsleep 60 & echo $! > child\nwait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sanitize, "TESTS", tmp_path)
    _, wrong, line = sanitize.run(str(script), "memcheck", sanitize.Part("caching on", 2, 3), ["test"], 0.5, "0")
    assert wrong and "NOT DONE" in line
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "cmdline")
    assert not child.exists() or child.read_bytes() == b"", "the tests outlive the sanitizer"


@pytest.mark.parametrize("seconds, outcomes", [("-1", {"BEGUN"}), ("1", {"DONE", "BEGUN"})])
def test_sanitize_says_what_it_had_no_time_for(monkeypatch, tmp_path, capsys, seconds, outcomes):
    import sanitize

    script = tmp_path / "compute-sanitizer"
    script.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitize, "collect", lambda *_: [f"gpu/test_x.py::test_{k}" for k in range(sanitize.PARTS)])
    found = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["sanitize", "--tool", "memcheck", "--seconds", seconds, "--json", str(found)])
    assert sanitize.main() == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) == 2 * sanitize.PARTS
    assert {line.partition(": NOT ")[2].split()[0] for line in lines} == outcomes
    assert json.loads(found.read_text())["faults"] == len(lines)


@pytest.mark.parametrize(
    "visible, orders",
    [("0", ["0"]), ("0,1", ["0,1", "1,0"]), ("2,GPU-5,7", ["2,GPU-5,7", "GPU-5,7,2", "7,2,GPU-5"])],
)
def test_sanitize_takes_each_gpu_first_once(monkeypatch, visible, orders):
    import sanitize

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert sanitize.gpu_orders() == orders


def test_sanitize_parts_hold_every_test_once():
    import sanitize

    off, on = (sanitize.collect(marks) for _, marks in sanitize.ALLOCATORS.values())
    left_out, every = sanitize.collect(sanitize.LEFT_OUT), sanitize.collect("")
    assert sorted([*off, *on, *left_out]) == sorted(every)

    def names(tests: list[str]) -> set[str]:
        return {test.partition("::")[2].partition("[")[0] for test in tests}

    in_both = {
        "test_gpu_every_layout_at_every_misalignment",
        "test_gpu_large_and_small_pairs_in_one_launch",
        "test_gpu_large_and_small_casts_in_one_launch",
    }
    captured = {
        "test_gpu_several_launches_of_a_call_in_a_graph",
        "test_gpu_capture_among_other_kernels",
        "test_update_changes_dtype_strides_and_kernel",
        "test_more_launches_than_nodes_is_refused_and_leaves_the_graph",
    }
    assert in_both <= names(off) and in_both | captured <= names(on)
    assert {"test_one_kernel_for_the_six_tensors", "test_more_rows_than_32_bits_count"} <= names(left_out)


# --- GPUs that must be there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected, status", [(0, 0), (99, pytest.ExitCode.USAGE_ERROR)])
def test_no_gpu_where_gpus_are_expected(expected, status):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "test_hazards.py"]
    environment = os.environ | {"FUSED_COPY_EXPECT_GPUS": str(expected)}
    run = subprocess.run(command, cwd=TOOLS.parent / "tests", env=environment, capture_output=True, text=True)
    assert run.returncode == status, run.stdout + run.stderr


# --- vLLM's builders ------------------------------------------------------------------------------------------------


def test_vllm_builders_are_profiled_after_all_times(monkeypatch, tmp_path):
    import vllm_builders

    order = []
    prepared = SimpleNamespace(prepare=lambda batch: None)
    monkeypatch.setattr(vllm_builders, "Engine", lambda tree, case, device: prepared)
    monkeypatch.setattr(vllm_builders, "host_us_in_turn", lambda ways: order.append("times") or dict.fromkeys(ways))
    monkeypatch.setattr(vllm_builders, "gpu_work", lambda step: order.append("profiler"))
    found = vllm_builders.compare_times(tmp_path, tmp_path, ["gdn", "ple-spec"], torch.device("cuda"))
    assert order == ["times"] * 6 + ["profiler"] * 6
    assert all(len(of_case["host_us"]) == 9 and len(of_case["launches"]) == 3 for of_case in found.values())
