"""A pytest plugin that writes what a run of tests came to, in the form of the other records.

usage: PYTHONPATH=tools pytest -p record_tests --json FILE [--commit SHA] ...
"""

from __future__ import annotations

import argparse
import os
import time

import pytest
import record
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    record.add_arguments(parser.getgroup("record").addoption)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGIN] = time.monotonic()


BEGIN = pytest.StashKey[float]()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    outcomes = {name: len(reports) for name, reports in terminalreporter.stats.items() if name}
    places = ", ".join(os.path.relpath(place, config.rootpath) for place in config.args)
    chosen = f", those of {config.option.keyword!r}" if config.option.keyword else ""
    unfinished = exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    record.write(
        argparse.Namespace(json=config.option.json, commit=config.option.commit),
        tool="record_tests",
        what=f"{places}{chosen}, beside torch {torch.__version__}",
        cases=outcomes.get("passed", 0),
        unit="tests passed",
        seconds=time.monotonic() - config.stash[BEGIN],
        faults=outcomes.get("failed", 0) + outcomes.get("error", 0) + unfinished,
        outcomes=outcomes,
    )
