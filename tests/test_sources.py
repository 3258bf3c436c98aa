"""What may stand for a source beside a tensor, against a reference that goes element by element."""

from __future__ import annotations

import pytest
from source_cases import random_case

import fused_copy


@pytest.mark.parametrize("way", ["function", "plan", "reference"])
@pytest.mark.parametrize("seed", range(300))
def test_random_calls(seed, way):
    case = random_case(seed, "cpu")
    if way == "plan":
        fused_copy.Plan(case.dst, case.fill).replay(*case.src)
    else:
        with fused_copy.backend("reference" if way == "reference" else "fused"):
            fused_copy.replay(case.dst, case.src, case.fill)
    case.check()
