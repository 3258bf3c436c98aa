// Which units of a launch one lane of the GPU visits. Without CUDA, so that tests can walk every lane on the host.
#pragma once

#include <cstring>

#include "copy_task.h"

namespace fused_copy {

struct TaskTile {
  uint32_t task;
  uint32_t tile;  // of the task
};

// The task that has the launch's tile of this number. `one_level`: the launch has no more, which saves asking.
FUSED_COPY_HOST_DEVICE inline TaskTile find_task(const uint64_t* words, uint32_t tile, bool one_level) {
  const LaunchHeader& header = launch_header(words);
  const uint32_t* level = first_tile_levels(words);
  uint32_t task = 0;
  for (uint32_t shift = one_level ? 0 : (header.levels - 1) * kLevelShift;; shift -= kLevelShift) {
    // Every probe is independent of the others, and all lanes probe alike: reads of the parameters at different
    // addresses would run one after the other. Signs are summed, as of comparisons the compiler makes a longer chain.
    const uint32_t* probes = level + task * kSearchRadix;
    int32_t beyond = 0;
#pragma unroll
    for (uint32_t i = 1; i < kSearchRadix; ++i) beyond += static_cast<int32_t>(tile - probes[i]) >> 31;
    task = task * kSearchRadix + static_cast<uint32_t>(static_cast<int32_t>(kSearchRadix) - 1 + beyond);
    if (one_level || shift == 0) return {task, tile - level[task]};
    level += level_entries(header.tasks, shift);
  }
}

// The units that one lane visits in a tile: every 32nd along a long row, or one column of several short rows.
struct LaneWalk {
  uint64_t src;
  uint64_t dst;
  int64_t src_step;
  int64_t dst_step;
  uint64_t column;  // of the first unit
  uint32_t count;
};

FUSED_COPY_HOST_DEVICE inline LaneWalk walk_lane(const Tile& tile, uint32_t lanes_log2, uint32_t lane) {
  const uint32_t x = lane & ((1u << lanes_log2) - 1);
  const uint32_t y = lane >> lanes_log2;
  const uint64_t column = tile.first_column + x;
  LaneWalk walk{
      .src = tile.src + column * tile.src_column_stride + uint64_t{y} * tile.src_row_stride,
      .dst = tile.dst + column * tile.dst_column_stride + uint64_t{y} * tile.dst_row_stride,
      .column = column,
  };
  if (lanes_log2 == kWarpLanesLog2) {
    walk.src_step = tile.src_column_stride << kWarpLanesLog2;
    walk.dst_step = tile.dst_column_stride << kWarpLanesLog2;
    walk.count = (tile.columns + kWarpLanes - 1 - x) >> kWarpLanesLog2;
  } else {
    const uint32_t lane_rows_log2 = kWarpLanesLog2 - lanes_log2;
    walk.src_step = tile.src_row_stride << lane_rows_log2;
    walk.dst_step = tile.dst_row_stride << lane_rows_log2;
    walk.count = (tile.rows + (1u << lane_rows_log2) - 1 - y) >> lane_rows_log2;
    if (x >= tile.columns) walk.count = 0;
  }
  return walk;
}

// A plain task as it is read, rows or none. What is of rows tells nothing where there are none.
struct PlainTask {
  uint64_t src;
  uint64_t dst;
  uint32_t tile_columns;
  uint32_t last_columns;
  uint32_t column_tiles;
  TaskCode code;
  uint32_t column_tiles_multiplier;
  uint32_t src_row_stride;
  uint32_t dst_row_stride;
};

// All at once, rows or none: a warp waits for every further read of the parameters.
FUSED_COPY_HOST_DEVICE inline PlainTask read_plain_task(const Task& task) {
  const auto& strided = reinterpret_cast<const StridedTask&>(task);
  uint32_t code;
  std::memcpy(&code, &task.code, sizeof code);
  PlainTask read{.src = task.src,
                 .dst = task.dst,
                 .tile_columns = task.tile_columns,
                 .last_columns = task.last_columns,
                 .column_tiles = task.column_tiles,
                 .column_tiles_multiplier = strided.column_tiles_multiplier,
                 .src_row_stride = static_cast<uint32_t>(strided.src_row_stride),
                 .dst_row_stride = static_cast<uint32_t>(strided.dst_row_stride)};
#ifdef __CUDA_ARCH__
  // Or else the compiler moves reads to where they are used first.
  asm volatile(""
               : "+l"(read.src), "+l"(read.dst), "+r"(read.tile_columns), "+r"(read.last_columns),
                 "+r"(read.column_tiles), "+r"(code), "+r"(read.column_tiles_multiplier), "+r"(read.src_row_stride),
                 "+r"(read.dst_row_stride));
#endif
  std::memcpy(&read.code, &code, sizeof code);
  return read;
}

// The walk in a tile of a plain task. A small step takes as long as a warp needs to fetch and run the instructions up
// to its first load, so this does without all that locate_tile() must provide for.
FUSED_COPY_HOST_DEVICE inline LaneWalk walk_plain_lane(const PlainTask& task, bool is_strided, uint32_t tile,
                                                       UnitLog2 unit, uint32_t lane) {
  LaneWalk walk{
      .src = task.src,
      .dst = task.dst,
      .src_step = int64_t{kWarpLanes} << unit.src,
      .dst_step = int64_t{kWarpLanes} << unit.dst,
      .column = lane,
  };
  const uint32_t row = is_strided ? divide(tile, task.column_tiles_multiplier, task.code.column_tiles_shift) : 0;
  const uint32_t column_tile = tile - row * task.column_tiles;
  const uint32_t columns = column_tile == task.column_tiles - 1 ? task.last_columns : task.tile_columns;
  walk.count = (columns + kWarpLanes - 1 - lane) >> kWarpLanesLog2;
  walk.src += uint64_t{row} * task.src_row_stride;
  walk.dst += uint64_t{row} * task.dst_row_stride;
  walk.src += static_cast<uint64_t>(column_tile) * (task.tile_columns << unit.src) + (lane << unit.src);
  walk.dst += static_cast<uint64_t>(column_tile) * (task.tile_columns << unit.dst) + (lane << unit.dst);
  return walk;
}

}  // namespace fused_copy
