#include "planner.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

namespace fused_copy {
namespace {

constexpr int64_t kTooManyBytes = INT64_MAX;
constexpr int kMaxRank = 64;       // torch's own limit for most operators
constexpr int kMaxDimensions = 4;  // after merging
constexpr int kMaxUnitLog2 = 4;    // 16 bytes: the widest access of a GPU up to sm_90
constexpr uint64_t kMaxTiles = std::numeric_limits<int32_t>::max();

// A warp takes as little as one access of its lanes while that spreads the work over the GPU, and as much as eight once
// there is plenty.
constexpr uint32_t kMinTileBytes = 512;
constexpr uint32_t kMaxTileBytes = 4096;
constexpr uint64_t kManyTiles = 2048;
// On the CPU a tile is a memcpy.
constexpr uint32_t kCpuTileBytes = 1 << 16;

// Ragged rows shorter than this gain nothing from wide accesses: too many of their units are cut.
constexpr int64_t kMinRaggedRowBytes = 256;

struct DTypeInfo {
  const char* name;
  int size;
};

constexpr std::array<DTypeInfo, static_cast<size_t>(DType::Unsupported) + 1> kDTypes = {{
    {"bool", 1},
    {"uint8", 1},
    {"int8", 1},
    {"int16", 2},
    {"int32", 4},
    {"int64", 8},
    {"float16", 2},
    {"bfloat16", 2},
    {"float32", 4},
    {"float64", 8},
    {"uint16", 2},
    {"uint32", 4},
    {"uint64", 8},
    {"complex32", 4},
    {"complex64", 8},
    {"complex128", 16},
    {"float8_e4m3fn", 1},
    {"float8_e4m3fnuz", 1},
    {"float8_e5m2", 1},
    {"float8_e5m2fnuz", 1},
    {"float8_e8m0fnu", 1},
    {"float4_e2m1fn_x2", 1},
    {"bits8", 1},
    {"bits16", 2},
    {"an unsupported dtype", 0},
}};

const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<size_t>(dtype)]; }

bool castable(DType dtype) { return static_cast<int>(dtype) < kCastableDTypes; }

std::string shape_of(const TensorView& view) {
  std::string text = "[";
  for (int64_t d = 0; d < view.rank; ++d) text += (d ? ", " : "") + std::to_string(view.sizes[d]);
  return text + "]";
}

std::string strides_of(const TensorView& view) {
  std::string text = "(";
  for (int64_t d = 0; d < view.rank; ++d) text += (d ? ", " : "") + std::to_string(view.strides[d]);
  return text + ")";
}

std::string number_text(double number) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%.17g", number);
  return text.data();
}

bool is_empty(const TensorView& view) {
  return std::any_of(view.sizes, view.sizes + view.rank, [](int64_t size) { return size == 0; });
}

// The bytes from a tensor's first element to the end of its last. Checks all that one tensor alone can get wrong.
int64_t check_tensor(int64_t pair, const char* role, const TensorView& view) {
  const auto fail = [&](const std::string& text) { throw InvalidInput(pair, std::string(role) + " " + text); };
  if (!view.strided) fail("is not a strided tensor (sparse, quantized or nested): pass a dense, strided one");
  if (view.lazy) {
    fail(
        "has its conjugate or negative bit set, so its memory does not hold its values: pass resolve_conj() and "
        "resolve_neg() of it");
  }
  if (view.dtype == DType::Unsupported) {
    fail(
        "has a dtype that cannot be copied: sub-byte, quantized and opaque dtypes are not supported; view it as uint8");
  }
  if (view.requires_grad) {
    fail(
        "requires grad while grad mode is on, and an in-place copy is not differentiable here: call under "
        "torch.no_grad() or torch.inference_mode(), or pass detach() of it");
  }
  if (view.inference) {
    fail("is an inference tensor, which outside inference mode must not change: call under torch.inference_mode()");
  }
  if (view.device.type != DeviceType::Cpu && view.device.type != DeviceType::Cuda) {
    fail("is on " + device_name(view.device) + ": expected a CPU or CUDA tensor");
  }
  if (view.rank > kMaxRank) {
    fail("has " + std::to_string(view.rank) + " dimensions: expected at most " + std::to_string(kMaxRank));
  }
  for (int64_t d = 0; d < view.rank; ++d) {
    if (view.sizes[d] < 0 || view.strides[d] < 0) {
      fail("has a negative size or stride: shape " + shape_of(view) + ", strides " + strides_of(view));
    }
  }
  const int64_t bytes = byte_extent(view);
  if (bytes == 0) return 0;
  if (view.address == 0 || bytes > view.storage_bytes || bytes == kTooManyBytes ||
      view.address + static_cast<uint64_t>(bytes) < view.address) {
    const int64_t there = view.address == 0 ? 0 : std::max<int64_t>(view.storage_bytes, 0);
    fail("of shape " + shape_of(view) + " and strides " + strides_of(view) + " needs " + std::to_string(bytes) +
         " bytes of storage but " + std::to_string(there) + " are there: it was freed or resized");
  }
  return bytes;
}

