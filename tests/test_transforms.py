"""The copy under torch.func's transforms and torch.jit.trace, neither of which can see through it."""

from __future__ import annotations

import pytest
import torch
from torch import func
from torch.fx.experimental.proxy_tensor import make_fx

import fused_copy

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")

WAYS = {
    "op": lambda dst, src: torch.ops.fused_copy.replay(dst, src),
    "op_fill": lambda dst, src: torch.ops.fused_copy.replay(dst, src, [-1.0] * len(dst)),
    "function": lambda dst, src: fused_copy.replay(dst, src),
    "mapping": lambda dst, src: fused_copy.replay(dict(enumerate(dst)), dict(enumerate(src))),
    "plan": lambda dst, src: fused_copy.Plan(dst).replay(*src),
}
X = torch.arange(3.0)
TRANSFORMS = {
    "grad": lambda f: func.grad(f)(X),
    "vjp": lambda f: func.vjp(f, X)[1](torch.tensor(1.0))[0],
    "jvp": lambda f: func.jvp(f, (X,), (torch.ones(3),))[1],
    "jacrev": lambda f: func.jacrev(f)(X),
    "jacfwd": lambda f: func.jacfwd(f)(X),
    "hessian": lambda f: func.hessian(f)(X),
    "vmap": lambda f: func.vmap(f)(torch.stack([X, X])),
    "vmap_grad": lambda f: func.vmap(func.grad(f))(torch.stack([X, X])),
    "functionalize": lambda f: func.functionalize(f)(X),
}


@pytest.fixture(params=WAYS)
def copy(request):
    return WAYS[request.param]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("side", ["destination", "source", "both"])
def test_what_a_transform_follows_is_refused(copy, transform, side):
    first, plain_dst, plain_src = torch.zeros(2), torch.zeros(4), torch.ones(3)

    def f(x):
        dst = plain_dst if side == "source" else x.repeat(2)
        copy([first, dst], [torch.ones(1), plain_src if side == "destination" else x * 2])
        return dst.sum()

    inner = {"vjp": "grad", "jacrev": "grad", "jacfwd": "jvp", "hessian": "grad", "vmap_grad": "grad"}
    text = f"fused_copy: pair [01]: .* the {inner.get(transform, transform).capitalize()} transform of torch.func"
    with pytest.raises(RuntimeError, match=f"{text}.*: copy outside of the transform"):
        TRANSFORMS[transform](f)
    assert (first == 0).all() and (plain_dst == 0).all()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_plain_tensors_are_copied_inside_of_a_transform(copy, transform):
    dst, src = torch.zeros(4), torch.full((3,), 5.0)

    def f(x):
        copy([dst], [src])
        return (x * x).sum()

    expected = TRANSFORMS[transform](lambda x: (x * x).sum())
    assert torch.equal(TRANSFORMS[transform](f), expected)
    assert dst[:3].tolist() == [5, 5, 5]


def test_a_destination_that_requires_grad_is_refused_inside_of_a_transform(copy):
    dst = torch.zeros(4, requires_grad=True)

    def f(x):
        copy([dst], [torch.ones(3)])
        return x.sum()

    with pytest.raises(RuntimeError):
        func.grad(f)(X)
    assert (dst == 0).all()


@pytest.mark.parametrize("inside", [lambda f: f, func.grad, func.functionalize], ids=["", "grad", "functionalize"])
def test_make_fx_records_the_copy(copy, inside):
    dst, src = torch.zeros(4), torch.full((3,), 5.0)

    def f(x):
        copy([dst], [src])
        return (x * x).sum()

    graph = make_fx(inside(f))(X)
    dst.zero_()
    assert torch.equal(graph(X), inside(lambda x: (x * x).sum())(X))
    assert dst[:3].tolist() == [5, 5, 5]


def test_jit_trace_is_refused(copy):
    dst, src = torch.zeros(4), torch.ones(3)
    bound = fused_copy.Plan([dst]).replay

    for call in (lambda s: copy([dst], [s]), bound):

        def f(s, call=call):
            call(s)
            return dst + 1

        with pytest.raises(RuntimeError, match=r"fused_copy: torch\.jit\.trace would lose the copy"):
            torch.jit.trace(f, src, check_trace=False)
        assert (dst == 0).all()
        f(src)  # and afterwards all is as before
        assert dst[:3].tolist() == [1, 1, 1]
        dst.zero_()
