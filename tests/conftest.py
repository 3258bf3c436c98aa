from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest
import torch
from entries import OP, PYTHON, REFERENCE, Entry
from hypothesis import settings

import fused_copy
from fused_copy import backends

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("long", deadline=None, max_examples=20_000)  # pytest --hypothesis-profile=long
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_configure(config: pytest.Config) -> None:
    # Tests that need GPUs are skipped without them, which a run that is there for them must not take for success.
    expected = int(os.environ.get("FUSED_COPY_EXPECT_GPUS", "0"))
    if torch.cuda.device_count() < expected:
        raise pytest.UsageError(f"FUSED_COPY_EXPECT_GPUS={expected}, but torch sees {torch.cuda.device_count()}")
    config.addinivalue_line(
        "markers", "blocked: holds a stream back; a sanitizer, which may serialize launches, fails it"
    )
    config.addinivalue_line("markers", "not_sanitized(why): left out by tools/sanitize.py")
    config.addinivalue_line("markers", "capture: records a CUDA graph (impossible with the caching allocator off)")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skipped tests count by their reason alone: without a GPU the summary has one line, not one for each test."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        report.longrepr = ("tests", None, report.longrepr[2])
    return report


@pytest.fixture(scope="session", params=[OP, PYTHON], ids=lambda e: e.name)
def entry(request: pytest.FixtureRequest) -> Entry:
    return request.param


@pytest.fixture(scope="session", params=[OP, PYTHON, REFERENCE], ids=lambda e: e.name)
def any_entry(request: pytest.FixtureRequest) -> Entry:
    """Where the operators of torch that the reference is made of must show the same."""
    return request.param


@pytest.fixture
def fallback() -> Iterator[None]:
    """The back end for loops that must not stop, with nothing warned of yet."""
    backends._warned.clear()
    with fused_copy.backend("fallback"):
        yield
    backends._warned.clear()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
