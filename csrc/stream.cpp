#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>

#include "back_end.h"

namespace fused_copy {

void* current_stream(int device_index) {
  // Looked up in the library that torch has loaded, not linked: the same binary must load with a torch that has no
  // CUDA.
  static const auto get_current_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<AOTITorchError (*)(int32_t, void**)>(
                            dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"))
                      : nullptr;
  }();
  void* stream = nullptr;
  if (get_current_stream == nullptr || get_current_stream(device_index, &stream) != 0) {
    throw std::runtime_error("fused_copy: torch gives no current CUDA stream for device " +
                             std::to_string(device_index) + ": install a CUDA build of torch");
  }
  return stream;
}

}  // namespace fused_copy
