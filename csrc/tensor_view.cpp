#include "tensor_view.h"

namespace fused_copy {
namespace {

std::string listed(const int64_t* numbers, int64_t count) {
  std::string text;
  for (int64_t d = 0; d < count; ++d) text += (d ? ", " : "") + std::to_string(numbers[d]);
  return text;
}

}  // namespace

int64_t huge_extent(const TensorView& view, int64_t d) {
  while (++d < view.rank) {
    if (has_none(view, d)) return 0;
  }
  return kTooManyBytes;
}

std::string device_name(const Device& device) {
  switch (device.type) {
    case DeviceType::Cpu: return "cpu";
    case DeviceType::Cuda: return "cuda:" + std::to_string(device.index);
    case DeviceType::Meta: return "meta";
    default: return "an unsupported device";
  }
}

std::string shape_of(const TensorView& view) { return "[" + listed(view.sizes, view.rank) + "]"; }

std::string strides_of(const TensorView& view) { return "(" + listed(view.strides, view.rank) + ")"; }

}  // namespace fused_copy
