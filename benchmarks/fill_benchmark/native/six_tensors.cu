#include "six_tensors.h"

namespace {

constexpr unsigned kElementsPerThread = 8;

// Where a thread reads and writes first, and how many columns of the row are left from there.
struct Place {
  const int32_t* src;
  int32_t* dst;
  unsigned columns;
};

__device__ Place find(const SixTensors& six, unsigned piece, unsigned piece_columns, unsigned lane) {
  for (const Pair& pair : six.pairs) {
    if (piece >= pair.pieces) {
      piece -= pair.pieces;
      continue;
    }
    const unsigned row = piece / pair.pieces_per_row;
    const unsigned column = piece % pair.pieces_per_row * piece_columns + lane;
    const unsigned columns = column < pair.columns ? pair.columns - column : 0;
    return {pair.src + row * pair.src_stride + column, pair.dst + row * pair.dst_stride + column, columns};
  }
  return {};
}

// A thread has as many elements whatever the threading: of its team's piece of a row those a team apart, or some a grid
// apart, each of which is a piece of its own. All are loaded before the first is stored.
template <Threading kThreading>
__global__ void copy_six(const __grid_constant__ SixTensors six) {
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  int32_t values[kElementsPerThread];
  if constexpr (kThreading == Threading::Element) {
    Place places[kElementsPerThread];
#pragma unroll
    for (unsigned i = 0; i < kElementsPerThread; ++i) {
      places[i] = find(six, thread + i * gridDim.x * blockDim.x, 1, 0);
      if (places[i].columns > 0) values[i] = *places[i].src;
    }
#pragma unroll
    for (unsigned i = 0; i < kElementsPerThread; ++i) {
      if (places[i].columns > 0) *places[i].dst = values[i];
    }
  } else {
    const unsigned team = kThreading == Threading::Warp ? 32 : blockDim.x;
    const Place place = find(six, thread / team, team * kElementsPerThread, thread % team);
#pragma unroll
    for (unsigned i = 0; i < kElementsPerThread; ++i) {
      if (i * team < place.columns) values[i] = place.src[i * team];
    }
#pragma unroll
    for (unsigned i = 0; i < kElementsPerThread; ++i) {
      if (i * team < place.columns) place.dst[i * team] = values[i];
    }
  }
}

constexpr unsigned kVectors = 5;
constexpr unsigned kWarps = 4;
constexpr unsigned kLaneUnits = 4;
constexpr unsigned kPieceColumns = kLaneUnits * 32 * 4;

__device__ void copy_run(const int32_t* src, int32_t* dst, unsigned columns) {
  const unsigned lane = threadIdx.x;
  int4 units[kLaneUnits];
#pragma unroll
  for (unsigned i = 0; i < kLaneUnits; ++i) {
    const unsigned column = 4 * (32 * i + lane);
    if (column + 4 <= columns) units[i] = *reinterpret_cast<const int4*>(src + column);
  }
  const unsigned last = columns / 4 * 4 + lane;
  int32_t element;
  if (last < columns) element = src[last];
#pragma unroll
  for (unsigned i = 0; i < kLaneUnits; ++i) {
    const unsigned column = 4 * (32 * i + lane);
    if (column + 4 <= columns) *reinterpret_cast<int4*>(dst + column) = units[i];
  }
  if (last < columns) dst[last] = element;
}

__global__ void copy_six_hard_wired(const __grid_constant__ SixTensors six) {
  const unsigned row = blockIdx.y * kWarps + threadIdx.y;
  const unsigned first = blockIdx.x * kPieceColumns;
  if (blockIdx.x + 1 < gridDim.x) {
    const Pair& matrix = six.pairs[kVectors];
    if (row >= matrix.rows) return;
    const unsigned columns = min(matrix.columns - first, kPieceColumns);
    copy_run(matrix.src + row * matrix.src_stride + first, matrix.dst + row * matrix.dst_stride + first, columns);
  } else if (row < kVectors) {
    const Pair& vector = six.pairs[row];
    for (unsigned column = 0; column < vector.columns; column += kPieceColumns) {
      copy_run(vector.src + column, vector.dst + column, min(vector.columns - column, kPieceColumns));
    }
  }
}

}  // namespace

cudaError_t launch_hard_wired(const SixTensors& six, cudaStream_t stream) {
  const Pair& matrix = six.pairs[kVectors];
  const unsigned pieces = (matrix.columns + kPieceColumns - 1) / kPieceColumns;
  const unsigned rows = matrix.rows > kVectors ? matrix.rows : kVectors;
  copy_six_hard_wired<<<dim3(pieces + 1, (rows + kWarps - 1) / kWarps), dim3(32, kWarps), 0, stream>>>(six);
  return cudaGetLastError();
}

cudaError_t launch_copy_six(SixTensors six, Threading threading, int block_size, cudaStream_t stream) {
  const auto size = static_cast<unsigned>(block_size);
  const bool by_element = threading == Threading::Element;
  const unsigned team = threading == Threading::Warp ? 32 : size;
  const unsigned piece_columns = by_element ? 1 : team * kElementsPerThread;
  unsigned pieces = 0;
  for (Pair& pair : six.pairs) {
    pair.pieces_per_row = (pair.columns + piece_columns - 1) / piece_columns;
    pair.pieces = pair.rows * pair.pieces_per_row;
    pieces += pair.pieces;
  }
  const unsigned pieces_per_block = by_element ? size * kElementsPerThread : size / team;
  const unsigned blocks = (pieces + pieces_per_block - 1) / pieces_per_block;
  switch (threading) {
    case Threading::Element: copy_six<Threading::Element><<<blocks, size, 0, stream>>>(six); break;
    case Threading::Warp: copy_six<Threading::Warp><<<blocks, size, 0, stream>>>(six); break;
    case Threading::Block: copy_six<Threading::Block><<<blocks, size, 0, stream>>>(six); break;
  }
  return cudaGetLastError();
}
