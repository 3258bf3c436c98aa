// How tasks lie in the parameters of a kernel. One writer, on the host; one reader, on both sides.
//
//   word  0              header            LaunchHeader
//         2              levels            uint32_t each, the highest level first; none above where there is one task
//                        first tiles       uint32_t each: the number of every task's first tile, in the tasks' order
//         strided_at     strided tasks     StridedTask each
//                        dense tasks       Task each
//                        spare             kWordsReadBeyond, never looked at, but read
//                        outer extents     Extent each; a strided task says where its own begin
//                        records           of the tasks of derived sources, which say where, among the outer extents
//                        host values       at a multiple of 16 bytes: sources with such low addresses
//
// Above the first tiles lie levels of every kSearchRadix-th of the level below, so that a search reads as many
// neighbours of each level and few cache lines.
#pragma once

#include <bit>
#include <cstddef>
#include <cstring>
#include <span>

#include "operation.h"

namespace fused_copy {

constexpr int kWarpLanesLog2 = 5;
constexpr int kWarpLanes = 1 << kWarpLanesLog2;

constexpr int kMaxDimensions = 4;  // of a pair, once those that can be merged are
// One more splits elements whose address is not a multiple of their size.
constexpr int kMaxExtents = kMaxDimensions + 1;
constexpr int kInnerExtents = 2;

// Strides are in bytes. The first extent is that of the columns, the last the slowest varying.
struct Extent {
  int64_t size;
  int64_t src_stride;
  int64_t dst_stride;
};

// Divides numbers below 2^31 by multiplying (Granlund and Montgomery, "Division by Invariant Integers using
// Multiplication", 1994): a division is a long chain of instructions on a GPU.
struct Divisor {
  uint32_t shift;
  uint32_t multiplier;
};

constexpr Divisor divisor_of(uint64_t value) {
  const auto shift = static_cast<uint32_t>(std::bit_width(value - 1));
  return {shift, static_cast<uint32_t>((((uint64_t{1} << shift) - value) << 32) / value + 1)};
}

FUSED_COPY_HOST_DEVICE constexpr uint32_t divide(uint32_t number, Divisor divisor) {
  const auto high = static_cast<uint32_t>(static_cast<uint64_t>(number) * divisor.multiplier >> 32);
  return (high + number) >> divisor.shift;
}

// One box of memory to write. Its columns are the units of a row. What one warp handles of it is a tile: a block of its
// rows and columns. Tiles are numbered along the rows, then down the columns, then through the outer dimensions.
struct alignas(16) Task {
  uint64_t src;  // address, or the pattern of a fill
  uint64_t dst;
  uint32_t tile_columns;
  uint32_t last_columns;  // of a row's last tile
  uint32_t column_tiles;  // of a row
  TaskCode code;
};

// A task with several rows, or with columns apart.
struct alignas(16) StridedTask {
  Task task;
  uint32_t column_tiles_multiplier;
  uint32_t tile_rows;
  uint32_t last_rows;
  uint32_t row_tiles;
  int64_t src_row_stride;
  int64_t dst_row_stride;
  // What follows is not for plain tasks.
  int64_t src_column_stride;
  int64_t dst_column_stride;
  int64_t row_bytes;  // of a ragged copy
  uint32_t row_tiles_multiplier;
  uint8_t row_tiles_shift;
  uint8_t outer_extents;
  uint16_t outer;  // where they lie in the launch's words
};
static_assert(sizeof(Task) == 32 && sizeof(StridedTask) == 96);

// Which kernel a launch takes: the more it must be able to do, the longer its code and the more registers it holds.
// Bits, so that a launch is all that its tasks are.
enum class LaunchKind : uint8_t {
  Plain = 0,         // copies and fills of at most two dimensions, the columns of long rows side by side
  General = 1,       // all but casts
  PlainCasting = 2,  // plain ones and direct casts of the same shape
  Casting = 3,       // everything that copies tensors
  Sources = 4,       // host values in the launch, and derived sources
  PlainSources = 6,  // those, and what PlainCasting does
  AllSources = 7,    // everything
};
constexpr LaunchKind operator|(LaunchKind a, LaunchKind b) {
  return static_cast<LaunchKind>(static_cast<int>(a) | static_cast<int>(b));
}
FUSED_COPY_HOST_DEVICE constexpr bool has_kind(LaunchKind kind, LaunchKind bit) {
  return (static_cast<int>(kind) & static_cast<int>(bit)) != 0;
}
FUSED_COPY_HOST_DEVICE constexpr bool is_plain(LaunchKind kind) { return !has_kind(kind, LaunchKind::General); }
FUSED_COPY_HOST_DEVICE constexpr bool is_casting(LaunchKind kind) { return has_kind(kind, LaunchKind::PlainCasting); }
FUSED_COPY_HOST_DEVICE constexpr bool has_sources(LaunchKind kind) { return has_kind(kind, LaunchKind::Sources); }

struct LaunchHeader {
  uint32_t tiles;
  uint16_t tasks;
  uint16_t strided;         // tasks that are StridedTasks: the first ones
  uint16_t first_tiles_at;  // the entry at which the first tiles themselves begin, below their levels
  uint16_t strided_at;      // the word at which the strided tasks begin
  LaunchKind kind;
  uint8_t levels;  // of first tiles
};
static_assert(sizeof(LaunchHeader) == 16);

constexpr int kWordBytes = 8;
template <class T>
constexpr int kWordsOf = sizeof(T) / kWordBytes;
constexpr int kHeaderWords = kWordsOf<LaunchHeader>;

// A kernel takes 32,764 bytes of parameters since CUDA 12.1, from compute capability 7.0 up (CUDA C++ Programming
// Guide, "Function Parameters"): so many pairs of words.
constexpr int kMaxLaunchWords = 32764 / 16 * 2;
static_assert(kMaxLaunchWords <= UINT16_MAX, "the header and the tasks keep places as 16 bits");

// The kernel for plain tasks reads each of them as far as the row strides of a StridedTask, though it may be a Task. Of
// the last one these are words beyond it, which every launch has.
constexpr int kWordsReadBeyond =
    static_cast<int>(offsetof(StridedTask, src_column_stride)) / kWordBytes - kWordsOf<Task>;

// The parameters of one kernel.
template <int kWords>
struct Launch {
  alignas(16) std::byte bytes[kWords * kWordBytes];
};

constexpr uint32_t kLevelShift = 3;
constexpr uint32_t kSearchRadix = 1u << kLevelShift;
// Fills levels up; no launch has so many tiles, as the difference of two is a signed number.
constexpr uint32_t kNoTile = 0x7fffffff;

// How many entries the level has that holds every `1 << shift`-th first tile.
FUSED_COPY_HOST_DEVICE constexpr uint32_t level_entries(uint32_t tasks, uint32_t shift) {
  const uint32_t held = (tasks + (1u << shift) - 1) >> shift;
  return (held + kSearchRadix - 1) / kSearchRadix * kSearchRadix;
}

// --- the writer ------------------------------------------------------------------------------------------------------

constexpr int kMaxRecordBytes = 288;

// A task before its place in a launch is known.
struct PlannedTask {
  PlannedTask() {}  // whoever adds one sets what its kind needs
  Task task;
  int64_t pair;
  uint64_t columns;
  int unit_log2;  // bytes of a column, the larger side's in a cast
  int rank;       // of the extents; 0: one row, columns side by side
  LaunchKind kind;
  uint32_t tiles;
  uint32_t tile_rows;
  uint64_t row_tiles;
  bool from_values;       // the source's address counts from where the host values begin
  bool is_whole_task;     // the record takes the StridedTask's own place
  uint16_t record_words;  // of a derived source's record behind the tasks; 0: there is none
  union {
    Extent extents[kMaxExtents];
    alignas(StridedTask) std::byte record[kMaxRecordBytes];
  };

