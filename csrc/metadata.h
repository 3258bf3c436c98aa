// The planner's checks of tensors that have no memory, as those that torch.compile traces with.
#pragma once

namespace pybind11 {
class module_;
}

namespace fused_copy {

void define_check_metadata(pybind11::module_& module);

}  // namespace fused_copy
