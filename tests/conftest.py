from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings

import fused_copy

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "blocked: holds a stream back; a sanitizer, which may serialize launches, fails it"
    )
    config.addinivalue_line("markers", "capture: records a CUDA graph (impossible with the caching allocator off)")


@dataclass(frozen=True)
class Entry:
    """One way in. Both promise the same; only an error's text may be lost on one of them."""

    name: str
    replay: Callable[..., None]
    tells_why: bool

    def __call__(self, dst, src, *args, **kwargs) -> None:
        return self.replay(dst, src, *args, **kwargs)


# torch before 2.13 loses the text of an error that crosses the stable ABI, so there the raw op shows the type alone.
OP = Entry("op", torch.ops.fused_copy.replay, tells_why=TORCH >= (2, 13))
PYTHON = Entry("python", fused_copy.replay, tells_why=True)


def through_reference(dst, src, fill=None) -> None:
    with fused_copy.backend("reference"):
        fused_copy.replay(dst, src, fill)


REFERENCE = Entry("reference", through_reference, tells_why=True)


@pytest.fixture(scope="session", params=[OP, PYTHON], ids=lambda e: e.name)
def entry(request: pytest.FixtureRequest) -> Entry:
    return request.param


@pytest.fixture(scope="session", params=[OP, PYTHON, REFERENCE], ids=lambda e: e.name)
def any_entry(request: pytest.FixtureRequest) -> Entry:
    """Where the operators of torch that the reference is made of must show the same."""
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
