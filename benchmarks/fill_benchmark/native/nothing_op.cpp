// Ops of fused_copy.replay's schema, with the same kind of boxed function: torch.ops.fused_copy_bench.nothing does no
// more than take its arguments off the dispatcher's stack, and fused_copy_bench.reading asks on the way for what a copy
// must know of each tensor.
#define TORCH_TARGET_VERSION 0x020a000000000000

#include <torch/csrc/stable/library.h>

namespace {

using torch::stable::detail::to;

// As fused_copy reads tensors: by torch's C shim.
void read(AtenTensorHandle tensor) {
  int32_t layout, dtype, device_type, device_index;
  int64_t rank, offset, storage_bytes;
  int64_t *sizes, *strides;
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &rank));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor, &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor, &storage_bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
}

template <bool kReads>
void release_tensors(StableIValue argument) {
  const auto list = to<StableListHandle>(argument);
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  for (size_t i = 0; i < size; ++i) {
    StableIValue item;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
    if (kReads) read(to<AtenTensorHandle>(item));
    TORCH_ERROR_CODE_CHECK(aoti_torch_delete_tensor_object(to<AtenTensorHandle>(item)));
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
}

// The benchmark passes no fills.
template <bool kReads>
void take(StableIValue* stack, uint64_t, uint64_t) {
  release_tensors<kReads>(stack[0]);
  release_tensors<kReads>(stack[1]);
}

}  // namespace

STABLE_TORCH_LIBRARY(fused_copy_bench, library) {
  library.def("nothing(Tensor(a!)[] dst, Tensor[] src, float?[]? fill=None) -> ()");
  library.def("reading(Tensor(a!)[] dst, Tensor[] src, float?[]? fill=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_copy_bench, CompositeExplicitAutograd, library) {
  library.impl("nothing", &take<false>);
  library.impl("reading", &take<true>);
}