// A term of a sum: any whole number from 0 to `most`, times `step`.
struct Term {
  int64_t step;
  int64_t most;
};

constexpr int kOverlapBudget = 1 << 16;

// Whether the terms can add up to a value within [low, high]. Terms are ordered by falling step, `reach[i]` is the most
// that terms i and up can add. Strides that nest, as those of real tensors do, leave one or two choices a term; where a
// hostile set exceeds the budget, the answer is yes.
bool can_reach(std::span<const Term> terms, const __int128* reach, __int128 low, __int128 high, int& budget) {
  if (high < 0 || low > reach[0]) return false;
  if (low <= 0) return true;
  if (terms.empty()) return false;
  const __int128 step = terms[0].step;
  const __int128 rest = reach[1];
  const __int128 first = low > rest ? (low - rest + step - 1) / step : 0;
  const __int128 last = std::min<__int128>(terms[0].most, high / step);
  for (__int128 n = first; n <= last; ++n) {
    if (--budget < 0) return true;
    if (can_reach(terms.subspan(1), reach + 1, low - n * step, high - n * step, budget)) return true;
  }
  return false;
}

struct TermList {
  std::array<Term, 2 * kMaxRank> terms;
  size_t count = 0;

  void add(int64_t step, int64_t most) {
    if (step > 0 && most > 0) terms[count++] = {step, most};
  }

  bool can_reach(__int128 low, __int128 high) {
    std::sort(terms.begin(), terms.begin() + count, [](const Term& a, const Term& b) { return a.step > b.step; });
    std::array<__int128, 2 * kMaxRank + 1> reach;
    reach[count] = 0;
    for (size_t i = count; i-- > 0;) reach[i] = reach[i + 1] + static_cast<__int128>(terms[i].step) * terms[i].most;
    int budget = kOverlapBudget;
    return fused_copy::can_reach({terms.data(), count}, reach.data(), low, high, budget);
  }
};

// Whether an element of `a` shares a byte with one of `b`; both are not empty. Looks at the elements, not at the span
// from first to last: interleaved views of one buffer, such as two blocks of its columns, do not share any.
bool share_elements(const TensorView& a, const TensorView& b) {
  const int a_item = info(a.dtype).size;
  const int b_item = info(b.dtype).size;
  TermList list;
  // a + sum(i * s) = b + sum(j * t) with every t * j written as t * most - t * (most - j), so that all terms add.
  __int128 distance = static_cast<__int128>(b.address) - a.address;
  // A dimension of one has any stride, whose product with the element size may not be a number any more.
  for (int64_t d = 0; d < a.rank; ++d) {
    if (a.sizes[d] > 1) list.add(a.strides[d] * a_item, a.sizes[d] - 1);
  }
  for (int64_t d = 0; d < b.rank; ++d) {
    if (b.sizes[d] == 1) continue;
    list.add(b.strides[d] * b_item, b.sizes[d] - 1);
    distance += static_cast<__int128>(b.strides[d]) * b_item * (b.sizes[d] - 1);
  }
  return list.can_reach(distance - (a_item - 1), distance + (b_item - 1));
}

// Whether two elements of one tensor share memory; it is not empty.
bool shares_own_elements(const TensorView& view) {
  std::array<Term, kMaxRank> dims;
  size_t count = 0;
  for (int64_t d = 0; d < view.rank; ++d) {
    if (view.sizes[d] == 1) continue;
    if (view.strides[d] == 0) return true;
    dims[count++] = {view.strides[d], view.sizes[d] - 1};
  }
  std::sort(dims.begin(), dims.begin() + count, [](const Term& a, const Term& b) { return a.step < b.step; });
  bool nested = true;
  __int128 extent = 1;
  for (size_t i = 0; i < count; ++i) {
    nested &= dims[i].step >= extent;
    extent += static_cast<__int128>(dims[i].step) * dims[i].most;
  }
  if (nested) return false;
  // Two elements meet where their indices differ by some d, not all zero, with sum(d * stride) = 0. Let `leading` be a
  // dimension in which d >= 1, and every other one range over [-most, most].
  for (size_t leading = 0; leading < count; ++leading) {
    TermList list;
    __int128 target = -static_cast<__int128>(dims[leading].step);
    list.add(dims[leading].step, dims[leading].most - 1);
    for (size_t i = leading + 1; i < count; ++i) {
      list.add(dims[i].step, 2 * dims[i].most);
      target += static_cast<__int128>(dims[i].step) * dims[i].most;
    }
    if (list.can_reach(target, target)) return true;
  }
  return false;
}

