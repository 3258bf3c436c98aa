// What is to be done with a task, as both back ends read it.
#pragma once

#include "dtype.h"

namespace fused_copy {

constexpr int kCasts = kCastableDTypes * kCastableDTypes;

enum class Operation : uint8_t {
  Copy,        // units of 2^width_log2 bytes, all aligned
  CopyRagged,  // rows begin and end anywhere, source and destination at the same phase of 2^width_log2 bytes
  Fill,        // units of 2^width_log2 bytes from an 8-byte pattern
  Fill16,      // the same from a 16-byte pattern whose upper half is zero (complex128)
  Cast,        // units of 2^width_log2 elements; see cast_operation
  Gather = Cast + kCasts,  // rows of a table by index, or integers plus a number, of any kind; see GatherRecord
  LastRow,                 // what is left of rows of single elements, from the last of them; see GatherRecord
  Rows,                    // plain rows of a table by index; see RowsTask
  RowItems,                // the same of int32 or int64, converted item by item; see RowsTask
  Plus,                    // plain integers plus a number; see PlusTask
  Sums,                    // see SumsTask
};
static_assert(static_cast<int>(Operation::Gather) == static_cast<int>(Operation::Cast) + kCasts);
static_assert(static_cast<int>(Operation::Cast) + kCasts < 250, "operations must fit their byte");

// A cast takes units of four elements, or of two where one is 8 bytes, else single ones.
constexpr int kMaxCastWidthLog2 = 2;

FUSED_COPY_HOST_DEVICE constexpr bool is_derived(Operation operation) { return operation >= Operation::Gather; }

FUSED_COPY_HOST_DEVICE constexpr bool is_cast(Operation operation) {
  return operation >= Operation::Cast && !is_derived(operation);
}

// A fill's source is its pattern.
constexpr bool is_fill(Operation operation) {
  if (is_cast(operation)) return false;
  switch (operation) {
    case Operation::Copy:
    case Operation::CopyRagged:
    case Operation::Gather:
    case Operation::LastRow:
    case Operation::Rows:
    case Operation::RowItems:
    case Operation::Plus:
    case Operation::Sums: return false;
    case Operation::Fill:
    case Operation::Fill16: return true;
    case Operation::Cast: break;
  }
  __builtin_unreachable();
}

FUSED_COPY_HOST_DEVICE constexpr Operation cast_operation(DType from, DType to) {
  return static_cast<Operation>(static_cast<int>(Operation::Cast) + static_cast<int>(from) * kCastableDTypes +
                                static_cast<int>(to));
}

// The dtypes of a cast, as numbers.
struct CastDTypes {
  int from;
  int to;
};

FUSED_COPY_HOST_DEVICE constexpr CastDTypes cast_dtypes(Operation operation) {
  const int code = static_cast<int>(operation) - static_cast<int>(Operation::Cast);
  return {code / kCastableDTypes, code % kCastableDTypes};
}

// Casts that have code of their own: those of ids, positions and lengths, and of activations.
struct DTypePair {
  DType from;
  DType to;
};
constexpr DTypePair kDirectCasts[] = {
    {DType::Int64, DType::Int32},      {DType::Int32, DType::Int64},     {DType::Float32, DType::BFloat16},
    {DType::BFloat16, DType::Float32}, {DType::Float32, DType::Float16}, {DType::Float16, DType::Float32},
};
constexpr int kDirectCastCount = sizeof(kDirectCasts) / sizeof(DTypePair);

constexpr bool is_direct_cast(Operation operation) {
  for (const DTypePair& cast : kDirectCasts) {
    if (operation == cast_operation(cast.from, cast.to)) return true;
  }
  return false;
}

// In one word, which a back end reads at once.
struct alignas(4) TaskCode {
  Operation operation;
  uint8_t width_log2;          // of a unit: bytes, in a cast elements
  uint8_t lanes_log2;          // 2^lanes_log2 lanes of a warp lie along a row, the others on further rows
  uint8_t column_tiles_shift;  // of the Divisor by a task's column tiles
};

// log2 of the bytes from one column to the next where they lie side by side.
struct UnitLog2 {
  int src;
  int dst;
};

FUSED_COPY_HOST_DEVICE inline UnitLog2 cast_unit_log2(TaskCode code) {
  const auto [from, to] = cast_dtypes(code.operation);
  return {castable_size_log2(from) + code.width_log2, castable_size_log2(to) + code.width_log2};
}

FUSED_COPY_HOST_DEVICE inline UnitLog2 unit_log2(TaskCode code) {
  return is_cast(code.operation) ? cast_unit_log2(code) : UnitLog2{code.width_log2, code.width_log2};
}

}  // namespace fused_copy
