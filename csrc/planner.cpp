#include "planner.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fused_copy {
namespace {

constexpr int64_t kTooManyBytes = INT64_MAX;
constexpr size_t kMaxDimensions = 4;  // after merging
constexpr int kMaxUnitLog2 = 4;       // 16 bytes: the widest access of a GPU up to sm_90
constexpr __int128 kTooManyTiles = __int128{1} << 31;

// A warp takes as little as two accesses of its lanes while that spreads the work over the GPU, and as much as four
// once there is plenty, if the accesses are 16 bytes wide.
constexpr int kMinTileBytesLog2 = 10;
constexpr int kMaxTileBytesLog2 = 11;
constexpr uint64_t kManyTiles = 512;
// Of shorter rows, a warp takes several at once, which is not plain.
constexpr uint64_t kMinPlainColumns = kWarpLanes / 2 + 1;
// walk_plain_lane() reads rows' strides as 32 bits.
constexpr bool is_plain_stride(int64_t stride) { return stride == static_cast<uint32_t>(stride); }
// On the CPU a tile is a memcpy.
constexpr int kCpuTileBytesLog2 = 16;

// Shorter rows gain less from wide accesses than the launch loses by no longer being plain.
constexpr int64_t kMinRaggedRowBytes = 4096;

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

bool holds_memory(const Device& device) { return device.type <= DeviceType::Cuda; }

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
  // The fewest digits that read back as the number.
  for (int digits = 15; digits <= 17; ++digits) {
    std::snprintf(text.data(), text.size(), "%.*g", digits, number);
    if (std::strtod(text.data(), nullptr) == number) break;
  }
  return text.data();
}

bool is_empty(const TensorView& view) {
  return std::any_of(view.sizes, view.sizes + view.rank, [](int64_t size) { return size == 0; });
}

bool has_none(const TensorView& view, int64_t d) { return view.sizes[d] <= 0 || view.strides[d] < 0; }

// byte_extent() of a tensor that dimension `d` makes too large. Apart from it, so that it is inlined.
[[gnu::noinline, gnu::cold]] int64_t huge_extent(const TensorView& view, int64_t d) {
  while (++d < view.rank) {
    if (has_none(view, d)) return 0;
  }
  return kTooManyBytes;
}

// Names what check_tensor() found wrong. Apart from it, so that a call that is right does not fetch the code.
[[noreturn, gnu::noinline, gnu::cold]] void refuse_tensor(int64_t pair, const char* role, const TensorView& view) {
  const auto fail = [&](const std::string& text) { throw InvalidInput(pair, std::string(role) + " " + text); };
  if (!view.strided) fail("is not a strided tensor (sparse, quantized or nested): pass a dense, strided one");
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
  if (!holds_memory(view.device)) fail("is on " + device_name(view.device) + ": expected a CPU or CUDA tensor");
  if (view.rank > kMaxRank) {
    fail("has " + std::to_string(view.rank) + " dimensions: expected at most " + std::to_string(kMaxRank));
  }
  for (int64_t d = 0; d < view.rank; ++d) {
    if (view.sizes[d] < 0 || view.strides[d] < 0) {
      fail("has a negative size or stride: shape " + shape_of(view) + ", strides " + strides_of(view));
    }
  }
  const int64_t there = view.address == 0 ? 0 : std::max<int64_t>(view.storage_bytes, 0);
  fail("of shape " + shape_of(view) + " and strides " + strides_of(view) + " needs " +
       std::to_string(byte_extent(view)) + " bytes of storage but " + std::to_string(there) +
       " are there: it was freed or resized");
  __builtin_unreachable();
}

// The bytes from a tensor's first element to the end of its last. Checks all that one tensor alone can get wrong.
int64_t check_tensor(int64_t pair, const char* role, const TensorView& view) {
  const bool plain = view.strided & (view.dtype != DType::Unsupported) & !view.requires_grad & !view.inference &
                     holds_memory(view.device) & (view.rank <= kMaxRank);
  const int64_t bytes = byte_extent(view);
  if (bytes > 0) {
    const bool stored = view.address != 0 && bytes <= view.storage_bytes && bytes != kTooManyBytes &&
                        view.address + static_cast<uint64_t>(bytes) >= view.address;
    if (!plain || !stored) refuse_tensor(pair, role, view);
    return bytes;
  }
  const auto negative = [](int64_t number) { return number < 0; };
  if (!plain || std::any_of(view.sizes, view.sizes + view.rank, negative) ||
      std::any_of(view.strides, view.strides + view.rank, negative)) {
    refuse_tensor(pair, role, view);
  }
  return 0;
}

