#include "front_door.h"

#include <deque>
#include <mutex>

namespace fused_copy {
namespace {

// Sources in flight, oldest first. Never destroyed: at exit the CUDA driver may be gone before it.
struct InFlight {
  std::mutex mutex;
  struct Entry {
    GpuEvent event;
    std::vector<AtenTensorHandle> tensors;
  };
  std::deque<Entry> entries;
};

InFlight& in_flight() {
  static auto* const instance = new InFlight;
  return *instance;
}

}  // namespace

void locate_pinned(std::span<const TensorView> destinations, std::span<TensorView> sources) {
  for (size_t i = 0; i < sources.size() && i < destinations.size(); ++i) {
    TensorView& source = sources[i];
    if (source.device.type != DeviceType::Cpu || destinations[i].device.type != DeviceType::Cuda) continue;
    const int64_t bytes = std::min(byte_extent(source), source.storage_bytes);
    if (const auto address = pinned_address(source.address, bytes, destinations[i].device.index)) {
      source.address = *address;
      source.pinned = true;
    }
  }
}

std::span<const PlannedLaunch> plan_call(Workspace& work) {
  locate_pinned(work.destination_views, work.source_views);
  work.destinations.bind(work.destination_views, work.has_fills ? &work.fills : nullptr);
  return work.planner.plan(work.destinations, work.source_views);
}

AtenTensorHandle own_handle(AtenTensorHandle tensor) {
  AtenTensorHandle owned;
  if (aoti_torch_new_tensor_handle(tensor, &owned) != 0) throw std::runtime_error("fused_copy: torch refused a tensor");
  return owned;
}

void keep_until_done(int device_index, std::vector<AtenTensorHandle> tensors) {
  std::vector<std::vector<AtenTensorHandle>> done;
  {
    InFlight& flight = in_flight();
    const std::lock_guard lock(flight.mutex);
    if (std::optional<GpuEvent> event = record_event(current_stream(device_index), device_index)) {
      flight.entries.push_back({std::move(*event), std::move(tensors)});
    } else {
      done.push_back(std::move(tensors));
    }
    while (!flight.entries.empty() && flight.entries.front().event.done()) {
      done.push_back(std::move(flight.entries.front().tensors));
      flight.entries.pop_front();
    }
  }
  // Outside the lock: the last reference to a tensor may run a finalizer that copies.
  for (const auto& list : done) {
    for (AtenTensorHandle tensor : list) aoti_torch_delete_tensor_object(tensor);
  }
}

}  // namespace fused_copy
