"""What the tests compile, with a GPU and without one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from itertools import islice
from pathlib import Path

import torch
from decode_example import SMALL, decode, small_loop
from torch._inductor.utils import run_and_get_code

import fused_copy

INT = torch.int32


class StaticBuffers(torch.nn.Module):
    """A step whose static buffers are the module's own."""

    def __init__(self, device: str = "cpu", fill: list[float] | None = None):
        super().__init__()
        self.fill = fill
        self.register_buffer("ids", torch.full((8,), 99, dtype=INT, device=device))
        self.register_buffer("table", torch.full((8, 40), 99, dtype=INT, device=device))

    def forward(self, ids, table):
        torch.ops.fused_copy.replay([self.ids, self.table], [ids, table], self.fill)
        return self.ids * 2, self.table.sum()


def aot_package(module: StaticBuffers, folder: Path) -> str:
    """Exports the module for batches of any size and compiles it ahead of time; the package's path."""
    sizes = {"bs": torch.export.Dim("bs", min=2, max=8), "width": torch.export.Dim("width", min=2, max=40)}
    exported = torch.export.export(
        module,
        (module.ids.new_zeros(3), module.ids.new_zeros(3, 17)),
        dynamic_shapes=({0: sizes["bs"]}, {0: sizes["bs"], 1: sizes["width"]}),
    )
    package = torch._inductor.aoti_compile_and_package(
        exported,
        package_path=str(folder / "step.pt2"),
        # Constants in assembly would ask for an executable stack: see docs/compile.md.
        inductor_configs={"cpp_cache_precompile_headers": False, "aot_inductor.use_consts_asm_build": False},
    )
    assert b"libstdc++.so" in Path(package).read_bytes(), (
        "the compiler put libstdc++ itself into the package, in which torch's code then crashes (docs/compile.md): "
        "set CXX to one that links libstdc++.so"
    )
    return package


def check_aot_package(folder: Path, device: str) -> None:
    """Exported, compiled ahead of time, and run by a process that only loads the package and the op."""
    runs = """
        import sys, torch, fused_copy
        import torch._inductor.codecache  # torch 2.10's loader forgets to
        step, like = torch._inductor.aoti_load_package(sys.argv[1]), {"dtype": torch.int32, "device": sys.argv[2]}
        for n, width in [(3, 17), (5, 9)]:
            doubled, total = step(torch.arange(n, **like), torch.ones(n, width, **like))
            print(doubled.tolist(), total.item())
    """
    package = aot_package(StaticBuffers(device), folder)
    command = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(runs), package, device]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first = 99 * (8 * 40 - 3 * 17) + 3 * 17
    second = first - 98 * (2 * 9)  # rows 3 and 4; the rows above them hold ones that far already
    assert done.stdout.splitlines() == [
        f"[0, 2, 4, 198, 198, 198, 198, 198] {first}",
        f"[0, 2, 4, 6, 8, 198, 198, 198] {second}",
    ]


@torch.inference_mode()
def check_decode_in_one_graph(device: str, times: int = 1, **options) -> list[str]:
    """The fill and the model that reads the buffers, compiled as one: the same tokens as both on their own.

    Each step runs ``times`` times. Returns the generated code.
    """
    torch.manual_seed(1)
    model = decode.Llama(dataclasses.replace(SMALL, layers=1)).to(device)
    loop = small_loop(device)
    eager, compiled = decode.Way("copy_", model, loop), decode.Way("copy_", model, loop)
    for tensor in (*compiled.buffers.values(), compiled.cache):
        torch._dynamo.mark_static_address(tensor)

    rows = {name: loop.max_bs + (name == "cu_seqlens_k") for name in compiled.buffers}

    def step(buffers, sources):
        fused_copy.replay(buffers, sources)
        return model({name: b[: rows[name]] for name, b in buffers.items()}, compiled.cache)

    compiled_step = torch.compile(step, fullgraph=True, dynamic=True, **options)

    def run() -> None:
        # A batch of one would be compiled for itself.
        for index, sources in enumerate(made.sources for made in islice(loop, 12) if made.bs > 1):
            sources["input_ids"].remainder_(SMALL.vocab)
            decode.copy_each(eager.buffers, sources)
            eager.decode(loop.max_bs)
            for _ in range(times):
                torch.compiler.cudagraph_mark_step_begin()
                assert torch.equal(compiled_step(compiled.buffers, sources), eager.next_tokens), index

    _, generated = run_and_get_code(run)  # forgets what was compiled before, so not step by step
    return generated
