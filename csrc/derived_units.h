// What one lane of the GPU does of the tasks of derived sources. Addresses of sources are generic: host values lie in
// the launch itself.
#pragma once

#include "derived_tasks.h"
#include "device_units.h"
#include "lane_walk.h"

namespace fused_copy {
namespace {

constexpr unsigned kAllLanes = 0xffffffff;

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

// --- plain tasks -----------------------------------------------------------------------------------------------------

// The first bytes of a unit from the table, the others from the pattern, or as they are.
template <int kBytes>
__device__ inline void store_cut(uint64_t dst, Unit<kBytes> unit, uint32_t bytes, const RowsTask& rows,
                                 uint64_t pattern) {
  uint64_t halves[2] = {};
  memcpy(halves, &unit, kBytes);
  if (rows.fills) {
    const auto mask = [](uint32_t count) { return count >= 8 ? ~uint64_t{0} : (uint64_t{1} << count * 8) - 1; };
    const uint64_t low = mask(bytes), high = mask(bytes > 8 ? bytes - 8 : 0);
    halves[0] = (halves[0] & low) | (pattern & ~low);
    halves[1] = (halves[1] & high) | (pattern & ~high);
    memcpy(&unit, halves, kBytes);
    *in_global<Unit<kBytes>>(dst) = unit;
    return;
  }
  const auto bits_at = [&](uint32_t byte) { return (byte < 8 ? halves[0] : halves[1]) >> (byte % 8 * 8); };
  const bool by_words = dst % 4 == 0 && bytes % 4 == 0;
#pragma unroll 1
  for (uint32_t byte = 0; byte < bytes; byte += by_words ? 4 : 1) {
    if (by_words) *in_global<uint32_t>(dst + byte) = static_cast<uint32_t>(bits_at(byte));
    else *in_global<uint8_t>(dst + byte) = static_cast<uint8_t>(bits_at(byte));
  }
}

template <int kBytes, bool kPlain>
__device__ inline void copy_row(const RowsTask& rows, const RowShare& share, uint32_t column) {
  constexpr int64_t step = kWarpLanes * kBytes;
#pragma unroll 1
  for (uint32_t first = share.first; first < share.end; first += share.step) {
    const uint32_t columns = min(share.end - first, rows.task.tile_columns);
    const uint32_t whole = share.whole > first ? min(share.whole - first, columns) : 0;
    const bool tile_is_cut = share.cut_bytes > 0 && share.whole >= first && whole < columns;
    const bool cuts = tile_is_cut && whole % kWarpLanes == column;
    const uint64_t src = share.src + static_cast<uint64_t>(first) * kBytes;
    const uint64_t dst = share.dst + static_cast<uint64_t>(first) * kBytes;
    Unit<kBytes> cut_unit{};
    if (cuts) cut_unit = *in_global<const Unit<kBytes>>(src + whole * kBytes);
    copy_units<kBytes, false, !kPlain>(src + column * kBytes, dst + column * kBytes, step, step,
                                       (whole + kWarpLanes - 1 - column) / kWarpLanes);
    if (cuts) {
      store_cut<kBytes>(dst + whole * kBytes, cut_unit, share.cut_bytes, rows,
                        pattern_at(rows.pattern, whole * kBytes));
    }
    if (!rows.fills) continue;
    const uint32_t copied = (whole + tile_is_cut + kWarpLanes - 1 - column) / kWarpLanes;
    const uint64_t bits[2] = {pattern_at(rows.pattern, column * kBytes), rows.pattern};
    Unit<kBytes> filled;
    memcpy(&filled, bits, kBytes);
#pragma unroll 1
    for (uint32_t at = column + copied * kWarpLanes; at < columns; at += kWarpLanes) {
      *in_global<Unit<kBytes>>(dst + at * kBytes) = filled;
    }
  }
}

// The rows of page tables: as locate_row() and what follows it, in half of the instructions, which is what a small step
// takes.
__device__ inline void copy_simple_row(const RowsTask& rows, uint32_t tile, uint32_t lane) {
  const Task& task = rows.task;
  const bool items = task.code.operation == Operation::RowItems;
  const uint32_t lanes_log2 = task.code.lanes_log2;
  const uint32_t row_tile = divide(tile, {task.code.column_tiles_shift, rows.column_tiles_multiplier});
  const uint32_t row = (row_tile << (kWarpLanesLog2 - lanes_log2)) + (lane >> lanes_log2);
  const uint32_t column = lane & ((1u << lanes_log2) - 1);
  if (row >= rows.rows) return;
  const uint64_t at = uint64_t{row} * (rows.index_64 ? 8u : 4u);
  const auto* index = in_global<const uint32_t>(rows.index + at);
  const auto* length = in_global<const uint32_t>(rows.lengths + at);
  const uint32_t table_row = index[0], count = length[0];
  uint32_t row_high = 0, count_high = 0;
  if (rows.index_64) {
    row_high = index[1];
    count_high = length[1];
  }
  const uint32_t columns = task.last_columns << (items ? rows.count_shift : 0);
  const bool negative = static_cast<int32_t>(rows.index_64 ? count_high : count) < 0;
  const uint32_t counted = negative ? 0 : count_high > 0 ? columns : min(count, columns);
  const bool is_row = table_row < rows.table_rows && row_high == 0;
  const uint32_t copied = is_row ? rows.cut ? counted : columns : 0;
  const uint64_t src = task.src + uint64_t{table_row} * rows.table_row_stride;
  const uint64_t dst = task.dst + uint64_t{row} * rows.dst_row_stride;
  const uint32_t first_column = (tile - row_tile * task.column_tiles) * task.tile_columns;
  const uint32_t step_columns = task.column_tiles * task.tile_columns;
  if (items) {
    const uint32_t pages = (copied + (1u << rows.count_shift) - 1) >> rows.count_shift;
#pragma unroll 1
    for (uint32_t first = first_column; first < pages; first += step_columns) {
      const auto left = static_cast<int32_t>(min(pages - first, task.tile_columns) - column);
      const uint64_t own_src = src + uint64_t{first + column} * rows.column_stride;
      const uint64_t own_dst = dst + uint64_t{first + column} * sizeof(int32_t);
      const uint64_t step = uint64_t{rows.column_stride} * kWarpLanes;
      int32_t loaded[kLaneItems];
#pragma unroll
      for (int i = 0; i < kLaneItems; ++i) {
        if (i * kWarpLanes < left) loaded[i] = *in_global<const int32_t>(own_src + i * step);
      }
#pragma unroll
      for (int i = 0; i < kLaneItems; ++i) {
        if (i * kWarpLanes < left) {
          *in_global<int32_t>(own_dst + i * kWarpLanes * sizeof(int32_t)) = loaded[i] >> rows.count_shift;
        }
      }
    }
    return;
  }
  constexpr int kBytes = 16;
  constexpr int64_t step = kWarpLanes * kBytes;
  const uint32_t bytes = copied * rows.column_stride;
  const uint32_t tile_bytes = task.tile_columns * kBytes;
#pragma unroll 1
  for (uint32_t first = first_column * kBytes; first < bytes; first += step_columns * kBytes) {
    const uint32_t left = min(bytes - first, tile_bytes);
    const uint32_t own = first + column * kBytes;
    copy_units<kBytes, false>(src + own, dst + own, step, step, (left / kBytes + kWarpLanes - 1 - column) / kWarpLanes);
    const uint32_t cut_bytes = left % kBytes;
    if (cut_bytes > 0 && left / kBytes % kWarpLanes == column) {
      const uint32_t cut = first + left - cut_bytes;
      store_cut<kBytes>(dst + cut, *in_global<const Unit<kBytes>>(src + cut), cut_bytes, rows, 0);
    }
  }
}

// Items of one run of a row and what they become.
struct ItemRun {
  RowShare share;
  uint32_t tile_columns;
  uint32_t item_stride;
  int page_shift;
  int64_t addend;
  bool fills;
  uint64_t pattern;
};

template <class From, class To, bool kPlain>
__device__ inline void copy_items(const ItemRun& run, uint32_t column) {
  const RowShare& share = run.share;
#pragma unroll 1
  for (uint32_t first = share.first; first < share.end; first += share.step) {
    const auto columns = static_cast<int32_t>(min(share.end - first, run.tile_columns) - column);
    const auto whole =
        static_cast<int32_t>(share.whole > first ? share.whole - first : 0) - static_cast<int32_t>(column);
    const uint64_t src = share.src + static_cast<uint64_t>(first + column) * run.item_stride;
    const uint64_t dst = share.dst + static_cast<uint64_t>(first + column) * sizeof(To);
    const auto load = [&](int32_t at, From& item) {
      if (at < min(whole, columns)) item = *reinterpret_cast<const From*>(src + uint64_t(at) * run.item_stride);
    };
    const auto store = [&](int32_t at, From item) {
      using Bits = std::make_unsigned_t<From>;
      const auto sum = static_cast<Bits>(item >> run.page_shift) + static_cast<Bits>(run.addend);
      const To number = at < whole ? static_cast<To>(static_cast<From>(sum)) : static_cast<To>(run.pattern);
      if (at < columns && (at < whole || run.fills)) *in_global<To>(dst + at * sizeof(To)) = number;
    };
    From items[kLaneItems];
    if constexpr (kPlain) {
#pragma unroll
      for (int i = 0; i < kLaneItems; ++i) load(i * kWarpLanes, items[i]);
#pragma unroll
      for (int i = 0; i < kLaneItems; ++i) store(i * kWarpLanes, items[i]);
    } else {
#pragma unroll 1
      for (int32_t at = 0; at < columns; at += kWarpLanes) {
        load(at, items[0]);
        store(at, items[0]);
      }
    }
  }
}

// Plain rows, or integers plus a number: whatever is of items ends in the same code.
template <bool kPlain>
__device__ inline void copy_rows(const std::byte* launch, const StridedTask& task, const PlainTask& read, uint32_t tile,
                                 uint32_t lane) {
  const Operation operation = read.code.operation;
  const uint32_t column = lane & ((1u << read.code.lanes_log2) - 1);
  ItemRun run;
  bool from_64, to_64;
  if (operation == Operation::Plus) {
    PlusTask plus = reinterpret_cast<const PlusTask&>(task);
    asm volatile("" : "+l"(plus.addend), "+r"(plus.items), "+r"(plus.item_stride));
    const RowShare share{.src = resolve(launch, read.src),
                         .dst = read.dst,
                         .first = tile * read.tile_columns,
                         .step = plus.items,
                         .whole = plus.items,
                         .end = plus.items};
    run = {share, read.tile_columns, plus.item_stride, 0, plus.addend, false, 0};
    from_64 = plus.from_64;
    to_64 = plus.to_64;
  } else {
    RowsTask rows = reinterpret_cast<const RowsTask&>(task);
    rows.task = {read.src, read.dst, read.tile_columns, read.last_columns, read.column_tiles, read.code};
    rows.column_tiles_multiplier = read.column_tiles_multiplier;
    rows.table_row_stride = read.src_row_stride;
    rows.dst_row_stride = read.dst_row_stride;
    // Keeps the compiler from moving reads to where they are used first: a warp waits for each that comes later.
    asm volatile(""
                 : "+l"(rows.index), "+l"(rows.lengths), "+r"(rows.table_rows), "+r"(rows.rows), "+r"(rows.units),
                   "+r"(rows.column_stride));
    if constexpr (kPlain) {
      if (rows.simple) return copy_simple_row(rows, tile, lane);
    }
    const RowShare share = locate_row(launch, rows, tile, lane);
    if (operation == Operation::Rows) {
      return with_unit_bytes(read.code.width_log2,
                             [&](auto bytes) { copy_row<decltype(bytes)::value, kPlain>(rows, share, column); });
    }
    run = {share, read.tile_columns, rows.column_stride, rows.count_shift, 0, rows.fills, rows.pattern};
    from_64 = rows.from_64;
    to_64 = rows.to_64;
  }
  if (from_64) {
    if (to_64) return copy_items<int64_t, int64_t, kPlain>(run, column);
    return copy_items<int64_t, int32_t, kPlain>(run, column);
  }
  if (to_64) return copy_items<int32_t, int64_t, kPlain>(run, column);
  copy_items<int32_t, int32_t, kPlain>(run, column);
}

// By one warp, so many lengths at a time that each of its lanes has kLengths of them, every 32nd. Only the low words
// matter of sums that are stored as 32 bits.
template <class Sum, int kLengths>
__device__ inline void sum_up(const SumsTask& sums, uint64_t src, uint32_t lane) {
  const bool from_64 = sums.from == DType::Int64;
  const uint64_t dst = sums.task.dst;
  if (lane == 0) *in_global<Sum>(dst) = 0;
  Sum before = 0;
#pragma unroll 1
  for (int64_t first = 0; first < sums.count; first += kWarpLanes * kLengths) {
    const auto count = static_cast<int32_t>(min(sums.count - first, int64_t{kWarpLanes} * kLengths));
    // Lanes beyond the last length load it as well: without branches, all loads are under way at once.
    Sum kept[kLengths];
#pragma unroll
    for (int i = 0; i < kLengths; ++i) {
      const int32_t at = i * kWarpLanes + static_cast<int32_t>(lane);
      const auto* words = reinterpret_cast<const uint32_t*>(src + (first + min(at, count - 1)) * sums.lengths_stride);
      if constexpr (sizeof(Sum) == 4) kept[i] = words[0];
      else kept[i] = static_cast<Sum>(number_of({words[0], words[from_64]}, from_64));
    }
#pragma unroll
    for (int i = 0; i < kLengths; ++i) {
      if (i * kWarpLanes + static_cast<int32_t>(lane) >= count) kept[i] = 0;
    }
    // All blocks of 32 step by step, as each step takes as long as its shuffle.
#pragma unroll
    for (int step = 1; step < kWarpLanes; step *= 2) {
#pragma unroll
      for (int i = 0; i < kLengths; ++i) {
        const Sum other = __shfl_up_sync(kAllLanes, kept[i], step);
        kept[i] += lane >= static_cast<uint32_t>(step) ? other : 0;
      }
    }
    Sum blocks[kLengths];
#pragma unroll
    for (int i = 0; i < kLengths; ++i) blocks[i] = __shfl_sync(kAllLanes, kept[i], kWarpLanes - 1);
#pragma unroll
    for (int i = 0; i < kLengths; ++i) {
      const int32_t at = i * kWarpLanes + static_cast<int32_t>(lane);
      if (at < count) *in_global<Sum>(dst + (first + at + 1) * sums.dst_stride) = before + kept[i];
      before += blocks[i];
    }
  }
#pragma unroll 1
  for (int64_t i = lane; i < sums.rest; i += kWarpLanes) {
    *in_global<Sum>(dst + (sums.count + 1 + i) * sums.dst_stride) = before;
  }
}

// --- whatever else ---------------------------------------------------------------------------------------------------

// Functions of their own, as nvcc takes minutes for a kernel that chooses the dtype anew for each of several items.
__device__ __noinline__ int64_t load_any(uint64_t address, DType dtype) { return load_integer(address, dtype); }
__device__ __noinline__ int64_t wrap_any(int64_t number, DType dtype) { return wrap(number, dtype); }
__device__ __noinline__ void store_any(uint64_t address, DType dtype, int64_t number) {
  store_integer<__half, __nv_bfloat16>(address, dtype, number);
}

__device__ __noinline__ GatheredRow find_any_row(const std::byte* launch, const GatherRecord& gather, int64_t row) {
  return find_row(launch, gather, row);
}

// The bytes [begin, end) of a row become the pattern, which begins with the row.
__device__ __noinline__ void fill_bytes(const GatherRecord& gather, uint64_t dst, int64_t begin, int64_t end) {
#pragma unroll 1
  for (int64_t i = begin; i < end; ++i) {
    const uint64_t bits = gather.fills_16 && i % 16 >= 8 ? 0 : gather.pattern;
    *in_global<uint8_t>(dst + (i - begin)) = static_cast<uint8_t>(pattern_at(bits, static_cast<uint64_t>(i)));
  }
}

// One unit or item after the other.
__device__ __noinline__ void gather_row(const std::byte* launch, const StridedTask& task, uint32_t tile,
                                        uint32_t lane) {
  const auto& gather = reinterpret_cast<const GatherRecord&>(*record_of(launch, task));
  const TaskCode code = task.task.code;
  const uint32_t number = divide(tile, {code.column_tiles_shift, task.column_tiles_multiplier});
  const int64_t first = static_cast<int64_t>(tile - number * task.task.column_tiles) * task.task.tile_columns;
  const GatheredRow found = find_any_row(launch, gather, number);
  const uint64_t src = resolve(launch, task.task.src) + found.table_row * gather.table_row_stride;
  const uint64_t dst = task.task.dst + number * gather.dst_row_stride;
  const int64_t unit = gather.converts ? 1 : int64_t{1} << code.width_log2;
  const int64_t last = gather.fills ? gather.units : (found.copied + unit - 1) / unit;
  const int64_t end = min(last, first + task.task.tile_columns);
#pragma unroll 1
  for (int64_t i = first + lane; i < end; i += kWarpLanes) {
    const UnitAddress at = locate_unit(gather, src, dst, i);
    const int64_t copied = min(found.copied - i * unit, unit);
    if (gather.converts) {
      if (copied > 0) {
        const int64_t item = derive_item(gather, load_any(at.src, gather.from));
        store_any(at.dst, gather.to, wrap_any(item, gather.from));
      } else {
        fill_bytes(gather, at.dst, 0, 1 << castable_size_log2(static_cast<int>(gather.to)));
      }
    } else if (copied == unit) {
      with_unit_bytes(code.width_log2, [&](auto bytes) {
        using Item = Unit<decltype(bytes)::value>;
        *in_global<Item>(at.dst) = *reinterpret_cast<const Item*>(at.src);
      });
    } else {
      const int64_t some = max(copied, int64_t{0});
      copy_some_bytes(at.src, at.dst, some);
      if (gather.fills) fill_bytes(gather, at.dst + some, i * unit + some, (i + 1) * unit);
    }
  }
}

// By one warp.
__device__ __noinline__ void fill_with_last_row(const std::byte* launch, const StridedTask& task, uint32_t lane) {
  const auto& gather = reinterpret_cast<const GatherRecord&>(*record_of(launch, task));
  int64_t last = -1;
#pragma unroll 1
  for (int64_t end = gather.rows; end > 0 && last < 0; end -= kWarpLanes) {
    const int64_t row = end - 1 - lane;
    const GatheredRow found = row >= 0 ? find_any_row(launch, gather, row) : GatheredRow{0, 0};
    const unsigned rows = __ballot_sync(kAllLanes, found.copied > 0);
    if (rows != 0) last = __shfl_sync(kAllLanes, found.table_row, __ffs(static_cast<int>(rows)) - 1);
  }
  if (last < 0) return;
  const uint64_t src = task.task.src + last * gather.table_row_stride;
#pragma unroll 1
  for (int64_t row = lane; row < gather.rows + gather.rest; row += kWarpLanes) {
    if (row < gather.rows && find_any_row(launch, gather, row).copied > 0) continue;
    const uint64_t dst = task.task.dst + row * gather.dst_row_stride;
    if (gather.from != gather.to) {
      store_any(dst, gather.to, load_any(src, gather.from));
    } else {
      copy_some_bytes(src, dst, 1 << task.task.code.width_log2);
    }
  }
}

// By one warp, of integers of any dtypes.
__device__ __noinline__ void sum_up_any(const SumsTask& sums, uint64_t src, uint32_t lane) {
  uint64_t before = 0;
#pragma unroll 1
  for (int64_t first = 0; first < sums.count + 1 + sums.rest; first += kWarpLanes) {
    const int64_t at = first + lane;
    uint64_t sum = at >= 1 && at <= sums.count
                       ? static_cast<uint64_t>(load_any(src + (at - 1) * sums.lengths_stride, sums.from))
                       : 0;
#pragma unroll 1
    for (int step = 1; step < kWarpLanes; step *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= static_cast<uint32_t>(step)) sum += other;
    }
    sum += before;
    if (at < sums.count + 1 + sums.rest)
      store_any(sums.task.dst + at * sums.dst_stride, sums.to, static_cast<int64_t>(sum));
    before = __shfl_sync(kAllLanes, sum, kWarpLanes - 1);
  }
}

template <bool kPlain>
__device__ inline void run_derived(const std::byte* launch, const StridedTask& task, const PlainTask& read,
                                   uint32_t tile, uint32_t lane) {
  const Operation operation = read.code.operation;
  if (operation == Operation::Rows || operation == Operation::RowItems || operation == Operation::Plus) {
    return copy_rows<kPlain>(launch, task, read, tile, lane);
  }
  if constexpr (!kPlain) {
    if (operation == Operation::Gather) return gather_row(launch, task, tile, lane);
    if (operation == Operation::LastRow) return fill_with_last_row(launch, task, lane);
  }
  SumsTask sums = reinterpret_cast<const SumsTask&>(task);
  asm volatile("" : "+l"(sums.lengths_stride), "+l"(sums.dst_stride), "+l"(sums.count), "+l"(sums.rest));
  const uint64_t src = resolve(launch, read.src);
  if constexpr (!kPlain) {
    sum_up_any(sums, src, lane);
  } else {
    const bool is_short = sums.count <= kWarpLanes;
    if (sums.to == DType::Int64) {
      return is_short ? sum_up<uint64_t, 1>(sums, src, lane) : sum_up<uint64_t, kLaneLengths / 2>(sums, src, lane);
    }
    return is_short ? sum_up<uint32_t, 1>(sums, src, lane) : sum_up<uint32_t, kLaneLengths>(sums, src, lane);
  }
}

}  // namespace
}  // namespace fused_copy
