// Any metadata gives launches that write exactly what the contract says, or InvalidInput: never a crash.
//
// An input describes one call. Half of them place small tensors in two pretended arenas, where every byte that the
// launches read and write is compared with a reference that goes element by element, and where an error is demanded or
// forbidden by brute force. Nearly all others take any 64-bit number for a size, a stride, an address: there the tiles
// that are looked at must lie within their tensors. The rest are views of one buffer of many rows, where brute force
// tells which ones share a byte. No address is ever dereferenced.
//
// With libFuzzer it is a fuzz target; with FUSED_COPY_FUZZ_MAIN it has a main of its own, which tries random inputs.

#include <algorithm>
#include <array>
#include <bit>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "lane_walk.h"
#include "planner.h"
#include "tuning.h"

using namespace fused_copy;

namespace {

// --- the input -------------------------------------------------------------------------------------------------------

// An input that has ended goes on with zeros, each of which makes the plainest choice.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  uint64_t word() {
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | byte();
    return value;
  }
  bool rarely() { return byte() >= 248; }

 private:
  const uint8_t* data_;
  size_t left_;
};

struct Tensor {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  TensorView view;  // points into the two above, so a Tensor stays where it is
};

struct Case {
  std::vector<Tensor> dst;
  std::vector<Tensor> src;
  std::vector<Fill> fills;
  bool has_fills = false;
};

void print(const char* role, size_t i, const Tensor& tensor) {
  const TensorView& view = tensor.view;
  std::fprintf(
      stderr,
      "  %s %zu: %s at %#llx, %lld bytes there, device %d:%d, pinned %d strided %d lazy %d grad %d inference %d, ",
      role, i, info(view.dtype).name, static_cast<unsigned long long>(view.address),
      static_cast<long long>(view.storage_bytes), static_cast<int>(view.device.type), view.device.index, view.pinned,
      view.strided, view.lazy, view.autograd.requires_grad, view.autograd.inference);
  for (size_t d = 0; d < tensor.sizes.size(); ++d) {
    std::fprintf(stderr, " %lld:%lld", static_cast<long long>(tensor.sizes[d]),
                 static_cast<long long>(tensor.strides[d]));
  }
  std::fputc('\n', stderr);
}

[[noreturn]] void fail(const Case& call, const std::string& text) {
  std::fprintf(stderr, "planner_fuzz: %s, for\n", text.c_str());
  for (size_t i = 0; i < call.dst.size(); ++i) print("dst", i, call.dst[i]);
  for (size_t i = 0; i < call.src.size(); ++i) print("src", i, call.src[i]);
  for (const Fill& fill : call.fills) std::fprintf(stderr, "  fill %d %g\n", static_cast<int>(fill.kind), fill.number);
  std::abort();
}

DType any_dtype(Input& in) { return static_cast<DType>(in.byte() % (static_cast<int>(DType::Unsupported) + 1)); }

constexpr std::array kDTypesBySize = {DType::Int32,      DType::Int64,     DType::UInt8,   DType::Int16,
                                      DType::Complex128, DType::Float32,   DType::Float16, DType::Bool,
                                      DType::BFloat16,   DType::Complex64, DType::Float64, DType::Int8};

void any_flags(Input& in, TensorView& view) {
  if (!in.rarely()) return;
  // Mostly one alone, so that no other one is the reason for a refusal.
  const uint8_t pick = in.byte();
  const uint8_t bits = pick < 192 ? 1 << pick % 8 : in.byte();
  view.strided = !(bits & 1);
  view.lazy = bits & 2;
  view.autograd.requires_grad = bits & 4;
  view.autograd.inference = bits & 8;
  view.pinned = bits & 16;
  if (bits & 32) view.device = {static_cast<DeviceType>(in.byte() % 4), in.byte() % 2};
  if (bits & 64) view.address = 0;
  if (bits & 128) view.storage_bytes -= 1 + in.byte();
}

Fill any_fill(Input& in) {
  constexpr std::array kNumbers = {0.0,     1.0,    -1.0,     7.0,      0.5,     -1.75,   255.0, 256.0,
                                   -128.0,  448.0,  480.0,    57344.0,  65504.0, 65536.0, 2.0,   0x1p-9,
                                   0x1p-24, 0x1p63, 0x1p-127, 0x1p-128, 0x1p128, -0.0};
  const uint8_t pick = in.byte();
  if (pick < 128) return {};
  if (pick == 255) return std::bit_cast<double>(in.word());
  if (pick == 254) return std::nan("");
  if (pick == 253) return HUGE_VAL;
  return kNumbers[pick % kNumbers.size()];
}

void finish(Tensor& tensor, uint64_t address, DType dtype, Device device) {
  tensor.view = {};
  tensor.view.address = address;
  tensor.view.sizes = tensor.sizes.data();
  tensor.view.strides = tensor.strides.data();
  tensor.view.rank = static_cast<int64_t>(tensor.sizes.size());
  tensor.view.dtype = dtype;
  tensor.view.device = device;
}

// --- numbers, decoded independently of the planner's encoding --------------------------------------------------------

double decode_float(uint64_t bits, int exponent_bits, int mantissa_bits, int bias, char special) {
  const uint64_t top = (uint64_t{1} << exponent_bits) - 1;
  const uint64_t mantissas = (uint64_t{1} << mantissa_bits) - 1;
  const uint64_t exponent = bits >> mantissa_bits & top;
  const uint64_t mantissa = bits & mantissas;
  const double sign = bits >> (exponent_bits + mantissa_bits) & 1 ? -1.0 : 1.0;
  if (special == 'i' && exponent == top) return mantissa ? std::nan("") : sign * HUGE_VAL;
  if (special == 'n' && exponent == top && mantissa == mantissas) return std::nan("");
  if (special == 'z' && sign < 0 && exponent == 0 && mantissa == 0) return std::nan("");
  if (exponent == 0) return sign * std::ldexp(static_cast<double>(mantissa), 1 - bias - mantissa_bits);
  return sign *
         std::ldexp(static_cast<double>(mantissa + mantissas + 1), static_cast<int>(exponent) - bias - mantissa_bits);
}

