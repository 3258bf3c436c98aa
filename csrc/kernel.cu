#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "back_end.h"

namespace fused_copy {
namespace {

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class To>
__device__ inline To from_float(float value) {
  if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

}  // namespace
}  // namespace fused_copy

#include "convert.h"

namespace fused_copy {
namespace {

constexpr int kBlockThreads = 128;
constexpr int kBlockWarps = kBlockThreads / kWarpLanes;

// Loads in flight per lane before the first store.
constexpr int kBatch = 4;

template <int kBytes>
struct alignas(kBytes) Unit {
  uint8_t bytes[kBytes];
};

template <class T, int kElements>
struct alignas(sizeof(T) * kElements < 16 ? sizeof(T) * kElements : 16) Elements {
  T values[kElements];
};

// The units that one lane visits in a tile: every 32nd along a long row, or one column of several short rows.
struct LaneWalk {
  uint64_t src;
  uint64_t dst;
  int64_t src_step;
  int64_t dst_step;
  uint64_t column;  // of the first unit
  uint32_t count;
};

__device__ inline LaneWalk walk_lane(const Tile& tile, uint32_t lane) {
  const uint32_t x = lane & ((1u << tile.lanes_log2) - 1);
  const uint32_t y = lane >> tile.lanes_log2;
  const uint64_t column = tile.first_column + x;
  LaneWalk walk{
      .src = tile.src + column * tile.src_column_stride + y * tile.src_row_stride,
      .dst = tile.dst + column * tile.dst_column_stride + y * tile.dst_row_stride,
      .column = column,
  };
  if (tile.lanes_log2 == kWarpLanesLog2) {
    walk.src_step = tile.src_column_stride << kWarpLanesLog2;
    walk.dst_step = tile.dst_column_stride << kWarpLanesLog2;
    walk.count = (tile.columns - x + kWarpLanes - 1) >> kWarpLanesLog2;
  } else {
    const uint32_t lane_rows_log2 = kWarpLanesLog2 - tile.lanes_log2;
    walk.src_step = tile.src_row_stride << lane_rows_log2;
    walk.dst_step = tile.dst_row_stride << lane_rows_log2;
    walk.count = (tile.rows - y + (1u << lane_rows_log2) - 1) >> lane_rows_log2;
  }
  if (x >= tile.columns || y >= tile.rows) walk.count = 0;
  return walk;
}

template <int kBytes>
__device__ inline void copy_tile(const Tile& tile, uint32_t lane) {
  LaneWalk walk = walk_lane(tile, lane);
  for (uint32_t first = 0; first < walk.count; first += kBatch) {
    Unit<kBytes> units[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < walk.count) units[i] = *reinterpret_cast<const Unit<kBytes>*>(walk.src + i * walk.src_step);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < walk.count) *reinterpret_cast<Unit<kBytes>*>(walk.dst + i * walk.dst_step) = units[i];
    }
    walk.src += kBatch * walk.src_step;
    walk.dst += kBatch * walk.dst_step;
  }
}

// One row whose units are those of the address space: the first and the last may lie in it only in part.
template <int kBytes>
__device__ inline void copy_ragged_tile(const Tile& tile, uint32_t lane) {
  const int64_t phase = tile.dst % kBytes;
  const uint64_t src = tile.src - phase;
  const uint64_t dst = tile.dst - phase;
  const int64_t end = phase + tile.row_bytes;
  for (uint32_t first = lane; first < tile.columns; first += kBatch * kWarpLanes) {
    Unit<kBytes> units[kBatch];
    const auto offset = [&](int i) {
      return static_cast<int64_t>(tile.first_column + first + i * kWarpLanes) * kBytes;
    };
    const auto whole = [&](int i) { return offset(i) >= phase && offset(i) + kBytes <= end; };
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (whole(i)) units[i] = *reinterpret_cast<const Unit<kBytes>*>(src + offset(i));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * kWarpLanes >= tile.columns) break;
      if (whole(i)) {
        *reinterpret_cast<Unit<kBytes>*>(dst + offset(i)) = units[i];
      } else {
        const int64_t begin = max(offset(i), phase);
        for (int64_t at = begin; at < min(offset(i) + kBytes, end); ++at) {
          *reinterpret_cast<uint8_t*>(dst + at) = *reinterpret_cast<const uint8_t*>(src + at);
        }
      }
    }
  }
}

