// The plain data that crosses from the planner to a back end, and from the host to the device as kernel parameters.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define FUSED_COPY_HOST_DEVICE __host__ __device__
#else
#define FUSED_COPY_HOST_DEVICE
#endif

namespace fused_copy {

// Castable dtypes come first: a cast is coded by their values.
enum class DType : uint8_t {
  Bool,
  UInt8,
  Int8,
  Int16,
  Int32,
  Int64,
  Float16,
  BFloat16,
  Float32,
  Float64,
  UInt16,
  UInt32,
  UInt64,
  Complex32,
  Complex64,
  Complex128,
  Float8E4M3FN,
  Float8E4M3FNUZ,
  Float8E5M2,
  Float8E5M2FNUZ,
  Float8E8M0FNU,
  Float4E2M1FNx2,
  Bits8,
  Bits16,
  Unsupported,
};
constexpr int kCastableDTypes = static_cast<int>(DType::Float64) + 1;

enum class Operation : uint8_t {
  Copy,        // units of 2^width bytes, all aligned
  CopyRagged,  // rows begin and end anywhere, source and destination at the same phase of 2^width bytes
  Fill,        // units of 2^width bytes from an 8-byte pattern
  Fill16,      // the same from a 16-byte pattern whose upper half is zero (complex128)
  Cast,        // units of 2^width elements; see cast_operation
};

// log2 of the bytes of an element.
FUSED_COPY_HOST_DEVICE constexpr int castable_size_log2(int dtype) {
  return static_cast<int>(0x3211321000ull >> (4 * dtype) & 0xf);
}

// A cast takes units of four elements, or of two where one is 8 bytes, else single ones.
constexpr int kMaxCastWidth = 2;

FUSED_COPY_HOST_DEVICE constexpr Operation cast_operation(DType from, DType to) {
  return static_cast<Operation>(static_cast<int>(Operation::Cast) + static_cast<int>(from) * kCastableDTypes +
                                static_cast<int>(to));
}

// The dtypes of a cast, as numbers.
struct CastDTypes {
  int from;
  int to;
};

FUSED_COPY_HOST_DEVICE constexpr CastDTypes cast_dtypes(Operation operation) {
  const int code = static_cast<int>(operation) - static_cast<int>(Operation::Cast);
  return {code / kCastableDTypes, code % kCastableDTypes};
}

// Casts that have code of their own: those of ids, positions and lengths, and of activations.
struct DTypePair {
  DType from;
  DType to;
};
constexpr DTypePair kDirectCasts[] = {
    {DType::Int64, DType::Int32},      {DType::Int32, DType::Int64},     {DType::Float32, DType::BFloat16},
    {DType::BFloat16, DType::Float32}, {DType::Float32, DType::Float16}, {DType::Float16, DType::Float32},
};
constexpr int kDirectCastCount = sizeof(kDirectCasts) / sizeof(DTypePair);

constexpr bool is_direct_cast(Operation operation) {
  for (const DTypePair& cast : kDirectCasts) {
    if (operation == cast_operation(cast.from, cast.to)) return true;
  }
  return false;
}

// How many units of this size, the larger side's in a cast, a lane takes of a tile at most: all are loaded before the
// first is stored.
FUSED_COPY_HOST_DEVICE constexpr int max_lane_units(int unit_bytes) { return unit_bytes >= 8 ? 4 : 8; }

// What one warp handles of a task is a tile: a block of its rows and columns. Tiles are numbered along the rows, then
// down the columns, then through the outer dimensions.

// What is to be done with a task, in one word, which a back end reads at once.
struct alignas(4) TaskCode {
  Operation operation;
  uint8_t width;               // log2 of a unit
  uint8_t lanes_log2;          // 2^lanes_log2 lanes of a warp lie along a row, the others on further rows
  uint8_t column_tiles_shift;  // see divide()
};

// One box of memory to write. Its columns are the units of a row.
struct alignas(16) Task {
  uint64_t src;  // address, or the pattern of a fill
  uint64_t dst;
  uint32_t tile_columns;
  uint32_t last_columns;  // of a row's last tile
  uint32_t column_tiles;  // of a row
  TaskCode code;
};

// log2 of the bytes from one column to the next where they lie side by side.
struct UnitLog2 {
  int src;
  int dst;
};

FUSED_COPY_HOST_DEVICE inline UnitLog2 unit_log2(TaskCode code) {
  if (code.operation < Operation::Cast) return {code.width, code.width};
  const auto [from, to] = cast_dtypes(code.operation);
  return {castable_size_log2(from) + code.width, castable_size_log2(to) + code.width};
}

// Strides are in bytes. The first extent is that of the columns, the last the slowest varying.
struct Extent {
  int64_t size;
  int64_t src_stride;
  int64_t dst_stride;
};

// Four dimensions, and one more that splits elements whose address is not a multiple of their size.
constexpr int kMaxExtents = 5;
constexpr int kInnerExtents = 2;

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

// Divides numbers below 2^31 by multiplying (Granlund and Montgomery, "Division by Invariant Integers using
// Multiplication", 1994): a division is a long chain of instructions on a GPU.
FUSED_COPY_HOST_DEVICE inline uint32_t divide(uint32_t number, uint32_t multiplier, uint32_t shift) {
  const auto high = static_cast<uint32_t>(static_cast<uint64_t>(number) * multiplier >> 32);
  return (high + number) >> shift;
}

// Which kernel a launch takes: the more it must be able to do, the longer its code and the more registers it holds.
// Bits, so that a launch is all that its tasks are.
enum class LaunchKind : uint8_t {
  Plain = 0,         // copies and fills of at most two dimensions, the columns of long rows side by side
  General = 1,       // all but casts
  PlainCasting = 2,  // plain ones and direct casts of the same shape
  Casting = 3,       // everything
};
constexpr LaunchKind operator|(LaunchKind a, LaunchKind b) {
  return static_cast<LaunchKind>(static_cast<int>(a) | static_cast<int>(b));
}
FUSED_COPY_HOST_DEVICE constexpr bool is_plain(LaunchKind kind) {
  return kind == LaunchKind::Plain || kind == LaunchKind::PlainCasting;
}

struct LaunchHeader {
  uint32_t tiles;
  uint16_t tasks;
  uint16_t strided;         // tasks that are StridedTasks: the first ones
  uint16_t first_tiles_at;  // the entry at which the lowest level of the first tiles begins
  uint16_t strided_at;      // the word at which the strided tasks begin
  LaunchKind kind;
  uint8_t levels;  // of first tiles
};

// A kernel takes 32,764 bytes of parameters since CUDA 12.1, from compute capability 7.0 up (CUDA C++ Programming
// Guide, "Function Parameters"): so many pairs of words.
constexpr int kMaxLaunchWords = 32764 / 16 * 2;
constexpr int kHeaderWords = sizeof(LaunchHeader) / 8;
constexpr int kTaskWords = sizeof(Task) / 8;
constexpr int kStridedTaskWords = sizeof(StridedTask) / 8;
constexpr int kExtentWords = sizeof(Extent) / 8;
static_assert(sizeof(LaunchHeader) == 16);

// The kernel for plain tasks reads each of them as far as the row strides of a StridedTask, though it may be a Task. Of
// the last one these are words beyond it, which every launch has.
constexpr int kWordsReadBeyond = static_cast<int>(offsetof(StridedTask, src_column_stride)) / 8 - kTaskWords;

// The parameters of one kernel: a header, the number of every task's first tile, the strided tasks, the others,
// kWordsReadBeyond spare words, the outer extents. Above the first tiles lie levels of every kSearchRadix-th of the
// level below, the highest first, so that a search reads as many neighbours of each level and few cache lines.
template <int kWords>
struct Launch {
  alignas(16) uint64_t words[kWords];
};

FUSED_COPY_HOST_DEVICE inline const LaunchHeader& launch_header(const uint64_t* words) {
  return *reinterpret_cast<const LaunchHeader*>(words);
}

constexpr uint32_t kSearchRadix = 8;
constexpr uint32_t kNoTile = 0x7fffffff;  // fills levels up; the difference of two tiles is a signed number

// How many entries the level has that holds every `1 << shift`-th first tile.
FUSED_COPY_HOST_DEVICE constexpr uint32_t level_entries(uint32_t tasks, uint32_t shift) {
  const uint32_t held = (tasks + (1u << shift) - 1) >> shift;
  return (held + kSearchRadix - 1) / kSearchRadix * kSearchRadix;
}
constexpr uint32_t kLevelShift = 3;
static_assert(kSearchRadix == 1u << kLevelShift);

FUSED_COPY_HOST_DEVICE inline const uint32_t* first_tile_levels(const uint64_t* words) {
  return reinterpret_cast<const uint32_t*>(words + kHeaderWords);
}

// Of every task.
FUSED_COPY_HOST_DEVICE inline const uint32_t* launch_first_tiles(const uint64_t* words) {
  return first_tile_levels(words) + launch_header(words).first_tiles_at;
}

// The task of this number, which is a StridedTask where the number is below the header's `strided`. `one_level`: the
// first tiles have no more, which tells where the tasks begin without asking.
FUSED_COPY_HOST_DEVICE inline const Task& launch_task(const uint64_t* words, uint32_t number, bool one_level = false) {
  const LaunchHeader& header = launch_header(words);
  const uint32_t strided_at = one_level ? kHeaderWords + kSearchRadix / 2 : header.strided_at;
  const uint32_t dense_base = strided_at + header.strided * (kStridedTaskWords - kTaskWords);
  const uint32_t at =
      number < header.strided ? strided_at + number * kStridedTaskWords : dense_base + number * kTaskWords;
  return *reinterpret_cast<const Task*>(words + at);
}

constexpr int kWarpLanesLog2 = 5;
constexpr int kWarpLanes = 1 << kWarpLanesLog2;

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
FUSED_COPY_HOST_DEVICE inline Tile locate_tile(const uint64_t* words, const Task& task, bool is_strided,
                                               uint32_t number, int src_unit, int dst_unit) {
  Tile tile{task.src, task.dst, 0, 0, 1, 0, src_unit, dst_unit, 0, 0};
  uint32_t column_tile = number;
  if (is_strided) {
    const auto& strided = reinterpret_cast<const StridedTask&>(task);
    const uint32_t row_number = divide(number, strided.column_tiles_multiplier, task.code.column_tiles_shift);
    column_tile = number - row_number * task.column_tiles;
    uint32_t outer = divide(row_number, strided.row_tiles_multiplier, strided.row_tiles_shift);
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
    const Extent* extents = reinterpret_cast<const Extent*>(words + strided.outer);
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

}  // namespace fused_copy
