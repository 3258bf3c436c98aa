"""A small model for the decode section: what a graph holds beside the copies."""

from __future__ import annotations

import torch
from torch.nn.functional import rms_norm, silu

from fill_benchmark.peers import Tensors
from fused_copy.decode import VOCAB_SIZE
from fused_copy.timing import Call

LAYERS, HIDDEN, CACHED_TOKENS, ATTENDED = 2, 512, 4096, 16


def small_model(buffers: Tensors, bs: int) -> Call:
    """A few layers of random bfloat16 weights over the first ``bs`` rows of a decode step's six buffers.

    Each token is stored at ``out_loc``, mixed with the first tokens of its row of ``page_table`` and goes through gated
    MLPs. Indices are taken modulo what there is, as the benchmark's sources are random.
    """
    device = buffers["page_table"].device

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(shape[-1] ** -0.5)

    embedding, rotary, cache = (
        weights(VOCAB_SIZE, HIDDEN),
        weights(CACHED_TOKENS, HIDDEN),
        weights(CACHED_TOKENS, HIDDEN),
    )
    layers = [(weights(HIDDEN, 4 * HIDDEN), weights(2 * HIDDEN, HIDDEN)) for _ in range(LAYERS)]
    tokens = torch.zeros(bs, dtype=torch.int64, device=device)

    def run() -> None:
        input_ids, out_loc, cu_seqlens_k, positions, seq_lens, page_table = (b[:bs] for b in buffers.values())
        x = embedding[input_ids.remainder(VOCAB_SIZE)] + rotary[positions.remainder(CACHED_TOKENS)]
        cache[out_loc.remainder(CACHED_TOKENS)] = x
        attended = cache[page_table[:, :ATTENDED].remainder(CACHED_TOKENS)].mean(1)
        x = x + attended * (seq_lens + cu_seqlens_k).remainder(2)[:, None]
        for up, down in layers:
            gate, value = (rms_norm(x, (HIDDEN,)) @ up).chunk(2, -1)
            x = x + (silu(gate) * value) @ down
        tokens.copy_((x @ embedding.T).argmax(-1))

    run()  # loads its kernels, which capture could not
    return run
