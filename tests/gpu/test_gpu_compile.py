"""The op compiled: torch's own CUDA graphs with it in them, and packages for a GPU."""

import pytest
import torch
from cases import after_step, decode_buffers, decode_step
from compiled import check_aot_package, check_aot_package_from_parts, check_decode_in_one_graph
from test_gpu_replay import in_its_own_process
from test_minisgl import MAX_BS, MAX_SEQ_LEN, call, expected, same
from torch._dynamo.utils import counters

import fused_copy

pytestmark = pytest.mark.capture
by_inductor = pytest.mark.not_sanitized("compiles for longer than all others take together")


class Decode(torch.nn.Module):
    """Static buffers that are the module's own, so that torch's CUDA graphs may write them in place."""

    def __init__(self, bs, width):
        super().__init__()
        for name, buffer in decode_buffers(bs, width, "cuda").items():
            self.register_buffer(name, buffer)

    def forward(self, *step):
        buffers = dict(self.named_buffers())
        fused_copy.replay(list(buffers.values()), list(step))
        return self.page_table.sum(dim=1) + self.seq_lens


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@by_inductor
@torch.inference_mode()
def test_reduce_overhead_puts_it_into_torchs_cuda_graph():
    decode = Decode(8, 64)
    compiled = torch.compile(decode, fullgraph=True, mode="reduce-overhead")
    for seed in range(6):  # warm-up, recording, replays
        step = decode_step(5, 33, "cuda", seed=seed)
        expected = after_step(dict(decode.named_buffers()), step)
        torch.compiler.cudagraph_mark_step_begin()
        result = compiled(*step.values())
        assert all(torch.equal(buffer, expected[name]) for name, buffer in decode.named_buffers())
        assert torch.equal(result, expected["page_table"].sum(dim=1) + expected["seq_lens"])
    assert counters["inductor"]["cudagraph_skips"] == 0


@by_inductor
@torch.inference_mode()
def test_compiled_with_new_batch_sizes():
    decode = Decode(16, 64)
    compiled = torch.compile(decode, fullgraph=True, dynamic=True)
    for seed, (bs, width) in enumerate([(3, 17), (16, 64), (5, 9), (2, 33)]):
        step = decode_step(bs, width, "cuda", seed=seed)
        expected = after_step(dict(decode.named_buffers()), step)
        compiled(*step.values())
        assert all(torch.equal(buffer, expected[name]) for name, buffer in decode.named_buffers())


def test_pinned_source_in_a_compiled_call():
    """The fake lets a host source pass; the op then finds it pinned, or reads it at the call."""
    buffer = torch.zeros(6, dtype=torch.int32, device="cuda")
    compiled = torch.compile(lambda d, s: fused_copy.replay([d], [s], [-1]), fullgraph=True, backend="aot_eager")
    compiled(buffer, torch.tensor([7, 8], dtype=torch.int32).pin_memory())
    assert buffer.tolist() == [7, 8, -1, -1, -1, -1]
    source = torch.tensor([1, 2, 3], dtype=torch.int32)
    compiled(buffer, source)
    source.fill_(9)
    assert buffer.tolist() == [1, 2, 3, -1, -1, -1]


@by_inductor
def test_decode_in_torchs_cuda_graph():
    """The fill and the model in one graph of torch's: warm-up, recording and a replay of each step."""
    check_decode_in_one_graph("cuda", times=3, mode="reduce-overhead")
    assert counters["inductor"]["cudagraph_skips"] == 0


@in_its_own_process
def test_aot_inductor_package(tmp_path):
    check_aot_package(tmp_path, "cuda")


@in_its_own_process
@pytest.mark.parametrize("last", [False, True], ids=["no fill", "fill last"])
def test_aot_inductor_package_from_parts(tmp_path, last):
    check_aot_package_from_parts(tmp_path, "cuda", last)


@torch.inference_mode()
def test_fused_copy_replay_data_captured_and_replayed():
    """Captured once; a replay reads what the same sources hold by then."""
    buffers, step = decode_buffers(MAX_BS, MAX_SEQ_LEN, "cuda"), decode_step(5, 23, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(buffers, step, 5, 23)
    for seed in range(3):
        for name, source in decode_step(5, 23, "cuda", seed=seed).items():
            step[name].copy_(source)
        wanted = expected(buffers, step, 5, 23)
        graph.replay()
        assert same(buffers, wanted)
