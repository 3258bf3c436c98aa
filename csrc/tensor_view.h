// A tensor's metadata, as the planner takes it. Plain C++: no torch, no CUDA, no Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "dtype.h"

namespace fused_copy {

enum class DeviceType : uint8_t { Cpu, Cuda, Meta, Other };

struct Device {
  DeviceType type = DeviceType::Cpu;
  int32_t index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

constexpr int kMaxRank = 64;  // torch's own limit for most operators

// What autograd refuses of a destination, where grad mode is on. It is asked for apart from the rest of a tensor.
struct Autograd {
  bool requires_grad = false;
  bool inference = false;  // an inference tensor outside inference mode
};

// What a front door knows of a tensor. Sizes and strides stay where the tensor keeps them; strides count elements.
struct TensorView {
  uint64_t address = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t rank = 0;
  int64_t storage_bytes = 0;  // from `address` to the end of the storage
  DType dtype = {};
  Device device;
  bool pinned = false;  // host memory that the destinations' GPU reads at `address`
  bool strided = true;  // false: sparse or another layout that has no strides
  bool lazy = false;    // has its conjugate or negative bit set: the memory does not hold the values
  Autograd autograd;
};

inline bool is_empty(const TensorView& view) {
  return std::any_of(view.sizes, view.sizes + view.rank, [](int64_t size) { return size == 0; });
}

// Whether a source of this shape is a corner of the destination.
inline bool fits(std::span<const int64_t> sizes, const TensorView& destination) {
  return static_cast<int64_t>(sizes.size()) == destination.rank &&
         std::equal(sizes.begin(), sizes.end(), destination.sizes, std::less_equal<>());
}

constexpr int64_t kTooManyBytes = INT64_MAX;

// As far as sizes and strides tell: whether the tensor has no elements in this dimension, or they are negative.
inline bool has_none(const TensorView& view, int64_t d) { return view.sizes[d] <= 0 || view.strides[d] < 0; }

// byte_extent() of a tensor that dimension `d` makes too large. A function of its own, so that the other is inlined.
[[gnu::cold]] int64_t huge_extent(const TensorView& view, int64_t d);

// From a tensor's first byte to its last, as far as its sizes and strides tell; kTooManyBytes where that overflows, 0
// where it is empty or they are negative.
inline int64_t byte_extent(const TensorView& view) {
  // An element has up to 16 bytes, and the product of a dimension's size and stride up to twice what it spans.
  constexpr int64_t most = kTooManyBytes / 32;
  int64_t elements = 1;
  for (int64_t d = 0; d < view.rank; ++d) {
    if (has_none(view, d)) return 0;
    int64_t step;
    if (__builtin_mul_overflow(view.sizes[d] - 1, view.strides[d], &step) || step > most - elements) {
      return huge_extent(view, d);
    }
    elements += step;
  }
  return elements * info(view.dtype).size;
}

// In words, for errors.
std::string device_name(const Device& device);
std::string shape_of(const TensorView& view);
std::string strides_of(const TensorView& view);

}  // namespace fused_copy
