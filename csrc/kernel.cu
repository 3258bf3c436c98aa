#include <cuda_runtime.h>

#include "derived_units.h"
#include "kernels.h"
#include "lane_walk.h"

namespace fused_copy {
namespace {

// In launches with other sources by one function, which is short, as such rows are rare there.
template <int kBytes, bool kAnywhere>
__device__ inline void copy_edge(uint64_t src, uint64_t dst, int64_t count) {
  if constexpr (kAnywhere) copy_some_bytes(src, dst, count);
  else copy_bytes<kBytes>(src, dst, count);
}

// A tile of one row, in units that are aligned in the destination's address space: the row may begin and end in the
// middle of a unit, and the last of its columns may be beyond it.
template <int kBytes, bool kAnywhere>
__device__ inline void copy_ragged_tile(const Tile& tile, uint32_t lane) {
  constexpr int64_t step = kWarpLanes * kBytes;
  const auto phase = static_cast<int64_t>(tile.dst % kBytes);
  const int64_t end = phase + tile.row_bytes;
  const int64_t first = (static_cast<int64_t>(tile.first_column) + lane) * kBytes;
  const int64_t tile_end = min(end, static_cast<int64_t>(tile.first_column + tile.columns) * kBytes);
  if (first >= tile_end) return;
  uint64_t src = tile.src - phase + first;
  uint64_t dst = tile.dst - phase + first;
  auto count = static_cast<uint32_t>((tile_end - first + step - 1) / step);
  const int64_t last = first + (count - 1) * step;
  const bool cut_last = last + kBytes > end;
  if (first < phase) {
    const int64_t bytes = min(end, static_cast<int64_t>(kBytes)) - phase;
    copy_edge<kBytes, kAnywhere>(src + phase, dst + phase, bytes);
    if (count == 1) return;
    src += step;
    dst += step;
    --count;
  }
  if (cut_last) --count;
  copy_units<kBytes, kAnywhere, kAnywhere>(src, dst, step, step, count);
  if (cut_last) copy_edge<kBytes, kAnywhere>(src + count * step, dst + count * step, end - last);
}

// Every unit of a lane lies at the same place of the pattern: lanes step by 32 units, rows begin with the pattern.
template <int kBytes>
__device__ inline void fill_units(uint64_t pattern, bool upper_half_zero, const LaneWalk& walk, int64_t step) {
  const uint32_t at = static_cast<uint32_t>(walk.column * kBytes) % 16;
  const uint64_t low = upper_half_zero && at >= 8 ? 0 : pattern >> (at % 8 * 8);
  const uint64_t bits[2] = {low, upper_half_zero ? 0 : pattern};
  Unit<kBytes> unit;
  memcpy(&unit, bits, kBytes);
#pragma unroll 1
  for (uint32_t i = 0; i < walk.count; ++i) *in_global<Unit<kBytes>>(walk.dst + i * step) = unit;
}

using Types = CastTypes<__half, __nv_bfloat16>;

template <class T>
using Canonical = std::conditional_t<
    std::is_same_v<T, double>, double,
    std::conditional_t<std::is_same_v<T, float> || std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, float,
                       int64_t>>;

// Ten dtypes make ninety casts. All but the direct ones go through the widest type of the source's kind, which holds
// the value exactly and converts to the same result, so that there is code for ten loads and thirty stores instead.
template <int kElements>
union CastUnits {
  int64_t integers[kCastBatch][kElements];
  double doubles[kCastBatch][kElements];
  float floats[kCastBatch][kElements];

  template <class T>
  __device__ T& at(int unit, int element) {
    if constexpr (std::is_same_v<T, int64_t>) return integers[unit][element];
    else if constexpr (std::is_same_v<T, double>) return doubles[unit][element];
    else return floats[unit][element];
  }
};

template <class From, int kElements>
__device__ inline void load_units(CastUnits<kElements>& units, const LaneWalk& walk, uint32_t first) {
#pragma unroll
  for (int i = 0; i < kCastBatch; ++i) {
    if (first + i >= walk.count) break;
    const auto loaded = *in_global<const Elements<From, kElements>>(walk.src + (first + i) * walk.src_step);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      units.template at<Canonical<From>>(i, e) =
          convert<Canonical<From>, From, __half, __nv_bfloat16>(loaded.values[e]);
    }
  }
}

template <class From, class To, int kElements>
__device__ inline void store_units(CastUnits<kElements>& units, const LaneWalk& walk, uint32_t first) {
#pragma unroll
  for (int i = 0; i < kCastBatch; ++i) {
    if (first + i >= walk.count) break;
    Elements<To, kElements> stored;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      stored.values[e] = convert<To, From, __half, __nv_bfloat16>(units.template at<From>(i, e));
    }
    *in_global<Elements<To, kElements>>(walk.dst + (first + i) * walk.dst_step) = stored;
  }
}

