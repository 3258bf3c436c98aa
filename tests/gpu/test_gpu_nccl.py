"""Tensor-parallel ranks whose decode graphs contain both an all-reduce and the copy."""

from __future__ import annotations

import faulthandler
import socket
import time

import pytest
import torch
from test_gpu_replay import in_its_own_process
from torch import distributed

import fused_copy
from fused_copy.decode import DecodeLoop, capture_buffers, copy_each

RANKS = 2
STEPS = 200
PATIENCE = 150  # seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(rank: int, port: int) -> None:
    """One rank: the same batches as the others, hidden states of its own, and every step checked."""
    faulthandler.dump_traceback_later(PATIENCE - 10)
    torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    device = torch.device("cuda", rank)
    distributed.init_process_group("nccl", init_method=address, rank=rank, world_size=RANKS, device_id=device)
    loop = DecodeLoop(max_bs=16, max_seq_len=256, prompt_len=(4, 200), new_tokens=(4, 16), seed=3, device=device)
    buffers, expected = (capture_buffers(loop.max_bs, loop.max_seq_len, device) for _ in range(2))
    hidden = torch.zeros(loop.max_bs, dtype=torch.int64, device="cuda")
    plan = fused_copy.Plan(buffers)

    def model() -> None:
        """Reads what was copied, and sums it over the ranks."""
        hidden.copy_((buffers["input_ids"] + buffers["page_table"].sum(1)) * (rank + 1))
        distributed.all_reduce(hidden)

    first = next(loop).sources
    plan.replay(*first.values())
    model()  # NCCL connects outside of a capture
    torch.cuda.synchronize()
    # Either a copy before the graph, or the copy as its first node.
    outside, inside = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(keep_graph=True)
    # NCCL's own threads may not break the captures.
    with torch.cuda.graph(outside, capture_error_mode="thread_local"):
        model()
    with torch.cuda.graph(inside, capture_error_mode="thread_local"):
        copy = plan.capture(inside, *first.values())
        model()
    copy_each(expected, first)
    for step in range(STEPS):
        sources = next(loop).sources
        copy_each(expected, sources)
        if step % 2:
            plan.replay(*sources.values())
            outside.replay()
        else:
            copy.update(*sources.values())
            inside.replay()
        assert all(torch.equal(buffers[name], expected[name]) for name in buffers), f"rank {rank}, step {step}"
        summed = (expected["input_ids"] + expected["page_table"].sum(1)) * sum(range(1, RANKS + 1))
        assert torch.equal(hidden, summed), f"rank {rank}, step {step}: the all-reduce saw other buffers"
    distributed.barrier()
    torch.cuda.synchronize()
    # NCCL waits for the last graph that holds its kernels: https://github.com/pytorch/pytorch/issues/115388
    outside.reset()
    inside.reset()
    distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")
@pytest.mark.skipif(not (distributed.is_available() and distributed.is_nccl_available()), reason="needs NCCL")
@pytest.mark.capture
@in_its_own_process
def test_graphs_with_an_all_reduce_and_the_copy():
    ranks = torch.multiprocessing.spawn(serve, args=(free_port(),), nprocs=RANKS, join=False)
    end = time.monotonic() + PATIENCE
    try:
        while not ranks.join(timeout=5):
            assert time.monotonic() < end, "the ranks wait for each other"
    finally:
        for process in ranks.processes:
            process.kill()