double decode(const uint8_t* bytes, DType dtype) {
  uint64_t bits = 0;
  const int size = std::min(info(dtype).size, 8);
  std::memcpy(&bits, bytes, static_cast<size_t>(size));
  switch (dtype) {
    case DType::Bool:
    case DType::UInt8:
    case DType::UInt16:
    case DType::UInt32:
    case DType::UInt64: return static_cast<double>(bits);
    case DType::Int8: return static_cast<int8_t>(bits);
    case DType::Int16: return static_cast<int16_t>(bits);
    case DType::Int32: return static_cast<int32_t>(bits);
    case DType::Int64: return static_cast<double>(static_cast<int64_t>(bits));
    case DType::Complex32: bits &= 0xFFFF; [[fallthrough]];
    case DType::Float16: return decode_float(bits, 5, 10, 15, 'i');
    case DType::BFloat16: return decode_float(bits, 8, 7, 127, 'i');
    case DType::Complex64: bits &= 0xFFFFFFFF; [[fallthrough]];
    case DType::Float32: return decode_float(bits, 8, 23, 127, 'i');
    case DType::Complex128:
    case DType::Float64: return std::bit_cast<double>(bits);
    case DType::Float8E4M3FN: return decode_float(bits, 4, 3, 7, 'n');
    case DType::Float8E4M3FNUZ: return decode_float(bits, 4, 3, 8, 'z');
    case DType::Float8E5M2: return decode_float(bits, 5, 2, 15, 'i');
    case DType::Float8E5M2FNUZ: return decode_float(bits, 5, 2, 16, 'z');
    case DType::Float8E8M0FNU: return bits == 255 ? std::nan("") : std::ldexp(1.0, static_cast<int>(bits) - 127);
    default: return std::nan("");
  }
}

