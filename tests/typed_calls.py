"""What type checkers make of calls. It is not run: mypy checks it, and reports an ignore that nothing needs."""

import torch

import fused_copy


def steps(plan: fused_copy.Plan, copy: fused_copy.GraphCopy, step: dict[str, torch.Tensor]) -> None:
    for call in (plan.replay, copy.update):
        call(step)
        call({"lens": [3, 5], "cu_seqlens": fused_copy.cu_seqlens([3, 5]), "unchanged": None})
        call([3, 5], torch.zeros(2), None, 7, fused_copy.rows(torch.zeros(4, 4), [1, 2], page_size=2))
        call(step, step)  # type: ignore[call-overload]
        call(sources=step)  # type: ignore[call-overload]
        call("text")  # type: ignore[arg-type]
        call({3: torch.zeros(2)})  # type: ignore[dict-item]


def names() -> None:
    fused_copy.explain([torch.zeros(2)], [[1, 2]]).launches.bit_length()
    fused_copy.nonsense  # type: ignore[attr-defined]  # noqa: B018
