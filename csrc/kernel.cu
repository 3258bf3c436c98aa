#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "back_end.h"
#include "lane_walk.h"

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

// A unit as the type that one instruction loads and stores: of bytes in a struct the compiler makes many registers.
template <int kBytes>
using Unit = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2,
                       std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>;

template <class T, int kElements>
struct alignas(sizeof(T) * kElements < 16 ? sizeof(T) * kElements : 16) Elements {
  T values[kElements];
};

// Copies `count` units, `src_step` and `dst_step` bytes apart. The loads of a whole batch are under no condition and so
// in flight together; unrolling further only costs instructions to fetch.
template <int kBytes>
__device__ inline void copy_units(uint64_t src, uint64_t dst, int64_t src_step, int64_t dst_step, uint32_t count) {
  Unit<kBytes> units[kBatch];
  const auto load = [&](int i) { units[i] = *reinterpret_cast<const Unit<kBytes>*>(src + i * src_step); };
  const auto store = [&](int i) { *reinterpret_cast<Unit<kBytes>*>(dst + i * dst_step) = units[i]; };
#pragma unroll 1
  for (; count >= kBatch; count -= kBatch) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) load(i);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) store(i);
    src += kBatch * src_step;
    dst += kBatch * dst_step;
  }
#pragma unroll
  for (int i = 0; i < kBatch - 1; ++i) {
    if (i < count) load(i);
  }
#pragma unroll
  for (int i = 0; i < kBatch - 1; ++i) {
    if (i < count) store(i);
  }
}

__device__ inline void copy_bytes(uint64_t src, uint64_t dst, int64_t count) {
#pragma unroll 1
  for (int64_t i = 0; i < count; ++i) {
    *reinterpret_cast<uint8_t*>(dst + i) = *reinterpret_cast<const uint8_t*>(src + i);
  }
}

// A tile of one row whose units are those of the address space: the row's first and its last may lie in it only in
// part, and the last of its columns may be beyond it.
template <int kBytes>
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
    copy_bytes(src + phase, dst + phase, bytes);
    if (count == 1) return;
    src += step;
    dst += step;
    --count;
  }
  if (cut_last) --count;
  copy_units<kBytes>(src, dst, step, step, count);
  if (cut_last) copy_bytes(src + count * step, dst + count * step, end - last);
}

// Every unit of a lane lies at the same place of the pattern: lanes step by 32 units, rows begin with the pattern.
template <int kBytes>
__device__ inline void fill_units(const Task& task, const LaneWalk& walk) {
  const bool upper_half_zero = task.operation == Operation::Fill16;
  const uint32_t at = static_cast<uint32_t>(walk.column * kBytes) % 16;
  const uint64_t low = upper_half_zero && at >= 8 ? 0 : task.src >> (at % 8 * 8);
  const uint64_t bits[2] = {low, upper_half_zero ? 0 : task.src};
  Unit<kBytes> unit;
  memcpy(&unit, bits, kBytes);
  const int64_t step = walk.side_by_side ? kWarpLanes * kBytes : walk.dst_step;
#pragma unroll 1
  for (uint32_t i = 0; i < walk.count; ++i) *reinterpret_cast<Unit<kBytes>*>(walk.dst + i * step) = unit;
}

