// Launches, graph nodes, events and pinned memory, by the CUDA driver.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "launch_parameters.h"

namespace fused_copy {
namespace {

const char* advice(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver: return ": update the driver, or build this package with an older nvcc";
    case cudaErrorInitializationError: return ": CUDA does not survive a fork; start processes by spawn";
    default: return "";
  }
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next CUDA call of other code would report as its own
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

// What is looked up once for each GPU.
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

// The kernel for a launch on the device, which is current.
CUfunction kernel_for(const PlannedLaunch& launch, int device_index) {
  const int number = kernel_number(launch);
  std::atomic<CUfunction>& known = per_device(device_index).kernels[number];
  CUfunction kernel = known.load(std::memory_order_acquire);
  if (kernel == nullptr) {
    const AllowDuringCapture allow;
    check(cudaGetFuncBySymbol(&kernel, kernel_symbol(number)), "cudaGetFuncBySymbol");
    known.store(kernel, std::memory_order_release);
  }
  return kernel;
}

uint32_t blocks_of(const PlannedLaunch& launch) {
  return std::max((launch.header().tiles + kBlockWarps - 1) / kBlockWarps, 1u);
}

void enqueue(const PlannedLaunch& launch, int device_index, cudaStream_t stream) {
  Parameters parameters(launch);
  const CUfunction kernel = kernel_for(launch, device_index);
  check(parameters.pass([&](void** arguments, void** extra) {
    return driver().launch(kernel, blocks_of(launch), 1, 1, kBlockThreads, 1, 1, 0, stream, arguments, extra);
  }),
        "the launch");
}

// The capture under way on a stream, as far as it has one last node.
struct Capture {
  cudaGraph_t graph;
  cudaGraphNode_t last_node;
};

Capture capture_of(cudaStream_t stream) {
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
  if (status != cudaStreamCaptureStatusActive) return {nullptr, nullptr};
  return {graph, count == 1 ? last_nodes[0] : nullptr};
}

// A launch whose warps find no tile, and end.
const PlannedLaunch& empty_launch() {
  static const PlannedLaunch launch{{}, kHeaderWords};
  return launch;
}

}  // namespace

AllowDuringCapture::AllowDuringCapture() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  mode_ = mode;
}

AllowDuringCapture::~AllowDuringCapture() {
  auto mode = static_cast<cudaStreamCaptureMode>(mode_);
  cudaThreadExchangeStreamCaptureMode(&mode);
}

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
  const Capture capture = capture_of(stream);
  if (capture.last_node == nullptr) {
    throw std::runtime_error("fused_copy: the capture ended or was invalidated while the copy was recorded");
  }
  return {capture.graph, {capture.last_node, blocks_of(recorded)}};
}

void keep_with_capture(void* object, void (*release)(void*), int device_index) {
  const auto stream = static_cast<cudaStream_t>(current_stream(device_index));
  const DeviceGuard guard(device_index);
  const Capture capture = capture_of(stream);
  cudaUserObject_t kept;
  check(cudaUserObjectCreate(&kept, object, release, 1, cudaUserObjectNoDestructorSync), "cudaUserObjectCreate");
  check(cudaGraphRetainUserObject(capture.graph, kept, 1, cudaGraphUserObjectMove), "cudaGraphRetainUserObject");
}

void set_node(void* executable, GraphNode& node, const PlannedLaunch* launch, int device_index) {
  const PlannedLaunch& set = launch ? *launch : empty_launch();
  const DeviceGuard guard(device_index);
  Parameters parameters(set);
  const uint32_t needed = blocks_of(set);
  const bool keeps = needed <= node.blocks && node.blocks <= std::max(kFewBlocks, kManyTimes * needed);
  CUDA_KERNEL_NODE_PARAMS params{};
  params.func = kernel_for(set, device_index);
  params.gridDimX = keeps ? node.blocks : needed;
  params.blockDimX = kBlockThreads;
  params.gridDimY = params.gridDimZ = params.blockDimY = params.blockDimZ = 1;
  const auto graph_node = static_cast<CUgraphNode>(node.node);
  const CUresult result = parameters.pass([&](void** arguments, void** extra) {
    params.kernelParams = arguments;
    params.extra = extra;
    return executable ? driver().set_executable_node(static_cast<CUgraphExec>(executable), graph_node, &params)
                      : driver().set_graph_node(graph_node, &params);
  });
  check(result, executable ? "cuGraphExecKernelNodeSetParams" : "cuGraphKernelNodeSetParams");
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
