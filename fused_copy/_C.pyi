from collections.abc import Sequence

import torch

has_gpu_code: bool

def replay(
    dst: Sequence[torch.Tensor],
    src: Sequence[torch.Tensor],
    fill: Sequence[float | None] | None,
    names: tuple[str, ...] | None,
) -> bool: ...
def explain(
    dst: Sequence[torch.Tensor],
    src: Sequence[torch.Tensor],
    fill: Sequence[float | None] | None,
    names: tuple[str, ...] | None,
) -> tuple[list[int], list[tuple[str, int]]] | None: ...
