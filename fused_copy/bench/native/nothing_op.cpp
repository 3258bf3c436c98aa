// torch.ops.fused_copy_bench.nothing: the schema of fused_copy.replay and the same kind of boxed function, which does
// no more than take its arguments off the dispatcher's stack.
#define TORCH_TARGET_VERSION 0x020a000000000000

#include <torch/csrc/stable/library.h>

namespace {

using torch::stable::detail::to;

void release_tensors(StableIValue argument) {
  const auto list = to<StableListHandle>(argument);
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  for (size_t i = 0; i < size; ++i) {
    StableIValue item;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
    TORCH_ERROR_CODE_CHECK(aoti_torch_delete_tensor_object(to<AtenTensorHandle>(item)));
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
}

// The benchmark passes no fills.
void nothing(StableIValue* stack, uint64_t, uint64_t) {
  release_tensors(stack[0]);
  release_tensors(stack[1]);
}

}  // namespace

STABLE_TORCH_LIBRARY(fused_copy_bench, library) {
  library.def("nothing(Tensor(a!)[] dst, Tensor[] src, float?[]? fill=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_copy_bench, CompositeExplicitAutograd, library) { library.impl("nothing", &nothing); }
