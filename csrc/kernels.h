// The kernels, for the code that launches them.
#pragma once

#include "back_end.h"
#include "tuning.h"

namespace fused_copy {

// One for each size of its parameters and each kind of launch that copies tensors. Of launches with other sources those
// of plain tasks have two sizes, as a graph's launch takes all parameters of a node that was set; all others have one.
// Where they are launched they are passed as much of their parameters as is used.
constexpr int kTensorKinds = static_cast<int>(LaunchKind::Sources);
constexpr int kTensorKernels = kLaunchSizes * kTensorKinds;
constexpr int kPlainSourceSizes = 2;
constexpr int kKernels = kTensorKernels + kPlainSourceSizes + 1;

constexpr int kernel_words(int number) {
  if (number < kTensorKernels) return kLaunchWords[number / kTensorKinds];
  return number == kTensorKernels ? kLaunchWords[kLaunchSizes - kPlainSourceSizes] : kMaxLaunchWords;
}

constexpr LaunchKind kernel_kind(int number) {
  if (number < kTensorKernels) return static_cast<LaunchKind>(number % kTensorKinds);
  return number + 1 < kKernels ? LaunchKind::PlainSources : LaunchKind::AllSources;
}

// The smallest that can do this launch.
inline int kernel_number(const PlannedLaunch& launch) {
  const LaunchKind kind = launch.header().kind;
  if (has_sources(kind)) {
    return is_plain(kind) ? kTensorKernels + (launch.used_words > kernel_words(kTensorKernels)) : kKernels - 1;
  }
  int size = launch.header().levels > 1 ? 1 : 0;
  while (launch.used_words > kLaunchWords[size]) ++size;
  return size * kTensorKinds + static_cast<int>(kind);
}

// What the CUDA runtime knows a kernel by.
const void* kernel_symbol(int number);

}  // namespace fused_copy