template <int kBytes>
__device__ inline void fill_tile(const Tile& tile, uint32_t lane, uint64_t pattern, bool upper_half_zero) {
  const LaneWalk walk = walk_lane(tile, lane);
  // Every unit of a lane lies at the same place of the pattern: lanes step by 32 units, rows begin with the pattern.
  const uint32_t at = static_cast<uint32_t>(walk.column * kBytes) % 16;
  const uint64_t low = upper_half_zero && at >= 8 ? 0 : pattern >> (at % 8 * 8);
  const uint64_t bits[2] = {low, upper_half_zero ? 0 : pattern};
  Unit<kBytes> unit;
  memcpy(&unit, bits, kBytes);
  for (uint32_t i = 0; i < walk.count; ++i) *reinterpret_cast<Unit<kBytes>*>(walk.dst + i * walk.dst_step) = unit;
}

using Types = CastTypes<__half, __nv_bfloat16>;

template <class T>
using Canonical = std::conditional_t<
    std::is_same_v<T, double>, double,
    std::conditional_t<std::is_same_v<T, float> || std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, float,
                       int64_t>>;

constexpr int kCastBatch = 2;

// Ten dtypes make ninety casts. Each goes through the widest type of its source's kind, which holds the value exactly
// and converts to the same result, so that there is code for ten loads and thirty stores instead.
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
    const auto loaded = *reinterpret_cast<const Elements<From, kElements>*>(walk.src + (first + i) * walk.src_step);
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
    *reinterpret_cast<Elements<To, kElements>*>(walk.dst + (first + i) * walk.dst_step) = stored;
  }
}

template <class From, int kElements, int... kTo>
__device__ inline void store_as(int to, std::integer_sequence<int, kTo...>, CastUnits<kElements>& units,
                                const LaneWalk& walk, uint32_t first) {
  ((to == kTo ? store_units<From, Types::at<kTo>>(units, walk, first) : void()), ...);
}

template <int kElements, int... kDTypes>
__device__ inline void cast_tile(const uint64_t* words, const Task& task, uint32_t tile, uint32_t lane,
                                 std::integer_sequence<int, kDTypes...> dtypes) {
  const int code = static_cast<int>(task.operation) - static_cast<int>(Operation::Cast);
  const int from = code / kCastableDTypes;
  const int to = code % kCastableDTypes;
  const int src_log2 = castable_size_log2(from) + task.width;
  const int dst_log2 = castable_size_log2(to) + task.width;
  const Tile located = locate_tile(words, task, tile, 1 << src_log2, 1 << dst_log2, max(src_log2, dst_log2));
  const LaneWalk walk = walk_lane(located, lane);
  for (uint32_t first = 0; first < walk.count; first += kCastBatch) {
    CastUnits<kElements> units;
    ((from == kDTypes ? load_units<Types::at<kDTypes>>(units, walk, first) : void()), ...);
    if (from == static_cast<int>(DType::Float64)) {
      store_as<double>(to, dtypes, units, walk, first);
    } else if (from >= static_cast<int>(DType::Float16)) {
      store_as<float>(to, dtypes, units, walk, first);
    } else {
      store_as<int64_t>(to, dtypes, units, walk, first);
    }
  }
}

template <int kWidth>
__device__ inline void run_tile(const uint64_t* words, const Task& task, uint32_t tile, uint32_t lane) {
  constexpr int kBytes = 1 << kWidth;
  const bool fill = task.operation == Operation::Fill || task.operation == Operation::Fill16;
  const Tile located = locate_tile(words, task, tile, fill ? 0 : kBytes, kBytes, kWidth);
  if (fill) {
    fill_tile<kBytes>(located, lane, task.src, task.operation == Operation::Fill16);
  } else if (task.operation == Operation::CopyRagged) {
    copy_ragged_tile<kBytes>(located, lane);
  } else {
    copy_tile<kBytes>(located, lane);
  }
}

