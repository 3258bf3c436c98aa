// Where launches run.
#pragma once

#include <memory>
#include <optional>
#include <span>

#include "launch_layout.h"
#include "tensor_view.h"

namespace fused_copy {

constexpr int kMaxGpus = 128;  // torch knows 120

// Runs the launches of CPU tensors and returns when they are done.
void run_on_cpu(std::span<const PlannedLaunch> launches);

// Launches on the device's current stream, whatever device is current, and returns at once. Throws std::runtime_error
// where CUDA refuses; a refused launch leaves no error behind.
void launch_on_gpu(std::span<const PlannedLaunch> launches, int device_index);

// Launches a kernel that does nothing, for benchmarks to compare with.
void launch_nothing(int device_index);

// What nvcc built: nothing where there was none.
struct GpuBuild {
  int cuda_version;                   // as CUDART_VERSION
  std::span<const int> machine_code;  // 75 for compute capability 7.5
  int ptx;
};
extern const GpuBuild kGpuBuild;

// torch's current stream of a CUDA device, a cudaStream_t.
void* current_stream(int device_index);

inline void run(std::span<const PlannedLaunch> launches, const Device& device) {
  if (launches.empty()) return;
  device.type == DeviceType::Cuda ? launch_on_gpu(launches, device.index) : run_on_cpu(launches);
}

// The address by which the device reads host memory that is pinned, as far as its first and last byte tell.
std::optional<uint64_t> pinned_address(uint64_t host_address, int64_t bytes, int device_index);

// Allows calls that would invalidate a capture under way, in this thread or another: on memory, events and code that
// are no part of any graph.
class AllowDuringCapture {
 public:
  AllowDuringCapture();
  ~AllowDuringCapture();
  AllowDuringCapture(const AllowDuringCapture&) = delete;
  AllowDuringCapture& operator=(const AllowDuringCapture&) = delete;

 private:
  int mode_ = 0;
};

// Calls `release(object)` once the graph under capture on the device's current stream, and all that was instantiated
// from it, are gone: from a thread that may not call CUDA.
void keep_with_capture(void* object, void (*release)(void*), int device_index);

// A point in a stream's work.
class GpuEvent {
 public:
  explicit GpuEvent(void* event) : event_(event) {}
  bool done() const;

 private:
  struct Destroy {
    void operator()(void* event) const;
  };
  std::unique_ptr<void, Destroy> event_;
};

// Marks where the work of the device's current stream, which is not capturing, ends now.
GpuEvent record_event(int device_index);

// Of the device's current stream: true also after the capture was invalidated.
bool is_capturing(int device_index);

// A launch recorded in a graph.
struct GraphNode {
  void* node;
  uint32_t blocks;  // of its grid
};

struct CapturedLaunch {
  void* graph;
  GraphNode node;
};

// Records a launch, or one that copies nothing, in the capture under way on the device's current stream.
CapturedLaunch capture_launch(const PlannedLaunch* launch, int device_index);

// Makes a node launch this, or nothing: in an executable graph, or for graphs yet to be instantiated where that is
// null.
void set_node(void* executable, GraphNode& node, const PlannedLaunch* launch, int device_index);

}  // namespace fused_copy