// A floating-point format by its bits. `special` is what the highest exponent holds.
struct FloatFormat {
  int exponent_bits;
  int mantissa_bits;
  int bias;
  enum { Ieee, NanOnly, Fnuz } special;
  uint64_t nan;  // the one that torch makes
};

// The bits of `value` in the format, or none where it does not hold the value exactly.
std::optional<uint64_t> encode_float(double value, const FloatFormat& format) {
  const uint64_t sign = std::signbit(value) ? uint64_t{1} << (format.exponent_bits + format.mantissa_bits) : 0;
  const uint64_t exponent_mask = (uint64_t{1} << format.exponent_bits) - 1;
  const uint64_t mantissa_mask = (uint64_t{1} << format.mantissa_bits) - 1;
  if (std::isnan(value)) return format.nan;
  if (std::isinf(value)) {
    if (format.special != FloatFormat::Ieee) return std::nullopt;
    return sign | exponent_mask << format.mantissa_bits;
  }
  if (value == 0) {
    if (sign && format.special == FloatFormat::Fnuz) return std::nullopt;
    return sign;
  }
  int exponent;
  std::frexp(value, &exponent);
  // |value| = m * 2^(exponent - 1) with 1 <= m < 2; below the smallest normal exponent the step stays that of it.
  const int biased = std::max(exponent - 1 + format.bias, 1);
  const double steps = std::ldexp(std::fabs(value), format.mantissa_bits + format.bias - biased);
  const auto significand = static_cast<uint64_t>(steps);
  if (static_cast<double>(significand) != steps) return std::nullopt;
  // The implicit leading bit of a normal number adds the missing one to its exponent.
  const uint64_t bits = (static_cast<uint64_t>(biased - 1) << format.mantissa_bits) + significand;
  uint64_t largest = exponent_mask << format.mantissa_bits | mantissa_mask;
  if (format.special == FloatFormat::Ieee) largest -= mantissa_mask + 1;
  if (format.special == FloatFormat::NanOnly) largest -= 1;
  if (static_cast<uint64_t>(biased) > exponent_mask || bits > largest) return std::nullopt;
  return sign | bits;
}

// A format of powers of two alone: 2^k is k + 127.
std::optional<uint64_t> encode_power_of_two(double value) {
  if (std::isnan(value)) return 0xFF;
  int exponent;
  if (std::signbit(value) || std::frexp(value, &exponent) != 0.5 || exponent < -126 || exponent > 128) {
    return std::nullopt;
  }
  return static_cast<uint64_t>(exponent + 126);
}

std::optional<uint64_t> encode_integer(double value, int bits, bool is_signed) {
  const double low = is_signed ? -std::ldexp(1.0, bits - 1) : 0.0;
  const double high = std::ldexp(1.0, is_signed ? bits - 1 : bits);
  if (!(value >= low && value < high) || value != std::floor(value)) return std::nullopt;
  const uint64_t encoded =
      value < 0 ? static_cast<uint64_t>(static_cast<int64_t>(value)) : static_cast<uint64_t>(value);
  return bits == 64 ? encoded : encoded & ((uint64_t{1} << bits) - 1);
}

