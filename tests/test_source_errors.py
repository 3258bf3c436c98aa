"""What is refused of the sources that are no plain tensors: pair and part are named, and no byte is written."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from arena import Side, tensor_at
from cases import CAST_DTYPES
from entries import through_reference
from mixes import name
from source_cases import as_bytes
from test_errors import bytes_of
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_copy
from fused_copy import cu_seqlens, plus, rows
from fused_copy.ops import flatten

INT = torch.int32
TABLE = torch.arange(12, dtype=INT).view(3, 4)
AT = 2  # the pair in question, among pairs that are all right


def fallback(dst, src, fill):
    with fused_copy.backend("fallback"):
        fused_copy.replay(dst, src, fill)


WAYS = {
    "function": fused_copy.replay,
    "plan": lambda dst, src, fill: fused_copy.Plan(dst, fill).replay(src),
    "plan in order": lambda dst, src, fill: fused_copy.Plan(dst, fill).replay(*src.values()),
    "reference": through_reference,
    "fallback": fallback,
    "explain": fused_copy.explain,
}


def refused(dst, source, exc, *words, fill=None, ways=WAYS):
    """Every way in raises `exc` with all `words` in its text, and writes nothing."""
    names = ["ids", "out_loc", "wrong", "last"]
    buffers = {key: torch.full((4,), 9, dtype=INT) for key in names}
    sources = {"ids": [1, 2], "out_loc": torch.ones(3, dtype=INT), "wrong": source, "last": cu_seqlens([1, 2])}
    buffers["wrong"] = dst
    fills = {"ids": 3, "last": "last", "wrong": fill}
    before = bytes_of(list(buffers.values()))
    for way in ways:
        with pytest.raises(exc) as caught:
            WAYS[way](buffers, sources, fills)
        text = str(caught.value)
        assert type(caught.value) is exc, (way, text)
        for word in (*words, "fused_copy: ", f"pair {AT}", "wrong"):
            assert word in text, (way, text)
        assert all(map(torch.equal, bytes_of(list(buffers.values())), before)), f"{way} raised, but wrote"


# --- host values --------------------------------------------------------------------------------------------------

INTEGERS = [dtype for dtype in sorted(CAST_DTYPES, key=name) if not dtype.is_floating_point and dtype != torch.bool]


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.uint16, torch.uint32, torch.uint64], ids=name)
def test_integers_beyond_the_dtype(dtype):
    limits = torch.iinfo(dtype)
    dst = torch.zeros(4, dtype=dtype)
    fused_copy.replay([dst], [[limits.min, limits.max]])
    assert dst.tolist() == [limits.min, limits.max, 0, 0]
    for number in (
        limits.min - 1,
        limits.max + 1,
        -(10**30),
        10**30,
        float("nan"),
        float("inf"),
        -float("inf"),
        2.0**limits.bits,
        -(2.0**limits.bits),
        float(limits.max + 1),
        -1.0 if limits.min == 0 else limits.min * 1.01,
    ):
        for make in (list, tuple):
            refused(
                dst,
                make([1, number]),
                RuntimeError,
                f"have {number} at position 1",
                name(dtype),
                f"{limits.min} to {limits.max}",
            )
        refused(dst[:1], number, RuntimeError, f"have {number} at position 0", name(dtype))


@pytest.mark.parametrize("part", ["index", "lengths", "source"])
def test_integers_beyond_int64_in_a_part(part):
    number = 2**63
    source = {
        "index": rows(TABLE, [0, number]),
        "lengths": rows(TABLE, [0, 1], [1, number]),
        "source": plus([1, number], 1),
    }[part]
    dst = torch.zeros(4, dtype=INT) if part == "source" else torch.zeros(3, 4, dtype=INT)
    refused(dst, source, RuntimeError, f"{part} of pair 2", f"have {number} at position 1", "int64")
    refused(torch.zeros(4, dtype=INT), cu_seqlens([number]), RuntimeError, "lengths of pair 2", "at position 0")


def test_integers_beyond_a_float():
    for dtype in (torch.float64, torch.float32, torch.float16):
        refused(
            torch.zeros(4, dtype=dtype),
            [1, 10**400],
            RuntimeError,
            "values of pair 2",
            "at position 1",
            "what a float holds",
        )


@pytest.mark.parametrize(
    "items, position",
    [
        ([1, "2"], 1),
        (["one"], 0),
        ([b"1"], 0),
        ([1, None], 1),
        ([[1, 2], [3, 4]], 0),
        ([1, [2]], 1),
        ([(1,), 2], 0),
        ([1j], 0),
        ([1, torch.tensor(3)], 1),
        ([1, torch.nn.Parameter(torch.ones(()))], 1),
        ([np.arange(2), 1], 0),
        ([1, object()], 1),
        ([1, {}], 1),
        ([1, rows(TABLE, [0])], 1),
        ([np.datetime64("2020")], 0),
    ],
    ids=lambda value: str(value).replace("\n", "").partition(" at 0x")[0],
)
@pytest.mark.parametrize("dtype", [INT, torch.uint8, torch.bool, torch.float32, torch.bfloat16], ids=name)
def test_what_is_no_number_in_a_list(dtype, items, position):
    what = type(items[position]).__name__
    refused(
        torch.zeros(4, dtype=dtype), items, TypeError, "values of pair 2", what, f"at position {position}", "numbers"
    )


@pytest.mark.parametrize(
    "made", [plus([1], 2), cu_seqlens([1]), rows(TABLE, [0])], ids=lambda made: type(made).__name__
)
def test_a_source_as_a_part_of_another(made):
    """Which is a tuple, and no list of numbers."""
    what = f"is fused_copy.{type(made).__name__}: expected a torch.Tensor, numbers"
    table = torch.zeros(3, 4, dtype=INT)
    refused(table, rows(TABLE, made), TypeError, "index of pair 2", what)
    refused(table, rows(TABLE, [0], rows([1], made)), TypeError, "index of the lengths of pair 2", what)
    refused(torch.zeros(4, dtype=INT), cu_seqlens(made), TypeError, "lengths of pair 2", what)
    refused(torch.zeros(4, dtype=INT), plus(made, 1), TypeError, "source", what)
    if not isinstance(made, rows):
        refused(table, rows(TABLE, [0], made), TypeError, "lengths of pair 2", what)


@pytest.mark.parametrize(
    "items", [["1"], [None], [[1]], [1.0], [1.5], [torch.tensor(1)], [np.float32(1)], [1j]], ids=str
)
def test_what_is_no_integer_in_a_part(items):
    """Floats neither, which an index would round without a word."""
    table = torch.zeros(3, 4, dtype=INT)
    for source, part in [
        (rows(TABLE, items), "index"),
        (rows(TABLE, [0], items), "lengths"),
        (rows(TABLE, [0], rows(items, [0])), "table of the lengths"),
        (rows(TABLE, [0], rows([1], items)), "index of the lengths"),
    ]:
        refused(table, source, TypeError, f"{part} of pair 2 (wrong)", "at position 0", "expected integers")
    for source, part in [(plus(items, 1), "source"), (cu_seqlens(items), "lengths")]:
        refused(torch.zeros(4, dtype=INT), source, TypeError, f"{part} of pair 2 (wrong)", "at position 0")


@pytest.mark.parametrize(
    "source, words",
    [
        (iter([1, 2]), "list_iterator"),
        ((i for i in (1, 2)), "generator"),
        (map(int, "12"), "map"),
        (range(2), "range"),
        ({1, 2}, "set"),
        ({1: 2}.keys(), "dict_keys"),
        ("12", "str"),
        (b"12", "bytes"),
        (bytearray(b"12"), "bytearray"),
        (object(), "object"),
        (torch.float32, "dtype"),
        (1j, "1j"),
        (rows, "type"),
        (slice(2), "slice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_source(source, words):
    """Never taken for a list of nothing."""
    dst = torch.zeros(1, dtype=INT) if source == 1j else torch.zeros(4, dtype=INT)
    refused(dst, source, TypeError, words, "expected")
    for part, made in [("index", rows(TABLE, source)), ("lengths", rows(TABLE, [0], source))]:
        refused(torch.zeros(3, 4, dtype=INT), made, TypeError, f"{part} of pair 2 (wrong)", "expected")
    refused(torch.zeros(4, dtype=INT), cu_seqlens(source), TypeError, "lengths of pair 2 (wrong)", "expected")
    refused(torch.zeros(4, dtype=INT), plus(source, 1), TypeError, "source of pair 2 (wrong)", "expected")


@pytest.mark.parametrize(
    "make",
    [
        rows,
        lambda: rows(TABLE),
        lambda: rows(TABLE, [0], None, 1, 2),
        lambda: rows(TABLE, index=[0], pages=1),
        lambda: rows(TABLE, [0], table=TABLE),
        cu_seqlens,
        lambda: cu_seqlens([1], [2]),
        lambda: plus([1]),
        lambda: plus([1], 2, 3),
    ],
)
def test_sources_of_too_few_or_too_many_parts(make):
    with pytest.raises(TypeError):
        make()


@pytest.mark.parametrize(
    "array",
    [
        np.array([1, None], dtype=object),
        np.array(["a"]),
        np.array([b"a"]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        np.array([1], dtype="m8[s]"),
        np.array([1, 2], dtype=">i4"),
        np.array([1.5], dtype=">f8"),
        np.zeros(2, dtype=[("a", "i4")]),
        np.array([1], dtype=np.longdouble),
        np.datetime64("2020-01-01"),
        np.timedelta64(1),
        memoryview(np.array([1], dtype=">i2")),
    ],
    ids=lambda array: str(getattr(array, "dtype", type(array).__name__)),
)
def test_arrays_of_dtypes_that_torch_does_not_have(array):
    what = type(array).__name__
    refused(torch.zeros(4, dtype=INT), array, TypeError, "values of pair 2 (wrong)", what, "dtype")
    refused(torch.zeros(3, 4, dtype=INT), rows(TABLE, array), TypeError, "index of pair 2 (wrong)", what, "dtype")


@pytest.mark.parametrize("of, to", [(np.uint16, INT), (np.complex64, torch.float32), (np.int32, torch.uint32)])
def test_arrays_that_cannot_be_cast(of, to):
    refused(torch.zeros(4, dtype=to), np.zeros(2, dtype=of), RuntimeError, np.dtype(of).name, name(to))


def test_numbers_for_a_dtype_of_bytes_alone():
    refused(
        torch.zeros(4, dtype=torch.complex64), [1.0], RuntimeError, "values of pair 2", "complex64", "pass a tensor"
    )


@pytest.mark.parametrize("shape", [(4,), (0,), (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("number", [1, 1.5, True, np.int64(1), np.array(1)], ids=repr)
def test_one_number_for_several_elements(shape, number):
    refused(torch.zeros(shape), number, TypeError, "values of pair 2", "one number", str(list(shape)))


@pytest.mark.parametrize("number", [1, 1.5, np.int64(1), np.array(1)], ids=repr)
def test_one_number_for_a_part(number):
    for source, part in [(plus(number, 1), "source"), (cu_seqlens(number), "lengths")]:
        refused(torch.zeros(1, dtype=INT), source, TypeError, f"{part} of pair 2", "one number")
    for source, part in [(rows(TABLE, number), "index"), (rows(TABLE, [0], number), "lengths")]:
        refused(torch.zeros(1, 4, dtype=INT), source, TypeError, f"{part} of pair 2", "one number")


@pytest.mark.parametrize(
    "values",
    [
        [0] * 5,
        np.zeros(5, int),
        torch.zeros(5, dtype=INT),
        np.zeros((2, 2), int),
        [0] * 99,
        np.broadcast_to(0, 10**15),  # one number in memory
    ],
    ids=str,
)
def test_values_that_do_not_fit(values):
    refused(torch.zeros(4, dtype=INT), values, RuntimeError, "source has shape", "[4]")


# --- rows ---------------------------------------------------------------------------------------------------------

INDEX_KINDS = {
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "tensor": torch.tensor,
    "int32": lambda i: torch.tensor(i, dtype=INT),
    "strided": lambda i: torch.tensor([i, i]).T.contiguous()[:, 0],
}


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_an_index_beyond_the_table(kind):
    make, dst = INDEX_KINDS[kind], torch.zeros(3, 4, dtype=INT)
    fused_copy.replay([dst], [rows(TABLE, make([2, -1, -(2**31)]))])
    assert dst.tolist() == [TABLE[2].tolist(), [0] * 4, [0] * 4]
    for number in (3, 4, 2**31 - 1, *([2**62] if kind != "int32" else [])):
        refused(
            dst,
            rows(TABLE, make([0, number])),
            RuntimeError,
            "index of pair 2 (wrong)",
            f"has {number} at position 1",
            "less than 3",
        )
        refused(
            dst,
            rows(TABLE, [0, 1], rows(make([1, 2, 3]), make([0, number]))),
            RuntimeError,
            "index of the lengths of pair 2 (wrong)",
            f"has {number} at position 1",
            "less than 3",
        )
    refused(dst, rows(TABLE[:0], make([0])), RuntimeError, "has 0 at position 0", "less than 0")


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["array", "tensor"])
def test_an_index_or_lengths_of_another_kind(make):
    dst = torch.zeros(3, 4, dtype=INT)
    wrong = [
        ([[0, 1]], None, "shape [1, 2]"),
        ([0, 1], np.int16, "int16"),
        ([0, 1], np.uint8, "uint8"),
        ([0.0, 1.0], np.float32, "float32"),
        ([True, False], np.bool_, "bool"),
    ]
    for numbers, dtype, word in wrong:
        part = np.array(numbers, dtype=dtype)
        part = torch.from_numpy(part) if make is torch.tensor else part
        refused(dst, rows(TABLE, part), RuntimeError, "index of pair 2 (wrong)", word)
        refused(dst, rows(TABLE, [0, 1], part), RuntimeError, "lengths of pair 2 (wrong)", word)
        refused(dst, rows(TABLE, [0, 1], rows(part, [0, 1])), RuntimeError, "table of the lengths of pair 2", word)
        refused(dst, rows(TABLE, [0, 1], rows([1, 2], part)), RuntimeError, "index of the lengths of pair 2", word)
    refused(dst, rows(TABLE, torch.tensor(0)), RuntimeError, "index of pair 2 (wrong)", "shape []")


def test_tables_indices_and_lengths_that_do_not_go_together():
    dst, column = torch.zeros(3, 4, dtype=INT), torch.zeros(3, dtype=INT)
    for source, exc, words in [
        (rows(TABLE, [0, 1], [1]), RuntimeError, ["lengths of pair 2", "are 1", "index of 2"]),
        (rows(TABLE, [0], [1, 2]), RuntimeError, ["lengths of pair 2", "are 2", "index of 1"]),
        (rows(TABLE, [0], rows([1, 2], [0, 1])), RuntimeError, ["lengths of pair 2", "are 2", "index of 1"]),
        (rows(TABLE, [0], rows([1], [0], [1])), TypeError, ["lengths of pair 2", "expected rows(table, index) alone"]),
        (rows(TABLE, [0], rows([1], [0], None, 2)), TypeError, ["lengths of pair 2", "pages of their own"]),
        (rows(TABLE, [0], cu_seqlens([1])), TypeError, ["lengths of pair 2", "is fused_copy.cu_seqlens"]),
        (rows(TABLE.float(), [0]), RuntimeError, ["table of pair 2", "float32", "int32"]),
        (rows(TABLE.to(torch.int16), [0]), RuntimeError, ["table of pair 2", "int16"]),
        (rows(TABLE, [0] * 4), RuntimeError, ["[4, 4]", "[3, 4]"]),
        (rows(torch.zeros(3, 5, dtype=INT), [0]), RuntimeError, ["[1, 5]", "[3, 4]"]),
        (rows(TABLE[0], [0]), RuntimeError, ["expected 2 dimensions, got 1"]),
        (rows(TABLE.tolist(), [0]), TypeError, ["table of pair 2", "list: expected a torch.Tensor"]),
        (rows(TABLE.numpy(), [0]), TypeError, ["table of pair 2", "ndarray: expected a torch.Tensor"]),
        (rows(None, [0]), TypeError, ["table of pair 2", "NoneType"]),
        (rows(TABLE, None), TypeError, ["index of pair 2", "NoneType"]),
    ]:
        # The one that torch's operators could do, but for its dtype, the fallback does.
        ways = [
            way for way in WAYS if not (way == "fallback" and words[0] == "table of pair 2" and exc is RuntimeError)
        ]
        refused(dst, source, exc, *words, ways=ways)
    refused(column, rows(column.clone(), [0], [1]), RuntimeError, "lengths of pair 2", "two dimensions or more")
    refused(column, rows(torch.tensor(1, dtype=INT), [0]), RuntimeError, "table of pair 2", "no dimensions")


def test_page_sizes():
    dst = torch.zeros(3, 4, dtype=INT)
    for size in (0, -1, -(2**63)):
        refused(
            dst, rows(TABLE, [0], None, size), RuntimeError, "page_size of pair 2 (wrong)", f"is {size}", "1 or more"
        )
    for size in (2**63, -(2**63) - 1):
        refused(dst, rows(TABLE, [0], None, size), RuntimeError, "page_size of pair 2 (wrong)", f"is {size}", "int64")
    for size in (1.0, "1", None, torch.tensor([1, 2]), [1]):
        refused(dst, rows(TABLE, [0], None, size), TypeError, "page_size of pair 2 (wrong)", type(size).__name__)
    refused(
        torch.zeros(3, 4), rows(TABLE.float(), [0], None, 2), RuntimeError, "table of pair 2", "float32", "page_size"
    )
    refused(dst[0], rows(TABLE[0], [0], None, 2), RuntimeError, "table of pair 2", "two dimensions", "page_size")
    for size in (4, 5, 2**31, 2**62, 2**63 - 1):  # one column, however long the page
        for way in (fused_copy.replay, through_reference):
            found = torch.full((3, 4), 9, dtype=INT)
            way([found], [rows(TABLE + 2**30, [2, 0], [1, 0], size)])
            assert found.tolist() == [[(2**30 + 8) // size, 9, 9, 9], [9] * 4, [9] * 4]


# --- sums, and integers plus a number -----------------------------------------------------------------------------


def test_sums_and_additions_of_what_are_no_integers():
    dst = torch.zeros(4, dtype=INT)
    for numbers in (torch.ones(2), np.ones(2), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.bfloat16)):
        what = str(numbers.dtype).removeprefix("torch.")
        refused(dst, cu_seqlens(numbers), RuntimeError, "lengths of pair 2 (wrong)", what, "integers")
        refused(dst, plus(numbers, 1), RuntimeError, "source of pair 2 (wrong)", what, "integers")
    refused(dst, cu_seqlens(torch.ones(1, 2, dtype=INT)), RuntimeError, "lengths of pair 2 (wrong)", "[1, 2]")
    refused(dst, cu_seqlens([1] * 4), RuntimeError, "[5]", "[4]")
    refused(dst, plus([1] * 5, 1), RuntimeError, "[5]", "[4]")
    for dtype in (torch.float32, torch.bool, torch.bfloat16, torch.complex64):
        refused(torch.zeros(4, dtype=dtype), cu_seqlens([1, 2]), RuntimeError, "destination is", name(dtype))
    for number in (1.5, "1", None, [1]):
        refused(dst, plus([1], number), TypeError, "n of pair 2 (wrong)", type(number).__name__, "integer")
    for number in (2**63, -(2**63) - 1):
        refused(dst, plus([1], number), RuntimeError, "n of pair 2 (wrong)", f"is {number}", "int64")


# --- fill="last" --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (2, 4)], ids=str)
def test_last_needs_one_dimension(shape):
    for call in (lambda dst: fused_copy.Plan(dst, ["last"]), lambda dst: fused_copy.replay(dst, dst, ["last"])):
        with pytest.raises(RuntimeError, match=r'pair 0: fill is "last" .*expected one dimension'):
            call([torch.zeros(shape)])


@pytest.mark.parametrize(
    "source",
    [
        [],
        (),
        np.zeros(0, int),
        torch.zeros(0, dtype=INT),
        plus([], 1),
        plus([], 0),
        rows(TABLE[:, 0], []),
        rows(TABLE[:, 0], [-1, -1]),
        rows(TABLE[:0, 0], [-5]),
        rows(TABLE[:, 0], torch.tensor([-1])),
    ],
    ids=str,
)
def test_last_of_nothing(source):
    refused(torch.zeros(4, dtype=INT), source, RuntimeError, "last", "yields nothing", fill="last")


@pytest.mark.parametrize("fill", ["first", "Last", "", "0", b"last"], ids=repr)
def test_fills_that_are_no_number(fill):
    refused(torch.zeros(4, dtype=INT), [1], TypeError, repr(fill), 'expected None, "last" or a number', fill=fill)


# --- memory -------------------------------------------------------------------------------------------------------


def parts_of(buffer, device="cpu"):
    """By the name of a part: a source that has this tensor, of three int64, for it."""
    host, table = [0, 1], torch.zeros(3, 4, dtype=torch.int64, device=device)
    return {
        "table": lambda: rows(buffer, host),
        "index": lambda: rows(table[:, 0], buffer),
        "lengths": lambda: rows(table, [0, 1, 2], buffer),
        "table of the lengths": lambda: rows(table, host, rows(buffer, host)),
        "index of the lengths": lambda: rows(table, [0, 1, 2], rows([1, 2, 3], buffer)),
        "lengths of sums": lambda: cu_seqlens(buffer),
        "source": lambda: plus(buffer, 1),
        "copied": lambda: plus(buffer, 0),
    }


PARTS = list(parts_of(None))
SHAPES = {"lengths": (3, 4), "table of the lengths": (3, 4), "index of the lengths": (3, 4)}


def of_pair(part, pair):
    """How a text names the part of a pair."""
    part = {"lengths of sums": "lengths"}.get(part, part)
    return f"pair {pair}: source " if part in ("source", "copied") else f"{part} of pair {pair} "


def refuses_part(part, tensor, *words, ways=tuple(WAYS)):
    dst = torch.zeros(SHAPES.get(part, (4,)), dtype=torch.int64)
    called = of_pair(part, AT).replace(f"pair {AT}: source ", "source ").replace(f"pair {AT} ", f"pair {AT} (wrong) ")
    refused(dst, parts_of(tensor)[part](), RuntimeError, called, *words, ways=ways)


@pytest.mark.parametrize("part", PARTS)
def test_parts_that_share_memory_with_a_destination(part):
    """Whatever pair has the part, and whichever has the destination: its own as well."""
    for at, of in itertools.product(range(3), range(3)):
        memory = torch.zeros(32, dtype=torch.int64)
        dst = [torch.zeros(SHAPES.get(part, (4,)) if i == at else (4,), dtype=torch.int64) for i in range(3)]
        end = 2 + dst[of].numel()
        dst[of] = memory[2:end].view(dst[of].shape)
        src = [torch.ones((1,) * d.dim(), dtype=torch.int64) for d in dst]
        for first in (0, end - 1):
            src[at] = parts_of(memory[first : first + 3])[part]()
            for call in (fused_copy.replay, lambda dst, src: fused_copy.Plan(dst).replay(*src), through_reference):
                with pytest.raises(
                    RuntimeError, match=f"{of_pair(part, at)}shares memory with the destination"
                ) as caught:
                    call(dst, src)
                assert (f"the destination of pair {of}" in str(caught.value)) == (at != of)
                assert not memory.any()
                assert not any(d.any() for d in dst)
        src[at] = parts_of(memory[end : end + 3])[part]()  # beside it
        fused_copy.replay(dst, src)
        assert any(d.any() for d in dst)


@pytest.mark.parametrize("part", PARTS)
def test_parts_may_share_memory_with_a_destination_that_is_left_out(part):
    """A call writes nothing there, so it is what the same call without that pair reads."""
    for call in (fused_copy.replay, lambda dst, src: fused_copy.Plan(dst).replay(*src), through_reference):
        memory = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])
        left_out, written, expected = memory[:4], memory[4:], torch.zeros(SHAPES.get(part, (4,)), dtype=torch.int64)
        fused_copy.replay([expected], [parts_of(memory[1:4].clone())[part]()])
        dst = torch.zeros_like(expected)
        call([left_out, dst, written], [None, parts_of(memory[1:4])[part](), None])
        assert torch.equal(dst, expected)
        for src in (memory[3:6], memory[4:7]):  # which is in both, and in the written one alone
            with pytest.raises(RuntimeError, match="shares memory with the destination of pair 2"):
                call([left_out, dst, written], [None, parts_of(src)[part](), [7, 7]])
        assert memory.tolist() == [0, 1, 0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("written", [0, 2])
def test_a_tensor_may_be_a_destination_that_is_left_out(written):
    memory = torch.arange(8, dtype=INT)
    dst = torch.zeros(4, dtype=INT)
    fused_copy.replay([memory[:4], dst, memory[4:]], [None, memory[2:6], None])
    assert dst.tolist() == [2, 3, 4, 5] and memory.tolist() == list(range(8))
    src = [None, memory[2:6], None]  # in both of the others, of which one is written
    src[written] = [1]
    with pytest.raises(RuntimeError, match=f"shares memory with the destination of pair {written}"):
        fused_copy.replay([memory[:4], dst, memory[4:]], src)


@pytest.mark.parametrize("part", PARTS)
def test_freed_parts(part):
    tensor = torch.zeros(3, dtype=torch.int64)
    tensor.untyped_storage().resize_(16)
    refuses_part(part, tensor, "needs 24 bytes of storage but 16 are there")
    tensor.untyped_storage().resize_(0)
    refuses_without_names(part, tensor, "of shape .* needs 24 bytes of storage but 0 are there")


def refuses_without_names(part, tensor, text):
    """For tensors that go through the dispatcher."""
    dst = torch.zeros(SHAPES.get(part, (4,)), dtype=torch.int64)
    for way in ("function", "plan", "reference", "fallback"):
        with pytest.raises(RuntimeError, match=of_pair(part, 0) + text):
            WAYS[way]({"a": dst}, {"a": parts_of(tensor)[part]()}, {})
        assert not dst.any()


@pytest.mark.parametrize("part", PARTS)
def test_parts_without_plain_memory(part):
    strict = [way for way in WAYS if way != "fallback"]  # torch's operators resolve it
    refuses_part(part, torch._neg_view(torch.zeros(3, dtype=torch.int64)), "conjugate or negative bit", ways=strict)
    refuses_without_names(
        part, torch.zeros(3, dtype=torch.int64, device="meta"), "is on meta and the destination on cpu"
    )
    for sparse in (torch.ones(3, dtype=torch.int64).to_sparse(), torch.eye(3, dtype=torch.int64).to_sparse_csr()):
        refuses_without_names(part, sparse, "is not a strided tensor")


@pytest.mark.parametrize("part", PARTS)
def test_fake_parts_of_real_destinations(part):
    with FakeTensorMode():
        fake = torch.zeros(3, dtype=torch.int64)
    dst = torch.zeros(SHAPES.get(part, (4,)), dtype=torch.int64)
    with pytest.raises((RuntimeError, TypeError, AssertionError)):
        fused_copy.replay([dst], [parts_of(fake)[part]()])
    assert not dst.any()


@pytest.mark.parametrize("part", [part for part in PARTS if part not in ("table", "copied")])
def test_parts_at_odd_addresses(part):
    """Which a GPU could not read: a table's rows, and what is copied as it is, are bytes at any address."""
    odd = tensor_at(torch.zeros(64, dtype=torch.uint8), 1, Side((3,), (1,), torch.int64))
    refuses_part(part, odd, "at a multiple of the element size")


