"""The GPU's walk through a launch, run on the host where tensors would be too large to make."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"

# Prints how far the bytes reach that the lanes of the last tile write: 2^32 + 5 rows of 3 bytes, into rows of 4.
LAST_TILE = """
#include <algorithm>
#include <cstdio>

#include "lane_walk.h"
#include "planner.h"

using namespace fused_copy;

int main() {
  const int64_t rows = (int64_t{1} << 32) + 5;
  const int64_t buffer_sizes[] = {rows, 4}, buffer_strides[] = {4, 1}, sizes[] = {rows, 3}, strides[] = {3, 1};
  const uint64_t buffer = uint64_t{1} << 40, source = uint64_t{1} << 41;
  const Device gpu{DeviceType::Cuda, 0};
  const TensorView dst{buffer, buffer_sizes, buffer_strides, 2, 4 * rows, DType::UInt8, gpu};
  const TensorView src{source, sizes, strides, 2, 3 * rows, DType::UInt8, gpu};
  Destinations destinations;
  destinations.bind({&dst, 1}, nullptr);
  LaunchPlanner planner;
  const uint64_t* words = planner.plan(destinations, {&src, 1})[0].params.words;
  const LaunchHeader& header = launch_header(words);
  if (header.kind != LaunchKind::General) return 1;
  const auto [number, last] = find_task(words, header.tiles - 1, false);
  const Task& task = launch_task(words, number);
  const bool strided = header.strided > 0;
  uint64_t end = 0;
  for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
    const LaneWalk walk = walk_lane(locate_tile(words, task, strided, last, 1, 1), task.lanes_log2, lane);
    if (walk.count > 0) end = std::max(end, walk.dst + (walk.count - 1) * walk.dst_step + 1);
  }
  std::printf("%lld\\n", static_cast<long long>(end - buffer));
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_more_rows_than_32_bits_count(tmp_path):
    """More rows than a plain task may have, whose tiles a kernel counts in 32 bits."""
    (tmp_path / "main.cpp").write_text(LAST_TILE)
    sources = [tmp_path / "main.cpp", CSRC / "planner.cpp"]
    subprocess.run(["g++", "-std=c++20", "-O1", "-w", f"-I{CSRC}", *sources, "-o", tmp_path / "walk"], check=True)
    assert int(subprocess.check_output([tmp_path / "walk"], text=True)) == 4 * (2**32 + 5) - 1