std::optional<uint64_t> encode_exactly(double value, DType dtype) {
  constexpr FloatFormat kFloat16{5, 10, 15, FloatFormat::Ieee, 0x7E00};
  constexpr FloatFormat kFloat32{8, 23, 127, FloatFormat::Ieee, 0x7FC00000};
  switch (dtype) {
    case DType::Bool: return encode_integer(value, 1, false);
    case DType::UInt8: return encode_integer(value, 8, false);
    case DType::UInt16: return encode_integer(value, 16, false);
    case DType::UInt32: return encode_integer(value, 32, false);
    case DType::UInt64: return encode_integer(value, 64, false);
    case DType::Int8: return encode_integer(value, 8, true);
    case DType::Int16: return encode_integer(value, 16, true);
    case DType::Int32: return encode_integer(value, 32, true);
    case DType::Int64: return encode_integer(value, 64, true);
    case DType::Float16:
    case DType::Complex32: return encode_float(value, kFloat16);
    case DType::BFloat16: return encode_float(value, {8, 7, 127, FloatFormat::Ieee, 0x7FC0});
    case DType::Float32:
    case DType::Complex64: return encode_float(value, kFloat32);
    case DType::Float64:
    case DType::Complex128: return std::bit_cast<uint64_t>(value);
    case DType::Float8E4M3FN: return encode_float(value, {4, 3, 7, FloatFormat::NanOnly, 0x7F});
    case DType::Float8E4M3FNUZ: return encode_float(value, {4, 3, 8, FloatFormat::Fnuz, 0x80});
    case DType::Float8E5M2: return encode_float(value, {5, 2, 15, FloatFormat::Ieee, 0x7F});
    case DType::Float8E5M2FNUZ: return encode_float(value, {5, 2, 16, FloatFormat::Fnuz, 0x80});
    case DType::Float8E8M0FNU: return encode_power_of_two(value);
    default: return std::nullopt;
  }
}

// The 8 bytes that a fill repeats. The imaginary part of a complex number is zero, so complex128 repeats 8 zero bytes
// after them, which Operation::Fill16 stands for.
uint64_t fill_pattern(uint64_t encoded, DType dtype) {
  const int repeat_bytes = info(dtype).size;
  for (int filled = repeat_bytes; filled < 8; filled *= 2) encoded |= encoded << (8 * filled);
  return encoded;
}

// Orders the extents from the fastest varying in the destination and merges neighbours that step as one. Returns the
// new count.
int merge_extents(Extent* extents, int rank) {
  for (int i = 1; i < rank; ++i) {
    const Extent moved = extents[i];
    int j = i;
    for (; j > 0 && extents[j - 1].dst_stride > moved.dst_stride; --j) extents[j] = extents[j - 1];
    extents[j] = moved;
  }
  int merged = 0;
  for (int i = 0; i < rank; ++i) {
    if (merged > 0) {
      Extent& inner = extents[merged - 1];
      if (extents[i].dst_stride == inner.size * inner.dst_stride &&
          extents[i].src_stride == inner.size * inner.src_stride) {
        inner.size *= extents[i].size;
        continue;
      }
    }
    extents[merged++] = extents[i];
  }
  return merged;
}

[[noreturn]] void fail_too_many_dimensions(int64_t pair, int dimensions) {
  throw InvalidInput(pair, "source and destination need " + std::to_string(dimensions) +
                               " dimensions after merging those that can be merged: expected at most " +
                               std::to_string(kMaxDimensions) + "; make the source contiguous or split the copy");
}

int trailing_zeros(uint64_t bits) { return std::min(std::countr_zero(bits), kMaxUnitLog2); }

uint64_t divide_up(uint64_t a, uint64_t b) { return a / b + (a % b != 0); }

}  // namespace

const char* dtype_name(DType dtype) { return info(dtype).name; }
int dtype_size(DType dtype) { return info(dtype).size; }

int64_t byte_extent(const TensorView& view) {
  const int item = info(view.dtype).size;
  __int128 elements = 1;
  for (int64_t d = 0; d < view.rank; ++d) {
    if (view.sizes[d] <= 0 || view.strides[d] < 0) return 0;
    elements += static_cast<__int128>(view.sizes[d] - 1) * view.strides[d];
    if (elements > kTooManyBytes / 16) return kTooManyBytes;
  }
  return static_cast<int64_t>(elements) * item;
}

std::string device_name(const Device& device) {
  switch (device.type) {
    case DeviceType::Cpu: return "cpu";
    case DeviceType::Cuda: return "cuda:" + std::to_string(device.index);
    case DeviceType::Meta: return "meta";
    default: return "an unsupported device";
  }
}

