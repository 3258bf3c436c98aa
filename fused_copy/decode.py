"""The decode loop of a serving engine, reduced to what it copies before each CUDA graph replay.

Requests join a running batch with their prompt already prefilled, grow by one token a step and leave when done. Every
step pads the batch to a size for which a graph was captured. It begins as the scheduler's lists and as rows of a page
table for all requests, and ends as six small tensors, all int32, with ``bs`` the padded batch and ``max_seqlen_k`` its
longest sequence:

=================================================  =====================  ======================
name                                               this step's source     capture buffer
=================================================  =====================  ======================
``input_ids, out_loc, positions, seq_lens``        [bs]                   [max_bs]
``cu_seqlens_k``                                   [bs + 1]               [max_bs + 1]
``page_table``                                     [bs, max_seqlen_k]     [max_bs, max_seq_len]
=================================================  =====================  ======================

The page table holds one KV slot per token, whatever the page size; behind the end of a sequence its row holds what an
earlier request left there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from fused_copy.sources import Source, cu_seqlens, plus, rows

DUMMY_SLOT = 0
"""The KV slot that padded rows read and write; its page is never given to a request."""

VOCAB_SIZE = 32_000


def capture_sizes(max_bs: int) -> list[int]:
    """The batch sizes engines capture graphs for: 1, 2, 4, 8, then every 8, and ``max_bs`` itself."""
    return [bs for bs in (1, 2, 4, *range(8, max_bs, 8)) if bs < max_bs] + [max_bs]


def capture_buffers(max_bs: int, max_seq_len: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """The six static buffers that the graphs read: int32 zeros on ``device``, shaped as in the module's table."""
    shapes = {
        "input_ids": (max_bs,),
        "out_loc": (max_bs,),
        "cu_seqlens_k": (max_bs + 1,),
        "positions": (max_bs,),
        "seq_lens": (max_bs,),
        "page_table": (max_bs, max_seq_len),
    }
    return {name: torch.zeros(shape, dtype=torch.int32, device=device) for name, shape in shapes.items()}


def copy_each(buffers: Mapping[str, torch.Tensor], sources: Mapping[str, torch.Tensor]) -> None:
    """Fill the leading corners of the capture buffers as engines do today: six slices and six ``copy_`` calls."""
    bs, max_seqlen_k = sources["page_table"].shape
    buffers["input_ids"][:bs].copy_(sources["input_ids"])
    buffers["out_loc"][:bs].copy_(sources["out_loc"])
    buffers["cu_seqlens_k"][: bs + 1].copy_(sources["cu_seqlens_k"])
    buffers["positions"][:bs].copy_(sources["positions"])
    buffers["seq_lens"][:bs].copy_(sources["seq_lens"])
    buffers["page_table"][:bs, :max_seqlen_k].copy_(sources["page_table"])


def make_each(made_of: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The six tensors of a step by torch's operators, as engines make them today: transfers, a sum, a gather."""
    table, index, _, _ = made_of["page_table"]

    def tensor(values: list[int]) -> torch.Tensor:
        pinned = torch.tensor(values, dtype=torch.int32, pin_memory=table.is_cuda)
        return pinned.to(table.device, non_blocking=True)

    seq_lens = tensor(made_of["seq_lens"])
    return {
        "input_ids": tensor(made_of["input_ids"]),
        "out_loc": tensor(made_of["out_loc"]),
        "cu_seqlens_k": F.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0)),
        "positions": seq_lens - 1,
        "seq_lens": seq_lens,
        "page_table": table[tensor(index)],
    }


@dataclass
class Request:
    """A running request: its row in the engine's page table, its length in tokens, and the KV pages it holds."""

    row: int
    seq_len: int
    remaining: int
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """What one decode step copies, by the six names in the capture buffers' order.

    ``made_of`` has what an engine has: lists, and rows of the loop's page table, which are good until its next step.
    ``sources`` has the int32 tensors that come of it.
    """

    running: int
    bs: int
    max_seqlen_k: int
    made_of: dict[str, Source]
    sources: dict[str, torch.Tensor]