void check_lazy(int64_t pair, const char* role, const TensorView& view) {
  if (!view.lazy) return;
  throw InvalidInput(pair,
                     std::string(role) +
                         " has its conjugate or negative bit set, so its memory does not hold its values: pass "
                         "resolve_conj() and resolve_neg() of it",
                     /*torch_can=*/true);
}

// Runs one check, or a pair's, after which the others are still made where torch's operators could do without it.
template <class Check>
void check_or_defer(Deferred& deferred, Check check) {
  try {
    check();
  } catch (const InvalidInput& error) {
    if (!error.torch_can) throw;
    if (!deferred) deferred.emplace(error);
  }
}

// How an error says that tensors overlap, or that the search was given up.
std::string verb(Shared shared, const char* known) { return shared == Shared::Yes ? known : "may share"; }
const char* doubt(Shared shared) {
  return shared == Shared::Yes ? "" : " (it could not be shown that they do not overlap: their strides do not nest)";
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

// A box of memory in a source and in a destination, as the extents that cover it: from the fastest varying in the
// destination, with neighbours that step as one merged.
class Box {
 public:
  // Adds the next dimension, of at least two elements. It may vary faster than those that are there.
  void add(int64_t size, int64_t src_stride, int64_t dst_stride) {
    if (rank_ > 0) {
      Extent& inner = extents_[rank_ - 1];
      if (dst_stride == inner.size * inner.dst_stride && src_stride == inner.size * inner.src_stride) {
        inner.size *= size;
        return;
      }
      ordered_ &= inner.dst_stride <= dst_stride;
    }
    extents_[rank_++] = {size, src_stride, dst_stride};
  }

  std::span<Extent> extents() {
    if (!ordered_) order();
    return {extents_.data(), rank_};
  }

 private:
  void order() {
    std::ranges::sort(std::span(extents_).first(rank_), {}, &Extent::dst_stride);
    ordered_ = true;
    for (size_t i = 0, count = std::exchange(rank_, 0); i < count; ++i) {
      const auto [size, src_stride, dst_stride] = extents_[i];
      add(size, src_stride, dst_stride);
    }
  }

  std::array<Extent, kMaxRank + 1> extents_;
  size_t rank_ = 0;
  bool ordered_ = true;
};

void check_dimensions(int64_t pair, size_t dimensions) {
  if (dimensions <= kMaxDimensions) return;
  throw InvalidInput(pair,
                     "source and destination need " + std::to_string(dimensions) +
                         " dimensions after merging those that can be merged: expected at most " +
                         std::to_string(kMaxDimensions) + "; make the source contiguous or split the copy",
                     /*torch_can=*/true);
}

int trailing_zeros(uint64_t bits) { return std::min(std::countr_zero(bits), kMaxUnitLog2); }

uint64_t divide_up_log2(uint64_t value, int log2) { return ((value - 1) >> log2) + 1; }

// What divide() needs.
struct Divisor {
  uint32_t multiplier;
  uint8_t shift;
};

Divisor divisor(uint64_t value) {
  const int shift = std::bit_width(value - 1);
  return {static_cast<uint32_t>((((uint64_t{1} << shift) - value) << 32) / value + 1), static_cast<uint8_t>(shift)};
}

// The entries above the first tiles themselves.
struct Levels {
  int count;
  int entries_above;
};

constexpr Levels levels_of(int tasks) {
  Levels levels{1, 0};
  for (uint32_t shift = kLevelShift; tasks > 1 << shift; shift += kLevelShift) {
    ++levels.count;
    levels.entries_above += static_cast<int>(level_entries(tasks, shift));
  }
  return levels;
}

constexpr int first_tiles_words(int tasks) {
  return (levels_of(tasks).entries_above + static_cast<int>(level_entries(tasks, 0))) / 2;
}

constexpr int launch_words(int first_tiles_words, int tasks, int strided, int outer_extents) {
  return kHeaderWords + first_tiles_words + strided * kStridedTaskWords + (tasks - strided) * kTaskWords +
         kWordsReadBeyond + outer_extents * kExtentWords;
}

}  // namespace

