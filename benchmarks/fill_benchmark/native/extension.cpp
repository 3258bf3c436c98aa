// Peers as a C++ extension of torch: the runtime's own copies, and the plain kernel of six_tensors.h.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "six_tensors.h"

namespace {

using Tensors = std::vector<at::Tensor>;

void check(cudaError_t error) { TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error)); }

size_t pitch_of(const at::Tensor& tensor) { return tensor.stride(0) * tensor.element_size(); }

// Whole buffers come as destinations; only the last dimension has to be dense.
void copy_each(const Tensors& destinations, const Tensors& sources) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  for (size_t i = 0; i < sources.size(); ++i) {
    const at::Tensor& destination = destinations[i];
    const at::Tensor& source = sources[i];
    void* dst = destination.mutable_data_ptr();
    const void* src = source.const_data_ptr();
    if (source.dim() == 2) {
      check(cudaMemcpy2DAsync(dst, pitch_of(destination), src, pitch_of(source), source.size(1) * source.element_size(),
                              source.size(0), cudaMemcpyDefault, stream));
    } else {
      check(cudaMemcpyAsync(dst, src, source.nbytes(), cudaMemcpyDefault, stream));
    }
  }
}

// The batch has no pitched copies: every row is one of its own.
void copy_batch(const Tensors& destinations, const Tensors& sources) {
#if CUDART_VERSION >= 12080
  std::vector<void*> dst, src;
  std::vector<size_t> bytes;
  for (size_t i = 0; i < sources.size(); ++i) {
    const at::Tensor& source = sources[i];
    const bool has_rows = source.dim() == 2;
    const int64_t rows = has_rows ? source.size(0) : 1;
    const size_t dst_pitch = has_rows ? pitch_of(destinations[i]) : 0;
    const size_t src_pitch = has_rows ? pitch_of(source) : 0;
    auto* dst_row = static_cast<char*>(destinations[i].mutable_data_ptr());
    auto* src_row = static_cast<char*>(const_cast<void*>(source.const_data_ptr()));
    for (int64_t row = 0; row < rows; ++row) {
      dst.push_back(dst_row + row * dst_pitch);
      src.push_back(src_row + row * src_pitch);
      bytes.push_back(source.nbytes() / rows);
    }
  }
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  size_t first = 0;
#if CUDART_VERSION >= 13000
  check(cudaMemcpyBatchAsync(dst.data(), src.data(), bytes.data(), bytes.size(), &attributes, &first, 1,
                             c10::cuda::getCurrentCUDAStream()));
#else
  size_t failed;
  check(cudaMemcpyBatchAsync(dst.data(), src.data(), bytes.data(), bytes.size(), &attributes, &first, 1, &failed,
                             c10::cuda::getCurrentCUDAStream()));
#endif
#else
  TORCH_CHECK(false, "cudaMemcpyBatchAsync came with CUDA 12.8");
#endif
}

Pair pair_of(const at::Tensor& destination, const at::Tensor& source) {
  const bool has_rows = source.dim() == 2;
  return {
      .src = source.const_data_ptr<int32_t>(),
      .dst = destination.mutable_data_ptr<int32_t>(),
      .rows = has_rows ? static_cast<unsigned>(source.size(0)) : 1,
      .columns = static_cast<unsigned>(source.size(-1)),
      .src_stride = has_rows ? source.stride(0) : 0,
      .dst_stride = has_rows ? destination.stride(0) : 0,
  };
}

SixTensors six_tensors(const Tensors& destinations, const Tensors& sources) {
  TORCH_CHECK(destinations.size() == 6 && sources.size() == 6, "expected six tensors");
  SixTensors six;
  for (size_t i = 0; i < 6; ++i) six.pairs[i] = pair_of(destinations[i], sources[i]);
  return six;
}

void copy_six(const Tensors& destinations, const Tensors& sources, const std::string& threading, int block_size) {
  const SixTensors six = six_tensors(destinations, sources);
  const Threading way = threading == "element" ? Threading::Element
                        : threading == "warp"  ? Threading::Warp
                                               : Threading::Block;
  check(launch_copy_six(six, way, block_size, c10::cuda::getCurrentCUDAStream()));
}

void copy_six_hard_wired(const Tensors& destinations, const Tensors& sources) {
  const SixTensors six = six_tensors(destinations, sources);
  for (const Pair& pair : six.pairs) {
    const auto addresses = reinterpret_cast<uintptr_t>(pair.src) | reinterpret_cast<uintptr_t>(pair.dst);
    TORCH_CHECK(addresses % 16 == 0 && (pair.src_stride | pair.dst_stride) % 4 == 0, "expected 16-byte alignment");
  }
  check(launch_hard_wired(six, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("copy_each", &copy_each);
  module.def("copy_batch", &copy_batch);
  module.def("copy_six", &copy_six);
  module.def("copy_six_hard_wired", &copy_six_hard_wired);
}
