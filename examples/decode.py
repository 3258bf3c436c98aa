"""A decode: a small Llama-style model, a paged KV cache, CUDA graphs, and five ways to fill the graphs' static buffers.

    pip install '.[bench]'
    python examples/decode.py [--steps N] [--ways copy_,plan,update] [--json FILE]

The model's weights are random; everything else is what a serving engine does. Requests join with a prompt, which is
prefilled eagerly, decode greedily and leave; the running batch is padded to a captured size. A step begins as lists and
as rows of a page table: three ways make six tensors of them by torch's operators before they copy these, and a plan and
a graph's copy take them as they are. Each way has its own buffers, KV cache and graphs, and all ways take every step in
turn, so that a wrong fill shows at once as another token.
On a CPU the model is smaller and runs eagerly, and there is no graph whose copy could be updated: that checks the
tokens, and its times say nothing of a GPU's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import fused_copy
from fused_copy.decode import DecodeLoop, Request, Step, capture_buffers, copy_each, make_each
from fused_copy.sources import Source
from fused_copy.timing import Timing, machine

Tensors = Mapping[str, torch.Tensor]
Sources = Mapping[str, Source]  # of a step, as an engine has them
Fill = Callable[[Sources], None]


@dataclass(frozen=True)
class Config:
    """The model."""

    layers: int = 4
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 2
    mlp: int = 1024
    vocab: int = 4096

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class Attention(nn.Module):
    """Grouped-query attention over the pages of each row's sequence."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.q = nn.Linear(config.hidden, config.hidden, bias=False)
        self.kv = nn.Linear(config.hidden, 2 * config.kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor, inputs: Tensors, cache: torch.Tensor):
        rows = len(inputs["page_table"])
        q = rotate(self.q(x).view(rows, self.config.heads, -1), rope)
        k, v = self.kv(x).view(rows, 2, self.config.kv_heads, -1).unbind(1)
        cache[inputs["out_loc"]] = torch.stack([rotate(k, rope), v], dim=1)
        keys, values = cache[inputs["page_table"]].unbind(2)  # [rows, width, kv_heads, head_dim]
        attended = F.scaled_dot_product_attention(
            q[:, :, None], keys.transpose(1, 2), values.transpose(1, 2), mask, enable_gqa=True
        )
        return self.out(attended.reshape(rows, -1))


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm and beside a residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(config.hidden) for _ in range(2))
        self.attention = Attention(config)
        self.gate_up = nn.Linear(config.hidden, 2 * config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.hidden, bias=False)

    def forward(self, x: torch.Tensor, *context):
        x = x + self.attention(self.norms[0](x), *context)
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """One token for each row. A row sees the first ``seq_lens`` slots of its row of the page table.

    So a decode has a row for each request, and a prefill has a row for each token of the prompt.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(self, inputs: Tensors, cache: torch.Tensor) -> torch.Tensor:
        """The next token of each row; inputs as in fused_copy.decode, cache [layers, slots, 2, kv_heads, head_dim]."""
        table, cu_seqlens_k = inputs["page_table"], inputs["cu_seqlens_k"]
        # Attention kernels take the lengths twice, and here too both have to be right.
        lens = torch.minimum(inputs["seq_lens"], cu_seqlens_k[1:] - cu_seqlens_k[:-1])
        mask = (torch.arange(table.shape[1], device=table.device) < lens[:, None])[:, None, None]
        dim = torch.arange(0, self.config.head_dim, 2, device=table.device) / self.config.head_dim
        angles = inputs["positions"][:, None] / 10000**dim
        rope = torch.polar(torch.ones_like(angles), angles)[:, None]
        x = self.embedding(inputs["input_ids"])
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, rope, mask, inputs, layer_cache)
        return self.head(self.norm(x)).argmax(dim=-1)


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)


# --- five ways to fill --------------------------------------------------------------------------------------------


def copy_(way: Way, bs: int) -> Fill:
    return lambda made_of: copy_each(way.buffers, make_each(made_of))


def foreach(way: Way, bs: int) -> Fill:
    def fill(made_of: Sources) -> None:
        sources = make_each(made_of)
        corners = [b[tuple(map(slice, sources[name].shape))] for name, b in way.buffers.items()]
        torch._foreach_copy_(corners, list(sources.values()))

    return fill


def op(way: Way, bs: int) -> Fill:
    destinations = list(way.buffers.values())
    return lambda made_of: torch.ops.fused_copy.replay(destinations, list(make_each(made_of).values()))


def plan(way: Way, bs: int) -> Fill:
    return fused_copy.Plan(way.buffers).replay


def update(way: Way, bs: int) -> Fill:
    return way.copies[bs].update


WAYS = {function.__name__: function for function in (copy_, foreach, op, plan, update)}


class Way:
    """One way to fill, with its own static buffers, KV cache, tokens and graphs."""

    def __init__(self, name: str, model: Llama, loop: DecodeLoop) -> None:
        self.name = name
        self.model = model
        self.buffers = capture_buffers(loop.max_bs, loop.max_seq_len, loop.device)
        # Until the first step: lengths of 0 would put NaNs into the dummy slot.
        self.buffers["seq_lens"].fill_(1)
        self.buffers["cu_seqlens_k"].copy_(torch.arange(loop.max_bs + 1))
        self.next_tokens = torch.zeros(loop.max_bs, dtype=torch.int64, device=loop.device)
        weight, config = model.head.weight, model.config
        self.cache = weight.new_zeros(config.layers, loop.num_slots, 2, config.kv_heads, config.head_dim)
        self.last_token: dict[int, int] = {}  # of each running request, by its row
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.copies: dict[int, fused_copy.GraphCopy] = {}
        if loop.device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()
            for bs in reversed(loop.capture_sizes):
                self.capture(bs, pool)
        self.fills = {bs: WAYS[name](self, bs) for bs in loop.capture_sizes}
        self.fill_us: list[float] = []
        self.step_us: list[float] = []

    def capture(self, bs: int, pool: tuple[int, int]) -> None:
        """Captures the decode of ``bs`` rows. All graphs share one pool, and the largest comes first to size it."""
        self.decode(bs)  # what it sets up lazily must not be captured
        graph = self.graphs[bs] = torch.cuda.CUDAGraph(keep_graph=self.name == "update")
        with torch.cuda.graph(graph, pool=pool):
            if self.name == "update":
                some = capture_buffers(bs, 1, self.cache.device)  # until the first update
                self.copies[bs] = fused_copy.Plan(self.buffers).capture(graph, *some.values())
            self.decode(bs)

    def decode(self, bs: int) -> None:
        inputs = {name: buffer[: bs + (name == "cu_seqlens_k")] for name, buffer in self.buffers.items()}
        self.next_tokens[:bs] = self.model(inputs, self.cache)

    def prefill(self, row: int, prompt: torch.Tensor, slots: torch.Tensor) -> None:
        """Stores the prompt's keys and values into its slots, and has the first token ready."""
        lens = torch.arange(1, len(prompt) + 1, dtype=torch.int32, device=prompt.device)
        inputs = {
            "input_ids": prompt,
            "out_loc": slots,
            "cu_seqlens_k": F.pad(lens.cumsum(0), (1, 0)),
            "positions": lens - 1,
            "seq_lens": lens,
            "page_table": slots.expand(len(prompt), -1),
        }
        self.last_token[row] = int(self.model(inputs, self.cache)[-1])

    def step(self, rows: Sequence[int], step: Step) -> list[int]:
        """Decodes one token of each running request: the fill, the graph, and the tokens on the host. Timed."""
        made_of = {**step.made_of, "input_ids": [self.last_token[row] for row in rows] + [0] * (step.bs - len(rows))}
        fill = self.fills[step.bs]
        if self.graphs:
            torch.cuda.synchronize()
        start = time.perf_counter_ns()
        fill(made_of)
        filled = time.perf_counter_ns()
        if self.graphs:
            self.graphs[step.bs].replay()
        else:
            self.decode(step.bs)
        tokens = self.next_tokens[: len(rows)].tolist()
        self.step_us.append((time.perf_counter_ns() - start) / 1e3)
        self.fill_us.append((filled - start) / 1e3)
        self.last_token.update(zip(rows, tokens, strict=True))
        return tokens

    def launches(self, step: Step) -> int | None:
        """The kernels, copies and memsets that the fill enqueues, beside the graph. None on a CPU."""
        if not self.graphs:
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
            self.fills[step.bs](step.made_of)
            torch.cuda.synchronize()
        names = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum("Sync" not in name for name in names)  # some versions list the wait


