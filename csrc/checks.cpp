#include "checks.h"

#include <array>
#include <cstdio>
#include <cstdlib>

namespace fused_copy {
namespace {

std::string number_text(double number) {
  std::array<char, 32> text;
  // The fewest digits that read back as the number.
  for (int digits = 15; digits <= 17; ++digits) {
    std::snprintf(text.data(), text.size(), "%.*g", digits, number);
    if (std::strtod(text.data(), nullptr) == number) break;
  }
  return text.data();
}

// A refusal of the tensor of this role.
InvalidInput about(int64_t pair, const char* role, const std::string& text, bool torch_can = false) {
  if (is_part(role)) return {pair, text, torch_can, role};
  return {pair, std::string(role) + " " + text, torch_can};
}

std::string castable_names() {
  std::string text;
  for (int i = 0; i < kCastableDTypes; ++i) {
    text += (i == 0 ? "" : i + 1 < kCastableDTypes ? ", " : " and ") + std::string(kDTypes[i].name);
  }
  return text;
}

}  // namespace

void refuse_tensor(int64_t pair, const char* role, const TensorView& view) {
  const auto fail = [&](const std::string& text) { throw about(pair, role, text); };
  if (!view.strided) fail("is not a strided tensor (sparse, quantized or nested): pass a dense, strided one");
  if (view.dtype == DType::Unsupported) {
    fail(
        "has a dtype that cannot be copied: sub-byte, quantized and opaque dtypes are not supported; view it as uint8");
  }
  if (view.autograd.requires_grad) {
    fail(
        "requires grad while grad mode is on, and an in-place copy is not differentiable here: call under "
        "torch.no_grad() or torch.inference_mode(), or pass detach() of it");
  }
  if (view.autograd.inference) {
    fail("is an inference tensor, which outside inference mode must not change: call under torch.inference_mode()");
  }
  if (!holds_memory(view.device)) fail("is on " + device_name(view.device) + ": expected a CPU or CUDA tensor");
  if (view.rank > kMaxRank) {
    fail("has " + std::to_string(view.rank) + " dimensions: expected at most " + std::to_string(kMaxRank));
  }
  for (int64_t d = 0; d < view.rank; ++d) {
    if (view.sizes[d] < 0 || view.strides[d] < 0) {
      fail("has a negative size or stride: shape " + shape_of(view) + ", strides " + strides_of(view));
    }
  }
  const int64_t there = view.address == 0 ? 0 : std::max<int64_t>(view.storage_bytes, 0);
  fail("of shape " + shape_of(view) + " and strides " + strides_of(view) + " needs " +
       std::to_string(byte_extent(view)) + " bytes of storage but " + std::to_string(there) +
       " are there: it was freed or resized");
  __builtin_unreachable();
}

void refuse_lazy(int64_t pair, const char* role) {
  throw about(pair, role,
              "has its conjugate or negative bit set, so its memory does not hold its values: pass resolve_conj() and "
              "resolve_neg() of it",
              /*torch_can=*/true);
}

void refuse_fill(int64_t pair, double number, const TensorView& destination) {
  const std::string dtype = info(destination.dtype).name;
  const bool real = is_castable(destination.dtype) && !is_integer(info(destination.dtype).format);
  throw InvalidInput(
      pair, "fill " + number_text(number) + " cannot be held exactly by the destination's " + dtype +
                ": pass a number that it can hold" +
                (real ? ", such as float(torch.tensor(" + number_text(number) + ", dtype=torch." + dtype + "))" : ""));
}

void refuse_ranks(int64_t pair, const TensorView& destination, const TensorView& source) {
  throw InvalidInput(pair, "source has shape " + shape_of(source) + " but the destination has shape " +
                               shape_of(destination) + ": expected " + std::to_string(destination.rank) +
                               " dimensions, got " + std::to_string(source.rank) + " (there is no broadcasting)");
}

void refuse_size(int64_t pair, const TensorView& destination, const TensorView& source, int64_t d) {
  throw InvalidInput(pair, "source has shape " + shape_of(source) + ", larger in dimension " + std::to_string(d) +
                               " than the destination's " + shape_of(destination) +
                               ": expected at most the destination's size in every dimension (destinations come "
                               "first: replay(dst, src))");
}

void refuse_devices(int64_t pair, const char* role, const TensorView& destination, const TensorView& source) {
  const bool pageable = source.device.type == DeviceType::Cpu && destination.device.type == DeviceType::Cuda;
  throw about(
      pair, role,
      "is on " + device_name(source.device) + " but the destination is on " + device_name(destination.device) +
          (pageable ? ": pin it (tensor.pin_memory()) or move it to the GPU first" : ": pass tensors of one device"),
      /*torch_can=*/true);
}

void refuse_last(int64_t pair) {
  throw InvalidInput(pair,
                     "fill is \"last\" but the source yields nothing whose last value it could be: pass a number, or a "
                     "source that is not empty");
}

void refuse_dtypes(int64_t pair, const TensorView& destination, const TensorView& source) {
  throw InvalidInput(pair,
                     std::string("source is ") + info(source.dtype).name + " but the destination is " +
                         info(destination.dtype).name + ": pass the same dtype, or two among " + castable_names(),
                     /*torch_can=*/true);
}

}  // namespace fused_copy
