#include "front_door.h"

#include <deque>
#include <mutex>

namespace fused_copy {
namespace {

// Sources in flight. Never destroyed: at exit the CUDA driver may be gone before it.
struct InFlight {
  std::mutex mutex;
  struct Entry {
    GpuEvent event;
    OwnedTensors tensors;
  };
  std::deque<Entry> entries;  // oldest first
  struct Unmarked {
    int device_index;
    OwnedTensors tensors;
  };
  std::vector<Unmarked> unmarked;  // let go while their device's stream was capturing: the next event is theirs too
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

void OwnedTensors::clear() {
  for (AtenTensorHandle tensor : std::exchange(handles_, {})) aoti_torch_delete_tensor_object(tensor);
}

void PinnedSources::let_go() noexcept {
  if (empty()) return;
  std::vector<OwnedTensors> done;  // outlives the lock: the last reference to a tensor may run a finalizer that copies
  try {
    InFlight& flight = in_flight();
    const bool capturing = is_capturing(device_index_);
    std::unique_lock lock(flight.mutex);
    if (!capturing) {
      for (InFlight::Unmarked& earlier : flight.unmarked) {
        if (earlier.device_index != device_index_) continue;
        for (AtenTensorHandle tensor : earlier.tensors.handles()) tensors_.adopt(tensor);
        earlier.tensors.leak();
      }
      std::erase_if(flight.unmarked, [](const auto& earlier) { return earlier.tensors.handles().empty(); });
      lock.unlock();  // recording waits while the stream's queue is full, perhaps for a thread that comes here too
      GpuEvent event = record_event(device_index_);
      lock.lock();
      flight.entries.push_back({std::move(event), std::move(tensors_)});
    } else if (reader_ == Reader::Graph) {
      flight.unmarked.push_back({device_index_, std::move(tensors_)});
    } else {
      done.push_back(std::move(tensors_));
    }
    while (!flight.entries.empty() && flight.entries.front().event.done()) {
      done.push_back(std::move(flight.entries.front().tensors));
      flight.entries.pop_front();
    }
  } catch (const std::exception&) {
    tensors_.leak();
  }
}

}  // namespace fused_copy
