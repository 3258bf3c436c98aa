// All about dtypes: a new one is an enumerator, a row of the table, and an entry of the tests' lists.
#pragma once

#include <bit>
#include <cstdint>

#ifdef __CUDACC__
#define FUSED_COPY_HOST_DEVICE __host__ __device__
#else
#define FUSED_COPY_HOST_DEVICE
#endif

namespace fused_copy {

// Castable dtypes come first, the last of them float64: a cast is coded by their values.
enum class DType : uint8_t {
  Bool,
  UInt8,
  Int8,
  Int16,
  Int32,
  Int64,
  Float16,
  BFloat16,
  Float32,
  Float64,
  UInt16,
  UInt32,
  UInt64,
  Complex32,
  Complex64,
  Complex128,
  Float8E4M3FN,
  Float8E4M3FNUZ,
  Float8E5M2,
  Float8E5M2FNUZ,
  Float8E8M0FNU,
  Float4E2M1FNx2,
  Bits8,
  Bits16,
  Unsupported,
};
constexpr int kCastableDTypes = static_cast<int>(DType::Float64) + 1;

// How bits make a number: those of an element, or of a complex one's real part.
struct NumberFormat {
  enum Kind : uint8_t {
    Opaque,    // no numbers, as far as this package knows
    Unsigned,  // integers
    Signed,
    Ieee,        // floating point whose highest exponent holds infinity and NaN
    NanOnly,     // the same, but of the highest exponent only the last is NaN and the others are numbers
    Fnuz,        // the same, but minus zero is NaN and the others are numbers
    PowerOfTwo,  // an exponent alone
  } kind = Opaque;
  int bits = 0;  // of an integer
  int exponent_bits = 0;
  int mantissa_bits = 0;
  int bias = 0;
  uint64_t nan = 0;  // the one that torch makes
  friend constexpr bool operator==(const NumberFormat&, const NumberFormat&) = default;
};

constexpr bool is_integer(const NumberFormat& format) {
  return format.kind == NumberFormat::Unsigned || format.kind == NumberFormat::Signed;
}

constexpr NumberFormat kOpaque{};
constexpr NumberFormat unsigned_format(int bits) { return {NumberFormat::Unsigned, bits}; }
constexpr NumberFormat signed_format(int bits) { return {NumberFormat::Signed, bits}; }
constexpr NumberFormat float_format(NumberFormat::Kind kind, int exponent_bits, int mantissa_bits, int bias,
                                    uint64_t nan) {
  return {kind, 0, exponent_bits, mantissa_bits, bias, nan};
}
constexpr NumberFormat kBool = unsigned_format(1);
constexpr NumberFormat kFloat16 = float_format(NumberFormat::Ieee, 5, 10, 15, 0x7E00);
constexpr NumberFormat kBFloat16 = float_format(NumberFormat::Ieee, 8, 7, 127, 0x7FC0);
constexpr NumberFormat kFloat32 = float_format(NumberFormat::Ieee, 8, 23, 127, 0x7FC00000);
constexpr NumberFormat kFloat64 = float_format(NumberFormat::Ieee, 11, 52, 1023, 0x7FF8000000000000);

struct DTypeInfo {
  DType dtype;
  const char* name;  // torch's
  int scalar_type;   // torch's number of it (torch/headeronly/core/ScalarType.h), which its stable ABI passes
  int size;          // bytes of an element
  NumberFormat format;
};

constexpr DTypeInfo kDTypes[] = {
    {DType::Bool, "bool", 11, 1, kBool},
    {DType::UInt8, "uint8", 0, 1, unsigned_format(8)},
    {DType::Int8, "int8", 1, 1, signed_format(8)},
    {DType::Int16, "int16", 2, 2, signed_format(16)},
    {DType::Int32, "int32", 3, 4, signed_format(32)},
    {DType::Int64, "int64", 4, 8, signed_format(64)},
    {DType::Float16, "float16", 5, 2, kFloat16},
    {DType::BFloat16, "bfloat16", 15, 2, kBFloat16},
    {DType::Float32, "float32", 6, 4, kFloat32},
    {DType::Float64, "float64", 7, 8, kFloat64},
    {DType::UInt16, "uint16", 27, 2, unsigned_format(16)},
    {DType::UInt32, "uint32", 28, 4, unsigned_format(32)},
    {DType::UInt64, "uint64", 29, 8, unsigned_format(64)},
    {DType::Complex32, "complex32", 8, 4, kFloat16},
    {DType::Complex64, "complex64", 9, 8, kFloat32},
    {DType::Complex128, "complex128", 10, 16, kFloat64},
    {DType::Float8E4M3FN, "float8_e4m3fn", 24, 1, float_format(NumberFormat::NanOnly, 4, 3, 7, 0x7F)},
    {DType::Float8E4M3FNUZ, "float8_e4m3fnuz", 26, 1, float_format(NumberFormat::Fnuz, 4, 3, 8, 0x80)},
    {DType::Float8E5M2, "float8_e5m2", 23, 1, float_format(NumberFormat::Ieee, 5, 2, 15, 0x7F)},
    {DType::Float8E5M2FNUZ, "float8_e5m2fnuz", 25, 1, float_format(NumberFormat::Fnuz, 5, 2, 16, 0x80)},
    {DType::Float8E8M0FNU, "float8_e8m0fnu", 44, 1, float_format(NumberFormat::PowerOfTwo, 8, 0, 127, 0xFF)},
    {DType::Float4E2M1FNx2, "float4_e2m1fn_x2", 45, 1, kOpaque},
    {DType::Bits8, "bits8", 21, 1, kOpaque},
    {DType::Bits16, "bits16", 22, 2, kOpaque},
    {DType::Unsupported, "an unsupported dtype", -1, 0, kOpaque},
};
constexpr int kDTypeCount = sizeof(kDTypes) / sizeof(DTypeInfo);

constexpr const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }

