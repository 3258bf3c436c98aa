#include "metadata.h"

#include <algorithm>
#include <iterator>
#include <string_view>

#include "planner.h"

namespace fused_copy {
namespace {

DType dtype_of_name(std::string_view name) {
  const auto* const row = std::ranges::find(kDTypes, name, &DTypeInfo::name);
  return row == std::end(kDTypes) ? DType::Unsupported : row->dtype;
}

}  // namespace

void check_metadata(const std::vector<Description>& destinations, const std::vector<Description>& sources,
                    const std::vector<Fill>* fills) {
  uint64_t end = 0;
  const auto views_of = [&](const std::vector<Description>& descriptions) {
    std::vector<TensorView> views;
    for (const Description& tensor : descriptions) {
      TensorView& view = views.emplace_back();
      view.sizes = tensor.sizes.data();
      view.strides = tensor.strides.data();
      view.rank = static_cast<int64_t>(tensor.sizes.size());
      view.dtype = dtype_of_name(tensor.dtype);
      // Meta tensors stand for those of any device.
      view.device.type = tensor.device_type == "cuda"                                  ? DeviceType::Cuda
                         : tensor.device_type == "cpu" || tensor.device_type == "meta" ? DeviceType::Cpu
                                                                                       : DeviceType::Other;
      view.device.index = tensor.device_index;
      view.pinned = view.device.type == DeviceType::Cpu;  // perhaps: the op itself checks it
      view.strided = tensor.strided;
      view.autograd.requires_grad = tensor.requires_grad;
      // Addresses are not known yet: assume tensors that do not overlap and are aligned.
      view.storage_bytes = INT64_MAX;
      view.address = end + 64;
      end = (view.address + static_cast<uint64_t>(byte_extent(view)) + 63) & ~uint64_t{63};
    }
    return views;
  };
  const std::vector<TensorView> source_views = views_of(sources);
  Destinations bound;
  bound.bind(views_of(destinations), fills);
  LaunchPlanner().plan(bound, {source_views});
}

}  // namespace fused_copy
