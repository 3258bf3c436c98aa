// Which tensors share memory, element by element: views that interleave in one buffer, as its columns do, share none.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace fused_copy {

struct TensorView;

// The search for elements that meet has a budget, which strides that do not nest may exceed.
enum class Shared : uint8_t { No, Yes, Undecided };

// Whether two elements of one tensor share memory; it is not empty.
Shared shares_own_elements(const TensorView& view);

// The tensors of a list by where they lie, so that one is compared with few of them.
class OverlapIndex {
 public:
  // Which two tensors of the list share memory; `view` alone where it is one that does with the tensor asked about.
  struct Found {
    Shared shared = Shared::No;
    int64_t view = -1;
    int64_t other = -1;
  };

  void clear() { ranges_.clear(); }
  // Adds the tensor of this number, which is not empty and has the addresses [begin, end).
  void add(int64_t view, uint64_t begin, uint64_t end) { ranges_.push_back({begin, end, view}); }
  void visit(auto&& each) const {
    for (const Range& range : ranges_) each(range.view, range.begin, range.end);
  }
  // Makes what was added ready to be asked about, and finds two that share memory.
  Found order(std::span<const TensorView> views);

  // Whether no tensor has an address in [begin, end). `gap` says between which of them what was asked about last lay,
  // where the next is looked for first; begin with 0.
  bool is_free(uint64_t begin, uint64_t end, size_t& gap) const {
    const auto lies_in = [&](size_t g) {
      return (g == 0 || furthest_[g - 1] <= begin) && (g == ranges_.size() || end <= ranges_[g].begin);
    };
    if (lies_in(gap) || (gap < ranges_.size() && lies_in(++gap))) return true;
    gap = count_before(end);
    return lies_in(gap);
  }

  size_t capacity_bytes() const {
    size_t bytes = ranges_.capacity() * sizeof(Range) + furthest_.capacity() * sizeof(uint64_t) +
                   finer_.capacity() * sizeof(OverlapIndex);
    for (const OverlapIndex& finer : finer_) bytes += finer.capacity_bytes();
    return bytes;
  }

  // Finds one that shares memory with `view`, which is not empty.
  Found find(const TensorView& view, std::span<const TensorView> views) const;

 private:
  struct Range {
    uint64_t begin;
    uint64_t end;
    int64_t view;
  };

  // How many ranges begin before `end`.
  size_t count_before(uint64_t end) const {
    return std::ranges::lower_bound(ranges_, end, {}, &Range::begin) - ranges_.begin();
  }
  // Where the chain of ranges ends that overlap this one, directly or through others of the chain.
  size_t run_end(size_t first) const {
    while (++first < ranges_.size() && ranges_[first].begin < furthest_[first - 1]) continue;
    return first;
  }
  // Whether no two ranges overlap.
  bool sort();
  Found check(std::span<const TensorView> views, size_t level);
  Found check_run(size_t first, size_t last, std::span<const TensorView> views, size_t level);

  std::vector<Range> ranges_;       // by where they begin
  std::vector<uint64_t> furthest_;  // the furthest end among ranges_[0..i]
  // Of ranges that hang together, more than a few, the same tensors told apart otherwise: by their addresses modulo a
  // number, and those that hang together there by their addresses again, for which the number is 0.
  std::vector<OverlapIndex> finer_;
  size_t first_ = 0, last_ = 0;  // of the ranges in the index that this one is part of
  uint64_t modulus_ = 0;
};

}  // namespace fused_copy
