"""Plan.replay on the CPU: the op's semantics and errors with destinations bound once."""

import copy
import gc
import inspect
import multiprocessing
import pickle
import threading
import weakref
from collections import OrderedDict, UserDict

import numpy as np
import pytest
import torch
from cases import after_step, decode_buffers, decode_step
from entries import TORCH
from test_hazards import Recorder
from torch._subclasses import FakeTensorMode

import fused_copy


@pytest.fixture
def buffers():
    return decode_buffers(8, 64)


@pytest.mark.parametrize("named", [True, False])
def test_replays_a_decode_loop(buffers, named):
    plan = fused_copy.Plan(buffers if named else list(buffers.values()))
    for seed, (bs, width) in enumerate([(3, 20), (8, 64), (1, 1), (5, 63)]):
        step = decode_step(bs, width, seed=seed)
        expected = after_step(buffers, step)
        plan.replay(*step.values())
        assert all(torch.equal(buffers[name], expected[name]) for name in buffers)


def test_fill_follows_the_batch():
    buffer = torch.full((6,), 9)
    plan = fused_copy.Plan({"slots": buffer}, fill={"slots": -1})
    for bs in (6, 2, 0, 4):
        plan.replay(torch.arange(bs, dtype=torch.int32))
        assert buffer.tolist() == [*range(bs), *[-1] * (6 - bs)]


