"""The op under torch.compile, under fake tensors and before torch's own checks of custom ops."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

import pytest
import torch
from cases import after_step, decode_buffers, decode_step
from compiled import (
    INT,
    StaticBuffers,
    aot_package,
    check_aot_package,
    check_aot_package_from_parts,
    check_decode_in_one_graph,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_copy

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch, while it imports inductor

replay_op = torch.ops.fused_copy.replay

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="inductor needs a C++ compiler"
)
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=needs_compiler)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# --- opcheck ------------------------------------------------------------------------------------------------------


def strided() -> tuple[list, list]:
    dst = [torch.zeros(4, 9)[:, :7], torch.zeros(30)[::3], torch.zeros(6, 5).T]
    src = [torch.rand(5, 3).T, torch.rand(1).expand(8), torch.rand(5, 6)]
    return dst, src


SAMPLES: dict[str, Callable[[], tuple]] = {
    "one": lambda: ([torch.zeros(5)], [torch.rand(3)]),
    "decode_step": lambda: (list(decode_buffers(8, 40).values()), list(decode_step(3, 17).values())),
    "strided": strided,
    "mixed_dtypes": lambda: (
        [torch.zeros(5, dtype=d) for d in (torch.bool, torch.bfloat16, torch.complex64)],
        [torch.ones(3, dtype=d) for d in (torch.bool, torch.bfloat16, torch.complex64)],
    ),
    "empty_tensors": lambda: ([torch.zeros(0), torch.zeros(4, 3)], [torch.zeros(0), torch.zeros(0, 3)]),
    "zero_dim": lambda: ([torch.zeros(())], [torch.ones(())]),
    "casts": lambda: (
        [torch.zeros(5, dtype=d) for d in (torch.int32, torch.bfloat16, torch.bool)],
        [torch.arange(3), torch.rand(3), torch.rand(3)],
    ),
    "fills": lambda: ([torch.zeros(5), torch.zeros(3, 4)], [torch.rand(3), torch.rand(2, 2)], [-1.0, 0.5]),
    "casts_and_fills": lambda: (
        [torch.zeros(5, dtype=INT), torch.zeros(4)],
        [torch.arange(3), torch.rand(2)],
        [-1, None],
    ),
    "fill_none": lambda: ([torch.zeros(5)], [torch.rand(3)], None),
    "fill_of_nones": lambda: ([torch.zeros(5), torch.zeros(2)], [torch.rand(3), torch.rand(2)], [None, None]),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample):
    results = torch.library.opcheck(replay_op.default, SAMPLES[sample]())
    assert set(results.values()) == {"SUCCESS"}


def test_schema_says_what_is_written():
    """Autograd, functionalization and inductor all believe this line."""
    assert str(replay_op.default._schema) == (
        "fused_copy::replay(Tensor(a!)[] dst, Tensor[] src, float?[]? fill=None) -> ()"
    )


# --- torch.compile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_cast_and_fill(entry, backend):
    def step(dst, src):
        entry(dst, src, [-1, None])

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    for n in (3, 5, 2):
        dst = [torch.zeros(6, dtype=INT), torch.zeros(6, dtype=torch.bfloat16)]
        compiled(dst, [torch.arange(n), torch.ones(n)])
        assert dst[0].tolist() == [*range(n), *[-1] * (6 - n)]
        assert dst[1].tolist() == [1] * n + [0] * (6 - n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_like_eager(entry, backend, dynamic):
    def step(dst, src):
        entry(dst, [s + 1 for s in src])
        return dst[0] * 2, dst[-1].sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for bs, width in [(3, 17), (5, 9)]:
        buffers, sources = decode_buffers(8, 40), decode_step(bs, width)
        expected = after_step(buffers, {k: s + 1 for k, s in sources.items()})
        doubled, total = compiled(list(buffers.values()), list(sources.values()))
        assert all(torch.equal(buffers[name], expected[name]) for name in buffers)
        assert torch.equal(doubled, expected["input_ids"] * 2)
        assert torch.equal(total, expected["page_table"].sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_mapping(backend):
    compiled = torch.compile(lambda dst, src: fused_copy.replay(dst, src), fullgraph=True, backend=backend)
    buffers, sources = decode_buffers(8, 40), decode_step(3, 17)
    expected = after_step(buffers, sources)
    compiled(buffers, dict(reversed(sources.items())))
    assert all(torch.equal(buffers[name], expected[name]) for name in buffers)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
def test_new_batch_sizes_do_not_recompile(entry, backend, how):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(
        lambda dst, src: entry(dst, src),
        fullgraph=True,
        backend=counter,
        dynamic=True if how == "dynamic=True" else None,
    )
    buffers = decode_buffers(32, 64)
    for seed, (bs, width) in enumerate([(3, 17), (5, 9), (24, 33), (2, 60), (31, 5)]):
        sources = decode_step(bs, width, seed=seed)
        if how == "mark_dynamic":
            for source in sources.values():
                for dim in range(source.dim()):
                    torch._dynamo.mark_dynamic(source, dim)
        expected = after_step(buffers, sources)
        compiled(list(buffers.values()), list(sources.values()))
        assert all(torch.equal(buffers[name], expected[name]) for name in buffers)
    assert counter.frame_count == 1


def test_it_stays_one_op(entry):
    counter = CompileCounterWithBackend("aot_eager")
    buffers, sources = decode_buffers(8, 40), decode_step(3, 17)
    torch.compile(lambda dst, src: entry(dst, src), fullgraph=True, backend=counter)(
        list(buffers.values()), list(sources.values())
    )
    (graph,) = counter.graphs
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert [str(c).removesuffix(".default") for c in calls] == ["fused_copy.replay"]


def body_of_call(code: str) -> str:
    """The generated function itself, without the comments, which name what the code came from."""
    lines = iter(code.splitlines())
    head = next(line for line in lines if line.lstrip().startswith("def call("))
    indent = len(head) - len(head.lstrip())
    body = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        if not line.lstrip().startswith("#"):
            body.append(line)
    return "\n".join(body)


def whole_buffers(buffers, sources):
    return list(buffers), list(sources)


def slices_of_buffers(buffers, sources):
    return [b[: s.shape[0]] for b, s in zip(buffers, sources, strict=True)], list(sources)


@needs_compiler
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("lists", [whole_buffers, slices_of_buffers], ids=lambda f: f.__name__)
def test_no_clone_of_destinations(entry, lists, dynamic):
    """Functionalized and put back in place: the generated code is the call, nothing is allocated or copied."""
    buffers, sources = decode_buffers(8, 40), decode_step(3, 40)
    expected = after_step(buffers, sources)
    compiled = torch.compile(lambda d, s: entry(*lists(d, s)), fullgraph=True, dynamic=dynamic)
    _, codes = run_and_get_code(compiled, list(buffers.values()), list(sources.values()))
    assert all(torch.equal(buffers[name], expected[name]) for name in buffers)
    (code,) = codes
    body = body_of_call(code)
    assert body.count("torch.ops.fused_copy.replay.default(") == 1
    assert not re.search(r"empty_strided|clone|copy_\(|cpp_fused|triton_|aten\.", body), body


@needs_compiler
def test_no_clone_where_the_result_is_used(entry):
    """The step that follows reads the buffers it was replayed into, not copies of them."""

    def step(dst, src):
        entry([dst], [src])
        return dst + 1

    dst = torch.zeros(16)
    result, codes = run_and_get_code(torch.compile(step, fullgraph=True), dst, torch.ones(9))
    assert torch.equal(dst, torch.cat([torch.ones(9), torch.zeros(7)]))
    assert torch.equal(result, dst + 1)
    assert body_of_call(codes[0]).count("empty_strided_cpu(") == 1, "one allocation, the result's"


@needs_compiler
def test_reduce_overhead(entry):
    """Without a GPU there is no CUDA graph to record, and the same result; with one, see tests/gpu."""
    compiled = torch.compile(lambda d, s: entry(d, s), fullgraph=True, mode="reduce-overhead")
    buffers = decode_buffers(8, 40)
    for seed in range(3):
        sources = decode_step(5, 9, seed=seed)
        expected = after_step(buffers, sources)
        compiled(list(buffers.values()), list(sources.values()))
        assert all(torch.equal(buffers[name], expected[name]) for name in buffers)


@needs_compiler
def test_inside_a_compiled_decode_step():
    generated = check_decode_in_one_graph("cpu")
    assert generated
    for code in generated:
        body = body_of_call(code)
        assert body.count("torch.ops.fused_copy.replay.default(") == 1
        for buffer in re.search(r"replay\.default\(\[(.*?)\]", body)[1].split(", "):
            assert buffer.startswith("arg"), f"a destination is {buffer}, not the static buffer itself"


@needs_compiler
def test_aot_inductor_package(tmp_path):
    check_aot_package(tmp_path, "cpu")


@needs_compiler
@pytest.mark.parametrize("last", [False, True], ids=["no fill", "fill last"])
def test_aot_inductor_package_from_parts(tmp_path, last):
    check_aot_package_from_parts(tmp_path, "cpu", last)


@needs_compiler
def test_aot_inductor_package_with_fill(tmp_path):
    """The loader says that it cannot, or it is filled."""
    package = aot_package(StaticBuffers(fill=[-1, 0]), tmp_path)
    try:
        step = torch._inductor.aoti_load_package(package)
    except RuntimeError as error:
        assert "NYI: Unsupported list type as_floats" in str(error)
    else:
        assert step(torch.arange(3, dtype=INT), t(3, 17))[0].tolist() == [0, 2, 4, *[-2] * 5]


def test_order_among_other_mutations_is_kept(entry):
    def step(dst, src):
        dst.fill_(5)
        entry([dst], [src])
        dst[0].add_(10)
        entry([dst], [src[1:] * 100])
        return dst.clone()

    def with_copy(dst, src):
        dst.fill_(5)
        dst[:3].copy_(src)
        dst[0].add_(10)
        dst[:2].copy_(src[1:] * 100)
        return dst.clone()

    a, b = torch.zeros(6), torch.zeros(6)
    src = torch.tensor([1.0, 2.0, 3.0])
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(a, src)
    assert torch.equal(result, with_copy(b, src))
    assert torch.equal(a, b)


# --- fake tensors -------------------------------------------------------------------------------------------------


def t(*size: int, dtype: torch.dtype = INT) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype)


# What shapes, dtypes and devices alone can tell: what comes, and what the text has to hold.
MISTAKES: dict[str, tuple[Callable[[], tuple[list, list]], tuple[str, ...]]] = {
    "lengths": (lambda: ([t(4), t(4)], [t(4)]), (r"\b2\b", r"\b1\b")),
    "rank": (lambda: ([t(4), t(4, 4)], [t(4), t(4)]), (r"\bpair 1\b", "dim|rank")),
    "size": (lambda: ([t(4), t(37)], [t(4), t(39)]), (r"\bpair 1\b", r"\b37\b", r"\b39\b")),
    "inner_size": (lambda: ([t(4), t(4, 37)], [t(4), t(3, 39)]), (r"\bpair 1\b", r"\b37\b", r"\b39\b")),
    "dtype": (
        lambda: ([t(4), t(4, dtype=torch.uint16)], [t(4), t(4, dtype=torch.float16)]),
        (r"\bpair 1\b", "uint16", "float16"),
    ),
    "complex_to_real": (
        lambda: ([t(4), t(4, dtype=torch.float32)], [t(4), t(4, dtype=torch.complex64)]),
        (r"\bpair 1\b", "float32", "complex64"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_fake_tensors_make_the_checks_that_metadata_allows(entry, kind, mistake):
    lists, words = MISTAKES[mistake]
    dst, src = lists()
    mode = FakeTensorMode()
    convert = mode.from_tensor if kind == "fake" else (lambda x: x.to("meta"))
    dst, src = [convert(x) for x in dst], [convert(x) for x in src]
    with pytest.raises(RuntimeError) as caught:
        entry(dst, src)
    if entry.tells_why:
        for word in words:
            assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_fake_tensors_that_are_right(entry, kind):
    mode = FakeTensorMode()
    convert = mode.from_tensor if kind == "fake" else (lambda x: x.to("meta"))
    buffers, sources = decode_buffers(8, 40), decode_step(3, 17)
    assert entry([convert(b) for b in buffers.values()], [convert(s) for s in sources.values()]) is None


def test_fake_host_sources_for_a_gpu_pass(entry):
    """They may be pinned, which a fake tensor cannot tell. The other way round, or another GPU, is refused."""
    with FakeTensorMode():
        on_gpu, on_host = torch.empty(3, dtype=INT, device="cuda:0"), torch.empty(3, dtype=INT)
        assert entry([on_gpu, on_gpu], [on_host, on_gpu]) is None
        for dst, src in [(on_host, on_gpu), (on_gpu, torch.empty(3, dtype=INT, device="cuda:1"))]:
            with pytest.raises(RuntimeError, match="pair 0: source is on" if entry.tells_why else None):
                entry([dst], [src])
        with pytest.raises(RuntimeError, match="pair 1: source is on" if entry.tells_why else None):
            entry([on_gpu, on_host], [on_gpu, on_host])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_while_compiling(entry, mistake):
    dst, src = MISTAKES[mistake][0]()
    before = [d.clone() for d in dst]
    with pytest.raises(Exception, match=r"fused_copy|replay"):
        torch.compile(lambda d, s: entry(d, s), fullgraph=True, backend="aot_eager")(dst, src)
    assert all(torch.equal(d, b) for d, b in zip(dst, before, strict=True))


# --- what eager mode refuses --------------------------------------------------------------------------------------


def in_plan(dst: list, src: list) -> None:
    fused_copy.Plan(dst).replay(*src)


COPIES = {"op": replay_op, "function": fused_copy.replay, "plan": in_plan}
REQUIRES_GRAD: dict[str, Callable[[], torch.Tensor]] = {
    "leaf": lambda: torch.zeros(3, requires_grad=True),
    "nonleaf": lambda: torch.zeros(3, requires_grad=True) * 2,
    "parameter": lambda: torch.nn.Parameter(torch.zeros(3)),
}


@pytest.fixture
def _no_caches():
    """What inductor's caches hold was compiled by another version of the package, maybe."""
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", REQUIRES_GRAD)
def test_compiled_destination_that_requires_grad_is_refused(copy, backend, kind):
    destination = REQUIRES_GRAD[kind]()
    compiled = torch.compile(lambda d, s: COPIES[copy]([d], [s]), fullgraph=True, backend=backend)
    with pytest.raises(RuntimeError, match="pair 0: destination requires grad while grad mode is on"):
        compiled(destination, torch.ones(2))
    assert destination.tolist() == [0, 0, 0]


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_compiled_intermediate_that_requires_grad_is_refused(copy, backend):
    def step(a, s):
        y = a * 2
        COPIES[copy]([y], [s])
        return (y * y).sum()

    with pytest.raises(RuntimeError, match="pair 0: destination requires grad while grad mode is on"):
        torch.compile(step, fullgraph=True, backend=backend)(torch.zeros(3, requires_grad=True), torch.ones(2))


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["inside", "outside", "inference_mode"])
def test_compiled_destination_that_requires_grad_is_written_without_grad_mode(copy, backend, where):
    def step(d, s):
        with torch.set_grad_enabled(torch.is_grad_enabled() and where != "inside"):
            COPIES[copy]([d], [s])
        return d * 2

    destination = REQUIRES_GRAD["parameter"]()
    off = {"inside": torch.enable_grad, "outside": torch.no_grad, "inference_mode": torch.inference_mode}[where]
    with off():
        result = torch.compile(step, fullgraph=True, backend=backend)(destination, torch.ones(2))
    assert destination.tolist() == [1, 1, 0]
    assert result.tolist() == [2, 2, 0]


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_compiled_buffers_beside_what_requires_grad(entry, backend):
    def step(weight, buffer, s):
        entry([buffer], [s])
        return (buffer * weight).sum()

    weight, buffer = torch.ones(3, requires_grad=True), torch.zeros(3)
    torch.compile(step, fullgraph=True, backend=backend)(weight, buffer, torch.ones(2)).backward()
    assert weight.grad.tolist() == [1, 1, 0]


