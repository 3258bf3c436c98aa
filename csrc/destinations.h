// The destinations of a call, or of a plan's calls: bound once, then compared with sources.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checks.h"
#include "overlap.h"

namespace fused_copy {

struct DerivedSource;

// What becomes of the rest of a destination, the part outside of its corner.
enum class Rest : uint8_t {
  Keep,     // it stays as it is
  Pattern,  // the bits of a number
  Last,     // the last value that the source yields
};

// As callers say it.
struct Fill {
  Fill() = default;
  Fill(double number) : kind(Rest::Pattern), number(number) {}
  static Fill last() {
    Fill fill;
    fill.kind = Rest::Last;
    return fill;
  }
  Rest kind = Rest::Keep;
  double number = 0;
};

struct RestFill {
  Rest kind = Rest::Keep;
  uint64_t pattern = 0;  // the 8 bytes that the rest becomes copies of
};

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
  bool has_rests() const { return !rests_.empty(); }
  RestFill rest(size_t pair) const { return has_rests() ? rests_[pair] : RestFill{}; }
  const Device& device() const { return device_; }

  // Throws InvalidInput where `source`, of this pair, shares memory with a destination that the call writes. True: it
  // is the very memory of its own destination, so that nothing is to be copied. `derived` are the call's, and `gap` is
  // OverlapIndex::is_free()'s.
  bool check_source_overlap(int64_t pair, const TensorView& source, int64_t source_bytes,
                            std::span<const DerivedSource> derived, size_t& gap) const;
  // The same for a part of a source, which may be no destination's very memory.
  void check_part_overlap(int64_t pair, const char* name, const TensorView& part, int64_t bytes,
                          std::span<const DerivedSource> derived, size_t& gap) const;

 private:
  void bind_fill(int64_t pair, const Fill& fill, const TensorView& view);
  // How the view shares memory with a destination that the call writes, in words; none: it does not.
  std::optional<std::string> shared_with(int64_t pair, const TensorView& view,
                                         std::span<const DerivedSource> derived) const;
  OverlapIndex::Found find_written(const TensorView& view, std::span<const DerivedSource> derived) const;

  std::vector<TensorView> views_;
  std::vector<RestFill> rests_;
  OverlapIndex index_;
  Device device_;
  Deferred deferred_;
};

}  // namespace fused_copy