void Destinations::bind(std::span<const TensorView> views, const std::vector<Fill>* fills) {
  if (fills != nullptr && fills->size() != views.size()) {
    throw InvalidInput(-1, "got " + std::to_string(fills->size()) + " fills for " + std::to_string(views.size()) +
                               " destinations: pass one number or None for each destination");
  }
  views_.assign(views.begin(), views.end());
  fills_.clear();
  if (fills != nullptr) fills_ = *fills;
  intervals_.clear();
  device_ = views.empty() ? Device{} : views[0].device;
  for (size_t i = 0; i < views.size(); ++i) {
    const auto pair = static_cast<int64_t>(i);
    const TensorView& view = views[i];
    const int64_t bytes = check_tensor(pair, "destination", view);
    if (view.device != device_) {
      throw InvalidInput(pair, "destination is on " + device_name(view.device) + " but destination 0 is on " +
                                   device_name(device_) + ": pass destinations of one device");
    }
    if (!fills_.empty() && fills_[i] && !encode_exactly(*fills_[i], view.dtype)) {
      throw InvalidInput(pair, "fill " + number_text(*fills_[i]) + " cannot be held exactly by the destination's " +
                                   dtype_name(view.dtype) + ": pass a number that it can hold");
    }
    if (bytes == 0) continue;
    if (shares_own_elements(view)) {
      throw InvalidInput(pair,
                         "destination of shape " + shape_of(view) + " and strides " + strides_of(view) +
                             " has elements that share memory (an expanded or overlapping view): pass one in which "
                             "every element has its own");
    }
    intervals_.push_back({view.address, view.address + static_cast<uint64_t>(bytes), pair});
  }
  check_overlaps();
}

void Destinations::check_overlaps() {
  std::sort(intervals_.begin(), intervals_.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  furthest_.resize(intervals_.size());
  uint64_t furthest = 0;
  for (size_t i = 0; i < intervals_.size(); ++i) {
    const Interval& later = intervals_[i];
    for (size_t j = i; j-- > 0 && furthest_[j] > later.begin;) {
      const Interval& earlier = intervals_[j];
      if (earlier.end > later.begin && share_elements(views_[earlier.pair], views_[later.pair])) {
        throw InvalidInput(std::max(earlier.pair, later.pair),
                           "destination shares memory with the destination of pair " +
                               std::to_string(std::min(earlier.pair, later.pair)) +
                               ": the copies of one call have no order, so destinations must not overlap");
      }
    }
    furthest = std::max(furthest, later.end);
    furthest_[i] = furthest;
  }
}

bool Destinations::check_source_overlap(int64_t pair, const TensorView& source, int64_t source_bytes) const {
  const uint64_t begin = source.address;
  const uint64_t end = begin + static_cast<uint64_t>(source_bytes);
  size_t candidate = std::upper_bound(intervals_.begin(), intervals_.end(), end - 1,
                                      [](uint64_t last, const Interval& interval) { return last < interval.begin; }) -
                     intervals_.begin();
  bool same_memory = false;
  while (candidate-- > 0 && furthest_[candidate] > begin) {
    const Interval& interval = intervals_[candidate];
    if (interval.end <= begin) continue;
    const TensorView& destination = views_[interval.pair];
    if (interval.pair == pair && source.address == destination.address && source.dtype == destination.dtype) {
      bool same_strides = true;
      for (int64_t d = 0; d < source.rank; ++d) {
        same_strides &= source.sizes[d] == 1 || source.strides[d] == destination.strides[d];
      }
      if (same_strides) {
        same_memory = true;
        continue;
      }
    }
    if (share_elements(source, destination)) {
      throw InvalidInput(pair,
                         "source shares memory with the destination" +
                             (interval.pair == pair ? std::string() : " of pair " + std::to_string(interval.pair)) +
                             ": the copies of one call have no order, so a source may not overlap a destination "
                             "unless it is the very same memory; pass a clone");
    }
  }
  return same_memory;
}

std::span<const PlannedLaunch> LaunchPlanner::plan(const Destinations& destinations,
                                                   std::span<const TensorView> sources) {
  const std::span<const TensorView> views = destinations.views();
  if (sources.size() != views.size()) {
    throw InvalidInput(-1, "got " + std::to_string(views.size()) + " destinations and " +
                               std::to_string(sources.size()) + " sources: pass one source for each destination");
  }
  tasks_.clear();
  bytes_ = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const auto pair = static_cast<int64_t>(i);
    const TensorView& source = sources[i];
    const TensorView& destination = views[i];
    const int64_t source_bytes = check_tensor(pair, "source", source);
    if (source.device != destination.device && !source.pinned) {
      const bool pageable = source.device.type == DeviceType::Cpu && destination.device.type == DeviceType::Cuda;
      throw InvalidInput(pair, "source is on " + device_name(source.device) + " but the destination is on " +
                                   device_name(destination.device) +
                                   (pageable ? ": pin it (tensor.pin_memory()) or move it to the GPU first"
                                             : ": pass tensors of one device"));
    }
    if (source.dtype != destination.dtype && !(castable(source.dtype) && castable(destination.dtype))) {
      throw InvalidInput(pair,
                         std::string("source is ") + dtype_name(source.dtype) + " but the destination is " +
                             dtype_name(destination.dtype) +
                             ": pass the same dtype, or two among bool, uint8, int8, int16, int32, int64, float16, "
                             "bfloat16, float32 and float64");
    }
    if (source.rank != destination.rank) {
      throw InvalidInput(pair, "source has shape " + shape_of(source) + " but the destination has shape " +
                                   shape_of(destination) + ": expected " + std::to_string(destination.rank) +
                                   " dimensions, got " + std::to_string(source.rank) + " (there is no broadcasting)");
    }
    for (int64_t d = 0; d < source.rank; ++d) {
      if (source.sizes[d] > destination.sizes[d]) {
        throw InvalidInput(pair, "source has shape " + shape_of(source) + ", larger in dimension " + std::to_string(d) +
                                     " than the destination's " + shape_of(destination) +
                                     ": expected at most the destination's size in every dimension");
      }
    }
    if (source_bytes > 0 && !destinations.check_source_overlap(pair, source, source_bytes)) {
      add_copy(pair, destination, source);
    }
    if (const Fill& fill = destinations.fill(i)) add_fill(pair, destination, source, *fill);
  }
  return lay_out(destinations.device().type);
}