  bool is_strided() const { return rank > 0; }
  // What lies among the launch's outer extents.
  std::span<const std::byte> outer() const {
    if (record_words > 0) return {record, size_t{record_words} * kWordBytes};
    const int count = rank > kInnerExtents ? rank - kInnerExtents : 0;
    return {reinterpret_cast<const std::byte*>(extents + kInnerExtents), count * sizeof(Extent)};
  }
};

// One kernel's parameters, ready to launch.
struct PlannedLaunch {
  Launch<kMaxLaunchWords> params;
  int used_words;
  const LaunchHeader& header() const;
};

// Lays out as many of the tasks as one launch holds, at least one, and returns the others. No task has as many
// as 2^31 tiles. `values` come with all of the tasks: values_place() tells where.
std::span<const PlannedTask> write_launch(std::span<const PlannedTask> tasks, std::span<const std::byte> values,
                                          PlannedLaunch& launch);

// Where so many bytes of host values lie in a launch that has all of these tasks, as the offset in bytes; 0: there is
// no room for them.
uint64_t values_place(std::span<const PlannedTask> tasks, size_t value_bytes);

// --- the reader ------------------------------------------------------------------------------------------------------

template <class T>
FUSED_COPY_HOST_DEVICE inline const T* read_at(const std::byte* launch, uint32_t word) {
  return reinterpret_cast<const T*>(launch + size_t{word} * kWordBytes);
}

FUSED_COPY_HOST_DEVICE inline const LaunchHeader& launch_header(const std::byte* launch) {
  return *read_at<LaunchHeader>(launch, 0);
}

FUSED_COPY_HOST_DEVICE inline const uint32_t* first_tile_levels(const std::byte* launch) {
  return read_at<uint32_t>(launch, kHeaderWords);
}

inline const LaunchHeader& PlannedLaunch::header() const { return launch_header(params.bytes); }

// Of every task.
FUSED_COPY_HOST_DEVICE inline const uint32_t* launch_first_tiles(const std::byte* launch) {
  return first_tile_levels(launch) + launch_header(launch).first_tiles_at;
}

// Where the strided tasks begin in a launch whose first tiles have one level.
constexpr uint32_t kStridedAtOfOneLevel = kHeaderWords + kSearchRadix / 2;

// The task of this number, which is a StridedTask where the number is below the header's `strided`.
FUSED_COPY_HOST_DEVICE inline const Task& launch_task(const std::byte* launch, uint32_t number, uint32_t strided_at) {
  const LaunchHeader& header = launch_header(launch);
  const uint32_t dense_base = strided_at + header.strided * (kWordsOf<StridedTask> - kWordsOf<Task>);
  const uint32_t word =
      number < header.strided ? strided_at + number * kWordsOf<StridedTask> : dense_base + number * kWordsOf<Task>;
  return *read_at<Task>(launch, word);
}

inline const Task& launch_task(const std::byte* launch, uint32_t number) {
  return launch_task(launch, number, launch_header(launch).strided_at);
}

struct TaskTile {
  uint32_t task;
  uint32_t tile;  // of the task
};

// Of a level's neighbours, the last that begins with this tile or before it.
FUSED_COPY_HOST_DEVICE inline uint32_t last_begun(const uint32_t* neighbours, uint32_t tile) {
  // Every probe is independent of the others, and all lanes probe alike: reads of the parameters at different
  // addresses would run one after the other. Signs are summed, as of comparisons the compiler makes a longer chain.
  int32_t beyond = 0;
  for (uint32_t i = 1; i < kSearchRadix; ++i) beyond += static_cast<int32_t>(tile - neighbours[i]) >> 31;
  return static_cast<uint32_t>(static_cast<int32_t>(kSearchRadix) - 1 + beyond);
}

// The task that has the launch's tile of this number.
FUSED_COPY_HOST_DEVICE inline TaskTile find_task(const std::byte* launch, uint32_t tile) {
  const LaunchHeader& header = launch_header(launch);
  const uint32_t* level = first_tile_levels(launch);
  uint32_t task = 0;
  for (uint32_t shift = (header.levels - 1) * kLevelShift;; shift -= kLevelShift) {
    task = task * kSearchRadix + last_begun(level + task * kSearchRadix, tile);
    if (shift == 0) return {task, tile - level[task]};
    level += level_entries(header.tasks, shift);
  }
}

FUSED_COPY_HOST_DEVICE inline TaskTile find_task_of_one_level(const std::byte* launch, uint32_t tile) {
  const uint32_t* first_tiles = first_tile_levels(launch);
  const uint32_t task = last_begun(first_tiles, tile);
  return {task, tile - first_tiles[task]};
}

}  // namespace fused_copy
