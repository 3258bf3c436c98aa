"""The decode example on the CPU: every way decodes the same tokens, and a wrong fill shows as wrong ones."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from decode_example import EXAMPLES, NAMES, SMALL, decode, forgetting, run, small_loop

from fused_copy.decode import capture_buffers


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small to share
    yield
    torch.set_num_threads(threads)


def test_every_way_decodes_the_same():
    results = run(["copy_", "foreach", "op", "plan"], steps=60)
    assert results["steps"] == 60 and results["requests"] > 5 and results["tokens"] > 60
    assert [row["way"] for row in results["rows"]] == ["copy_", "foreach", "op", "plan"]
    for row in results["rows"]:
        assert row["launches"] is None
        fill, step = row["fill"], row["step"]
        assert 0 < fill["median"] < step["median"]
        assert row["share"] == pytest.approx(fill["mean"] / step["mean"], abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_not_filled_shows_as_a_wrong_token(name, monkeypatch):
    monkeypatch.setitem(decode.WAYS, "forgetting", forgetting(name))
    with pytest.raises(decode.WrongToken, match="forgetting decoded"):
        run(["copy_", "forgetting"], steps=60)


@torch.inference_mode()
def test_paged_decode_is_the_whole_sequence_decoded_at_once():
    """One token a step over scattered pages, against the same model over the same tokens in order."""
    torch.manual_seed(1)
    model, loop = decode.Llama(SMALL), small_loop()
    way = decode.Way("plan", model, loop)
    tokens = torch.randint(SMALL.vocab, (9,), dtype=torch.int32)
    scattered = torch.randperm(loop.num_slots - 1)[:9].int() + 1
    way.prefill(1, tokens[:4], scattered[:4])
    by_step = [way.last_token[1]]
    for n in range(5, 10):
        inputs = capture_buffers(1, 12)
        for name, value in {
            "input_ids": tokens[n - 1],
            "out_loc": scattered[n - 1],
            "positions": n - 1,
            "seq_lens": n,
        }.items():
            inputs[name].fill_(value)
        inputs["cu_seqlens_k"][1] = n
        inputs["page_table"][0, :n] = scattered[:n]
        by_step.append(int(model(inputs, way.cache)))

    fresh = decode.Way("plan", model, loop)
    at_once = []
    for n in range(4, 10):
        fresh.prefill(1, tokens[:n], torch.arange(1, n + 1, dtype=torch.int32))
        at_once.append(fresh.last_token[1])
    assert by_step == at_once
    assert len(set(at_once)) > 1, "a model that always says the same would show nothing"


def test_command_line(tmp_path):
    command = [
        sys.executable,
        EXAMPLES / "decode.py",
        "--device",
        "cpu",
        "--steps",
        "12",
        "--json",
        tmp_path / "out.json",
    ]
    sizes = {
        "max-bs": 3,
        "max-seq-len": 32,
        "layers": 1,
        "hidden": 32,
        "heads": 2,
        "kv-heads": 1,
        "mlp": 32,
        "vocab": 64,
    }
    command += [f"--{name}={size}" for name, size in sizes.items()]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    assert "update: left out" in done.stderr
    assert "tokens are the same in copy_, foreach, op, plan" in " ".join(done.stdout.split())
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["machine"]["gpu"] is None and len(results["rows"]) == 4
    assert results["script_sha256"] == hashlib.sha256((EXAMPLES / "decode.py").read_bytes()).hexdigest()


def test_progress_and_sizes_on_a_terminal(tmp_path):
    """At the sizes for a CPU, which must not take minutes."""
    terminal, end = pty.openpty()
    command = [sys.executable, EXAMPLES / "decode.py", "--device", "cpu", "--ways", "plan", "--steps", "30"]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"TERM": "xterm"}, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    with suppress(OSError):  # the terminal's end
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    assert process.wait(timeout=300) == 0
    assert all(part in shown for part in (b" 33%", b" 67%", b"30 steps of up to 8 requests"))