constexpr bool is_castable(DType dtype) { return static_cast<int>(dtype) < kCastableDTypes; }

constexpr bool rows_are_in_order() {
  for (int row = 0; row < kDTypeCount; ++row) {
    if (kDTypes[row].dtype != static_cast<DType>(row)) return false;
  }
  return kDTypes[kDTypeCount - 1].dtype == DType::Unsupported;
}
static_assert(rows_are_in_order(), "every enumerator of DType needs its row, in the same order");

constexpr bool scalar_types_differ() {
  for (const DTypeInfo& one : kDTypes) {
    for (const DTypeInfo& other : kDTypes) {
      if (one.dtype != other.dtype && one.scalar_type == other.scalar_type) return false;
    }
  }
  return true;
}
static_assert(scalar_types_differ(), "two dtypes have one scalar type");

// A cast goes through an int64, a float or a double, whichever of them holds all numbers of its source's kind.
constexpr int castable_integers() {
  int count = 0;
  while (is_integer(kDTypes[count].format)) ++count;
  return count;
}
constexpr int kCastableIntegers = castable_integers();

constexpr bool casts_are_exact() {
  for (int i = 0; i < kCastableDTypes; ++i) {
    const NumberFormat& format = kDTypes[i].format;
    const bool in_int64 = format.bits < 64 || format.kind == NumberFormat::Signed;
    const bool in_float = format.kind == NumberFormat::Ieee && format.exponent_bits <= kFloat32.exponent_bits &&
                          format.mantissa_bits <= kFloat32.mantissa_bits;
    if (!(i < kCastableIntegers ? in_int64 : in_float || kDTypes[i].dtype == DType::Float64)) return false;
  }
  return true;
}
static_assert(casts_are_exact(), "castable dtypes are integers that int64 holds, then floats, then float64");

// The log2 of the size of every castable dtype, four bits for each: device code cannot read the table.
constexpr uint64_t castable_sizes_log2() {
  uint64_t sizes = 0;
  for (int i = 0; i < kCastableDTypes; ++i) sizes |= uint64_t(std::countr_zero(unsigned(kDTypes[i].size))) << (4 * i);
  return sizes;
}
constexpr uint64_t kCastableSizesLog2 = castable_sizes_log2();
static_assert(kCastableDTypes <= 16);

// Of the bytes of an element.
FUSED_COPY_HOST_DEVICE constexpr int castable_size_log2(int dtype) {
  return static_cast<int>(kCastableSizesLog2 >> (4 * dtype) & 0xf);
}

}  // namespace fused_copy
