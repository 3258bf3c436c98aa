#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
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

// What tensors are made of, pinned ones too, is global memory. Told so, the compiler need not ask at every access.
template <class T>
__device__ inline T* in_global(uint64_t address) {
  return static_cast<T*>(__cvta_global_to_generic(address));
}

// Takes `count` units, `src_step` and `dst_step` bytes apart, to `store(address, unit)`. The loads depend on predicates
// alone, not on branches, and so are in flight together.
template <int kLargerBytes, class Loaded, class Store>
__device__ inline void move_units(uint64_t src, uint64_t dst, int64_t src_step, int64_t dst_step, uint32_t count,
                                  Store store) {
  constexpr int kMaxUnits = max_lane_units(kLargerBytes);
  // Or else each address would be computed anew from what these came of.
  asm volatile("" : "+l"(src), "+l"(dst));
  Loaded units[kMaxUnits];
#pragma unroll
  for (int i = 0; i < kMaxUnits; ++i) {
    if (i < count) units[i] = *in_global<const Loaded>(src + i * src_step);
  }
#pragma unroll
  for (int i = 0; i < kMaxUnits; ++i) {
    if (i < count) store(dst + i * dst_step, units[i]);
  }
}

template <int kBytes>
__device__ inline void copy_units(uint64_t src, uint64_t dst, int64_t src_step, int64_t dst_step, uint32_t count) {
  using Bytes = Unit<kBytes>;
  move_units<kBytes, Bytes>(src, dst, src_step, dst_step, count,
                            [](uint64_t address, Bytes unit) { *in_global<Bytes>(address) = unit; });
}

// Fewer bytes than kBytes, all loaded before the first is stored.
template <int kBytes>
__device__ inline void copy_bytes(uint64_t src, uint64_t dst, int64_t count) {
  uint8_t bytes[kBytes];
#pragma unroll
  for (int i = 0; i < kBytes - 1; ++i) {
    if (i < count) bytes[i] = *in_global<const uint8_t>(src + i);
  }
#pragma unroll
  for (int i = 0; i < kBytes - 1; ++i) {
    if (i < count) *in_global<uint8_t>(dst + i) = bytes[i];
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
    copy_bytes<kBytes>(src + phase, dst + phase, bytes);
    if (count == 1) return;
    src += step;
    dst += step;
    --count;
  }
  if (cut_last) --count;
  copy_units<kBytes>(src, dst, step, step, count);
  if (cut_last) copy_bytes<kBytes>(src + count * step, dst + count * step, end - last);
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

constexpr int kCastBatch = 2;

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
    } else if (from >= static_cast<int>(DType::Float16)) {
      store_as<float>(to, dtypes, units, walk, first);
    } else {
      store_as<int64_t>(to, dtypes, units, walk, first);
    }
  }
}

// Whether the operation is this direct cast, which is then done.
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

// A launch costs more with more parameters, and so does a node that is set: each goes into the smallest kernel that
// holds it.
constexpr int kLaunchWords[] = {52, 128, 512, kMaxLaunchWords};

// The smallest kernel takes launches of one level of first tiles alone.
__host__ __device__ constexpr bool has_one_level(int words) { return words == kLaunchWords[0]; }

// Calls `body` with the bytes of a unit as a constant.
template <class Body>
__device__ inline void with_unit_bytes(uint32_t width, Body body) {
  if (width < 4) {
    switch (width) {
      case 0: return body(std::integral_constant<int, 1>());
      case 1: return body(std::integral_constant<int, 2>());
      case 2: return body(std::integral_constant<int, 4>());
      default: return body(std::integral_constant<int, 8>());
    }
  }
  body(std::integral_constant<int, 16>());
}

