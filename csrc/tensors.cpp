#include "tensors.h"

#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/Layout.h>

#include <array>

// Since torch 2.13.
extern "C" [[gnu::weak]] const char* torch_exception_get_what_without_backtrace();

namespace fused_copy {
namespace {

// The place of a scalar type's row, by the type's number.
constexpr auto kRowOfScalarType = [] {
  std::array<DType, 64> rows;
  rows.fill(DType::Unsupported);
  for (const DTypeInfo& row : kDTypes) {
    if (row.dtype != DType::Unsupported) rows[row.scalar_type] = row.dtype;
  }
  return rows;
}();

DType dtype_of(int32_t scalar_type) {
  const auto number = static_cast<uint32_t>(scalar_type);
  return number < kRowOfScalarType.size() ? kRowOfScalarType[number] : DType::Unsupported;
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
  const bool beyond = __builtin_mul_overflow(storage_offset, int64_t{info(view.dtype).size}, &offset_bytes);
  view.storage_bytes = beyond ? 0 : memory.storage_size - offset_bytes;
  return view;
}

}  // namespace fused_copy