@dataclass(frozen=True)
class Row:
    """One way: host time of its fill, and of the whole step from the fill to the tokens on the host, in us.

    ``share`` is of the time of all steps together: the ratio of the means, not of the medians.
    """

    way: str
    launches: int | None
    fill: dict[str, float]
    step: dict[str, float]
    share: float


class WrongToken(Exception):
    """Two ways decoded different tokens."""


@torch.inference_mode()
def run(
    names: Sequence[str],
    steps: int,
    loop: DecodeLoop,
    config: Config,
    seed: int = 0,
    done: Callable[[int], object] = lambda steps: None,
) -> dict[str, object]:
    """Takes the steps with every way, and calls ``done`` after each with their number.

    What ``--json`` writes, less the machine. Raises :class:`WrongToken`.
    """
    torch.manual_seed(seed)
    # In float32: in bfloat16 the two largest logits are often so nearly equal that rounding, which differs from one
    # graph to another, would decide a token now and then.
    model = Llama(config).to(loop.device)
    ways = [Way(name, model, loop) for name in names]
    prompts = torch.Generator().manual_seed(seed)
    known: dict[int, Request] = {}
    decoded = requests = 0
    for index, step in enumerate(islice(loop, steps)):
        rows = [request.row for request in loop.running]
        for request, slots in zip(loop.running, step.sources["page_table"], strict=False):
            if known.get(request.row) is not request:
                known[request.row] = request
                requests += 1
                prompt = torch.randint(config.vocab, (request.seq_len - 1,), generator=prompts, dtype=torch.int32)
                for way in ways:
                    way.prefill(request.row, prompt.to(loop.device), slots[: len(prompt)])
        # Whoever comes first finds the caches cold.
        turn = index % len(ways)
        tokens = {way.name: way.step(rows, step) for way in ways[turn:] + ways[:turn]}
        for name in names:
            if tokens[name] != tokens[names[0]]:
                raise WrongToken(
                    f"step {index} (bs {step.bs}, page table {step.max_seqlen_k} wide): {name} decoded {tokens[name]} "
                    f"where {names[0]} decoded {tokens[names[0]]}"
                )
        decoded += len(rows)
        done(index + 1)
    warm = steps // 10
    results = []
    for way in ways:
        fill_us, step_us = way.fill_us[warm:], way.step_us[warm:]
        share = round(sum(fill_us) / sum(step_us), 4)
        results.append(Row(way.name, way.launches(step), summary(fill_us), summary(step_us), share))
    return {
        "model": asdict(config) | {"dtype": "float32"},
        "loop": {
            "max_bs": loop.max_bs,
            "max_seq_len": loop.max_seq_len,
            "page_size": loop.page_size,
            "graphs": len(ways[0].graphs),
        },
        "steps": steps,
        "requests": requests,
        "tokens": decoded,
        "rows": [asdict(row) for row in results],
    }