// A warp takes one tile.
template <int kWords, LaunchKind kKind>
__global__ void __launch_bounds__(kBlockThreads) fused_copy_kernel(const __grid_constant__ Launch<kWords> launch) {
  constexpr bool plain = is_plain(kKind);
  constexpr bool casting = kKind == LaunchKind::Casting || kKind == LaunchKind::PlainCasting;
  const uint64_t* words = launch.words;
  const LaunchHeader& header = launch_header(words);
  const uint32_t lane = threadIdx.x % kWarpLanes;
  const uint32_t launch_tile = blockIdx.x * kBlockWarps + threadIdx.x / kWarpLanes;
  if (launch_tile >= header.tiles) return;
  constexpr bool one_level = has_one_level(kWords);
  const auto [number, tile] = find_task(words, launch_tile, one_level);
  const bool strided = number < header.strided;
  const Task& task = launch_task(words, number, one_level);
  const auto read = [&] {
    if constexpr (plain) return read_plain_task(task);
    else return task;
  }();
  const TaskCode code = read.code;
  const bool cast = casting && code.operation >= Operation::Cast;
  const UnitLog2 unit = cast ? unit_log2(code) : UnitLog2{code.width, code.width};
  LaneWalk walk;
  if constexpr (plain) {
    walk = walk_plain_lane(read, strided, tile, unit, lane);
  } else {
    const Tile located = locate_tile(words, task, strided, tile, 1 << unit.src, 1 << unit.dst);
    if (code.operation == Operation::CopyRagged) {
      return with_unit_bytes(code.width, [&](auto bytes) { copy_ragged_tile<decltype(bytes)::value>(located, lane); });
    }
    walk = walk_lane(located, code.lanes_log2, lane);
  }
  if constexpr (casting) {
    if (cast && code.width == 2) return run_cast<4>(code.operation, walk, plain);
    if (cast && code.width == 1) return run_cast<2>(code.operation, walk, plain);
    if (cast) return run_cast<1>(code.operation, walk, plain);
  }
  with_unit_bytes(code.width, [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    constexpr int64_t side_by_side = kWarpLanes * kBytes;
    const int64_t dst_step = plain ? side_by_side : walk.dst_step;
    if (code.operation == Operation::Copy) {
      return copy_units<kBytes>(walk.src, walk.dst, plain ? side_by_side : walk.src_step, dst_step, walk.count);
    }
    fill_units<kBytes>(read.src, code.operation == Operation::Fill16, walk, dst_step);
  });
}

constexpr int kKinds = 4;
constexpr int kKernels = static_cast<int>(std::size(kLaunchWords)) * kKinds;

template <int... kNumbers>
const void* kernel_symbol(int number, std::integer_sequence<int, kNumbers...>) {
  const void* const symbols[] = {reinterpret_cast<const void*>(
      &fused_copy_kernel<kLaunchWords[kNumbers / kKinds], static_cast<LaunchKind>(kNumbers % kKinds)>)...};
  return symbols[number];
}

int kernel_number(const PlannedLaunch& launch) {
  int size = launch.header().levels > 1 ? 1 : 0;
  while (launch.used_words > kLaunchWords[size]) ++size;
  return size * kKinds + static_cast<int>(launch.header().kind);
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

void check(CUresult result, const char* what) { check(static_cast<cudaError_t>(result), what); }

// The driver's calls of the hot paths: the runtime's take a quarter of a microsecond more (docs/performance.md).
struct Driver {
  decltype(&cuCtxGetCurrent) current_context;
  decltype(&cuCtxSetCurrent) set_context;
  decltype(&cuLaunchKernel) launch;
  decltype(&cuGraphKernelNodeSetParams) set_graph_node;
  decltype(&cuGraphExecKernelNodeSetParams) set_executable_node;
};

template <class Function>
void look_up(Function& function, const char* name) {
  constexpr unsigned kCudaVersion = 12000;
  cudaDriverEntryPointQueryResult result;
  check(cudaGetDriverEntryPointByVersion(name, reinterpret_cast<void**>(&function), kCudaVersion, cudaEnableDefault,
                                         &result),
        name);
  if (result != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string("fused_copy: the driver has no ") + name + ": update the driver");
  }
}

const Driver& driver() {
  static const Driver driver = [] {
    Driver found;
    look_up(found.current_context, "cuCtxGetCurrent");
    look_up(found.set_context, "cuCtxSetCurrent");
    look_up(found.launch, "cuLaunchKernel");
    look_up(found.set_graph_node, "cuGraphKernelNodeSetParams");
    look_up(found.set_executable_node, "cuGraphExecKernelNodeSetParams");
    return found;
  }();
  return driver;
}

// What is looked up on a device once.
struct PerDevice {
  std::atomic<CUcontext> context;
  std::atomic<CUfunction> kernels[kKernels];
};

PerDevice& per_device(int index) {
  static PerDevice devices[kMaxGpus];
  return devices[index];
}

