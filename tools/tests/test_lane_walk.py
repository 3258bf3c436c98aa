"""The GPU's walk through a launch, run on the host where tensors would be too large to make."""

from __future__ import annotations

from pathlib import Path

import pytest
from cpp import CSRC, needs_compiler, output_of
from fuzz_planner import PLANNER

# Prints how far the bytes reach, beyond the buffer's first, that the lanes of a copy's last tile write. Its arguments
# are the rows and columns of bytes that are copied, and the pitch of both sides.
LAST_TILE = """
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "lane_walk.h"
#include "planner.h"

using namespace fused_copy;

int main(int, char** arguments) {
  const int64_t rows = std::atoll(arguments[1]), columns = std::atoll(arguments[2]), pitch = std::atoll(arguments[3]);
  const int64_t sizes[] = {rows, columns}, strides[] = {pitch, 1};
  const uint64_t buffer = uint64_t{1} << 40, source = uint64_t{1} << 41;
  const Device gpu{DeviceType::Cuda, 0};
  const TensorView dst{buffer, sizes, strides, 2, rows * pitch, DType::UInt8, gpu};
  const TensorView src{source, sizes, strides, 2, rows * pitch, DType::UInt8, gpu};
  Destinations destinations;
  destinations.bind({&dst, 1}, nullptr);
  LaunchPlanner planner;
  const std::byte* launch = planner.plan(destinations, {{&src, 1}})[0].params.bytes;
  const LaunchHeader& header = launch_header(launch);
  const auto [number, last] = find_task(launch, header.tiles - 1);
  const Task& task = launch_task(launch, number);
  const bool strided = header.strided > 0;
  const int unit = 1 << task.code.width_log2;
  uint64_t end = 0;
  for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
    const LaneWalk walk =
        is_plain(header.kind)
            ? walk_plain_lane(read_plain_task(task), strided, last, unit_log2(task.code), lane)
            : walk_lane(locate_tile(launch, task, strided, last, unit, unit), task.code.lanes_log2, lane);
    if (walk.count > 0) end = std::max(end, walk.dst + (walk.count - 1) * walk.dst_step + unit);
  }
  std::printf("%lld\\n", static_cast<long long>(end - buffer));
}
"""


def reach(folder: Path, planner: str, rows: int, columns: int, pitch: int) -> int:
    (folder / "planner.cpp").write_text(planner)
    sources = [folder / "planner.cpp", *(path for path in PLANNER if path.name != "planner.cpp")]
    return int(output_of(folder, LAST_TILE, sources, arguments=[rows, columns, pitch]))


@needs_compiler
def test_more_rows_than_32_bits_count(tmp_path):
    rows = 2**32 + 5
    assert reach(tmp_path, (CSRC / "planner.cpp").read_text(), rows, 3, 4) == 4 * (rows - 1) + 3


@needs_compiler
@pytest.mark.parametrize("guarded", [True, False], ids=["as it is", "without the planner's guard"])
def test_rows_further_apart_than_32_bits_tell(tmp_path, guarded):
    """A warp reads a plain task's row strides as 32 bits: the planner must not let a task of larger ones be plain."""
    planner, guard = (CSRC / "planner.cpp").read_text(), "stride == static_cast<uint32_t>(stride)"
    assert planner.count(guard) == 1
    pitch = 5 * 2**30
    found = reach(tmp_path, planner if guarded else planner.replace(guard, "true"), 3, 4096, pitch)
    assert (found == 2 * pitch + 4096) == guarded, found
