// The destinations of a call, or of a plan's calls: bound once, then compared with sources.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "checks.h"
#include "overlap.h"

namespace fused_copy {

// The number that the rest of a destination becomes; none: it stays as it is.
using Fill = std::optional<double>;

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
  // The 8 bytes that the rest of a destination becomes copies of; none: it stays as it is.
  std::optional<uint64_t> pattern(size_t pair) const { return patterns_.empty() ? std::nullopt : patterns_[pair]; }
  const Device& device() const { return device_; }

  // Throws InvalidInput where `source`, of this pair, shares memory with a destination. True: it is the very memory of
  // its own destination, so that nothing is to be copied. `gap` is OverlapIndex::is_free()'s.
  bool check_source_overlap(int64_t pair, const TensorView& source, int64_t source_bytes, size_t& gap) const;

 private:
  void bind_fill(int64_t pair, const Fill& fill, const TensorView& view);

  std::vector<TensorView> views_;
  std::vector<std::optional<uint64_t>> patterns_;
  OverlapIndex index_;
  Device device_;
  Deferred deferred_;
};

}  // namespace fused_copy