@pytest.mark.filterwarnings("ignore:dynamo_pgo", "ignore:Error detected in MulBackward0")
@pytest.mark.usefixtures("_no_caches")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_overwriting_what_backward_needs_is_refused(entry, backend):
    """As copy_ is: while compiling, but with the backend `eager`, where backward notices."""

    def step(weight, buffer, s):
        result = (weight * buffer).sum()
        entry([buffer], [s])
        return result

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.compile(step, fullgraph=True, backend=backend)(
            torch.ones(3, requires_grad=True), torch.ones(3), torch.zeros(2)
        ).backward()


INT8 = torch.int8
REFUSED: dict[str, tuple[Callable[[], tuple], str]] = {
    "fill": (lambda: ([t(4), t(4, dtype=INT8)], [t(2), t(2)], [1, 300]), "pair 1: fill 300 cannot be held exactly"),
    "fraction": (lambda: ([t(4)], [t(2)], [1.5]), "pair 0: fill 1.5 cannot be held exactly"),
    "expanded": (lambda: ([t(4), t(1).expand(4)], [t(2), t(2)]), "pair 1: destination .* elements that share memory"),
    "overlapping": (lambda: ([t(9).as_strided((3, 3), (2, 2))], [t(3, 3)]), "pair 0: .* elements that share memory"),
    "opaque_dtype": (
        lambda: ([t(4, dtype=torch.uint8).view(torch.bits1x8)], [t(4, dtype=torch.uint8).view(torch.bits1x8)]),
        "pair 0: destination has a dtype that cannot be copied",
    ),
    "dimensions": (
        lambda: ([t(3, 3, 3, 3, 3)], [t(3, 3, 3, 3, 3).permute(4, 3, 2, 1, 0)]),
        "pair 0: source and destination need 5 dimensions",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_metadata_tells_is_refused_while_compiling_and_by_fakes(entry, mistake):
    arguments, text = REFUSED[mistake]
    with pytest.raises(RuntimeError, match=text):
        torch.compile(lambda *a: entry(*a), fullgraph=True, backend="eager")(*arguments())
    mode = FakeTensorMode()
    dst, src, *fill = arguments()
    with pytest.raises(RuntimeError, match=text if entry.tells_why else None):
        entry([mode.from_tensor(d) for d in dst], [mode.from_tensor(s) for s in src], *fill)


def test_symbolic_sizes_leave_the_other_checks(entry):
    dst = t(4, dtype=INT8)
    torch._dynamo.mark_dynamic(dst, 0)
    counter = CompileCounterWithBackend("eager")
    with pytest.raises(RuntimeError, match="pair 0: fill 300 cannot be held exactly"):
        torch.compile(lambda d, s: entry([d], [s], [300]), fullgraph=True, backend=counter)(dst, t(2))
    assert counter.frame_count == 0, "found when it ran"


# --- a known bug of torch.compile ---------------------------------------------------------------------------------
# Up to torch 2.14 inductor turns `y = x.clone(); op([x], [y])` into `op([x], [x])` (pytorch issue 198031): the clone is
# dropped as useless while the graph is functional, and then `x` is found free to be written in place.


def shift_left(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    replay_op([x], [y[2:]])
    return x * 2


def overwrite_clone(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    replay_op([y], [x])
    return y * 2


@needs_compiler
@pytest.mark.xfail(torch.__version__ < "2.15", strict=True, reason="pytorch issue 198031", raises=RuntimeError)
def test_known_bug_clone_of_the_destination_as_source():
    x = torch.arange(8.0)
    expected = shift_left(x.clone())
    assert torch.equal(torch.compile(shift_left, fullgraph=True)(x), expected)


@needs_compiler
def test_known_bug_is_never_a_silent_wrong_result():
    """What inductor makes of it overlaps, and an overlap is refused."""
    x = torch.arange(8.0)
    before, expected = x.clone(), shift_left(x.clone())
    try:
        result = torch.compile(shift_left, fullgraph=True)(x)
    except RuntimeError:
        assert torch.equal(x, before)
    else:
        assert torch.equal(result, expected)


@needs_compiler
def test_known_bug_is_harmless_where_the_clone_is_the_whole_source():
    """Here the same memory comes as source and destination of one pair, which is the no-op that it should be."""
    x = torch.arange(8.0)
    assert torch.equal(torch.compile(overwrite_clone, fullgraph=True)(x), torch.arange(8.0) * 2)
    assert torch.equal(x, torch.arange(8.0))
