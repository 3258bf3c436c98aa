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

constexpr int launch_words(int first_tiles_words, int tasks, int strided, int outer_words) {
  return kHeaderWords + first_tiles_words + strided * kWordsOf<StridedTask> + (tasks - strided) * kWordsOf<Task> +
         kWordsReadBeyond + outer_words;
}

constexpr int kValueWords = 2;  // host values lie at multiples of so many words
constexpr int values_word(int words) { return (words + kValueWords - 1) / kValueWords * kValueWords; }

StridedTask strided_task(const PlannedTask& planned, int outer_at) {
  if (planned.is_whole_task) {
    StridedTask whole;
    std::memcpy(&whole, planned.record, sizeof whole);
    const Divisor column_tiles = divisor_of(planned.task.column_tiles);
    whole.task = planned.task;
    whole.column_tiles_multiplier = column_tiles.multiplier;
    whole.task.code.column_tiles_shift = static_cast<uint8_t>(column_tiles.shift);
    return whole;
  }
  StridedTask strided{.task = planned.task, .tile_rows = planned.tile_rows, .last_rows = 1, .row_tiles = 1};
  const Divisor column_tiles = divisor_of(planned.task.column_tiles);
  strided.column_tiles_multiplier = column_tiles.multiplier;
  strided.task.code.column_tiles_shift = static_cast<uint8_t>(column_tiles.shift);
  if (planned.record_words > 0) {
    strided.outer = static_cast<uint16_t>(outer_at);
    return strided;
  }
  const Extent& columns = planned.extents[0];
  strided.src_column_stride = columns.src_stride;
  strided.dst_column_stride = columns.dst_stride;
  strided.row_bytes = columns.size;
  if (planned.rank >= kInnerExtents) {
    const Extent& rows = planned.extents[1];
    strided.src_row_stride = rows.src_stride;
    strided.dst_row_stride = rows.dst_stride;
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

// The outer extents and records begin at word `outer_at`.
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
      const std::span<const std::byte> outer = planned.outer();
      std::memcpy(launch + outer_at * kWordBytes, outer.data(), outer.size());
      outer_at += static_cast<int>(outer.size()) / kWordBytes;
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

// How many of the tasks one launch holds, and what it then has.
struct Held {
  LaunchHeader header{};
  size_t tasks = 0;
  int words = 0;
  int outer_words = 0;
};

Held hold(std::span<const PlannedTask> tasks) {
  Held held;
  LaunchHeader& header = held.header;
  int first_tiles = 0;
  for (; held.tasks < tasks.size(); ++held.tasks) {
    const PlannedTask& planned = tasks[held.tasks];
    const int strided = header.strided + planned.is_strided();
    const int outer = held.outer_words + static_cast<int>(planned.outer().size()) / kWordBytes;
    const bool entry_is_left = header.tasks % kSearchRadix > 0;
    const int numbers = entry_is_left ? first_tiles : first_tiles_words(header.tasks + 1);
    const int words = launch_words(numbers, header.tasks + 1, strided, outer);
    if (words > kMaxLaunchWords || uint64_t{header.tiles} + planned.tiles > kNoTile) break;
    held.words = words;
    first_tiles = numbers;
    held.outer_words = outer;
    header.tiles += planned.tiles;
    header.tasks += 1;
    header.strided = static_cast<uint16_t>(strided);
    header.kind = header.kind | planned.kind;
  }
  const Levels levels = levels_of(header.tasks);
  header.levels = static_cast<uint8_t>(levels.count);
  header.first_tiles_at = static_cast<uint16_t>(levels.entries_above);
  header.strided_at = static_cast<uint16_t>(kHeaderWords + first_tiles);
  return held;
}

}  // namespace

std::span<const PlannedTask> write_launch(std::span<const PlannedTask> tasks, std::span<const std::byte> values,
                                          PlannedLaunch& launch) {
  const Held held = hold(tasks);
  write_tasks(held.header, tasks.first(held.tasks), held.words - held.outer_words, launch.params.bytes);
  launch.used_words = held.words;
  if (!values.empty()) {
    const int at = values_word(held.words);
    std::memcpy(launch.params.bytes + at * kWordBytes, values.data(), values.size());
    launch.used_words = at + static_cast<int>((values.size() + kWordBytes - 1) / kWordBytes);
  }
  return tasks.subspan(held.tasks);
}

uint64_t values_place(std::span<const PlannedTask> tasks, size_t value_bytes) {
  const Held held = hold(tasks);
  const auto at = static_cast<size_t>(values_word(held.words)) * kWordBytes;
  return held.tasks == tasks.size() && at + value_bytes <= sizeof(PlannedLaunch::params) ? at : 0;
}

}  // namespace fused_copy
