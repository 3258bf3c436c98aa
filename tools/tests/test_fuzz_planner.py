"""The planner's fuzz target finds every guard that is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fuzz_planner import PLANNER

ROOT = Path(__file__).parents[2]

# Guards of the planner, between @ where only what is beside one tells it from others, and what takes their place
# where they are missing.
GUARDS = {
    "layout": ("@view.strided@ &", "true"),
    "conjugate or negative bit": ("if (@view.lazy@) refuse_lazy", "false"),
    "dtype": ("@(view.dtype != DType::Unsupported)@ &", "true"),
    "requires grad": ("@!view.autograd.requires_grad@ &", "true"),
    "inference tensor": ("@!view.autograd.inference@ &", "true"),
    "device": ("@holds_memory(view.device)@ &", "true"),
    "rank beyond torch's": ("view.rank <= kMaxRank", "true"),
    "no address": ("@view.address != 0@ &&", "true"),
    "storage too small": ("bytes <= view.storage_bytes", "true"),
    "too many bytes": ("bytes != kTooManyBytes", "true"),
    "beyond the last address": ("view.address + static_cast<uint64_t>(bytes) >= view.address", "true"),
    "empty but not plain": ("@!plain@ || std::any_of", "false"),
    "negative size": ("std::any_of(view.sizes, view.sizes + view.rank, negative)", "false"),
    "negative stride": ("std::any_of(view.strides, view.strides + view.rank, negative)", "false"),
    "step that overflows": (
        "__builtin_mul_overflow(view.sizes[d] - 1, view.strides[d], &step)",
        "(__builtin_mul_overflow(view.sizes[d] - 1, view.strides[d], &step), false)",
    ),
    "extent that overflows": ("step > most - elements", "step > 2 * most - elements"),
    "number of fills": ("fills != nullptr && fills->size() != views.size()", "false"),
    "destinations' device": ("view.device == device_", "true"),
    "fill": ("if (@!pattern@) refuse_fill", "false"),
    "destination within itself": ("shares_own_elements(view)", "Shared::No"),
    "destination within itself, nested": ("view.strides[d - 1] >= extent", "true"),
    "destination within itself, interleaved": ("if (@nested@) return Shared::No", "true"),
    "destination in another": ("share_elements(views[run[j].view], views[run[i].view])", "Shared::No"),
    "source in a destination": ("share_elements(view, views[range.view])", "Shared::No"),
    "destination that is left out": ("of_pair->derivation != Derivation::Nothing", "true"),
    "terms that join": ("joins = @period <= head.most@ &&", "false"),
    "terms that leave gaps": ("head.step / divisor <= next.most + 1", "true"),
    "divisor of steps": ("@high - high % divisor < low - reach[i]@) return", "false"),
    "ranges modulo a number: other steps": ("modulus == 0 || @step % modulus != 0@", "false"),
    "ranges modulo a number: those that go on from 0": ("@end <= modulus@) return {{{begin, end", "true"),
    "source behind all that begins before it": ("furthest_[g - 1] <= begin", "true"),
    "source before what begins behind it": ("end <= ranges_[g].begin", "true"),
    "destination that spans others": ("std::max(furthest, ranges_[i].end)", "ranges_[i].end"),
    "same memory: address": ("source.address == destination.address", "true"),
    "same memory: dtype": ("source.dtype == destination.dtype", "true"),
    "same memory: strides": ("source.sizes[d] == 1 || source.strides[d] == destination.strides[d]", "true"),
    "number of sources": ("sources.size() != views.size()", "false"),
    "source's device": ("source.device != destination.device && !source.pinned", "false"),
    "dtype pair": ("!(is_castable(source.dtype) && is_castable(destination.dtype))", "false"),
    "ranks": ("source.rank != destination.rank", "false"),
    "source larger": ("source.sizes[d] > destination.sizes[d]", "false"),
    "dimensions after merging": ("dimensions <= kMaxDimensions", "true"),
    "alignment of a cast": ("source.address % src_item != 0 || destination.address % dst_item != 0", "false"),
    "plain: columns side by side": ("plain = @side_by_side@ &&", "true"),
    "plain: long rows": ("columns >= kMinPlainColumns", "true"),
    "direct casts": ("@is_direct_cast(operation)@ ?", "true"),
    "units of a lane": ("if (@device == DeviceType::Cuda@) { full_columns_log2", "false"),
    "tiles of a task": ("if (@tiles >= kTooManyTiles@)", "false"),
    "tiles of a launch": ("uint64_t{header.tiles} + planned.tiles > kNoTile", "false"),
    "words of a launch": ("words > kMaxLaunchWords", "false"),
    "words beyond the last task": ("@kWordsReadBeyond@ + outer_words", "0"),
    "fill with the last of several dimensions": ("fill.kind == Rest::Last && view.rank != 1", "false"),
    "fill with the last of nothing": ("if (@count == 0@) refuse_last", "false"),
    "part with conjugate or negative bit": ("check_lazy(pair, name, part.view)", "void()"),
    "part's device": ("check_device(pair, name, destinations.views()[pair], part.view)", "void()"),
    "part in a destination": ("if (@bytes > 0@) destinations.check_part_overlap", "false"),
    "integers of one dimension": ("if (@view.rank != 1@) { refuse(pair, name", "false"),
    "integers' dtype": ("index ? is_index_dtype(view.dtype) : is_number_dtype(view.dtype)", "true"),
    "alignment of integers": ("!is_empty(view) && !is_aligned(view)", "false"),
    "alignment of items": ("is_aligned(view) && is_aligned(destination)", "true"),
    "alignment of a last row": ('check_aligned(pair, "table", table, destination)', "void()"),
    "alignment of sums": ('check_aligned(pair, "lengths", lengths, destination)', "void()"),
    "row beyond a table, on the host": ("row < table.sizes[0]", "true"),
    "row beyond a table, on the GPU": (
        "static_cast<uint64_t>(table_row) < static_cast<uint64_t>(gather.table_rows)",
        "true",
    ),
    "row beyond the lengths": ("static_cast<uint64_t>(at) < static_cast<uint64_t>(gather.lengths_rows)", "true"),
    "length of nothing": ("gather.table_rows) && @length > 0@", "true"),
    "row beyond a table, of plain rows": ("@index.low < rows.table_rows@ &&", "true"),
    "row beyond a table, of plain rows, in 64 bits": ("(!rows.index_64 || index.high == 0)", "true"),
    "negative length, of plain rows": ("static_cast<int32_t>(top) < 0", "false"),
    "length beyond the columns, of plain rows": ("@length.low > most@ ?", "false"),
    "length beyond the columns, of plain rows, in 64 bits": ("(is_64 && length.high > 0)", "false"),
    "unit that a length cuts": ("cut & ((1u << rows.count_shift) - 1)", "0"),
    "rows that share a tile": ("own_row < rows.rows", "true"),
    "plain rows: one run": ("!is_plain_run(record, unit)", "false"),
    "plain rows: items cut by columns of several": ("(items && cut && record.column_size > 1)", "false"),
    "plain rows: integers side by side": ("!is_plain(record.index)", "false"),
    "plain rows: lengths side by side": ("(cut && !is_plain(record.lengths))", "false"),
    "length beyond the columns": ("pages < gather.columns", "true"),
    "no lengths": ("if (@is_empty(view)@) return {1", "false"),
    "no elements to gather": ("std::ranges::find(sizes, 0) != sizes.end()", "false"),
    "table of no dimensions": ("table.rank < 1", "false"),
    "table's dtype": ("table.dtype != destination.dtype && !integers", "false"),
    "page size": ("derived.number < 1", "false"),
    "pages of a table": ("derived.number > 1 && (!integers || table.rank != 2)", "false"),
    "page that is not full": ("sizes[1] % derived.number != 0", "0"),
    "page of a negative number": ("item % gather.page_size < 0", "0"),
    "rows' shape": ("@check_shapes(pair, destination, corner)@; if (const void*", "void()"),
    "lengths of a table without columns": ("table.rank < 2", "false"),
    "number of lengths": ("counted.sizes[0] != index.sizes[0]", "false"),
    "last row of none": ("if (@sizes[0] == 0@ || (there", "false"),
    "last row of none that is one": ("there != nullptr && !has_row(index, there)", "false"),
    "values' shape": ("check_shapes(derived.pair, destination, derived.source.view)", "void()"),
    "integers to add to": ("!is_number_dtype(source.dtype)", "false"),
    "sum's dtype": ("@!is_castable(destination.dtype)@) refuse_dtypes", "false"),
    "shape of a sum": ("@check_shapes(pair, destination, source)@; if (!is_castable", "void()"),
    "dtype of sums": ("!is_number_dtype(destination.dtype)", "false"),
    "shape of sums": ("@check_shapes(pair, destination, corner)@; const int dst_item", "void()"),
    "units of a row that a lane takes": ("(by_units ? max_lane_units(1 << planned.unit_log2) : kLaneItems)", "1 << 10"),
    "lengths of the table by another index": ("(@of_table && !same_index@)", "false"),
    "16-byte fill of rows": ("@record.fills_16@ || !small", "false"),
    "page of plain rows": ("!std::has_single_bit(page_size)", "false"),
    "plain sums": ("if (@!is_plain_sum(sums.from, sums.to)@) planned.kind", "false"),
    "values that fit": ("at + value_bytes <= sizeof(PlannedLaunch::params)", "true"),
    "values of one launch": ("@held.tasks == tasks.size()@ &&", "true"),
    "kernel of values in the launch": ("!carried.empty() && planned.from_values", "false"),
    "values that no task reads": ("!values_.empty() && !tasks_.empty()", "!values_.empty()"),
}


def with_switches(sources: dict[str, str]) -> dict[str, str]:
    """The planner, of whose guards one is missing: the one whose number the environment's GUARD is, none for 0."""
    switches = []
    for number, (guard, replacement) in enumerate(GUARDS.values(), 1):
        before, text, after = guard.split("@") if "@" in guard else ("", guard, "")
        parts = (r"\s*".join(map(re.escape, part.split())) for part in (before, text, after))
        pattern = r"{}\s*({})\s*{}".format(*parts)
        found = [(name, match) for name, source in sources.items() for match in re.finditer(pattern, source)]
        assert len(found) == 1, f"the planner has {guard!r} {len(found)} times: say anew where that guard is"
        ((name, match),) = found
        switches.append((*match.span(1), name, f"(missing == {number} ? ({replacement}) : ({text}))"))
    for begin, end, name, switch in sorted(switches, reverse=True):
        sources[name] = sources[name][:begin] + switch + sources[name][end:]
    missing = '#pragma once\n#include <cstdlib>\ninline const int missing = std::atoi(std::getenv("GUARD"));\n'
    return {name: f'#include "missing.h"\n{source}' for name, source in sources.items()} | {"missing.h": missing}


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder, csrc = tmp_path_factory.mktemp("fuzz"), ROOT / "csrc"
    for name, text in with_switches({path.name: path.read_text() for path in [*PLANNER, *csrc.glob("*.h")]}).items():
        (folder / name).write_text(text)
    command = ["g++", "-std=c++20", "-O1", "-w", f"-I{folder}", "-DFUSED_COPY_FUZZ_MAIN", "-c", "-o"]
    checks = ["-D_GLIBCXX_ASSERTIONS", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    sources = {ROOT / "tests/fuzz/planner_fuzz.cpp": []}
    sources |= {folder / source.name: checks for source in PLANNER}
    objects = [folder / f"{source.stem}.o" for source in sources]
    compilers = [
        subprocess.Popen([*command, output, source, *flags])
        for output, (source, flags) in zip(objects, sources.items(), strict=True)
    ]
    assert not any([compiler.wait() for compiler in compilers])
    subprocess.run(["g++", *objects, "-o", folder / "fuzz"], check=True)
    return folder / "fuzz"


def fuzz(fuzzer: Path, guard: int, seconds: int) -> subprocess.CompletedProcess[str]:
    # Without a guard it may loop and take memory until there is none.
    command = ["sh", "-c", 'ulimit -v 1000000 && exec "$0" "$@"', fuzzer, str(seconds), "0"]
    return subprocess.run(command, env={"GUARD": str(guard)}, capture_output=True, text=True, timeout=100)


def test_fuzz_target_passes_the_planner_as_it_is(fuzzer):
    run = fuzz(fuzzer, 0, seconds=3)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("guard", GUARDS)
def test_fuzz_target_finds_a_guard_that_is_missing(fuzzer, guard):
    """Every guard has something that would notice: a planner without it must not pass. Most take milliseconds."""
    assert fuzz(fuzzer, 1 + list(GUARDS).index(guard), seconds=60).returncode != 0
