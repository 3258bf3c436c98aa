// What may stand for a pair's source beside a tensor that is copied as it lies. Plain C++: no torch, no CUDA, no
// Python.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "tensor_view.h"

namespace fused_copy {

enum class Derivation : uint8_t {
  Nothing,  // the pair is left out
  Values,   // host values, of the destination's dtype
  Rows,     // of a table, by index
  Sums,     // of lengths, from 0
  Plus,     // integers and a number
};

// A tensor that a source is made of, or host values.
struct SourcePart {
  SourcePart() {}  // sets member by member: for `= default` gcc zeroes all by one string instruction, which is slower
  TensorView view;
  bool given = false;
  bool by_value = false;         // the view's address is a place among the call's HostValues, side by side
  const void* tensor = nullptr;  // what the front door knows it by
};

struct DerivedSource {
  int64_t pair;
  Derivation derivation;
  SourcePart source;         // the values, the table, the lengths to sum, or the integers
  SourcePart index;          // of rows, as what follows
  SourcePart lengths;        // of the rows, or of the rows of a table of lengths,
  SourcePart lengths_index;  // whose index this is
  int64_t number = 0;        // the page size, or what is added
};

// The names that the op has for sources, and the parts of each, which it takes as one list after the other.
struct SourceForm {
  const char* name;
  Derivation derivation;
  int parts;
};
constexpr SourceForm kSourceForms[] = {
    {"none", Derivation::Nothing, 0},           {"rows", Derivation::Rows, 2},  // table, index
    {"rows_lengths", Derivation::Rows, 3},                                      // the same and lengths
    {"rows_lengths_rows", Derivation::Rows, 4},                                 // the same, and the lengths' index
    {"cu_seqlens", Derivation::Sums, 1},        {"plus", Derivation::Plus, 1},
};
constexpr const char* kTensorForm = "tensor";
constexpr SourcePart DerivedSource::* kParts[] = {&DerivedSource::source, &DerivedSource::index,
                                                  &DerivedSource::lengths, &DerivedSource::lengths_index};

// What errors call the part `source`.
constexpr const char* source_name(Derivation derivation) {
  switch (derivation) {
    case Derivation::Nothing: return "source";
    case Derivation::Values: return "values";
    case Derivation::Rows: return "table";
    case Derivation::Sums: return "lengths";
    case Derivation::Plus: return "source";
  }
  __builtin_unreachable();
}

// The host values of one call, as bytes that lie side by side, and the shapes that the views of them point to. Keeps
// its memory.
class HostValues {
 public:
  static constexpr size_t kAlignment = 16;

  void clear() { used_blocks_ = chunk_ = used_ = 0; }
  std::byte* at(uint64_t place) { return reinterpret_cast<std::byte*>(blocks_.data()) + place; }
  std::span<const std::byte> bytes() const {
    return {reinterpret_cast<const std::byte*>(blocks_.data()), used_blocks_ * kAlignment};
  }
  // Makes the part one of values of this shape and dtype, for which there is no room yet.
  void describe(SourcePart& part, std::span<const int64_t> sizes, DType dtype);
  // The same with room for them, and returns where they go. Moves the bytes that are there.
  std::byte* add(SourcePart& part, std::span<const int64_t> sizes, DType dtype);
  size_t capacity_bytes() const { return blocks_.capacity() * kAlignment + chunks_.size() * sizeof(Chunk); }

 private:
  struct alignas(kAlignment) Block {
    std::byte bytes[kAlignment];
  };
  struct Chunk {
    int64_t numbers[16 * kMaxRank];
  };

  std::vector<Block> blocks_;  // those from `used_blocks_` on are left from earlier calls
  size_t used_blocks_ = 0;
  std::vector<std::unique_ptr<Chunk>> chunks_;  // of sizes and strides, which do not move
  size_t chunk_ = 0, used_ = 0;
};

// An array in host memory. Strides are in bytes and may be negative.
struct HostArray {
  const void* data;
  std::span<const int64_t> sizes;
  std::span<const int64_t> strides;
  DType dtype;
};

// Puts the array's elements side by side as this dtype, with the values of Tensor.copy_. Both dtypes are castable, or
// they are the same.
void convert_array(const HostArray& array, DType to, std::byte* values);

// What stands in place of a pair's source that `derived` tells of. On no device, or else it would be host memory.
inline constexpr TensorView kNoTensor{.device = {.type = DeviceType::Other}};

// What a call copies from. `derived` tells, in their order, of the pairs that `tensors` say nothing of.
struct CallSources {
  std::span<const TensorView> tensors;
  std::span<const DerivedSource> derived = {};
  std::span<const std::byte> values = {};
};

}  // namespace fused_copy
