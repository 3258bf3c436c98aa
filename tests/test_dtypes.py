"""The table of dtypes: what each of torch's is taken for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import BYTE_DTYPES, CAST_DTYPES
from mixes import name

import fused_copy
from fused_copy._library import _C

CONTRACT = Path(__file__).parent.parent / "docs/contract.md"

OPAQUE = [torch.bits8, torch.bits16, torch.float4_e2m1fn_x2]  # copied, but no numbers

EVERY_DTYPE = sorted({item for item in vars(torch).values() if isinstance(item, torch.dtype)}, key=str)


@pytest.mark.filterwarnings("ignore")  # some are experimental
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=name)
def test_each_dtype_is_known_by_its_own_name_or_refused(dtype):
    other = torch.int64 if dtype == torch.complex64 else torch.complex64
    known = f"source is {name(dtype)} but the destination is {name(other)}"
    expected = known if dtype in [*BYTE_DTYPES, *OPAQUE] else "source has a dtype that cannot be copied"
    with pytest.raises(RuntimeError, match=expected):
        torch.ops.fused_copy.replay([torch.zeros(1, dtype=other)], [torch.empty(1, dtype=dtype)])


@pytest.mark.parametrize("dtype", OPAQUE, ids=name)
def test_opaque_dtypes_are_copied(dtype):
    source = torch.arange(1, 9, dtype=torch.uint8)
    destination = torch.zeros(8, dtype=torch.uint8)
    torch.ops.fused_copy.replay([destination.view(dtype)], [source.view(dtype)])
    assert torch.equal(destination, source)


def test_the_castable_dtypes_are_named_alike():
    with pytest.raises(RuntimeError) as error:
        torch.ops.fused_copy.replay([torch.zeros(1)], [torch.zeros(1, dtype=torch.complex64)])
    listed = str(error.value).partition("two among ")[2].split("\n")[0].replace(" and ", ", ").split(", ")
    assert {getattr(torch, listed_name) for listed_name in listed} == CAST_DTYPES
    assert len(listed) == len(CAST_DTYPES)
    for text in (fused_copy.replay.__doc__, CONTRACT.read_text()):
        assert not [dtype for dtype in listed if not re.search(rf"\b{dtype}\b", text)]


def test_names_are_torchs():
    """check_metadata() is given names."""
    for dtype in BYTE_DTYPES:
        described = [(name(dtype), "cpu", 0, True, False, [2], [1])]
        _C.check_metadata(described, described, None)