def test_a_table_at_an_odd_address():
    for dtype in (torch.int64, INT):
        buffer = torch.arange(64, dtype=torch.uint8)
        table = tensor_at(buffer, 1, Side((3, 2), (2, 1), torch.int64))
        dst = torch.zeros(1, 2, dtype=dtype)
        if dtype == INT:
            refused(dst, rows(table, [1]), RuntimeError, "table of pair 2", "at a multiple of the element size")
        else:
            fused_copy.replay([dst], [rows(table, [1])])
            assert as_bytes(dst).tolist() == [list(range(17, 33))]


@pytest.mark.parametrize(
    "source",
    [
        rows(TABLE, torch.tensor([0, 3])),
        rows(TABLE, torch.tensor([0.0])),
        rows(TABLE, torch.tensor([0]), torch.tensor([1, 2])),
        rows(TABLE, torch.tensor([[0]])),
        rows(TABLE.float(), torch.tensor([0])),
        rows(TABLE, torch.tensor([0] * 4)),
        rows(TABLE, torch.tensor([0]), None, 0),
    ],
)
def test_the_op_refuses_the_same(source):
    dst = [torch.zeros(3, dtype=INT), torch.zeros(3, 4, dtype=INT)]
    with pytest.raises(RuntimeError):
        torch.ops.fused_copy.replay_from(dst, *flatten(dst, [torch.ones(2, dtype=INT), source]))
    assert not any(d.any() for d in dst)