template <class From, int kElements, int... kTo>
__device__ inline void store_as(int to, std::integer_sequence<int, kTo...>, CastUnits<kElements>& units,
                                const LaneWalk& walk, uint32_t first) {
  ((to == kTo ? store_units<From, Types::at<kTo>>(units, walk, first) : void()), ...);
}

template <int kElements, int... kDTypes>
__device__ inline void cast_units(int from, int to, const LaneWalk& walk,
                                  std::integer_sequence<int, kDTypes...> dtypes) {
  for (uint32_t first = 0; first < walk.count; first += kCastBatch) {
    CastUnits<kElements> units;
    ((from == kDTypes ? load_units<Types::at<kDTypes>>(units, walk, first) : void()), ...);
    if (from == static_cast<int>(DType::Float64)) {
      store_as<double>(to, dtypes, units, walk, first);
    } else if (from >= kCastableIntegers) {
      store_as<float>(to, dtypes, units, walk, first);
    } else {
      store_as<int64_t>(to, dtypes, units, walk, first);
    }
  }
}

// Does this direct cast, where it is the operation.
template <int kCast, int kElements>
__device__ inline bool cast_directly(Operation operation, const LaneWalk& walk) {
  constexpr DTypePair cast = kDirectCasts[kCast];
  using From = Types::at<static_cast<int>(cast.from)>;
  using To = Types::at<static_cast<int>(cast.to)>;
  constexpr int kLargerBytes = kElements * (sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To));
  if constexpr (kElements > 1 && kLargerBytes != 16) return false;
  if (operation != cast_operation(cast.from, cast.to)) return false;
  using FromUnit = Elements<From, kElements>;
  using ToUnit = Elements<To, kElements>;
  const auto store = [](uint64_t address, const FromUnit& from) {
    ToUnit to;
#pragma unroll
    for (int e = 0; e < kElements; ++e) to.values[e] = convert<To, From, __half, __nv_bfloat16>(from.values[e]);
    *in_global<ToUnit>(address) = to;
  };
  move_units<kLargerBytes, FromUnit>(walk.src, walk.dst, walk.src_step, walk.dst_step, walk.count, store);
  return true;
}

template <int kElements, int... kCasts>
__device__ inline bool cast_directly(Operation operation, const LaneWalk& walk, std::integer_sequence<int, kCasts...>) {
  return (cast_directly<kCasts, kElements>(operation, walk) || ...);
}

template <int kElements>
__device__ inline void run_cast(Operation operation, const LaneWalk& walk, bool direct_only) {
  if (cast_directly<kElements>(operation, walk, std::make_integer_sequence<int, kDirectCastCount>()) || direct_only) {
    return;
  }
  const auto [from, to] = cast_dtypes(operation);
  cast_units<kElements>(from, to, walk, std::make_integer_sequence<int, kCastableDTypes>());
}

// Element by element, in little code: rare beside other sources.
__device__ __noinline__ void cast_elements(int from, int to, uint64_t src, uint64_t dst, uint32_t count) {
  LaneWalk element{.src = src, .dst = dst, .count = 1};
#pragma unroll 1
  for (uint32_t i = 0; i < count; ++i) {
    cast_units<1>(from, to, element, std::make_integer_sequence<int, kCastableDTypes>());
    element.src += uint64_t{1} << castable_size_log2(from);
    element.dst += uint64_t{1} << castable_size_log2(to);
  }
}

__device__ inline void cast_apart(TaskCode code, const LaneWalk& walk) {
  const auto [from, to] = cast_dtypes(code.operation);
#pragma unroll 1
  for (uint32_t i = 0; i < walk.count; ++i) {
    cast_elements(from, to, walk.src + i * walk.src_step, walk.dst + i * walk.dst_step, 1u << code.width_log2);
  }
}