bool same_number(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

bool is_complex(DType dtype) {
  return dtype == DType::Complex32 || dtype == DType::Complex64 || dtype == DType::Complex128;
}

// Whether a dtype of up to 16 bits (a complex one: a part of it) holds the number, by trying all of its bit patterns.
bool found_among_all(double value, DType dtype, int bits) {
  static std::array<std::unordered_set<uint64_t>, static_cast<size_t>(DType::Unsupported)> numbers;
  auto& set = numbers[static_cast<size_t>(dtype)];
  if (set.empty()) {
    for (uint64_t code = 0; code < uint64_t{1} << bits; ++code) {
      uint8_t bytes[16] = {};
      std::memcpy(bytes, &code, 8);
      const double number = decode(bytes, dtype);
      set.insert(std::bit_cast<uint64_t>(std::isnan(number) ? std::nan("") : number));
    }
  }
  return set.contains(std::bit_cast<uint64_t>(std::isnan(value) ? std::nan("") : value));
}

bool holds(DType dtype, double value) {
  const auto whole = [&](double low, double high) {
    return value >= low && value < high && value == std::floor(value);
  };
  switch (dtype) {
    case DType::Bool: return value == 0 || value == 1;
    case DType::UInt8: return whole(0, 0x1p8);
    case DType::UInt16: return whole(0, 0x1p16);
    case DType::UInt32: return whole(0, 0x1p32);
    case DType::UInt64: return whole(0, 0x1p64);
    case DType::Int8: return whole(-0x1p7, 0x1p7);
    case DType::Int16: return whole(-0x1p15, 0x1p15);
    case DType::Int32: return whole(-0x1p31, 0x1p31);
    case DType::Int64: return whole(-0x1p63, 0x1p63);
    case DType::Float32:
    case DType::Complex64:
      return !std::isfinite(value) ||
             (std::fabs(value) <= FLT_MAX && static_cast<double>(static_cast<float>(value)) == value);
    case DType::Float64:
    case DType::Complex128: return true;
    case DType::Float16:
    case DType::Complex32:
    case DType::BFloat16: return found_among_all(value, dtype, 16);
    case DType::Float8E4M3FN:
    case DType::Float8E4M3FNUZ:
    case DType::Float8E5M2:
    case DType::Float8E5M2FNUZ:
    case DType::Float8E8M0FNU: return found_among_all(value, dtype, 8);
    default: return false;
  }
}

// --- what one pair alone can get wrong, without the planner's arithmetic ---------------------------------------------

bool has_no_elements(const TensorView& view) {
  return std::find(view.sizes, view.sizes + view.rank, 0) != view.sizes + view.rank;
}

// From the first byte to the last, with a number that is beyond all memory for all larger ones.
__int128 extent_of(const TensorView& view) {
  constexpr __int128 beyond = __int128{1} << 100;
  if (has_no_elements(view)) return 0;
  __int128 elements = 1;
  for (int64_t d = 0; d < view.rank; ++d)
    elements = std::min(beyond, elements + static_cast<__int128>(view.sizes[d] - 1) * view.strides[d]);
  return elements * info(view.dtype).size;
}

bool tensor_is_right(const TensorView& view) {
  if (!view.strided || view.lazy || view.autograd.requires_grad || view.autograd.inference ||
      view.dtype == DType::Unsupported || view.device.type > DeviceType::Cuda || view.rank > 64) {
    return false;
  }
  for (int64_t d = 0; d < view.rank; ++d) {
    if (view.sizes[d] < 0 || view.strides[d] < 0) return false;
  }
  const __int128 bytes = extent_of(view);
  return bytes == 0 || (view.address != 0 && bytes <= view.storage_bytes && view.address + bytes <= __int128{1} << 64);
}

Rest rest_of(const Case& call, size_t i) { return call.has_fills ? call.fills[i].kind : Rest::Keep; }

// Whether the pair is right but for what it shares with itself and others.
bool pair_is_right(const Case& call, size_t i) {
  const TensorView& dst = call.dst[i].view;
  const TensorView& src = call.src[i].view;
  if (!tensor_is_right(dst) || !tensor_is_right(src)) return false;
  if (dst.device != call.dst[0].view.device || (src.device != dst.device && !src.pinned)) return false;
  const bool castable = is_castable(dst.dtype) && is_castable(src.dtype);
  if (src.dtype != dst.dtype && !castable) return false;
  if (src.rank != dst.rank) return false;
  for (int64_t d = 0; d < src.rank; ++d) {
    if (src.sizes[d] > dst.sizes[d]) return false;
  }
  if (rest_of(call, i) == Rest::Pattern && !holds(dst.dtype, call.fills[i].number)) return false;
  const auto misaligned = [](const TensorView& view) {
    return view.address % static_cast<uint64_t>(info(view.dtype).size) != 0;
  };
  return src.dtype == dst.dtype || has_no_elements(src) || !(misaligned(src) || misaligned(dst));
}

// Whether there is one of each for every pair, and each pair alone is right.
bool pairs_are_right(const Case& call) {
  if (call.dst.size() != call.src.size() || (call.has_fills && call.fills.size() != call.dst.size())) return false;
  for (size_t i = 0; i < call.dst.size(); ++i) {
    if (!pair_is_right(call, i)) return false;
  }
  return true;
}

// --- what the launches do --------------------------------------------------------------------------------------------

// Every run of bytes that a tile writes, by the walk of each lane of the GPU: visit(task, dst, src, dst bytes, src
// bytes, place in the fill pattern). Of a cast, a run is an element.
template <class Visit>
void walk_tile(const Case& call, const std::byte* launch, uint32_t tile, Visit visit) {
  const auto [number, task_tile] = find_task(launch, tile);
  tile = task_tile;
  const Task& task = launch_task(launch, number);
  const bool strided = number < launch_header(launch).strided;
  const auto aligned = [&](uint64_t address, uint64_t unit) {
    if (address % unit != 0) fail(call, "a unit of " + std::to_string(unit) + " bytes is not aligned");
  };
  const auto [src_unit_log2, dst_unit_log2] = unit_log2(task.code);
  const int src_unit = 1 << src_unit_log2, dst_unit = 1 << dst_unit_log2;
  const bool on_gpu = call.dst[0].view.device.type == DeviceType::Cuda;
  const auto walk_lanes = [&](auto visit_unit) {
    const bool plain = is_plain(launch_header(launch).kind);
    for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
      const LaneWalk walk =
          plain ? walk_plain_lane(read_plain_task(task), strided, tile, unit_log2(task.code), lane)
                : walk_lane(locate_tile(launch, task, strided, tile, src_unit, dst_unit), task.code.lanes_log2, lane);
      // A lane of the GPU takes no more of a copy or a direct cast.
      const bool in_one_go = task.code.operation == Operation::Copy || is_direct_cast(task.code.operation);
      if (on_gpu && in_one_go && walk.count > static_cast<uint32_t>(max_lane_units(std::max(src_unit, dst_unit)))) {
        fail(call, "more units than a lane takes");
      }
      for (uint32_t i = 0; i < walk.count; ++i) {
        visit_unit(walk.src + i * walk.src_step, walk.dst + i * walk.dst_step,
                   static_cast<int>(walk.column * dst_unit % 16));
      }
    }
  };
  if (is_cast(task.code.operation)) {
    if (launch_header(launch).kind == LaunchKind::PlainCasting && !is_direct_cast(task.code.operation)) {
      fail(call, "the kernel does not know this cast");
    }
    const int elements = 1 << task.code.width_log2;
    const int src_log2 = src_unit_log2 - task.code.width_log2, dst_log2 = dst_unit_log2 - task.code.width_log2;
    walk_lanes([&](uint64_t src, uint64_t dst, int) {
      aligned(src, std::min(src_unit, 16));
      aligned(dst, std::min(dst_unit, 16));
      for (int e = 0; e < elements; ++e)
        visit(task, dst + (e << dst_log2), src + (e << src_log2), 1 << dst_log2, 1 << src_log2, 0);
    });
    return;
  }
  const int unit = dst_unit;
  const bool fill = is_fill(task.code.operation);
  if (task.code.operation == Operation::CopyRagged) {
    const Tile at = locate_tile(launch, task, strided, tile, unit, unit);
    aligned(at.dst - at.src, unit);
    const auto phase = static_cast<int64_t>(at.dst % unit);
    const int64_t offset = static_cast<int64_t>(at.first_column) * unit - phase;
    const int64_t begin = std::max<int64_t>(offset, 0);
    const int64_t end = std::min<int64_t>(offset + static_cast<int64_t>(at.columns) * unit, at.row_bytes);
    if (begin < end) visit(task, at.dst + begin, at.src + begin, end - begin, end - begin, 0);
    return;
  }
  walk_lanes([&](uint64_t src, uint64_t dst, int place) {
    aligned(dst, unit);
    if (!fill) aligned(src, unit);
    visit(task, dst, src, unit, fill ? 0 : unit, place);
  });
}

