"""That every hazard of docs/reliability.md has tests, and the tests of hazards that belong to no other file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_copy

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"


def hazards() -> list[tuple[str, list[str]]]:
    """The page's rows: the hazard, and the tests that it names."""
    table = PAGE.read_text().partition("<!-- hazards:begin -->")[2].partition("<!-- hazards:end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    return [(hazard, re.findall(r"`(\w+)`", tests)) for hazard, _, tests in rows]


def names_of_all_tests() -> set[str]:
    trees = (
        ast.parse(path.read_text())
        for folder in (TESTS, TESTS.parent / "tools" / "tests")
        for path in folder.rglob("test_*.py")
    )
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("hazard, tests", hazards(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_hazard_has_tests(hazard, tests):
    assert tests, f"no test shows what happens with: {hazard}"
    assert all(name.startswith("test_") for name in tests)


def test_every_test_that_the_page_names_is_there():
    assert not set(re.findall(r"`(test_\w*[^\W_])`", PAGE.read_text())) - names_of_all_tests()


def test_rows_many_gib_apart(entry):
    """Address space that is mostly never touched: the offsets, not the counts, need 64 bits."""
    pitch = (2 << 30) + 12345
    far = torch.empty(2 * pitch + 4096, dtype=torch.uint8)
    for way, dst, src in (
        ("to", far.as_strided((3, 1001), (pitch, 1)), torch.arange(3003).remainder(251).to(torch.uint8).view(3, 1001)),
        ("from", torch.zeros(3, 1001, dtype=torch.uint8), far.as_strided((3, 1001), (pitch, 1))),
    ):
        entry([dst], [src])
        assert torch.equal(dst, src), way


def test_storage_of_a_source_freed_between_a_plans_calls():
    """A plan reads a source's storage anew in each call."""
    dst, src = torch.zeros(64), torch.ones(48)
    plan = fused_copy.Plan({"slots": dst})
    plan.replay(src)
    src.untyped_storage().resize_(47 * 4)
    dst.zero_()
    with pytest.raises(RuntimeError, match=r"pair 0 \('slots'\).*storage"):
        plan.replay(src)
    assert not dst.any()


class Recorder(TorchDispatchMode):
    """Every operator that is called within, as a tracer or a profiler sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["function", "plan", "plan bound within"])
def test_plain_tensors_under_a_dispatch_mode(way):
    """The fast door must not slip past a mode: a tracer would record a program without its copies."""
    dst, src, fill = torch.zeros(4), torch.ones(3), [7]
    plan = fused_copy.Plan([dst], fill)
    with Recorder() as recorder:
        if way == "function":
            fused_copy.replay([dst], [src], fill)
        else:
            (plan if way == "plan" else fused_copy.Plan([dst], fill)).replay(src)
    assert recorder.seen == [torch.ops.fused_copy.replay.default]
    assert dst.tolist() == [1, 1, 1, 7]
