"""Plan.replay on the CPU: the op's semantics and errors with destinations bound once."""

import threading

import pytest
import torch
from cases import after_step, decode_buffers, decode_step
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
    with pytest.raises(TypeError, match=r"pair 2 \('cu_seqlens_k'\).*NoneType"):
        plan.replay(*step[:2], None, *step[3:])
    with pytest.raises(TypeError, match=r"pair 6: source is NoneType"):  # which has no name
        plan.replay(*step, None)
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


def test_repr_is_a_table(buffers):
    text = repr(fused_copy.Plan(buffers, fill={"seq_lens": 1}))
    assert "6 destinations on cpu" in text
    assert any("seq_lens" in line and "int32[8]" in line and "fill 1" in line for line in text.splitlines())
    assert repr(fused_copy.Plan([])).endswith("no device")
