// One form for every error about a pair.
#pragma once

#include <string>

#include "checks.h"

namespace fused_copy {

inline std::string describe(const InvalidInput& error, const std::string& name = {}) {
  std::string text = "fused_copy: ";
  if (error.part) text += std::string(error.part) + " of ";
  if (error.pair >= 0) {
    text += "pair " + std::to_string(error.pair);
    if (!name.empty()) text += error.part ? " (" + name + ")" : " ('" + name + "')";
    text += error.part ? " " : ": ";
  }
  return text + error.what();
}

// `reason` is torch's, or empty where it gives none.
inline InvalidInput withheld_memory(int64_t pair, const char* role, const std::string& reason) {
  return {pair, std::string(role) + " has memory that torch refuses to give: " +
                    (reason.empty() ? "it is gone, or not there yet" : reason) +
                    "; pass a tensor whose memory is there"};
}

}  // namespace fused_copy