const char* dtype_name(DType dtype) { return info(dtype).name; }
int dtype_size(DType dtype) { return info(dtype).size; }

DType dtype_of_name(std::string_view name) {
  const auto found = std::ranges::find(kDTypes, name, &DTypeInfo::name);
  return found == kDTypes.end() ? DType::Unsupported : static_cast<DType>(found - kDTypes.begin());
}

int64_t byte_extent(const TensorView& view) {
  // An element has up to 16 bytes, and the product of a dimension's size and stride up to twice what it spans.
  constexpr int64_t most = kTooManyBytes / 32;
  int64_t elements = 1;
  for (int64_t d = 0; d < view.rank; ++d) {
    if (has_none(view, d)) return 0;
    int64_t step;
    if (__builtin_mul_overflow(view.sizes[d] - 1, view.strides[d], &step) || step > most - elements) {
      return huge_extent(view, d);
    }
    elements += step;
  }
  return elements * info(view.dtype).size;
}

std::string device_name(const Device& device) {
  switch (device.type) {
    case DeviceType::Cpu: return "cpu";
    case DeviceType::Cuda: return "cuda:" + std::to_string(device.index);
    case DeviceType::Meta: return "meta";
    default: return "an unsupported device";
  }
}

namespace {

[[noreturn, gnu::noinline, gnu::cold]] void refuse_fill(int64_t pair, double number, const TensorView& view) {
  const std::string dtype = dtype_name(view.dtype);
  const bool real = view.dtype >= DType::Float16 && view.dtype <= DType::Float64;
  throw InvalidInput(
      pair, "fill " + number_text(number) + " cannot be held exactly by the destination's " + dtype +
                ": pass a number that it can hold" +
                (real ? ", such as float(torch.tensor(" + number_text(number) + ", dtype=torch." + dtype + "))" : ""));
}

void check_shapes(int64_t pair, const TensorView& destination, const TensorView& source) {
  if (source.rank != destination.rank) {
    throw InvalidInput(pair, "source has shape " + shape_of(source) + " but the destination has shape " +
                                 shape_of(destination) + ": expected " + std::to_string(destination.rank) +
                                 " dimensions, got " + std::to_string(source.rank) + " (there is no broadcasting)");
  }
  for (int64_t d = 0; d < source.rank; ++d) {
    if (source.sizes[d] <= destination.sizes[d]) continue;
    throw InvalidInput(pair, "source has shape " + shape_of(source) + ", larger in dimension " + std::to_string(d) +
                                 " than the destination's " + shape_of(destination) +
                                 ": expected at most the destination's size in every dimension (destinations come "
                                 "first: replay(dst, src))");
  }
}

void check_devices_and_dtypes(int64_t pair, const TensorView& destination, const TensorView& source) {
  check_lazy(pair, "source", source);
  if (source.device != destination.device && !source.pinned) {
    const bool pageable = source.device.type == DeviceType::Cpu && destination.device.type == DeviceType::Cuda;
    throw InvalidInput(
        pair,
        "source is on " + device_name(source.device) + " but the destination is on " + device_name(destination.device) +
            (pageable ? ": pin it (tensor.pin_memory()) or move it to the GPU first" : ": pass tensors of one device"),
        /*torch_can=*/true);
  }
  if (source.dtype != destination.dtype && !(castable(source.dtype) && castable(destination.dtype))) {
    throw InvalidInput(pair,
                       std::string("source is ") + dtype_name(source.dtype) + " but the destination is " +
                           dtype_name(destination.dtype) +
                           ": pass the same dtype, or two among bool, uint8, int8, int16, int32, int64, float16, "
                           "bfloat16, float32 and float64",
                       /*torch_can=*/true);
  }
}

}  // namespace

