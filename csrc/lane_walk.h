// Which units of a launch one lane of the GPU visits. Without CUDA, so that tests can walk every lane on the host.
#pragma once

#include "copy_task.h"

namespace fused_copy {

// The number of the last task whose first tile is not beyond this one. Every probe of a step is independent of the
// others, and all lanes probe alike: reads of the parameters at different addresses would run one after the other.
FUSED_COPY_HOST_DEVICE inline uint32_t find_task(const uint64_t* words, uint32_t tile) {
  const LaunchHeader& header = launch_header(words);
  const uint32_t* first_tiles = launch_first_tiles(words);
  uint32_t number = 0;
#pragma unroll 1
  for (uint32_t step = header.search_step; step > 1; step /= kSearchRadix) {
    uint32_t not_beyond = 0;
#pragma unroll
    for (uint32_t i = 1; i < kSearchRadix; ++i) {
      const uint32_t at = number + i * step;
      not_beyond += at < header.tasks && first_tiles[at] <= tile;
    }
    number += not_beyond * step;
  }
  uint32_t not_beyond = 0;
#pragma unroll
  for (uint32_t i = 1; i < kSearchRadix; ++i) not_beyond += first_tiles[number + i] <= tile;
  return number + not_beyond;
}

// The units that one lane visits in a tile: every 32nd along a long row, or one column of several short rows.
struct LaneWalk {
  uint64_t src;
  uint64_t dst;
  int64_t src_step;
  int64_t dst_step;
  uint64_t column;  // of the first unit
  uint32_t count;
  bool side_by_side;  // the warp's units are
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

// The walk in a tile of a plain task, the columns of `1 << width` bytes. A small step takes as long as a warp needs to
// fetch and run the instructions up to its first load, so this does without all that locate_tile() must provide for.
FUSED_COPY_HOST_DEVICE inline LaneWalk walk_plain_lane(const Task& task, bool is_strided, uint32_t tile,
                                                       uint32_t lane) {
  const uint32_t width = task.width;
  const uint32_t tile_columns = task.tile_columns;
  const uint32_t last_columns = task.last_columns;
  LaneWalk walk{.src = task.src, .dst = task.dst, .column = lane, .side_by_side = true};
  uint32_t column_tile = tile;
  if (is_strided) {
    const auto& strided = reinterpret_cast<const StridedTask&>(task);
    const int64_t src_row_stride = strided.src_row_stride;
    const int64_t dst_row_stride = strided.dst_row_stride;
    const uint32_t row_tile = divide(tile, strided.column_tiles_multiplier, task.column_tiles_shift);
    column_tile = tile - row_tile * task.column_tiles;
    uint32_t row = row_tile * strided.tile_rows;
    if (task.lanes_log2 < kWarpLanesLog2) {
      const uint32_t lane_rows_log2 = kWarpLanesLog2 - task.lanes_log2;
      const uint32_t y = lane >> task.lanes_log2;
      const uint32_t rows = row_tile + 1 == strided.row_tiles ? strided.last_rows : strided.tile_rows;
      walk.column = lane & ((1u << task.lanes_log2) - 1);
      walk.src_step = src_row_stride << lane_rows_log2;
      walk.dst_step = dst_row_stride << lane_rows_log2;
      walk.count = walk.column < last_columns ? (rows + (1u << lane_rows_log2) - 1 - y) >> lane_rows_log2 : 0;
      walk.side_by_side = false;
      row += y;
    }
    walk.src += uint64_t{row} * src_row_stride;
    walk.dst += uint64_t{row} * dst_row_stride;
  }
  if (walk.side_by_side) {
    const uint32_t columns = column_tile + 1 == task.column_tiles ? last_columns : tile_columns;
    walk.count = (columns + kWarpLanes - 1 - lane) >> kWarpLanesLog2;
  }
  const uint64_t offset = static_cast<uint64_t>(column_tile) * (tile_columns << width) + (walk.column << width);
  walk.src += offset;
  walk.dst += offset;
  return walk;
}

}  // namespace fused_copy
