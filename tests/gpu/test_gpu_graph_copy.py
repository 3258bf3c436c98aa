"""The copy as a node of a captured graph: Plan.capture and GraphCopy.update."""

import gc
import threading
import time
import weakref
from collections import UserDict
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from cases import decode_buffers, decode_step
from test_gpu_replay import blocked, full, profiled, too_large, two_gpus
from test_threads import run_together

import fused_copy

NAMES = ("input_ids", "out_loc", "cu_seqlens_k", "positions", "seq_lens", "page_table")


def on(device, tensors):
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def step(bs, width, seed, device="cuda"):
    return on(device, decode_step(bs, width, seed=seed))


def captured(plan, sources, consume=lambda: None, stream=None, graph=None):
    graph = graph or torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, stream=stream):
        copy = plan.capture(graph, *sources.values())
        consume()
    return graph, copy


def corners_equal(buffers, sources):
    return all(
        torch.equal(buffers[name][tuple(slice(0, n) for n in source.shape)], source) for name, source in sources.items()
    )


@pytest.fixture
def buffers():
    return on("cuda", decode_buffers(8, 64))


@pytest.fixture
def plan(buffers):
    return fused_copy.Plan(buffers)


@pytest.mark.capture
def test_update_before_and_after_instantiation_changes_address_size_and_grid(buffers, plan):
    graph, copy = captured(plan, step(3, 20, seed=0))
    for seed, (bs, width) in enumerate([(5, 40), (8, 64), (1, 1), (8, 63), (2, 7)]):
        sources = step(bs, width, seed=seed)
        expected = {name: tensor.clone() for name, tensor in buffers.items()}
        fused_copy.replay(expected, sources)
        copy.update(*sources.values())
        graph.replay()
        assert all(torch.equal(buffers[name], expected[name]) for name in NAMES)


@pytest.mark.capture
def test_the_captured_sources_are_copied_until_an_update(buffers, plan):
    sources = step(4, 30, seed=3)
    graph, _ = captured(plan, sources)
    graph.replay()
    assert corners_equal(buffers, sources)


@pytest.mark.capture
def test_update_changes_dtype_strides_and_kernel(buffers, plan):
    graph, copy = captured(plan, step(4, 30, seed=0))
    sources = step(6, 50, seed=1)
    sources["out_loc"] = sources["out_loc"].long()
    sources["page_table"] = sources["page_table"].t().contiguous().t()
    sources["seq_lens"] = sources["seq_lens"][:1].expand(6)
    copy.update(*sources.values())
    graph.replay()
    assert corners_equal(buffers, {**sources, "out_loc": sources["out_loc"].int()})
    plain = step(3, 9, seed=2)
    copy.update(*plain.values())
    graph.replay()
    assert corners_equal(buffers, plain)


@pytest.mark.capture
def test_fill_follows_the_updated_sources():
    buffer = torch.full((8,), -7, dtype=torch.int32, device="cuda")
    plan = fused_copy.Plan([buffer], fill=[1])
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        copy = plan.capture(graph, torch.full((6,), 5, dtype=torch.int32, device="cuda"))
    for bs in (8, 2, 0, 5):
        source = torch.arange(10, 10 + bs, dtype=torch.int32, device="cuda")
        copy.update(source)
        graph.replay()
        assert buffer.tolist() == [*range(10, 10 + bs), *[1] * (8 - bs)]


@pytest.mark.capture
def test_a_copy_of_nothing_can_be_updated_to_one_of_something(buffers, plan):
    graph, copy = captured(plan, {name: tensor[:0] for name, tensor in step(1, 1, seed=0).items()})
    sources = step(4, 30, seed=1)
    copy.update(*sources.values())
    graph.replay()
    assert corners_equal(buffers, sources)