class DecodeLoop:
    """An endless iterator of :class:`Step`, the same for the same arguments.

    Requests arrive in bursts, so that the batch swings between one request and ``max_bs``. Prompts are between
    ``prompt_len[0]`` and ``prompt_len[1]`` tokens, short ones more often than long ones; a request then decodes between
    ``new_tokens[0]`` and ``new_tokens[1]`` tokens. The KV cache has ``num_slots`` slots in pages of ``page_size``,
    enough for ``max_bs`` of the longest requests. ``running`` lists the requests of the latest step, ``served`` counts
    those that left before it. The simulation is planned on the CPU; the page table and a step's tensors are on
    ``device``.
    """

    def __init__(
        self,
        *,
        max_bs: int = 64,
        max_seq_len: int = 2048,
        prompt_len: tuple[int, int] = (16, 1500),
        new_tokens: tuple[int, int] = (4, 96),
        page_size: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(max_bs, *prompt_len, *new_tokens, page_size) < 1:
            raise ValueError("max_bs, prompt_len, new_tokens and page_size start at 1")
        longest = prompt_len[1] + new_tokens[1]
        if longest > max_seq_len:
            raise ValueError(f"a request can reach {longest} tokens, but max_seq_len is {max_seq_len}")
        self.max_bs = max_bs
        self.max_seq_len = max_seq_len
        self.page_size = page_size
        self.device = torch.device(device)
        self.capture_sizes = capture_sizes(max_bs)
        num_pages = 1 + max_bs * -(-longest // page_size)
        self.num_slots = num_pages * page_size
        self.running: list[Request] = []
        self.served = 0
        self._prompt_len = prompt_len
        self._new_tokens = new_tokens
        self._rng = random.Random(seed)
        self._waiting = 0
        # A burst brings max_bs / 2 requests on average: at this rate the batch is half full on average.
        self._burst_rate = 2 / sum(new_tokens)
        # Page 0 and row 0 belong to the dummy request that pads the batch.
        self._free_pages = list(range(1, num_pages))
        self._free_rows = list(range(1, max_bs + 1))
        self._page_table = torch.full((max_bs + 1, max_seq_len), DUMMY_SLOT, dtype=torch.int32, device=device)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        self._retire()
        self._admit()
        slots = [self._extend(request, 1)[0] for request in self.running]
        for request in self.running:
            request.remaining -= 1
        return self._make_step(slots)

    def _retire(self) -> None:
        for request in self.running:
            if not request.remaining:
                self._free_pages += request.pages
                self._free_rows.append(request.row)
                self.served += 1
        self.running = [request for request in self.running if request.remaining]

    def _admit(self) -> None:
        if not self.running or self._rng.random() < self._burst_rate:
            self._waiting += self._rng.randint(1, self.max_bs)
        while self._waiting and self._free_rows:
            self._waiting -= 1
            shortest, longest = self._prompt_len
            prompt = round(shortest * (longest / shortest) ** self._rng.random())
            request = Request(self._free_rows.pop(), seq_len=0, remaining=self._rng.randint(*self._new_tokens))
            slots = self._extend(request, prompt)
            self._page_table[request.row, :prompt] = torch.tensor(slots, dtype=torch.int32)
            self.running.append(request)

    def _extend(self, request: Request, tokens: int) -> list[int]:
        """Give the request room for more tokens; the KV slots of those tokens."""
        positions = range(request.seq_len, request.seq_len + tokens)
        request.seq_len += tokens
        while len(request.pages) * self.page_size < request.seq_len:
            request.pages.append(self._free_pages.pop())
        return [request.pages[p // self.page_size] * self.page_size + p % self.page_size for p in positions]

    def _make_step(self, slots: list[int]) -> Step:
        running = len(self.running)
        bs = next(size for size in self.capture_sizes if size >= running)
        padding = bs - running
        index = [request.row for request in self.running]
        seq_lens = [request.seq_len for request in self.running] + [1] * padding
        last = [seq_len - 1 for seq_len in seq_lens[:running]]
        self._page_table[index, last] = torch.tensor(slots, dtype=torch.int32, device=self.device)
        max_seqlen_k = max(seq_lens)
        made_of: dict[str, Source] = {
            "input_ids": [self._rng.randrange(VOCAB_SIZE) for _ in index] + [0] * padding,
            "out_loc": slots + [DUMMY_SLOT] * padding,
            "cu_seqlens_k": cu_seqlens(seq_lens),
            "positions": plus(seq_lens, -1),
            "seq_lens": seq_lens,
            "page_table": rows(self._page_table[:, :max_seqlen_k], index + [0] * padding),
        }
        return Step(running, bs, max_seqlen_k, made_of, make_each(made_of))
