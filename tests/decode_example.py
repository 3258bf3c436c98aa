"""examples/decode.py as a module, and small runs of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from fused_copy.decode import DecodeLoop

EXAMPLES = Path(__file__).parent.parent / "examples"


def load():
    spec = importlib.util.spec_from_file_location("decode_example_module", EXAMPLES / "decode.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


decode = load()
SMALL = decode.Config(layers=2, hidden=32, heads=4, kv_heads=2, mlp=32, vocab=128)
NAMES = ("input_ids", "out_loc", "cu_seqlens_k", "positions", "seq_lens", "page_table")


def small_loop(device="cpu", max_bs=5):
    return DecodeLoop(max_bs=max_bs, max_seq_len=48, prompt_len=(2, 20), new_tokens=(2, 16), page_size=4, device=device)


def run(ways, steps, device="cpu"):
    return decode.run(ways, steps, small_loop(device), SMALL)


def forgetting(forgotten):
    """A way that fills all buffers but one."""

    def forget(way, bs):
        def fill(made_of):
            kept = way.buffers[forgotten].clone()
            decode.copy_each(way.buffers, decode.make_each(made_of))
            way.buffers[forgotten].copy_(kept)

        return fill

    return forget
