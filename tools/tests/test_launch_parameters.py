"""What a driver is given of a launch, where it takes fewer bytes than a kernel has parameters and where it does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cpp import needs_compiler, output_of

# Each line is what a driver was given in turn for one launch, and what it answered at last.
PASS = """
#include <cstdio>
#include <cstring>

#include "launch_parameters.h"

using namespace fused_copy;

// A driver that answers this where it is given a buffer of its own size, and that where it is given all parameters.
struct Driver {
  CUresult to_sized, to_whole;
  PlannedLaunch& launch;
  CUresult operator()(void** arguments, void** extra) const {
    if (arguments != nullptr) {
      std::printf(arguments[0] == launch.params.bytes && extra == nullptr ? "whole " : "wrong ");
      return to_whole;
    }
    const bool right = extra[0] == CU_LAUNCH_PARAM_BUFFER_POINTER && extra[1] == launch.params.bytes &&
                       extra[2] == CU_LAUNCH_PARAM_BUFFER_SIZE && extra[4] == CU_LAUNCH_PARAM_END;
    std::printf(right ? "%zu bytes " : "wrong ", *static_cast<size_t*>(extra[3]));
    return to_sized;
  }
};

int main() {
  static PlannedLaunch launch{};
  launch.used_words = 10;
  LaunchHeader header{};
  const auto pass = [&](LaunchKind kind, CUresult to_sized, CUresult to_whole) {
    header.kind = kind;
    std::memcpy(launch.params.bytes, &header, sizeof header);
    const CUresult result = Parameters(launch).pass(Driver{to_sized, to_whole, launch});
    std::printf("%d\\n", static_cast<int>(result));
  };
  pass(LaunchKind::General, CUDA_SUCCESS, CUDA_SUCCESS);
  pass(LaunchKind::PlainSources, CUDA_SUCCESS, CUDA_SUCCESS);
  pass(LaunchKind::PlainSources, CUDA_ERROR_INVALID_CONTEXT, CUDA_SUCCESS);
  pass(LaunchKind::PlainSources, CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_INVALID_VALUE);
  pass(LaunchKind::PlainSources, CUDA_ERROR_INVALID_VALUE, CUDA_SUCCESS);
  pass(LaunchKind::PlainSources, CUDA_SUCCESS, CUDA_SUCCESS);
}
"""


def cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    folders = [nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    return next(
        (path for path in (Path(folder, "include") for folder in folders if folder) if (path / "cuda.h").exists()), None
    )


@needs_compiler
@pytest.mark.skipif(cuda_headers() is None, reason="needs CUDA's headers")
def test_a_driver_that_refuses_small_buffers_is_given_all(tmp_path):
    assert output_of(tmp_path, PASS, includes=[str(cuda_headers())]).splitlines() == [
        "whole 0",
        "80 bytes 0",
        "80 bytes 201",  # an error of another kind is told as it is
        "80 bytes whole 1",  # as is one that has nothing to do with the size, after which launches go on as before
        "80 bytes whole 0",
        "whole 0",
    ]
