// Loads and stores of the kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "tuning.h"

namespace fused_copy {
namespace {

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class To>
__device__ inline To from_float(float value) {
  if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

}  // namespace
}  // namespace fused_copy

#include "convert.h"

namespace fused_copy {
namespace {

// A unit as a type that one instruction loads and stores. Of a struct of bytes the compiler would make many registers.
template <int kBytes>
using Unit = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2,
                       std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>;

template <class T, int kElements>
struct alignas(sizeof(T) * kElements < 16 ? sizeof(T) * kElements : 16) Elements {
  T values[kElements];
};

// Tensors lie in global memory, pinned ones too. Saying so saves the compiler generic loads and stores.
template <class T>
__device__ inline T* in_global(uint64_t address) {
  return static_cast<T*>(__cvta_global_to_generic(address));
}

// Sources may also lie in the launch itself, which is no global memory.
template <class T, bool kAnywhere>
__device__ inline const T* source_at(uint64_t address) {
  if constexpr (kAnywhere) return reinterpret_cast<const T*>(address);
  else return in_global<const T>(address);
}

// Takes `count` units, `src_step` and `dst_step` bytes apart, to `store(address, unit)`. The loads depend on predicates
// alone, not on branches, and so are in flight together.
template <int kLargerBytes, class Loaded, bool kAnywhere = false, class Store>
__device__ inline void move_units(uint64_t src, uint64_t dst, int64_t src_step, int64_t dst_step, uint32_t count,
                                  Store store) {
  constexpr int kMaxUnits = max_lane_units(kLargerBytes);
  // Keeps nvcc from rematerializing the address arithmetic for every unit.
  asm volatile("" : "+l"(src), "+l"(dst));
  Loaded units[kMaxUnits];
#pragma unroll
  for (int i = 0; i < kMaxUnits; ++i) {
    if (i < count) units[i] = *source_at<Loaded, kAnywhere>(src + i * src_step);
  }
#pragma unroll
  for (int i = 0; i < kMaxUnits; ++i) {
    if (i < count) store(dst + i * dst_step, units[i]);
  }
}

// Of a kernel that has everything one by one, in little code.
template <int kBytes, bool kAnywhere, bool kOneByOne = false>
__device__ inline void copy_units(uint64_t src, uint64_t dst, int64_t src_step, int64_t dst_step, uint32_t count) {
  using Bytes = Unit<kBytes>;
  if constexpr (kOneByOne) {
#pragma unroll 1
    for (uint32_t i = 0; i < count; ++i) {
      *in_global<Bytes>(dst + i * dst_step) = *source_at<Bytes, kAnywhere>(src + i * src_step);
    }
  } else {
    move_units<kBytes, Bytes, kAnywhere>(src, dst, src_step, dst_step, count,
                                         [](uint64_t address, Bytes unit) { *in_global<Bytes>(address) = unit; });
  }
}

// Byte by byte, from anywhere.
__device__ __noinline__ void copy_some_bytes(uint64_t src, uint64_t dst, int64_t bytes) {
#pragma unroll 1
  for (int64_t i = 0; i < bytes; ++i) *in_global<uint8_t>(dst + i) = *reinterpret_cast<const uint8_t*>(src + i);
}

// Fewer bytes than kBytes, all loaded before the first is stored.
template <int kBytes>
__device__ inline void copy_bytes(uint64_t src, uint64_t dst, int64_t count) {
  uint8_t bytes[kBytes];
#pragma unroll
  for (int i = 0; i < kBytes - 1; ++i) {
    if (i < count) bytes[i] = *in_global<const uint8_t>(src + i);
  }
#pragma unroll
  for (int i = 0; i < kBytes - 1; ++i) {
    if (i < count) *in_global<uint8_t>(dst + i) = bytes[i];
  }
}

}  // namespace
}  // namespace fused_copy
