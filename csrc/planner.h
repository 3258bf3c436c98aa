// Checked tensors in, launches out. Plain C++: no torch, no CUDA, no Python.
#pragma once

#include <string>
#include <utility>

#include "destinations.h"
#include "launch_layout.h"

namespace fused_copy {

// Turns calls into launches. Keeps its memory from call to call, so that planning does not allocate once it is warm;
// one thread at a time.
class LaunchPlanner {
 public:
  // Checks the sources against the destinations and lays out the launches, which stay until the next call. Throws
  // InvalidInput, the destinations' deferred one too.
  std::span<const PlannedLaunch> plan(const Destinations& destinations, std::span<const TensorView> sources);

  size_t capacity_bytes() const { return bytes_of(tasks_) + bytes_of(launches_); }

  // In words, how the last call that was planned writes this pair, and how many bytes.
  std::pair<std::string, uint64_t> path(int64_t pair) const;

 private:
  void add_copy(int64_t pair, const TensorView& destination, const TensorView& source);
  void add_fill(int64_t pair, const TensorView& destination, const TensorView& source, uint64_t pattern);
  void add_bytes(int64_t pair, Operation operation, int item_bytes, uint64_t src, uint64_t dst,
                 std::span<Extent> extents);
  void add_cast(int64_t pair, const TensorView& destination, const TensorView& source, std::span<Extent> extents);
  void add_task(int64_t pair, Operation operation, int width_log2, int unit_log2, uint64_t src, uint64_t dst,
                uint64_t columns, std::span<const Extent> extents, bool dense);
  static uint64_t shape_tiles(PlannedTask& planned, int tile_bytes_log2, DeviceType device);
  std::span<const PlannedLaunch> lay_out(DeviceType device);

  Deferred deferred_;
  std::vector<PlannedTask> tasks_;
  std::vector<PlannedLaunch> launches_;
  uint64_t bytes_ = 0;
};

}  // namespace fused_copy