void Destinations::bind(std::span<const TensorView> views, const std::vector<Fill>* fills) {
  if (fills != nullptr && fills->size() != views.size()) {
    throw InvalidInput(-1, "got " + std::to_string(fills->size()) + " fills for " + std::to_string(views.size()) +
                               " destinations: pass one number or None for each destination");
  }
  views_.assign(views.begin(), views.end());
  fills_.clear();
  if (fills != nullptr) fills_ = *fills;
  index_.clear();
  deferred_.reset();
  device_ = views.empty() ? Device{} : views[0].device;
  for (size_t i = 0; i < views.size(); ++i) {
    const auto pair = static_cast<int64_t>(i);
    const TensorView& view = views[i];
    const int64_t bytes = check_tensor(pair, "destination", view);
    if (!fills_.empty() && fills_[i] && !encode_exactly(*fills_[i], view.dtype)) refuse_fill(pair, *fills_[i], view);
    check_or_defer(deferred_, [&] {
      check_lazy(pair, "destination", view);
      if (view.device == device_) return;
      throw InvalidInput(pair,
                         "destination is on " + device_name(view.device) + " but destination 0 is on " +
                             device_name(device_) + ": pass destinations of one device",
                         /*torch_can=*/true);
    });
    if (bytes == 0) continue;
    if (const Shared shared = shares_own_elements(view); shared != Shared::No) {
      throw InvalidInput(pair, "destination of shape " + shape_of(view) + " and strides " + strides_of(view) +
                                   " has elements that " + verb(shared, "share") + " memory" +
                                   (shared == Shared::Yes ? " (an expanded or overlapping view)" : doubt(shared)) +
                                   ": pass one in which every element has its own");
    }
    index_.add(pair, view.address, view.address + static_cast<uint64_t>(bytes));
  }
  check_or_defer(deferred_, [&] {
    const auto [shared, one, other] = index_.order(views_);
    if (shared == Shared::No) return;
    throw InvalidInput(std::max(one, other),
                       "destination " + verb(shared, "shares") + " memory with the destination of pair " +
                           std::to_string(std::min(one, other)) + doubt(shared) +
                           ": the copies of one call have no order, so destinations must not overlap",
                       /*torch_can=*/true);
  });
}

size_t Destinations::capacity_bytes() const { return bytes_of(views_) + bytes_of(fills_) + index_.capacity_bytes(); }

bool Destinations::check_source_overlap(int64_t pair, const TensorView& source, int64_t source_bytes,
                                        size_t& gap) const {
  if (index_.is_free(source.address, source.address + static_cast<uint64_t>(source_bytes), gap)) return false;
  const TensorView& destination = views_[pair];
  bool same_memory = source.address == destination.address && source.dtype == destination.dtype;
  for (int64_t d = 0; same_memory && d < source.rank; ++d) {
    same_memory = source.sizes[d] == 1 || source.strides[d] == destination.strides[d];
  }
  // What lies within its own destination shares nothing with others, which that does not overlap.
  if (same_memory) return true;
  const auto [shared, other, _] = index_.find(source, views_);
  if (shared != Shared::No) {
    throw InvalidInput(pair,
                       "source " + verb(shared, "shares") + " memory with the destination" +
                           (other == pair ? std::string() : " of pair " + std::to_string(other)) + doubt(shared) +
                           ": the copies of one call have no order, so a source may not overlap a destination "
                           "unless it is the very same memory; pass a clone",
                       /*torch_can=*/true);
  }
  return false;
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
  deferred_ = destinations.deferred();
  size_t gap = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const auto pair = static_cast<int64_t>(i);
    const TensorView& source = sources[i];
    const TensorView& destination = views[i];
    const int64_t source_bytes = check_tensor(pair, "source", source);
    check_shapes(pair, destination, source);
    check_or_defer(deferred_, [&] {
      check_devices_and_dtypes(pair, destination, source);
      if (source_bytes > 0 && !destinations.check_source_overlap(pair, source, source_bytes, gap)) {
        add_copy(pair, destination, source);
      }
      if (const Fill& fill = destinations.fill(i)) add_fill(pair, destination, source, *fill);
    });
  }
  if (deferred_) throw InvalidInput(*deferred_);
  return lay_out(destinations.device().type);
}