def test_errors_name_the_pair_and_write_nothing(buffers):
    plan = fused_copy.Plan(buffers)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    step = list(decode_step(4, 20, seed=0).values())
    with pytest.raises(RuntimeError, match=r"pair 5 \('page_table'\).*\[4, 65\].*\[8, 64\]"):
        plan.replay(*step[:5], torch.zeros(4, 65, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"pair 1 \('out_loc'\).*complex64"):
        plan.replay(step[0], torch.zeros(4, dtype=torch.complex64), *step[2:])
    with pytest.raises(RuntimeError, match=r"pair 0 \('input_ids'\).*shares memory"):
        plan.replay(buffers["out_loc"][:4], *step[1:])
    with pytest.raises(RuntimeError, match="6 destinations and 5 sources"):
        plan.replay(*step[:5])
    with pytest.raises(TypeError, match=r"source of pair 2 \(cu_seqlens_k\) is object"):
        plan.replay(*step[:2], object(), *step[3:])
    with pytest.raises(RuntimeError, match="6 destinations and 7 sources"):
        plan.replay(*step, object())
    assert all(torch.equal(buffers[name], before[name]) for name in buffers)


def test_destinations_are_checked_when_they_are_bound():
    buffer = torch.zeros(8)
    with pytest.raises(RuntimeError, match=r"pair 1 \('b'\).*shares memory with the destination of pair 0"):
        fused_copy.Plan({"a": buffer[:5], "b": buffer[4:]})
    with pytest.raises(RuntimeError, match=r"pair 0.*share memory"):
        fused_copy.Plan([torch.zeros(1).expand(4)])
    with pytest.raises(RuntimeError, match=r"pair 0 \('a'\).*0\.1.*float32"):
        fused_copy.Plan({"a": buffer}, fill={"a": 0.1})
    with pytest.raises(KeyError, match="nowhere"):
        fused_copy.Plan({"a": buffer}, fill={"nowhere": 1})
    with pytest.raises(TypeError, match="pair 0"):
        fused_copy.Plan([None])


def test_grad_mode_is_that_of_the_call():
    weight = torch.zeros(4, requires_grad=True)
    with torch.no_grad():
        plan = fused_copy.Plan([weight])
        plan.replay(torch.ones(4))
    with pytest.raises(RuntimeError, match=r"pair 0.*requires grad"):
        plan.replay(torch.zeros(4))
    assert weight.tolist() == [1] * 4


def test_a_saved_tensor_that_was_overwritten_is_noticed():
    buffer, weight = torch.ones(3), torch.ones(3, requires_grad=True)
    loss = (buffer * weight).sum()
    fused_copy.Plan([buffer]).replay(torch.zeros(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_subclasses_and_fake_tensors_go_through_the_op():
    buffer = torch.zeros(4)
    fused_copy.Plan([buffer]).replay(torch.nn.Parameter(torch.ones(2), requires_grad=False))
    assert buffer.tolist() == [1, 1, 0, 0]
    with FakeTensorMode():
        plan = fused_copy.Plan([torch.zeros(4)])
        plan.replay(torch.ones(2))
        with pytest.raises(RuntimeError, match="pair 0"):
            plan.replay(torch.ones(5))


def test_compiles_without_a_graph_break(buffers):
    plan = fused_copy.Plan(buffers)
    compiled = torch.compile(lambda *sources: plan.replay(*sources), fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, bs in enumerate((3, 5, 7)):
        step = decode_step(bs, 20 + bs, seed=seed)
        expected = after_step(buffers, step)
        compiled(*step.values())
        assert all(torch.equal(buffers[name], expected[name]) for name in buffers)


def test_reference_gives_the_same(buffers):
    step = decode_step(4, 30, seed=0)
    expected = after_step(buffers, step)
    with fused_copy.backend("reference"):
        fused_copy.Plan(buffers).replay(*step.values())
    assert all(torch.equal(buffers[name], expected[name]) for name in buffers)


def test_holds_its_destinations():
    plan = fused_copy.Plan([torch.zeros(1000)])
    churn = [torch.full((1000,), 7.0) for _ in range(50)]
    plan.replay(torch.ones(1000))
    assert all(bool((c == 7).all()) for c in churn)
    assert bool((plan.destinations[0] == 1).all())


def test_threads_share_a_plan():
    """They write the same values, as the copies of two threads have no order."""
    buffers = decode_buffers(8, 64)
    plan = fused_copy.Plan(buffers)
    step = decode_step(8, 64, seed=1)
    failures = []

    def work():
        try:
            for _ in range(500):
                plan.replay(*step.values())
                with pytest.raises(RuntimeError, match="pair 0"):
                    plan.replay(torch.zeros(9, dtype=torch.int32), *list(step.values())[1:])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(torch.equal(buffers[name], step[name]) for name in buffers)


@pytest.mark.parametrize("destination", [torch.zeros(2), torch.zeros(2, device="meta")], ids=["bound", "unbound"])
def test_replay_shows_its_signature(destination):
    signature = inspect.signature(fused_copy.Plan([destination]).replay)
    assert next(iter(signature.parameters)) == "sources"
    assert signature.parameters["sources"].kind is inspect.Parameter.VAR_POSITIONAL


def test_repr_is_a_table(buffers):
    text = repr(fused_copy.Plan(buffers, fill={"seq_lens": 1}))
    assert "6 destinations on cpu" in text
    assert any("seq_lens" in line and "int32[8]" in line and "fill 1" in line for line in text.splitlines())
    assert repr(fused_copy.Plan([])).endswith("no device")


# --- memory -------------------------------------------------------------------------------------------------------

MOVES = {
    "data": lambda b: setattr(b, "data", torch.full((1024,), 7.0)),
    "share_memory_": lambda b: b.share_memory_(),
    "set_": lambda b: b.set_(torch.full((1024,), 7.0)),
    "resize_": lambda b: b.resize_(1 << 20),
    "storage freed": lambda b: b.untyped_storage().resize_(0),
    "storage shortened": lambda b: b.untyped_storage().resize_(1023 * 4),
    "swapped": lambda b: torch.utils.swap_tensors(b, torch.full((1024,), 7.0)),
}


@pytest.mark.parametrize("way", ["fused", "reference", "fallback", "a mode"])
@pytest.mark.parametrize("move", MOVES)
def test_a_destination_that_moved(move, way):
    """What was its memory may be somebody else's by now."""
    buffer, other = torch.zeros(1024), torch.zeros(4)
    plan = fused_copy.Plan({"other": other, "moved": buffer})
    plan.replay(torch.ones(4), torch.ones(8))
    MOVES[move](buffer)
    others = [torch.full((1024,), 3.0) for _ in range(20)]
    other.zero_()
    there = buffer.untyped_storage().nbytes() > 0
    before = buffer.view(torch.uint8).clone() if there else None
    with pytest.raises(RuntimeError, match=r"pair 1 \('moved'\): destination .* bind a new plan"):
        if way == "a mode":
            with Recorder():
                plan.replay(torch.ones(4), torch.ones(8))
        else:
            with fused_copy.backend(way):
                plan.replay(torch.ones(4), torch.ones(8))
    assert not other.any()
    assert all(bool((o == 3).all()) for o in others)
    if there:
        assert torch.equal(buffer.view(torch.uint8), before)


def test_a_destination_whose_storage_was_shortened_in_place():
    """By another tensor of the same storage, without a move."""
    memory = bytearray(64)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    plan = fused_copy.Plan([buffer])
    buffer.set_(torch.frombuffer(memory, dtype=torch.uint8, count=32).untyped_storage(), 0, (32,))
    with pytest.raises(RuntimeError, match=r"pair 0: destination has 32 bytes of storage left where the plan needs 64"):
        plan.replay(torch.ones(8, dtype=torch.uint8))
    assert not any(memory)


def test_a_plan_holds_the_memory_that_a_tensor_left():
    memory = np.zeros(8, dtype=np.float32)
    alive = weakref.ref(memory)
    buffer = torch.from_numpy(memory)
    plan = fused_copy.Plan([buffer])
    del memory
    buffer.data = torch.zeros(4)
    gc.collect()
    assert alive() is not None
    del plan
    gc.collect()
    assert alive() is None


def test_what_does_not_move_a_destination():
    buffer = torch.zeros(8)
    plan = fused_copy.Plan({"b": buffer})
    buffer.resize_(4)
    plan.replay(torch.ones(6))
    buffer.resize_(8)
    assert buffer.tolist() == [1] * 6 + [0] * 2
    buffer.requires_grad_()
    with torch.no_grad():
        plan.replay(torch.full((2,), 5.0))
    assert buffer.tolist() == [5] * 2 + [1] * 4 + [0] * 2


def test_an_empty_destination_may_move():
    empty = torch.zeros(0)
    plan = fused_copy.Plan([empty])
    empty.set_(torch.zeros(5))
    plan.replay(torch.zeros(0))


# --- by name ------------------------------------------------------------------------------------------------------


class Odd(torch.Tensor):
    """A subclass, which is for the dispatcher."""


@pytest.mark.parametrize("mapping", [dict, OrderedDict, UserDict], ids=lambda make: make.__name__)
@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
def test_a_mapping_is_matched_by_name(buffers, mapping, bound):
    if not bound:
        buffers["out_loc"] = buffers["out_loc"].as_subclass(Odd)
    plan = fused_copy.Plan(buffers)
    assert (plan._bound is not None) == bound
    step = decode_step(4, 20, seed=0)
    expected = after_step(buffers, step)
    plan.replay(mapping(reversed(step.items())))
    assert all(torch.equal(buffers[name], expected[name]) for name in buffers)


def test_names_that_do_not_fit(buffers):
    plan = fused_copy.Plan(buffers)
    step = decode_step(4, 20, seed=0)
    renamed = {("page_tabel" if name == "page_table" else name): source for name, source in step.items()}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    with pytest.raises(KeyError, match=r"no source for \['page_table'\], and source for \['page_tabel'\]"):
        plan.replay(renamed)
    with pytest.raises(KeyError, match=r"no source for \['positions'\]"):
        plan.replay({name: source for name, source in step.items() if name != "positions"})
    with pytest.raises(KeyError, match=r"source for \['more'\]"):
        plan.replay({**step, "more": step["positions"]})
    with pytest.raises(TypeError, match=r"source of pair 3 \(positions\) is object"):
        plan.replay({**step, "positions": object()})
    assert all(torch.equal(buffers[name], before[name]) for name in buffers)


def test_calls_that_were_meant_otherwise(buffers):
    plan, unnamed = fused_copy.Plan(buffers), fused_copy.Plan(list(buffers.values()))
    step = decode_step(4, 20, seed=0)
    for call, text in [
        (lambda: plan.replay(**step), "pass the mapping itself"),
        (lambda: plan.replay(list(step.values())), "pass them one by one"),
        (lambda: plan.replay(iter(step.values())), "pass them one by one"),
        (lambda: unnamed.replay(step), "have no names"),
        (lambda: plan.replay(object()), "pair 0"),
        (lambda: fused_copy.replay(list(buffers.values()), step), "sources are a mapping but destinations are not"),
    ]:
        with pytest.raises(TypeError, match=text):
            call()
    with pytest.raises(RuntimeError, match=r"replay\(dst, src\)"):
        fused_copy.replay(step, buffers)


def test_one_destination_and_one_mapping():
    buffer = torch.zeros(3)
    fused_copy.Plan({"only": buffer}).replay({"only": torch.ones(2)})
    assert buffer.tolist() == [1, 1, 0]


def test_a_mapping_under_compile(buffers):
    plan = fused_copy.Plan(buffers)
    step = decode_step(4, 20, seed=0)
    expected = after_step(buffers, step)
    torch.compile(lambda step: plan.replay(step), fullgraph=True, backend="eager")(dict(reversed(step.items())))
    assert all(torch.equal(buffers[name], expected[name]) for name in buffers)


# --- copies, pickles, garbage -------------------------------------------------------------------------------------


class Step(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("slots", torch.zeros(6))
        self.register_buffer("lens", torch.zeros(6)[1:])
        self.plan = fused_copy.Plan({"slots": self.slots, "lens": self.lens}, fill={"lens": 1})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_module_with_a_plan_is_copied(copied):
    """The copy's plan writes into the copy's buffers, and into nothing else."""
    module = Step()
    again = copied(module)
    again.plan.replay({"slots": torch.ones(2), "lens": torch.full((3,), 5.0)})
    assert again.slots.tolist() == [1, 1, 0, 0, 0, 0]
    assert again.lens.tolist() == [5, 5, 5, 1, 1]
    assert not module.slots.any()


@pytest.mark.parametrize("fill", [None, [1, None]])
def test_a_plan_without_names_is_copied(fill):
    plan = fused_copy.Plan([torch.zeros(2), torch.zeros(2)], fill)
    again = pickle.loads(pickle.dumps(plan))
    again.replay(torch.zeros(1), torch.ones(1))
    assert again.names is None
    assert again.fill == plan.fill
    assert [d.tolist() for d in again.destinations] == [[0, 0 if fill is None else 1], [1, 0]]


def replay_there(plan, queue):
    plan.replay({"a": torch.ones(2)})
    queue.put(plan.destinations[0].tolist())


def test_a_plan_is_passed_to_a_spawned_process():
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=replay_there, args=(fused_copy.Plan({"a": torch.zeros(3)}, {"a": 4}), queue))
    process.start()
    assert queue.get(timeout=120) == [1, 1, 4]
    process.join()


def test_a_tensor_that_holds_its_plan_is_freed():
    buffer = torch.zeros(3)
    buffer.plan = fused_copy.Plan([buffer])
    buffer.plan.replay(torch.ones(2))
    alive = weakref.ref(buffer)
    del buffer
    for _ in range(2):  # the first look at a tensor's attributes makes a dictionary, on Python 3.12, that is too young
        gc.collect()
    assert alive() is None


def test_a_kept_replay_keeps_the_plan():
    buffer = torch.zeros(3)
    replay = fused_copy.Plan([buffer]).replay
    gc.collect()
    replay(torch.ones(2))
    assert buffer.tolist() == [1, 1, 0]


# --- what the fast path takes -------------------------------------------------------------------------------------


def test_parameters_that_require_no_grad_are_bound():
    weight = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    plan = fused_copy.Plan([weight])
    assert "not on the fast path" not in repr(plan)
    plan.replay(torch.nn.Parameter(torch.ones(2)))
    assert weight.tolist() == [1, 1, 0]


def test_a_plan_made_under_a_mode_is_bound():
    buffer = torch.zeros(3)
    with Recorder():
        plan = fused_copy.Plan([buffer])
    assert "not on the fast path" not in repr(plan)
    with torch.device("meta"):
        within = fused_copy.Plan([buffer])
    assert "not on the fast path" not in repr(within)


def test_repr_says_why_a_plan_is_not_on_the_fast_path():
    plan = fused_copy.Plan({"plain": torch.zeros(1), "odd": torch.zeros(2).as_subclass(Odd)})
    assert "not on the fast path: destination odd is Odd" in repr(plan)
    plan.replay({"odd": torch.ones(1), "plain": torch.ones(1)})
    assert plan.destinations[1].tolist() == [1, 0]


def test_the_profiler_shows_calls_by_name():
    plan, dst, source = fused_copy.Plan({"a": torch.zeros(3)}), torch.zeros(3), torch.ones(2)
    with torch.profiler.profile() as profiler:
        plan.replay({"a": source})
        plan.replay(source)
        fused_copy.replay([dst], [source])
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["fused_copy.Plan.replay"] == 2
    assert counts["fused_copy.replay"] == 1
    with torch.profiler.profile() as profiler, pytest.raises(RuntimeError, match="pair 0"):
        plan.replay(source[:, None])
    assert "fused_copy.Plan.replay" in [event.key for event in profiler.key_averages()]


def test_memory_that_torch_withholds():
    """As of outputs of a CUDA graph tree's earlier generation: torch says why, and the pair is named."""
    held, there = torch.zeros(3), torch.zeros(3)
    plan = fused_copy.Plan({"held": held})
    torch._C._set_throw_on_mutable_data_ptr(held)
    for call in (
        lambda: fused_copy.replay({"a": there, "held": held}, {"a": there[:1].clone(), "held": there}),
        lambda: fused_copy.replay({"a": there}, {"a": held}),
        lambda: fused_copy.Plan({"held": held}),
        lambda: plan.replay(there),
    ):
        with pytest.raises(RuntimeError, match=r"pair \d( \('(a|held)'\))?: .*memory that torch refuses") as caught:
            call()
        assert "Cannot access data pointer" in str(caught.value)
    if TORCH >= (2, 13):
        with pytest.raises(RuntimeError, match=r"pair 0: source has memory .* Cannot access data pointer"):
            torch.ops.fused_copy.replay([there], [held])
    assert not there.any()
