#include "tensors.h"

#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/ScalarType.h>

// Since torch 2.13.
extern "C" [[gnu::weak]] const char* torch_exception_get_what_without_backtrace();

namespace fused_copy {
namespace {

using torch::headeronly::ScalarType;

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

DeviceType device_type_of(int32_t device_type) {
  switch (static_cast<torch::headeronly::DeviceType>(device_type)) {
    case torch::headeronly::DeviceType::CPU: return DeviceType::Cpu;
    case torch::headeronly::DeviceType::CUDA: return DeviceType::Cuda;
    case torch::headeronly::DeviceType::Meta: return DeviceType::Meta;
    default: return DeviceType::Other;
  }
}

void check(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("fused_copy: torch refused to tell about a tensor");
}

}  // namespace

Memory memory_of(AtenTensorHandle tensor) {
  Memory memory;
  void* data;
  check(aoti_torch_get_storage_size(tensor, &memory.storage_size));
  if (aoti_torch_get_data_ptr(tensor, &data) != AOTI_TORCH_SUCCESS) {
    throw Withheld(torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : "");
  }
  memory.data = data;
  return memory;
}

bool has_memory(AtenTensorHandle tensor, const Memory& memory) {
  int64_t storage_size;
  void* data;
  return aoti_torch_get_data_ptr(tensor, &data) == AOTI_TORCH_SUCCESS && data == memory.data &&
         aoti_torch_get_storage_size(tensor, &storage_size) == AOTI_TORCH_SUCCESS &&
         storage_size >= memory.storage_size;
}

TensorView read_tensor(AtenTensorHandle tensor, std::optional<DeviceType> strided_on) {
  TensorView view{};
  int32_t layout = static_cast<int32_t>(torch::headeronly::Layout::Strided);
  int32_t dtype, device_type;
  if (!strided_on) {
    check(aoti_torch_get_layout(tensor, &layout));
    check(aoti_torch_get_device_type(tensor, &device_type));
  }
  check(aoti_torch_get_dtype(tensor, &dtype));
  view.dtype = dtype_of(dtype);
  view.device.type = strided_on ? *strided_on : device_type_of(device_type);
  if (view.device.type != DeviceType::Cpu) check(aoti_torch_get_device_index(tensor, &view.device.index));
  int64_t* sizes;
  int64_t* strides;
  // Nested tensors say that they are strided, but have no sizes.
  view.strided = layout == static_cast<int32_t>(torch::headeronly::Layout::Strided) &&
                 aoti_torch_get_dim(tensor, &view.rank) == AOTI_TORCH_SUCCESS &&
                 aoti_torch_get_sizes(tensor, &sizes) == AOTI_TORCH_SUCCESS &&
                 aoti_torch_get_strides(tensor, &strides) == AOTI_TORCH_SUCCESS;
  if (!view.strided || view.device.type > DeviceType::Cuda) {
    view.rank = 0;
    return view;
  }
  view.sizes = sizes;
  view.strides = strides;
  int64_t storage_offset, offset_bytes;
  check(aoti_torch_get_storage_offset(tensor, &storage_offset));
  const Memory memory = memory_of(tensor);
  view.address = reinterpret_cast<uint64_t>(memory.data);
  const bool beyond = __builtin_mul_overflow(storage_offset, int64_t{dtype_size(view.dtype)}, &offset_bytes);
  view.storage_bytes = beyond ? 0 : memory.storage_size - offset_bytes;
  return view;
}

}  // namespace fused_copy
