// The kernels, for the code that launches them.
#pragma once

#include "back_end.h"
#include "tuning.h"

namespace fused_copy {

// One for each size of its parameters and each kind of launch that copies tensors. Of launches with other sources one
// for plain tasks and one that has all, which are passed as much of their parameters as is used.
constexpr int kTensorKinds = static_cast<int>(LaunchKind::Sources);
constexpr int kTensorKernels = kLaunchSizes * kTensorKinds;
constexpr int kKernels = kTensorKernels + 2;

constexpr int kernel_words(int number) {
  return number < kTensorKernels ? kLaunchWords[number / kTensorKinds] : kMaxLaunchWords;
}

constexpr LaunchKind kernel_kind(int number) {
  if (number < kTensorKernels) return static_cast<LaunchKind>(number % kTensorKinds);
  return number == kTensorKernels ? LaunchKind::PlainSources : LaunchKind::AllSources;
}

// The smallest that can do this launch.
inline int kernel_number(const PlannedLaunch& launch) {
  const LaunchKind kind = launch.header().kind;
  if (has_sources(kind)) return kTensorKernels + !is_plain(kind);
  int size = launch.header().levels > 1 ? 1 : 0;
  while (launch.used_words > kLaunchWords[size]) ++size;
  return size * kTensorKinds + static_cast<int>(kind);
}

// What the CUDA runtime knows a kernel by.
const void* kernel_symbol(int number);

}  // namespace fused_copy