@pytest.mark.capture
@pytest.mark.blocked
def test_enqueued_launches_keep_their_sources():
    buffer = torch.zeros(4, dtype=torch.int64, device="cuda")
    log = torch.zeros(300, 4, dtype=torch.int64, device="cuda")
    at = torch.zeros(1, dtype=torch.int64, device="cuda")
    plan = fused_copy.Plan([buffer])
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        copy = plan.capture(graph, torch.zeros(4, dtype=torch.int64, device="cuda"))
        log.index_copy_(0, at, buffer[None])
        at.add_(1)
    graph.replay()
    at.zero_()
    values = torch.arange(1, 301, device="cuda")[:, None].expand(300, 4).contiguous()
    torch.cuda.synchronize()
    with blocked(torch.cuda.current_stream()) as still:
        for row in values:
            copy.update(row)
            graph.replay()
        assert still()
    torch.cuda.synchronize()
    assert torch.equal(log, values)


@pytest.mark.capture
def test_several_copies_and_plans_in_one_graph(buffers):
    other = on("cuda", decode_buffers(8, 64))
    plans = [fused_copy.Plan(buffers), fused_copy.Plan(other)]
    first = [step(2, 9, seed=i).values() for i in range(2)]
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        copies = [plan.capture(graph, *sources) for plan, sources in zip(plans, first, strict=True)]
    for seed in range(3):
        sources = [step(3 + seed, 20, seed=10 * seed + i) for i in range(2)]
        for copy, each in zip(copies, sources, strict=True):
            copy.update(*each.values())
        graph.replay()
        assert corners_equal(buffers, sources[0])
        assert corners_equal(other, sources[1])


@pytest.mark.capture
def test_a_long_list_takes_several_nodes_and_may_shrink():
    destinations = [torch.zeros(5, dtype=torch.int32, device="cuda") for _ in range(2500)]
    plan = fused_copy.Plan(destinations)
    sources = [torch.full((5,), i, dtype=torch.int32, device="cuda") for i in range(2500)]
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        copy = plan.capture(graph, *sources)
    assert copy.launches == fused_copy.explain(destinations, sources).launches > 1
    graph.replay()
    assert all(bool((d == i).all()) for i, d in enumerate(destinations))
    fewer = [torch.full((n,), -i, dtype=torch.int32, device="cuda") for i, n in enumerate([5] * 10 + [0] * 2490)]
    copy.update(*fewer)
    graph.replay()
    assert destinations[3].tolist() == [-3] * 5
    assert destinations[11].tolist() == [11] * 5


@pytest.mark.capture
def test_more_launches_than_nodes_is_refused_and_leaves_the_graph():
    destinations = [torch.zeros(5, dtype=torch.int32, device="cuda") for _ in range(2500)]
    few = [torch.ones(5 if i < 4 else 0, dtype=torch.int32, device="cuda") for i in range(2500)]
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        copy = fused_copy.Plan(destinations).capture(graph, *few)
    with pytest.raises(RuntimeError, match=r"need \d+ launches but the graph holds 1"):
        copy.update(*[torch.ones(5, dtype=torch.int32, device="cuda") for _ in range(2500)])
    graph.replay()
    assert destinations[3].tolist() == [1] * 5
    assert destinations[4].tolist() == [0] * 5


@pytest.mark.capture
def test_a_refused_update_leaves_the_node_as_it_was(buffers, plan):
    sources = step(4, 30, seed=0)
    graph, copy = captured(plan, sources)
    graph.replay()
    bad = dict(step(6, 40, seed=1), page_table=torch.zeros(6, 65, dtype=torch.int32, device="cuda"))
    with pytest.raises(RuntimeError, match=r"pair 5 \('page_table'\)"):
        copy.update(*bad.values())
    for buffer in buffers.values():
        buffer.fill_(-1)
    graph.replay()
    assert corners_equal(buffers, sources)
    assert int(buffers["input_ids"][4]) == -1