// A warp takes one tile. Launches without casts use a kernel without the code for them.
template <int kWords, bool kCasts>
__global__ void __launch_bounds__(kBlockThreads) fused_copy_kernel(const __grid_constant__ Launch<kWords> launch) {
  const uint64_t* words = launch.words;
  const uint32_t lane = threadIdx.x % kWarpLanes;
  const uint32_t tile = blockIdx.x * kBlockWarps + threadIdx.x / kWarpLanes;
  if (tile >= launch_header(words).tiles) return;
  const Task& task = find_task(words, tile);
  if constexpr (kCasts) {
    if (task.operation >= Operation::Cast) {
      constexpr std::make_integer_sequence<int, kCastableDTypes> dtypes;
      if (task.width == kCastWidth) {
        cast_tile<1 << kCastWidth>(words, task, tile, lane, dtypes);
      } else {
        cast_tile<1>(words, task, tile, lane, dtypes);
      }
      return;
    }
  }
  switch (task.width) {
    case 0: return run_tile<0>(words, task, tile, lane);
    case 1: return run_tile<1>(words, task, tile, lane);
    case 2: return run_tile<2>(words, task, tile, lane);
    case 3: return run_tile<3>(words, task, tile, lane);
    default: return run_tile<4>(words, task, tile, lane);
  }
}

// A launch costs more with more parameters, so each goes into the smallest kernel that holds it.
constexpr int kLaunchWords[] = {64, 512, kMaxLaunchWords};

const void* kernel_for(const PlannedLaunch& launch) {
  const bool casts = launch.header().casts > 0;
  const auto pick = [&]<int kWords>() {
    return casts ? reinterpret_cast<const void*>(&fused_copy_kernel<kWords, true>)
                 : reinterpret_cast<const void*>(&fused_copy_kernel<kWords, false>);
  };
  if (launch.used_words <= kLaunchWords[0]) return pick.template operator()<kLaunchWords[0]>();
  if (launch.used_words <= kLaunchWords[1]) return pick.template operator()<kLaunchWords[1]>();
  return pick.template operator()<kLaunchWords[2]>();
}

const char* advice(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver: return ": update the driver, or build this package with an older nvcc";
    case cudaErrorInitializationError: return ": CUDA does not survive a fork; start processes by spawn";
    default: return "";
  }
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // what is not sticky must not surface at somebody else's next call
  throw std::runtime_error(std::string("fused_copy: ") + what + " failed: " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error) + advice(error));
}

uint32_t blocks_of(const PlannedLaunch& launch) {
  return std::max((launch.header().tiles + kBlockWarps - 1) / kBlockWarps, 1u);
}

void enqueue(const PlannedLaunch& launch, cudaStream_t stream) {
  void* arguments[] = {const_cast<uint64_t*>(launch.params.words)};
  check(cudaLaunchKernel(kernel_for(launch), dim3(blocks_of(launch)), dim3(kBlockThreads), arguments, 0, stream),
        "the launch");
}

// A kernel that finds no tile.
const PlannedLaunch& empty_launch() {
  static const PlannedLaunch launch{{}, kHeaderWords};
  return launch;
}

// For calls on memory and events that no capture concerns: a capture, also of another thread, would be invalidated by
// them.
class AllowDuringCapture {
 public:
  AllowDuringCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~AllowDuringCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  AllowDuringCapture(const AllowDuringCapture&) = delete;
  AllowDuringCapture& operator=(const AllowDuringCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ == device) {
      previous_ = kUnchanged;
    } else {
      check(cudaSetDevice(device), "cudaSetDevice");
    }
  }
  ~DeviceGuard() {
    if (previous_ != kUnchanged) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static constexpr int kUnchanged = -1;
  int previous_;
};

}  // namespace

extern const bool kHasGpuCode = true;

void launch_on_gpu(std::span<const PlannedLaunch> launches, int device_index) {
  const auto stream = static_cast<cudaStream_t>(current_stream(device_index));
  const DeviceGuard guard(device_index);
  for (const PlannedLaunch& launch : launches) enqueue(launch, stream);
}