void LaunchPlanner::add_copy(int64_t pair, const TensorView& destination, const TensorView& source) {
  const int src_item = info(source.dtype).size;
  const int dst_item = info(destination.dtype).size;
  const bool cast = source.dtype != destination.dtype;
  Box box;
  int64_t d = source.rank;
  if (!cast) {
    // The dimensions that lie side by side on both sides are one run of bytes, most often all of them.
    int64_t run = src_item;
    for (; d > 0; --d) {
      if (source.sizes[d - 1] == 1) continue;
      if (source.strides[d - 1] * src_item != run || destination.strides[d - 1] * src_item != run) break;
      run *= source.sizes[d - 1];
    }
    box.add(run, 1, 1);
  }
  while (d-- > 0) {
    if (source.sizes[d] > 1) box.add(source.sizes[d], source.strides[d] * src_item, destination.strides[d] * dst_item);
  }
  if (cast) {
    add_cast(pair, destination, source, box.extents());
  } else {
    add_bytes(pair, Operation::Copy, src_item, source.address, destination.address, box.extents());
  }
}

// The destination less its corner is a box for each dimension: there everything from the corner's edge on, within the
// corner in the dimensions before it, whole in those after it.
void LaunchPlanner::add_fill(int64_t pair, const TensorView& destination, const TensorView& source, double value) {
  if (is_empty(destination)) return;
  const int item = info(destination.dtype).size;
  const uint64_t pattern = fill_pattern(*encode_exactly(value, destination.dtype), destination.dtype);
  for (int64_t edge = 0; edge < destination.rank; ++edge) {
    Box box;
    bool empty = false;
    box.add(item, 0, 1);
    for (int64_t d = destination.rank; d-- > 0;) {
      const int64_t size = d < edge   ? source.sizes[d]
                           : d > edge ? destination.sizes[d]
                                      : destination.sizes[d] - source.sizes[d];
      empty |= size == 0;
      if (size > 1) box.add(size, 0, destination.strides[d] * item);
    }
    if (empty) continue;
    const uint64_t begin =
        destination.address + static_cast<uint64_t>(source.sizes[edge] * destination.strides[edge]) * item;
    add_bytes(pair, item == 16 ? Operation::Fill16 : Operation::Fill, item, pattern, begin, box.extents());
  }
}

// Inlined, as a call with so many arguments would be a tenth of a pair.
[[gnu::always_inline]] inline void LaunchPlanner::add_task(int64_t pair, Operation operation, int width, int unit_log2,
                                                           uint64_t src, uint64_t dst, uint64_t columns,
                                                           std::span<const Extent> extents, bool dense) {
  PlannedTask& planned = tasks_.emplace_back();
  planned.task = {src, dst, 0, 0, 0, {operation, static_cast<uint8_t>(width), kWarpLanesLog2, 0}};
  planned.pair = pair;
  planned.columns = columns;
  planned.unit_log2 = unit_log2;
  planned.rank = dense ? 0 : static_cast<int>(extents.size());
  planned.kind = operation < Operation::Cast ? LaunchKind::Plain
                 : is_direct_cast(operation) ? LaunchKind::PlainCasting
                                             : LaunchKind::Casting;
  uint64_t units = columns;
  if (!dense) {
    std::copy(extents.begin(), extents.end(), planned.extents.begin());
    for (const Extent& outer : extents.subspan(1)) units *= outer.size;
    const UnitLog2 unit = fused_copy::unit_log2(planned.task.code);
    const bool copies = operation != Operation::Fill && operation != Operation::Fill16;
    const bool side_by_side = operation != Operation::CopyRagged && extents[0].dst_stride == 1 << unit.dst &&
                              (!copies || extents[0].src_stride == 1 << unit.src);
    const bool plain = side_by_side && planned.rank == kInnerExtents && columns >= kMinPlainColumns &&
                       is_plain_stride(extents[1].src_stride) && is_plain_stride(extents[1].dst_stride);
    if (!plain) planned.kind = planned.kind | LaunchKind::General;
  }
  bytes_ += units << unit_log2;
}

