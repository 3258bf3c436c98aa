// Tensor metadata in, checked launches out. Plain C++: no torch, no CUDA, no Python.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "copy_task.h"
#include "overlap.h"

namespace fused_copy {

enum class DeviceType : uint8_t { Cpu, Cuda, Meta, Other };

struct Device {
  DeviceType type = DeviceType::Cpu;
  int32_t index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

constexpr int kMaxRank = 64;  // torch's own limit for most operators

// What a front door knows of a tensor. Sizes and strides stay where the tensor keeps them; strides count elements.
struct TensorView {
  uint64_t address;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t rank;
  int64_t storage_bytes;  // from `address` to the end of the storage
  DType dtype;
  Device device;
  bool pinned = false;         // host memory that the destinations' GPU reads at `address`
  bool strided = true;         // false: sparse or another layout that has no strides
  bool lazy = false;           // conjugated or negated on paper: the memory does not hold the values
  bool requires_grad = false;  // and grad mode is on
  bool inference = false;      // an inference tensor outside inference mode, and grad mode is on
};

// The number that the rest of a destination becomes; none: it stays as it is.
using Fill = std::optional<double>;

// Wrong input. `pair` is the index of the pair at fault, -1 where the call as a whole is.
struct InvalidInput : std::runtime_error {
  InvalidInput(int64_t pair, const std::string& text, bool torch_can = false)
      : std::runtime_error(text), pair(pair), torch_can(torch_can) {}
  int64_t pair;
  bool torch_can;  // right for torch's own operators, one pair after the other
};

// The first of a call's refusals that torch's operators could do without. It is thrown once all other checks are made,
// so that whoever catches it may rely on them.
using Deferred = std::optional<InvalidInput>;

// The memory that a vector keeps.
template <class T>
size_t bytes_of(const std::vector<T>& vector) {
  return vector.capacity() * sizeof(T);
}

// Destinations that were checked against the contract and each other. Immutable once bound, so threads may share it.
// The sizes and strides that its views point to must outlive it.
class Destinations {
 public:
  // Binds anew. `fills`, where given, has one entry for each destination. Throws InvalidInput, but for what is
  // deferred.
  void bind(std::span<const TensorView> views, const std::vector<Fill>* fills);

  const Deferred& deferred() const { return deferred_; }
  size_t capacity_bytes() const;

  std::span<const TensorView> views() const { return views_; }
  const Fill& fill(size_t pair) const { return fills_.empty() ? kNoFill : fills_[pair]; }
  const Device& device() const { return device_; }

  // Throws InvalidInput where `source`, of this pair, shares memory with a destination. True: it is the very memory of
  // its own destination, so that nothing is to be copied. `gap` is OverlapIndex::is_free()'s.
  bool check_source_overlap(int64_t pair, const TensorView& source, int64_t source_bytes, size_t& gap) const;

 private:
  static constexpr Fill kNoFill{};

  std::vector<TensorView> views_;
  std::vector<Fill> fills_;
  OverlapIndex index_;
  Device device_;
  Deferred deferred_;
};

// One kernel's parameters, ready to launch.
struct PlannedLaunch {
  Launch<kMaxLaunchWords> params;
  int used_words;
  const LaunchHeader& header() const { return launch_header(params.words); }
};

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
  struct PlannedTask {
    PlannedTask() {}  // whoever adds one sets what its kind needs
    Task task;
    int64_t pair;
    uint64_t columns;
    int unit_log2;  // bytes of a column, the larger side's in a cast
    int rank;       // of the extents; 0: one row, columns side by side
    LaunchKind kind;
    uint32_t tiles;
    uint32_t tile_rows;
    uint64_t row_tiles;
    std::array<Extent, kMaxExtents> extents;
  };

  void add_copy(int64_t pair, const TensorView& destination, const TensorView& source);
  void add_fill(int64_t pair, const TensorView& destination, const TensorView& source, double value);
  void add_bytes(int64_t pair, Operation operation, int item_bytes, uint64_t src, uint64_t dst,
                 std::span<Extent> extents);
  void add_cast(int64_t pair, const TensorView& destination, const TensorView& source, std::span<Extent> extents);
  void add_task(int64_t pair, Operation operation, int width, int unit_log2, uint64_t src, uint64_t dst,
                uint64_t columns, std::span<const Extent> extents, bool dense);
  static uint64_t shape_tiles(PlannedTask& planned, int tile_bytes_log2, DeviceType device);
  static void write_launch(const LaunchHeader& header, std::span<const PlannedTask> tasks, int outer_at,
                           uint64_t* words);
  static StridedTask strided_task(const PlannedTask& planned, int outer_at);
  std::span<const PlannedLaunch> lay_out(DeviceType device);

  Deferred deferred_;
  std::vector<PlannedTask> tasks_;
  std::vector<PlannedLaunch> launches_;
  uint64_t bytes_ = 0;
};

const char* dtype_name(DType dtype);
DType dtype_of_name(std::string_view name);  // torch's
int dtype_size(DType dtype);

// From a tensor's first byte to its last, as far as its sizes and strides tell; INT64_MAX where that
// overflows, 0 where it is empty or they are negative.
int64_t byte_extent(const TensorView& view);
std::string device_name(const Device& device);

}  // namespace fused_copy