void LaunchPlanner::add_copy(int64_t pair, const TensorView& destination, const TensorView& source) {
  std::array<Extent, kMaxRank + 1> extents;
  const int src_item = info(source.dtype).size;
  const int dst_item = info(destination.dtype).size;
  int rank = 0;
  const bool cast = source.dtype != destination.dtype;
  if (!cast) extents[rank++] = {src_item, 1, 1};
  for (int64_t d = source.rank; d-- > 0;) {
    if (source.sizes[d] > 1) {
      extents[rank++] = {source.sizes[d], source.strides[d] * src_item, destination.strides[d] * dst_item};
    }
  }
  if (cast) {
    add_cast(pair, destination, source, extents.data(), rank);
  } else {
    add_bytes(pair, Operation::Copy, src_item, source.address, destination.address, extents.data(), rank);
  }
}

// The destination less its corner is a box for each dimension: there everything from the corner's edge on, within the
// corner in the dimensions before it, whole in those after it.
void LaunchPlanner::add_fill(int64_t pair, const TensorView& destination, const TensorView& source, double value) {
  if (is_empty(destination)) return;
  const int item = info(destination.dtype).size;
  const uint64_t pattern = fill_pattern(*encode_exactly(value, destination.dtype), destination.dtype);
  for (int64_t edge = 0; edge < destination.rank; ++edge) {
    std::array<Extent, kMaxRank + 1> extents;
    int rank = 0;
    bool empty = false;
    extents[rank++] = {item, 0, 1};
    for (int64_t d = destination.rank; d-- > 0;) {
      const int64_t size = d < edge   ? source.sizes[d]
                           : d > edge ? destination.sizes[d]
                                      : destination.sizes[d] - source.sizes[d];
      empty |= size == 0;
      if (size > 1) extents[rank++] = {size, 0, destination.strides[d] * item};
    }
    if (empty) continue;
    const uint64_t begin =
        destination.address + static_cast<uint64_t>(source.sizes[edge] * destination.strides[edge]) * item;
    add_bytes(pair, item == 16 ? Operation::Fill16 : Operation::Fill, item, pattern, begin, extents.data(), rank);
  }
}