// Adds a box whose extents count bytes, the first being the bytes of one element.
void LaunchPlanner::add_bytes(int64_t pair, Operation operation, int item_bytes, uint64_t src, uint64_t dst,
                              std::span<Extent> extents) {
  const bool copy = operation == Operation::Copy;
  const size_t rank = extents.size();
  const bool elements_apart = rank > 1 && extents[0].size == item_bytes;
  check_dimensions(pair, rank - elements_apart);

  const int64_t row_bytes = extents[0].size;
  uint64_t addresses = dst | (copy ? src : 0);
  uint64_t phases = copy ? src - dst : 0;
  for (size_t d = 1; d < rank; ++d) {
    addresses |= extents[d].dst_stride | extents[d].src_stride;
    phases |= extents[d].dst_stride - extents[d].src_stride;
  }
  int width = trailing_zeros(addresses | row_bytes);
  if (copy && row_bytes >= kMinRaggedRowBytes && trailing_zeros(phases) > width) {
    width = trailing_zeros(phases);
    // A row that begins in the middle of a unit touches one more than it would fill.
    const uint64_t columns = divide_up_log2(row_bytes - 1, width) + 1;
    extents[0].src_stride = extents[0].dst_stride = int64_t{1} << width;
    add_task(pair, Operation::CopyRagged, width, width, src, dst, columns, extents, /*dense=*/false);
    return;
  }
  if (rank > 1 && row_bytes == int64_t{1} << width) {
    const uint64_t columns = extents[1].size;
    add_task(pair, operation, width, width, src, dst, columns, extents.subspan(1), /*dense=*/false);
    return;
  }
  extents[0].size = row_bytes >> width;
  extents[0].dst_stride = int64_t{1} << width;
  extents[0].src_stride = copy ? extents[0].dst_stride : 0;
  add_task(pair, operation, width, width, src, dst, extents[0].size, extents, /*dense=*/rank == 1);
}

void LaunchPlanner::add_cast(int64_t pair, const TensorView& destination, const TensorView& source,
                             std::span<Extent> extents) {
  const int src_item = info(source.dtype).size;
  const int dst_item = info(destination.dtype).size;
  if (source.address % src_item != 0 || destination.address % dst_item != 0) {
    throw InvalidInput(pair, std::string("a cast from ") + dtype_name(source.dtype) + " to " +
                                 dtype_name(destination.dtype) +
                                 " needs addresses that are multiples of the element size: pass an aligned tensor");
  }
  check_dimensions(pair, extents.size());
  Extent one_element{1, src_item, dst_item};
  if (extents.empty()) extents = {&one_element, 1};
  const bool side_by_side = extents[0].src_stride == src_item && extents[0].dst_stride == dst_item;
  const int larger_log2 = std::max(castable_size_log2(static_cast<int>(source.dtype)),
                                   castable_size_log2(static_cast<int>(destination.dtype)));
  int width = 0;
  if (side_by_side) {
    // Units of which the larger is one access, so that the accesses of a warp leave no gaps.
    const int wide = std::min(kMaxCastWidth, kMaxUnitLog2 - larger_log2);
    const int src_unit = src_item << wide;
    const int dst_unit = dst_item << wide;
    const auto aligned = [](uint64_t bits, int unit) { return bits % std::min(unit, 1 << kMaxUnitLog2) == 0; };
    bool whole_units = extents[0].size % (1 << wide) == 0 && aligned(source.address, src_unit) &&
                       aligned(destination.address, dst_unit);
    for (const Extent& outer : extents.subspan(1)) {
      whole_units &= aligned(outer.src_stride, src_unit) && aligned(outer.dst_stride, dst_unit);
    }
    width = whole_units ? wide : 0;
    extents[0] = {extents[0].size >> width, int64_t{src_item} << width, int64_t{dst_item} << width};
  }
  add_task(pair, cast_operation(source.dtype, destination.dtype), width, width + larger_log2, source.address,
           destination.address, extents[0].size, extents, side_by_side && extents.size() == 1);
}