@pytest.mark.capture
def test_side_stream_inside_the_capture(buffers, plan):
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    side = torch.cuda.Stream()
    first = step(2, 9, seed=0).values()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            copy = plan.capture(graph, *first)
        torch.cuda.current_stream().wait_stream(side)
    sources = step(5, 33, seed=1)
    copy.update(*sources.values())
    graph.replay()
    assert corners_equal(buffers, sources)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")
@pytest.mark.capture
def test_graph_on_a_gpu_that_is_not_current():
    buffers = on("cuda:1", decode_buffers(8, 64))
    plan = fused_copy.Plan(buffers)
    stream = torch.cuda.Stream(1)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    first = step(2, 9, seed=0, device="cuda:1").values()
    with torch.cuda.device(1), torch.cuda.graph(graph, stream=stream):
        copy = plan.capture(graph, *first)
    torch.cuda.set_device(0)
    sources = step(5, 33, seed=1, device="cuda:1")
    copy.update(*sources.values())
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        graph.replay()
    torch.cuda.synchronize(1)
    assert corners_equal(buffers, sources)


def test_capture_outside_a_capture(plan):
    with pytest.raises(RuntimeError, match="not capturing"):
        plan.capture(torch.cuda.CUDAGraph(keep_graph=True), *step(2, 9, seed=0).values())


@pytest.mark.capture
def test_a_graph_that_does_not_keep_its_nodes(plan):
    graph = torch.cuda.CUDAGraph()
    sources = step(2, 9, seed=0)
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="keep_graph=True"):
        plan.capture(graph, *sources.values())


@pytest.mark.capture
def test_a_graph_that_was_captured_already(plan):
    sources = step(2, 9, seed=0)
    graph, _ = captured(plan, sources)
    with pytest.raises(RuntimeError, match="captured already"):
        plan.capture(graph, *sources.values())


@pytest.mark.capture
def test_update_during_the_capture(plan):
    sources = step(2, 9, seed=0)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        copy = plan.capture(graph, *sources.values())
        with pytest.raises(RuntimeError, match="still being captured"):
            copy.update(*sources.values())


@pytest.mark.capture
def test_update_after_the_graph_was_reset(plan):
    sources = step(2, 9, seed=0)
    graph, copy = captured(plan, sources)
    graph.replay()
    torch.cuda.synchronize()
    graph.reset()
    with pytest.raises(RuntimeError, match="was reset"):
        copy.update(*sources.values())


@pytest.mark.capture
def test_a_copy_captured_in_another_graph(plan):
    sources = step(2, 9, seed=0)
    named, graph = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        copy = plan.capture(named, *sources.values())
    with torch.cuda.graph(named):
        torch.zeros(1, device="cuda")
    with pytest.raises(RuntimeError, match="not captured in this graph"):
        copy.update(*sources.values())


class Odd(torch.Tensor):
    """A subclass, which is for the dispatcher."""


@pytest.mark.capture
def test_wrong_types(plan):
    sources = step(2, 9, seed=0)
    with pytest.raises(TypeError, match="CUDAGraph"):
        plan.capture(None, *sources.values())
    with pytest.raises(RuntimeError, match="on a GPU"):
        fused_copy.Plan([torch.zeros(4)]).capture(torch.cuda.CUDAGraph(keep_graph=True), torch.zeros(4))
    _, copy = captured(plan, sources)
    with pytest.raises(TypeError, match=r"pair 0 \(input_ids\)"):
        copy.update(object(), *list(sources.values())[1:])
    with pytest.raises(TypeError, match="plain tensors"):
        copy.update(sources["input_ids"].as_subclass(Odd), *list(sources.values())[1:])


@pytest.mark.capture
def test_update_holds_the_sources(plan, buffers):
    """Their memory must not be handed out again while the graph may still be launched."""
    graph, copy = captured(plan, step(2, 9, seed=0))
    sources = step(6, 40, seed=1)
    expected = {name: tensor.clone() for name, tensor in sources.items()}
    copy.update(*sources.values())
    del sources
    gc.collect()
    for seed in range(20):
        step(6, 40, seed=100 + seed)
    graph.replay()
    assert corners_equal(buffers, expected)


