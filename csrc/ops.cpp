// torch.ops.fused_copy.replay, against torch's stable ABI alone: tensor handles -> metadata -> planner -> back end.
#define TORCH_TARGET_VERSION 0x020a000000000000

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "errors.h"
#include "front_door.h"

namespace fused_copy {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::detail::from;
using torch::stable::detail::to;

DType dtype_of(int32_t scalar_type) {
  switch (static_cast<ScalarType>(scalar_type)) {
    case ScalarType::Bool: return DType::Bool;
    case ScalarType::Byte: return DType::UInt8;
    case ScalarType::Char: return DType::Int8;
    case ScalarType::Short: return DType::Int16;
    case ScalarType::Int: return DType::Int32;
    case ScalarType::Long: return DType::Int64;
    case ScalarType::Half: return DType::Float16;
    case ScalarType::BFloat16: return DType::BFloat16;
    case ScalarType::Float: return DType::Float32;
    case ScalarType::Double: return DType::Float64;
    case ScalarType::UInt16: return DType::UInt16;
    case ScalarType::UInt32: return DType::UInt32;
    case ScalarType::UInt64: return DType::UInt64;
    case ScalarType::ComplexHalf: return DType::Complex32;
    case ScalarType::ComplexFloat: return DType::Complex64;
    case ScalarType::ComplexDouble: return DType::Complex128;
    case ScalarType::Float8_e4m3fn: return DType::Float8E4M3FN;
    case ScalarType::Float8_e4m3fnuz: return DType::Float8E4M3FNUZ;
    case ScalarType::Float8_e5m2: return DType::Float8E5M2;
    case ScalarType::Float8_e5m2fnuz: return DType::Float8E5M2FNUZ;
    case ScalarType::Float8_e8m0fnu: return DType::Float8E8M0FNU;
    case ScalarType::Float4_e2m1fn_x2: return DType::Float4E2M1FNx2;
    case ScalarType::Bits8: return DType::Bits8;
    case ScalarType::Bits16: return DType::Bits16;
    default: return DType::Unsupported;
  }
}

fused_copy::DeviceType device_type_of(int32_t device_type) {
  switch (static_cast<DeviceType>(device_type)) {
    case DeviceType::CPU: return fused_copy::DeviceType::Cpu;
    case DeviceType::CUDA: return fused_copy::DeviceType::Cuda;
    case DeviceType::Meta: return fused_copy::DeviceType::Meta;
    default: return fused_copy::DeviceType::Other;
  }
}

// Calls an operator with a tensor, which it does not take over, and further arguments.
StableIValue call_operator(const char* name, AtenTensorHandle tensor, std::initializer_list<StableIValue> others = {}) {
  std::vector<StableIValue> stack{reinterpret_cast<StableIValue>(own_handle(tensor))};
  stack.insert(stack.end(), others);
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack[0];
}

bool is(const char* question, AtenTensorHandle tensor) { return to<bool>(call_operator(question, tensor)); }

// Properties that only the dispatcher tells: asked where they can matter, as each answer costs about as much as the
// rest of a tensor together.
struct Questions {
  bool lazy;
  bool autograd;
};

bool requires_grad(AtenTensorHandle tensor) {
  // The stable ABI does not tell. With grad mode on, a view of a tensor has a gradient function if, and only if, the
  // tensor requires grad.
  const auto view = to<AtenTensorHandle>(call_operator("aten::alias", tensor));
  const bool leaf = is("aten::is_leaf", view);
  aoti_torch_delete_tensor_object(view);
  return !leaf;
}

TensorView view_of(AtenTensorHandle tensor, const Questions& ask) {
  TensorView view{};
  int32_t layout, dtype, device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &view.device.index));
  view.dtype = dtype_of(dtype);
  view.device.type = device_type_of(device_type);
  if (view.device.type == fused_copy::DeviceType::Cpu) view.device.index = 0;
  int64_t* sizes;
  int64_t* strides;
  int64_t storage_offset, storage_size;
  void* data;
  // Nested tensors say that they are strided, but have no sizes.
  view.strided = layout == static_cast<int32_t>(torch::headeronly::Layout::Strided) &&
                 aoti_torch_get_dim(tensor, &view.rank) == TORCH_SUCCESS &&
                 aoti_torch_get_sizes(tensor, &sizes) == TORCH_SUCCESS &&
                 aoti_torch_get_strides(tensor, &strides) == TORCH_SUCCESS;
  if (!view.strided || view.device.type > fused_copy::DeviceType::Cuda) {
    view.rank = 0;
    return view;
  }
  view.sizes = sizes;
  view.strides = strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor, &storage_offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor, &storage_size));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
  view.address = reinterpret_cast<uint64_t>(data);
  view.storage_bytes = storage_size - storage_offset * dtype_size(view.dtype);
  view.lazy = ask.lazy && (is("aten::is_conj", tensor) || is("aten::is_neg", tensor));
  if (ask.autograd) {
    // Inference mode turns grad mode off, so an inference tensor is outside of it here.
    view.inference = is("aten::is_inference", tensor);
    view.requires_grad = !view.inference && requires_grad(tensor);
  }
  return view;
}

