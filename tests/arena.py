"""The oracle: tensors carved out of byte arenas, and a byte-exact reference computed on the host.

All destinations of a case live in one byte buffer and all sources in another, at shuffled places, at any misalignment,
with random gaps. After a call the *whole* buffers are compared: a byte written one too far is found wherever it lands.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

ALIGN = 32  # misalignments are addresses modulo this: 16 means "good for a 16-byte access, not for a 32-byte one"
GUARD = 64  # untouched bytes before the first and after the last tensor

# No byte of these makes a NaN or an infinity in any float dtype, none is zero; no source byte is a destination byte.
SOURCE_BYTES = range(0x01, 0x7C)
DESTINATION_BYTES = range(0x81, 0xFC)

# Bytes that do make NaNs of every kind, infinities, negative zeros, and bools that are neither 0 nor 1.
AWKWARD_BYTES = (0x00, 0x01, 0x02, 0x7C, 0x7F, 0x80, 0xA5, 0xF0, 0xFC, 0xFF, 0xFF, 0x7F)


@dataclass(frozen=True)
class Side:
    """One tensor: its shape in elements and where it should lie (address modulo ALIGN)."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    misalign: int = 0

    @property
    def nbytes(self) -> int:
        """From its first byte to its last. A tensor without elements gets room for one, to have an address."""
        if 0 in self.size:
            return self.dtype.itemsize
        return (1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))) * self.dtype.itemsize


@dataclass(frozen=True)
class Pair:
    dst: Side
    src: Side
    fill: float | None = None  # what the rest of the destination becomes
    pinned: bool = False  # the source lies in pinned host memory, whatever the arena's device