// A warp takes one tile.
template <int kWords, LaunchKind kKind>
__global__ void __launch_bounds__(kBlockThreads) fused_copy_kernel(const __grid_constant__ Launch<kWords> parameters) {
  constexpr bool plain = is_plain(kKind);
  constexpr bool sources = has_sources(kKind);
  constexpr bool one_level = kWords == kLaunchWords[0];
  const std::byte* launch = parameters.bytes;
  const LaunchHeader& header = launch_header(launch);
  const uint32_t lane = threadIdx.x % kWarpLanes;
  const uint32_t launch_tile = blockIdx.x * kBlockWarps + threadIdx.x / kWarpLanes;
  if (launch_tile >= header.tiles) return;
  const auto [number, tile] = [&] {
    if constexpr (one_level) return find_task_of_one_level(launch, launch_tile);
    else return find_task(launch, launch_tile);
  }();
  const bool strided = number < header.strided;
  const Task& task = launch_task(launch, number, one_level ? kStridedAtOfOneLevel : header.strided_at);
  const auto read = [&] {
    if constexpr (plain) return read_plain_task(task);
    else return task;
  }();
  if constexpr (sources) {
    if (is_derived(read.code.operation)) {
      const auto& derived = reinterpret_cast<const StridedTask&>(task);
      if constexpr (plain) return run_derived<plain>(launch, derived, read, tile, lane);
      else return run_derived<plain>(launch, derived, read_plain_task(task), tile, lane);
    }
  }
  const TaskCode code = read.code;
  const bool cast = is_casting(kKind) && code.operation >= Operation::Cast;
  const UnitLog2 unit = cast ? cast_unit_log2(code) : UnitLog2{code.width_log2, code.width_log2};
  LaneWalk walk;
  if constexpr (plain) {
    walk = walk_plain_lane(read, strided, tile, unit, lane);
  } else {
    Tile located = locate_tile(launch, task, strided, tile, 1 << unit.src, 1 << unit.dst);
    if constexpr (sources) located.src += resolve(launch, read.src) - read.src;
    if (code.operation == Operation::CopyRagged) {
      return with_unit_bytes(code.width_log2,
                             [&](auto bytes) { copy_ragged_tile<decltype(bytes)::value, sources>(located, lane); });
    }
    walk = walk_lane(located, code.lanes_log2, lane);
  }
  if constexpr (sources && plain) walk.src += resolve(launch, read.src) - read.src;
  if constexpr (sources && !plain) {
    if (cast) return cast_apart(code, walk);
  } else if constexpr (is_casting(kKind)) {
    if (cast && code.width_log2 == 2) return run_cast<4>(code.operation, walk, plain);
    if (cast && code.width_log2 == 1) return run_cast<2>(code.operation, walk, plain);
    if (cast) return run_cast<1>(code.operation, walk, plain);
  }
  static_assert(static_cast<int>(Operation::Cast) == 4, "besides casts: Copy, CopyRagged, Fill and Fill16");
  with_unit_bytes(code.width_log2, [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    constexpr int64_t side_by_side = kWarpLanes * kBytes;
    const int64_t dst_step = plain ? side_by_side : walk.dst_step;
    if (code.operation == Operation::Copy) {
      return copy_units < kBytes, sources,
             sources && !plain > (walk.src, walk.dst, plain ? side_by_side : walk.src_step, dst_step, walk.count);
    }
    fill_units<kBytes>(read.src, code.operation == Operation::Fill16, walk, dst_step);
  });
}
static_assert(kMaxCastWidthLog2 == 2, "the kernel has casts of one, two and four elements");

template <int... kNumbers>
const void* kernel_symbol(int number, std::integer_sequence<int, kNumbers...>) {
  const void* const symbols[] = {
      reinterpret_cast<const void*>(&fused_copy_kernel<kernel_words(kNumbers), kernel_kind(kNumbers)>)...};
  return symbols[number];
}

constexpr int kMachineCode[] = {FUSED_COPY_MACHINE_CODE};

}  // namespace

extern const GpuBuild kGpuBuild = {CUDART_VERSION, kMachineCode, FUSED_COPY_PTX};

const void* kernel_symbol(int number) { return kernel_symbol(number, std::make_integer_sequence<int, kKernels>()); }

}  // namespace fused_copy
