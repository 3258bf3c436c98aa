"""The ways into a replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import fused_copy

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


@dataclass(frozen=True)
class Entry:
    """One way in. Both promise the same; only an error's text may be lost on one of them."""

    name: str
    replay: Callable[..., None]
    tells_why: bool

    def __call__(self, dst, src, *args, **kwargs) -> None:
        return self.replay(dst, src, *args, **kwargs)


# torch before 2.13 loses the text of an error that crosses the stable ABI, so there the raw op shows the type alone.
OP = Entry("op", torch.ops.fused_copy.replay, tells_why=TORCH >= (2, 13))
PYTHON = Entry("python", fused_copy.replay, tells_why=True)


def through_reference(dst, src, fill=None) -> None:
    with fused_copy.backend("reference"):
        fused_copy.replay(dst, src, fill)


REFERENCE = Entry("reference", through_reference, tells_why=True)
