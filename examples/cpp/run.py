"""Loads the library that ``make`` built, and fills buffers through it: on the GPU if there is one, else on the CPU."""

import sys

import torch

import fused_copy  # noqa: F401  (registers the op that the library calls)

torch.ops.load_library(sys.argv[1])
device = "cuda" if torch.cuda.is_available() else "cpu"

input_ids = torch.full((6,), 99, dtype=torch.int32, device=device)
page_table = torch.full((6, 8), 99, dtype=torch.int32, device=device)
seq_lens = torch.full((6,), 99, dtype=torch.int32, device=device)
step = [
    torch.tensor([11, 12, 13], device=device),
    torch.arange(15, dtype=torch.int32, device=device).view(3, 5),
    torch.tensor([5, 2, 4], device=device),
]
torch.ops.engine.fill_decode_buffers([input_ids, page_table, seq_lens], step)

assert input_ids.tolist() == [11, 12, 13, 99, 99, 99]
assert page_table[:3, :5].equal(step[1]) and (page_table[:, 5:] == 99).all() and (page_table[3:] == 99).all()
assert seq_lens.tolist() == [5, 2, 4, 1, 1, 1]

try:
    torch.ops.engine.fill_decode_buffers([input_ids], [torch.zeros(7, dtype=torch.int32, device=device)])
except RuntimeError:
    assert input_ids.tolist() == [11, 12, 13, 99, 99, 99], "a refused call writes nothing"
else:
    raise AssertionError("a source larger than its buffer was accepted")
print(f"filled from C++ on {device}")
