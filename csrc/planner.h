// Checked tensors in, launches out. Plain C++: no torch, no CUDA, no Python.
#pragma once

#include <string>
#include <utility>

#include "destinations.h"
#include "launch_layout.h"
#include "sources.h"

namespace fused_copy {

struct GatherRecord;

// Where host values wait that no launch has room for, until the GPU has read them.
struct Staging {
  virtual ~Staging() = default;
  // Copies them, and returns the address by which the destinations' GPU reads them, a multiple of 16.
  virtual uint64_t stage(std::span<const std::byte> values) = 0;
};

// Turns calls into launches. Keeps its memory from call to call, so that planning does not allocate once it is warm;
// one thread at a time.
class LaunchPlanner {
 public:
  // Checks the sources against the destinations and lays out the launches, which stay until the next call. On the CPU
  // they read the sources' host values where these lie. Throws InvalidInput, the destinations' deferred one too.
  std::span<const PlannedLaunch> plan(const Destinations& destinations, const CallSources& sources,
                                      Staging* staging = nullptr);

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
  void add_rest(const Destinations& destinations, int64_t pair, const TensorView& corner);
  void add_last(int64_t pair, const TensorView& destination, const TensorView& source);
  static uint64_t shape_tiles(PlannedTask& planned, int tile_bytes_log2, DeviceType device);
  std::span<const PlannedLaunch> lay_out(DeviceType device, Staging* staging);
  std::span<const std::byte> place_values(DeviceType device, Staging* staging);

  // In derived_planner.cpp.
  void add_derived(const Destinations& destinations, const DerivedSource& derived, size_t& gap);
  void check_part(int64_t pair, const char* name, const SourcePart& part, const Destinations& destinations,
                  size_t& gap);
  void add_values(const Destinations& destinations, const DerivedSource& derived);
  void add_rows(const Destinations& destinations, const DerivedSource& derived);
  void add_sums(const Destinations& destinations, const DerivedSource& derived);
  void add_plus(const Destinations& destinations, const DerivedSource& derived);
  void add_gather(int64_t pair, const TensorView& destination, const TensorView& table, std::span<const int64_t> sizes,
                  bool by_row, GatherRecord record);
  bool add_plain_rows(int64_t pair, uint64_t table, uint64_t destination, const GatherRecord& record, int unit_log2);
  bool add_plain_plus(int64_t pair, uint64_t source, uint64_t destination, const GatherRecord& record);
  PlannedTask& add_record(int64_t pair, Operation operation, uint64_t src, uint64_t dst,
                          std::span<const std::byte> record);
  template <class WholeTask>
  PlannedTask& add_whole_task(int64_t pair, Operation operation, uint64_t src, uint64_t dst, const WholeTask& task);
  void count_sectors(PlannedTask& planned, uint32_t item_stride);
  void mark_values(const SourcePart& part, size_t first);
  const void* host_memory(const SourcePart& part) const;
  static uint64_t shape_derived(PlannedTask& planned, int tile_bytes_log2, DeviceType device);
  static void relocate(PlannedTask& planned, uint64_t base);
  std::pair<std::string, uint64_t> derived_path(const PlannedTask& planned) const;
  const char* values_text() const {
    return values_staged_ ? ", values through pinned memory" : values_carried_ ? ", values in the launch" : ", values";
  }

  Deferred deferred_;
  std::vector<PlannedTask> tasks_;
  std::vector<PlannedLaunch> launches_;
  std::span<const std::byte> values_;
  std::span<const DerivedSource> derived_;
  bool values_carried_ = false;  // by the launch itself
  bool values_staged_ = false;
  uint64_t bytes_ = 0;
};

}  // namespace fused_copy