@pytest.mark.capture
def test_a_graph_instantiated_anew_begins_with_what_is_held(plan, buffers):
    """With the sources of the last update before it was first instantiated, whatever updates came after."""
    graph, copy = captured(plan, step(2, 9, seed=0))
    early = step(6, 40, seed=1)
    expected = {name: tensor.clone() for name, tensor in early.items()}
    copy.update(*early.values())
    graph.instantiate()
    later = step(6, 40, seed=2)
    copy.update(*later.values())
    graph.replay()
    assert corners_equal(buffers, later)
    del early
    gc.collect()
    for seed in range(20):
        step(6, 40, seed=100 + seed)
    graph.instantiate()
    graph.replay()
    assert corners_equal(buffers, expected)
    copy.update(*later.values())
    graph.replay()
    assert corners_equal(buffers, later)


@pytest.mark.capture
def test_a_capture_loop_that_replaces_its_copy_and_graph(plan, buffers):
    """The last round's copy is dropped within the capture: with it its graph would be, which ends the capture."""
    for seed in range(3):
        sources = step(4, 30, seed=seed)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            copy = plan.capture(graph, *sources.values())
        copy.update(*sources.values())
        graph.replay()
        assert corners_equal(buffers, sources)


@pytest.mark.capture
def test_update_after_the_graph_is_gone(plan):
    sources = step(2, 9, seed=0)
    graph, copy = captured(plan, sources)
    alive = weakref.ref(graph)
    del graph
    assert alive() is None, "something holds the graph"
    with pytest.raises(RuntimeError, match="graph that the copy was captured in is gone"):
        copy.update(*sources.values())


@pytest.mark.capture
def test_a_source_that_holds_its_copy_is_freed():
    source, graph = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph(keep_graph=True)
    plan = fused_copy.Plan([torch.zeros(4, device="cuda")])
    with torch.cuda.graph(graph):
        source.copy_in_graph = plan.capture(graph, source)
    source.copy_in_graph.update(source)
    alive = weakref.ref(source)
    del source
    for _ in range(2):  # the first look at a tensor's attributes makes a dictionary, on Python 3.12, that is too young
        gc.collect()
    assert alive() is None


@pytest.mark.capture
@pytest.mark.parametrize("mapping", [dict, UserDict], ids=lambda make: make.__name__)
def test_capture_and_update_by_name(plan, buffers, mapping):
    first, then = step(2, 9, seed=0), step(5, 33, seed=1)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        copy = plan.capture(graph, mapping(reversed(first.items())))
    graph.replay()
    assert corners_equal(buffers, first)
    copy.update(mapping(reversed(then.items())))
    graph.replay()
    assert corners_equal(buffers, then)
    with pytest.raises(KeyError, match=r"no source for \['positions'\]"):
        copy.update({name: source for name, source in then.items() if name != "positions"})
    with pytest.raises(TypeError, match="pass the mapping itself"):
        copy.update(**then)
    graph.replay()
    assert corners_equal(buffers, then)


MOVES = {
    "data": lambda b: setattr(b, "data", torch.full((8,), 7, dtype=b.dtype, device=b.device)),
    "set_": lambda b: b.set_(torch.full((8,), 7, dtype=b.dtype, device=b.device)),
    "resize_": lambda b: b.resize_(1 << 20),
    "storage freed": lambda b: b.untyped_storage().resize_(0),
}


@pytest.mark.capture
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("way", ["replay", "capture", "update"])
def test_a_destination_that_moved_is_noticed(plan, buffers, move, way):
    """What was its memory may be somebody else's by now."""
    sources = step(4, 30, seed=0)
    _graph, copy = captured(plan, sources)
    MOVES[move](buffers["positions"])
    others = [torch.full((8,), 3, dtype=torch.int32, device="cuda") for _ in range(50)]
    with pytest.raises(RuntimeError, match=r"pair 3 \('positions'\): destination .* bind a new plan"):
        if way == "replay":
            plan.replay(sources)
        elif way == "update":
            copy.update(sources)
        else:
            again = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(again):
                plan.capture(again, sources)
    torch.cuda.synchronize()
    assert all(bool((other == 3).all()) for other in others)


