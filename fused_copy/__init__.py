"""Copies a serving engine's per-step tensors into its CUDA graph's static buffers in one launch."""

from fused_copy._version import __version__
from fused_copy.backends import backend
from fused_copy.explanation import Explanation, explain
from fused_copy.ops import replay
from fused_copy.plan import GraphCopy, Plan

__all__ = ["Explanation", "GraphCopy", "Plan", "__version__", "backend", "explain", "replay"]
