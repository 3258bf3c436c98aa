#include "front_door.h"

#include <array>
#include <mutex>

namespace fused_copy {
namespace {

// Memory of sources that the GPU may still read.
struct InFlight {
  std::optional<GpuEvent> event;  // done once the GPU has read them; none for those that were let go during a capture
  std::list<OwnedTensors> memory;
};

// One for each GPU, so that a GPU that stands still does not keep memory that another one has read.
struct Queue {
  std::mutex mutex;
  std::list<InFlight> marked;  // oldest first
  std::list<OwnedTensors> unmarked;
};

// Never destroyed: the CUDA driver may have shut down before static destructors run.
Queue& queue_of(int device_index) {
  static auto* const queues = new std::array<Queue, kMaxGpus>;
  return queues->at(device_index);
}

// Never gives the references back.
void leak(OwnedTensors& tensors) {
  for (OwnedTensor& tensor : tensors) tensor.release();
}

}  // namespace

size_t Workspace::capacity_bytes() const {
  return bytes_of(destination_views) + bytes_of(source_views) + bytes_of(fills) + destinations.capacity_bytes() +
         planner.capacity_bytes();
}

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

OwnedTensor own_tensor(AtenTensorHandle tensor) {
  AtenTensorHandle owned;
  if (aoti_torch_new_tensor_handle(tensor, &owned) != 0) throw std::runtime_error("fused_copy: torch refused a tensor");
  return OwnedTensor(owned);
}

OwnedTensor own_memory(AtenTensorHandle tensor) {
  constexpr int64_t kNothing = 0;
  AtenTensorHandle view;
  if (aoti_torch__reinterpret_tensor(tensor, 1, &kNothing, &kNothing, 0, &view) != 0) {
    throw std::runtime_error("fused_copy: torch refused a reference to a tensor's memory");
  }
  return OwnedTensor(view);
}

void PinnedSources::let_go() noexcept {
  if (empty()) return;
  std::list<InFlight> own, done;  // outlive the lock: the last reference to memory may run a finalizer that copies
  try {
    const bool capturing = is_capturing(device_index_);
    if (capturing && reader_ == Reader::Launch) return memory_.clear();
    // Everything that can fail comes before anything is moved.
    Queue& queue = queue_of(device_index_);
    std::list<OwnedTensors>& memory = own.emplace_back().memory;
    memory.emplace_back() = std::move(memory_);
    std::unique_lock lock(queue.mutex);
    if (capturing) {
      queue.unmarked.splice(queue.unmarked.end(), memory);
    } else {
      memory.splice(memory.end(), queue.unmarked);  // the event is theirs too
      lock.unlock();  // recording waits while the stream's queue is full, perhaps for a thread that comes here too
      own.back().event.emplace(record_event(device_index_));
      lock.lock();
      queue.marked.splice(queue.marked.end(), own);
    }
    while (!queue.marked.empty() && queue.marked.front().event->done()) {
      done.splice(done.end(), queue.marked, queue.marked.begin());
    }
  } catch (const std::exception&) {
    for (InFlight& entry : own) {
      for (OwnedTensors& memory : entry.memory) leak(memory);
    }
    leak(memory_);
  }
}

}  // namespace fused_copy