@pytest.mark.capture
def test_a_graph_writes_into_memory_that_its_plan_holds():
    """The tensor has left it, and nobody else got it."""
    buffer = torch.zeros(1024, device="cuda")
    plan = fused_copy.Plan([buffer])
    graph, copy = captured(plan, {"source": torch.ones(1024, device="cuda")})
    buffer.data = torch.zeros(4, device="cuda")
    others = [torch.full((1024,), 3.0, device="cuda") for _ in range(50)]
    graph.replay()
    torch.cuda.synchronize()
    assert all(bool((other == 3).all()) for other in others)
    del copy


@profiled
@pytest.mark.capture
def test_capture_and_update_have_names_in_the_profiler(plan):
    sources = step(2, 9, seed=0)
    with torch.profiler.profile() as profiler:
        graph, copy = captured(plan, sources)
        copy.update(sources)
        graph.replay()
    names = {event.key for event in profiler.key_averages()}
    assert {"fused_copy.Plan.capture", "fused_copy.GraphCopy.update"} <= names


@two_gpus
@pytest.mark.blocked
def test_a_gpu_that_stands_still_keeps_no_memory_of_another():
    plans = [fused_copy.Plan([torch.zeros(1 << 20, device=f"cuda:{i}")]) for i in range(2)]
    for plan in plans:
        plan.replay(torch.ones(1 << 20).pin_memory())
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    with blocked(torch.cuda.current_stream(0), seconds=2) as still:
        plans[0].replay(torch.ones(1 << 20).pin_memory())
        source = torch.ones(1 << 20).pin_memory()
        address = source.data_ptr()
        plans[1].replay(source)
        torch.cuda.synchronize(1)
        del source
        plans[1].replay(torch.ones(4).pin_memory())  # lets go of what was read
        assert torch.empty(1 << 20).pin_memory().data_ptr() == address
        assert still(), "waited for the other GPU"


@pytest.mark.capture
@pytest.mark.blocked
def test_captured_pinned_sources_outlive_the_copy_while_launches_read_them():
    buffer = torch.zeros(1024, dtype=torch.int64, device="cuda")
    source = torch.full((1024,), 7, dtype=torch.int64).pin_memory()
    graph, copy = captured(fused_copy.Plan([buffer]), {"source": source})
    graph.replay()
    torch.cuda.synchronize()
    buffer.zero_()
    with blocked(torch.cuda.current_stream()) as still:
        graph.replay()
        del copy, source
        gc.collect()
        churn = [torch.full((1024,), -1, dtype=torch.int64).pin_memory() for _ in range(40)]
        assert still()
    torch.cuda.synchronize()
    del churn
    assert bool((buffer == 7).all())


@pytest.mark.capture
def test_threads_that_update_one_copy_are_refused_or_wait(plan, buffers):
    """They must not, but if they do, every update is one whole step or an error."""
    graph, copy = captured(plan, step(2, 9, seed=0))
    steps = [step(6, 40, seed=seed) for seed in range(4)]

    def update(sources):
        for _ in range(5):
            try:
                copy.update(*sources.values())
            except RuntimeError as error:
                assert "another update" in str(error)

    run_together(*(partial(update, sources) for sources in steps))
    graph.replay()
    assert any(corners_equal(buffers, sources) for sources in steps)