// What every launch must be, whatever it copies.
void check_form(const Case& call, const PlannedLaunch& launch) {
  const LaunchHeader& header = launch.header();
  if (launch.used_words > kMaxLaunchWords) fail(call, "a launch is beyond the parameter limit");
  if (header.tasks == 0 || header.tiles == 0) fail(call, "a launch of nothing");
  if (header.tiles >> 31) fail(call, "more tiles than divide() can number");
  const uint32_t* first_tiles = launch_first_tiles(launch.params.bytes);
  for (uint32_t i = 0; i < header.tasks; ++i) {
    if (i == 0 ? first_tiles[i] != 0 : first_tiles[i] <= first_tiles[i - 1]) fail(call, "a task without tiles");
    if (first_tiles[i] >= header.tiles) fail(call, "a task begins beyond the last tile");
    const Task& task = launch_task(launch.params.bytes, i);
    const bool strided = i < header.strided;
    const size_t read = strided ? sizeof(StridedTask) : sizeof(Task) + kWordsReadBeyond * kWordBytes;
    const std::byte* const end = launch.params.bytes + launch.used_words * kWordBytes;
    if (reinterpret_cast<const std::byte*>(&task) + read > end) fail(call, "a task beyond the launch's words");
    const auto* layout = reinterpret_cast<const StridedTask*>(&task);
    if (strided && layout->outer_extents > 0 &&
        layout->outer + layout->outer_extents * kWordsOf<Extent> > launch.used_words)
      fail(call, "extents beyond the launch's words");
  }
}

// --- small tensors, every byte ---------------------------------------------------------------------------------------

constexpr uint64_t kDstArena = 0x10000000;
constexpr uint64_t kSrcArena = 0x20000000;
constexpr uint64_t kArenaBytes = kSrcArena - kDstArena;

int64_t small_size(Input& in) {
  const uint8_t pick = in.byte();
  if (pick < 160) return 1 + pick % 8;
  if (pick < 168) return 0;
  if (pick < 232) return 9 + pick % 32;
  return 200 + 4 * in.byte();
}

// Mostly strides in which no two elements meet.
void choose_strides(Input& in, Tensor& tensor, bool source) {
  const size_t rank = tensor.sizes.size();
  tensor.strides.assign(rank, 0);
  const uint8_t style = in.byte();
  if (style >= 240) {
    for (int64_t& stride : tensor.strides) stride = in.byte() % 20;
  } else {
    const size_t turned = style >= 160 && rank > 0 ? in.byte() % rank : 0;
    int64_t step = style % 16 == 15 ? 1 + in.byte() % 3 : 1;
    for (size_t k = 0; k < rank; ++k) {
      const size_t d = (rank - 1 - k + turned) % rank;
      tensor.strides[d] = step;
      step = step * std::max<int64_t>(tensor.sizes[d], 1);
      if (style % 2 == 1) step += in.byte() % 8;
    }
    for (size_t d = 0; source && style % 8 == 6 && d < rank; ++d) tensor.strides[d] *= in.byte() % 2;
  }
  for (size_t d = 0; d < rank; ++d) {
    if (tensor.sizes[d] == 1 && in.rarely()) tensor.strides[d] = static_cast<int64_t>(in.word() >> 1);
  }
}

Case small_case(Input& in) {
  Case call;
  const uint8_t count = in.byte();
  const size_t pairs = count < 254 ? count % 6 : count == 254 ? 700 : 1300;  // a launch holds about a thousand
  const Device device{in.byte() % 2 ? DeviceType::Cuda : DeviceType::Cpu, 0};
  call.has_fills = in.byte() % 2;
  call.dst.resize(pairs);
  call.src.resize(pairs);
  uint64_t dst_end = kDstArena, src_end = kSrcArena;
  const int64_t most = in.rarely() ? 1 << 14 : 1 << 11;
  const bool columns = in.byte() >= 232;  // the destinations are blocks of one buffer's columns
  const auto place = [&](Tensor& tensor, uint64_t& end, uint64_t begin, DType dtype) {
    finish(tensor, end, dtype, device);
    auto bytes = static_cast<int64_t>(std::min<__int128>(extent_of(tensor.view), INT64_MAX));
    if (bytes > 16 * most) {
      std::fill(tensor.sizes.begin(), tensor.sizes.end(), 1);
      bytes = info(dtype).size;
    }
    const uint8_t where = in.byte();
    if (where < 244) {
      tensor.view.address = end += where % 32;
      end += static_cast<uint64_t>(bytes);
    } else {
      const uint64_t back = where < 250 ? in.byte() << 8 | in.byte() : in.byte();
      tensor.view.address = end - back % (end - begin + 1);
      end = std::max(end, tensor.view.address + static_cast<uint64_t>(bytes));
    }
    tensor.view.storage_bytes = bytes;
  };
  for (size_t i = 0; i < pairs; ++i) {
    Tensor& dst = call.dst[i];
    Tensor& src = call.src[i];
    const size_t rank = columns ? 2 : in.rarely() ? in.byte() % 9 : in.byte() % 5;
    int64_t elements = 1;
    for (size_t d = 0; d < rank; ++d) {
      int64_t size = small_size(in);
      if (elements * (size + 3) > most) size = 1;
      elements *= size + 3;
      const uint8_t more = in.byte();
      src.sizes.push_back(more >= 254 ? size + 1 + more % 2 : size);
      dst.sizes.push_back(size + (more < 254 ? more % 4 : 0));
    }
    if (in.rarely()) src.sizes.push_back(1);
    const bool like_the_last = i > 0 && in.rarely();
    if (like_the_last) src.sizes = dst.sizes = call.dst[i - 1].sizes;
    choose_strides(in, dst, false);
    choose_strides(in, src, true);
    const uint8_t types = in.byte();
    const DType dtype = like_the_last ? call.dst[i - 1].view.dtype
                        : types < 192 ? kDTypesBySize[types % kDTypesBySize.size()]
                                      : any_dtype(in);
    DType other = dtype;
    if (const uint8_t cast = in.byte(); cast >= 128) {
      other = cast < 240 ? static_cast<DType>(cast % kCastableDTypes) : any_dtype(in);
    }
    if (columns) dst.strides = {32, 1};
    place(dst, dst_end, kDstArena, dtype);
    if (columns) dst.view.address = kDstArena + in.byte() % 4 * 16 * info(dtype).size + in.byte() % 16;
    if (const uint8_t shared = in.byte(); shared >= 248) {
      place(src, dst_end, kDstArena, other);
      if (shared >= 252) {
        // The memory of a destination, this pair's or the last one's: the very same, laid out otherwise, or beside it.
        const Tensor& at = call.dst[i > 0 && in.byte() % 2 ? i - 1 : i];
        src.view.address = at.view.address + (shared == 252 ? info(other).size : 0);
        for (size_t d = 0; shared != 253 && d < std::min(at.strides.size(), src.strides.size()); ++d)
          src.strides[d] = at.strides[d];
        src.view.storage_bytes = static_cast<int64_t>(std::min<__int128>(extent_of(src.view), 1 << 20));
      }
    } else {
      place(src, src_end, kSrcArena, other);
    }
    if (in.rarely()) dst.view.device = src.view.device = {static_cast<DeviceType>(1 + in.byte() % 3), 1};
    any_flags(in, dst.view);
    any_flags(in, src.view);
    if (call.has_fills) call.fills.push_back(any_fill(in));
  }
  if (in.rarely() && pairs > 0)
    in.byte() % 2 ? call.src.pop_back() : (call.fills.empty() ? call.dst : call.src).pop_back();
  if (in.rarely() && call.has_fills) call.fills.emplace_back();
  return call;
}

