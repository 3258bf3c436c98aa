"""`reference` is a drop-in for `fused`: the same bytes and the same errors, from torch's own operators."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import test_errors
import test_replay
import torch
from arena import Arena, encoded
from cases import BYTE_DTYPES
from entries import REFERENCE, Entry
from hypothesis import given
from hypothesis import strategies as st
from mixes import exact_fills, inexact_fills, mixed_lists, name

import fused_copy
from fused_copy import backends

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")


@pytest.fixture(scope="session")
def entry() -> Entry:
    """For the tests that are taken over below."""
    return REFERENCE


# Every refusal and every plain copy once more: the same tests, with the entry from above. Not the byte arenas of odd
# addresses, where torch's own operators may crash; not the threads, as the choice is the whole process's.
AGAIN = {
    key: test
    for module in (test_errors, test_replay)
    for key, test in vars(module).items()
    if key.startswith("test_") and "Arena" not in test.__code__.co_names and not hasattr(test, "hypothesis")
}
AGAIN.pop("test_threads_with_tensors_of_their_own", None)
globals().update(AGAIN)


@pytest.fixture(autouse=True)
def _fused_again():
    yield
    assert backends.current == "fused", "a test left the other one on"


# --- choosing -----------------------------------------------------------------------------------------------------


def copies(call) -> bool:
    """Whether the call went through the reference."""
    with mock.patch.object(backends, "copy_each", wraps=backends.copy_each) as copy_each:
        call()
    return copy_each.called


def replay() -> None:
    dst = torch.zeros(3)
    fused_copy.replay([dst], [torch.ones(2)], [5])
    assert dst.tolist() == [1, 1, 5]


def test_fused_unless_told():
    assert not copies(replay)


def test_for_a_block():
    with fused_copy.backend("reference"):
        assert copies(replay)
        with fused_copy.backend("fused"):
            assert not copies(replay)
        assert copies(replay)
    assert not copies(replay)


def test_for_a_block_that_raises():
    with pytest.raises(RuntimeError, match="pair 0"), fused_copy.backend("reference"):
        fused_copy.replay([torch.zeros(2)], [torch.ones(3)])
    assert not copies(replay)


def test_from_here_on():
    fused_copy.backend("reference")
    try:
        assert copies(replay)
    finally:
        fused_copy.backend("fused")
    assert not copies(replay)


@pytest.mark.parametrize("name", ["", "Reference", "eager", None])
def test_unknown_name(name):
    with pytest.raises(ValueError, match="expected one of"):
        fused_copy.backend(name)
    assert backends.current == "fused"


def test_the_op_is_always_fused():
    with fused_copy.backend("reference"):
        assert not copies(lambda: torch.ops.fused_copy.replay([torch.zeros(2)], [torch.ones(2)]))


def test_the_reference_runs_torchs_operators():
    """What an A/B run compares: one copy_ for each pair, and the fills."""
    dst, src = [torch.zeros(4), torch.zeros(3, 3)], [torch.ones(2), torch.ones(2, 2)]
    with torch.profiler.profile() as profiler, fused_copy.backend("reference"):
        fused_copy.replay(dst, src, [None, 1])
    counts = {e.key: e.count for e in profiler.key_averages()}
    assert counts["aten::copy_"] == 2
    assert counts["aten::fill_"] == 2
    assert "fused_copy::replay" not in counts


IN_A_PROCESS = """
    import fused_copy, torch
    from fused_copy import backends
    dst = torch.zeros(3)
    fused_copy.replay([dst], [torch.ones(2)], [5])
    assert dst.tolist() == [1, 1, 5]
    print(backends.current)
