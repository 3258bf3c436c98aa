// The plain kernel as tvm-ffi functions of twelve tensors, destinations first, one for each threading.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include "six_tensors.h"

namespace {

using tvm::ffi::TensorView;

constexpr int kBlockSize = 256;

Pair pair_of(const TensorView& destination, const TensorView& source) {
  const DLDataType int32{kDLInt, 32, 1};
  TVM_FFI_ICHECK(source.dtype() == int32 && destination.dtype() == int32) << "expected int32";
  TVM_FFI_ICHECK(source.ndim() == destination.ndim()) << "expected as many dimensions as the destination has";
  for (int32_t d = 0; d < source.ndim(); ++d) {
    TVM_FFI_ICHECK(source.size(d) <= destination.size(d)) << "the source is larger than its destination";
  }
  const bool has_rows = source.ndim() == 2;
  Pair pair{};
  pair.src = static_cast<const int32_t*>(source.data_ptr());
  pair.dst = static_cast<int32_t*>(destination.data_ptr());
  pair.rows = has_rows ? static_cast<unsigned>(source.size(0)) : 1;
  pair.columns = static_cast<unsigned>(source.size(has_rows ? 1 : 0));
  pair.src_stride = has_rows ? source.stride(0) : 0;
  pair.dst_stride = has_rows ? destination.stride(0) : 0;
  return pair;
}

template <Threading kThreading>
void copy_six(TensorView to_input_ids, TensorView to_out_loc, TensorView to_cu_seqlens_k, TensorView to_positions,
              TensorView to_seq_lens, TensorView to_page_table, TensorView input_ids, TensorView out_loc,
              TensorView cu_seqlens_k, TensorView positions, TensorView seq_lens, TensorView page_table) {
  const SixTensors six{{pair_of(to_input_ids, input_ids), pair_of(to_out_loc, out_loc),
                        pair_of(to_cu_seqlens_k, cu_seqlens_k), pair_of(to_positions, positions),
                        pair_of(to_seq_lens, seq_lens), pair_of(to_page_table, page_table)}};
  const DLDevice device = page_table.device();
  const auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  const cudaError_t error = launch_copy_six(six, kThreading, kBlockSize, stream);
  TVM_FFI_ICHECK(error == cudaSuccess) << cudaGetErrorString(error);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy_six_by_element, copy_six<Threading::Element>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy_six_by_warp, copy_six<Threading::Warp>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy_six_by_block, copy_six<Threading::Block>);