// Adds a box whose extents count bytes, the first being the bytes of one element.
void LaunchPlanner::add_bytes(int64_t pair, Operation operation, int item_bytes, uint64_t src, uint64_t dst,
                              Extent* extents, int rank) {
  const bool copy = operation == Operation::Copy;
  rank = merge_extents(extents, rank);
  const bool elements_apart = rank > 1 && extents[0].size == item_bytes;
  if (rank - elements_apart > kMaxDimensions) fail_too_many_dimensions(pair, rank - elements_apart);

  const int64_t row_bytes = extents[0].size;
  uint64_t addresses = dst | (copy ? src : 0);
  uint64_t phases = copy ? src - dst : 0;
  for (int d = 1; d < rank; ++d) {
    addresses |= extents[d].dst_stride | extents[d].src_stride;
    phases |= extents[d].dst_stride - extents[d].src_stride;
  }
  int width = trailing_zeros(addresses | row_bytes);
  if (copy && row_bytes >= kMinRaggedRowBytes && trailing_zeros(phases) > width) {
    width = trailing_zeros(phases);
    // A row that begins in the middle of a unit touches one more than it would fill.
    const uint64_t columns = divide_up(row_bytes - 1, uint64_t{1} << width) + 1;
    extents[0].src_stride = extents[0].dst_stride = int64_t{1} << width;
    add_task(pair, Operation::CopyRagged, width, width, src, dst, columns, extents, rank, /*dense=*/false);
    return;
  }
  if (rank > 1 && row_bytes == int64_t{1} << width) {
    const uint64_t columns = extents[1].size;
    add_task(pair, operation, width, width, src, dst, columns, extents + 1, rank - 1, /*dense=*/false);
    return;
  }
  extents[0].size = row_bytes >> width;
  extents[0].dst_stride = int64_t{1} << width;
  extents[0].src_stride = copy ? extents[0].dst_stride : 0;
  add_task(pair, operation, width, width, src, dst, extents[0].size, extents, rank, /*dense=*/rank == 1);
}

void LaunchPlanner::add_cast(int64_t pair, const TensorView& destination, const TensorView& source, Extent* extents,
                             int rank) {
  const int src_item = info(source.dtype).size;
  const int dst_item = info(destination.dtype).size;
  if (source.address % src_item != 0 || destination.address % dst_item != 0) {
    throw InvalidInput(pair, std::string("a cast from ") + dtype_name(source.dtype) + " to " +
                                 dtype_name(destination.dtype) +
                                 " needs addresses that are multiples of the element size: pass an aligned tensor");
  }
  rank = merge_extents(extents, rank);
  if (rank > kMaxDimensions) fail_too_many_dimensions(pair, rank);
  if (rank == 0) extents[rank++] = {1, src_item, dst_item};
  const bool side_by_side = extents[0].src_stride == src_item && extents[0].dst_stride == dst_item;
  int width = 0;
  if (side_by_side) {
    const int src_unit = src_item << kCastWidth;
    const int dst_unit = dst_item << kCastWidth;
    const auto aligned = [](uint64_t bits, int unit) { return bits % std::min(unit, 1 << kMaxUnitLog2) == 0; };
    bool whole_units = extents[0].size % (1 << kCastWidth) == 0 && aligned(source.address, src_unit) &&
                       aligned(destination.address, dst_unit);
    for (int d = 1; d < rank; ++d) {
      whole_units &= aligned(extents[d].src_stride, src_unit) && aligned(extents[d].dst_stride, dst_unit);
    }
    width = whole_units ? kCastWidth : 0;
    extents[0] = {extents[0].size >> width, int64_t{src_item} << width, int64_t{dst_item} << width};
  }
  const int larger_log2 = std::max(castable_size_log2(static_cast<int>(source.dtype)),
                                   castable_size_log2(static_cast<int>(destination.dtype)));
  add_task(pair, cast_operation(source.dtype, destination.dtype), width, width + larger_log2, source.address,
           destination.address, extents[0].size, extents, rank, side_by_side && rank == 1);
}

void LaunchPlanner::add_task(int64_t pair, Operation operation, int width, int unit_log2, uint64_t src, uint64_t dst,
                             uint64_t columns, const Extent* extents, int rank, bool dense) {
  PlannedTask& planned = tasks_.emplace_back();
  planned.pair = pair;
  planned.task = {src, dst, columns, 0, 0, operation, static_cast<uint8_t>(width)};
  planned.unit_log2 = unit_log2;
  planned.layout.rank = dense ? 0 : rank;
  std::copy_n(extents, dense ? 0 : rank, planned.layout.extents);
  uint64_t units = columns;
  for (int d = 1; d < rank; ++d) units *= extents[d].size;
  bytes_ += units << unit_log2;
  if (operation >= Operation::Cast) {
    const int to = (static_cast<int>(operation) - static_cast<int>(Operation::Cast)) % kCastableDTypes;
    planned.bytes = units << (width + castable_size_log2(to));
  } else if (operation == Operation::CopyRagged) {
    planned.bytes = units / columns * extents[0].size;
  } else {
    planned.bytes = units << width;
  }
}

