// What is refused of a pair, whatever its memory shares with others'. What is right is checked here, in line; what is
// wrong is put into words in checks.cpp, so that a call that is right does not fetch that code.
#pragma once

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "tensor_view.h"

namespace fused_copy {

// What the texts of refusals call a pair's tensors: its parts have other names.
inline bool is_part(const char* role) {
  return std::string_view(role) != "source" && std::string_view(role) != "destination";
}

// Wrong input. `pair` is the index of the pair at fault, -1 where the call as a whole is.
struct InvalidInput : std::runtime_error {
  InvalidInput(int64_t pair, const std::string& text, bool torch_can = false, const char* part = nullptr)
      : std::runtime_error(text), pair(pair), torch_can(torch_can), part(part) {}
  int64_t pair;
  bool torch_can;    // right for torch's own operators, one pair after the other
  const char* part;  // of the pair's source, which the text then goes on about; null: the text names what is wrong
};

// The first of a call's refusals that torch's operators could do without. It is thrown once all other checks are made,
// so that whoever catches it may rely on them.
using Deferred = std::optional<InvalidInput>;

// Runs one check, or a pair's, after which the others are still made where torch's operators could do without it.
template <class Check>
void check_or_defer(Deferred& deferred, Check check) {
  try {
    check();
  } catch (const InvalidInput& error) {
    if (!error.torch_can) throw;
    if (!deferred) deferred.emplace(error);
  }
}

[[noreturn, gnu::cold]] void refuse_tensor(int64_t pair, const char* role, const TensorView& view);
[[noreturn, gnu::cold]] void refuse_lazy(int64_t pair, const char* role);
[[noreturn, gnu::cold]] void refuse_fill(int64_t pair, double number, const TensorView& destination);
[[noreturn, gnu::cold]] void refuse_ranks(int64_t pair, const TensorView& destination, const TensorView& source);
[[noreturn, gnu::cold]] void refuse_size(int64_t pair, const TensorView& destination, const TensorView& source,
                                         int64_t d);
[[noreturn, gnu::cold]] void refuse_devices(int64_t pair, const char* role, const TensorView& destination,
                                            const TensorView& source);
[[noreturn, gnu::cold]] void refuse_last(int64_t pair);
[[noreturn, gnu::cold]] void refuse_dtypes(int64_t pair, const TensorView& destination, const TensorView& source);

inline bool holds_memory(const Device& device) { return device.type <= DeviceType::Cuda; }

// The bytes from a tensor's first element to the end of its last. Checks all that one tensor alone can get wrong.
inline int64_t check_tensor(int64_t pair, const char* role, const TensorView& view) {
  const bool plain = view.strided & (view.dtype != DType::Unsupported) & !view.autograd.requires_grad &
                     !view.autograd.inference & holds_memory(view.device) & (view.rank <= kMaxRank);
  const int64_t bytes = byte_extent(view);
  if (bytes > 0) {
    const bool stored = view.address != 0 && bytes <= view.storage_bytes && bytes != kTooManyBytes &&
                        view.address + static_cast<uint64_t>(bytes) >= view.address;
    if (!plain || !stored) refuse_tensor(pair, role, view);
    return bytes;
  }
  const auto negative = [](int64_t number) { return number < 0; };
  if (!plain || std::any_of(view.sizes, view.sizes + view.rank, negative) ||
      std::any_of(view.strides, view.strides + view.rank, negative)) {
    refuse_tensor(pair, role, view);
  }
  return 0;
}

inline void check_lazy(int64_t pair, const char* role, const TensorView& view) {
  if (view.lazy) refuse_lazy(pair, role);
}

inline void check_shapes(int64_t pair, const TensorView& destination, const TensorView& source) {
  if (source.rank != destination.rank) refuse_ranks(pair, destination, source);
  for (int64_t d = 0; d < source.rank; ++d) {
    if (source.sizes[d] > destination.sizes[d]) refuse_size(pair, destination, source, d);
  }
}

inline void check_device(int64_t pair, const char* role, const TensorView& destination, const TensorView& source) {
  if (source.device != destination.device && !source.pinned) refuse_devices(pair, role, destination, source);
}

inline void check_devices_and_dtypes(int64_t pair, const TensorView& destination, const TensorView& source) {
  check_lazy(pair, "source", source);
  check_device(pair, "source", destination, source);
  if (source.dtype != destination.dtype && !(is_castable(source.dtype) && is_castable(destination.dtype))) {
    refuse_dtypes(pair, destination, source);
  }
}

}  // namespace fused_copy
