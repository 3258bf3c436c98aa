"""Copies, casts and fills mixed at random in one call, against the oracle. tests/gpu has the same on a GPU."""

from __future__ import annotations

import random

import pytest
import torch
from arena import Arena
from entries import REFERENCE
from hypothesis import given
from hypothesis import strategies as st
from mixes import aligned, mixed_lists, mixed_pair

import fused_copy

DEVICE = "cpu"

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")


@given(pairs=mixed_lists(), seed=st.integers(0, 99))
def test_any_mix(entry, pairs, seed):
    arena = Arena(pairs, DEVICE, seed=seed, source_bytes=range(256))
    entry(arena.dst, arena.src, arena.fill)
    arena.check()


@given(pairs=mixed_lists(for_torch=True), seed=st.integers(0, 99))
def test_any_mix_through_the_reference(pairs, seed):
    arena = Arena(pairs, DEVICE, seed=seed, source_bytes=range(256))
    REFERENCE(arena.dst, arena.src, arena.fill)
    arena.check()


@given(pairs=mixed_lists(), seed=st.integers(0, 99))
def test_any_mix_through_a_plan(pairs, seed):
    """Bound once, replayed with other contents at the same addresses."""
    arena = Arena(pairs, DEVICE, seed=seed, source_bytes=range(256))
    plan = fused_copy.Plan(arena.dst, arena.fill)
    for again in range(2):
        arena.rewrite_sources(seed + again)
        arena.reset_destinations()
        plan.replay(*arena.src)
        arena.check()


@given(pairs=mixed_lists(), seed=st.integers(0, 99))
def test_any_mix_under_inference_mode(pairs, seed):
    """Where engines call it: no version counters, no grad mode."""
    arena = Arena(pairs, DEVICE, seed=seed, source_bytes=range(256))
    with torch.inference_mode():
        torch.ops.fused_copy.replay(arena.dst, arena.src, arena.fill)
    arena.check()


@pytest.mark.parametrize("n", [1, 6, 24, 300])
def test_long_mixes(any_entry, n):
    rng = random.Random(n)
    arena = Arena([aligned(mixed_pair(i, rng)) for i in range(n)], DEVICE, source_bytes=range(256))
    any_entry(arena.dst, arena.src, arena.fill)
    arena.check()
    arena.rewrite_sources(seed=1)
    arena.reset_destinations()
    any_entry(arena.dst, arena.src, arena.fill)
    arena.check()
