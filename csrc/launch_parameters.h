// What the CUDA driver is given of a launch.
#pragma once

#include <cuda.h>

#include <atomic>

#include "launch_layout.h"

namespace fused_copy {

// A launch's parameters as the driver takes them: those that are used alone, of kernels that have room for all, as it
// takes a tenth of a microsecond for each kilobyte.
class Parameters {
 public:
  explicit Parameters(const PlannedLaunch& launch)
      : argument_(const_cast<std::byte*>(launch.params.bytes)),
        bytes_(size_t(launch.used_words) * kWordBytes),
        sized_(has_sources(launch.header().kind) && !refused_.load(std::memory_order_relaxed)) {}
  Parameters(const Parameters&) = delete;
  Parameters& operator=(const Parameters&) = delete;

  // Calls `use` with what cuLaunchKernel names kernelParams and extra. That the buffer may be smaller than the kernel's
  // parameters is what drivers do, not what their documentation says: one that refuses it is given all of them.
  template <class Use>
  CUresult pass(Use use) {
    CUresult result = sized_ ? use(nullptr, extra_) : use(&argument_, nullptr);
    if (sized_ && result == CUDA_ERROR_INVALID_VALUE) {
      result = use(&argument_, nullptr);
      if (result == CUDA_SUCCESS) refused_.store(true, std::memory_order_relaxed);
    }
    return result;
  }

 private:
  static inline std::atomic<bool> refused_ = false;
  void* argument_;
  size_t bytes_;
  bool sized_;
  void* extra_[5] = {CU_LAUNCH_PARAM_BUFFER_POINTER, argument_, CU_LAUNCH_PARAM_BUFFER_SIZE, &bytes_,
                     CU_LAUNCH_PARAM_END};
};

}  // namespace fused_copy