// Tells autograd that a tensor is about to change, by an in-place operator that writes nothing.
void increment_version(AtenTensorHandle tensor) {
  const StableIValue none = from(int64_t{0});
  aoti_torch_delete_tensor_object(to<AtenTensorHandle>(call_operator("aten::transpose_", tensor, {none, none})));
}

// The tensors of a list argument, which it takes over from the dispatcher's stack.
class TensorList {
 public:
  explicit TensorList(StableIValue argument) : list_(to<StableListHandle>(argument)) {
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list_, &size));
    handles_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list_, i, &item));
      handles_.push_back(to<AtenTensorHandle>(item));
    }
  }
  ~TensorList() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
    torch_delete_list(list_);
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  void read(const Questions& ask, std::vector<TensorView>& views) const {
    for (AtenTensorHandle handle : handles_) views.push_back(view_of(handle, ask));
  }

  const std::vector<AtenTensorHandle>& handles() const { return handles_; }

 private:
  StableListHandle list_;
  std::vector<AtenTensorHandle> handles_;
};

// False where the argument is None.
bool read_fills(StableIValue argument, std::vector<Fill>& fills) {
  auto* list_value = to<StableIValue*>(argument);
  if (list_value == nullptr) return false;
  const auto list = to<StableListHandle>(*list_value);
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  for (size_t i = 0; i < size; ++i) {
    StableIValue item;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
    fills.push_back(to<std::optional<double>>(item));
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  delete list_value;
  return true;
}

void replay(StableIValue* stack, bool lazy) {
  const TensorList destinations(stack[0]);
  const TensorList sources(stack[1]);
  BorrowedWorkspace work;
  work->has_fills = read_fills(stack[2], work->fills);
  const bool grad_mode = aoti_torch_grad_mode_is_enabled();
  try {
    destinations.read({lazy, grad_mode}, work->destination_views);
    sources.read({lazy, false}, work->source_views);
    const auto launches = plan_call(*work);
    if (grad_mode) {
      for (AtenTensorHandle tensor : destinations.handles()) increment_version(tensor);
    }
    run_call(launches, work->destinations.device(), work->source_views,
             [&](size_t i) { return own_handle(sources.handles()[i]); });
  } catch (const InvalidInput& error) {
    throw std::runtime_error(describe(error));
  }
}

void replay_boxed(StableIValue* stack, uint64_t, uint64_t) { replay(stack, /*lazy=*/false); }
void replay_lazy_boxed(StableIValue* stack, uint64_t, uint64_t) { replay(stack, /*lazy=*/true); }

}  // namespace
}  // namespace fused_copy

STABLE_TORCH_LIBRARY(fused_copy, library) {
  library.def("replay(Tensor(a!)[] dst, Tensor[] src, float?[]? fill=None) -> ()");
}

// All back ends, so that tensors of one that is not supported meet this project's own error. No Autograd kernel.
STABLE_TORCH_LIBRARY_IMPL(fused_copy, CompositeExplicitAutograd, library) {
  library.impl("replay", &fused_copy::replay_boxed);
}

// Nested tensors would otherwise end in the dispatcher's own error, a page long.
STABLE_TORCH_LIBRARY_IMPL(fused_copy, AutogradNestedTensor, library) {
  library.impl("replay", &fused_copy::replay_boxed);
}

// Without these, torch would copy conjugate and negative views first and hide that from the caller.
STABLE_TORCH_LIBRARY_IMPL(fused_copy, Conjugate, library) { library.impl("replay", &fused_copy::replay_lazy_boxed); }
STABLE_TORCH_LIBRARY_IMPL(fused_copy, Negative, library) { library.impl("replay", &fused_copy::replay_lazy_boxed); }
