"""Random calls whose sources are host values, rows, sums and integers plus a number, with what they must come to.

The reference goes element by element over NumPy arrays. Every destination is a view of a buffer, and whole buffers are
compared, so that what is written beside a destination, or into a row that is none, is found.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fused_copy import cu_seqlens, plus, rows

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8)
ITEMS = (torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.uint8, torch.complex128, torch.float64)
GARBAGE = (-1, -2, 2**31 - 1, -(2**31), 2**62, -(2**63), 1000)


@dataclass
class Case:
    """One call, the buffers that its destinations are views of, and what these must hold after it, as bytes."""

    device: torch.device
    dst: list[torch.Tensor] = field(default_factory=list)
    src: list[Any] = field(default_factory=list)
    fill: list[Any] = field(default_factory=list)
    buffers: list[torch.Tensor] = field(default_factory=list)
    expected: list[np.ndarray] = field(default_factory=list)
    what: list[str] = field(default_factory=list)

    def check(self) -> None:
        for buffer, expected, what in zip(self.buffers, self.expected, self.what, strict=True):
            found = as_bytes(buffer.cpu())
            if not np.array_equal(found, expected):
                at = np.flatnonzero((found != expected).ravel())
                raise AssertionError(f"{what}: {len(at)} bytes are wrong, the first at {at[0]}")

    def rewind(self) -> None:
        for buffer in self.buffers:
            buffer.view(torch.uint8).fill_(0xA5)


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().copy()


def element_bytes(values: torch.Tensor) -> np.ndarray:
    """The tensor's elements as one more dimension of bytes."""
    return values.contiguous().unsqueeze(-1).view(torch.uint8).numpy()


def add_pair(
    case: Case,
    rng: random.Random,
    what: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    source: Any,
    yields: torch.Tensor | None,
    taken: np.ndarray | None,
    fill: Any,
) -> None:
    """A destination with room beyond a corner of `shape`. `yields` is what the source yields, `taken` which of it."""
    room = [size + rng.choice((0, 1, 3)) for size in shape] if shape else []
    if isinstance(source, (int, float)):
        room = list(shape)
    step = rng.choice((1, 1, 2)) if room else 1
    wide = [*(size + rng.choice((0, 2)) for size in room[:-1]), room[-1] * step + rng.choice((0, 1, 4))] if room else []
    places = (*(slice(0, size) for size in room[:-1]), slice(0, room[-1] * step, step)) if room else (0,)
    buffer = torch.empty(wide or [1], dtype=dtype, device=case.device)
    buffer.view(torch.uint8).fill_(0xA5)
    view = buffer[places]
    expected = element_bytes(buffer.cpu()).copy()
    inner = expected[places]
    if yields is not None:
        corner = tuple(slice(0, size) for size in yields.shape)
        everything = np.ones(tuple(yields.shape), dtype=bool) if taken is None else taken
        written = np.zeros(inner.shape[:-1], dtype=bool)
        written[corner] = everything
        values = element_bytes(yields.to(dtype).reshape(yields.shape or [1])).reshape(*yields.shape, dtype.itemsize)
        inner[corner][everything] = values[everything]
        rest = None
        if fill == "last":
            rest = values[everything][-1] if everything.any() else None
        elif fill is not None:
            rest = element_bytes(torch.tensor([fill], dtype=dtype))[0]
        if rest is not None:
            inner[~written] = rest
    case.dst.append(view)
    case.src.append(source)
    case.fill.append(fill)
    case.buffers.append(buffer)
    case.expected.append(expected.reshape(*(wide or [1])[:-1], (wide or [1])[-1] * dtype.itemsize))
    case.what.append(f"pair {len(case.what)}: {what}, {dtype} {list(shape)} in {room} of step {step}, fill {fill}")


def some_fill(rng: random.Random, one_dimension: bool, yields: bool = True) -> Any:
    return rng.choice((None, None, 0, 1, *(("last", "last") if one_dimension and yields else ())))