// Decides what one warp does of the task and returns the number of its tiles.
uint64_t LaunchPlanner::shape_tiles(PlannedTask& planned, uint32_t tile_bytes) const {
  const uint64_t columns = planned.task.columns;
  const uint32_t full_columns = columns_per_full_tile(tile_bytes, planned.unit_log2);
  Layout& layout = planned.layout;
  if (layout.rank == 0) return divide_up(columns, full_columns);
  const bool several_rows = layout.rank > 1 && columns <= kWarpLanes / 2;
  layout.lanes_log2 = several_rows ? std::bit_width(columns - 1) : kWarpLanesLog2;
  layout.columns_per_tile = several_rows ? 1u << layout.lanes_log2 : full_columns;
  layout.rows_per_tile = several_rows ? full_columns >> layout.lanes_log2 : 1;
  const uint64_t column_tiles = divide_up(columns, layout.columns_per_tile);
  const uint64_t row_tiles = layout.rank > 1 ? divide_up(layout.extents[1].size, layout.rows_per_tile) : 1;
  layout.column_tiles = static_cast<uint32_t>(column_tiles);
  layout.row_tiles = static_cast<uint32_t>(row_tiles);
  __int128 tiles = static_cast<__int128>(column_tiles) * row_tiles;
  for (uint32_t d = 2; d < layout.rank; ++d) tiles = std::min<__int128>(tiles, kMaxTiles + 1) * layout.extents[d].size;
  return static_cast<uint64_t>(std::min<__int128>(tiles, kMaxTiles + 1));
}

std::span<const PlannedLaunch> LaunchPlanner::lay_out(DeviceType device) {
  const uint64_t spread = std::bit_floor(bytes_ / kManyTiles);
  const uint32_t tile_bytes = device == DeviceType::Cpu
                                  ? kCpuTileBytes
                                  : static_cast<uint32_t>(std::clamp<uint64_t>(spread, kMinTileBytes, kMaxTileBytes));
  size_t count = 0;
  for (size_t begin = 0; begin < tasks_.size();) {
    LaunchHeader header{0, 0, tile_bytes, 0};
    int words = kHeaderWords;
    size_t end = begin;
    for (; end < tasks_.size(); ++end) {
      PlannedTask& planned = tasks_[end];
      const int layout = planned.layout.rank > 0 ? layout_words(planned.layout.rank) : 0;
      const uint64_t tiles = shape_tiles(planned, tile_bytes);
      if (tiles > kMaxTiles) throw InvalidInput(planned.pair, "has more elements than one launch can copy: split it");
      if (words + kTaskWords + layout > kMaxLaunchWords || header.tiles + tiles > kMaxTiles) break;
      words += kTaskWords + layout;
      planned.task.first_tile = header.tiles;
      header.tiles += static_cast<uint32_t>(tiles);
      header.casts += planned.task.operation >= Operation::Cast;
    }
    header.tasks = static_cast<uint32_t>(end - begin);
    if (launches_.size() == count) launches_.emplace_back();
    PlannedLaunch& launch = launches_[count++];
    launch.used_words = words;
    std::memcpy(launch.params.words, &header, sizeof header);
    int layout_at = kHeaderWords + kTaskWords * static_cast<int>(header.tasks);
    uint64_t* task_at = launch.params.words + kHeaderWords;
    for (; begin < end; ++begin, task_at += kTaskWords) {
      PlannedTask& planned = tasks_[begin];
      if (const int rank = static_cast<int>(planned.layout.rank); rank > 0) {
        planned.task.layout = static_cast<uint16_t>(layout_at);
        std::memcpy(launch.params.words + layout_at, &planned.layout, layout_words(rank) * 8);
        layout_at += layout_words(rank);
      }
      std::memcpy(task_at, &planned.task, sizeof planned.task);
    }
  }
  return {launches_.data(), count};
}

std::pair<std::string, uint64_t> LaunchPlanner::path(int64_t pair) const {
  std::string text;
  uint64_t bytes = 0;
  for (const PlannedTask& planned : tasks_) {
    if (planned.pair != pair) continue;
    const Operation operation = planned.task.operation;
    const std::string unit = std::to_string(1 << planned.task.width);
    if (!text.empty()) text += " + ";
    if (operation >= Operation::Cast) {
      text += "cast by " + unit;
    } else if (operation == Operation::Fill || operation == Operation::Fill16) {
      text += "fill by " + unit + " B";
    } else {
      text += "copy by " + unit + " B";
    }
    if (operation == Operation::CopyRagged) text += ", cut at both ends";
    if (planned.layout.rank > 1) text += ", strided rows";
    bytes += planned.bytes;
  }
  return {text.empty() ? "nothing to do" : text, bytes};
}

}  // namespace fused_copy
