// Reads tensors through the handles of torch's stable ABI, which is plain C.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <optional>
#include <stdexcept>

#include "tensor_view.h"

namespace fused_copy {

// Torch refuses to give the address of a storage that is there: memory that is gone or not gathered yet, as of FSDP's
// parameters or a CUDA graph tree's earlier outputs. The text is torch's, empty before torch 2.13.
struct Withheld : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// All that the planner checks but `lazy` and `autograd`, which only the dispatcher or Python tell. A
// tensor without strides or memory is read as far as it can be. Sizes and strides stay the tensor's. `strided_on` is
// the type of its device where it is known already, and that the tensor is strided. Throws Withheld, or
// std::runtime_error where torch refuses to tell anything else.
TensorView read_tensor(AtenTensorHandle tensor, std::optional<DeviceType> strided_on = std::nullopt);

// Tells a tensor's memory from others.
struct Memory {
  const void* data;
  int64_t storage_size;
};
// Throws as read_tensor() does.
Memory memory_of(AtenTensorHandle tensor);

// Whether the tensor has that memory still, or more of it.
bool has_memory(AtenTensorHandle tensor, const Memory& memory);

}  // namespace fused_copy
