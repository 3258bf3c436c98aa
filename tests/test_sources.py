"""What may stand for a source beside a tensor, against a reference that goes element by element."""

from __future__ import annotations

import array
import contextlib
import ctypes
import random
import re
import threading
import warnings
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
import torch
from cases import CAST_DTYPES
from entries import OP, through_reference
from hypothesis import given
from hypothesis import strategies as st
from mixes import name
from source_cases import as_bytes, random_case
from test_hazards import Recorder
from test_iterables import Subclass
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_copy
from fused_copy import cu_seqlens, plus, rows
from fused_copy.ops import flatten, unflatten

INT = torch.int32
TABLE = torch.arange(12, dtype=INT).view(3, 4)


def named(items):
    return {f"pair {i}": item for i, item in enumerate(items)}


def through_op(dst, src, fill):
    numbers = [None if number == "last" else number for number in fill]
    torch.ops.fused_copy.replay_from(dst, *flatten(dst, src), numbers, [number == "last" for number in fill])


def through_fallback(dst, src, fill):
    with fused_copy.backend("fallback"):
        fused_copy.replay(dst, src, fill)


def through_dispatcher(dst, src, fill):
    with Recorder() as recorder:
        fused_copy.replay(dst, src, fill)
    plain = all(isinstance(source, torch.Tensor) for source in src) and "last" not in fill
    op = torch.ops.fused_copy.replay if plain else torch.ops.fused_copy.replay_from
    assert op.default in recorder.seen, "slipped past the mode"


def through_subclasses(dst, src, fill):
    """Everything of a source that is a tensor or can become one."""
    names, parts, numbers = flatten(dst, src)
    fused_copy.replay(dst, unflatten(names, [part.as_subclass(Subclass) for part in parts], numbers), fill)