template <class Visit>
void for_each_element(const TensorView& view, const int64_t* sizes, Visit visit) {
  std::vector<int64_t> index(static_cast<size_t>(view.rank), 0);
  for (int64_t d = 0; d < view.rank; ++d) {
    if (sizes[d] == 0) return;
  }
  const auto item = static_cast<uint64_t>(info(view.dtype).size);
  while (true) {
    uint64_t address = view.address;
    for (int64_t d = 0; d < view.rank; ++d)
      address += static_cast<uint64_t>(index[d] * (sizes[d] > 1 ? view.strides[d] : 0)) * item;
    visit(address, index);
    int64_t d = view.rank - 1;
    while (d >= 0 && ++index[d] == sizes[d]) index[d--] = 0;
    if (d < 0) return;
  }
}

// A byte's history: 0 untouched, else what wrote it.
struct Cell {
  enum Kind : uint8_t { None, Copied, Filled, Cast } kind = None;
  uint8_t detail = 0;  // the byte that was filled in, or which byte of a cast's result it is
  uint16_t code = 0;   // of a cast
  uint64_t src = 0;    // the byte that was copied, or the element that was cast
  friend bool operator==(const Cell&, const Cell&) = default;
};

// What the call must do, worked out element by element. None: it must be refused.
struct Reference {
  std::vector<Cell> cells;      // of the destination arena
  std::vector<int> owner;       // which pair's destination a byte belongs to, -1: none
  std::vector<uint64_t> bytes;  // that each pair writes
  bool valid = false;
  bool may_be_refused = false;  // more dimensions than may be left after merging

  explicit Reference(const Case& call) {
    if (!pairs_are_right(call)) return;
    may_be_refused = std::ranges::any_of(call.dst, [](const Tensor& dst) { return dst.view.rank > 4; });
    uint64_t end = kDstArena;
    for (const std::vector<Tensor>* tensors : {&call.dst, &call.src}) {
      for (const auto& [sizes, strides, view] : *tensors) {
        if (view.address < kSrcArena) end = std::max(end, view.address + static_cast<uint64_t>(extent_of(view)));
      }
    }
    cells.resize(end - kDstArena);
    owner.assign(end - kDstArena, -1);
    bytes.assign(call.dst.size(), 0);
    for (size_t i = 0; i < call.dst.size(); ++i) {
      if (!own_destination(call.dst[i].view, static_cast<int>(i))) return;
    }
    for (size_t i = 0; i < call.dst.size(); ++i) {
      if (!copy(call, i)) return;
    }
    valid = true;
  }

  bool own_destination(const TensorView& view, int pair) {
    bool alone = true;
    for_each_element(view, view.sizes, [&](uint64_t address, const auto&) {
      for (int k = 0; k < info(view.dtype).size; ++k) {
        int& by = owner[address - kDstArena + k];
        alone &= by == -1;
        by = pair;
      }
    });
    return alone;
  }

  bool copy(const Case& call, size_t i) {
    const TensorView& dst = call.dst[i].view;
    const TensorView& src = call.src[i].view;
    const int dst_item = info(dst.dtype).size, src_item = info(src.dtype).size;
    bool shares = false, shares_another = false, same = src.dtype == dst.dtype;
    std::vector<uint64_t> corner;
    for_each_element(dst, src.sizes, [&](uint64_t address, const auto&) { corner.push_back(address); });
    std::vector<uint64_t> sources;
    for_each_element(src, src.sizes, [&](uint64_t address, const auto&) {
      same &= corner[sources.size()] == address;
      sources.push_back(address);
      for (uint64_t byte = address; byte < address + src_item; ++byte) {
        if (byte - kDstArena >= owner.size()) continue;
        const int by = owner[byte - kDstArena];
        shares |= by >= 0;
        shares_another |= by >= 0 && by != static_cast<int>(i);
      }
    });
    if (shares_another || (shares && !same)) return false;
    if (rest_of(call, i) == Rest::Pattern) {
      for_each_element(dst, dst.sizes, [&](uint64_t address, const std::vector<int64_t>& index) {
        bool inside = true;
        for (size_t d = 0; d < index.size(); ++d) inside &= index[d] < src.sizes[d];
        for (int k = 0; !inside && k < dst_item; ++k)
          cells[address - kDstArena + k] = {Cell::Filled, static_cast<uint8_t>(k), 0, address};
        if (!inside) bytes[i] += dst_item;
      });
    }
    if (shares) return true;  // the very same memory
    const auto code =
        static_cast<uint16_t>(static_cast<int>(src.dtype) * kCastableDTypes + static_cast<int>(dst.dtype));
    for (size_t e = 0; e < corner.size(); ++e) {
      for (int k = 0; k < dst_item; ++k) {
        Cell& cell = cells[corner[e] - kDstArena + k];
        cell = src.dtype == dst.dtype ? Cell{Cell::Copied, 0, 0, sources[e] + k}
                                      : Cell{Cell::Cast, static_cast<uint8_t>(k), code, sources[e]};
      }
    }
    bytes[i] += corner.size() * dst_item;
    return true;
  }
};

