// Any metadata gives launches that write exactly what the contract says, or InvalidInput: never a crash.
//
// An input describes one call. Half of them place small tensors in two pretended arenas, where every byte that the
// launches read and write is compared with a reference that goes element by element, and where an error is demanded or
// forbidden by brute force. Nearly all others take any 64-bit number for a size, a stride, an address: there the tiles
// that are looked at must lie within their tensors. The rest are views of one buffer of many rows, where brute force
// tells which ones share a byte. No address is dereferenced but those of indices and lengths, which are real memory.
//
// With libFuzzer it is a fuzz target; with FUSED_COPY_FUZZ_MAIN it has a main of its own, which tries random inputs.

#include <sys/mman.h>

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
#include <optional>
#include <random>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "derived_tasks.h"
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

struct Derived {
  DerivedSource source;
  std::array<Tensor, std::size(kParts)> parts;  // where they are given and not by value
};

// Addresses from one to before another.
struct Interval {
  uint64_t begin;
  uint64_t end;
};

struct Case {
  std::vector<Tensor> dst;
  std::vector<Tensor> src;
  std::vector<Derived> derived;
  HostValues values;
  std::vector<Interval> readable;  // all parts of derived sources, in their order, none overlapping the next
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
  for (const auto& [source, parts] : call.derived) {
    std::fprintf(stderr, "  derived %lld: %s, number %lld\n", static_cast<long long>(source.pair),
                 source_name(source.derivation), static_cast<long long>(source.number));
    for (size_t k = 0; k < parts.size(); ++k) {
      const SourcePart& part = source.*kParts[k];
      if (part.given) print(part.by_value ? "  by value" : "  part", k, parts[k]);
    }
  }
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

Fill any_fill(Input& in, const Tensor& dst) {
  constexpr std::array kNumbers = {0.0,     1.0,    -1.0,     7.0,      0.5,     -1.75,   255.0, 256.0,
                                   -128.0,  448.0,  480.0,    57344.0,  65504.0, 65536.0, 2.0,   0x1p-9,
                                   0x1p-24, 0x1p63, 0x1p-127, 0x1p-128, 0x1p128, -0.0};
  const uint8_t pick = in.byte();
  if (pick < 128) return {};
  if (pick == 255) return std::bit_cast<double>(in.word());
  if (pick == 254) return std::nan("");
  if (pick == 253) return HUGE_VAL;
  if (pick >= (dst.sizes.size() == 1 ? 184 : 240)) return Fill::last();
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

// --- sources that are no tensors -------------------------------------------------------------------------------------

constexpr uint64_t kDstArena = 0x10000000;
constexpr uint64_t kSrcArena = 0x20000000;
constexpr uint64_t kArenaBytes = kSrcArena - kDstArena;
constexpr uint64_t kValuesArena = 0x30000000;  // what host values are said to have as addresses, wherever they lie

// The beginning of the destinations' arena is memory: indices and lengths lie among the destinations.
constexpr uint64_t kMemoryBytes = 1 << 24;

void map_memory() {
  static const void* const memory = mmap(reinterpret_cast<void*>(kDstArena), kMemoryBytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  if (memory != reinterpret_cast<void*>(kDstArena)) std::abort();
}

int64_t integer_at(const void* bytes, DType dtype) {
  const int unused = 64 - 8 * info(dtype).size;
  int64_t number = 0;
  std::memcpy(&number, bytes, static_cast<size_t>(info(dtype).size));
  if (dtype <= DType::UInt8) return number;
  return static_cast<int64_t>(static_cast<uint64_t>(number) << unused) >> unused;
}

int64_t integer_of(const Case& call, const SourcePart& part, int64_t at) {
  const uint64_t address = part.view.address + at * part.view.strides[0] * info(part.view.dtype).size;
  return integer_at(part.by_value ? call.values.bytes().data() + address : reinterpret_cast<const std::byte*>(address),
                    part.view.dtype);
}

bool host_sees(const SourcePart& part) {
  return part.by_value || (part.view.device.type == DeviceType::Cpu && !part.view.pinned);
}

const Derived* derived_of(const Case& call, size_t pair) {
  const auto found = std::ranges::lower_bound(call.derived, static_cast<int64_t>(pair), {},
                                              [](const Derived& derived) { return derived.source.pair; });
  return found != call.derived.end() && found->source.pair == static_cast<int64_t>(pair) ? &*found : nullptr;
}

constexpr std::array kIntegerDTypes = {DType::Int32, DType::Int64, DType::UInt8, DType::Int8, DType::Int16};

DType any_integer(Input& in) {
  const uint8_t pick = in.byte();
  if (pick < 200) return kIntegerDTypes[pick % 2];
  return pick < 248 ? kIntegerDTypes[pick % kIntegerDTypes.size()] : any_dtype(in);
}

// Which derivation stands for a pair's source: none for most.
std::optional<Derivation> any_derivation(Input& in) {
  const uint8_t pick = in.byte();
  if (pick < 128) return std::nullopt;
  if (pick < 192) return Derivation::Rows;
  return static_cast<Derivation>(pick % 5);
}

// Makes a source for the destination `dst`, which is there. `place(tensor, dtype, memory)` gives a tensor strides and
// an address, where real memory is asked for if there is some left. Tables have no more rows, nor columns of
// pages, than `longest`.
template <class Place>
void derive(Input& in, Case& call, const Tensor& dst, Derivation derivation, int64_t longest, Place place) {
  const auto pair = static_cast<int64_t>(&dst - call.dst.data());
  auto& [source, parts] = call.derived.emplace_back();
  source = {.pair = pair, .derivation = derivation};
  const auto up_to = [&](int64_t most) {
    const uint8_t pick = in.byte();
    if (pick >= 252 && most < INT64_MAX) return most + 1;
    return pick < 128 || most <= 0 ? most : most < 256 ? pick % (most + 1) : most - pick;
  };
  const auto give = [&](int number, std::vector<int64_t> sizes, DType dtype, bool memory,
                        bool by_value) -> SourcePart& {
    SourcePart& part = source.*kParts[number];
    Tensor& tensor = parts[number];
    tensor.sizes = std::move(sizes);
    if (in.rarely() && memory) tensor.sizes.push_back(1);
    part.given = true;
    if (by_value || !place(tensor, dtype, memory)) {
      call.values.add(part, tensor.sizes, dtype);
      tensor.strides.assign(part.view.strides, part.view.strides + part.view.rank);
      tensor.view = part.view;
    } else {
      any_flags(in, tensor.view);
      part.view = tensor.view;
    }
    return part;
  };
  // Mostly numbers from 0 to below `limit`, never above if the host would refuse that.
  const auto integers = [&](int number, int64_t count, int64_t limit, DType dtype, bool refused_above) {
    const uint8_t by_value = in.byte();
    SourcePart& part = give(number, {count}, dtype, true, by_value >= 128);
    const Tensor& tensor = parts[number];
    const int item = info(dtype).size;
    if (item == 0 || (tensor.view.address == 0 && !part.by_value)) return;
    std::minstd_rand random(static_cast<unsigned>(in.word()) | 1);
    const bool tame = refused_above && host_sees(part) && !in.rarely();
    const bool none = in.rarely();
    for (int64_t i = 0; i < tensor.sizes[0]; ++i) {
      const uint64_t pick = random() >> 3;
      int64_t value = limit > 0 ? static_cast<int64_t>(random()) % limit : 0;
      if (none || pick % 8 == 0 || limit <= 0) value = -1 - static_cast<int64_t>(pick % 3);
      if (pick % 32 == 1) value = INT64_MIN >> pick % 40;
      if (pick % 32 == 3 && !tame) value = (value & 0xFF) | int64_t{1} << (32 + pick % 30);
      if (pick % 16 == 2 && !tame) value = pick % 3 ? limit : INT64_MAX >> pick % 40;
      std::byte* const at =
          part.by_value ? call.values.at(part.view.address) : reinterpret_cast<std::byte*>(tensor.view.address);
      std::memcpy(at + i * tensor.view.strides[0] * item, &value, static_cast<size_t>(std::min(item, 8)));
    }
  };
  const auto index_dtype = [&] { return in.rarely() ? any_integer(in) : kIntegerDTypes[in.byte() % 2]; };
  std::vector<int64_t> sizes = dst.sizes;
  for (int64_t& size : sizes) size = up_to(size);
  switch (derivation) {
    case Derivation::Nothing: return;
    case Derivation::Values: {
      int64_t bytes = std::max(info(dst.view.dtype).size, 1);
      for (int64_t& size : sizes) {
        if (size < 0 || size > (1 << 16) / bytes) size = 1;
        bytes *= std::max<int64_t>(size, 1);
      }
      if (in.rarely()) sizes.push_back(1);
      const SourcePart& part = give(0, sizes, dst.view.dtype, false, true);
      std::minstd_rand random(static_cast<unsigned>(in.word()) | 1);
      for (int64_t k = 0; k < part.view.storage_bytes; ++k)
        call.values.at(part.view.address)[k] = static_cast<std::byte>(random() >> 8);
      return;
    }
    case Derivation::Plus: {
      if (in.rarely()) sizes.push_back(1);
      source.number = in.byte() % 4 == 0 ? 0 : static_cast<int64_t>(in.word()) >> in.byte() % 64;
      const bool by_value = in.byte() >= 192;
      int64_t elements = 1;
      for (int64_t& size : sizes) {
        if (by_value && (size < 0 || size > (1 << 12) / elements)) size = 1;
        if (by_value) elements *= std::max<int64_t>(size, 1);
      }
      give(0, sizes, any_integer(in), false, by_value);
      return;
    }
    case Derivation::Sums: {
      const int64_t most = sizes.empty() ? 1 : sizes[0] - 1;
      return integers(0, std::clamp<int64_t>(most, 0, 2000), 1 << in.byte() % 20, any_integer(in), false);
    }
    case Derivation::Rows: break;
  }
  const DType dtype = dst.view.dtype == DType::Int32 || dst.view.dtype == DType::Int64 ? any_integer(in)
                      : in.rarely()                                                    ? any_dtype(in)
                                                                                       : dst.view.dtype;
  const int64_t count = sizes.empty() ? 1 : std::clamp<int64_t>(sizes[0], 0, 1 << 11);
  const uint8_t pages = in.byte();
  source.number = pages < 160   ? 1
                  : pages < 250 ? 1 + pages % 16
                  : pages < 253 ? static_cast<int64_t>(in.word())
                                : -(pages % 2);
  if (!sizes.empty()) sizes[0] = in.rarely() ? std::min(static_cast<int64_t>(in.word() >> 20), longest) : in.byte() % 8;
  if (sizes.size() == 2 && source.number > 1)
    sizes[1] = __builtin_mul_overflow(sizes[1], source.number, &sizes[1]) ? longest : std::min(sizes[1], longest);
  if (sizes.size() == 2 && source.number > 1 && source.number <= 16) sizes[1] -= in.byte() % source.number;
  for (size_t d = 1; d < sizes.size(); ++d) sizes[d] = std::max<int64_t>(sizes[d], 0);
  if (in.rarely()) sizes.push_back(1);
  const int64_t rows = sizes.empty() ? 1 : sizes[0];
  const int64_t columns = sizes.size() < 2 ? 3 : std::min<int64_t>(sizes[1], 1 << 28);
  give(0, sizes, dtype, false, false);
  integers(1, count, rows, index_dtype(), true);
  const uint8_t lengths = in.byte();
  if (lengths < 96 || (sizes.size() < 2 && lengths < 250)) return;
  const bool by_row = lengths % 2;
  // As engines have it: a length for each of the table's rows, by the index of those.
  const bool of_table = by_row && rows <= 1 << 11 && in.byte() % 2;
  const int64_t of_rows = of_table ? rows + (in.rarely() ? 1 : 0)
                          : by_row ? in.byte() % 8
                                   : count + (in.rarely() ? 1 : 0);
  integers(2, of_rows, columns + 2, index_dtype(), false);
  if (of_table) {
    source.lengths_index = source.index;
    parts[3] = parts[1];
  } else if (by_row) {
    integers(3, count + (in.rarely() ? 1 : 0), of_rows, index_dtype(), true);
  }
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

bool is_misaligned(const TensorView& view) { return view.address % static_cast<uint64_t>(info(view.dtype).size) != 0; }

// What shape the destination's corner has, as far as the parts are right.
std::vector<int64_t> corner_of(const Case& call, size_t i) {
  const Derived* const derived = derived_of(call, i);
  if (!derived) return call.src[i].sizes;
  const DerivedSource& source = derived->source;
  if (source.derivation == Derivation::Sums) return {source.source.view.sizes[0] + 1};
  std::vector<int64_t> sizes = derived->parts[0].sizes;
  if (source.derivation != Derivation::Rows) return sizes;
  sizes[0] = source.index.view.sizes[0];
  if (sizes.size() == 2) sizes[1] = sizes[1] / source.number + (sizes[1] % source.number > 0);
  return sizes;
}

// Whether each part of a source alone is right.
bool parts_are_right(const Case& call, const Derived& derived) {
  const DerivedSource& source = derived.source;
  const TensorView& dst = call.dst[source.pair].view;
  for (const auto member : kParts) {
    const SourcePart& part = source.*member;
    if (!part.given || part.by_value) continue;
    if (!tensor_is_right(part.view) || (part.view.device != dst.device && !part.view.pinned)) return false;
  }
  const auto is_number = [](const TensorView& view) { return std::ranges::count(kIntegerDTypes, view.dtype) > 0; };
  const auto is_index = [](const TensorView& view) {
    return view.rank == 1 && (view.dtype == DType::Int32 || view.dtype == DType::Int64) &&
           (has_no_elements(view) || !is_misaligned(view));
  };
  const auto all_below = [&](const SourcePart& index, int64_t limit) {
    for (int64_t at = 0; host_sees(index) && at < index.view.sizes[0]; ++at) {
      if (integer_of(call, index, at) >= limit) return false;
    }
    return true;
  };
  const TensorView& view = source.source.view;
  switch (source.derivation) {
    case Derivation::Nothing:
    case Derivation::Values: return true;
    case Derivation::Plus: {
      const bool converts = source.number != 0 || view.dtype != dst.dtype;
      return is_number(view) && is_castable(dst.dtype) &&
             (!converts || has_no_elements(view) || !(is_misaligned(view) || is_misaligned(dst)));
    }
    case Derivation::Sums:
      return view.rank == 1 && view.sizes[0] < INT64_MAX && is_number(view) && is_number(dst) && !is_misaligned(view) &&
             !is_misaligned(dst);
    case Derivation::Rows: break;
  }
  const auto is_wide = [](DType dtype) { return dtype == DType::Int32 || dtype == DType::Int64; };
  const bool integers = is_wide(view.dtype) && is_wide(dst.dtype);
  const bool paged = source.number != 1;
  if (view.rank == 0 || !(view.dtype == dst.dtype || integers) || source.number < 1) return false;
  if (paged && !(integers && view.rank == 2)) return false;
  if (!is_index(source.index.view) || !all_below(source.index, view.sizes[0])) return false;
  bool empty = source.index.view.sizes[0] == 0;
  for (int64_t d = 1; d < view.rank; ++d) empty |= view.sizes[d] == 0;
  const bool by_item = paged || view.dtype != dst.dtype || rest_of(call, source.pair) == Rest::Last;
  if (by_item && !empty && (is_misaligned(view) || is_misaligned(dst))) return false;
  if (!source.lengths.given) return true;
  const SourcePart& counted = source.lengths_index.given ? source.lengths_index : source.lengths;
  return view.rank > 1 && is_index(source.lengths.view) && is_index(counted.view) &&
         counted.view.sizes[0] == source.index.view.sizes[0] &&
         (!source.lengths_index.given || all_below(counted, source.lengths.view.sizes[0]));
}

bool yields_a_last(const Case& call, size_t i) {
  const Derived* const derived = derived_of(call, i);
  if (derived && derived->source.derivation == Derivation::Nothing) return true;
  if (corner_of(call, i)[0] == 0) return false;
  if (!derived || derived->source.derivation != Derivation::Rows || !host_sees(derived->source.index)) return true;
  bool found = false;
  for (int64_t at = 0; at < derived->source.index.view.sizes[0]; ++at)
    found |= integer_of(call, derived->source.index, at) >= 0;
  return found;
}

// Whether the pair is right but for what it shares with itself and others.
bool pair_is_right(const Case& call, size_t i) {
  const TensorView& dst = call.dst[i].view;
  if (!tensor_is_right(dst) || dst.device != call.dst[0].view.device) return false;
  const Rest rest = rest_of(call, i);
  if (rest == Rest::Pattern && !holds(dst.dtype, call.fills[i].number)) return false;
  if (rest == Rest::Last && dst.rank != 1) return false;
  if (const Derived* const derived = derived_of(call, i)) {
    if (!parts_are_right(call, *derived)) return false;
    if (derived->source.derivation == Derivation::Nothing) return true;
  } else {
    const TensorView& src = call.src[i].view;
    if (!tensor_is_right(src) || (src.device != dst.device && !src.pinned)) return false;
    const bool castable = is_castable(dst.dtype) && is_castable(src.dtype);
    if (src.dtype != dst.dtype && !castable) return false;
    if (src.dtype != dst.dtype && !has_no_elements(src) && (is_misaligned(src) || is_misaligned(dst))) return false;
  }
  const std::vector<int64_t> corner = corner_of(call, i);
  if (static_cast<int64_t>(corner.size()) != dst.rank) return false;
  for (int64_t d = 0; d < dst.rank; ++d) {
    if (corner[d] > dst.sizes[d]) return false;
  }
  return rest != Rest::Last || yields_a_last(call, i);
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

// A byte's history: 0 untouched, else what wrote it.
struct Cell {
  enum Kind : uint8_t { None, Copied, Filled, Cast, Derived } kind = None;
  uint8_t detail = 0;  // the byte that was filled in, or which byte of an element it is
  uint16_t code = 0;   // of a cast
  uint64_t src = 0;    // the byte that was copied, or the element that was cast
  int64_t number = 0;  // that was derived
  friend bool operator==(const Cell&, const Cell&) = default;
};

// What was made of host values that no launch had room for. Kept from call to call as other memory is.
struct FuzzStaging : Staging {
  uint64_t stage(std::span<const std::byte> values) override {
    ++times;
    blocks.resize(values.size() / sizeof(Block));
    std::memcpy(blocks.data(), values.data(), values.size());
    return reinterpret_cast<uint64_t>(blocks.data());
  }
  struct alignas(16) Block {
    std::byte bytes[16];
  };
  std::vector<Block> blocks;
  int times = 0;
};
FuzzStaging staging;

// Notes where launches may read integers.
void note_readable(Case& call) {
  std::vector<Interval> all;
  for (const auto& [source, parts] : call.derived) {
    for (size_t k = source.derivation == Derivation::Sums ? 0 : 1; k < parts.size(); ++k) {
      const SourcePart& part = source.*kParts[k];
      const uint64_t begin = part.view.address + (part.by_value ? kValuesArena : 0);
      if (!part.given || !(part.by_value || tensor_is_right(part.view)) || has_no_elements(part.view)) continue;
      all.push_back({begin, begin + static_cast<uint64_t>(extent_of(part.view))});
    }
  }
  std::ranges::sort(all, {}, &Interval::begin);
  for (const Interval& next : all) {
    if (call.readable.empty() || next.begin > call.readable.back().end) call.readable.push_back(next);
    else call.readable.back().end = std::max(call.readable.back().end, next.end);
  }
}

bool is_on_gpu(const Case& call) { return call.dst[0].view.device.type == DeviceType::Cuda; }

// Where the host values lie, as the launch's sources have it: within the launch itself they are its last.
uint64_t values_begin(const Case& call, const PlannedLaunch& launch) {
  const std::span<const std::byte> values = call.values.bytes();
  if (!is_on_gpu(call)) return reinterpret_cast<uint64_t>(values.data());
  if (staging.times > 0) return reinterpret_cast<uint64_t>(staging.blocks.data());
  return static_cast<uint64_t>(launch.used_words) * kWordBytes - values.size();
}

// The address by which the reference knows what the launch reads.
uint64_t known_address(const Case& call, const PlannedLaunch& launch, uint64_t address) {
  const uint64_t begin = values_begin(call, launch);
  if (address - begin < call.values.bytes().size()) {
    if (address < sizeof launch.params && !has_sources(launch.header().kind)) {
      fail(call, "the kernel does not know of values in the launch");
    }
    return kValuesArena + address - begin;
  }
  if (address < sizeof launch.params) fail(call, "a source within the launch, but none of the values");
  return address;
}

// What a run of bytes becomes, or an element of a cast or of a derived source.
struct Run {
  Cell::Kind kind;
  uint64_t dst;
  int64_t bytes;
  uint64_t src = 0;
  int64_t src_bytes = 0;
  uint16_t code = 0;
  int64_t number = 0;
  uint64_t pattern[2] = {};
  int place = 0;  // in the pattern, of the first byte
};

// Every number from 0 to below `count`, or some: those of both ends, and at `there`.
template <class Visit>
void visit_numbers(int64_t count, bool all, int64_t there, Visit visit) {
  if (all || count <= 16) {
    for (int64_t i = 0; i < count; ++i) visit(i);
    return;
  }
  for (const int64_t i : {int64_t{0}, int64_t{1}, count / 2, there - 1, there, there + 1, count - 2, count - 1}) {
    if (i >= 0 && i < count) visit(i);
  }
}

uint64_t align_of(DType dtype) { return static_cast<uint64_t>(info(dtype).size); }

// What an item of a table or of integers holds, of which there is no memory.
int64_t pretended_number(uint64_t known_address, DType dtype) {
  uint64_t mixed = known_address * 0x9E3779B97F4A7C15;
  mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9;
  return integer_at(&mixed, dtype);
}

int64_t wrapped(int64_t number, DType dtype) { return integer_at(&number, dtype); }

uint16_t cast_code(DType from, DType to) {
  return static_cast<uint16_t>(static_cast<int>(from) * kCastableDTypes + static_cast<int>(to));
}

// The runs that a tile of a derived source's task writes: on the GPU by the walk of each lane.
template <class Visit>
void walk_derived(const Case& call, const PlannedLaunch& launch, const StridedTask& task, uint32_t tile, bool all,
                  Visit visit) {
  const std::byte* const bytes = launch.params.bytes;
  const LaunchKind kind = launch.header().kind;
  if (!has_sources(kind)) fail(call, "the kernel does not know of derived sources");
  const bool on_gpu = is_on_gpu(call);
  const uint32_t lanes = on_gpu ? kWarpLanes : 1;
  const auto aligned = [&](uint64_t address, uint64_t unit) {
    if (address % unit != 0)
      fail(call, "a unit of " + std::to_string(unit) + " bytes of a derived source is not aligned");
  };
  const auto check_integer = [&](const Integers& integers, int64_t at) {
    const uint64_t address = integers.address + static_cast<uint64_t>(at * integers.stride);
    const uint64_t begin = known_address(call, launch, address);
    const auto after = std::ranges::upper_bound(call.readable, begin, {}, &Interval::begin);
    if (after == call.readable.begin() || begin + align_of(integers.dtype) > after[-1].end) {
      fail(call, "reads an index or a length that no part has");
    }
    aligned(address, align_of(integers.dtype));
  };
  const Operation operation = task.task.code.operation;
  if (operation == Operation::Sums) {
    const auto& sums = reinterpret_cast<const SumsTask&>(task);
    if (is_plain(kind) && !is_plain_sum(sums.from, sums.to)) fail(call, "the kernel does not know these sums");
    const Integers lengths{sums.task.src, sums.lengths_stride, sums.from, false};
    uint64_t sum = 0;
    const auto visit_sum = [&](int64_t i) {
      const uint64_t dst = task.task.dst + static_cast<uint64_t>(i * sums.dst_stride);
      aligned(dst, align_of(sums.to));
      visit(Run{.kind = Cell::Derived,
                .dst = dst,
                .bytes = info(sums.to).size,
                .number = wrapped(static_cast<int64_t>(sum), sums.to)});
    };
    for (int64_t i = 0; i < sums.count; ++i) {
      visit_sum(i);
      check_integer(lengths, i);
      sum += static_cast<uint64_t>(load_integer(bytes, lengths, i));
    }
    visit_numbers(sums.rest + 1, all, 0, [&](int64_t i) { visit_sum(sums.count + i); });
    return;
  }
  const auto dtype_of = [](bool is_64) { return is_64 ? DType::Int64 : DType::Int32; };
  const auto visit_number = [&](uint64_t src, DType from, uint64_t dst, DType to, int64_t number) {
    aligned(src, align_of(from));
    aligned(dst, align_of(to));
    visit(Run{.kind = Cell::Derived,
              .dst = dst,
              .bytes = info(to).size,
              .src = known_address(call, launch, src),
              .src_bytes = info(from).size,
              .code = cast_code(from, to),
              .number = wrapped(number, from)});
  };
  // A lane's share of a row, or all of it on the CPU.
  const auto visit_share = [&](const RowShare& share, uint32_t tile_columns, uint32_t column, int most,
                               auto visit_unit) {
    if (on_gpu && (tile_columns - 1) / kWarpLanes >= static_cast<uint32_t>(most)) {
      fail(call, "more units than a lane takes");
    }
    const int64_t tiles = share.first < share.end ? (share.end - share.first - 1) / share.step + 1 : 0;
    visit_numbers(tiles, all, share.whole / share.step, [&](int64_t number) {
      const uint64_t first = share.first + static_cast<uint64_t>(number) * share.step;
      const uint64_t end = std::min<uint64_t>(share.end, first + tile_columns);
      for (uint64_t i = first + column; i < end; i += lanes) visit_unit(i);
    });
  };
  if (operation == Operation::Plus) {
    const auto& plus = reinterpret_cast<const PlusTask&>(task);
    const DType from = dtype_of(plus.from_64), to = dtype_of(plus.to_64);
    const RowShare share{
        .first = tile * task.task.tile_columns, .step = plus.items, .whole = plus.items, .end = plus.items};
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      visit_share(share, task.task.tile_columns, lane, kLaneItems, [&](uint64_t i) {
        const uint64_t src = task.task.src + i * plus.item_stride;
        const auto sum = static_cast<uint64_t>(pretended_number(known_address(call, launch, src), from)) +
                         static_cast<uint64_t>(plus.addend);
        visit_number(src, from, task.task.dst + i * align_of(to), to, static_cast<int64_t>(sum));
      });
    }
    return;
  }
  if (operation == Operation::Rows || operation == Operation::RowItems) {
    const auto& rows = reinterpret_cast<const RowsTask&>(task);
    const TaskCode code = task.task.code;
    const auto check_number = [&](uint64_t address, bool is_64, int64_t number) {
      check_integer({address, info(dtype_of(is_64)).size, dtype_of(is_64), false}, number);
    };
    const bool items = operation == Operation::RowItems;
    const DType from = dtype_of(rows.from_64), to = dtype_of(rows.to_64);
    const uint64_t unit = items ? align_of(to) : uint64_t{1} << code.width_log2;
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      const uint32_t row_tile = divide(tile, {code.column_tiles_shift, rows.column_tiles_multiplier});
      const uint32_t row = (row_tile << (kWarpLanesLog2 - code.lanes_log2)) + (lane >> code.lanes_log2);
      if (row >= rows.rows) continue;
      check_number(rows.index, rows.index_64, row);
      check_number(rows.lengths, rows.lengths_64, row);
      if (rows.cut) {
        const int64_t table_row =
            load_index(bytes, {rows.index, info(dtype_of(rows.index_64)).size, dtype_of(rows.index_64), false}, row);
        const bool is_row = static_cast<uint64_t>(table_row) < static_cast<uint64_t>(rows.table_rows);
        if (is_row && rows.lengths_of_table) check_number(rows.table_lengths, rows.table_lengths_64, table_row);
      }
      const RowShare share = locate_row(bytes, rows, tile, lane);
      if (share.cut_bytes >= unit) fail(call, "a cut unit that is whole");
      const auto fill = [&](uint64_t dst, uint64_t length, uint64_t place) {
        if (!rows.fills) fail(call, "fills what is to stay");
        visit(Run{.kind = Cell::Filled,
                  .dst = dst,
                  .bytes = static_cast<int64_t>(length),
                  .pattern = {rows.pattern, rows.pattern},
                  .place = static_cast<int>(place % 16)});
      };
      const int most = items ? kLaneItems : max_lane_units(static_cast<int>(unit));
      visit_share(share, task.task.tile_columns, lane & ((1u << code.lanes_log2) - 1), most, [&](uint64_t i) {
        const uint64_t dst = share.dst + i * unit;
        if (items) {
          const uint64_t src = share.src + i * rows.column_stride;
          if (i >= share.whole) return fill(dst, unit, 0);
          return visit_number(src, from, dst, to,
                              pretended_number(known_address(call, launch, src), from) >> rows.count_shift);
        }
        const uint64_t copied = i < share.whole ? unit : i == share.whole ? share.cut_bytes : 0;
        const uint64_t src = known_address(call, launch, share.src + i * unit);
        aligned(dst, unit);
        if (copied > 0) {
          // The unit that is cut is read whole.
          aligned(share.src + i * unit, unit);
          const auto length = static_cast<int64_t>(copied);
          visit(Run{.kind = Cell::Copied, .dst = dst, .bytes = length, .src = src, .src_bytes = length});
        }
        if (copied < unit) {
          if (rows.fills) fill(dst + copied, unit - copied, i * unit + copied);
        }
      });
    }
    return;
  }
  if (is_plain(kind)) fail(call, "the kernel does not know of rows that are not plain");
  const auto& gather = reinterpret_cast<const GatherRecord&>(*record_of(bytes, task));
  const auto found_row = [&](int64_t row) {
    if (gather.index.address) check_integer(gather.index, row);
    if (gather.lengths_index.address) check_integer(gather.lengths_index, row);
    else if (gather.lengths.address) check_integer(gather.lengths, row);
    return find_row(bytes, gather, row);
  };
  const auto visit_item = [&](uint64_t src, uint64_t dst, bool plain) {
    const int from = info(gather.from).size, to = info(gather.to).size;
    aligned(src, align_of(gather.from));
    aligned(dst, align_of(gather.to));
    src = known_address(call, launch, src);
    if (plain) return visit(Run{.kind = Cell::Copied, .dst = dst, .bytes = to, .src = src, .src_bytes = from});
    const int64_t number = wrap(derive_item(gather, pretended_number(src, gather.from)), gather.from);
    visit(Run{.kind = Cell::Derived,
              .dst = dst,
              .bytes = to,
              .src = src,
              .src_bytes = from,
              .code = cast_code(gather.from, gather.to),
              .number = number});
  };
  const auto row_src = [&](const GatheredRow& found) {
    return task.task.src + static_cast<uint64_t>(found.table_row * gather.table_row_stride);
  };
  if (operation == Operation::LastRow) {
    if (!all && gather.rows > 1 << 16) return;
    GatheredRow last{};
    for (int64_t row = gather.rows; row-- > 0 && last.copied == 0;) last = found_row(row);
    if (last.copied == 0) return;
    if (gather.from == gather.to && 1 << task.task.code.width_log2 != info(gather.to).size) {
      fail(call, "a last row of units that are no elements");
    }
    visit_numbers(gather.rows + gather.rest, all, gather.rows, [&](int64_t row) {
      if (row < gather.rows && found_row(row).copied > 0) return;
      visit_item(row_src(last), task.task.dst + static_cast<uint64_t>(row * gather.dst_row_stride),
                 gather.from == gather.to);
    });
    return;
  }
  const int64_t unit = gather.converts ? 1 : int64_t{1} << task.task.code.width_log2;
  const uint64_t pattern[2] = {gather.pattern, gather.fills_16 ? 0 : gather.pattern};
  const int64_t row = divide(tile, {task.task.code.column_tiles_shift, task.column_tiles_multiplier});
  const int64_t first = (tile - row * task.task.column_tiles) * task.task.tile_columns;
  const GatheredRow found = found_row(row);
  const uint64_t src = row_src(found);
  const uint64_t dst = task.task.dst + static_cast<uint64_t>(row * gather.dst_row_stride);
  const int64_t end = gather.fills ? gather.units : (found.copied + unit - 1) / unit;
  const auto visit_unit = [&](int64_t number) {
    const UnitAddress address = locate_unit(gather, src, dst, number);
    const int64_t copied = std::clamp<int64_t>(found.copied - number * unit, 0, unit);
    if (gather.converts && copied > 0) return visit_item(address.src, address.dst, false);
    const int64_t whole = gather.converts ? info(gather.to).size : unit;
    if (copied == 0 || copied == whole) aligned(address.dst, static_cast<uint64_t>(whole));
    if (copied == whole) aligned(address.src, static_cast<uint64_t>(whole));
    if (copied > 0) {
      visit(Run{.kind = Cell::Copied,
                .dst = address.dst,
                .bytes = copied,
                .src = known_address(call, launch, address.src),
                .src_bytes = copied});
    }
    if (!gather.fills || copied == whole) return;
    visit(Run{.kind = Cell::Filled,
              .dst = address.dst + static_cast<uint64_t>(copied),
              .bytes = whole - copied,
              .pattern = {pattern[0], pattern[1]},
              .place = gather.converts ? 0 : static_cast<int>((number * unit + copied) % 16)});
  };
  const int64_t units = std::min<int64_t>(end - first, task.task.tile_columns);
  visit_numbers(std::max<int64_t>(units, 0), all, found.copied / unit - first,
                [&](int64_t i) { visit_unit(first + i); });
}

// Every run that a tile writes, by the walk of each lane of the GPU, or those that visit_numbers() picks.
template <class Visit>
void walk_tile(const Case& call, const PlannedLaunch& planned, uint32_t tile, bool all, Visit visit) {
  const std::byte* const launch = planned.params.bytes;
  const auto [number, task_tile] = find_task(launch, tile);
  tile = task_tile;
  const Task& task = launch_task(launch, number);
  const bool strided = number < launch_header(launch).strided;
  if (is_derived(task.code.operation)) {
    return walk_derived(call, planned, reinterpret_cast<const StridedTask&>(task), tile, all, visit);
  }
  const auto aligned = [&](uint64_t address, uint64_t unit) {
    if (address % unit != 0) fail(call, "a unit of " + std::to_string(unit) + " bytes is not aligned");
  };
  const auto [src_unit_log2, dst_unit_log2] = unit_log2(task.code);
  const int src_unit = 1 << src_unit_log2, dst_unit = 1 << dst_unit_log2;
  const bool on_gpu = is_on_gpu(call);
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
    const LaunchKind kind = launch_header(launch).kind;
    if (is_plain(kind) && is_casting(kind) && !is_direct_cast(task.code.operation)) {
      fail(call, "the kernel does not know this cast");
    }
    const int elements = 1 << task.code.width_log2;
    const int src_log2 = src_unit_log2 - task.code.width_log2, dst_log2 = dst_unit_log2 - task.code.width_log2;
    walk_lanes([&](uint64_t src, uint64_t dst, int) {
      aligned(src, std::min(src_unit, 16));
      aligned(dst, std::min(dst_unit, 16));
      const auto code =
          static_cast<uint16_t>(static_cast<int>(task.code.operation) - static_cast<int>(Operation::Cast));
      for (int e = 0; e < elements; ++e) {
        visit(Run{.kind = Cell::Cast,
                  .dst = dst + (e << dst_log2),
                  .bytes = 1 << dst_log2,
                  .src = known_address(call, planned, src + (e << src_log2)),
                  .src_bytes = 1 << src_log2,
                  .code = code});
      }
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
    if (begin >= end) return;
    visit(Run{.kind = Cell::Copied,
              .dst = at.dst + begin,
              .bytes = end - begin,
              .src = known_address(call, planned, at.src + begin),
              .src_bytes = end - begin});
    return;
  }
  walk_lanes([&](uint64_t src, uint64_t dst, int place) {
    aligned(dst, unit);
    if (!fill) {
      aligned(src, unit);
      return visit(Run{.kind = Cell::Copied,
                       .dst = dst,
                       .bytes = unit,
                       .src = known_address(call, planned, src),
                       .src_bytes = unit});
    }
    visit(Run{.kind = Cell::Filled,
              .dst = dst,
              .bytes = unit,
              .pattern = {task.src, task.code.operation == Operation::Fill16 ? 0 : task.src},
              .place = place});
  });
}

constexpr int kMaxParameterBytes = 32764;

// What every launch must be, whatever it copies. Returns how many bytes the tasks take.
int check_form(const Case& call, const PlannedLaunch& launch) {
  const LaunchHeader& header = launch.header();
  if (launch.used_words * kWordBytes > kMaxParameterBytes) fail(call, "a launch is beyond the parameter limit");
  std::ptrdiff_t tasks_end = 0, beside_begin = 0, beside_end = 0;
  if (header.tasks == 0 || header.tiles == 0) fail(call, "a launch of nothing");
  if (header.tiles >> 31) fail(call, "more tiles than divide() can number");
  const uint32_t* first_tiles = launch_first_tiles(launch.params.bytes);
  for (uint32_t i = 0; i < header.tasks; ++i) {
    if (i == 0 ? first_tiles[i] != 0 : first_tiles[i] <= first_tiles[i - 1]) fail(call, "a task without tiles");
    if (first_tiles[i] >= header.tiles) fail(call, "a task begins beyond the last tile");
    const Task& task = launch_task(launch.params.bytes, i);
    const bool strided = i < header.strided;
    const size_t read = strided ? sizeof(StridedTask) : sizeof(Task) + kWordsReadBeyond * kWordBytes;
    const auto task_end = reinterpret_cast<const std::byte*>(&task) + read - launch.params.bytes;
    const auto* layout = reinterpret_cast<const StridedTask*>(&task);
    const bool has_record = task.code.operation == Operation::Gather || task.code.operation == Operation::LastRow;
    const size_t beside = !strided                          ? 0
                          : has_record                      ? sizeof(GatherRecord)
                          : is_derived(task.code.operation) ? 0
                                                            : layout->outer_extents * sizeof(Extent);
    // What lies beside the tasks comes behind all of them, each in its own place.
    tasks_end = std::max<std::ptrdiff_t>(tasks_end, task_end);
    if (beside > 0) {
      if (layout->outer * kWordBytes < beside_end) fail(call, "an extent or a record lies in another's place");
      beside_begin = beside_begin == 0 ? layout->outer * kWordBytes : beside_begin;
      beside_end = layout->outer * kWordBytes + static_cast<std::ptrdiff_t>(beside);
    }
    if (is_derived(task.code.operation) && !strided) fail(call, "a derived source has no task of its own");
  }
  if (beside_end > 0 && beside_begin < tasks_end) fail(call, "an extent or a record lies in a task's place");
  tasks_end = std::max(tasks_end, beside_end);
  if (tasks_end > launch.used_words * kWordBytes) fail(call, "a task beyond the launch's words");
  return static_cast<int>(tasks_end);
}

// That the host values lie where launches read them, and through pinned memory only where no launch holds them.
void check_values(const Case& call, std::span<const PlannedLaunch> launches) {
  const std::span<const std::byte> values = call.values.bytes();
  if (staging.times > 1 || (staging.times > 0 && (values.empty() || !is_on_gpu(call)))) {
    fail(call, "values that should not be staged");
  }
  if (values.empty() || !is_on_gpu(call)) return;
  if (staging.times == 0) {
    if (launches.size() > 1) fail(call, "values in several launches");
    for (const PlannedLaunch& launch : launches) {
      const uint64_t begin = values_begin(call, launch);
      if (begin % HostValues::kAlignment != 0 || begin < static_cast<uint64_t>(check_form(call, launch)) ||
          std::memcmp(launch.params.bytes + begin, values.data(), values.size()) != 0) {
        fail(call, "the values are not in the launch");
      }
    }
    return;
  }
  if (launches.empty()) fail(call, "staged what no launch reads");
  const int words = launches[0].used_words;
  if (launches.size() == 1 && (words + 1) / 2 * 16 + values.size() <= kMaxParameterBytes / 16 * 16) {
    fail(call, "staged what the launch has room for");
  }
}

// --- small tensors, every byte ---------------------------------------------------------------------------------------

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
      if (__builtin_mul_overflow(step, std::max<int64_t>(tensor.sizes[d], 1), &step) || step > INT64_MAX / 2) step = 1;
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
  const auto place = [&](Tensor& tensor, uint64_t& end, uint64_t begin, DType dtype, bool aligned) {
    if (aligned) end += -end % 16;
    finish(tensor, end, dtype, device);
    auto bytes = static_cast<int64_t>(std::min<__int128>(extent_of(tensor.view), INT64_MAX));
    if (bytes > 16 * most) {
      std::fill(tensor.sizes.begin(), tensor.sizes.end(), 1);
      bytes = info(dtype).size;
    }
    const uint8_t where = in.byte();
    if (where < 244) {
      tensor.view.address = end += aligned ? where % 4 * align_of(dtype) : where % 32;
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
    const std::optional<Derivation> derivation = any_derivation(in);
    const bool aligned = derivation && !in.rarely();
    const size_t rank = columns                          ? 2
                        : in.rarely()                    ? in.byte() % 9
                        : derivation == Derivation::Sums ? 1
                        : derivation == Derivation::Rows ? 1 + in.byte() % 4
                                                         : in.byte() % 5;
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
    const DType dtype = like_the_last               ? call.dst[i - 1].view.dtype
                        : derivation && types < 128 ? kDTypesBySize[types % 2]
                        : types < 192               ? kDTypesBySize[types % kDTypesBySize.size()]
                                                    : any_dtype(in);
    DType other = dtype;
    if (const uint8_t cast = in.byte(); cast >= 128) {
      other = cast < 240 ? static_cast<DType>(cast % kCastableDTypes) : any_dtype(in);
    }
    if (columns) dst.strides = {32, 1};
    place(dst, dst_end, kDstArena, dtype, aligned);
    if (columns) dst.view.address = kDstArena + in.byte() % 4 * 16 * info(dtype).size + in.byte() % 16;
    if (const uint8_t shared = in.byte(); shared >= 248) {
      place(src, dst_end, kDstArena, other, false);
      if (shared >= 252) {
        // The memory of a destination, this pair's or the last one's: the very same, laid out otherwise, or beside it.
        const Tensor& at = call.dst[i > 0 && in.byte() % 2 ? i - 1 : i];
        src.view.address = at.view.address + (shared == 252 ? info(other).size : 0);
        for (size_t d = 0; shared != 253 && d < std::min(at.strides.size(), src.strides.size()); ++d)
          src.strides[d] = at.strides[d];
        src.view.storage_bytes = static_cast<int64_t>(std::min<__int128>(extent_of(src.view), 1 << 20));
      }
    } else {
      place(src, src_end, kSrcArena, other, false);
    }
    if (in.rarely()) dst.view.device = src.view.device = {static_cast<DeviceType>(1 + in.byte() % 3), 1};
    any_flags(in, dst.view);
    any_flags(in, src.view);
    if (call.has_fills) call.fills.push_back(any_fill(in, dst));
    if (!derivation) continue;
    derive(in, call, dst, *derivation, 1 << 12, [&](Tensor& part, DType part_dtype, bool memory) {
      choose_strides(in, part, true);
      const bool among = memory || in.rarely();
      place(part, among ? dst_end : src_end, among ? kDstArena : kSrcArena, part_dtype, !in.rarely());
      return !memory || dst_end < kDstArena + kMemoryBytes;
    });
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

// What the call must do, worked out element by element. None: it must be refused.
struct Reference {
  std::vector<Cell> cells;      // of the destination arena
  std::vector<int> owner;       // which pair's destination a byte belongs to that the call writes, -1: none
  std::vector<uint64_t> bytes;  // that each pair writes
  bool valid = false;
  bool may_be_refused = false;  // more dimensions than may be left after merging

  explicit Reference(const Case& call) {
    if (!pairs_are_right(call)) return;
    may_be_refused = std::ranges::any_of(call.dst, [](const Tensor& dst) { return dst.view.rank > 4; });
    uint64_t end = kDstArena;
    for (const auto& [sizes, strides, view] : call.dst)
      end = std::max(end, view.address + static_cast<uint64_t>(extent_of(view)));
    cells.resize(end - kDstArena);
    owner.assign(end - kDstArena, -1);
    bytes.assign(call.dst.size(), 0);
    for (size_t i = 0; i < call.dst.size(); ++i) {
      if (!own_destination(call.dst[i].view, static_cast<int>(i))) return;
    }
    for (const Derived& derived : call.derived) {
      if (derived.source.derivation == Derivation::Nothing) own_destination(call.dst[derived.source.pair].view, -1);
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

  // How an element that a pair writes comes about; its first byte.
  using Element = std::optional<Cell>;

  void write(uint64_t address, const Cell& first, int item) {
    for (int k = 0; k < item; ++k) {
      Cell& cell = cells[address - kDstArena + k] = first;
      if (cell.kind == Cell::Copied) cell.src += k;
      else cell.detail = static_cast<uint8_t>(k);
    }
  }

  // Writes the pair's elements, where `element(index)` says what the corner's become. Yields the last one.
  template <class ElementAt>
  void write_pair(const Case& call, size_t i, bool same_memory, ElementAt element) {
    const TensorView& dst = call.dst[i].view;
    const int item = info(dst.dtype).size;
    const std::vector<int64_t> corner = corner_of(call, i);
    const Rest rest = rest_of(call, i);
    Element last;
    for_each_element(dst, dst.sizes, [&](uint64_t address, const std::vector<int64_t>& index) {
      bool inside = true;
      for (size_t d = 0; d < index.size(); ++d) inside &= index[d] < corner[d];
      if (inside ? !same_memory : rest != Rest::Keep) bytes[i] += item;
      const Element here = inside ? element(index) : std::nullopt;
      if (here) last = here;
      if (here && !same_memory) write(address, *here, item);
      if (!here && rest == Rest::Pattern) write(address, {Cell::Filled, 0, 0, address, 0}, item);
    });
    if (rest != Rest::Last || !last) return;
    for_each_element(dst, dst.sizes, [&](uint64_t address, const std::vector<int64_t>& index) {
      if (index[0] >= corner[0] || !element(index)) write(address, *last, item);
    });
  }

  // How the view shares bytes with destinations.
  struct Sharing {
    bool any = false;
    bool with_another = false;
  };
  Sharing sharing_of(const TensorView& view, int pair) const {
    Sharing sharing;
    for_each_element(view, view.sizes, [&](uint64_t address, const auto&) {
      for (uint64_t byte = address; byte < address + info(view.dtype).size; ++byte) {
        if (byte - kDstArena >= owner.size()) continue;
        const int by = owner[byte - kDstArena];
        sharing.any |= by >= 0;
        sharing.with_another |= by >= 0 && by != pair;
      }
    });
    return sharing;
  }

  // The element of a view at an index, where a column is as many of the view's as the page has.
  static uint64_t address_of(const TensorView& view, const std::vector<int64_t>& index) {
    uint64_t address = view.address;
    for (int64_t d = 0; d < view.rank; ++d) {
      if (view.sizes[d] > 1) address += static_cast<uint64_t>(index[d] * view.strides[d] * info(view.dtype).size);
    }
    return address;
  }

  static Cell copied_or_cast(const TensorView& src, uint64_t address, DType to) {
    if (src.dtype == to) return {Cell::Copied, 0, 0, address, 0};
    return {Cell::Cast, 0, cast_code(src.dtype, to), address, 0};
  }

  bool copy(const Case& call, size_t i) {
    if (const Derived* const derived = derived_of(call, i)) return derive(call, *derived);
    const TensorView& dst = call.dst[i].view;
    const TensorView& src = call.src[i].view;
    bool same = src.dtype == dst.dtype;
    for_each_element(src, src.sizes,
                     [&](uint64_t address, const auto& index) { same &= address_of(dst, index) == address; });
    const Sharing sharing = sharing_of(src, static_cast<int>(i));
    if (sharing.with_another || (sharing.any && !same)) return false;
    // Which is the very same memory, if it is shared.
    write_pair(call, i, sharing.any,
               [&](const auto& index) -> Element { return copied_or_cast(src, address_of(src, index), dst.dtype); });
    return true;
  }

  bool derive(const Case& call, const Derived& derived) {
    const DerivedSource& source = derived.source;
    for (const auto member : kParts) {
      const SourcePart& part = source.*member;
      if (part.given && !part.by_value && sharing_of(part.view, -1).any) return false;
    }
    const auto i = static_cast<size_t>(source.pair);
    const DType to = call.dst[i].view.dtype;
    TensorView view = source.source.view;
    if (source.source.by_value) view.address += kValuesArena;
    const auto made_of = [&](uint64_t address, int64_t page, int64_t addend) -> Element {
      const int64_t item = pretended_number(address, view.dtype);
      const __int128 pages = item >= 0 ? item / page : -((-static_cast<__int128>(item) + page - 1) / page);
      return Cell{Cell::Derived, 0, cast_code(view.dtype, to), address,
                  wrapped(static_cast<int64_t>(pages + addend), view.dtype)};
    };
    switch (source.derivation) {
      case Derivation::Nothing: break;
      case Derivation::Values:
        write_pair(call, i, false,
                   [&](const auto& index) -> Element { return copied_or_cast(view, address_of(view, index), to); });
        break;
      case Derivation::Plus:
        write_pair(call, i, false, [&](const auto& index) -> Element {
          const uint64_t address = address_of(view, index);
          return source.number == 0 ? copied_or_cast(view, address, to) : made_of(address, 1, source.number);
        });
        break;
      case Derivation::Sums: {
        std::vector<uint64_t> sums{0};
        for (int64_t at = 0; at < view.sizes[0]; ++at)
          sums.push_back(sums.back() + static_cast<uint64_t>(integer_of(call, source.source, at)));
        write_pair(call, i, false, [&](const auto& index) -> Element {
          return Cell{Cell::Derived, 0, 0, 0, wrapped(static_cast<int64_t>(sums[index[0]]), to)};
        });
        break;
      }
      case Derivation::Rows:
        write_pair(call, i, false, [&](std::vector<int64_t> index) -> Element {
          const int64_t number = index[0];
          const int64_t row = integer_of(call, source.index, number);
          if (row < 0 || row >= view.sizes[0]) return std::nullopt;
          if (source.lengths.given) {
            const int64_t at = source.lengths_index.given ? integer_of(call, source.lengths_index, number) : number;
            if (at < 0 || at >= source.lengths.view.sizes[0]) return std::nullopt;
            const int64_t length = integer_of(call, source.lengths, at);
            if (static_cast<__int128>(index[1]) * source.number >= length) return std::nullopt;
          }
          index[0] = row;
          if (index.size() == 2) index[1] *= source.number;
          const uint64_t address = address_of(view, index);
          if (view.dtype == to && source.number == 1) return Cell{Cell::Copied, 0, 0, address, 0};
          return made_of(address, source.number, 0);
        });
    }
    return true;
  }
};

void compare(const Case& call, std::span<const PlannedLaunch> launches, const LaunchPlanner& planner) {
  const Reference reference(call);
  if (!reference.valid) fail(call, "planned what is to be refused");
  check_values(call, launches);
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
      walk_tile(call, launch, tile, true, [&](const Run& run) {
        for (int64_t k = 0; k < run.bytes; ++k) {
          if (run.kind == Cell::Filled) {
            write(run.dst + k, {Cell::Filled, reinterpret_cast<const uint8_t*>(run.pattern)[(run.place + k) % 16]});
          } else if (run.kind == Cell::Copied) {
            write(run.dst + k, {Cell::Copied, 0, 0, run.src + k});
          } else {
            write(run.dst + k, {run.kind, static_cast<uint8_t>(k), run.code, run.src, run.number});
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

// Strides that grow keep elements apart, so that some calls go through.
void grow_strides(Input& in, Tensor& tensor, bool any) {
  const size_t rank = tensor.sizes.size();
  const bool last_first = in.byte() % 2;
  tensor.strides.resize(rank);
  int64_t step = 1;
  for (size_t k = 0; k < rank; ++k) {
    const size_t d = last_first ? rank - 1 - k : k;
    const int64_t size = tensor.sizes[d];
    tensor.strides[d] = any ? wild_number(in) : step;
    if (__builtin_mul_overflow(step, std::max<int64_t>(size, 1), &step) || step < 0) step = INT64_MAX;
    if (in.byte() >= 224 && step < INT64_MAX / 2) step += wild_number(in) & 0xFFFF;
  }
}

Case wild_case(Input& in) {
  Case call;
  const size_t pairs = 1 + in.byte() % 3;
  const Device device{in.byte() % 2 ? DeviceType::Cuda : DeviceType::Cpu, 0};
  call.has_fills = in.byte() % 2;
  const bool huge = in.rarely();     // each about as much as one launch can number the tiles of
  const bool far = in.rarely();      // one step reaches about as far as a tensor may, among small ones
  const bool tangled = in.rarely();  // too many ways to reach an element to try them all
  uint64_t memory_end = kDstArena;
  call.dst.resize(pairs);
  call.src.resize(pairs);
  for (size_t i = 0; i < pairs; ++i) {
    const std::optional<Derivation> derivation = tangled ? std::nullopt : any_derivation(in);
    const size_t rank = tangled                                  ? 18
                        : huge || derivation == Derivation::Sums ? 1
                        : derivation == Derivation::Rows         ? 1 + in.byte() % 4
                        : in.rarely()                            ? in.byte() % 70
                                                                 : in.byte() % 7;
    const uint8_t far_dimension = far ? in.byte() : 0;
    for (Tensor* tensor : {&call.dst[i], &call.src[i]}) {
      const bool any = in.rarely();
      for (size_t d = 0; d < rank; ++d) {
        const int64_t size = huge ? int64_t{1} << 42 : far ? 1 + in.byte() % 4 : wild_number(in);
        tensor->sizes.push_back(any || tensor == &call.dst[i] ? size : std::min(size, call.dst[i].sizes[d]));
      }
      grow_strides(in, *tensor, any);
      if (far && rank > 0) {
        tensor->sizes[far_dimension % rank] = 2;
        tensor->strides[far_dimension % rank] = (INT64_MAX >> (4 + in.byte() % 3)) - (in.byte() << 6);
      }
    }
    if (tangled) call.dst[i].sizes.assign(rank, 2);
    for (int64_t& stride : call.dst[i].strides) stride = tangled ? 1 + (in.byte() << 8 | in.byte()) : stride;
    const DType dtype = far ? DType::Complex128 : any_dtype(in);
    const uint64_t apart = uint64_t{1} << 61;
    constexpr uint64_t kLowest = 1 << 20;  // no tensor lies below: there are the launch's own bytes
    finish(call.dst[i], in.rarely() ? in.word() | apart * 7 : apart * (2 * i) + (1 << 20) + in.byte() % 32, dtype,
           device);
    finish(call.src[i], in.rarely() ? in.word() | kLowest : apart * (2 * i + 1) + (1 << 20) + in.byte() % 32,
           in.byte() < 192 ? dtype : any_dtype(in), device);
    for (Tensor* tensor : {&call.dst[i], &call.src[i]}) {
      tensor->view.storage_bytes = in.byte() < 224 ? INT64_MAX : static_cast<int64_t>(in.word());
      any_flags(in, tensor->view);
    }
    if (call.has_fills) call.fills.push_back(any_fill(in, call.dst[i]));
    if (!derivation) continue;
    derive(in, call, call.dst[i], *derivation, INT64_MAX, [&](Tensor& part, DType part_dtype, bool memory) {
      memory ? choose_strides(in, part, true) : grow_strides(in, part, in.rarely());
      finish(part, memory ? memory_end : (call.src[i].view.address | kLowest | 15) - in.byte() % 16, part_dtype,
             device);
      part.view.storage_bytes = memory ? static_cast<int64_t>(extent_of(part.view)) : INT64_MAX;
      if (memory) memory_end += static_cast<uint64_t>(part.view.storage_bytes + 15) & ~uint64_t{15};
      return !memory || memory_end < kDstArena + kMemoryBytes;
    });
  }
  return call;
}

struct Range {
  uint64_t begin;
  uint64_t bytes;
  explicit Range(const Derived& derived) : Range(derived.parts[0]) {
    if (derived.source.derivation == Derivation::Nothing) bytes = 0;
    if (derived.source.source.by_value) begin += kValuesArena;
  }
  explicit Range(const Tensor& tensor)
      : begin(tensor.view.address), bytes(static_cast<uint64_t>(extent_of(tensor.view))) {}
  bool holds(uint64_t first, int64_t count) const {
    const auto size = static_cast<uint64_t>(count);
    return first >= begin && size <= bytes && first - begin <= bytes - size;
  }
};

void check_bounds(const Case& call, std::span<const PlannedLaunch> launches) {
  if (!pairs_are_right(call)) fail(call, "planned what is to be refused");
  check_values(call, launches);
  const std::vector<Range> dst_ranges(call.dst.begin(), call.dst.end());
  std::vector<Range> src_ranges(call.src.begin(), call.src.end());
  for (const Derived& derived : call.derived) src_ranges[derived.source.pair] = Range(derived);
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
        walk_tile(call, launch, tile, false, [&](const Run& run) {
          for (size_t pair = 0; pair < dst_ranges.size(); ++pair) {
            if (dst_ranges[pair].holds(run.dst, run.bytes) &&
                (run.src_bytes == 0 || src_ranges[pair].holds(run.src, run.src_bytes))) {
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
  map_memory();
  Case call = small ? small_case(in) : buffer ? buffer_case(in) : wild_case(in);
  note_readable(call);
  staging.times = 0;
  std::vector<TensorView> dst, src;
  std::vector<DerivedSource> derived;
  for (const Tensor& tensor : call.dst) dst.push_back(tensor.view);
  for (const Tensor& tensor : call.src) src.push_back(tensor.view);
  for (const Derived& made : call.derived) derived.push_back(made.source);
  // As for pinned sources, before anything is checked.
  for (const TensorView& view : src) byte_extent(view);
  try {
    destinations.bind(dst, call.has_fills ? &call.fills : nullptr);
    const auto launches = planner.plan(destinations, {src, derived, call.values.bytes()}, &staging);
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
