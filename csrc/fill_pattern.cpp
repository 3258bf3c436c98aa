#include "fill_pattern.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace fused_copy {
namespace {

std::optional<uint64_t> encode_float(double value, const NumberFormat& format) {
  const uint64_t sign = std::signbit(value) ? uint64_t{1} << (format.exponent_bits + format.mantissa_bits) : 0;
  const uint64_t exponent_mask = (uint64_t{1} << format.exponent_bits) - 1;
  const uint64_t mantissa_mask = (uint64_t{1} << format.mantissa_bits) - 1;
  if (std::isnan(value)) return format.nan;
  if (std::isinf(value)) {
    if (format.kind != NumberFormat::Ieee) return std::nullopt;
    return sign | exponent_mask << format.mantissa_bits;
  }
  if (value == 0) {
    if (sign && format.kind == NumberFormat::Fnuz) return std::nullopt;
    return sign;
  }
  int exponent;
  std::frexp(value, &exponent);
  // |value| = m * 2^(exponent - 1) with 1 <= m < 2. Subnormal numbers are as far apart as those of the smallest normal
  // exponent.
  const int biased = std::max(exponent - 1 + format.bias, 1);
  const double steps = std::ldexp(std::fabs(value), format.mantissa_bits + format.bias - biased);
  const auto significand = static_cast<uint64_t>(steps);
  if (static_cast<double>(significand) != steps) return std::nullopt;
  // The implicit leading bit of a normal number adds the missing one to its exponent.
  const uint64_t bits = (static_cast<uint64_t>(biased - 1) << format.mantissa_bits) + significand;
  uint64_t largest = exponent_mask << format.mantissa_bits | mantissa_mask;
  if (format.kind == NumberFormat::Ieee) largest -= mantissa_mask + 1;
  if (format.kind == NumberFormat::NanOnly) largest -= 1;
  if (static_cast<uint64_t>(biased) > exponent_mask || bits > largest) return std::nullopt;
  return sign | bits;
}

// 2^k is encoded as k + bias.
std::optional<uint64_t> encode_power_of_two(double value, const NumberFormat& format) {
  if (std::isnan(value)) return format.nan;
  int exponent;
  if (std::signbit(value) || std::frexp(value, &exponent) != 0.5) return std::nullopt;
  const int encoded = exponent - 1 + format.bias;
  if (encoded < 0 || static_cast<uint64_t>(encoded) >= format.nan) return std::nullopt;
  return static_cast<uint64_t>(encoded);
}

std::optional<uint64_t> encode_integer(double value, const NumberFormat& format) {
  const bool is_signed = format.kind == NumberFormat::Signed;
  const auto half = static_cast<double>(uint64_t{1} << (format.bits - 1));
  const double low = is_signed ? -half : 0.0;
  const double high = is_signed ? half : 2 * half;
  if (!(value >= low && value < high) || value != std::floor(value)) return std::nullopt;
  const uint64_t encoded =
      value < 0 ? static_cast<uint64_t>(static_cast<int64_t>(value)) : static_cast<uint64_t>(value);
  return format.bits == 64 ? encoded : encoded & ((uint64_t{1} << format.bits) - 1);
}

std::optional<uint64_t> encode_exactly(double value, const NumberFormat& format) {
  if (format == kFloat64) return std::bit_cast<uint64_t>(value);  // keeps the payload of a NaN
  switch (format.kind) {
    case NumberFormat::Opaque: return std::nullopt;
    case NumberFormat::Unsigned:
    case NumberFormat::Signed: return encode_integer(value, format);
    case NumberFormat::Ieee:
    case NumberFormat::NanOnly:
    case NumberFormat::Fnuz: return encode_float(value, format);
    case NumberFormat::PowerOfTwo: return encode_power_of_two(value, format);
  }
  __builtin_unreachable();
}

}  // namespace

std::optional<uint64_t> fill_pattern(double number, DType dtype) {
  std::optional<uint64_t> pattern = encode_exactly(number, info(dtype).format);
  if (!pattern) return std::nullopt;
  for (int filled = info(dtype).size; filled < 8; filled *= 2) *pattern |= *pattern << (8 * filled);
  return pattern;
}

}  // namespace fused_copy
