"""Host values of more elements than 32 bits count, in memory that repeats."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from cpp import CSRC, needs_compiler, output_of

# Converts one number, repeated, to bytes whose first 2**32 lie in one page over and over, and prints those behind them.
CONVERT = """
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "sources.h"

using namespace fused_copy;

int main() {
  constexpr size_t kAliased = size_t{1} << 32, kPage = size_t{1} << 21, kTail = 4;
  const int page = memfd_create("page", 0);
  if (page < 0 || ftruncate(page, kPage) != 0) return 1;
  constexpr int kAccess = PROT_READ | PROT_WRITE;
  void* const all = mmap(nullptr, kAliased + kPage, kAccess, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) return 2;
  auto* const values = static_cast<std::byte*>(all);
  for (size_t at = 0; at < kAliased; at += kPage) {
    if (mmap(values + at, kPage, kAccess, MAP_SHARED | MAP_FIXED, page, 0) == MAP_FAILED) return 3;
  }
  const int64_t number = 7, size = kAliased + kTail, stride = 0;
  convert_array({&number, {&size, 1}, {&stride, 1}, DType::Int64}, DType::UInt8, values);
  for (size_t i = 0; i < kTail + 1; ++i) std::printf("%d ", static_cast<int>(values[kAliased + i]));
}
"""


@needs_compiler
def test_more_values_than_32_bits_count(tmp_path):
    headers = Path(importlib.util.find_spec("torch").origin).parent / "include"
    assert output_of(tmp_path, CONVERT, [CSRC / "cpu.cpp"], [str(headers)]) == "7 7 7 7 0 "