template <int kBytes>
__device__ inline void run_units(const Task& task, const LaneWalk& walk) {
  if (task.operation != Operation::Copy) return fill_units<kBytes>(task, walk);
  if (walk.side_by_side) {
    constexpr int64_t step = kWarpLanes * kBytes;
    return copy_units<kBytes>(walk.src, walk.dst, step, step, walk.count);
  }
  copy_units<kBytes>(walk.src, walk.dst, walk.src_step, walk.dst_step, walk.count);
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
__device__ inline void cast_units(int from, int to, const LaneWalk& walk,
                                  std::integer_sequence<int, kDTypes...> dtypes) {
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

__device__ inline void run_cast(const uint64_t* words, const Task& task, bool strided, uint32_t tile, uint32_t lane) {
  constexpr std::make_integer_sequence<int, kCastableDTypes> dtypes;
  const int code = static_cast<int>(task.operation) - static_cast<int>(Operation::Cast);
  const int from = code / kCastableDTypes;
  const int to = code % kCastableDTypes;
  const int src_unit = 1 << (castable_size_log2(from) + task.width);
  const int dst_unit = 1 << (castable_size_log2(to) + task.width);
  const LaneWalk walk = walk_lane(locate_tile(words, task, strided, tile, src_unit, dst_unit), task.lanes_log2, lane);
  if (task.width == kCastWidth) {
    cast_units<1 << kCastWidth>(from, to, walk, dtypes);
  } else {
    cast_units<1>(from, to, walk, dtypes);
  }
}

// Calls `body` with the bytes of a unit as a constant.
template <class Body>
__device__ inline void with_unit_bytes(uint32_t width, Body body) {
  switch (width) {
    case 4: return body(std::integral_constant<int, 16>());
    case 2: return body(std::integral_constant<int, 4>());
    case 3: return body(std::integral_constant<int, 8>());
    case 1: return body(std::integral_constant<int, 2>());
    default: return body(std::integral_constant<int, 1>());
  }
}

// A warp takes one tile.
template <int kWords, LaunchKind kKind>
__global__ void __launch_bounds__(kBlockThreads) fused_copy_kernel(const __grid_constant__ Launch<kWords> launch) {
  const uint64_t* words = launch.words;
  const LaunchHeader& header = launch_header(words);
  const uint32_t lane = threadIdx.x % kWarpLanes;
  uint32_t tile = blockIdx.x * kBlockWarps + threadIdx.x / kWarpLanes;
  if (tile >= header.tiles) return;
  const uint32_t number = find_task(words, tile);
  tile -= launch_first_tiles(words)[number];
  const bool strided = number < header.strided;
  const Task& task = launch_task(words, number);
  LaneWalk walk;
  if constexpr (kKind == LaunchKind::Plain) {
    walk = walk_plain_lane(task, strided, tile, lane);
  } else {
    if (kKind == LaunchKind::Casting && task.operation >= Operation::Cast) {
      return run_cast(words, task, strided, tile, lane);
    }
    const int unit = 1 << task.width;
    const Tile located = locate_tile(words, task, strided, tile, unit, unit);
    if (task.operation == Operation::CopyRagged) {
      return with_unit_bytes(task.width, [&](auto bytes) { copy_ragged_tile<decltype(bytes)::value>(located, lane); });
    }
    walk = walk_lane(located, task.lanes_log2, lane);
  }
  with_unit_bytes(task.width, [&](auto bytes) { run_units<decltype(bytes)::value>(task, walk); });
}

// A launch costs more with more parameters, so each goes into the smallest kernel that holds it.
constexpr int kLaunchWords[] = {64, 512, kMaxLaunchWords};

template <int kWords>
const void* kernel_of(LaunchKind kind) {
  switch (kind) {
    case LaunchKind::Plain: return reinterpret_cast<const void*>(&fused_copy_kernel<kWords, LaunchKind::Plain>);
    case LaunchKind::General: return reinterpret_cast<const void*>(&fused_copy_kernel<kWords, LaunchKind::General>);
    default: return reinterpret_cast<const void*>(&fused_copy_kernel<kWords, LaunchKind::Casting>);
  }
}

const void* kernel_for(const PlannedLaunch& launch) {
  const LaunchKind kind = launch.header().kind;
  if (launch.used_words <= kLaunchWords[0]) return kernel_of<kLaunchWords[0]>(kind);
  if (launch.used_words <= kLaunchWords[1]) return kernel_of<kLaunchWords[1]>(kind);
  return kernel_of<kLaunchWords[2]>(kind);
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

constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};  // 750 for compute capability 7.5

}  // namespace

extern const GpuBuild kGpuBuild = {CUDART_VERSION, kArchitectures, FUSED_COPY_PTX};

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