class _CudaBytes:
    """A run of a CUDA buffer's bytes for torch.as_tensor, which asks for no alignment. Holds the buffer."""

    def __init__(self, buffer: torch.Tensor, start: int, nbytes: int) -> None:
        self.buffer = buffer
        self.__cuda_array_interface__ = {
            "data": (buffer.data_ptr() + start, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 2,
        }


def bytes_at(buffer: torch.Tensor, start: int, nbytes: int) -> torch.Tensor:
    """`buffer[start:start + nbytes]` on a storage of its own that begins at `start`.

    A view of the buffer keeps the buffer's storage, and its offset there must suit the dtype; this one has offset 0, so
    that `.view(dtype)` takes any address.
    """
    if buffer.is_cuda:
        run = torch.as_tensor(_CudaBytes(buffer, start, nbytes), device=buffer.device)
    else:
        run = torch.from_numpy(buffer.numpy()[start : start + nbytes])
    assert run.data_ptr() == buffer.data_ptr() + start, "the oracle itself copied"
    return run


def tensor_at(buffer: torch.Tensor, start: int, side: Side) -> torch.Tensor:
    """The tensor that `side` describes, at byte `start` of `buffer`, with a storage that ends with its last element."""
    return bytes_at(buffer, start, side.nbytes).view(side.dtype).as_strided(side.size, side.stride)


def elements(buffer: torch.Tensor, start: int, side: Side) -> torch.Tensor:
    """The same tensor as bytes, `[*size, itemsize]`: a plain view, because bytes may lie anywhere."""
    item = side.dtype.itemsize
    return buffer.as_strided((*side.size, item), (*(s * item for s in side.stride), 1), start)


class _Region:
    """One byte buffer, the places of its tensors, and on the host the bytes it was given."""

    def __init__(self, sides: Sequence[Side], rng: random.Random, device: torch.device, pinned: bool = False) -> None:
        self.sides = sides
        self.device = device
        order = list(range(len(sides)))
        rng.shuffle(order)
        room = 2 * GUARD + ALIGN + sum(side.nbytes + 2 * ALIGN for side in sides)
        self.buffer = torch.empty(room, dtype=torch.uint8, device=device, pin_memory=pinned)
        base = self.buffer.data_ptr()
        self.starts = [0] * len(sides)
        end = GUARD
        for i in order:
            end += rng.randrange(ALIGN)
            end += (sides[i].misalign - base - end) % ALIGN
            self.starts[i] = end
            end += sides[i].nbytes
        assert end + GUARD <= room
        self.tensors = [tensor_at(self.buffer, start, side) for start, side in zip(self.starts, sides, strict=True)]

    def write(self, host: torch.Tensor) -> None:
        self.host = host
        self.buffer.copy_(host)

    def compare(self, expected: torch.Tensor, what: str) -> None:
        found = self.buffer.cpu()
        if torch.equal(found, expected):
            return
        wrong = (found != expected).nonzero().flatten()
        at = int(wrong[0])
        raise AssertionError(
            f"{len(wrong)} bytes of the {what} arena are wrong; the first, byte {at}, {self._owner(at)}: "
            f"expected {int(expected[at]):#04x}, got {int(found[at]):#04x}"
        )

    def _owner(self, at: int) -> str:
        for i, (start, side) in enumerate(zip(self.starts, self.sides, strict=True)):
            if start <= at < start + side.nbytes:
                return f"lies {at - start} bytes into pair {i}'s {side}"
        return "lies in a gap between tensors"


def _draw(alphabet: Sequence[int], n: int, seed: int) -> torch.Tensor:
    picks = np.random.default_rng(seed).integers(0, len(alphabet), n, dtype=np.uint8)
    return torch.from_numpy(np.asarray(alphabet, dtype=np.uint8)[picks])


def encoded(number: float, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of a number, as torch writes them: with an imaginary part of zero in a complex dtype."""
    if not dtype.is_floating_point and not dtype.is_complex:
        number = int(number)  # torch makes no unsigned integers of floats
    return torch.tensor([number], dtype=dtype).view(torch.uint8)


def _castable(run: torch.Tensor, src: torch.dtype, dst: torch.dtype) -> torch.Tensor:
    """Bytes of elements whose cast is defined. Beyond an integer's range the cast of a float is anybody's guess, and so
    are the bits of a NaN: torch's own vector code and scalar code differ there."""
    values = run.clone().view(src)
    if not src.is_floating_point:
        return run
    if dst.is_floating_point or dst == torch.bool:
        return torch.where(values.isnan(), torch.tensor(-0.0, dtype=src), values).view(torch.uint8)
    limits = torch.iinfo(dst)
    low, high = max(limits.min, -60_000), min(limits.max, 60_000)  # as far as a float16 goes
    share = run.view(-1, src.itemsize).sum(1, dtype=torch.float64) / (255 * src.itemsize)
    return (low + share * (high - low)).to(src).clamp(low, high).view(torch.uint8)


class Arena:
    """Tensors for a list of pairs (`dst`, `src`, `fill`), and `check()`: were they copied as the contract says?"""

    def __init__(
        self,
        pairs: Sequence[Pair],
        device: str | torch.device = "cpu",
        seed: int = 0,
        source_bytes: Sequence[int] = SOURCE_BYTES,
    ) -> None:
        self.pairs = list(pairs)
        self.device = torch.device(device)
        self.source_bytes = source_bytes
        rng = random.Random(seed)
        self._dst = _Region([p.dst for p in self.pairs], rng, self.device)
        self._on_device = [i for i, p in enumerate(self.pairs) if not p.pinned]
        self._on_host = [i for i, p in enumerate(self.pairs) if p.pinned]
        self._src = [_Region([self.pairs[i].src for i in self._on_device], rng, self.device)]
        if self._on_host:
            self._src.append(_Region([self.pairs[i].src for i in self._on_host], rng, torch.device("cpu"), pinned=True))
        self._source_of = dict(zip(self._on_device + self._on_host, self._sources(), strict=True))
        self.reset_destinations()
        self.rewrite_sources(seed)

    def _sources(self) -> list[tuple[_Region, int]]:
        return [(region, k) for region in self._src for k in range(len(region.sides))]

    @property
    def dst(self) -> list[torch.Tensor]:
        return self._dst.tensors

    @property
    def src(self) -> list[torch.Tensor]:
        return [region.tensors[k] for region, k in (self._source_of[i] for i in range(len(self.pairs)))]

    @property
    def fill(self) -> list[float | None] | None:
        fills = [p.fill for p in self.pairs]
        return None if all(f is None for f in fills) else fills

    def reset_destinations(self) -> None:
        """The destinations' first bytes again: what an earlier call wrote cannot pass for the next one's work."""
        self._dst.write(_draw(DESTINATION_BYTES, self._dst.buffer.numel(), seed=len(self.pairs)))

    def rewrite_sources(self, seed: int) -> None:
        """Other contents at the same addresses."""
        for k, (region, members) in enumerate(zip(self._src, (self._on_device, self._on_host), strict=False)):
            host = _draw(self.source_bytes, region.buffer.numel(), seed=1000 * seed + k + 1)
            for start, i in zip(region.starts, members, strict=True):
                pair = self.pairs[i]
                if pair.src.dtype != pair.dst.dtype:
                    run = host[start : start + pair.src.nbytes]
                    run.copy_(_castable(run, pair.src.dtype, pair.dst.dtype))
            region.write(host)

    def expected(self) -> torch.Tensor:
        """The destination arena's bytes as they must be after one replay of all pairs."""
        out = self._dst.host.clone()
        for i, pair in enumerate(self.pairs):
            region, k = self._source_of[i]
            whole = elements(out, self._dst.starts[i], pair.dst)
            if pair.fill is not None:
                whole.copy_(encoded(pair.fill, pair.dst.dtype))
            corner = tuple(slice(0, n) for n in pair.src.size)
            whole[corner].copy_(self._converted(elements(region.host, region.starts[k], pair.src), pair))
        return out

    def _converted(self, raw: torch.Tensor, pair: Pair) -> torch.Tensor:
        """The source's bytes in the destination's dtype: bit for bit, or as `Tensor.copy_` converts on this device."""
        if pair.src.dtype == pair.dst.dtype:
            return raw
        if pair.src.dtype == torch.bool:
            raw = (raw != 0).to(torch.uint8)  # a bool's byte may be any; its value is false or true
        values = raw.clone(memory_format=torch.contiguous_format).view(pair.src.dtype).to(self.device)
        return torch.empty_like(values, dtype=pair.dst.dtype).copy_(values).cpu().view(torch.uint8)

    def found(self) -> list[torch.Tensor]:
        """The destinations' elements as bytes, gaps between them left out."""
        host = self._dst.buffer.cpu()
        return [elements(host, start, side) for start, side in zip(self._dst.starts, self._dst.sides, strict=True)]

    def check(self) -> None:
        """Every byte of every arena: the corners hold the sources, nothing else moved, the sources are as they were."""
        self._dst.compare(self.expected(), "destination")
        for region in self._src:
            region.compare(region.host, "source")

    def check_untouched(self) -> None:
        for region in (self._dst, *self._src):
            region.compare(region.host, "destination" if region is self._dst else "source")


def replay_in_calls(arena: Arena, replay: Callable[..., None], pairs_per_call: int = 96) -> None:
    """All pairs of the arena, in as many calls as it takes to keep each list within one launch."""
    dst, src, fill = arena.dst, arena.src, arena.fill
    for i in range(0, len(arena.pairs), pairs_per_call):
        call = slice(i, i + pairs_per_call)
        replay(dst[call], src[call], *([] if fill is None else [fill[call]]))


def dense(size: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(prod(max(n, 1) for n in size[d + 1 :]) for d in range(len(size)))