WAYS = {
    "function": fused_copy.replay,
    "names": lambda dst, src, fill: fused_copy.replay(named(dst), named(src), named(fill)),
    "plan": lambda dst, src, fill: fused_copy.Plan(dst, fill).replay(*src),
    "plan of names": lambda dst, src, fill: fused_copy.Plan(named(dst), named(fill)).replay(named(src)),
    "op": through_op,
    "dispatcher": through_dispatcher,
    "subclasses": through_subclasses,
    "reference": through_reference,
    "fallback": through_fallback,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seeds", range(0, 200, 10))
def test_random_calls(seeds, way):
    fallbacks = fused_copy.fallbacks()
    for seed in range(seeds, seeds + 10):
        case = random_case(seed, "cpu")
        WAYS[way](case.dst, case.src, case.fill)
        case.check()
    assert fused_copy.fallbacks() == fallbacks, "one launch can do all of them"


class Watched(torch.Tensor):
    """A tensor that sees the operators it is passed to."""

    seen: ClassVar[list[object]] = []

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        cls.seen.append(operator)
        with torch._C._DisableTorchDispatch():
            return operator(*args, **(kwargs or {}))


WITH_WATCHED = {
    "source": lambda watch: watch(torch.ones(3, dtype=INT)),
    "table": lambda watch: rows(watch(TABLE), torch.tensor([1])),
    "index": lambda watch: rows(TABLE, watch(torch.tensor([1]))),
    "lengths": lambda watch: rows(TABLE, torch.tensor([1]), watch(torch.tensor([2]))),
    "a table's lengths": lambda watch: rows(TABLE, torch.tensor([1]), rows(watch(torch.tensor([1, 2, 3])), [1])),
    "an index of lengths": lambda watch: rows(TABLE, [1], rows(torch.tensor([1, 2, 3]), watch(torch.tensor([1])))),
    "sums": lambda watch: cu_seqlens(watch(torch.tensor([1, 2]))),
    "plus": lambda watch: plus(watch(torch.tensor([1, 2])), 3),
}


@pytest.mark.parametrize("other", [torch.zeros(2, dtype=INT), [0, 0]], ids=["tensor", "list"])
@pytest.mark.parametrize("part", WITH_WATCHED)
def test_subclasses_see_the_op(part, other):
    plain_source = WITH_WATCHED[part](lambda tensor: tensor)
    source = WITH_WATCHED[part](lambda tensor: torch.Tensor._make_subclass(Watched, tensor))
    shape = (1, 4) if isinstance(source, rows) else (4,)
    for way in ("function", "plan"):
        dst = [torch.zeros(shape, dtype=INT), torch.ones(4, dtype=INT)]
        expected = [d.clone() for d in dst]
        fused_copy.replay(expected, [plain_source, other])
        Watched.seen = []
        WAYS[way](dst, [source, other], None)
        plain = part == "source" and isinstance(other, torch.Tensor)
        op = torch.ops.fused_copy.replay if plain else torch.ops.fused_copy.replay_from
        assert op.default in Watched.seen
        assert all(map(torch.equal, dst, expected))


@pytest.mark.parametrize("seed", range(60))
def test_a_plan_of_one_destination_takes_its_source_bare(seed):
    """A list or a tuple, which would pass for the list of all sources."""
    case = random_case(seed, "cpu", pairs=1)
    plan = fused_copy.Plan(case.dst, case.fill)
    for _ in range(2):
        case.rewind()
        plan.replay(*case.src)
        case.check()


def test_a_plans_next_call_reads_its_sources_anew():
    plan = fused_copy.Plan([torch.zeros(6, dtype=INT), torch.zeros(3, 4, dtype=INT)], ["last", 9])
    for n in (3, 0, 2, 5):
        lengths = list(range(n))
        plan.replay(cu_seqlens(lengths), rows(TABLE, [n % 3], [n]))
        sums = [0, *np.cumsum(lengths, dtype=int).tolist()]
        assert plan.destinations[0].tolist() == sums + [sums[-1]] * (5 - n)
        first = (TABLE[n % 3, :n].tolist() + [9] * 4)[:4]
        assert plan.destinations[1].tolist() == [first, [9] * 4, [9] * 4]


@pytest.mark.parametrize("to", [torch.int8, torch.int16, INT, torch.int64], ids=name)
@pytest.mark.parametrize(
    "make", [torch.Tensor.tolist, torch.Tensor.numpy, torch.clone], ids=["list", "array", "tensor"]
)
def test_sums_that_wrap(to, make):
    top = torch.iinfo(to).max
    for numbers in ([], [top], [top, 1], [top, top, top, 7], [-top, -2, -1], [top // 3 + 1] * 1000):
        lengths = torch.tensor(numbers, dtype=torch.int64)
        found = torch.full((len(numbers) + 1,), 9, dtype=to)
        fused_copy.replay([found], [cu_seqlens(make(lengths))])
        assert found[0] == 0
        assert torch.equal(found[1:], lengths.cumsum(0).to(to))


def test_rows_that_lie_far_apart():
    """Beyond what 32 bits count, in the table and in the destination."""
    rows_apart = (1 << 32) + 48
    table, out = (torch.empty(2 * rows_apart, dtype=torch.uint8).as_strided((2, 48), (rows_apart, 1)) for _ in range(2))
    table.copy_(torch.arange(96).view(2, 48))
    small = torch.zeros(2, 48, dtype=torch.uint8)
    fused_copy.replay([out, small], [table.flip(0), fused_copy.rows(table, [1, 0])])
    assert torch.equal(small, table.flip(0))
    fused_copy.replay([out], [fused_copy.rows(table, [0, 1])])
    assert torch.equal(out, table)


@pytest.mark.parametrize("seed", range(8))
def test_random_calls_compiled(seed):
    case = random_case(seed, "cpu")
    src = unflatten(*flatten(case.dst, case.src))  # tensors, as others are constants of the graph

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(dst, src):
        fused_copy.replay(dst, src, case.fill)

    for _ in range(2):
        case.rewind()
        step(case.dst, src)
        case.check()


def test_sources_made_in_compiled_code():
    counted = CompileCounterWithBackend("aot_eager")
    buffers = {
        "table": torch.zeros(8, 4, dtype=INT),
        "sums": torch.zeros(9, dtype=INT),
        "next": torch.zeros(8, dtype=INT),
        "host": torch.zeros(4),
        "as it is": torch.zeros(13),
    }
    plan = fused_copy.Plan(buffers, fill={"table": -1, "sums": "last", "host": 2})

    @torch.compile(fullgraph=True, dynamic=True, backend=counted)
    def step(table, index, lengths):
        plan.replay(
            {
                "table": rows(table, index, rows(lengths, index), 2),
                "sums": cu_seqlens(lengths=lengths),
                "next": plus(lengths, 1),
                "host": [0.5, 1],
                "as it is": None,
            }
        )

    for index, lengths in [([2, 0], [1, 3, 6]), ([1, 1, -1, 2], [5, 5, 8, 1, 0])]:
        table = torch.arange(8 * len(lengths), dtype=INT).view(len(lengths), 8)
        step(table, torch.tensor(index), torch.tensor(lengths))
        pages = [([int(table[i, 2 * j]) // 2 for j in range((lengths[i] + 1) // 2)] if i >= 0 else []) for i in index]
        pages += [[]] * (8 - len(index))
        assert buffers["table"].tolist() == [(row + [-1] * 4)[:4] for row in pages]
        sums = [0, *np.cumsum(lengths).tolist()]
        assert buffers["sums"].tolist() == sums + [sums[-1]] * (9 - len(sums))
        assert buffers["next"][: len(lengths)].tolist() == [length + 1 for length in lengths]
        assert buffers["host"].tolist() == [0.5, 1, 2, 2]
        assert buffers["as it is"].tolist() == [0] * 13
    assert counted.frame_count == 1, "sizes are no constants"


def test_opcheck():
    dst = [torch.zeros(4, 4, dtype=INT), torch.zeros(8, dtype=INT), torch.zeros(3, dtype=INT), torch.zeros(2)]
    index = torch.tensor([1, -1])
    src = [rows(TABLE, index, rows(index, index)), cu_seqlens(index), plus(index, 3), None]
    torch.library.opcheck(
        torch.ops.fused_copy.replay_from.default,
        (dst, *flatten(dst, src), [1.0, None, None, 2.0], [False, True, False, False]),
    )


# --- host values, against torch's own reading of them -------------------------------------------------------------


def numbers_for(dtype):
    """Lists of Python numbers whose values in this dtype are defined."""
    if dtype == torch.bool:
        return st.lists(st.booleans() | st.integers(0, 1) | st.floats(allow_nan=False))
    if dtype.is_floating_point:
        top = torch.finfo(dtype).max  # beyond it torch refuses some, and makes others infinite
        floats = st.floats(-top, top) | st.sampled_from([float("inf"), -float("inf"), -0.0, 1e-30])
        return st.lists(floats | st.integers(-int(min(top, 2**63)), int(min(top, 2**63 - 1))) | st.booleans())
    limits = torch.iinfo(dtype)
    floats = st.floats(float(limits.min), limits.max if limits.bits < 64 else float(np.nextafter(2.0**63, 0)))
    return st.lists(st.integers(limits.min, limits.max) | floats | st.booleans())


@pytest.mark.parametrize("call", [fused_copy.replay, through_reference], ids=["fused", "reference"])
@pytest.mark.parametrize("dtype", sorted(CAST_DTYPES, key=name), ids=name)
@given(data=st.data())
def test_any_list_becomes_what_torch_makes_of_it(call, dtype, data):
    numbers = data.draw(numbers_for(dtype))
    expected = torch.tensor(numbers, dtype=dtype)
    dst = torch.zeros(len(numbers) + 1, dtype=dtype)
    call([dst], [data.draw(st.sampled_from([list, tuple]))(numbers)], [1])
    assert np.array_equal(as_bytes(dst), as_bytes(torch.cat([expected, torch.ones(1, dtype=dtype)])))


@pytest.mark.parametrize("of", sorted(CAST_DTYPES - {torch.bfloat16}, key=name), ids=name)
@pytest.mark.parametrize("to", sorted(CAST_DTYPES, key=name), ids=name)
def test_any_array_is_cast_as_copy_does(of, to):
    """Of any strides, at any address, read-only."""
    values = torch.randint(0, 100, (6, 5)).to(of)
    numbers = values.numpy()
    odd = np.frombuffer(b"\0" + numbers.tobytes(), dtype=numbers.dtype, offset=1).reshape(6, 5)
    assert not odd.flags.aligned or of.itemsize == 1
    for make in (lambda a: a, lambda a: a.T, lambda a: a[::-1, ::-2], lambda a: a[1:1]):
        for way in (fused_copy.replay, through_reference):
            dst, expected = torch.full((2, 6, 6), 7).to(to), torch.full((6, 6), 7).to(to)
            source = make(numbers)
            expected[tuple(slice(0, size) for size in source.shape)].copy_(torch.from_numpy(source.copy()))
            way([dst[0], dst[1]], [source, make(odd)])
            assert torch.equal(dst[0], expected)
            assert torch.equal(dst[1], expected)


class Index:
    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number


class FloatWithIndex(float):
    """A float for torch.tensor."""

    def __index__(self):
        return 3


class ListOfSevens(list):
    """A list that iterates over other numbers than it keeps."""

    def __iter__(self):
        return iter([7] * len(self))


NUMBERS = [7, 7.9, True, Index(7), FloatWithIndex(7), Fraction(15, 2)]
NUMBERS += [np.int64(7), np.float32(7.9), np.array(7), np.bool_(True)]
IN_ONE_DIMENSION = [
    (7.9,),
    [np.int16(7)],
    [np.float32(7.9)],
    [Index(7)],
    [FloatWithIndex(7)],
    [Fraction(15, 2)],
    ListOfSevens([3]),
    array.array("q", [7]),
    memoryview(b"\7"),
    memoryview(b"\7\0\0\0").cast("@i"),
    (ctypes.c_int32 * 1)(7),
    type("numpy.ndarray", (array.array,), {})("i", [7]),  # by name alone
    np.array([7.9]),
]


@pytest.mark.parametrize(
    "way",
    [fused_copy.replay, lambda dst, src: fused_copy.Plan(dst).replay(*src), through_reference],
    ids=["function", "plan", "reference"],
)
def test_a_number_in_every_form(way):
    for number in NUMBERS:
        for shape in ((), (1,), (1, 1)):
            dst = torch.zeros(shape, dtype=INT)
            way([dst], [number])
            assert dst.sum() == int(float(number)), (number, shape)
    for numbers in IN_ONE_DIMENSION:
        dst = torch.zeros(1, dtype=INT)
        way([dst], [numbers])
        assert dst.tolist() == [7], numbers
        for shape in ((), (1, 1)):
            dst = torch.zeros(shape, dtype=INT)
            with pytest.raises(RuntimeError, match=f"expected {len(shape)} dimensions, got 1"):
                way([dst], [numbers])
            assert not dst.any()


def test_sources_are_named_tuples():
    """However they are made."""
    for made in (
        rows(1, 2),
        rows(1, index=2),
        rows(table=1, index=2),
        rows(1, 2, page_size=1),
        rows(1, 2, None),
    ):
        assert made == (1, 2, None, 1)
    assert rows(1, 2, 3, 4) == rows(1, 2, page_size=4, lengths=3) == (1, 2, 3, 4)
    assert rows(1, 2)._replace(lengths=3).lengths == 3
    assert plus(1, 2) == plus(1, n=2) == plus(n=2, source=1) == (1, 2)
    assert cu_seqlens(1) == cu_seqlens(lengths=1) == (1,)


# --- what happens around the call ---------------------------------------------------------------------------------


def test_values_are_taken_at_the_call():
    dst = [torch.zeros(3, dtype=INT) for _ in range(4)]
    src = [[1, 2, 3], np.array([1, 2, 3]), torch.tensor([1, 2, 3]), array.array("i", [1, 2, 3])]
    fused_copy.replay(dst, src)
    for source in src:
        for i in range(3):
            source[i] = 9
    assert [d.tolist() for d in dst] == [[1, 2, 3]] * 4


def test_a_list_that_another_thread_changes():
    """Copied as it was at one moment, or refused as it was at one."""
    dst, items, done = torch.zeros(8, dtype=INT), [1], threading.Event()

    def change():
        rng = random.Random(0)
        while not done.is_set():
            n = rng.randrange(1, 12)
            items[:] = [n] * n

    thread = threading.Thread(target=change)
    thread.start()
    try:
        refused = 0
        for _ in range(3000):
            dst.zero_()
            try:
                fused_copy.replay([dst], [items], [77])
            except RuntimeError:
                refused += 1
                assert not dst.any()
            else:
                n = int(dst[0])
                assert dst.tolist() == [n] * n + [77] * (8 - n)
    finally:
        done.set()
        thread.join()
    assert refused < 3000


class Meddler:
    """A number whose reading does something."""

    def __init__(self, act):
        self.act = act

    def __index__(self):
        self.act()
        return 5


@pytest.mark.parametrize(
    "change, left", [(lambda items: items.clear(), []), (lambda items: items.__setitem__(2, 4), [1, 4])]
)
def test_a_number_that_changes_the_list_it_is_in(change, left):
    dst = torch.zeros(6, dtype=INT)
    items = [1, Meddler(lambda: change(items)), 3]
    fused_copy.replay([dst], [items], [9])
    assert dst.tolist() == [1, 5, 3, 9, 9, 9]
    assert [item for item in items if not isinstance(item, Meddler)] == left


def test_a_number_that_copies():
    dst, other = torch.zeros(6, dtype=INT), torch.zeros(6, dtype=INT)
    fused_copy.replay([dst], [[1, Meddler(lambda: fused_copy.replay([other], [[7, 8]])), 3]])
    assert dst.tolist() == [1, 5, 3, 0, 0, 0]
    assert other.tolist() == [7, 8, 0, 0, 0, 0]


@pytest.mark.parametrize("victim", ["destination", "table", "index", "tensor"])
def test_a_number_that_frees_what_the_call_reads(victim):
    tensors = {
        "destination": torch.zeros(6, dtype=INT),
        "table": TABLE.clone(),
        "index": torch.tensor([1]),
        "tensor": torch.ones(3, dtype=INT),
    }
    number = Meddler(lambda: tensors[victim].untyped_storage().resize_(0))
    dst = [torch.zeros(6, dtype=INT), torch.zeros(1, 4, dtype=INT), torch.zeros(3, dtype=INT)]
    if victim == "destination":
        dst[0] = tensors["destination"]
    with pytest.raises(RuntimeError, match=r"0 are there: it was freed or resized"):
        fused_copy.replay(dst, [[1, number], rows(tensors["table"], tensors["index"]), tensors["tensor"]])
    assert not any(d.any() for d in dst if d.untyped_storage().nbytes())


def test_a_number_that_moves_a_plans_destination():
    dst = torch.zeros(6, dtype=INT)
    plan = fused_copy.Plan([dst])
    with pytest.raises(RuntimeError, match="bind a new plan"):
        plan.replay([1, Meddler(lambda: dst.set_(torch.zeros(6, dtype=INT)))])
    assert not dst.any()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("dtype", [INT, torch.float32, torch.int8, torch.bool], ids=name)
def test_what_a_number_raises_is_what_the_call_raises(dtype, error):
    def act(*_):
        raise error

    floating = type("Float", (), {"__float__": act})()
    dst, table = torch.zeros(4, dtype=dtype), torch.ones(2, 2, dtype=INT)
    for source in ([1, Meddler(act)], [1, floating], Meddler(act)):
        with pytest.raises(error):
            fused_copy.replay([dst if isinstance(source, list) else dst[:1]], [source])
    pages = torch.zeros(2, 2, dtype=INT)
    for source in (
        rows(table, [0, Meddler(act)]),
        rows(table, [0], [Meddler(act)]),
        rows(table, [0], None, Meddler(act)),
    ):
        with pytest.raises(error):
            fused_copy.replay([dst, pages], [None, source])
    with pytest.raises(error):
        fused_copy.replay([pages[0]], [plus([1], Meddler(act))])
    assert not dst.any()
    assert not pages.any()


def test_fake_sources():
    with FakeTensorMode():
        dst = [torch.zeros(2, 4, dtype=INT), torch.zeros(4, dtype=INT)]
        table, index = torch.zeros(3, 4, dtype=INT), torch.zeros(2, dtype=INT)
        fused_copy.replay(dst, [rows(table, index, rows(index, index)), [1, 2]], [1, "last"])
        for source, text in [
            (rows(table, torch.zeros(3, dtype=INT)), r"pair 0: source has shape \(3, 4\)"),
            (rows(table, index, None, 5), None),
            (cu_seqlens(index), r"pair 0: source has shape \(3,\)"),
            (plus(torch.zeros(2, 5, dtype=INT), 1), r"pair 0: source has shape \(2, 5\)"),
            ([1, 2], "pair 0"),
        ]:
            if text is None:
                fused_copy.replay(dst, [source, None])
                continue
            with pytest.raises(RuntimeError, match=text):
                fused_copy.replay(dst, [source, None])


@pytest.mark.parametrize(
    "names, parts, numbers",
    [
        (["what"], 1, [0]),
        (["rows"], 1, [0]),
        (["tensor"], 2, [0]),
        (["tensor"], 1, []),
        (["tensor", "none"], 1, [0, 0]),
    ],
)
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_lists_of_the_op_that_do_not_fit(names, parts, numbers, fake):
    dst = torch.zeros(2)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    told = "^fused_copy: " if fake or OP.tells_why else ""
    with mode, pytest.raises(RuntimeError, match=told):
        torch.ops.fused_copy.replay_from([dst], names, [torch.ones(2)] * parts, numbers)
    assert not dst.any()


@pytest.mark.parametrize("fill, last", [([1.0], [True, False]), ([1.0, None], [True]), (None, [True])])
def test_fills_of_the_op_that_do_not_fit(fill, last):
    dst = [torch.zeros(2), torch.zeros(2)]
    if fill and len(fill) == 1:
        dst = dst[:1]
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.fused_copy.replay_from(dst, ["none"] * len(dst), [], [0] * len(dst), fill, last)


# --- explain ------------------------------------------------------------------------------------------------------


def test_explain_tells_of_every_source():
    dst = {
        "list": torch.zeros(8, dtype=INT),
        "array": torch.zeros(2, 2),
        "number": torch.zeros(1),
        "none": torch.zeros(5),
        "rows": torch.zeros(3, 4, dtype=INT),
        "pages": torch.zeros(3, 4, dtype=torch.int64),
        "sums": torch.zeros(5, dtype=INT),
        "plus": torch.zeros(4, dtype=INT),
    }
    before = {key: d.clone() for key, d in dst.items()}
    told = fused_copy.explain(
        dst,
        {
            "list": [1, 2],
            "array": np.zeros((2, 1)),
            "number": 3.5,
            "none": None,
            "rows": rows(TABLE, [0, -1], [1, 2]),
            "pages": rows(TABLE, torch.tensor([0]), rows([1], [0]), 3),
            "sums": cu_seqlens(torch.tensor([1, 2])),
            "plus": plus(torch.arange(3, dtype=torch.int16), 5),
        },
        {"list": "last", "rows": 1},
    )
    assert all(torch.equal(dst[key], before[key]) for key in dst), "explain wrote"
    shapes = {pair.name: (pair.src_shape, pair.src_dtype) for pair in told.pairs}
    assert shapes == {
        "list": ((2,), INT),
        "array": ((2, 1), torch.float64),
        "number": ((1,), torch.float32),
        "none": ((0,), torch.float32),
        "rows": ((2, 4), INT),
        "pages": ((1, 2), INT),
        "sums": ((3,), torch.int64),
        "plus": ((3,), torch.int16),
    }
    paths = {pair.name: pair.path for pair in told.pairs}
    assert paths["none"] == "nothing to do"
    for key, words in {
        "list": ["values"],
        "array": ["values"],
        "number": ["values"],
        "rows": ["rows", "cut at lengths", "fill", "values"],
        "pages": ["pages of 3", "cut at lengths"],
        "sums": ["sums of 2"],
        "plus": ["integers plus 5"],
    }.items():
        assert all(word in paths[key] for word in words), paths[key]
    assert str(told).count("\n") == len(dst) + 1


def test_explain_says_what_long_sums_cost():
    def path(count, source, to, *others):
        sums = torch.zeros(count + 1, dtype=to), cu_seqlens(torch.ones(count, dtype=source))
        return fused_copy.explain(*zip(sums, *others, strict=True)).pairs[0].path

    assert path(1024, INT, INT).endswith("sums of 1024 by one warp")
    times = []
    for source, to in ((torch.int64, INT), (INT, torch.int64), (torch.int16, INT)):
        found = re.fullmatch(r".*sums of 50000 by one warp, some (\d+) us on a GPU", path(50000, source, to))
        times.append(int(found[1]))
    assert 100 <= times[0] < times[1] < times[2]
    other = torch.zeros(4, dtype=torch.float16), torch.ones(4, dtype=INT)  # makes the launch one that is not plain
    assert path(50000, INT, INT, other).endswith(f", some {times[2]} us on a GPU")


def test_explain_refuses_what_goes_through_the_dispatcher():
    with pytest.raises(TypeError, match="explain needs plain tensors"):
        fused_copy.explain([torch.zeros(1, 4, dtype=INT)], [rows(TABLE, torch.tensor([1]).as_subclass(Subclass))])


# --- fallback -----------------------------------------------------------------------------------------------------


def overlapping():
    d = torch.arange(12, dtype=INT).view(3, 4)
    return [d], [rows(d, [2, 1])], [[8, 9, 10, 11], [4, 5, 6, 7], [8, 9, 10, 11]], r"table of pair 0 shares memory"


def added_in_place():
    d = torch.arange(4, dtype=INT)
    return [d], [plus(d, 1)], [1, 2, 3, 4], r"pair 0.* shares memory"


def another_dtype():
    return (
        [torch.zeros(2, 4)],
        [rows(TABLE, [2, 0])],
        TABLE[[2, 0]].tolist(),
        r"table of pair 0 is int32 but .* float32",
    )


def conjugate():
    table = torch.complex(TABLE.float(), TABLE.float()).conj()
    return (
        [torch.zeros(1, 4, dtype=table.dtype)],
        [rows(table, [1])],
        table[1:2].tolist(),
        r"table of pair 0 has its conj",
    )


@pytest.mark.usefixtures("fallback")
@pytest.mark.parametrize("make", [overlapping, added_in_place, another_dtype, conjugate])
def test_fallback_does_what_torch_can(make):
    dst, src, expected, reason = make()
    count = fused_copy.fallbacks()
    with pytest.warns(RuntimeWarning, match=reason):
        fused_copy.replay(dst, src)
    assert dst[0].tolist() == expected
    assert fused_copy.fallbacks() == count + 1


@pytest.mark.usefixtures("fallback")
@pytest.mark.parametrize(
    "source, text",
    [
        (rows(TABLE, [0, 3]), "index of pair 1 has 3"),
        (rows(TABLE, [0] * 3), "larger in dimension 0"),
        (rows(TABLE, [0], [1, 1]), "lengths of pair 1 are 2"),
        (rows(TABLE, [0], None, 0), "page_size of pair 1 is 0"),
        (rows(TABLE, [[0]]), "index of pair 1"),
        (rows(TABLE, torch.zeros(1)), "index of pair 1 is float32"),
    ],
)
def test_fallback_refuses_what_torch_cannot_do_before_it_writes(source, text):
    """Though the table's dtype alone would be for torch's operators."""
    dst, count = [torch.zeros(3), torch.zeros(2, 4)], fused_copy.fallbacks()
    with warnings.catch_warnings(), pytest.raises((RuntimeError, TypeError), match=text):
        warnings.simplefilter("error")
        fused_copy.replay(dst, [torch.ones(2), source])
    assert not any(d.any() for d in dst)
    assert fused_copy.fallbacks() == count
