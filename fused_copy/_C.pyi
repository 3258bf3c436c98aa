from collections.abc import Callable, Sequence
from typing import Any

import torch

has_gpu_code: bool
build_info: dict[str, Any] | None
registers_op: bool

def replay(
    dst: Sequence[torch.Tensor],
    src: Sequence[torch.Tensor],
    fill: Sequence[float | None] | None,
    names: tuple[str, ...] | None,
) -> bool: ...
def replay_dispatched(
    dst: Sequence[torch.Tensor], src: Sequence[torch.Tensor], fill: Sequence[float | None] | None
) -> None: ...
def explain(
    dst: Sequence[torch.Tensor],
    src: Sequence[torch.Tensor],
    fill: Sequence[float | None] | None,
    names: tuple[str, ...] | None,
) -> tuple[list[int], list[tuple[str, int]]] | None: ...
def check_metadata(
    dst: list[tuple[Any, ...]], src: list[tuple[Any, ...]], fill: Sequence[float | None] | None
) -> None: ...
def launch_nothing(device: int) -> None: ...
def capture_nothing(device: int) -> int: ...
def set_nothing(executable: int, node: int, device: int) -> None: ...
def use_reference(use: bool) -> None: ...
def bind(
    dst: tuple[torch.Tensor, ...],
    fill: tuple[float | None, ...] | None,
    names: tuple[str, ...] | None,
    elsewhere: Callable[..., None],
) -> BoundPlan | None: ...

class BoundPlan:
    @property
    def replay(self) -> Callable[..., None]: ...
    def capture(self, graph: torch.cuda.CUDAGraph, sources: tuple[torch.Tensor, ...]) -> BoundGraphCopy: ...

class BoundGraphCopy:
    @property
    def launches(self) -> int: ...
    @property
    def update(self) -> Callable[..., None]: ...
