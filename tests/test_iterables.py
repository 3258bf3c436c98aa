"""Tensors in whatever can be iterated: copied, or a TypeError, and never nothing done and nothing said."""

from __future__ import annotations

from collections import OrderedDict, UserDict, deque

import pytest
import torch
from test_hazards import Recorder
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_copy


class Subclass(torch.Tensor):
    """For the dispatcher, as every subclass is."""


KINDS = {
    "tensors": lambda size: torch.zeros(size),
    "parameters": lambda size: torch.nn.Parameter(torch.zeros(size)),
    "subclass": lambda size: torch.zeros(size).as_subclass(Subclass),
}

ITERABLES = {
    "list": list,
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda items: (item for item in items),
    "map": lambda items: map(lambda item: item, items),
    "filter": lambda items: filter(lambda item: True, items),
    "values": lambda items: dict(enumerate(items)).values(),
    "reversed": lambda items: reversed(items[::-1]),
    "deque": deque,
}


def function(dst, src, fill=None):
    fused_copy.replay(dst, src, fill)


def plan(dst, src, fill=None):
    fused_copy.Plan(dst, fill).replay(*src)


def under_a_mode(dst, src, fill=None):
    with Recorder():
        fused_copy.replay(dst, src, fill)


def reference(dst, src, fill=None):
    with fused_copy.backend("reference"):
        fused_copy.replay(dst, src, fill)


def fallback(dst, src, fill=None):
    with fused_copy.backend("fallback"):
        fused_copy.replay(dst, src, fill)


WAYS = [function, plan, under_a_mode, reference, fallback]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("iterable", ITERABLES)
def test_every_iterable_is_copied(way, kind, iterable):
    make = ITERABLES[iterable]
    dst = [KINDS[kind](4) for _ in range(3)]
    src = [KINDS[kind](2) for _ in range(3)]
    with torch.no_grad():
        for i, source in enumerate(src):
            source.fill_(i + 1)
        way(make(dst), make(src), make([7, None, 8.0]))
    assert [d.tolist() for d in dst] == [[1, 1, 7, 7], [2, 2, 0, 0], [3, 3, 8, 8]]


@pytest.mark.parametrize("make", [iter, lambda items: (item for item in items)], ids=["iterator", "generator"])
def test_iterators_under_compile(make):
    dst, src = [torch.zeros(4)], [torch.ones(2)]

    def call(dst, src):
        fused_copy.replay(make(dst), make(src))

    torch.compile(call, backend="eager")(dst, src)
    assert dst[0].tolist() == [1, 1, 0, 0]


def test_parameters_of_modules():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    with torch.no_grad():
        fused_copy.replay(a.parameters(), b.parameters())
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.bias, b.bias)


def test_iterators_of_fake_tensors_are_checked():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="pair 1"):
        fused_copy.replay(iter([torch.zeros(2), torch.zeros(2)]), iter([torch.zeros(2), torch.zeros(3)]))


def test_explain_takes_iterators():
    dst, src = [torch.zeros(4), torch.zeros(3)], [torch.ones(2), torch.ones(3)]
    explained = fused_copy.explain(iter(dst), iter(src), iter([1, None]))
    assert [pair.bytes for pair in explained.pairs] == [16, 12]
    assert explained.device == torch.device("cpu")


@pytest.mark.parametrize("mapping", [dict, OrderedDict, UserDict], ids=lambda make: make.__name__)
def test_mappings(mapping):
    dst = {"a": torch.zeros(2), "b": torch.zeros(3)}
    src = {"b": torch.ones(2), "a": torch.full((1,), 2.0)}
    fused_copy.replay(mapping(dst), mapping(src), mapping({"b": 5}))
    assert [d.tolist() for d in dst.values()] == [[2, 0], [1, 1, 5]]


# --- what is none -------------------------------------------------------------------------------------------------

ONE = torch.zeros(3, 3)


@pytest.mark.parametrize("wrong", [ONE, None, 5, "ab"], ids=lambda wrong: type(wrong).__name__)
@pytest.mark.parametrize(
    "call",
    [
        lambda wrong: fused_copy.replay(wrong, [ONE]),
        lambda wrong: fused_copy.replay([ONE], wrong),
        lambda wrong: fused_copy.explain(wrong, [ONE]),
        lambda wrong: fused_copy.Plan(wrong),
    ],
    ids=["destination", "source", "explain", "plan"],
)
def test_what_is_no_list_is_a_type_error(call, wrong):
    with pytest.raises(TypeError, match=rf"{type(wrong).__name__}: expected a list, a tuple or a mapping of tensors"):
        call(wrong)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_errors_of_an_iterator_pass(error):
    def items():
        yield torch.ones(2)
        raise error

    class List(list):
        def __iter__(self):
            raise error

    dst = torch.zeros(3)
    for sources in (items(), List([torch.ones(2)])):
        with pytest.raises(error):
            fused_copy.replay([dst], sources)
    assert not dst.any()
