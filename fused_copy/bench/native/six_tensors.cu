#include "six_tensors.h"

namespace {

constexpr unsigned kColumnsPerThread = 8;

// A team of threads copies a piece of one row: each thread one element, or eight that lie a team apart.
template <Threading kThreading>
__global__ void copy_six(const __grid_constant__ SixTensors six) {
  const unsigned team = kThreading == Threading::Element ? 1 : kThreading == Threading::Warp ? 32 : blockDim.x;
  constexpr unsigned kColumns = kThreading == Threading::Element ? 1 : kColumnsPerThread;
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  unsigned piece = thread / team;
  for (const Pair& pair : six.pairs) {
    if (piece >= pair.pieces) {
      piece -= pair.pieces;
      continue;
    }
    const unsigned row = piece / pair.pieces_per_row;
    const unsigned first = piece % pair.pieces_per_row * team * kColumns + thread % team;
    const int32_t* __restrict__ src = pair.src + row * pair.src_stride;
    int32_t* __restrict__ dst = pair.dst + row * pair.dst_stride;
#pragma unroll
    for (unsigned i = 0; i < kColumns; ++i) {
      const unsigned column = first + i * team;
      if (column < pair.columns) dst[column] = src[column];
    }
    return;
  }
}

}  // namespace

cudaError_t launch_copy_six(SixTensors six, Threading threading, int block_size, cudaStream_t stream) {
  const auto size = static_cast<unsigned>(block_size);
  const unsigned team = threading == Threading::Element ? 1 : threading == Threading::Warp ? 32 : size;
  const unsigned piece_columns = threading == Threading::Element ? 1 : team * kColumnsPerThread;
  unsigned pieces = 0;
  for (Pair& pair : six.pairs) {
    pair.pieces_per_row = (pair.columns + piece_columns - 1) / piece_columns;
    pair.pieces = pair.rows * pair.pieces_per_row;
    pieces += pair.pieces;
  }
  const unsigned blocks = (pieces + size / team - 1) / (size / team);
  switch (threading) {
    case Threading::Element: copy_six<Threading::Element><<<blocks, size, 0, stream>>>(six); break;
    case Threading::Warp: copy_six<Threading::Warp><<<blocks, size, 0, stream>>>(six); break;
    case Threading::Block: copy_six<Threading::Block><<<blocks, size, 0, stream>>>(six); break;
  }
  return cudaGetLastError();
}