void launch_nothing(int device_index) { launch_on_gpu({&empty_launch(), 1}, device_index); }

bool is_capturing(int device_index) {
  cudaStreamCaptureStatus status;
  const DeviceGuard guard(device_index);
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(current_stream(device_index)), &status),
        "cudaStreamIsCapturing");
  return status == cudaStreamCaptureStatusActive;
}

CapturedLaunch capture_launch(const PlannedLaunch* launch, int device_index) {
  const auto stream = static_cast<cudaStream_t>(current_stream(device_index));
  const DeviceGuard guard(device_index);
  enqueue(launch ? *launch : empty_launch(), stream);
  cudaStreamCaptureStatus status;
  cudaGraph_t graph;
  const cudaGraphNode_t* last_nodes;
  size_t count;
#if CUDART_VERSION >= 13000
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, &last_nodes, nullptr, &count);
#else
  const cudaError_t error = cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, &graph, &last_nodes, &count);
#endif
  check(error, "cudaStreamGetCaptureInfo");
  if (status != cudaStreamCaptureStatusActive || count != 1) {
    throw std::runtime_error("fused_copy: the capture ended or was invalidated while the copy was recorded");
  }
  return {graph, last_nodes[0]};
}

void set_node(void* executable, void* node, const PlannedLaunch* launch, int device_index) {
  const PlannedLaunch& set = launch ? *launch : empty_launch();
  const DeviceGuard guard(device_index);
  void* arguments[] = {const_cast<uint64_t*>(set.params.words)};
  cudaKernelNodeParams params{};
  params.func = const_cast<void*>(kernel_for(set));
  params.gridDim = dim3(blocks_of(set));
  params.blockDim = dim3(kBlockThreads);
  params.kernelParams = arguments;
  const auto graph_node = static_cast<cudaGraphNode_t>(node);
  if (executable != nullptr) {
    check(cudaGraphExecKernelNodeSetParams(static_cast<cudaGraphExec_t>(executable), graph_node, &params),
          "cudaGraphExecKernelNodeSetParams");
  } else {
    check(cudaGraphKernelNodeSetParams(graph_node, &params), "cudaGraphKernelNodeSetParams");
  }
}

std::optional<uint64_t> pinned_address(uint64_t host_address, int64_t bytes, int device_index) {
  if (bytes == 0) return host_address;
  const DeviceGuard guard(device_index);
  const AllowDuringCapture allow;
  const auto ask = [](uint64_t address) -> uint64_t {
    cudaPointerAttributes attributes;
    const cudaError_t error = cudaPointerGetAttributes(&attributes, reinterpret_cast<const void*>(address));
    if (error != cudaSuccess) cudaGetLastError();
    if (error != cudaSuccess || attributes.type != cudaMemoryTypeHost) return 0;
    return reinterpret_cast<uint64_t>(attributes.devicePointer);
  };
  const uint64_t first = ask(host_address);
  const uint64_t last = ask(host_address + static_cast<uint64_t>(bytes) - 1);
  if (first == 0 || last - first != static_cast<uint64_t>(bytes) - 1) return std::nullopt;
  return first;
}

bool GpuEvent::done() const {
  const AllowDuringCapture allow;
  const cudaError_t state = cudaEventQuery(static_cast<cudaEvent_t>(event_.get()));
  if (state == cudaSuccess) return true;
  cudaGetLastError();
  return false;
}

void GpuEvent::Destroy::operator()(void* event) const {
  const AllowDuringCapture allow;
  cudaEventDestroy(static_cast<cudaEvent_t>(event));
}

std::optional<GpuEvent> record_event(void* stream, int device_index) {
  const DeviceGuard guard(device_index);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus capture;
  check(cudaStreamIsCapturing(cuda_stream, &capture), "cudaStreamIsCapturing");
  if (capture != cudaStreamCaptureStatusNone) return std::nullopt;
  const AllowDuringCapture allow;
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  GpuEvent recorded(event);
  check(cudaEventRecord(event, cuda_stream), "cudaEventRecord");
  return recorded;
}

}  // namespace fused_copy
