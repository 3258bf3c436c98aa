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
from entries import TORCH
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

    def sample(self):
        """Arguments of any step, and which of their sizes are dynamic."""
        bs, width = torch.export.Dim("bs", min=2, max=8), torch.export.Dim("width", min=2, max=40)
        return (self.ids.new_zeros(3), self.ids.new_zeros(3, 17)), ({0: bs}, {0: bs, 1: width})


class StaticBuffersFromParts(torch.nn.Module):
    """The same from other sources: of these the table is on the device, and all others are host values."""

    def __init__(self, device: str = "cpu", last: bool = False):
        super().__init__()
        self.fill_last = [False, True, True, False] if last else None
        for name, shape in {"pages": (8, 12), "sums": (9,), "after": (8,), "ids": (8,)}.items():
            self.register_buffer(name, torch.full(shape, 99, dtype=INT, device=device))

    def forward(self, table, index, lengths, ids):
        torch.ops.fused_copy.replay_from(
            [self.pages, self.sums, self.after, self.ids],
            ["rows_lengths", "cu_seqlens", "plus", "tensor"],
            [table, index, lengths, lengths, lengths, ids],
            [2, 0, -1, 0],
            None,
            self.fill_last,
        )
        return self.pages + 1, self.sums + 1, self.after + 1, self.ids + 1

    def sample(self):
        dim = torch.export.Dim
        count, width, bs = dim("count", min=2, max=64), dim("width", min=2, max=24), dim("bs", min=2, max=8)
        host = (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=INT), torch.zeros(3, dtype=torch.int64))
        return (self.ids.new_zeros(5, 17), *host), ({0: count, 1: width}, {0: bs}, {0: bs}, {0: bs})


def aot_package(module: StaticBuffers | StaticBuffersFromParts, folder: Path) -> str:
    """Exports the module for batches of any size and compiles it ahead of time; the package's path."""
    arguments, sizes = module.sample()
    exported = torch.export.export(module, arguments, dynamic_shapes=sizes)
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


def run_package(package: str, folder: Path, device: str, runs: str) -> list[str]:
    """What a process prints that only loads the package and the op."""
    loads = """
        import sys, torch, fused_copy
        import torch._inductor.codecache  # torch 2.10's loader forgets to
        step, like = torch._inductor.aoti_load_package(sys.argv[1]), {"dtype": torch.int32, "device": sys.argv[2]}
    """
    script = textwrap.dedent(loads) + textwrap.dedent(runs)
    command = [sys.executable, "-X", "faulthandler", "-c", script, package, device]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def check_aot_package(folder: Path, device: str) -> None:
    """Exported, compiled ahead of time, and run elsewhere."""
    runs = """
        for n, width in [(3, 17), (5, 9)]:
            doubled, total = step(torch.arange(n, **like), torch.ones(n, width, **like))
            print(doubled.tolist(), total.item())
    """
    first = 99 * (8 * 40 - 3 * 17) + 3 * 17
    second = first - 98 * (2 * 9)  # rows 3 and 4; the rows above them hold ones that far already
    assert run_package(aot_package(StaticBuffers(device), folder), folder, device, runs) == [
        f"[0, 2, 4, 198, 198, 198, 198, 198] {first}",
        f"[0, 2, 4, 6, 8, 198, 198, 198] {second}",
    ]


def check_aot_package_from_parts(folder: Path, device: str, last: bool = False) -> None:
    """The same of rows with lengths and pages, sums, additions and host values, and an index beyond the table."""
    runs = """
        for index, width in [([-1, 4, 2], 17), ([-1, 4, 2, 0, 5], 10)]:
            table, lengths = torch.arange(6 * width, **like).view(6, width), torch.arange(len(index)) * 3
            host = torch.tensor(index), lengths.int(), lengths + 50
            results = step(table, *host)
            for values in host:
                values.fill_(77)
            print([result.tolist() for result in results])
        try:
            step(table, torch.tensor([0, 6]), torch.tensor([1, 1], dtype=torch.int32), torch.tensor([1, 1]))
        except RuntimeError:
            print("refused")
    """
    found = run_package(aot_package(StaticBuffersFromParts(device, last), folder), folder, device, runs)
    pages, sums, after, ids = [[99] * 12 for _ in range(8)], [99] * 9, [99] * 8, [99] * 8
    for index, width, line in [([-1, 4, 2], 17, found[0]), ([-1, 4, 2, 0, 5], 10, found[1])]:
        n, total = len(index), 0
        for i, row in enumerate(index):
            for j in range(0 if row < 0 else min(-(-3 * i // 2), -(-width // 2))):
                pages[i][j] = (row * width + 2 * j) // 2
            total += 3 * i
            sums[i : i + 2], after[i], ids[i] = [total - 3 * i, total], 3 * i - 1, 3 * i + 50
        if last:
            sums[n:], after[n:] = [total] * (9 - n), [after[n - 1]] * (8 - n)
        results = [
            [[page + 1 for page in row] for row in pages],
            *([x + 1 for x in buffer] for buffer in (sums, after, ids)),
        ]
        assert line == str(results)
    # A package of torch 2.9 prints what an op raises, and goes on.
    assert found[2:] == ["refused"] or TORCH < (2, 13)


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
