#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <utility>

#include "back_end.h"
#include "lane_walk.h"

namespace fused_copy {
namespace {

float to_float(c10::Half value) { return static_cast<float>(value); }
float to_float(c10::BFloat16 value) { return static_cast<float>(value); }

template <class To>
To from_float(float value) {
  return To(value);
}

}  // namespace
}  // namespace fused_copy

#include "convert.h"

namespace fused_copy {
namespace {

using Types = CastTypes<c10::Half, c10::BFloat16>;

template <class Visit>
void for_each_row(const Tile& tile, Visit visit) {
  for (uint32_t row = 0; row < tile.rows; ++row) {
    visit(tile.src + tile.first_column * tile.src_column_stride + row * tile.src_row_stride,
          tile.dst + tile.first_column * tile.dst_column_stride + row * tile.dst_row_stride);
  }
}

void* at(uint64_t address) { return reinterpret_cast<void*>(address); }

void copy_tile(const Tile& tile, int unit_bytes) {
  const bool side_by_side = tile.src_column_stride == unit_bytes && tile.dst_column_stride == unit_bytes;
  for_each_row(tile, [&](uint64_t src, uint64_t dst) {
    if (side_by_side) {
      std::memcpy(at(dst), at(src), static_cast<size_t>(tile.columns) * unit_bytes);
      return;
    }
    for (uint32_t column = 0; column < tile.columns; ++column) {
      std::memcpy(at(dst + column * tile.dst_column_stride), at(src + column * tile.src_column_stride), unit_bytes);
    }
  });
}

void copy_ragged_tile(const Tile& tile, int unit_bytes) {
  const int64_t phase = static_cast<int64_t>(tile.dst % unit_bytes);
  const int64_t offset = static_cast<int64_t>(tile.first_column) * unit_bytes - phase;
  const int64_t begin = std::max<int64_t>(offset, 0);
  const int64_t end = std::min<int64_t>(offset + static_cast<int64_t>(tile.columns) * unit_bytes, tile.row_bytes);
  if (begin < end) std::memcpy(at(tile.dst + begin), at(tile.src + begin), static_cast<size_t>(end - begin));
}

void fill_tile(const Tile& tile, int unit_bytes, uint64_t pattern, bool upper_half_zero) {
  const uint64_t bits[2] = {pattern, upper_half_zero ? 0 : pattern};
  const auto* bytes = reinterpret_cast<const char*>(bits);
  for_each_row(tile, [&](uint64_t, uint64_t dst) {
    for (uint32_t column = 0; column < tile.columns; ++column) {
      const uint64_t place = (tile.first_column + column) * unit_bytes % sizeof bits;
      std::memcpy(at(dst + column * tile.dst_column_stride), bytes + place, unit_bytes);
    }
  });
}

template <class From, class To>
void cast_tile(const Tile& tile, int unit_elements) {
  for_each_row(tile, [&](uint64_t src, uint64_t dst) {
    for (uint32_t column = 0; column < tile.columns; ++column) {
      const auto* from = static_cast<const From*>(at(src + column * tile.src_column_stride));
      auto* to = static_cast<To*>(at(dst + column * tile.dst_column_stride));
      for (int i = 0; i < unit_elements; ++i) to[i] = convert<To, From, c10::Half, c10::BFloat16>(from[i]);
    }
  });
}

using CastTile = void (*)(const Tile&, int);

template <int... kCodes>
constexpr std::array<CastTile, sizeof...(kCodes)> cast_table(std::integer_sequence<int, kCodes...>) {
  return {&cast_tile<Types::at<kCodes / kCastableDTypes>, Types::at<kCodes % kCastableDTypes>>...};
}
constexpr auto kCastTiles = cast_table(std::make_integer_sequence<int, kCasts>());

void run_tile(const Task& task, const Tile& tile) {
  const Operation operation = task.code.operation;
  const int unit = 1 << task.code.width_log2;
  if (is_cast(operation)) {
    return kCastTiles[static_cast<int>(operation) - static_cast<int>(Operation::Cast)](tile, unit);
  }
  switch (operation) {
    case Operation::Copy: return copy_tile(tile, unit);
    case Operation::CopyRagged: return copy_ragged_tile(tile, unit);
    case Operation::Fill: return fill_tile(tile, unit, task.src, false);
    case Operation::Fill16: return fill_tile(tile, unit, task.src, true);
    case Operation::Cast: break;
  }
  __builtin_unreachable();
}

void run_launch(const std::byte* launch) {
  const LaunchHeader& header = launch_header(launch);
  const uint32_t* first_tiles = launch_first_tiles(launch);
  for (uint32_t i = 0; i < header.tasks; ++i) {
    const Task& task = launch_task(launch, i);
    const UnitLog2 unit = unit_log2(task.code);
    const uint32_t tiles = (i + 1u < header.tasks ? first_tiles[i + 1] : header.tiles) - first_tiles[i];
    for (uint32_t t = 0; t < tiles; ++t) {
      run_tile(task, locate_tile(launch, task, i < header.strided, t, 1 << unit.src, 1 << unit.dst));
    }
  }
}

}  // namespace

void run_on_cpu(std::span<const PlannedLaunch> launches) {
  for (const PlannedLaunch& launch : launches) run_launch(launch.params.bytes);
}

}  // namespace fused_copy
