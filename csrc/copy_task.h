// The plain data that crosses from the planner to a back end, and from the host to the device as kernel parameters.
#pragma once

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

// A cast takes units of four elements where it can, else single ones.
constexpr int kCastWidth = 2;

constexpr Operation cast_operation(DType from, DType to) {
  return static_cast<Operation>(static_cast<int>(Operation::Cast) + static_cast<int>(from) * kCastableDTypes +
                                static_cast<int>(to));
}

// One box of memory to write. Its columns are the units of a row.
struct Task {
  uint64_t src;  // address, or the pattern of a fill
  uint64_t dst;
  uint64_t columns;
  uint32_t first_tile;  // tiles are numbered through all tasks of a launch
  uint16_t layout;      // where its Layout lies in the launch's words; 0: one row, columns side by side
  Operation operation;
  uint8_t width;  // log2 of a unit
};
static_assert(sizeof(Task) == 32);

// Strides are in bytes. The first extent is that of the columns, the last the slowest varying.
struct Extent {
  int64_t size;
  int64_t src_stride;
  int64_t dst_stride;
};

// Four dimensions, and one more that splits elements whose address is not a multiple of their size.
constexpr int kMaxExtents = 5;

struct Layout {
  uint32_t column_tiles;
  uint32_t row_tiles;
  uint32_t columns_per_tile;
  uint32_t rows_per_tile;
  uint32_t lanes_log2;  // 2^lanes_log2 lanes of a warp lie along a row, the others on further rows
  uint32_t rank;
  Extent extents[kMaxExtents];  // only the first `rank` are stored; a ragged copy's first counts bytes, not columns
};
constexpr int layout_words(int rank) { return 3 + rank * static_cast<int>(sizeof(Extent) / 8); }
static_assert(sizeof(Layout) == 8 * layout_words(kMaxExtents));

struct LaunchHeader {
  uint32_t tasks;
  uint32_t tiles;
  uint32_t tile_bytes;  // what a full tile writes
  uint32_t casts;       // tasks that cast
};

// A kernel takes 32,764 bytes of parameters since CUDA 12.1, from compute capability 7.0 up (CUDA C++ Programming
// Guide, "Function Parameters"): so many pairs of words.
constexpr int kMaxLaunchWords = 32764 / 16 * 2;
constexpr int kHeaderWords = sizeof(LaunchHeader) / 8;
constexpr int kTaskWords = sizeof(Task) / 8;

// The parameters of one kernel: a header, the tasks, their layouts.
template <int kWords>
struct Launch {
  alignas(16) uint64_t words[kWords];
};

FUSED_COPY_HOST_DEVICE inline const LaunchHeader& launch_header(const uint64_t* words) {
  return *reinterpret_cast<const LaunchHeader*>(words);
}

FUSED_COPY_HOST_DEVICE inline const Task* launch_tasks(const uint64_t* words) {
  return reinterpret_cast<const Task*>(words + kHeaderWords);
}

constexpr int kWarpLanesLog2 = 5;
constexpr int kWarpLanes = 1 << kWarpLanesLog2;

// What one warp handles: a block of rows and columns of one task. Strides are in bytes.
struct Tile {
  uint64_t src;  // address of column 0 in the first row
  uint64_t dst;
  uint64_t first_column;
  uint32_t columns;
  uint32_t rows;
  uint32_t lanes_log2;
  int64_t row_bytes;  // of a ragged copy
  int64_t src_column_stride;
  int64_t dst_column_stride;
  int64_t src_row_stride;
  int64_t dst_row_stride;
};

FUSED_COPY_HOST_DEVICE constexpr uint32_t columns_per_full_tile(uint32_t tile_bytes, int unit_bytes_log2) {
  const uint32_t columns = tile_bytes >> unit_bytes_log2;
  return columns < kWarpLanes ? kWarpLanes : columns;
}

FUSED_COPY_HOST_DEVICE inline uint32_t tile_extent(uint64_t size, uint64_t first, uint32_t limit) {
  return static_cast<uint32_t>(size - first < limit ? size - first : limit);
}

// The part of `task` that is the launch's tile number `tile`. `src_unit` and `dst_unit` are the bytes from one column
// to the next where they lie side by side, `unit_log2` is the larger one's logarithm.
FUSED_COPY_HOST_DEVICE inline Tile locate_tile(const uint64_t* words, const Task& task, uint32_t tile, int src_unit,
                                               int dst_unit, int unit_log2) {
  tile -= task.first_tile;
  if (task.layout == 0) {
    const uint32_t columns_per_tile = columns_per_full_tile(launch_header(words).tile_bytes, unit_log2);
    const uint64_t first_column = static_cast<uint64_t>(tile) * columns_per_tile;
    const uint32_t columns = tile_extent(task.columns, first_column, columns_per_tile);
    return {task.src, task.dst, first_column, columns, 1, kWarpLanesLog2, 0, src_unit, dst_unit, 0, 0};
  }
  const Layout& layout = *reinterpret_cast<const Layout*>(words + task.layout);
  const Extent* extents = layout.extents;
  Tile located{
      .src = task.src,
      .dst = task.dst,
      .rows = 1,
      .lanes_log2 = layout.lanes_log2,
      .row_bytes = extents[0].size,
      .src_column_stride = extents[0].src_stride,
      .dst_column_stride = extents[0].dst_stride,
  };
  located.first_column = static_cast<uint64_t>(tile % layout.column_tiles) * layout.columns_per_tile;
  located.columns = tile_extent(task.columns, located.first_column, layout.columns_per_tile);
  if (layout.rank > 1) {
    tile /= layout.column_tiles;
    const uint64_t first_row = static_cast<uint64_t>(tile % layout.row_tiles) * layout.rows_per_tile;
    located.rows = tile_extent(extents[1].size, first_row, layout.rows_per_tile);
    located.src_row_stride = extents[1].src_stride;
    located.dst_row_stride = extents[1].dst_stride;
    located.src += first_row * extents[1].src_stride;
    located.dst += first_row * extents[1].dst_stride;
    uint32_t outer = tile / layout.row_tiles;
    for (uint32_t d = 2; d < layout.rank; ++d) {
      // A launch has fewer than 2^31 tiles, so an outer extent that matters fits 32 bits.
      const uint32_t size = static_cast<uint32_t>(extents[d].size);
      located.src += (outer % size) * extents[d].src_stride;
      located.dst += (outer % size) * extents[d].dst_stride;
      outer /= size;
    }
  }
  return located;
}

// The task that a launch's tile belongs to: the last whose first tile is not beyond it.
FUSED_COPY_HOST_DEVICE inline const Task& find_task(const uint64_t* words, uint32_t tile) {
  const Task* first = launch_tasks(words);
  uint32_t count = launch_header(words).tasks;
  while (count > 1) {
    const uint32_t half = count / 2;
    first += first[half].first_tile <= tile ? half : 0;
    count -= half;
  }
  return *first;
}

}  // namespace fused_copy
