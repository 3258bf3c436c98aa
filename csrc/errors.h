// One form for every error about a pair.
#pragma once

#include <string>

#include "planner.h"

namespace fused_copy {

inline std::string describe(const InvalidInput& error, const std::string& name = {}) {
  std::string text = "fused_copy: ";
  if (error.pair >= 0) text += "pair " + std::to_string(error.pair) + (name.empty() ? "" : " ('" + name + "')") + ": ";
  return text + error.what();
}

}  // namespace fused_copy