// Decides what one warp does of the task and returns the number of its tiles.
uint64_t LaunchPlanner::shape_tiles(PlannedTask& planned, int tile_bytes_log2, DeviceType device) {
  Task& task = planned.task;
  int full_columns_log2 = tile_bytes_log2 - planned.unit_log2;
  if (device == DeviceType::Cuda) {
    full_columns_log2 = std::clamp(full_columns_log2, kWarpLanesLog2,
                                   std::countr_zero<unsigned>(kWarpLanes * max_lane_units(1 << planned.unit_log2)));
  }
  int columns_log2 = full_columns_log2;
  planned.tile_rows = 1;
  if (planned.rank > 1 && planned.columns < kMinPlainColumns) {
    columns_log2 = std::bit_width(planned.columns - 1);
    task.code.lanes_log2 = static_cast<uint8_t>(columns_log2);
    planned.tile_rows = 1u << (full_columns_log2 - columns_log2);
  }
  const uint64_t column_tiles = divide_up_log2(planned.columns, columns_log2);
  task.tile_columns = 1u << columns_log2;
  task.last_columns = static_cast<uint32_t>(planned.columns - ((column_tiles - 1) << columns_log2));
  task.column_tiles = static_cast<uint32_t>(column_tiles);
  if (planned.rank < kInnerExtents) return column_tiles;
  planned.row_tiles = divide_up_log2(planned.extents[1].size, full_columns_log2 - columns_log2);
  __int128 tiles = static_cast<__int128>(column_tiles) * planned.row_tiles;
  for (int d = kInnerExtents; d < planned.rank; ++d) tiles = std::min(tiles, kTooManyTiles) * planned.extents[d].size;
  return static_cast<uint64_t>(std::min(tiles, kTooManyTiles));
}

std::span<const PlannedLaunch> LaunchPlanner::lay_out(DeviceType device) {
  const int spread_log2 = std::bit_width(bytes_ / kManyTiles) - 1;
  const int tile_bytes_log2 =
      device == DeviceType::Cpu ? kCpuTileBytesLog2 : std::clamp(spread_log2, kMinTileBytesLog2, kMaxTileBytesLog2);
  size_t launches = 0;
  for (size_t begin = 0; begin < tasks_.size();) {
    LaunchHeader header{};
    int outer_extents = 0;
    int words = kHeaderWords;
    int first_tiles = 0;
    size_t end = begin;
    for (; end < tasks_.size(); ++end) {
      PlannedTask& planned = tasks_[end];
      const uint64_t tiles = shape_tiles(planned, tile_bytes_log2, device);
      if (tiles >= kTooManyTiles) {
        throw InvalidInput(planned.pair, "has more elements than one launch can copy: split it", /*torch_can=*/true);
      }
      const int strided = header.strided + (planned.rank > 0);
      const int outer = outer_extents + std::max(planned.rank - kInnerExtents, 0);
      const bool entry_is_left = header.tasks % kSearchRadix > 0;
      const int numbers = entry_is_left ? first_tiles : first_tiles_words(header.tasks + 1);
      const int needed = launch_words(numbers, header.tasks + 1, strided, outer);
      if (needed > kMaxLaunchWords || header.tiles + tiles >= kTooManyTiles) break;
      words = needed;
      first_tiles = numbers;
      outer_extents = outer;
      planned.tiles = static_cast<uint32_t>(tiles);
      header.tiles += planned.tiles;
      header.tasks += 1;
      header.strided = static_cast<uint16_t>(strided);
      header.kind = header.kind | planned.kind;
    }
    header.strided_at = static_cast<uint16_t>(kHeaderWords + first_tiles);
    const Levels levels = levels_of(header.tasks);
    header.levels = static_cast<uint8_t>(levels.count);
    header.first_tiles_at = static_cast<uint16_t>(levels.entries_above);
    if (launches_.size() == launches) launches_.emplace_back();
    PlannedLaunch& launch = launches_[launches++];
    launch.used_words = words;
    write_launch(header, {tasks_.data() + begin, end - begin}, words - kExtentWords * outer_extents,
                 launch.params.words);
    begin = end;
  }
  return {launches_.data(), launches};
}

