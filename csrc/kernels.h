// The kernels, for the code that launches them.
#pragma once

#include "back_end.h"
#include "tuning.h"

namespace fused_copy {

// One for each size of its parameters and each kind of launch.
constexpr int kKernels = kLaunchSizes * kLaunchKinds;

// The smallest that can do this launch.
inline int kernel_number(const PlannedLaunch& launch) {
  int size = launch.header().levels > 1 ? 1 : 0;
  while (launch.used_words > kLaunchWords[size]) ++size;
  return size * kLaunchKinds + static_cast<int>(launch.header().kind);
}

// What the CUDA runtime knows a kernel by.
const void* kernel_symbol(int number);

}  // namespace fused_copy
