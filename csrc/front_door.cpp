#include "front_door.h"

#include <algorithm>
#include <array>
#include <cstring>
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

// Staged values of graphs that are gone, by a thread of CUDA's that may not call CUDA.
struct Graveyard {
  std::mutex mutex;
  OwnedTensors memory;
};

Graveyard& graveyard() {
  static auto* const graveyard = new Graveyard;
  return *graveyard;
}

void bury(void* tensor) {
  Graveyard& yard = graveyard();
  const std::lock_guard lock(yard.mutex);
  yard.memory.emplace_back(static_cast<AtenTensorHandle>(tensor));
}

// Where host memory is part of a GPU's source.
enum class HostMemory { None, Pinned, Pageable };

HostMemory locate(TensorView& view, const TensorView& destination) {
  if (view.device.type != DeviceType::Cpu || destination.device.type != DeviceType::Cuda) return HostMemory::None;
  const int64_t bytes = std::min(byte_extent(view), view.storage_bytes);
  const auto address = pinned_address(view.address, bytes, destination.device.index);
  if (!address) return HostMemory::Pageable;
  view.address = *address;
  view.pinned = true;
  return HostMemory::Pinned;
}

// Takes the values of a tensor in pageable memory, as this dtype. What is wrong with it is left for the planner to say.
void take_values(HostValues& values, SourcePart& part, DType dtype) {
  const TensorView view = part.view;
  const bool convertible = view.dtype == dtype || (is_castable(view.dtype) && is_castable(dtype));
  const int64_t bytes = byte_extent(view);
  if (!view.strided || view.lazy || view.dtype == DType::Unsupported || !convertible || view.rank > kMaxRank ||
      (bytes == 0 && !is_empty(view)) || bytes > view.storage_bytes || (bytes > 0 && view.address == 0)) {
    return;
  }
  std::array<int64_t, kMaxRank> strides;
  const auto rank = static_cast<size_t>(view.rank);
  for (size_t d = 0; d < rank; ++d) strides[d] = view.strides[d] * info(view.dtype).size;
  std::byte* const place = values.add(part, {view.sizes, rank}, dtype);
  if (bytes > 0) {
    convert_array({reinterpret_cast<const void*>(view.address), {view.sizes, rank}, {strides.data(), rank}, view.dtype},
                  dtype, place);
  }
}

void locate_part(HostValues& values, SourcePart& part, const TensorView& destination) {
  if (!part.given || part.by_value || locate(part.view, destination) != HostMemory::Pageable) return;
  take_values(values, part, part.view.dtype);
}

void locate_sources(std::span<const TensorView> destinations, Workspace& work) {
  const size_t given = work.derived.size();
  for (size_t i = 0; i < work.source_views.size() && i < destinations.size(); ++i) {
    TensorView& source = work.source_views[i];
    const std::span<const int64_t> sizes(source.sizes, static_cast<size_t>(source.rank));
    if (locate(source, destinations[i]) != HostMemory::Pageable || !fits(sizes, destinations[i])) continue;
    DerivedSource values{.pair = static_cast<int64_t>(i), .derivation = Derivation::Values};
    values.source.view = source;
    take_values(work.values, values.source, destinations[i].dtype);
    if (values.source.by_value) work.derived.push_back(values);
  }
  for (size_t i = 0; i < given; ++i) {
    DerivedSource& derived = work.derived[i];
    const TensorView& destination = destinations[derived.pair];
    if (derived.derivation != Derivation::Rows) locate_part(work.values, derived.source, destination);
    else if (derived.source.given) locate(derived.source.view, destination);
    for (SourcePart* part : {&derived.index, &derived.lengths, &derived.lengths_index}) {
      locate_part(work.values, *part, destination);
    }
  }
  if (work.derived.size() > given) std::ranges::sort(work.derived, {}, &DerivedSource::pair);
}

// Pinned memory of torch's own allocator, which has some at hand in steady state.
struct PinnedStaging final : Staging {
  PinnedStaging(OwnedTensor& memory, int device_index) : memory(memory), device_index(device_index) {}
  uint64_t stage(std::span<const std::byte> values) override {
    const auto size = static_cast<int64_t>(values.size());
    constexpr int64_t kStep = 1;
    AtenTensorHandle tensor;
    void* data;
    const AllowDuringCapture allow;
    if (aoti_torch_empty_strided_pinned(1, &size, &kStep, info(DType::UInt8).scalar_type, aoti_torch_device_type_cpu(),
                                        0, &tensor) != 0) {
      throw std::runtime_error("fused_copy: torch refused pinned memory for " + std::to_string(size) +
                               " bytes of host values");
    }
    memory.reset(tensor);
    std::optional<uint64_t> address;
    if (aoti_torch_get_data_ptr(tensor, &data) == 0) {
      std::memcpy(data, values.data(), values.size());
      address = pinned_address(reinterpret_cast<uint64_t>(data), size, device_index);
    }
    if (!address) {
      throw std::runtime_error("fused_copy: " + std::to_string(size) +
                               " bytes of host values are more than a launch carries, and memory that was asked for as "
                               "pinned is not pinned here: pass fewer values in one call, or GPU tensors");
    }
    return *address;
  }
  OwnedTensor& memory;
  int device_index;
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
  return bytes_of(destination_views) + bytes_of(source_views) + bytes_of(derived) + bytes_of(fills) +
         values.capacity_bytes() + destinations.capacity_bytes() + planner.capacity_bytes();
}

std::span<const PlannedLaunch> plan_call(Workspace& work) {
  work.destinations.bind(work.destination_views, work.has_fills ? &work.fills : nullptr);
  return plan_sources(work.destinations, work);
}

std::span<const PlannedLaunch> plan_sources(const Destinations& destinations, Workspace& work) {
  locate_sources(destinations.views(), work);
  PinnedStaging staging(work.staged, destinations.device().index);
  const std::span<const std::byte> values = work.derived.empty() ? std::span<const std::byte>() : work.values.bytes();
  return work.planner.plan(destinations, {work.source_views, work.derived, values}, &staging);
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
  OwnedTensors buried;
  try {
    {
      Graveyard& yard = graveyard();
      const std::lock_guard lock(yard.mutex);
      buried.swap(yard.memory);
    }
    const bool capturing = is_capturing(device_index_);
    if (capturing && reader_ == Reader::Launch) {
      if (staged_) {
        keep_with_capture(staged_.get(), &bury, device_index_);
        staged_.release();
      }
      return memory_.clear();
    }
    if (staged_) memory_.push_back(std::move(staged_));
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
    staged_.release();
  }
}

}  // namespace fused_copy
