#include "launch_layout.h"

#include <algorithm>

namespace fused_copy {
namespace {

// The entries above the first tiles themselves.
struct Levels {
  int count;
  int entries_above;
};

constexpr Levels levels_of(int tasks) {
  Levels levels{1, 0};
  for (uint32_t shift = kLevelShift; tasks > 1 << shift; shift += kLevelShift) {
    ++levels.count;
    levels.entries_above += static_cast<int>(level_entries(tasks, shift));
  }
  return levels;
}

constexpr int first_tiles_words(int tasks) {
  return (levels_of(tasks).entries_above + static_cast<int>(level_entries(tasks, 0))) / 2;
}
static_assert(first_tiles_words(1) == kStridedAtOfOneLevel - kHeaderWords);

constexpr int launch_words(int first_tiles_words, int tasks, int strided, int outer_extents) {
  return kHeaderWords + first_tiles_words + strided * kWordsOf<StridedTask> + (tasks - strided) * kWordsOf<Task> +
         kWordsReadBeyond + outer_extents * kWordsOf<Extent>;
}

StridedTask strided_task(const PlannedTask& planned, int outer_at) {
  const Extent& columns = planned.extents[0];
  StridedTask strided{
      .task = planned.task,
      .tile_rows = 1,
      .last_rows = 1,
      .row_tiles = 1,
      .src_column_stride = columns.src_stride,
      .dst_column_stride = columns.dst_stride,
      .row_bytes = columns.size,
  };
  const Divisor column_tiles = divisor_of(planned.task.column_tiles);
  strided.column_tiles_multiplier = column_tiles.multiplier;
  strided.task.code.column_tiles_shift = static_cast<uint8_t>(column_tiles.shift);
  if (planned.rank >= kInnerExtents) {
    const Extent& rows = planned.extents[1];
    strided.src_row_stride = rows.src_stride;
    strided.dst_row_stride = rows.dst_stride;
    strided.tile_rows = planned.tile_rows;
    strided.row_tiles = static_cast<uint32_t>(planned.row_tiles);
    strided.last_rows = static_cast<uint32_t>(rows.size - (planned.row_tiles - 1) * planned.tile_rows);
    strided.outer = static_cast<uint16_t>(outer_at);
    strided.outer_extents = static_cast<uint8_t>(planned.rank - kInnerExtents);
  }
  const Divisor row_tiles = divisor_of(strided.row_tiles);
  strided.row_tiles_multiplier = row_tiles.multiplier;
  strided.row_tiles_shift = static_cast<uint8_t>(row_tiles.shift);
  return strided;
}

void write_levels(const LaunchHeader& header, uint32_t* first_tiles) {
  uint32_t* below = first_tiles;
  for (uint32_t shift = kLevelShift; header.tasks > 1 << shift; shift += kLevelShift) {
    const uint32_t entries = level_entries(header.tasks, shift);
    uint32_t* const level = below - entries;
    for (uint32_t i = 0; i < entries; ++i) {
      const uint32_t at = i * kSearchRadix;
      level[i] = at < level_entries(header.tasks, shift - kLevelShift) ? below[at] : kNoTile;
    }
    below = level;
  }
}

// The outer extents begin at word `outer_at`.
void write_tasks(const LaunchHeader& header, std::span<const PlannedTask> tasks, int outer_at, std::byte* launch) {
  std::memcpy(launch, &header, sizeof header);
  uint32_t* const first_tiles = const_cast<uint32_t*>(launch_first_tiles(launch));
  uint32_t* first_tile = first_tiles;
  std::byte* const strided_begin = launch + header.strided_at * kWordBytes;
  std::byte* strided_at = strided_begin;
  std::byte* dense_at = strided_begin + header.strided * sizeof(StridedTask);
  uint32_t tiles = 0;
  if (header.strided > 0) {
    for (const PlannedTask& planned : tasks) {
      if (!planned.is_strided()) continue;
      *first_tile++ = tiles;
      tiles += planned.tiles;
      const StridedTask strided = strided_task(planned, outer_at);
      std::memcpy(strided_at, &strided, sizeof strided);
      strided_at += sizeof strided;
      const std::span<const Extent> outer = planned.outer_extents();
      std::memcpy(launch + outer_at * kWordBytes, outer.data(), outer.size_bytes());
      outer_at += static_cast<int>(outer.size()) * kWordsOf<Extent>;
    }
  }
  for (const PlannedTask& planned : tasks) {
    if (planned.is_strided()) continue;
    *first_tile++ = tiles;
    tiles += planned.tiles;
    std::memcpy(dense_at, &planned.task, sizeof planned.task);
    dense_at += sizeof planned.task;
  }
  std::fill(first_tile, reinterpret_cast<uint32_t*>(strided_begin), kNoTile);
  write_levels(header, first_tiles);
}

}  // namespace

std::span<const PlannedTask> write_launch(std::span<const PlannedTask> tasks, PlannedLaunch& launch) {
  LaunchHeader header{};
  int outer_extents = 0;
  int first_tiles = 0;
  size_t count = 0;
  for (; count < tasks.size(); ++count) {
    const PlannedTask& planned = tasks[count];
    const int strided = header.strided + planned.is_strided();
    const int outer = outer_extents + static_cast<int>(planned.outer_extents().size());
    const bool entry_is_left = header.tasks % kSearchRadix > 0;
    const int numbers = entry_is_left ? first_tiles : first_tiles_words(header.tasks + 1);
    const int words = launch_words(numbers, header.tasks + 1, strided, outer);
    if (words > kMaxLaunchWords || uint64_t{header.tiles} + planned.tiles > kNoTile) break;
    launch.used_words = words;
    first_tiles = numbers;
    outer_extents = outer;
    header.tiles += planned.tiles;
    header.tasks += 1;
    header.strided = static_cast<uint16_t>(strided);
    header.kind = header.kind | planned.kind;
  }
  const Levels levels = levels_of(header.tasks);
  header.levels = static_cast<uint8_t>(levels.count);
  header.first_tiles_at = static_cast<uint16_t>(levels.entries_above);
  header.strided_at = static_cast<uint16_t>(kHeaderWords + first_tiles);
  write_tasks(header, tasks.first(count), launch.used_words - outer_extents * kWordsOf<Extent>, launch.params.bytes);
  return tasks.subspan(count);
}

}  // namespace fused_copy
