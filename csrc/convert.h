// The value conversions of Tensor.copy_, as c10::convert defines them (c10/util/TypeCast.h). The back end that includes
// this brings its own 16-bit floats, with to_float() and from_float().
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "dtype.h"

namespace fused_copy {

// A bool in memory is a byte that need not be 0 or 1.
struct BoolByte {
  uint8_t byte;
};

template <class To, class From, class Half, class BFloat16>
FUSED_COPY_HOST_DEVICE inline To convert(From value) {
  constexpr bool from_short = std::is_same_v<From, Half> || std::is_same_v<From, BFloat16>;
  constexpr bool to_short = std::is_same_v<To, Half> || std::is_same_v<To, BFloat16>;
  if constexpr (std::is_same_v<From, BoolByte>) {
    return convert<To, uint8_t, Half, BFloat16>(value.byte != 0);
  } else if constexpr (from_short) {
    return convert<To, float, Half, BFloat16>(to_float(value));
  } else if constexpr (to_short) {
    return from_float<To>(static_cast<float>(value));
  } else if constexpr (std::is_same_v<To, BoolByte>) {
    return {static_cast<uint8_t>(value != 0)};
  } else if constexpr (std::is_same_v<To, uint8_t> && std::is_floating_point_v<From>) {
    // Negative numbers wrap around instead of being undefined.
    return static_cast<uint8_t>(static_cast<int64_t>(value));
  } else {
    return static_cast<To>(value);
  }
}

// The C++ type of a castable dtype.
template <class Half, class BFloat16>
struct CastTypes {
  template <int kDType>
  static auto pick() {
    constexpr NumberFormat format = kDTypes[kDType].format;
    if constexpr (format == kBool) return BoolByte{};
    else if constexpr (format == unsigned_format(8)) return uint8_t{};
    else if constexpr (format == unsigned_format(16)) return uint16_t{};
    else if constexpr (format == unsigned_format(32)) return uint32_t{};
    else if constexpr (format == signed_format(8)) return int8_t{};
    else if constexpr (format == signed_format(16)) return int16_t{};
    else if constexpr (format == signed_format(32)) return int32_t{};
    else if constexpr (format == signed_format(64)) return int64_t{};
    else if constexpr (format == kFloat16) return Half{};
    else if constexpr (format == kBFloat16) return BFloat16{};
    else if constexpr (format == kFloat32) return float{};
    else if constexpr (format == kFloat64) return double{};
    else static_assert(kDType < 0, "a castable dtype needs a C++ type here");
  }
  template <int kDType>
  using at = decltype(pick<kDType>());
};

// Stores an integer as this castable dtype.
template <class Half, class BFloat16, int... kDTypes>
FUSED_COPY_HOST_DEVICE inline void store_integer(uint64_t address, DType dtype, int64_t number,
                                                 std::integer_sequence<int, kDTypes...>) {
  using Types = CastTypes<Half, BFloat16>;
  const auto store = [&](auto stored) {
    using To = decltype(stored);
    *reinterpret_cast<To*>(address) = convert<To, int64_t, Half, BFloat16>(number);
  };
  ((static_cast<int>(dtype) == kDTypes ? store(typename Types::template at<kDTypes>{}) : void()), ...);
}
template <class Half, class BFloat16>
FUSED_COPY_HOST_DEVICE inline void store_integer(uint64_t address, DType dtype, int64_t number) {
  store_integer<Half, BFloat16>(address, dtype, number, std::make_integer_sequence<int, kCastableDTypes>());
}

}  // namespace fused_copy