def summary(us: Sequence[float]) -> dict[str, float]:
    timing = Timing(tuple(us))
    found = {"median": timing.median, "p10": timing.p10, "p90": timing.p90, "mean": statistics.fmean(us)}
    return {name: round(value, 2) for name, value in found.items()}


def show(results: dict, console: Console) -> None:
    """Prints the table."""
    rows, loop = results["rows"], results["loop"]
    console.print(
        f"{results['steps']} steps of up to {loop['max_bs']} requests, {results['requests']} requests, "
        f"{loop['graphs'] or 'no'} CUDA graphs a way\n"
        f"all {results['tokens']} tokens are the same in {', '.join(row['way'] for row in rows)}\n",
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("fill", "launches", "fill us", "p10-p90", "step ms", "p10-p90", "fill's\nshare"):
        table.add_column(heading, justify="left" if heading == "fill" else "right")
    for row in rows:
        fill, step = row["fill"], row["step"]
        table.add_row(
            row["way"],
            "" if row["launches"] is None else str(row["launches"]),
            f"{fill['median']:.1f}",
            f"{fill['p10']:.1f}-{fill['p90']:.1f}",
            f"{step['median'] / 1e3:.3f}",
            f"{step['p10'] / 1e3:.3f}-{step['p90'] / 1e3:.3f}",
            f"{row['share']:.1%}",
        )
    console.print(table)


SIZES = {"steps": 2000, "max_bs": 32, "max_seq_len": 512, "page_size": 16, **asdict(Config())}
ON_CPU = {"steps": 400, "max_bs": 8, "max_seq_len": 128, "layers": 2, "hidden": 128, "mlp": 256, "vocab": 1024}
"""Where the larger sizes would take many minutes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=",".join(WAYS), help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in SIZES.items():
        on_cpu = f", on a CPU {ON_CPU[name]}" if name in ON_CPU else ""
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {value}{on_cpu}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--commit", default=os.environ.get("FUSED_COPY_COMMIT"), help="the package's commit")
    args = parser.parse_args(argv)
    names = args.ways.split(",")
    if unknown := set(names) - set(WAYS):
        parser.error(f"--ways: {', '.join(sorted(unknown))}: expected some of {', '.join(WAYS)}")
    device = torch.device(args.device)
    sizes = SIZES
    if device.type == "cpu":
        sizes = SIZES | ON_CPU
        torch.set_num_threads(1)  # on a busy machine threads that share so little out would wait for each other
        if "update" in names:
            print("update: left out: there is no CUDA graph on a CPU", file=sys.stderr)
            names.remove("update")
    sizes = {name: value if getattr(args, name) is None else getattr(args, name) for name, value in sizes.items()}
    loop = DecodeLoop(
        max_bs=sizes["max_bs"],
        max_seq_len=sizes["max_seq_len"],
        prompt_len=(4, sizes["max_seq_len"] // 2),
        new_tokens=(4, sizes["max_seq_len"] // 4),
        page_size=sizes["page_size"],
        seed=args.seed,
        device=device,
    )
    config = Config(**{name: sizes[name] for name in asdict(Config())})
    facts = machine(device, args.commit)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(f"{facts['gpu'] or facts['cpu']}, torch {facts['torch']}")
    try:
        # Drawn between steps alone: a thread that did it would compete with them for the interpreter.
        with Progress(console=console, auto_refresh=False, transient=True) as progress:
            task = progress.add_task("steps", total=sizes["steps"])
            results = run(
                names,
                sizes["steps"],
                loop,
                config,
                args.seed,
                lambda steps: progress.update(task, completed=steps, refresh=steps % 10 == 0),
            )
    except WrongToken as error:
        print(f"WRONG: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    # The commit is the package's, which was built before; this file may have changed since.
    form = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    results = {"machine": facts, "script_sha256": form} | results
    show(results, console)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