void compare(const Case& call, std::span<const PlannedLaunch> launches, const LaunchPlanner& planner) {
  const Reference reference(call);
  if (!reference.valid) fail(call, "planned what is to be refused");
  std::vector<Cell> cells(reference.cells.size());
  const auto write = [&](uint64_t address, const Cell& cell) {
    if (address - kDstArena >= cells.size()) fail(call, "a write outside of the arena");
    Cell& old = cells[address - kDstArena];
    if (old.kind != Cell::None) fail(call, "a byte written twice");
    old = cell;
  };
  for (const PlannedLaunch& launch : launches) {
    check_form(call, launch);
    for (uint32_t tile = 0; tile < launch.header().tiles; ++tile) {
      walk_tile(call, launch.params.bytes, tile,
                [&](const Task& task, uint64_t dst, uint64_t src, int64_t bytes, int64_t, int place) {
                  const uint64_t pattern[2] = {task.src, task.code.operation == Operation::Fill16 ? 0 : task.src};
                  for (int64_t k = 0; k < bytes; ++k) {
                    if (task.code.operation >= Operation::Cast) {
                      const auto code = static_cast<uint16_t>(static_cast<int>(task.code.operation) -
                                                              static_cast<int>(Operation::Cast));
                      write(dst + k, {Cell::Cast, static_cast<uint8_t>(k), code, src});
                    } else if (is_fill(task.code.operation)) {
                      write(dst + k, {Cell::Filled, reinterpret_cast<const uint8_t*>(pattern)[(place + k) % 16], 0, 0});
                    } else {
                      write(dst + k, {Cell::Copied, 0, 0, src + k});
                    }
                  }
                });
    }
  }
  for (size_t at = 0; at < cells.size(); ++at) {
    const Cell& expected = reference.cells[at];
    if (expected.kind != Cell::Filled) {
      if (cells[at] != expected)
        fail(call, "byte " + std::to_string(at) + " of the arena is written from elsewhere, or not, or should not be");
      continue;
    }
    if (cells[at].kind != Cell::Filled) fail(call, "byte " + std::to_string(at) + " of the arena is not filled");
    if (expected.detail != 0) continue;
    // The first byte of an element: all of it must be the number.
    const auto pair = static_cast<size_t>(reference.owner[at]);
    const DType dtype = call.dst[pair].view.dtype;
    uint8_t bytes[16] = {};
    for (int k = 0; k < info(dtype).size; ++k) bytes[k] = cells[at + k].detail;
    const double number = call.fills[pair].number;
    bool right = same_number(decode(bytes, dtype), number == 0 && dtype < DType::Float16 ? 0.0 : number) ||
                 (dtype >= DType::UInt16 && dtype <= DType::UInt64 && decode(bytes, dtype) == number);
    for (int k = info(dtype).size / 2; is_complex(dtype) && k < info(dtype).size; ++k) right &= bytes[k] == 0;
    if (!right) fail(call, "a fill wrote another number");
  }
  // Which looks through all of the call's tasks: not for every pair of a long list.
  for (size_t i = 0; i < std::min<size_t>(call.dst.size(), 8); ++i) {
    if (planner.path(static_cast<int64_t>(i)).second != reference.bytes[i])
      fail(call, "path() counts other bytes than are written");
  }
}

// --- any numbers, tiles within bounds --------------------------------------------------------------------------------

int64_t wild_number(Input& in) {
  const uint8_t pick = in.byte();
  if (pick < 128) return 1 + pick % 16;
  if (pick < 160) return int64_t{1} << pick % 63;
  if (pick < 192) return (int64_t{1} << pick % 63) - 1;
  if (pick < 224) return in.byte() << 8 | in.byte();
  return static_cast<int64_t>(in.word());
}

Case wild_case(Input& in) {
  Case call;
  const size_t pairs = 1 + in.byte() % 3;
  const Device device{in.byte() % 2 ? DeviceType::Cuda : DeviceType::Cpu, 0};
  call.has_fills = in.byte() % 2;
  const bool huge = in.rarely();     // each about as much as one launch can number the tiles of
  const bool far = in.rarely();      // one step reaches about as far as a tensor may, among small ones
  const bool tangled = in.rarely();  // too many ways to reach an element to try them all
  call.dst.resize(pairs);
  call.src.resize(pairs);
  for (size_t i = 0; i < pairs; ++i) {
    const size_t rank = tangled ? 18 : huge ? 1 : in.rarely() ? in.byte() % 70 : in.byte() % 7;
    const uint8_t far_dimension = far ? in.byte() : 0;
    for (Tensor* tensor : {&call.dst[i], &call.src[i]}) {
      const bool any = in.rarely();
      int64_t step = 1;
      for (size_t d = 0; d < rank; ++d) {
        const int64_t size = huge ? int64_t{1} << 42 : far ? 1 + in.byte() % 4 : wild_number(in);
        tensor->sizes.push_back(any || tensor == &call.dst[i] ? size : std::min(size, call.dst[i].sizes[d]));
        // Strides that grow keep elements apart, so that some calls go through.
        tensor->strides.push_back(any ? wild_number(in) : step);
        if (__builtin_mul_overflow(step, std::max<int64_t>(size, 1), &step) || step < 0) step = INT64_MAX;
        if (in.byte() >= 224 && step < INT64_MAX / 2) step += wild_number(in) & 0xFFFF;
      }
      if (far && rank > 0) {
        tensor->sizes[far_dimension % rank] = 2;
        tensor->strides[far_dimension % rank] = (INT64_MAX >> (4 + in.byte() % 3)) - (in.byte() << 6);
      }
    }
    if (tangled) call.dst[i].sizes.assign(rank, 2);
    for (int64_t& stride : call.dst[i].strides) stride = tangled ? 1 + (in.byte() << 8 | in.byte()) : stride;
    const DType dtype = far ? DType::Complex128 : any_dtype(in);
    const uint64_t apart = uint64_t{1} << 61;
    finish(call.dst[i], in.rarely() ? in.word() | apart * 7 : apart * (2 * i) + (1 << 20) + in.byte() % 32, dtype,
           device);
    finish(call.src[i], in.rarely() ? in.word() : apart * (2 * i + 1) + (1 << 20) + in.byte() % 32,
           in.byte() < 192 ? dtype : any_dtype(in), device);
    for (Tensor* tensor : {&call.dst[i], &call.src[i]}) {
      tensor->view.storage_bytes = in.byte() < 224 ? INT64_MAX : static_cast<int64_t>(in.word());
      any_flags(in, tensor->view);
    }
    if (call.has_fills) call.fills.push_back(any_fill(in));
  }
  return call;
}

