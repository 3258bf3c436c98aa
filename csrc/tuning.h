// What was measured and may be chosen anew, for another GPU say. In quotes: the row of "What was tried" in
// benchmarks/NOTES.md, which has the numbers and names their files.
#pragma once

#include "launch_layout.h"

namespace fused_copy {

// A warp takes as little as two accesses of its lanes while that spreads the work over the GPU, and as much as four
// once there is plenty, if the accesses are 16 bytes wide: "tiles of at least 1 KB", "tiles of at most four 16-byte
// units", "up to 256 or 1024 tiles before they grow".
constexpr int kMinTileBytesLog2 = 10;
constexpr int kMaxTileBytesLog2 = 11;
constexpr uint64_t kManyTiles = 512;
// On the CPU a tile is a memcpy. Not measured.
constexpr int kCpuTileBytesLog2 = 16;

// How many units of this size, the larger side's in a cast, a lane takes of a tile at most: all are loaded before the
// first is stored. "eight 16-byte loads in flight, again".
FUSED_COPY_HOST_DEVICE constexpr int max_lane_units(int unit_bytes) { return unit_bytes >= 8 ? 4 : 8; }

// Of shorter rows a warp takes several at once, which is not plain: "rows of up to 32 units by several to a tile".
constexpr uint64_t kMinPlainColumns = kWarpLanes / 2 + 1;

// Shorter rows gain less from wide accesses than the launch loses by no longer being plain.
constexpr int64_t kMinRaggedRowBytes = 4096;

// Lengths that a lane loads at a time, of those that one warp sums up; half as many where sums have 64 bits: "sums of
// up to 256 lengths step by step".
constexpr int kLaneLengths = 8;
// Of more lengths than kManyLengths explain tells what their sums take, in ns for each on an H200: sums of 32 bits, of
// 64, and any in a launch that is not plain. "sums of many lengths".
constexpr int64_t kManyLengths = 1024;
constexpr double kLengthNs[] = {2.4, 3.8, 20};
// So many warps share the rows of a table at most where lengths cut these: each goes on along its row, so that what
// lies beyond a row's length costs no warps. Not measured.
constexpr uint64_t kCutRowWarps = 16384;
// Items of a row that a lane has in flight where they become others, and what a load reads at least of those that lie
// apart: "items of pages by tiles that count the sectors".
constexpr int kLaneItems = 4;
constexpr int kSectorBytesLog2 = 5;
constexpr int kMaxItemTileBytesLog2 = 12;

constexpr int kBlockThreads = 128;  // "blocks of 256 and of 512"
constexpr int kBlockWarps = kBlockThreads / kWarpLanes;

// Casts without code of their own keep so many units of a lane at once.
constexpr int kCastBatch = 2;

// A launch costs more with more parameters, and so does a node that is set: each goes into the smallest kernel that
// holds it: "kernels of 512 B, 4 KB and 32 KB of parameters". The first takes launches of one level of first tiles
// alone.
constexpr int kLaunchWords[] = {52, 128, 512, kMaxLaunchWords};
constexpr int kLaunchSizes = sizeof(kLaunchWords) / sizeof(int);

// A graph's launch takes one and a half microseconds more where the grid of a node has changed, so a larger grid than
// needed stays unless it is far too large: blocks without a tile end at once. "a node keeps its grid".
constexpr uint32_t kFewBlocks = 256;
constexpr uint32_t kManyTimes = 4;

}  // namespace fused_copy
