// Numbers as the bits that a dtype has for them.
#pragma once

#include <cstdint>
#include <optional>

#include "dtype.h"

namespace fused_copy {

// The 8 bytes that a fill repeats, or none where the dtype does not hold the number exactly. The imaginary part of a
// complex number is zero, so complex128 repeats 8 zero bytes after them, which Operation::Fill16 stands for.
std::optional<uint64_t> fill_pattern(double number, DType dtype);

}  // namespace fused_copy
