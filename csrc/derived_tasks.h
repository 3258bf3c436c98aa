// The tasks of derived sources and how both back ends read them: rows of a table, sums of lengths, integers plus a
// number.
#pragma once

#include "launch_layout.h"

namespace fused_copy {

// One-dimensional integers of any castable integer dtype.
struct Integers {
  uint64_t address;  // 0: there are none
  int64_t stride;    // bytes
  DType dtype;
  bool in_values;  // the address counts from where the launch's host values begin, until the launch is written
  bool operator==(const Integers&) const = default;
};

// Plain rows: each is one run of units, or of items that lie `column_stride` apart in the table and side by side in the
// destination. A warp takes a tile of one row, or of several where they are short, and goes on along it where lengths
// cut the rows: its column tiles are the warps that share a row, each of which takes every so many'th tile. What is no
// row, or beyond a row's length, becomes the pattern, or stays. All of a row's bytes and columns, and the table's rows,
// fit 31 bits.
struct alignas(16) RowsTask {
  Task task;  // last_columns are those of a row, that lengths count; its units where there are no lengths
  uint32_t column_tiles_multiplier;
  uint32_t column_stride;  // in the table, bytes
  uint32_t units;          // or items, of a row
  uint32_t rows;
  uint32_t table_row_stride;
  uint32_t table_rows;
  uint32_t dst_row_stride;
  uint8_t count_shift;  // log2 of the bytes of a unit, or of the tokens of a page where items are copied
  bool index_64 : 1;
  bool lengths_64 : 1;
  bool table_lengths_64 : 1;
  bool cut : 1;               // rows have lengths
  bool lengths_of_table : 1;  // and these are those of the table's rows
  bool fills : 1;
  bool from_64 : 1;
  bool to_64 : 1;
  bool index_in_values : 1;
  bool lengths_in_values : 1;
  bool table_lengths_in_values : 1;
  bool simple : 1;  // 16-byte units or int32 items, index and lengths of one dtype and on the device, nothing filled
  uint64_t index;
  uint64_t lengths;  // the index again where rows have none, so that both are read at once
  uint64_t table_lengths;
  uint64_t pattern;
};
// What read_plain_task() reads of one.
static_assert(offsetof(RowsTask, table_row_stride) == offsetof(StridedTask, src_row_stride) &&
              offsetof(RowsTask, dst_row_stride) == offsetof(StridedTask, dst_row_stride));

// A run of int32 or int64 items, `item_stride` apart in the source, plus a number.
struct alignas(16) PlusTask {
  Task task;
  uint32_t column_tiles_multiplier;
  uint32_t item_stride;  // bytes
  int64_t addend;
  uint32_t items;
  bool from_64;
  bool to_64;
};

// [0, l0, l0 + l1, ...], by one warp. The task's source are the lengths.
struct alignas(16) SumsTask {
  Task task;
  uint32_t column_tiles_multiplier;
  DType from;
  DType to;
  int64_t lengths_stride;  // bytes, as the next
  int64_t dst_stride;
  int64_t count;  // of the lengths
  int64_t rest;   // elements behind the sums, which become the last one
};

// Those that take the place of a StridedTask.
template <class T>
constexpr bool kIsWholeTask = sizeof(T) <= sizeof(StridedTask) && offsetof(T, task) == 0 &&
                              offsetof(T, column_tiles_multiplier) == offsetof(StridedTask, column_tiles_multiplier);
static_assert(kIsWholeTask<RowsTask> && kIsWholeTask<PlusTask> && kIsWholeTask<SumsTask>);

constexpr int kMaxRowExtents = kMaxExtents - 1;

// Whatever is not as plain as that, in units or item by item. Row i of the task is row index[i] of the table, or row i
// where there is no index. Of it the first lengths[i] columns are copied, or lengths[lengths_index[i]]; the rest is
// filled or stays. The StridedTask has the addresses, and tiles of one row each.
struct GatherRecord {
  Integers index;
  Integers lengths;
  Integers lengths_index;
  int64_t table_rows;
  int64_t lengths_rows;  // with lengths_index: how many lengths there are
  int64_t table_row_stride;
  int64_t dst_row_stride;
  int64_t rows;         // of the task
  int64_t units;        // of a row
  int64_t columns;      // of a row
  int64_t column_size;  // bytes, or items where items become other numbers
  int64_t page_size;    // column j is item j * page_size of the table's row, divided by it
  int64_t addend;
  int64_t rest;  // of LastRow: elements behind the rows, which become the last one too
  uint64_t pattern;
  bool converts;  // item by item
  bool fills;
  bool fills_16;  // the pattern's upper half is zero, see Operation::Fill16
  DType from;
  DType to;
  uint8_t extent_count;
  Extent
      extents[kMaxRowExtents];  // of a row's units, in their order; the first has units or items side by side, or not
};
static_assert(sizeof(GatherRecord) % kWordBytes == 0);

FUSED_COPY_HOST_DEVICE inline const std::byte* record_of(const std::byte* launch, const StridedTask& task) {
  return read_at<std::byte>(launch, task.outer);
}

// The launch's own bytes, where host values are among them, have addresses below its size; nothing else has.
FUSED_COPY_HOST_DEVICE inline uint64_t resolve(const std::byte* launch, uint64_t address) {
  constexpr uint64_t kLaunchBytes = uint64_t{kMaxLaunchWords} * kWordBytes;
  return address < kLaunchBytes ? reinterpret_cast<uint64_t>(launch) + address : address;
}

FUSED_COPY_HOST_DEVICE inline int64_t load_integer(uint64_t address, DType dtype) {
  switch (dtype) {
    case DType::Bool: return *reinterpret_cast<const uint8_t*>(address) != 0;
    case DType::UInt8: return *reinterpret_cast<const uint8_t*>(address);
    case DType::Int8: return *reinterpret_cast<const int8_t*>(address);
    case DType::Int16: return *reinterpret_cast<const int16_t*>(address);
    case DType::Int32: return *reinterpret_cast<const int32_t*>(address);
    default: return *reinterpret_cast<const int64_t*>(address);
  }
}

FUSED_COPY_HOST_DEVICE inline int64_t load_integer(const std::byte* launch, const Integers& integers, int64_t number) {
  return load_integer(resolve(launch, integers.address) + number * integers.stride, integers.dtype);
}

// A row that is no row of the table has no columns.
struct GatheredRow {
  int64_t table_row;
  int64_t copied;  // bytes or items, as the record's column_size
};

// Both dtypes of an index, and of lengths.
FUSED_COPY_HOST_DEVICE inline int64_t load_index(const std::byte* launch, const Integers& integers, int64_t number) {
  const uint64_t address = resolve(launch, integers.address) + number * integers.stride;
  return integers.dtype == DType::Int32 ? *reinterpret_cast<const int32_t*>(address)
                                        : *reinterpret_cast<const int64_t*>(address);
}

FUSED_COPY_HOST_DEVICE inline GatheredRow find_row(const std::byte* launch, const GatherRecord& gather, int64_t row) {
  int64_t table_row = row;
  int64_t length = INT64_MAX;
  if (gather.index.address) table_row = load_index(launch, gather.index, row);
  if (gather.lengths.address) {
    const int64_t at = gather.lengths_index.address ? load_index(launch, gather.lengths_index, row) : row;
    const bool known = static_cast<uint64_t>(at) < static_cast<uint64_t>(gather.lengths_rows);
    length = known ? load_index(launch, gather.lengths, at) : 0;
  }
  const bool is_row = static_cast<uint64_t>(table_row) < static_cast<uint64_t>(gather.table_rows) && length > 0;
  if (!is_row) return {0, 0};
  const int64_t pages = (length - 1) / gather.page_size;
  return {table_row, (pages < gather.columns ? pages + 1 : gather.columns) * gather.column_size};
}

// What a lane has of a RowsTask, or a tile on the CPU: the tile's columns of one row.
struct RowShare {
  uint64_t src;  // of the row's first unit, as the next
  uint64_t dst;
  uint32_t first;      // unit of the tile
  uint32_t step;       // to the next tile of the same warp
  uint32_t whole;      // units of the row that are copied whole
  uint32_t cut_bytes;  // of the unit behind them
  uint32_t end;        // behind the row's last unit that is written
};

// An int32 or int64 as it lies there: to make a number of it takes waiting for it.
struct LoadedInteger {
  uint32_t low;
  uint32_t high;
};

FUSED_COPY_HOST_DEVICE inline LoadedInteger load_words(uint64_t address, uint32_t number, bool is_64) {
  const auto* words = reinterpret_cast<const uint32_t*>(address + uint64_t{number} * (is_64 ? 8u : 4u));
  LoadedInteger loaded{words[0], 0};
  if (is_64) loaded.high = words[1];
  return loaded;
}

FUSED_COPY_HOST_DEVICE inline int64_t number_of(LoadedInteger loaded, bool is_64) {
  return is_64 ? static_cast<int64_t>(uint64_t{loaded.high} << 32 | loaded.low) : static_cast<int32_t>(loaded.low);
}

// No more than `most`, and no less than 0.
FUSED_COPY_HOST_DEVICE inline uint32_t clamp_length(LoadedInteger length, bool is_64, uint32_t most) {
  const uint32_t top = is_64 ? length.high : length.low;
  if (static_cast<int32_t>(top) < 0) return 0;
  return (is_64 && length.high > 0) || length.low > most ? most : length.low;
}

// Without branches where it can be: of several loads the later ones would wait for the branch, and so for the first.
FUSED_COPY_HOST_DEVICE inline RowShare locate_row(const std::byte* launch, const RowsTask& rows, uint32_t tile,
                                                  uint32_t lane) {
  const Task& task = rows.task;
  const uint32_t lanes_log2 = task.code.lanes_log2;
  const uint32_t row_tile = divide(tile, {task.code.column_tiles_shift, rows.column_tiles_multiplier});
  const uint32_t own_row = (row_tile << (kWarpLanesLog2 - lanes_log2)) + (lane >> lanes_log2);
  const bool has_row = own_row < rows.rows;
  const uint32_t row = has_row ? own_row : 0;
  const LoadedInteger index = load_words(resolve(launch, rows.index), row, rows.index_64);
  LoadedInteger length = load_words(resolve(launch, rows.lengths), row, rows.lengths_64);
  const bool is_row = index.low < rows.table_rows && (!rows.index_64 || index.high == 0);
  bool is_64 = rows.lengths_64;
  if (rows.lengths_of_table) {
    is_64 = rows.table_lengths_64;
    length = load_words(resolve(launch, rows.table_lengths), is_row ? index.low : 0, is_64);
  }
  const bool items = task.code.operation == Operation::RowItems;
  const uint32_t count = clamp_length(length, is_64, task.last_columns << (items ? rows.count_shift : 0));
  const uint32_t cut = count * (items ? 1 : rows.column_stride) + (items ? (1u << rows.count_shift) - 1 : 0);
  const uint32_t whole = rows.cut ? cut >> rows.count_shift : rows.units;
  RowShare share;
  share.first = (tile - row_tile * task.column_tiles) * task.tile_columns;
  share.step = task.column_tiles * task.tile_columns;
  share.whole = is_row ? whole : 0;
  share.cut_bytes = is_row && rows.cut && !items ? cut & ((1u << rows.count_shift) - 1) : 0;
  share.end = !has_row ? 0 : rows.fills ? rows.units : share.whole + (share.cut_bytes > 0);
  share.src = task.src + uint64_t{is_row ? index.low : 0} * rows.table_row_stride;
  share.dst = task.dst + uint64_t{row} * rows.dst_row_stride;
  return share;
}

// What a row's unit at this byte of the row becomes where there is none to copy.
FUSED_COPY_HOST_DEVICE inline uint64_t pattern_at(uint64_t pattern, uint64_t byte) {
  return pattern >> (byte % sizeof pattern * 8);
}

struct UnitAddress {
  uint64_t src;
  uint64_t dst;
};

// Where a unit of a row lies whose extents leave gaps.
FUSED_COPY_HOST_DEVICE inline UnitAddress locate_unit(const GatherRecord& gather, uint64_t src, uint64_t dst,
                                                      int64_t unit) {
  auto left = static_cast<uint64_t>(unit);
#pragma unroll 1
  for (int d = 0; d < gather.extent_count; ++d) {
    const Extent& extent = gather.extents[d];
    const auto size = static_cast<uint64_t>(extent.size);
    const uint64_t at = d + 1 < gather.extent_count ? left % size : left;
    left /= size;
    src += at * extent.src_stride;
    dst += at * extent.dst_stride;
  }
  return {src, dst};
}

// What an item of the table becomes, before it is converted to the destination's dtype.
FUSED_COPY_HOST_DEVICE inline int64_t derive_item(const GatherRecord& gather, int64_t item) {
  if (gather.page_size != 1) item = item / gather.page_size - (item % gather.page_size < 0);
  return static_cast<int64_t>(static_cast<uint64_t>(item) + static_cast<uint64_t>(gather.addend));
}

// Sums that the kernel for plain tasks has.
FUSED_COPY_HOST_DEVICE constexpr bool is_plain_sum(DType from, DType to) {
  return (from == DType::Int32 || from == DType::Int64) && (to == DType::Int32 || to == DType::Int64);
}

// A sum as torch has it, which wraps in the dtype of its source.
FUSED_COPY_HOST_DEVICE inline int64_t wrap(int64_t number, DType dtype) {
  switch (dtype) {
    case DType::UInt8: return static_cast<uint8_t>(number);
    case DType::Int8: return static_cast<int8_t>(number);
    case DType::Int16: return static_cast<int16_t>(number);
    case DType::Int32: return static_cast<int32_t>(number);
    default: return number;
  }
}

}  // namespace fused_copy
