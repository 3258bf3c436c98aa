// What one lane of the GPU does of the tasks of derived sources. Addresses of sources are generic: host values lie in the
// launch itself.
#pragma once

#include "derived_tasks.h"
#include "device_units.h"

namespace fused_copy {
namespace {

// Calls `body` with the bytes of a unit as a constant.
template <class Body>
__device__ inline void with_unit_bytes(uint32_t width_log2, Body body) {
  if (width_log2 < 4) {
    switch (width_log2) {
      case 0: return body(std::integral_constant<int, 1>());
      case 1: return body(std::integral_constant<int, 2>());
      case 2: return body(std::integral_constant<int, 4>());
      default: return body(std::integral_constant<int, 8>());
    }
  }
  body(std::integral_constant<int, 16>());
}

// Integers as they lie in memory. Those of ids, positions and lengths have code of their own; all others go through one
// function, as nvcc takes minutes for a kernel that chooses the dtype anew for each of several items.
template <class T>
struct TypedIntegers {
  __device__ static int64_t load(uint64_t address, DType) { return *reinterpret_cast<const T*>(address); }
  __device__ static int64_t wrap(int64_t number, DType) { return static_cast<T>(number); }
  __device__ static void store(uint64_t address, DType, int64_t number) {
    *in_global<T>(address) = static_cast<T>(number);
  }
};

struct AnyIntegers {
  __device__ __noinline__ static int64_t load(uint64_t address, DType dtype) { return load_integer(address, dtype); }
  __device__ __noinline__ static int64_t wrap(int64_t number, DType dtype) {
    return fused_copy::wrap(number, dtype);
  }
  __device__ __noinline__ static void store(uint64_t address, DType dtype, int64_t number) {
    store_integer<__half, __nv_bfloat16>(address, dtype, number);
  }
};

// Calls `body` with how integers of these two dtypes are loaded and stored.
template <class Body>
__device__ inline void with_integers(DType from, DType to, Body body) {
  if (from == DType::Int32 && to == DType::Int32) return body(TypedIntegers<int32_t>(), TypedIntegers<int32_t>());
  if (from == DType::Int64 && to == DType::Int32) return body(TypedIntegers<int64_t>(), TypedIntegers<int32_t>());
  if (from == DType::Int32 && to == DType::Int64) return body(TypedIntegers<int32_t>(), TypedIntegers<int64_t>());
  body(AnyIntegers(), AnyIntegers());
}

// One lane's share of a row. By value: what a function reads through a pointer to the launch takes far longer than what
// the kernel reads of its own parameters.
struct RowShare {
  uint64_t src;
  uint64_t dst;
  int64_t copied;   // bytes or items of the row; what follows is filled or stays
  int64_t units;    // of the row
  int64_t first;    // unit of this lane, the others of a tile following at every 32nd,
  int64_t step;     // and from tile to tile
  int64_t tile;     // units of a tile, from this lane's first on
  uint64_t pattern;
  bool fills;
  bool fills_16;
};

// What a row's unit becomes beyond the row's length.
template <int kBytes>
__device__ inline Unit<kBytes> fill_unit(const RowShare& row, int64_t unit) {
  const uint32_t at = static_cast<uint32_t>(unit * kBytes) % 16;
  const uint64_t low = row.fills_16 && at >= 8 ? 0 : row.pattern >> (at % 8 * 8);
  const uint64_t bits[2] = {low, row.fills_16 ? 0 : row.pattern};
  Unit<kBytes> filled;
  memcpy(&filled, bits, kBytes);
  return filled;
}

// A unit at the row's length or beyond it: what is beyond is filled, byte by byte, or stays.
template <int kBytes>
__device__ inline void end_unit(const RowShare& row, uint64_t src, uint64_t dst, int64_t unit) {
  const int64_t copied = row.copied - unit * kBytes;
  if (copied <= 0) {
    *in_global<Unit<kBytes>>(dst) = fill_unit<kBytes>(row, unit);
    return;
  }
  copy_bytes<kBytes, true>(src, dst, copied);
  if (!row.fills) return;
  const Unit<kBytes> filled = fill_unit<kBytes>(row, unit);
  uint8_t bytes[kBytes];
  memcpy(bytes, &filled, kBytes);
#pragma unroll
  for (int i = 1; i < kBytes; ++i) {
    if (i >= copied) *in_global<uint8_t>(dst + i) = bytes[i];
  }
}

template <int kBytes>
__device__ inline void gather_units(RowShare row) {
  const int64_t whole = row.copied / kBytes;
  const int64_t end = row.fills ? row.units : (row.copied + kBytes - 1) / kBytes;
#pragma unroll 1
  for (int64_t first = row.first; first < end; first += row.step) {
    const uint64_t src = row.src + first * kBytes;
    const uint64_t dst = row.dst + first * kBytes;
    const auto left = static_cast<int32_t>(min(whole - first, row.tile));
    Unit<kBytes> units[kGatherUnits];
#pragma unroll
    for (int i = 0; i < kGatherUnits; ++i) {
      if (i * kWarpLanes < left) units[i] = *reinterpret_cast<const Unit<kBytes>*>(src + i * kWarpLanes * kBytes);
    }
#pragma unroll
    for (int i = 0; i < kGatherUnits; ++i) {
      if (i * kWarpLanes < left) *in_global<Unit<kBytes>>(dst + i * kWarpLanes * kBytes) = units[i];
    }
    const int64_t tile_end = min(end, first + row.tile);
    if (whole >= tile_end) continue;
#pragma unroll 1
    for (int64_t unit = first; unit < tile_end; unit += kWarpLanes) {
      if (unit >= whole) end_unit<kBytes>(row, row.src + unit * kBytes, row.dst + unit * kBytes, unit);
    }
  }
}

// Of rows whose units leave gaps: through a pointer, unit by unit.
__device__ __noinline__ void gather_apart(const GatherRecord& gather, RowShare row, uint32_t width_log2) {
  with_unit_bytes(width_log2, [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    const int64_t end = row.fills ? row.units : (row.copied + kBytes - 1) / kBytes;
#pragma unroll 1
    for (int64_t first = row.first; first < end; first += row.step) {
#pragma unroll 1
      for (int64_t unit = first; unit < min(end, first + row.tile); unit += kWarpLanes) {
        const UnitAddress at = locate_unit(gather, row.src, row.dst, unit);
        if ((unit + 1) * kBytes <= row.copied) {
          *in_global<Unit<kBytes>>(at.dst) = *reinterpret_cast<const Unit<kBytes>*>(at.src);
        } else {
          end_unit<kBytes>(row, at.src, at.dst, unit);
        }
      }
    }
  });
}

// How the items of a row become others.
struct ItemChange {
  int64_t src_stride;
  int64_t dst_stride;
  int64_t page_size;
  int64_t addend;
  uint8_t page_shift;
  bool one_extent;
  DType from;
  DType to;
};

__device__ inline int64_t change_item(const ItemChange& change, int64_t item) {
  if (change.page_shift != kNoShift) return (item >> change.page_shift) + change.addend;
  return item / change.page_size - (item % change.page_size < 0) + change.addend;
}

// An item beyond the row's length.
__device__ __noinline__ void fill_item(const RowShare& row, uint64_t dst, DType to) {
  with_unit_bytes(static_cast<uint32_t>(castable_size_log2(static_cast<int>(to))), [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    *in_global<Unit<kBytes>>(dst) = fill_unit<kBytes>(row, 0);
  });
}

// Batches of loads where items have one stride.
template <class From, class To>
__device__ inline void gather_items(RowShare row, ItemChange change) {
#pragma unroll 1
  for (int64_t first = row.first; first < row.copied; first += row.step) {
    const uint64_t src = row.src + first * change.src_stride;
    const uint64_t dst = row.dst + first * change.dst_stride;
    const auto left = static_cast<int32_t>(min(row.copied - first, row.tile));
    int64_t items[kGatherUnits];
#pragma unroll
    for (int i = 0; i < kGatherUnits; ++i) {
      if (i * kWarpLanes < left) items[i] = From::load(src + i * (change.src_stride * kWarpLanes), change.from);
    }
#pragma unroll
    for (int i = 0; i < kGatherUnits; ++i) {
      if (i * kWarpLanes < left) {
        To::store(dst + i * (change.dst_stride * kWarpLanes), change.to,
                  From::wrap(change_item(change, items[i]), change.from));
      }
    }
  }
}

// One item after the other, of any dtypes and strides; and what is to be filled.
__device__ __noinline__ void gather_items_apart(const GatherRecord& gather, RowShare row, ItemChange change,
                                                int64_t begin) {
  const int64_t end = row.fills ? row.units : row.copied;
#pragma unroll 1
  for (int64_t first = row.first; first < end; first += row.step) {
#pragma unroll 1
    for (int64_t unit = first; unit < min(end, first + row.tile); unit += kWarpLanes) {
      if (unit < begin) continue;
      const UnitAddress at = locate_unit(gather, row.src, row.dst, unit);
      if (unit < row.copied) {
        AnyIntegers::store(at.dst, change.to,
                           AnyIntegers::wrap(change_item(change, AnyIntegers::load(at.src, change.from)), change.from));
      } else {
        fill_item(row, at.dst, change.to);
      }
    }
  }
}

__device__ inline void gather_rows(const std::byte* launch, const StridedTask& task, uint32_t tile, uint32_t lane) {
  const auto* record = reinterpret_cast<const GatherRecord*>(record_of(launch, task));
  GatherRecord gather = *record;
  // Keeps the compiler from moving reads to where they are used first: a warp waits for each that comes later.
  asm volatile(""
               : "+l"(gather.index.address), "+l"(gather.index.stride), "+l"(gather.lengths.address),
                 "+l"(gather.lengths.stride), "+l"(gather.table_rows), "+l"(gather.table_row_stride),
                 "+l"(gather.dst_row_stride), "+l"(gather.rows), "+l"(gather.units), "+l"(gather.columns),
                 "+l"(gather.column_size), "+l"(gather.pattern));
  const TaskCode code = task.task.code;
  const uint32_t row_tile = divide(tile, {code.column_tiles_shift, task.column_tiles_multiplier});
  const uint32_t share = tile - row_tile * task.task.column_tiles;
  const int64_t number = static_cast<int64_t>(row_tile) * task.tile_rows + (lane >> code.lanes_log2);
  if (number >= gather.rows) return;
  const GatheredRow found = find_row(launch, gather, number);
  const RowShare row{
      .src = resolve(launch, task.task.src) + found.table_row * gather.table_row_stride,
      .dst = task.task.dst + number * gather.dst_row_stride,
      .copied = found.copied,
      .units = gather.units,
      .first = static_cast<int64_t>(share) * task.task.tile_columns + (lane & ((1u << code.lanes_log2) - 1)),
      .step = static_cast<int64_t>(task.task.column_tiles) * task.task.tile_columns,
      .tile = task.task.tile_columns - (lane & ((1u << code.lanes_log2) - 1)),
      .pattern = gather.pattern,
      .fills = gather.fills,
      .fills_16 = gather.fills_16,
  };
  if (!gather.converts) {
    if (!gather.side_by_side) return gather_apart(*record, row, code.width_log2);
    return with_unit_bytes(code.width_log2, [&](auto bytes) { gather_units<decltype(bytes)::value>(row); });
  }
  const ItemChange change{.src_stride = gather.extents[0].src_stride,
                          .dst_stride = gather.extents[0].dst_stride,
                          .page_size = gather.page_size,
                          .addend = gather.addend,
                          .page_shift = gather.page_shift,
                          .one_extent = gather.extent_count == 1,
                          .from = gather.from,
                          .to = gather.to};
  int64_t begin = 0;
  if (change.one_extent) {
    if (change.from == DType::Int32 && change.to == DType::Int32) {
      gather_items<TypedIntegers<int32_t>, TypedIntegers<int32_t>>(row, change);
      begin = row.copied;
    } else if (change.from == DType::Int64 && change.to == DType::Int32) {
      gather_items<TypedIntegers<int64_t>, TypedIntegers<int32_t>>(row, change);
      begin = row.copied;
    }
  }
  if (begin == 0 || row.fills) gather_items_apart(*record, row, change, begin);
}

// By one warp.
__device__ __noinline__ void fill_with_last_row(const std::byte* launch, const StridedTask& task, uint32_t lane) {
  const auto& gather = reinterpret_cast<const GatherRecord&>(*record_of(launch, task));
  constexpr unsigned kAllLanes = 0xffffffff;
  int64_t last = -1;
#pragma unroll 1
  for (int64_t end = gather.rows; end > 0 && last < 0; end -= kWarpLanes) {
    const int64_t row = end - 1 - lane;
    const GatheredRow found = row >= 0 ? find_row(launch, gather, row) : GatheredRow{0, 0};
    const unsigned rows = __ballot_sync(kAllLanes, found.copied > 0);
    if (rows != 0) last = __shfl_sync(kAllLanes, found.table_row, __ffs(static_cast<int>(rows)) - 1);
  }
  if (last < 0) return;
  const uint64_t src = task.task.src + last * gather.table_row_stride;
#pragma unroll 1
  for (int64_t row = lane; row < gather.rows + gather.rest; row += kWarpLanes) {
    if (row < gather.rows && find_row(launch, gather, row).copied > 0) continue;
    const uint64_t dst = task.task.dst + row * gather.dst_row_stride;
    if (gather.from != gather.to) {
      AnyIntegers::store(dst, gather.to, AnyIntegers::load(src, gather.from));
    } else {
      with_unit_bytes(task.task.code.width_log2, [&](auto bytes) {
        using Item = Unit<decltype(bytes)::value>;
        *in_global<Item>(dst) = *reinterpret_cast<const Item*>(src);
      });
    }
  }
}

// By one warp: so many lengths at a time, each lane every 32nd. Sums wrap alike in 32 bits and in 64 where no more than
// 32 are stored.
template <class Sum, class From, class To>
__device__ inline void sum_up(const SumsTask& sums, uint64_t lengths, uint32_t lane) {
  constexpr unsigned kAllLanes = 0xffffffff;
  const uint64_t dst = sums.task.dst;
  Sum before = 0;
#pragma unroll 1
  for (int64_t first = 0; first < sums.count; first += kWarpLanes * kLaneLengths) {
    const auto left = static_cast<int32_t>(min(sums.count - first, int64_t{kWarpLanes} * kLaneLengths));
    const uint64_t own_src = lengths + (first + lane) * sums.lengths_stride;
    const uint64_t own_dst = dst + (first + lane + 1) * sums.dst_stride;
    Sum kept[kLaneLengths];
#pragma unroll
    for (int i = 0; i < kLaneLengths; ++i) {
      const int32_t at = i * kWarpLanes + static_cast<int32_t>(lane);
      kept[i] = at < left ? static_cast<Sum>(From::load(own_src + i * kWarpLanes * sums.lengths_stride, sums.from)) : 0;
    }
#pragma unroll
    for (int i = 0; i < kLaneLengths; ++i) {
      if (i * kWarpLanes >= left) break;
#pragma unroll
      for (int step = 1; step < kWarpLanes; step *= 2) {
        const Sum other = __shfl_up_sync(kAllLanes, kept[i], step);
        if (lane >= static_cast<uint32_t>(step)) kept[i] += other;
      }
      const int32_t at = i * kWarpLanes + static_cast<int32_t>(lane);
      const Sum sum = before + kept[i];
      if (at < left) To::store(own_dst + i * kWarpLanes * sums.dst_stride, sums.to, static_cast<int64_t>(sum));
      before += __shfl_sync(kAllLanes, kept[i], kWarpLanes - 1);
    }
  }
  if (lane == 0) To::store(dst, sums.to, 0);
#pragma unroll 1
  for (int64_t i = lane; i < sums.rest; i += kWarpLanes) {
    To::store(dst + (sums.count + 1 + i) * sums.dst_stride, sums.to, static_cast<int64_t>(before));
  }
}

template <class From, class To>
__device__ inline void copy_row_items(const RowsTask& rows, const RowsTile& tile, uint32_t lane) {
  constexpr int kItems = max_lane_units(sizeof(To));
  const uint64_t src = tile.src + uint64_t{lane} * rows.item_stride;
  const uint64_t dst = tile.dst + lane * sizeof(To);
  const auto count = static_cast<int32_t>(tile.columns - lane);
  From items[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (i * kWarpLanes < count) {
      items[i] = *reinterpret_cast<const From*>(src + static_cast<uint64_t>(i * kWarpLanes) * rows.item_stride);
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (i * kWarpLanes < count) *in_global<To>(dst + i * kWarpLanes * sizeof(To)) = static_cast<To>(items[i] >> rows.page_shift);
  }
}

__device__ inline void copy_rows_tile(const std::byte* launch, const RowsTask& task, uint32_t tile, uint32_t lane) {
  RowsTask rows = task;
  // Keeps the compiler from moving reads to where they are used first: a warp waits for each that comes later.
  asm volatile(""
               : "+l"(rows.task.src), "+l"(rows.task.dst), "+r"(rows.task.tile_columns), "+r"(rows.task.last_columns),
                 "+r"(rows.task.column_tiles), "+r"(rows.column_tiles_multiplier), "+r"(rows.item_stride),
                 "+r"(rows.column_bytes), "+l"(rows.table_row_stride), "+l"(rows.dst_row_stride), "+l"(rows.index),
                 "+l"(rows.lengths), "+l"(rows.table_rows));
  const RowsTile found = locate_rows_tile(launch, rows, tile);
  if (rows.task.code.operation == Operation::RowItems) {
    if (rows.from_64) {
      return rows.to_64 ? copy_row_items<int64_t, int64_t>(rows, found, lane)
                        : copy_row_items<int64_t, int32_t>(rows, found, lane);
    }
    return rows.to_64 ? copy_row_items<int32_t, int64_t>(rows, found, lane)
                      : copy_row_items<int32_t, int32_t>(rows, found, lane);
  }
  with_unit_bytes(rows.task.code.width_log2, [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    constexpr int64_t step = kWarpLanes * kBytes;
    const uint32_t at = lane * kBytes;
    copy_units<kBytes, true>(found.src + at, found.dst + at, step, step, (found.columns + kWarpLanes - 1 - lane) / kWarpLanes);
    if (found.cut_bytes > 0 && lane == found.columns % kWarpLanes) {
      const uint32_t cut = found.columns * kBytes;
      copy_bytes<kBytes, true>(found.src + cut, found.dst + cut, found.cut_bytes);
    }
  });
}

__device__ inline void run_derived(const std::byte* launch, const StridedTask& task, uint32_t tile, uint32_t lane) {
  const Operation operation = task.task.code.operation;
  if (operation == Operation::Rows || operation == Operation::RowItems) {
    return copy_rows_tile(launch, reinterpret_cast<const RowsTask&>(task), tile, lane);
  }
  if (operation == Operation::Gather) return gather_rows(launch, task, tile, lane);
  if (operation == Operation::LastRow) return fill_with_last_row(launch, task, lane);
  SumsTask sums = reinterpret_cast<const SumsTask&>(task);
  asm volatile("" : "+l"(sums.lengths_stride), "+l"(sums.dst_stride), "+l"(sums.count), "+l"(sums.rest));
  with_integers(sums.from, sums.to, [&](auto from, auto to) {
    using To = decltype(to);
    using Sum = std::conditional_t<std::is_same_v<To, TypedIntegers<int32_t>>, uint32_t, uint64_t>;
    sum_up<Sum, decltype(from), To>(sums, resolve(launch, sums.task.src), lane);
  });
}

}  // namespace
}  // namespace fused_copy
