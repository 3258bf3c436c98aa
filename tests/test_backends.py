"""`reference` is a drop-in for `fused`: the same bytes and the same errors, from torch's own operators."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
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
    "no tensor": lambda: ([torch.zeros(3)], ["abc"]),
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


# --- fallback -----------------------------------------------------------------------------------------------------


def shifted():
    buf = torch.arange(8.0)
    return [buf[1:]], [buf[:-1]], [[0, 0, 1, 2, 3, 4, 5, 6]], buf


def transposed_onto_itself():
    buf = torch.arange(9.0).view(3, 3)
    return [buf], [buf.T], [[[0, 3, 6], [1, 4, 7], [2, 5, 8]]], buf


def the_same_destination_twice():
    buf = torch.zeros(4)
    return [buf, buf[:2]], [torch.ones(3), torch.full((2,), 5.0)], [[5, 5, 1, 0]], buf


def a_source_that_an_earlier_pair_writes():
    buf, out = torch.zeros(3), torch.zeros(3)
    return [buf, out], [torch.ones(3), buf], [[1, 1, 1]], out


def other_dtypes():
    dst = torch.zeros(3)
    return [dst], [torch.tensor([1.5, -2.0]).to(torch.float8_e5m2)], [[1.5, -2, 0]], dst


def five_dimensions():
    dst = torch.zeros(3**5).as_strided((2,) * 5, (81, 27, 9, 3, 1))
    src = torch.arange(3.0**5).as_strided((2,) * 5, (1, 3, 9, 27, 81))
    return [dst], [src], [src.tolist()], dst


def conjugate():
    dst, src = torch.zeros(2, dtype=torch.complex64), torch.tensor([1 + 2j, 3 - 1j]).conj()
    return [dst], [src], [[1 - 2j, 3 + 1j]], dst


def negative_destination():
    base = torch.zeros(3, dtype=torch.complex64)
    dst = base.conj().imag
    return [dst], [torch.tensor([4.0, 5.0])], [[4, 5, 0]], dst


FALLS_BACK = [
    shifted,
    transposed_onto_itself,
    the_same_destination_twice,
    a_source_that_an_earlier_pair_writes,
    other_dtypes,
    five_dimensions,
    conjugate,
    negative_destination,
]


@pytest.mark.parametrize("way", ["function", "plan"])
@pytest.mark.parametrize("case", FALLS_BACK, ids=lambda case: case.__name__)
def test_torchs_operators_do_what_one_launch_cannot(fallback, case, way):
    dst, src, (expected,), shown = case()

    def call():
        if way == "plan":
            fused_copy.Plan({f"name{i}": d for i, d in enumerate(dst)}).replay(*src)
        else:
            fused_copy.replay(dst, src)

    before = fused_copy.fallbacks()
    with pytest.warns(RuntimeWarning, match=r"pair \d.*Torch's operators copy instead") as caught:
        call()
    assert caught[0].filename == __file__, "the warning does not show where the call was"
    assert shown.tolist() == expected
    assert fused_copy.fallbacks() == before + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
    assert fused_copy.fallbacks() == before + 2
    with fused_copy.backend("fused"), pytest.raises(RuntimeError, match=r"pair \d"):
        call()


def test_what_one_launch_can_is_one_launch(fallback):
    before = fused_copy.fallbacks()
    with mock.patch.object(backends, "copy_each", wraps=backends.copy_each) as copy_each:
        replay()
        fused_copy.Plan([torch.zeros(3)]).replay(torch.ones(2))
    assert not copy_each.called
    assert fused_copy.fallbacks() == before


def test_fills_where_torchs_operators_copy(fallback):
    buf, other = torch.arange(6.0), torch.zeros(4, dtype=torch.int64)
    with pytest.warns(RuntimeWarning):
        fused_copy.replay([buf, other], [buf[1:3], torch.ones(2, dtype=torch.int32)], [-1, 7])
    assert buf.tolist() == [1, 2, -1, -1, -1, -1]
    assert other.tolist() == [1, 1, 7, 7]


@pytest.mark.parametrize("first", ["fallback", "wrong"])
def test_what_is_wrong_for_both_raises_and_writes_nothing(fallback, first):
    """Wherever it stands: what torch's operators could do comes after all other checks."""
    buf = torch.arange(8.0)
    pairs = [(buf[1:], buf[:-1]), (torch.zeros(2), torch.ones(3))]
    if first == "wrong":
        pairs.reverse()
    before = fused_copy.fallbacks()
    with pytest.raises(RuntimeError, match="larger in dimension 0"):
        fused_copy.replay(*zip(*pairs, strict=True))
    with pytest.raises(RuntimeError, match="cannot be held exactly"):
        fused_copy.replay([buf[1:], torch.zeros(2)], [buf[:-1], torch.ones(1)], [None, 0.1])
    with pytest.raises(RuntimeError, match="share memory"):
        fused_copy.replay([torch.zeros(1).expand(3), buf[1:]], [torch.ones(3), buf[:-1]])
    assert buf.tolist() == list(range(8))
    assert fused_copy.fallbacks() == before


def test_dtypes_that_torch_refuses_too_raise_before_anything_is_written(fallback):
    dst, other = torch.zeros(3), torch.zeros(2, dtype=torch.uint8).view(torch.bits8)
    with pytest.raises((RuntimeError, NotImplementedError)):
        fused_copy.replay([dst, other], [torch.ones(2), torch.ones(2)])
    assert not dst.any()


def test_no_gradient_is_recorded_where_torchs_operators_copy(fallback):
    dst, source = torch.zeros(3), torch.ones(2, dtype=torch.float64, requires_grad=True)
    buf = torch.arange(4.0)
    with pytest.warns(RuntimeWarning):
        fused_copy.replay([dst, buf[1:]], [source, buf[:-1]])
    assert not dst.requires_grad
    with fused_copy.backend("reference"):
        fused_copy.replay([dst], [source])
    assert not dst.requires_grad


def test_fallback_in_the_environment(tmp_path):
    assert with_environment(tmp_path, "fallback").stdout.strip() == "fallback"
