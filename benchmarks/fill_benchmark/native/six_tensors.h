// A decode step's six tensors in one plain kernel, with three ways to divide the work among threads, of which each has
// eight elements in all of them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

enum class Threading { Element, Warp, Block };

// Rows and columns of int32; strides in elements from row to row.
struct Pair {
  const int32_t* src;
  int32_t* dst;
  unsigned rows;
  unsigned columns;
  int64_t src_stride;
  int64_t dst_stride;
  unsigned pieces_per_row;  // launch_copy_six sets these two
  unsigned pieces;
};

struct SixTensors {
  Pair pairs[6];
};

cudaError_t launch_copy_six(SixTensors six, Threading threading, int block_size, cudaStream_t stream);

// A kernel that could not do with less: it knows that there are five vectors and then one matrix, all aligned to 16
// bytes, so that it looks nothing up and asks nothing. A block's warps take 2 KB of a row each.
cudaError_t launch_hard_wired(const SixTensors& six, cudaStream_t stream);
