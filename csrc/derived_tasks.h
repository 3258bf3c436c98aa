// What the tasks of derived sources say beside their StridedTask, and how both back ends read it: rows of a table, sums
// of lengths, integers plus a number.
#pragma once

#include "launch_layout.h"

namespace fused_copy {

// One-dimensional integers of any castable integer dtype.
struct Integers {
  uint64_t address;  // 0: there are none
  int64_t stride;    // bytes
  DType dtype;
  bool in_values;  // the address counts from where the launch's host values begin, until the launch is written
};

// A StridedTask of plain rows: each is one run of units, of which a warp takes a tile as of any plain task, or of items
// that lie `item_stride` apart in the table and side by side in the destination. What is no row, or beyond a row's length,
// stays.
struct alignas(16) RowsTask {
  Task task;
  uint32_t column_tiles_multiplier;
  uint32_t item_stride;   // bytes
  uint32_t column_bytes;  // in the table, of what lengths count
  uint8_t page_shift;     // of items
  bool index_64;
  bool lengths_64;
  bool index_in_values;
  int64_t table_row_stride;  // below 2^32
  int64_t dst_row_stride;
  uint64_t index;
  uint64_t lengths;  // 0: rows are whole
  int64_t table_rows;
  bool from_64;
  bool to_64;
  bool lengths_in_values;
};
static_assert(sizeof(RowsTask) == sizeof(StridedTask) &&
              offsetof(RowsTask, column_tiles_multiplier) == offsetof(StridedTask, column_tiles_multiplier));

constexpr int kMaxRowExtents = kMaxExtents - 1;

// Row i of the task is row index[i] of the table, or row i where there is no index. Of it the first lengths[i] columns
// are copied, or lengths[lengths_index[i]]; the rest is filled or stays. Rows go in units, or item by item where these
// become other numbers. The StridedTask has the addresses and the tiles: its column tiles are the warps that share a
// row, each of which takes every so many'th block of `tile_columns` units.
struct GatherRecord {
  // Read by every warp, all at once.
  Integers index;
  Integers lengths;
  int64_t table_rows;
  int64_t lengths_rows;  // with lengths_index: how many lengths there are
  int64_t table_row_stride;
  int64_t dst_row_stride;
  int64_t rows;         // of the task
  int64_t units;        // of a row
  int64_t columns;      // of a row
  int64_t column_size;  // bytes, or items where items become other numbers
  uint64_t pattern;
  uint8_t extent_count;
  bool side_by_side;  // one extent, without gaps on either side
  bool converts;      // item by item
  bool fills;
  bool fills_16;       // the pattern's upper half is zero, see Operation::Fill16
  uint8_t page_shift;  // log2 of page_size; kNoShift: it is no power of two
  DType from;
  DType to;
  // Read where they matter.
  Integers lengths_index;
  int64_t page_size;  // column j is item j * page_size of the table's row, divided by it
  int64_t addend;
  int64_t rest;  // of LastRow: elements behind the rows, which become the last one too
  Extent extents[kMaxRowExtents];  // of a row's units, in their order; the first has units or items side by side, or not
};
constexpr uint8_t kNoShift = 0xff;

// A StridedTask of [0, l0, l0 + l1, ...], by one warp. Its source are the lengths.
struct alignas(16) SumsTask {
  Task task;
  int64_t lengths_stride;  // bytes, as the next
  int64_t dst_stride;
  int64_t count;  // of the lengths
  int64_t rest;   // elements behind the sums, which become the last one
  DType from;
  DType to;
};
static_assert(sizeof(SumsTask) <= sizeof(StridedTask));

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
  const int64_t before = length - 1;
  const int64_t pages = gather.page_shift != kNoShift ? before >> gather.page_shift : before / gather.page_size;
  return {table_row, (pages < gather.columns ? pages + 1 : gather.columns) * gather.column_size};
}

// What a tile of a RowsTask has to copy: columns that are beyond the row's length are none of it.
struct RowsTile {
  uint64_t src;
  uint64_t dst;
  uint32_t columns;
  uint32_t cut_bytes;  // of the unit that the row's length cuts, behind the columns
};

FUSED_COPY_HOST_DEVICE inline int64_t load_row_number(const std::byte* launch, uint64_t address, uint32_t row,
                                                      bool is_64) {
  const uint64_t begin = resolve(launch, address);
  return is_64 ? reinterpret_cast<const int64_t*>(begin)[row] : reinterpret_cast<const int32_t*>(begin)[row];
}

FUSED_COPY_HOST_DEVICE inline RowsTile locate_rows_tile(const std::byte* launch, const RowsTask& rows, uint32_t tile) {
  const Task& task = rows.task;
  const uint32_t row = divide(tile, {task.code.column_tiles_shift, rows.column_tiles_multiplier});
  const uint32_t column_tile = tile - row * task.column_tiles;
  const int64_t table_row = load_row_number(launch, rows.index, row, rows.index_64);
  const bool items = task.code.operation == Operation::RowItems;
  RowsTile found{.columns = column_tile + 1 == task.column_tiles ? task.last_columns : task.tile_columns};
  const uint64_t first = static_cast<uint64_t>(column_tile) * task.tile_columns;
  if (rows.lengths != 0) {
    const int64_t length = load_row_number(launch, rows.lengths, row, rows.lengths_64);
    uint64_t limit = 0;
    uint32_t cut = 0;
    if (length > 0) {
      if (items) {
        limit = (static_cast<uint64_t>(length - 1) >> rows.page_shift) + 1;
      } else {
        // No row has as many bytes as 2^62.
        const uint64_t bytes =
            static_cast<uint64_t>(length < INT64_C(1) << 30 ? length : INT64_C(1) << 30) * rows.column_bytes;
        limit = bytes >> task.code.width_log2;
        cut = static_cast<uint32_t>(bytes) & ((1u << task.code.width_log2) - 1);
      }
    }
    const uint64_t left = limit > first ? limit - first : 0;
    found.cut_bytes = limit >= first && left < found.columns ? cut : 0;
    if (left < found.columns) found.columns = static_cast<uint32_t>(left);
  }
  if (static_cast<uint64_t>(table_row) >= static_cast<uint64_t>(rows.table_rows)) return {0, 0, 0, 0};
  const uint32_t item = rows.to_64 ? 8 : 4;
  found.src = resolve(launch, task.src) + static_cast<uint64_t>(table_row) * static_cast<uint64_t>(rows.table_row_stride);
  found.dst = task.dst + static_cast<uint64_t>(row) * static_cast<uint64_t>(rows.dst_row_stride);
  found.src += items ? first * rows.item_stride : first << task.code.width_log2;
  found.dst += items ? first * item : first << task.code.width_log2;
  return found;
}

struct UnitAddress {
  uint64_t src;
  uint64_t dst;
};

// Where a unit of a row lies whose extents leave gaps.
FUSED_COPY_HOST_DEVICE inline UnitAddress locate_unit(const GatherRecord& gather, uint64_t src, uint64_t dst,
                                                      int64_t unit) {
  auto left = static_cast<uint64_t>(unit);
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
  if (gather.page_size != 1) {
    if (gather.page_shift != kNoShift) {
      item >>= gather.page_shift;
    } else {
      item = item / gather.page_size - (item % gather.page_size < 0);
    }
  }
  return static_cast<int64_t>(static_cast<uint64_t>(item) + static_cast<uint64_t>(gather.addend));
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
