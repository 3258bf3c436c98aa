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

// The units of a row that this lane visits: from `first` on in steps of a tile that several warps share.
struct RowWalk {
  int64_t first;
  int64_t step;
  int64_t units;  // of a tile's row
};

// What a row's unit becomes beyond the row's length.
template <int kBytes>
__device__ inline Unit<kBytes> fill_unit(const GatherRecord& gather, int64_t unit) {
  const uint32_t at = static_cast<uint32_t>(unit * kBytes) % 16;
  const uint64_t low = gather.fills_16 && at >= 8 ? 0 : gather.pattern >> (at % 8 * 8);
  const uint64_t bits[2] = {low, gather.fills_16 ? 0 : gather.pattern};
  Unit<kBytes> filled;
  memcpy(&filled, bits, kBytes);
  return filled;
}

// A unit that the row's length cuts: what is beyond it is filled, byte by byte, or stays.
template <int kBytes>
__device__ inline void cut_unit(const GatherRecord& gather, uint64_t src, uint64_t dst, int64_t unit, int64_t copied) {
  copy_bytes<kBytes, true>(src, dst, copied);
  if (!gather.fills) return;
  const Unit<kBytes> filled = fill_unit<kBytes>(gather, unit);
  uint8_t bytes[kBytes];
  memcpy(bytes, &filled, kBytes);
#pragma unroll
  for (int i = 1; i < kBytes; ++i) {
    if (i >= copied) *in_global<uint8_t>(dst + i) = bytes[i];
  }
}

template <int kBytes>
__device__ inline void gather_units(const GatherRecord& gather, uint64_t src, uint64_t dst, int64_t copied,
                                    const RowWalk& walk) {
  const int64_t whole = copied / kBytes;
  const int64_t cut = copied % kBytes;
  const int64_t end = gather.fills ? gather.units : whole + (cut > 0);
#pragma unroll 1
  for (int64_t first = walk.first; first < end; first += walk.step) {
    Unit<kBytes> units[kGatherUnits];
    if (gather.side_by_side) {
#pragma unroll
      for (int i = 0; i < kGatherUnits; ++i) {
        const int64_t unit = first + i * kWarpLanes;
        if (unit < whole) units[i] = *reinterpret_cast<const Unit<kBytes>*>(src + unit * kBytes);
      }
#pragma unroll
      for (int i = 0; i < kGatherUnits; ++i) {
        const int64_t unit = first + i * kWarpLanes;
        if (unit < whole) *in_global<Unit<kBytes>>(dst + unit * kBytes) = units[i];
      }
    }
#pragma unroll 1
    for (int i = 0; i < kGatherUnits; ++i) {
      const int64_t unit = first + i * kWarpLanes;
      if (unit >= end) break;
      if (gather.side_by_side && unit < whole) continue;
      const UnitAddress at = gather.side_by_side ? UnitAddress{src + unit * kBytes, dst + unit * kBytes}
                                                 : locate_unit(gather, src, dst, unit);
      if (unit < whole) {
        *in_global<Unit<kBytes>>(at.dst) = *reinterpret_cast<const Unit<kBytes>*>(at.src);
      } else if (unit == whole && cut > 0) {
        cut_unit<kBytes>(gather, at.src, at.dst, unit, cut);
      } else {
        *in_global<Unit<kBytes>>(at.dst) = fill_unit<kBytes>(gather, unit);
      }
    }
  }
}

// An item beyond the row's length.
__device__ __noinline__ void fill_item(const GatherRecord& gather, uint64_t dst) {
  with_unit_bytes(static_cast<uint32_t>(castable_size_log2(static_cast<int>(gather.to))), [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    *in_global<Unit<kBytes>>(dst) = fill_unit<kBytes>(gather, 0);
  });
}

// Batches of loads where items have one stride, and else one item after the other: nvcc takes minutes for a batch of
// either.
template <class From, class To>
__device__ inline void gather_items(const GatherRecord& gather, uint64_t src, uint64_t dst, int64_t copied,
                                    const RowWalk& walk) {
  const auto store = [&](uint64_t address, int64_t item) {
    To::store(address, gather.to, From::wrap(derive_item(gather, item), gather.from));
  };
  const int64_t src_stride = gather.extents[0].src_stride;
  const int64_t dst_stride = gather.extents[0].dst_stride;
#pragma unroll 1
  for (int64_t first = walk.first; first < copied && gather.extent_count == 1; first += walk.step) {
    int64_t items[kGatherUnits];
#pragma unroll
    for (int i = 0; i < kGatherUnits; ++i) {
      const int64_t unit = first + i * kWarpLanes;
      if (unit < copied) items[i] = From::load(src + unit * src_stride, gather.from);
    }
#pragma unroll
    for (int i = 0; i < kGatherUnits; ++i) {
      const int64_t unit = first + i * kWarpLanes;
      if (unit < copied) store(dst + unit * dst_stride, items[i]);
    }
  }
  const int64_t end = gather.fills ? gather.units : gather.extent_count == 1 ? 0 : copied;
#pragma unroll 1
  for (int64_t first = walk.first; first < end; first += walk.step) {
#pragma unroll 1
    for (int64_t unit = first; unit < min(end, first + walk.units); unit += kWarpLanes) {
      if (unit < copied && gather.extent_count == 1) continue;
      const UnitAddress at = locate_unit(gather, src, dst, unit);
      if (unit < copied) {
        store(at.dst, From::load(at.src, gather.from));
      } else {
        fill_item(gather, at.dst);
      }
    }
  }
}

