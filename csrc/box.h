// Boxes of memory, as what the planner makes tasks of.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "checks.h"
#include "launch_layout.h"

namespace fused_copy {

constexpr int kMaxUnitLog2 = 4;  // 16 bytes: the widest access of a GPU up to sm_90

// A box of memory in a source and in a destination, as the extents that cover it: from the fastest varying in the
// destination, with neighbours that step as one merged.
class Box {
 public:
  // Adds the next dimension, of at least two elements. It may vary faster than those that are there.
  void add(int64_t size, int64_t src_stride, int64_t dst_stride) {
    if (rank_ > 0) {
      Extent& inner = extents_[rank_ - 1];
      if (dst_stride == inner.size * inner.dst_stride && src_stride == inner.size * inner.src_stride) {
        inner.size *= size;
        return;
      }
      ordered_ &= inner.dst_stride <= dst_stride;
    }
    extents_[rank_++] = {size, src_stride, dst_stride};
  }

  std::span<Extent> extents() {
    if (!ordered_) order();
    return in_order();
  }
  // From the last dimension to the first.
  std::span<Extent> in_order() { return {extents_.data(), rank_}; }

 private:
  void order() {
    std::ranges::sort(std::span(extents_).first(rank_), {}, &Extent::dst_stride);
    ordered_ = true;
    for (size_t i = 0, count = std::exchange(rank_, 0); i < count; ++i) {
      const auto [size, src_stride, dst_stride] = extents_[i];
      add(size, src_stride, dst_stride);
    }
  }

  std::array<Extent, kMaxRank + 1> extents_;
  size_t rank_ = 0;
  bool ordered_ = true;
};

inline void check_dimensions(int64_t pair, size_t dimensions) {
  if (dimensions <= kMaxDimensions) return;
  throw InvalidInput(pair,
                     "source and destination need " + std::to_string(dimensions) +
                         " dimensions after merging those that can be merged: expected at most " +
                         std::to_string(kMaxDimensions) + "; make the source contiguous or split the copy",
                     /*torch_can=*/true);
}

inline int trailing_zeros(uint64_t bits) { return std::min(std::countr_zero(bits), kMaxUnitLog2); }

inline uint64_t divide_up_log2(uint64_t value, int log2) { return ((value - 1) >> log2) + 1; }

// The last element of a one-dimensional source, which is not empty, as often as its destination has elements beyond it.
struct LastOf {
  LastOf(int64_t pair, const TensorView& of_destination, const TensorView& of_source)
      : source(of_source), destination(of_destination) {
    const int64_t count = of_source.sizes[0];
    if (count == 0) refuse_last(pair);
    rest = of_destination.sizes[0] - count;
    source.address += static_cast<uint64_t>((count - 1) * of_source.strides[0]) * info(source.dtype).size;
    destination.address += static_cast<uint64_t>(count * of_destination.strides[0]) * info(destination.dtype).size;
    source.sizes = destination.sizes = &rest;
    source.strides = &zero;
  }
  LastOf(const LastOf&) = delete;
  LastOf& operator=(const LastOf&) = delete;

  TensorView source;
  TensorView destination;
  int64_t rest;
  int64_t zero = 0;
};

}  // namespace fused_copy