struct Range {
  uint64_t begin;
  uint64_t bytes;
  explicit Range(const Tensor& tensor)
      : begin(tensor.view.address), bytes(static_cast<uint64_t>(extent_of(tensor.view))) {}
  bool holds(uint64_t first, int64_t count) const {
    const auto size = static_cast<uint64_t>(count);
    return first >= begin && size <= bytes && first - begin <= bytes - size;
  }
};

void check_bounds(const Case& call, std::span<const PlannedLaunch> launches) {
  if (!pairs_are_right(call)) fail(call, "planned what is to be refused");
  const std::vector<Range> dst_ranges(call.dst.begin(), call.dst.end());
  const std::vector<Range> src_ranges(call.src.begin(), call.src.end());
  for (const PlannedLaunch& launch : launches) {
    check_form(call, launch);
    const LaunchHeader& header = launch.header();
    const uint32_t* first_tiles = launch_first_tiles(launch.params.bytes);
    for (uint32_t i = 0; i < header.tasks; ++i) {
      const uint32_t first = first_tiles[i];
      const uint32_t last = (i + 1u < header.tasks ? first_tiles[i + 1] : header.tiles) - 1;
      for (const uint32_t tile :
           {first, std::min(first + 1, last), first + (last - first) / 2, first + (last - first) / 3, last}) {
        for (const auto find : {find_task, find_task_of_one_level}) {
          if (find == find_task_of_one_level && header.levels > 1) continue;
          const auto [task, task_tile] = find(launch.params.bytes, tile);
          if (task != i || task_tile != tile - first) fail(call, "a tile found another task than its own");
        }
        if (header.levels == 1 && header.strided_at != kStridedAtOfOneLevel) fail(call, "tasks lie elsewhere");
        walk_tile(call, launch.params.bytes, tile,
                  [&](const Task&, uint64_t dst, uint64_t src, int64_t dst_bytes, int64_t src_bytes, int) {
                    for (size_t pair = 0; pair < dst_ranges.size(); ++pair) {
                      if (dst_ranges[pair].holds(dst, dst_bytes) &&
                          (src_bytes == 0 || src_ranges[pair].holds(src, src_bytes))) {
                        return;
                      }
                    }
                    fail(call, "tile " + std::to_string(tile) + " of a launch lies outside of every pair's tensors");
                  });
      }
    }
  }
}

// --- views of one buffer of many rows --------------------------------------------------------------------------------

constexpr uint64_t kBufferBytes = 1 << 19;

// Mostly views of which none shares a byte with another, and few enough bytes to look at them all.
Case buffer_case(Input& in) {
  Case call;
  const bool many = in.byte() % 2;
  const size_t pairs = many ? 8 + in.byte() % 32 : 1 + in.byte() % 4;
  const DType dtype = kDTypesBySize[in.byte() % 4];
  const int64_t pitch = 1 + in.byte() % 64;
  const int64_t rows =
      std::min<int64_t>(many ? 4 + in.byte() % 64 : 1000 << in.byte() % 7, kBufferBytes / pitch / info(dtype).size);
  const int64_t plane_rows = in.byte() % 2 ? 1 : 1 + in.byte() % std::min<int64_t>(rows, 256);
  // Each takes this many columns of a row, this far apart, and leaves the rows between to others.
  const int64_t width = 1 + (in.byte() % 2 ? 0 : in.byte() % 8);
  const int64_t apart = 1 + (in.byte() % 2 ? 0 : in.byte() % 4);
  const int64_t rows_apart = 1 + (in.byte() % 2 ? 0 : in.byte() % 6);
  const int64_t side_by_side = apart * std::max<int64_t>(1, pitch / (width * apart));
  const int64_t turned = in.byte() % 3;
  const uint64_t base = kDstArena + in.byte() % 16;
  const auto place = [&](Tensor& tensor, int64_t number) {
    const int64_t first_row = number / side_by_side % rows_apart;
    const int64_t column = number % side_by_side / apart * apart * width + number % apart;
    const int64_t step = rows_apart * (in.byte() < 224 ? 1 : 1 + in.byte() % 4);
    const int64_t count = (rows - first_row - 1) / step + 1;
    int64_t offset = first_row * pitch + column;
    tensor.sizes = {std::max<int64_t>(1, count / plane_rows), std::min(count, plane_rows), width};
    tensor.strides = {step * pitch * plane_rows, step * pitch, apart};
    // Fewer rows of a plane, other places, rows that step as no other's do.
    if (in.byte() >= 192 && tensor.sizes[1] > 1) tensor.sizes[1] -= 1;
    if (in.rarely()) offset += in.byte();
    if (in.rarely()) tensor.strides[in.byte() % 2] += in.byte() % 8;
    if (in.rarely()) tensor.sizes[in.byte() % 3] = 1 + in.byte() % 8;
    if (in.rarely()) tensor.strides[2] = in.byte() % 8;
    std::rotate(tensor.sizes.begin(), tensor.sizes.begin() + turned, tensor.sizes.end());
    std::rotate(tensor.strides.begin(), tensor.strides.begin() + turned, tensor.strides.end());
    finish(tensor, base + static_cast<uint64_t>(offset * info(dtype).size), dtype, Device{});
  };
  call.dst.resize(pairs);
  call.src.resize(pairs);
  const bool elsewhere = in.byte() % 2;
  for (size_t i = 0; i < pairs; ++i) {
    Tensor& dst = call.dst[i];
    Tensor& src = call.src[i];
    place(dst, static_cast<int64_t>(in.rarely() ? in.byte() : i));
    place(src, static_cast<int64_t>(in.rarely() ? i : pairs + i));
    if (in.rarely()) src.strides = dst.strides;
    if (elsewhere) src.view.address += kArenaBytes;
    for (size_t d = 0; d < 3; ++d) src.sizes[d] = std::min(src.sizes[d], dst.sizes[d]);
    for (Tensor* tensor : {&dst, &src}) tensor->view.storage_bytes = static_cast<int64_t>(extent_of(tensor->view));
  }
  return call;
}