def strided(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """The same values, perhaps with other strides."""
    if tensor.dim() == 0 or rng.random() < 0.5:
        return tensor
    if tensor.dim() > 1 and rng.random() < 0.5:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
    view = wide[..., : 2 * tensor.shape[-1] : 2] if rng.random() < 0.5 else wide[..., : tensor.shape[-1]]
    return view.copy_(tensor)


def on_device(case: Case, rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """On the case's device, or where that is a GPU perhaps in pinned memory."""
    tensor = strided(rng, tensor)
    if case.device.type == "cpu":
        return tensor
    if rng.random() < 0.25:
        pinned = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=case.device).copy_(tensor)


def integers(case: Case, rng: random.Random, values: list[int], dtypes: tuple[torch.dtype, ...]) -> Any:
    """Integers as any source of them."""
    tensor = torch.tensor(values, dtype=rng.choice(dtypes))
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice((list, tuple))(tensor.tolist())
    if kind == 1:
        return strided(rng, tensor).numpy()
    if kind == 2 and case.device.type == "cuda":
        return strided(rng, tensor)
    return on_device(case, rng, tensor)


def add_values(case: Case, rng: random.Random) -> None:
    dtype = rng.choice((*INTEGERS, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool))
    whole = not dtype.is_floating_point
    if rng.random() < 0.25:
        shape = rng.choice(((), (1,), (1, 1)))
        number = rng.choice((0, 1)) if whole else rng.choice((0, 1.5, -3))
        add_pair(case, rng, "a number", shape, dtype, number, torch.full(shape, number).to(dtype), None, None)
        return
    if rng.random() < 0.5:
        n = rng.choice((0, 1, 3, 4, 17, 64, 300))
        numbers: list[Any] = [rng.choice((0, 1) if dtype == torch.bool else (0, 1, 5, 100)) for _ in range(n)]
        if not whole:
            numbers = [rng.choice((number, number + 0.5, -number / 3)) for number in numbers]
        fill = some_fill(rng, True, n > 0)
        values = torch.tensor(numbers, dtype=dtype)
        add_pair(case, rng, "a list", (n,), dtype, rng.choice((list, tuple))(numbers), values, None, fill)
        return
    shape = tuple(rng.choice((1, 2, 5, 33)) for _ in range(rng.choice((1, 2, 3))))
    of = rng.choice((torch.int64, torch.int32, torch.float32, torch.uint8, torch.bool, dtype))
    values = strided(rng, torch.randint(0, 2 if torch.bool in (of, dtype) else 100, shape).to(of))
    source: Any = values
    if of != torch.bfloat16 and (case.device.type == "cpu" or rng.random() < 0.5):
        source = values.numpy()
        if rng.random() < 0.5:
            flipped = values.flip(0)
            source = flipped.numpy()[::-1]
    add_pair(
        case, rng, f"an array of {of}", shape, dtype, source, values.to(dtype), None, some_fill(rng, len(shape) == 1)
    )


def add_rows(case: Case, rng: random.Random) -> None:
    page = rng.choice((1, 1, 2, 3, 16, 64))
    dims = 2 if page > 1 else rng.choice((1, 2, 2, 2, 3, 4))
    width = (rng.choice((1, 4, 7, 8, 64, 257, 1024)), *(rng.choice((1, 2, 3)) for _ in range(2)))[: dims - 1]
    count = rng.choice((1, 5, 12))
    of = rng.choice((torch.int32, torch.int64)) if page > 1 or rng.random() < 0.6 else rng.choice(ITEMS)
    to = rng.choice((torch.int32, torch.int64)) if of in (torch.int32, torch.int64) else of
    values = torch.randint(-300 if page > 1 else 0, 300 if of != torch.uint8 else 200, (count, *width)).to(of)
    n = rng.choice((0, 1, 3, 8, 40))
    picked = [rng.choice((rng.randrange(count), rng.randrange(count), -1, -5)) for _ in range(n)]
    index = integers(case, rng, picked, (torch.int32, torch.int64))
    if isinstance(index, torch.Tensor) and index.is_cuda and index.dtype == torch.int64 and n:
        bad = {rng.randrange(n): rng.choice(GARBAGE) for _ in range(2)}
        for place, number in bad.items():
            index[place] = number
            picked[place] = number if 0 <= number < count else -1
    yields = values[torch.tensor([max(row, 0) for row in picked], dtype=torch.int64)]
    columns = yields.shape[1] if dims > 1 else 1
    if page > 1:
        yields = yields[:, ::page].div(page, rounding_mode="floor")
        columns = yields.shape[1]
    limits = [columns if row >= 0 else 0 for row in picked]
    lengths: Any = None
    if dims > 1 and rng.random() < 0.6:
        wanted = [
            rng.choice((-3, 0, 1, 2, page, page + 1, width[0] - 1, width[0], width[0] + 5, 2**30)) for _ in range(n)
        ]
        if rng.random() < 0.4:
            at = [rng.randrange(n) for _ in range(n)]
            table = [0] * max(n, 1)
            for i, place in enumerate(at):
                table[place] = wanted[i]
            wanted = [table[place] for place in at]
            at = [place if rng.random() < 0.8 else -1 for place in at]
            wanted = [number if place >= 0 else 0 for number, place in zip(wanted, at, strict=True)]
            lengths = rows(
                on_device(case, rng, torch.tensor(table, dtype=rng.choice((torch.int32, torch.int64)))),
                integers(case, rng, at, (torch.int32, torch.int64)),
            )
        else:
            lengths = integers(case, rng, wanted, (torch.int32, torch.int64))
        limits = [min(limit, max(0, -(-number // page))) for limit, number in zip(limits, wanted, strict=True)]
    taken = np.zeros(tuple(yields.shape), dtype=bool)
    for row, limit in enumerate(limits):
        if dims == 1:
            taken[row] = limit > 0
        else:
            taken[row, :limit] = True
    fill = some_fill(rng, dims == 1, any(row >= 0 for row in picked))
    source = rows(on_device(case, rng, values), index, lengths, page)
    add_pair(
        case,
        rng,
        f"rows of {of} {list(values.shape)}, pages of {page}, lengths {lengths is not None}",
        tuple(yields.shape),
        to,
        source,
        yields,
        taken,
        fill,
    )


def add_sums(case: Case, rng: random.Random) -> None:
    n = rng.choice((0, 1, 2, 31, 32, 33, 255, 256, 257, 1000))
    of = rng.choice(INTEGERS)
    top = {torch.uint8: 200, torch.int8: 100, torch.int16: 30000}.get(of, 2**30)
    lengths = [rng.randrange(-top if of != torch.uint8 else 0, top) for _ in range(n)]
    to = rng.choice(INTEGERS)
    source = integers(case, rng, lengths, (of,))
    sums = torch.tensor([0, *np.cumsum(np.array(lengths, dtype=np.int64))], dtype=torch.int64)
    add_pair(case, rng, f"sums of {of}", (n + 1,), to, cu_seqlens(source), sums, None, some_fill(rng, True))


def add_plus(case: Case, rng: random.Random) -> None:
    of = rng.choice(INTEGERS)
    to = rng.choice((*INTEGERS, torch.float32, torch.bool, torch.bfloat16))
    shape = rng.choice(((0,), (1,), (5,), (64,), (700,), (3, 5), (2, 3, 4), (2, 3, 2, 5)))
    number = rng.choice((0, 1, -1, 100, 2**31, -(2**40)))
    values = torch.randint(0, 100, shape).to(of)
    wrapped = torch.from_numpy((values.to(torch.int64).numpy() + number).astype(values.numpy().dtype))
    source: Any = on_device(case, rng, values)
    if len(shape) == 1 and rng.random() < 0.3:
        source, wrapped = values.tolist(), values.to(torch.int64) + number
    add_pair(
        case,
        rng,
        f"{of} plus {number}",
        shape,
        to,
        plus(source, number),
        wrapped,
        None,
        some_fill(rng, len(shape) == 1, shape[0] > 0),
    )


def add_tensor(case: Case, rng: random.Random) -> None:
    shape = rng.choice(((0,), (1,), (64,), (300,), (3, 40)))
    of, to = rng.choice(((torch.int32, torch.int32), (torch.int64, torch.int32), (torch.float32, torch.bfloat16)))
    values = torch.randint(0, 100, shape).to(of)
    add_pair(
        case,
        rng,
        f"a tensor of {of}",
        shape,
        to,
        on_device(case, rng, values),
        values,
        None,
        some_fill(rng, len(shape) == 1, shape[0] > 0),
    )


def add_nothing(case: Case, rng: random.Random) -> None:
    add_pair(case, rng, "None", (5,), torch.int32, None, None, None, rng.choice((None, 3, "last")))


ADD: tuple[Callable[[Case, random.Random], None], ...] = (
    add_values,
    add_rows,
    add_rows,
    add_sums,
    add_plus,
    add_tensor,
    add_nothing,
)


def random_case(seed: int, device: str | torch.device, pairs: int | None = None) -> Case:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    case = Case(torch.device(device))
    for _ in range(rng.randrange(1, 9) if pairs is None else pairs):
        rng.choice(ADD)(case, rng)
    return case
