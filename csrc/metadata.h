// The planner's checks of tensors that have no memory, as those that torch.compile traces with.
#pragma once

#include <string>
#include <vector>

#include "destinations.h"

namespace fused_copy {

// A tensor as far as a fake one tells.
struct Description {
  std::string dtype;        // torch's name
  std::string device_type;  // torch's name
  int32_t device_index;
  bool strided;
  bool requires_grad;  // and grad mode is on
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
};

// Throws InvalidInput. `fills`, where given, has one entry for each destination.
void check_metadata(const std::vector<Description>& destinations, const std::vector<Description>& sources,
                    const std::vector<Fill>* fills);

}  // namespace fused_copy
