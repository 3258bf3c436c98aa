#include "metadata.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "errors.h"
#include "planner.h"

namespace fused_copy {
namespace {

// dtype, device type and index; whether it is strided, and requires grad with grad mode on; sizes and strides.
using Description = std::tuple<std::string, std::string, int, bool, bool, std::vector<int64_t>, std::vector<int64_t>>;

void check_metadata(const std::vector<Description>& destinations, const std::vector<Description>& sources,
                    const std::optional<std::vector<Fill>>& fills) {
  uint64_t end = 0;
  const auto views_of = [&](const std::vector<Description>& descriptions) {
    std::vector<TensorView> views;
    for (const auto& [dtype, device, index, strided, requires_grad, sizes, strides] : descriptions) {
      TensorView& view = views.emplace_back();
      view.sizes = sizes.data();
      view.strides = strides.data();
      view.rank = static_cast<int64_t>(sizes.size());
      view.dtype = dtype_of_name(dtype);
      // Meta tensors stand for those of any device.
      view.device.type = device == "cuda"                      ? DeviceType::Cuda
                         : device == "cpu" || device == "meta" ? DeviceType::Cpu
                                                               : DeviceType::Other;
      view.device.index = index;
      view.pinned = view.device.type == DeviceType::Cpu;  // which only the op itself can tell
      view.strided = strided;
      view.requires_grad = requires_grad;
      // Where memory will lie is not known: as far apart and as aligned as it can.
      view.storage_bytes = INT64_MAX;
      view.address = end + 64;
      end = (view.address + static_cast<uint64_t>(byte_extent(view)) + 63) & ~uint64_t{63};
    }
    return views;
  };
  const std::vector<TensorView> source_views = views_of(sources);
  try {
    Destinations bound;
    bound.bind(views_of(destinations), fills ? &*fills : nullptr);
    LaunchPlanner().plan(bound, source_views);
  } catch (const InvalidInput& error) {
    throw std::runtime_error(describe(error));
  }
}

}  // namespace

void define_check_metadata(pybind11::module_& module) {
  module.def("check_metadata", &check_metadata, pybind11::arg("dst"), pybind11::arg("src"), pybind11::arg("fill"));
}

}  // namespace fused_copy