// Whether no destination shares a byte with itself, another or a source, by marking all bytes of all of them.
bool nothing_is_shared(const Case& call) {
  static std::vector<uint32_t> owners;
  static uint32_t unowned = 0;  // and so is all below
  const auto visit_bytes = [](const TensorView& view, auto visit) {
    const size_t longest = std::max_element(view.sizes, view.sizes + view.rank) - view.sizes;
    std::vector<int64_t> once(view.sizes, view.sizes + view.rank);
    once[longest] = 1;
    std::vector<uint64_t> firsts;
    for_each_element(view, once.data(), [&](uint64_t address, const auto&) { firsts.push_back(address - kDstArena); });
    owners.resize(std::max<size_t>(owners.size(), view.address - kDstArena + extent_of(view)));
    const int item = info(view.dtype).size;
    for (int64_t n = 0; n < view.sizes[longest]; ++n) {
      for (const uint64_t first : firsts) {
        const uint64_t byte = first + static_cast<uint64_t>(n * view.strides[longest] * item);
        for (int k = 0; k < item; ++k) visit(owners[byte + k]);
      }
    }
  };
  bool nothing = true;
  const uint32_t first = unowned + 1;
  for (const Tensor& dst : call.dst) {
    ++unowned;
    visit_bytes(dst.view, [&](uint32_t& owner) { nothing &= std::exchange(owner, unowned) < first; });
  }
  for (size_t i = 0; i < call.src.size(); ++i) {
    const TensorView& src = call.src[i].view;
    const TensorView& dst = call.dst[i].view;
    if (src.address >= kSrcArena) continue;
    bool same = src.address == dst.address;
    for (int64_t d = 0; d < src.rank; ++d) same &= src.sizes[d] == 1 || src.strides[d] == dst.strides[d];
    visit_bytes(src, [&](uint32_t owner) { nothing &= owner < first || (same && owner == first + i); });
  }
  return nothing;
}

// How many calls were planned, how many refused.
uint64_t planned = 0, refused = 0;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // As in a front door, both live from call to call: what one leaves behind must not change the next.
  static Destinations destinations;
  static LaunchPlanner planner;
  Input in(data, size);
  const uint8_t kind = in.byte();
  const bool small = kind % 2 == 0;
  const bool buffer = kind % 32 == 1;
  const Case call = small ? small_case(in) : buffer ? buffer_case(in) : wild_case(in);
  std::vector<TensorView> dst, src;
  for (const Tensor& tensor : call.dst) dst.push_back(tensor.view);
  for (const Tensor& tensor : call.src) src.push_back(tensor.view);
  // As for pinned sources, before anything is checked.
  for (const TensorView& view : src) byte_extent(view);
  try {
    destinations.bind(dst, call.has_fills ? &call.fills : nullptr);
    const auto launches = planner.plan(destinations, {src});
    ++planned;
    small ? compare(call, launches, planner) : check_bounds(call, launches);
    if (buffer && !nothing_is_shared(call)) fail(call, "planned what shares memory");
  } catch (const InvalidInput& error) {
    ++refused;
    if (error.pair < -1 || error.pair >= static_cast<int64_t>(std::max(dst.size(), src.size())))
      fail(call, "the error names no pair");
    if (small) {
      const Reference reference(call);
      if (reference.valid && !reference.may_be_refused)
        fail(call, std::string("refused what is right: ") + error.what());
    }
    if (buffer && nothing_is_shared(call)) fail(call, std::string("refused what is right: ") + error.what());
  }
  return 0;
}

#ifdef FUSED_COPY_FUZZ_MAIN
// planner_fuzz SECONDS SEED [FILE...]: the inputs in the files, then random ones for that long.
int main(int argc, char** argv) {
  uint64_t inputs = 0;
  std::vector<uint8_t> data;
  const auto run = [&] {
    LLVMFuzzerTestOneInput(data.data(), data.size());
    ++inputs;
  };
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    data.assign(std::istreambuf_iterator<char>(file), {});
    run();
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[1]));
  std::mt19937_64 random(std::strtoull(argv[2], nullptr, 10));
  while (std::chrono::steady_clock::now() < end) {
    data.resize(random() % 256);
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
    run();
  }
  std::printf("%llu inputs, %llu planned, %llu refused\n", static_cast<unsigned long long>(inputs),
              static_cast<unsigned long long>(planned), static_cast<unsigned long long>(refused));
}
#endif
