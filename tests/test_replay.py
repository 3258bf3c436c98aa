"""What a replay copies, byte for byte, on the CPU. tests/gpu runs the same cases on a GPU."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import pytest
import torch
from arena import AWKWARD_BYTES, Arena, replay_in_calls
from cases import (
    BYTE_DTYPES,
    COUNTS,
    ITEMSIZES,
    LAYOUTS,
    after_step,
    count_batch,
    decode_buffers,
    decode_step,
    dtype_batch,
    layout_batch,
    mixed_batch,
    pair_lists,
)
from hypothesis import given
from hypothesis import strategies as st

import fused_copy

DEVICE = "cpu"


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_at_every_misalignment(entry, layout, itemsize):
    arena = Arena(layout_batch(layout, itemsize), DEVICE)
    replay_in_calls(arena, entry)
    arena.check()


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("count", COUNTS)
def test_every_count_at_every_misalignment(entry, count, itemsize):
    arena = Arena(count_batch(count, itemsize), DEVICE)
    replay_in_calls(arena, entry)
    arena.check()


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", BYTE_DTYPES, ids=str)
def test_every_dtype_is_copied_bit_for_bit(entry, dtype):
    arena = Arena(dtype_batch(dtype), DEVICE, source_bytes=range(256))
    entry(arena.dst, arena.src)
    arena.check()


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", BYTE_DTYPES, ids=str)
def test_nan_payloads_and_bool_bytes_are_kept(entry, dtype):
    arena = Arena(dtype_batch(dtype), DEVICE, source_bytes=AWKWARD_BYTES)
    if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert any(s.isnan().any() for s in arena.src), "the case lost its point"
    if dtype == torch.bool:
        assert any((s.view(torch.uint8) > 1).any() for s in arena.src), "the case lost its point"
    entry(arena.dst, arena.src)
    arena.check()


@pytest.mark.parametrize("n", [1, 6, 64])
def test_lists_of_mixed_layouts_and_dtypes(entry, n):
    arena = Arena(mixed_batch(n), DEVICE)
    assert entry(arena.dst, arena.src) is None
    arena.check()


@given(pairs=pair_lists, seed=st.integers(0, 99))
def test_any_list_of_pairs(entry, pairs, seed):
    arena = Arena(pairs, DEVICE, seed=seed, source_bytes=range(256))
    entry(arena.dst, arena.src)
    arena.check()


@pytest.mark.parametrize("bs, max_seqlen_k", [(1, 1), (3, 17), (5, 40), (8, 40), (8, 1)])
def test_decode_step_takes_whole_buffers(entry, bs, max_seqlen_k):
    buffers = decode_buffers(max_bs=8, max_seq_len=40)
    step = decode_step(bs, max_seqlen_k)
    expected = after_step(buffers, step)
    entry(list(buffers.values()), list(step.values()))
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name
    outside = torch.ones(8, 40, dtype=torch.bool)
    outside[:bs, :max_seqlen_k] = False
    assert (buffers["page_table"][outside] == -7).all()


def test_smaller_step_after_a_larger_one_leaves_the_tail(entry):
    """No fill, no change: what the larger step wrote is still there. Whoever wants it gone asks for a fill."""
    buffers = decode_buffers(max_bs=8, max_seq_len=40)
    for seed, (bs, width) in enumerate([(8, 40), (3, 17), (6, 2)]):
        step = decode_step(bs, width, seed=seed)
        expected = after_step(buffers, step)
        entry(list(buffers.values()), list(step.values()))
        assert all(torch.equal(buffers[name], expected[name]) for name in buffers)


def test_page_table_narrower_than_its_buffer_is_not_flattened(entry):
    """The mistake that motivates the contract: right only where the step is as wide as the buffer."""
    page_table = torch.zeros(4, 10, dtype=torch.int32)
    entry([page_table], [torch.ones(2, 3, dtype=torch.int32)])
    assert page_table.tolist() == [[1, 1, 1] + [0] * 7, [1, 1, 1] + [0] * 7, [0] * 10, [0] * 10]


def test_slices_of_the_callers_own_work_too(entry):
    """A caller that slices as it did for copy_ gets the same result."""
    buffers, step = decode_buffers(8, 40), decode_step(3, 17)
    expected = after_step(buffers, step)
    entry([b[tuple(slice(0, n) for n in step[k].shape)] for k, b in buffers.items()], list(step.values()))
    assert all(torch.equal(buffers[name], expected[name]) for name in buffers)


def test_no_broadcasting_happens_along_a_size_of_one(entry):
    dst = torch.zeros(3, 4)
    entry([dst], [torch.ones(1, 4)])
    assert dst.tolist() == [[1] * 4, [0] * 4, [0] * 4]


def test_empty_list(entry):
    assert entry([], []) is None


def test_empty_tensors(entry):
    dst = [torch.zeros(0), torch.zeros(3), torch.zeros(0, 5), torch.zeros(4, 5)]
    src = [torch.ones(0), torch.ones(0), torch.ones(0, 2), torch.ones(3, 0)]
    entry(dst, src)
    assert all((d == 0).all() for d in dst)


def test_empty_tensor_beside_a_full_one(entry):
    dst = [torch.zeros(3), torch.zeros(3), torch.zeros(3)]
    entry(dst, [torch.ones(0), torch.ones(2), torch.ones(0)])
    assert [d.tolist() for d in dst] == [[0, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_fill_of_nones_is_no_fill(entry):
    dst = torch.zeros(3)
    entry([dst], [torch.ones(2)], [None])
    assert dst.tolist() == [1, 1, 0]
    entry([dst], [torch.full((1,), 2.0)], fill=None)
    assert dst.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    "view", [lambda t: t, lambda t: t[:], lambda t: t.detach()], ids=["itself", "view", "detached"]
)
def test_same_memory_is_a_no_op(entry, view):
    whole = torch.arange(12.0)
    pitched = torch.arange(24).view(4, 6)[:, :5]
    before = whole.clone(), pitched.clone()
    entry([whole, pitched], [view(whole), view(pitched)])
    assert torch.equal(whole, before[0])
    assert torch.equal(pitched, before[1])


def test_same_memory_beside_other_pairs(entry):
    same, dst = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    entry([dst, same], [torch.ones(4, dtype=torch.int64), same])
    assert dst.tolist() == [1, 1, 1, 1]
    assert same.tolist() == [0, 1, 2, 3]


def test_one_source_for_several_destinations(entry):
    """Sources may overlap one another: they are only read."""
    src = torch.arange(6)
    dst = [torch.zeros(6, dtype=torch.int64) for _ in range(3)]
    entry(dst, [src, src, src[2:]])
    assert [d.tolist() for d in dst] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 0, 0]]


def test_parameters_under_no_grad(entry):
    dst = torch.nn.Parameter(torch.zeros(4))
    with torch.no_grad():
        entry([dst], [torch.nn.Parameter(torch.ones(3))])
    assert dst.tolist() == [1, 1, 1, 0]


def test_threads_with_tensors_of_their_own(entry):
    arenas = [Arena(mixed_batch(24, seed=k), DEVICE, seed=k) for k in range(4)]

    def work(arena: Arena) -> None:
        for seed in range(20):
            arena.rewrite_sources(seed)
            arena.reset_destinations()
            entry(arena.dst, arena.src)
            arena.check()

    with ThreadPoolExecutor(len(arenas)) as pool:
        list(pool.map(work, arenas))  # list(): an assertion that failed in a thread is raised here


def test_sequences_of_any_kind():
    dst = [torch.zeros(3), torch.zeros(3)]
    fused_copy.replay(tuple(dst), (torch.ones(3), torch.ones(2)))
    assert [d.tolist() for d in dst] == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    "kind", [dict, OrderedDict, lambda d: MappingProxyType(dict(d))], ids=["dict", "ordered", "proxy"]
)
def test_mappings_match_by_name_in_any_order(kind):
    buffers, step = decode_buffers(8, 40), decode_step(3, 17)
    expected = after_step(buffers, step)
    fused_copy.replay(kind(buffers), kind(dict(reversed(step.items()))))
    assert all(torch.equal(buffers[name], expected[name]) for name in buffers)


def test_empty_mappings():
    assert fused_copy.replay({}, {}) is None