"""


def test_environment(tmp_path):
    run = with_environment(tmp_path, "reference")
    assert run.stdout.strip() == "reference", run.stderr


def test_unknown_name_in_the_environment(tmp_path):
    run = with_environment(tmp_path, "referenz")
    assert run.returncode != 0
    assert "ValueError" in run.stderr and "referenz" in run.stderr


def with_environment(folder: Path, value: str) -> subprocess.CompletedProcess[str]:
    """Away from the clone, because -c imports from where it runs."""
    env = os.environ | {"FUSED_COPY_BACKEND": value}
    command = [sys.executable, "-c", textwrap.dedent(IN_A_PROCESS)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


# --- the same bytes, the same errors ------------------------------------------------------------------------------


@given(pairs=mixed_lists(for_torch=True), seed=st.integers(0, 99))
def test_any_mix_gives_the_same_bytes(pairs, seed):
    """Whole arenas, compared with each other and not with the oracle, which would forgive both the same mistake."""
    fused, reference = (Arena(pairs, "cpu", seed=seed, source_bytes=range(256)) for _ in range(2))
    fused_copy.replay(fused.dst, fused.src, fused.fill)
    REFERENCE(reference.dst, reference.src, reference.fill)
    assert all(torch.equal(a, b) for a, b in zip(fused.found(), reference.found(), strict=True))


@pytest.mark.parametrize("dtype", [pytest.param(d, id=name(d)) for d in BYTE_DTYPES])
def test_every_number_gives_the_same_bytes(dtype):
    for number in exact_fills(dtype):
        a, b = (torch.zeros(5 * dtype.itemsize, dtype=torch.uint8).view(dtype) for _ in range(2))
        fused_copy.replay([a], [a[:0].clone()], [number])
        REFERENCE([b], [b[:0].clone()], [number])
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), number
        assert torch.equal(a.view(torch.uint8), encoded(number, dtype).repeat(5)), number


WRONG = {
    "lengths": lambda: ([torch.zeros(3)], []),
    "rank": lambda: ([torch.zeros(3)], [torch.ones(1, 3)]),
    "size": lambda: ([torch.zeros(3)], [torch.ones(4)]),
    "dtypes": lambda: ([torch.zeros(3)], [torch.ones(3, dtype=torch.complex64)]),
    "meta": lambda: ([torch.zeros(3)], [torch.ones(3, device="meta")]),
    "no tensor": lambda: ([torch.zeros(3)], [None]),
    "no list": lambda: (torch.zeros(3), 5),
    "requires grad": lambda: ([torch.zeros(3, requires_grad=True)], [torch.ones(3)]),
    "overlap": lambda: (lambda t: ([t[:4]], [t[2:5]]))(torch.zeros(8)),
    "sparse": lambda: ([torch.zeros(3, 3)], [torch.eye(3).to_sparse()]),
    "fills": lambda: ([torch.zeros(3)], [torch.ones(3)], [1, 2]),
    "number": lambda: ([torch.zeros(3)], [torch.ones(3)], [0.1]),
    "no number": lambda: ([torch.zeros(3)], [torch.ones(3)], ["one"]),
    "names": lambda: ({"a": torch.zeros(3)}, {"b": torch.ones(3)}),
    "named overlap": lambda: (lambda t: ({"a": t, "b": t}, {"a": torch.ones(2), "b": torch.ones(2)}))(torch.zeros(3)),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_same_error_and_the_same_text(case):
    told = []
    for call in (fused_copy.replay, REFERENCE, fused_copy.explain):
        with pytest.raises((RuntimeError, TypeError, KeyError)) as caught:
            call(*WRONG[case]())
        told.append((caught.type, str(caught.value)))
    plain = case not in ("meta", "sparse")  # explain has no dispatcher to hand these to
    assert len(set(told if plain else told[:2])) == 1, told


@pytest.mark.parametrize("dtype", BYTE_DTYPES, ids=name)
def test_the_same_text_for_every_number(dtype):
    for number in inexact_fills(dtype):
        dst = torch.zeros(5 * dtype.itemsize, dtype=torch.uint8).view(dtype)
        texts = set()
        for call in (fused_copy.replay, REFERENCE, fused_copy.explain):
            with pytest.raises(RuntimeError) as caught:
                call([dst], [dst[:0].clone()], [number])
            texts.add(str(caught.value))
        assert len(texts) == 1, texts
