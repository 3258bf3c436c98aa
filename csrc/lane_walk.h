// Which units of a launch one lane of the GPU visits. Without CUDA, so that tests can walk every lane on the host.
#pragma once

#include "launch_layout.h"

namespace fused_copy {

// Strides are in bytes.
struct Tile {
  uint64_t src;  // address of column 0 in the first row
  uint64_t dst;
  uint64_t first_column;
  uint32_t columns;
  uint32_t rows;
  int64_t row_bytes;  // of a ragged copy
  int64_t src_column_stride;
  int64_t dst_column_stride;
  int64_t src_row_stride;
  int64_t dst_row_stride;
};

// A task's tile of this number. `src_unit` and `dst_unit` are the bytes from one column to the next in a task that is
// not strided.
FUSED_COPY_HOST_DEVICE inline Tile locate_tile(const std::byte* launch, const Task& task, bool is_strided,
                                               uint32_t number, int src_unit, int dst_unit) {
  Tile tile{task.src, task.dst, 0, 0, 1, 0, src_unit, dst_unit, 0, 0};
  uint32_t column_tile = number;
  if (is_strided) {
    const auto& strided = reinterpret_cast<const StridedTask&>(task);
    const uint32_t row_number = divide(number, {task.code.column_tiles_shift, strided.column_tiles_multiplier});
    column_tile = number - row_number * task.column_tiles;
    uint32_t outer = divide(row_number, {strided.row_tiles_shift, strided.row_tiles_multiplier});
    const uint32_t row_tile = row_number - outer * strided.row_tiles;
    const int64_t first_row = static_cast<int64_t>(row_tile) * strided.tile_rows;
    tile.rows = row_tile + 1 == strided.row_tiles ? strided.last_rows : strided.tile_rows;
    tile.src += first_row * strided.src_row_stride;
    tile.dst += first_row * strided.dst_row_stride;
    tile.row_bytes = strided.row_bytes;
    tile.src_column_stride = strided.src_column_stride;
    tile.dst_column_stride = strided.dst_column_stride;
    tile.src_row_stride = strided.src_row_stride;
    tile.dst_row_stride = strided.dst_row_stride;
    const Extent* extents = read_at<Extent>(launch, strided.outer);
    for (int d = 0; d < strided.outer_extents; ++d) {
      // A launch has fewer than 2^31 tiles, so an outer extent that matters fits 32 bits.
      const auto size = static_cast<uint32_t>(extents[d].size);
      tile.src += (outer % size) * extents[d].src_stride;
      tile.dst += (outer % size) * extents[d].dst_stride;
      outer /= size;
    }
  }
  tile.first_column = static_cast<uint64_t>(column_tile) * task.tile_columns;
  tile.columns = column_tile + 1 == task.column_tiles ? task.last_columns : task.tile_columns;
  return tile;
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
  // Keeps the compiler from moving reads to where they are used first.
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
  const uint32_t row = is_strided ? divide(tile, {task.code.column_tiles_shift, task.column_tiles_multiplier}) : 0;
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