@pytest.mark.capture
@pytest.mark.blocked
def test_pinned_sources_of_launches_under_way_are_not_handed_out_again():
    buffer = torch.zeros(1024, dtype=torch.int64, device="cuda")
    log = torch.zeros(20, 1024, dtype=torch.int64, device="cuda")
    at = torch.zeros(1, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    plan = fused_copy.Plan([buffer])
    first = torch.zeros(1024, dtype=torch.int64).pin_memory()
    with torch.cuda.graph(graph):
        copy = plan.capture(graph, first)
        log.index_copy_(0, at, buffer[None])
        at.add_(1)
    graph.replay()
    at.zero_()
    torch.cuda.synchronize()
    with blocked(torch.cuda.current_stream()) as still:
        for value in range(20):
            copy.update(torch.full((1024,), value, dtype=torch.int64).pin_memory())
            graph.replay()
        churn = [torch.full((1024,), -1, dtype=torch.int64).pin_memory() for _ in range(40)]
        assert still()
    torch.cuda.synchronize()
    del churn
    assert log[:, 0].tolist() == list(range(20))
    assert bool((log == log[:, :1]).all())


@contextmanager
def letting_go_waits(let_go):
    """A thread lets go of a copy's pinned sources. That marks where its stream's work ends, and the queue is full."""
    buffer, stream = torch.zeros(1024, device="cuda"), torch.cuda.Stream()
    before, after = (torch.full((1024,), value).pin_memory() for value in (1.0, 2.0))
    plan = fused_copy.Plan([buffer])
    graph, copy = captured(plan, {"source": before})
    graph.replay()
    copy.update(before)
    graph.replay()
    torch.cuda.synchronize()
    copies = [copy]
    del copy
    work = copies.clear if let_go == "drop" else partial(copies[0].update, after)

    def on_the_stream():
        with torch.cuda.stream(stream):
            work()

    thread = threading.Thread(target=on_the_stream)
    with full(stream, partial(plan.replay, before)) as still:
        thread.start()
        time.sleep(0.1)
        assert still(), "this thread did not run while the other waited"
        assert thread.is_alive(), "nothing waited: this proved nothing"
        yield still
    thread.join()
    buffer.zero_()
    graph.replay()
    assert bool((buffer == (1 if let_go == "drop" else 2)).all())


@pytest.mark.capture
@pytest.mark.blocked
@pytest.mark.parametrize("let_go", ["drop", "update"])
def test_pinned_sources_are_let_go_without_keeping_python(let_go):
    with letting_go_waits(let_go):
        pass


@two_gpus
@pytest.mark.capture
@pytest.mark.blocked
def test_pinned_sources_are_let_go_without_keeping_another_gpu():
    """With a lock held its calls would wait too, for ever where the full queue waits for them, as in a collective."""
    plan = fused_copy.Plan([torch.zeros(4, device="cuda:1")])
    source = torch.ones(4).pin_memory()
    plan.replay(source)
    plan.destinations[0].zero_()
    with letting_go_waits("drop") as still:
        plan.replay(source)
        assert plan.destinations[0].tolist() == [1] * 4
        assert still(), "waited for the other GPU"


@too_large
@pytest.mark.capture
def test_thousand_decode_steps_by_op_plan_and_update_equal_copy():
    from fused_copy.decode import DecodeLoop, capture_buffers, copy_each

    loop = DecodeLoop(device="cuda", seed=5)
    ways = {name: capture_buffers(loop.max_bs, loop.max_seq_len, "cuda") for name in ("copy", "op", "plan", "update")}
    plan = fused_copy.Plan(ways["plan"])
    updated = fused_copy.Plan(ways["update"])
    graph = copy = None
    for _ in range(1000):
        sources = next(loop).sources
        if graph is None:
            graph, copy = captured(updated, sources)
        copy_each(ways["copy"], sources)
        torch.ops.fused_copy.replay(list(ways["op"].values()), list(sources.values()))
        plan.replay(*sources.values())
        copy.update(*sources.values())
        graph.replay()
        same = [torch.equal(ways["copy"][name], ways[way][name]) for way in ("op", "plan", "update") for name in NAMES]
        assert all(same)
