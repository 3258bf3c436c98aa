// The kernels, for the code that launches them.
#pragma once

#include "back_end.h"
#include "tuning.h"

namespace fused_copy {

// One for each size of its parameters and each kind of launch that copies tensors; and those of launches with other
// sources, which cast directly or can do everything, of the larger sizes: with less than 4 KB a launch is not cheaper.
constexpr int kTensorKinds = static_cast<int>(LaunchKind::Sources);
constexpr int kTensorKernels = kLaunchSizes * kTensorKinds;
constexpr int kSourceKinds = 2;
constexpr int kSmallestSourceSize = 2;
constexpr int kKernels = kTensorKernels + (kLaunchSizes - kSmallestSourceSize) * kSourceKinds;

constexpr int kernel_words(int number) {
  return kLaunchWords[number < kTensorKernels ? number / kTensorKinds
                                              : kSmallestSourceSize + (number - kTensorKernels) / kSourceKinds];
}

constexpr LaunchKind kernel_kind(int number) {
  if (number < kTensorKernels) return static_cast<LaunchKind>(number % kTensorKinds);
  const bool general = (number - kTensorKernels) % kSourceKinds == 1;
  return general ? LaunchKind::AllSources : LaunchKind::PlainSources;
}

// The smallest that can do this launch.
inline int kernel_number(const PlannedLaunch& launch) {
  const LaunchKind kind = launch.header().kind;
  int size = has_sources(kind) ? kSmallestSourceSize : launch.header().levels > 1 ? 1 : 0;
  while (launch.used_words > kLaunchWords[size]) ++size;
  if (has_sources(kind)) return kTensorKernels + (size - kSmallestSourceSize) * kSourceKinds + !is_plain(kind);
  return size * kTensorKinds + static_cast<int>(kind);
}

// What the CUDA runtime knows a kernel by.
const void* kernel_symbol(int number);

}  // namespace fused_copy