__device__ inline void gather_rows(const std::byte* launch, const StridedTask& task, uint32_t tile, uint32_t lane) {
  const auto& gather = reinterpret_cast<const GatherRecord&>(*record_of(launch, task));
  const TaskCode code = task.task.code;
  const uint32_t row_tile = divide(tile, {code.column_tiles_shift, task.column_tiles_multiplier});
  const uint32_t share = tile - row_tile * task.task.column_tiles;
  const int64_t row = static_cast<int64_t>(row_tile) * task.tile_rows + (lane >> code.lanes_log2);
  if (row >= gather.rows) return;
  const RowWalk walk{static_cast<int64_t>(share) * task.task.tile_columns + (lane & ((1u << code.lanes_log2) - 1)),
                     static_cast<int64_t>(task.task.column_tiles) * task.task.tile_columns, task.task.tile_columns};
  const GatheredRow found = find_row(launch, gather, row);
  const uint64_t src = resolve(launch, task.task.src) + found.table_row * gather.table_row_stride;
  const uint64_t dst = task.task.dst + row * gather.dst_row_stride;
  if (gather.converts) {
    return with_integers(gather.from, gather.to, [&](auto from, auto to) {
      gather_items<decltype(from), decltype(to)>(gather, src, dst, found.copied, walk);
    });
  }
  with_unit_bytes(code.width_log2, [&](auto bytes) {
    gather_units<decltype(bytes)::value>(gather, src, dst, found.copied, walk);
  });
}

// By one warp.
__device__ inline void fill_with_last_row(const std::byte* launch, const StridedTask& task, uint32_t lane) {
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

// By one warp: of so many lengths at a time each lane sums up a few, and the lanes their sums. Sums wrap alike in 32 bits
// and in 64 where no more than 32 are stored.
template <class Sum, class From, class To>
__device__ inline void sum_up(const std::byte* launch, const StridedTask& task, const SumsRecord& sums, uint32_t lane) {
  constexpr unsigned kAllLanes = 0xffffffff;
  const uint64_t src = resolve(launch, sums.lengths.address);
  const auto store = [&](int64_t at, Sum sum) {
    To::store(task.task.dst + at * sums.dst_stride, sums.to, static_cast<int64_t>(sum));
  };
  if (lane == 0) store(0, 0);
  Sum before = 0;
#pragma unroll 1
  for (int64_t first = 0; first < sums.count; first += kWarpLanes * kLaneLengths) {
    Sum kept[kLaneLengths];
    const int64_t own = first + lane * kLaneLengths;
    const int64_t count = sums.count - own;
#pragma unroll
    for (int i = 0; i < kLaneLengths; ++i) {
      kept[i] = i < count ? static_cast<Sum>(From::load(src + (own + i) * sums.lengths.stride, sums.lengths.dtype)) : 0;
    }
#pragma unroll
    for (int i = 1; i < kLaneLengths; ++i) kept[i] += kept[i - 1];
    Sum sum = kept[kLaneLengths - 1];
#pragma unroll
    for (int step = 1; step < kWarpLanes; step *= 2) {
      const Sum other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= static_cast<uint32_t>(step)) sum += other;
    }
    const Sum lanes_before = before + sum - kept[kLaneLengths - 1];
#pragma unroll
    for (int i = 0; i < kLaneLengths; ++i) {
      if (i < count) store(own + i + 1, lanes_before + kept[i]);
    }
    before += __shfl_sync(kAllLanes, sum, kWarpLanes - 1);
  }
#pragma unroll 1
  for (int64_t i = lane; i < sums.rest; i += kWarpLanes) store(sums.count + 1 + i, before);
}

// Not inlined: nvcc takes minutes for a kernel in which it may relate this choice to those that follow.
__device__ __noinline__ void run_derived(const std::byte* launch, const StridedTask& task, uint32_t tile, uint32_t lane) {
  switch (task.task.code.operation) {
    case Operation::Gather: return gather_rows(launch, task, tile, lane);
    case Operation::LastRow: return fill_with_last_row(launch, task, lane);
    default: break;
  }
  const auto& sums = reinterpret_cast<const SumsRecord&>(*record_of(launch, task));
  with_integers(sums.lengths.dtype, sums.to, [&](auto from, auto to) {
    using To = decltype(to);
    using Sum = std::conditional_t<std::is_same_v<To, TypedIntegers<int32_t>>, uint32_t, uint64_t>;
    sum_up<Sum, decltype(from), To>(launch, task, sums, lane);
  });
}

}  // namespace
}  // namespace fused_copy