// Lays the tasks out as the kernel reads them; the outer extents begin at word `outer_at`.
void LaunchPlanner::write_launch(const LaunchHeader& header, std::span<const PlannedTask> tasks, int outer_at,
                                 uint64_t* words) {
  std::memcpy(words, &header, sizeof header);
  uint32_t* const first_tiles = reinterpret_cast<uint32_t*>(words + kHeaderWords) + header.first_tiles_at;
  uint32_t* first_tile = first_tiles;
  uint64_t* strided_at = words + header.strided_at;
  uint64_t* dense_at = strided_at + kStridedTaskWords * header.strided;
  uint32_t tiles = 0;
  if (header.strided > 0) {
    for (const PlannedTask& planned : tasks) {
      if (planned.rank == 0) continue;
      *first_tile++ = tiles;
      tiles += planned.tiles;
      const StridedTask strided = strided_task(planned, outer_at);
      std::memcpy(strided_at, &strided, sizeof strided);
      strided_at += kStridedTaskWords;
      const auto outer = std::span(planned.extents).first(planned.rank).subspan(std::min(planned.rank, kInnerExtents));
      std::memcpy(words + outer_at, outer.data(), outer.size_bytes());
      outer_at += static_cast<int>(outer.size()) * kExtentWords;
    }
  }
  for (const PlannedTask& planned : tasks) {
    if (planned.rank > 0) continue;
    *first_tile++ = tiles;
    tiles += planned.tiles;
    std::memcpy(dense_at, &planned.task, sizeof planned.task);
    dense_at += kTaskWords;
  }
  std::fill(first_tile, reinterpret_cast<uint32_t*>(words + header.strided_at), kNoTile);
  uint32_t* below = first_tiles;
  for (uint32_t shift = kLevelShift; header.tasks > 1 << shift; shift += kLevelShift) {
    const uint32_t entries = level_entries(header.tasks, shift);
    uint32_t* const level = below - entries;
    for (uint32_t i = 0; i < entries; ++i) {
      const uint32_t at = i * kSearchRadix;
      level[i] = at < level_entries(header.tasks, shift - kLevelShift) ? below[at] : kNoTile;
    }
    below = level;
  }
}

StridedTask LaunchPlanner::strided_task(const PlannedTask& planned, int outer_at) {
  const Extent& columns = planned.extents[0];
  StridedTask strided{
      .task = planned.task,
      .tile_rows = 1,
      .last_rows = 1,
      .row_tiles = 1,
      .src_column_stride = columns.src_stride,
      .dst_column_stride = columns.dst_stride,
      .row_bytes = columns.size,
  };
  const Divisor column_tiles = divisor(planned.task.column_tiles);
  strided.column_tiles_multiplier = column_tiles.multiplier;
  strided.task.code.column_tiles_shift = column_tiles.shift;
  if (planned.rank >= kInnerExtents) {
    const Extent& rows = planned.extents[1];
    strided.src_row_stride = rows.src_stride;
    strided.dst_row_stride = rows.dst_stride;
    strided.tile_rows = planned.tile_rows;
    strided.row_tiles = static_cast<uint32_t>(planned.row_tiles);
    strided.last_rows = static_cast<uint32_t>(rows.size - (planned.row_tiles - 1) * planned.tile_rows);
    strided.outer = static_cast<uint16_t>(outer_at);
    strided.outer_extents = static_cast<uint8_t>(planned.rank - kInnerExtents);
  }
  const Divisor row_tiles = divisor(strided.row_tiles);
  strided.row_tiles_multiplier = row_tiles.multiplier;
  strided.row_tiles_shift = row_tiles.shift;
  return strided;
}

std::pair<std::string, uint64_t> LaunchPlanner::path(int64_t pair) const {
  std::string text;
  uint64_t bytes = 0;
  for (const PlannedTask& planned : std::ranges::equal_range(tasks_, pair, {}, &PlannedTask::pair)) {
    const Operation operation = planned.task.code.operation;
    const int width = planned.task.code.width;
    const std::string unit = std::to_string(1 << width);
    uint64_t rows = 1;
    for (int d = 1; d < planned.rank; ++d) rows *= planned.extents[d].size;
    if (!text.empty()) text += " + ";
    if (operation >= Operation::Cast) {
      bytes += rows * planned.columns << unit_log2(planned.task.code).dst;
      text += "cast by " + unit;
    } else {
      const bool ragged = operation == Operation::CopyRagged;
      bytes += ragged ? rows * planned.extents[0].size : rows * planned.columns << width;
      text += (operation == Operation::Copy || ragged ? "copy by " : "fill by ") + unit + " B";
      if (ragged) text += ", cut at both ends";
    }
    if (planned.rank > 1) text += ", strided rows";
  }
  return {text.empty() ? "nothing to do" : text, bytes};
}

}  // namespace fused_copy
