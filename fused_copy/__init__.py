"""Copies a serving engine's per-step tensors into its CUDA graph's static buffers in one launch."""

from typing import TYPE_CHECKING

from fused_copy import _library as _library  # first, as it says what is missing
from fused_copy._version import __version__
from fused_copy.backends import backend, fallbacks
from fused_copy.ops import replay
from fused_copy.plan import GraphCopy, Plan
from fused_copy.sources import cu_seqlens, plus, rows

if TYPE_CHECKING:
    from fused_copy.explanation import Explanation, explain

__all__ = [
    "Explanation",
    "GraphCopy",
    "Plan",
    "__version__",
    "backend",
    "cu_seqlens",
    "explain",
    "fallbacks",
    "plus",
    "replay",
    "rows",
]


if not TYPE_CHECKING:  # type checkers would take any name for one that is there

    def __getattr__(name):
        # An engine's start does without what people ask for at a prompt.
        if name in ("Explanation", "explain"):
            from fused_copy import explanation

            return getattr(explanation, name)
        raise AttributeError(f"module 'fused_copy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
