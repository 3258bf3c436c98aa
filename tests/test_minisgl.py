"""fused_copy.minisgl: the six-tensor entry point, against six slices and six copies."""

from __future__ import annotations

import re

import pytest
import torch
from cases import decode_buffers, decode_step
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_copy
from fused_copy.minisgl import fused_copy_replay_data

MAX_BS, MAX_SEQ_LEN = 8, 40
NAMES = ("input_ids", "out_loc", "cu_seqlens_k", "positions", "seq_lens", "page_table")


def call(buffers, step, batch_size, max_seqlen_k):
    sources = {f"src_{name}": step[name] for name in NAMES}
    destinations = {f"dst_{name}": buffers[name] for name in NAMES}
    fused_copy_replay_data(**sources, **destinations, batch_size=batch_size, max_seqlen_k=max_seqlen_k)


def expected(buffers, step, batch_size, max_seqlen_k):
    out = {name: buffer.clone() for name, buffer in buffers.items()}
    for name in NAMES:
        rows = slice(batch_size + (name == "cu_seqlens_k"))
        corner = (rows, slice(max_seqlen_k)) if name == "page_table" else rows
        out[name][corner].copy_(step[name][corner])
    return out


def same(buffers, others):
    return all(torch.equal(buffers[name], others[name]) for name in NAMES)


# Sources of exactly the batch, and whole tables of which it is the leading corner.
SOURCES = {"of_the_batch": decode_step, "whole": lambda bs, width, seed: decode_step(MAX_BS, MAX_SEQ_LEN, seed=seed)}


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("batch_size", [0, 1, 3, 7, MAX_BS])
@pytest.mark.parametrize("max_seqlen_k", [0, 1, 17, MAX_SEQ_LEN])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_like_six_slices_and_copies(backend, batch_size, max_seqlen_k, sources):
    buffers, step = decode_buffers(MAX_BS, MAX_SEQ_LEN), SOURCES[sources](batch_size, max_seqlen_k, seed=batch_size)
    wanted = expected(buffers, step, batch_size, max_seqlen_k)
    with fused_copy.backend(backend):
        call(buffers, step, batch_size, max_seqlen_k)
    assert same(buffers, wanted)


def test_arguments_are_in_the_order_of_the_signature():
    buffers, step = decode_buffers(MAX_BS, MAX_SEQ_LEN), decode_step(3, 17)
    wanted = expected(buffers, step, 3, 17)
    fused_copy_replay_data(*(step[name] for name in NAMES), *(buffers[name] for name in NAMES), 3, 17)
    assert same(buffers, wanted)


def test_sources_and_buffers_that_are_not_contiguous():
    wide = {name: buffer.new_full((*buffer.shape, 2), -7) for name, buffer in decode_buffers(MAX_BS, 40).items()}
    buffers = {name: buffer[..., 1] for name, buffer in wide.items()}
    step = decode_step(5, 23)
    step["page_table"] = step["page_table"].T.contiguous().T
    step["seq_lens"] = torch.stack([step["seq_lens"]] * 3, dim=1)[:, 1]
    step["positions"] = step["positions"][:1].expand(5)
    wanted = expected(buffers, step, 5, 23)
    call(buffers, step, 5, 23)
    assert same(buffers, wanted)
    assert all((buffer[..., 0] == -7).all() for buffer in wide.values())


def test_int64_sources():
    buffers, step = decode_buffers(MAX_BS, MAX_SEQ_LEN), decode_step(4, 9)
    wanted = expected(buffers, step, 4, 9)
    call(buffers, {name: source.long() for name, source in step.items()}, 4, 9)
    assert same(buffers, wanted)


def refused(error, *words, buffers=None, step=None, batch_size=3, max_seqlen_k=17):
    buffers = decode_buffers(MAX_BS, MAX_SEQ_LEN) | (buffers or {})
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    with pytest.raises(error) as caught:
        call(buffers, decode_step(3, 17) | (step or {}), batch_size, max_seqlen_k)
    assert same(buffers, before)
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"


def ints(*size):
    return torch.zeros(size, dtype=torch.int32)


@pytest.mark.parametrize("name", NAMES)
def test_batch_larger_than_a_buffer_names_it(name):
    too_small = ints(2, MAX_SEQ_LEN) if name == "page_table" else ints(2)
    refused(RuntimeError, rf"\b{name}\b", r"\b2\b", buffers={name: too_small})


@pytest.mark.parametrize("name", NAMES)
def test_batch_larger_than_a_source_names_it(name):
    too_small = ints(2, 17) if name == "page_table" else ints(2)
    refused(RuntimeError, rf"source {name}\b", r"\b2\b", step={name: too_small})


def test_table_wider_than_the_buffer_or_than_its_source():
    refused(RuntimeError, "page_table", r"\b16\b", r"\b17\b", buffers={"page_table": ints(MAX_BS, 16)})
    refused(RuntimeError, "source page_table", r"\b17\b", r"\b18\b", max_seqlen_k=18)


@pytest.mark.parametrize("name", NAMES)
def test_rank_and_type_of_a_source(name):
    refused(RuntimeError, rf"\b{name}\b", step={name: ints(3, 17, 1)})
    refused(TypeError, rf"\b{name}\b", "NoneType", step={name: None})


def test_negative_numbers():
    refused(RuntimeError, "batch_size is -1", batch_size=-1)
    refused(RuntimeError, "max_seqlen_k is -2", max_seqlen_k=-2)


def test_dtype_that_cannot_be_cast_names_the_tensor():
    refused(RuntimeError, "positions", "complex64", step={"positions": torch.zeros(3, dtype=torch.complex64)})


def test_compiled_in_one_graph_for_all_batches():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for bs, width in [(3, 17), (5, 9), (8, 40)]:
        buffers, step = decode_buffers(MAX_BS, MAX_SEQ_LEN), decode_step(bs, width)
        wanted = expected(buffers, step, bs, width)
        compiled(buffers, step, bs, width)
        assert same(buffers, wanted)
    assert counter.frame_count == 1


def test_fake_tensors():
    mode = FakeTensorMode()
    buffers = {name: mode.from_tensor(buffer) for name, buffer in decode_buffers(MAX_BS, MAX_SEQ_LEN).items()}
    step = {name: mode.from_tensor(source) for name, source in decode_step(3, 17).items()}
    call(buffers, step, 2, 11)
    with pytest.raises(RuntimeError, match="page_table"):
        call(buffers, step, 3, 18)