// Makes a device current for a scope, with the context that the runtime and torch use. Afterwards the thread has the
// context that it had, if any: cudaSetDevice back to a GPU that is not in use would give that one a context.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    std::atomic<CUcontext>& own = per_device(device).context;
    check(driver().current_context(&previous_), "cuCtxGetCurrent");
    if (previous_ != nullptr && previous_ == own.load(std::memory_order_relaxed)) return;
    int previous_device;
    check(cudaGetDevice(&previous_device), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = previous_device != device;
    CUcontext current;
    check(driver().current_context(&current), "cuCtxGetCurrent");
    own.store(current, std::memory_order_relaxed);
  }
  ~DeviceGuard() {
    if (changed_) driver().set_context(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUcontext previous_;
  bool changed_ = false;
};

// For calls on memory, events and code that no capture concerns: a capture, also of another thread, would be
// invalidated by them.
class AllowDuringCapture {
 public:
  AllowDuringCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~AllowDuringCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  AllowDuringCapture(const AllowDuringCapture&) = delete;
  AllowDuringCapture& operator=(const AllowDuringCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The kernel for a launch on the device, which is current.
CUfunction kernel_for(const PlannedLaunch& launch, int device_index) {
  const int number = kernel_number(launch);
  std::atomic<CUfunction>& known = per_device(device_index).kernels[number];
  CUfunction kernel = known.load(std::memory_order_acquire);
  if (kernel == nullptr) {
    const AllowDuringCapture allow;
    const void* symbol = kernel_symbol(number, std::make_integer_sequence<int, kKernels>());
    check(cudaGetFuncBySymbol(&kernel, symbol), "cudaGetFuncBySymbol");
    known.store(kernel, std::memory_order_release);
  }
  return kernel;
}

uint32_t blocks_of(const PlannedLaunch& launch) {
  return std::max((launch.header().tiles + kBlockWarps - 1) / kBlockWarps, 1u);
}

void enqueue(const PlannedLaunch& launch, int device_index, cudaStream_t stream) {
  void* arguments[] = {const_cast<uint64_t*>(launch.params.words)};
  check(driver().launch(kernel_for(launch, device_index), blocks_of(launch), 1, 1, kBlockThreads, 1, 1, 0, stream,
                        arguments, nullptr),
        "the launch");
}

// A kernel that finds no tile.
const PlannedLaunch& empty_launch() {
  static const PlannedLaunch launch{{}, kHeaderWords};
  return launch;
}

// A graph's launch takes one and a half microseconds more where the grid of a node has changed (docs/performance.md),
// so a larger grid than needed stays unless it is far too large: blocks without a tile end at once.
constexpr uint32_t kFewBlocks = 256;
constexpr uint32_t kManyTimes = 4;

constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};  // 750 for compute capability 7.5

}  // namespace

extern const GpuBuild kGpuBuild = {CUDART_VERSION, kArchitectures, FUSED_COPY_PTX};

void launch_on_gpu(std::span<const PlannedLaunch> launches, int device_index) {
  const auto stream = static_cast<cudaStream_t>(current_stream(device_index));
  const DeviceGuard guard(device_index);
  for (const PlannedLaunch& launch : launches) enqueue(launch, device_index, stream);
}

void launch_nothing(int device_index) { launch_on_gpu({&empty_launch(), 1}, device_index); }

bool is_capturing(int device_index) {
  cudaStreamCaptureStatus status;
  const DeviceGuard guard(device_index);
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(current_stream(device_index)), &status),
        "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

CapturedLaunch capture_launch(const PlannedLaunch* launch, int device_index) {
  const auto stream = static_cast<cudaStream_t>(current_stream(device_index));
  const DeviceGuard guard(device_index);
  const PlannedLaunch& recorded = launch ? *launch : empty_launch();
  enqueue(recorded, device_index, stream);
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
  return {graph, {last_nodes[0], blocks_of(recorded)}};
}

void set_node(void* executable, GraphNode& node, const PlannedLaunch* launch, int device_index) {
  const PlannedLaunch& set = launch ? *launch : empty_launch();
  const DeviceGuard guard(device_index);
  void* arguments[] = {const_cast<uint64_t*>(set.params.words)};
  const uint32_t needed = blocks_of(set);
  const bool keeps = needed <= node.blocks && node.blocks <= std::max(kFewBlocks, kManyTimes * needed);
  CUDA_KERNEL_NODE_PARAMS params{};
  params.func = kernel_for(set, device_index);
  params.gridDimX = keeps ? node.blocks : needed;
  params.blockDimX = kBlockThreads;
  params.gridDimY = params.gridDimZ = params.blockDimY = params.blockDimZ = 1;
  params.kernelParams = arguments;
  const auto graph_node = static_cast<CUgraphNode>(node.node);
  if (executable != nullptr) {
    check(driver().set_executable_node(static_cast<CUgraphExec>(executable), graph_node, &params),
          "cuGraphExecKernelNodeSetParams");
  } else {
    check(driver().set_graph_node(graph_node, &params), "cuGraphKernelNodeSetParams");
  }
  node.blocks = params.gridDimX;
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

GpuEvent record_event(int device_index) {
  const auto stream = static_cast<cudaStream_t>(current_stream(device_index));
  const DeviceGuard guard(device_index);
  const AllowDuringCapture allow;
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  GpuEvent recorded(event);
  check(cudaEventRecord(event, stream), "cudaEventRecord");
  return recorded;
}

}  // namespace fused_copy
