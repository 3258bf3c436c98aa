// Reads tensors through the handles of torch's stable ABI, which is plain C.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "planner.h"

namespace fused_copy {

// All that the planner checks but `lazy`, `requires_grad` and `inference`, which only the dispatcher or Python tell. A
// tensor without strides or memory is read as far as it can be. Sizes and strides stay the tensor's. Throws
// std::runtime_error where torch refuses to tell.
TensorView read_tensor(AtenTensorHandle tensor);

}  // namespace fused_copy
