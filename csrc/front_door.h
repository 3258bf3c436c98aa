// What both front doors do with the tensors that they have read.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <list>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "back_end.h"
#include "planner.h"

namespace fused_copy {

struct DeleteTensor {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
// A reference to a tensor, by a handle of torch's stable ABI.
using OwnedTensor = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;
using OwnedTensors = std::vector<OwnedTensor>;

struct Workspace {
  std::vector<TensorView> destination_views;
  std::vector<TensorView> source_views;
  std::vector<DerivedSource> derived;
  HostValues values;
  OwnedTensor staged;  // pinned memory that holds the values, where no launch has room for them
  std::vector<Fill> fills;
  bool has_fills = false;
  Destinations destinations;
  LaunchPlanner planner;

  size_t capacity_bytes() const;
};

// Each thread keeps one workspace, so that calls do not allocate. A call within a call, as a finalizer may make one,
// gets another.
class BorrowedWorkspace {
 public:
  BorrowedWorkspace() : workspace_(idle() ? std::move(idle()) : std::make_unique<Workspace>()) {
    workspace_->destination_views.clear();
    workspace_->source_views.clear();
    workspace_->derived.clear();
    workspace_->values.clear();
    workspace_->fills.clear();
    workspace_->has_fills = false;
  }
  ~BorrowedWorkspace() {
    workspace_->staged.reset();
    // One huge call must not cost the thread its memory for ever.
    idle() = workspace_->capacity_bytes() <= kKeptBytes ? std::move(workspace_) : nullptr;
  }
  BorrowedWorkspace(const BorrowedWorkspace&) = delete;
  BorrowedWorkspace& operator=(const BorrowedWorkspace&) = delete;
  Workspace* operator->() { return workspace_.get(); }
  Workspace& operator*() { return *workspace_; }

 private:
  static constexpr size_t kKeptBytes = 1 << 20;  // thousands of pairs

  static std::unique_ptr<Workspace>& idle() {
    thread_local std::unique_ptr<Workspace> workspace;
    return workspace;
  }
  std::unique_ptr<Workspace> workspace_;
};

// Whether this torch's stable ABI has lists of tensors, so that the op is implemented in C++.
bool registers_op();

// Plans a call with the sources that the workspace holds. Host memory of GPU destinations' sources is read by the GPU
// where it is pinned, and else taken as values. Throws InvalidInput.
std::span<const PlannedLaunch> plan_sources(const Destinations& destinations, Workspace& work);

// The same, with the destinations that the workspace holds.
std::span<const PlannedLaunch> plan_call(Workspace& work);

// Another reference to the tensor of a handle.
OwnedTensor own_tensor(AtenTensorHandle tensor);

// A reference to the tensor's memory, which stays whatever becomes of the tensor: it may be set to other memory.
OwnedTensor own_memory(AtenTensorHandle tensor);

// Pinned sources that the GPU reads, by launches made while this object lives. Freed by the caller, their memory would
// be handed out again, so they stay until the work that the device's current stream has when they are let go is done.
class PinnedSources {
 public:
  enum class Reader {
    Launch,  // of one call; under capture, the graph's owner keeps what it reads, and nothing stays
    Graph,   // a graph with launches under way, whatever the current stream is capturing
  };

  PinnedSources(int device_index, Reader reader) : device_index_(device_index), reader_(reader) {}
  PinnedSources(PinnedSources&&) = default;
  PinnedSources& operator=(PinnedSources&&) = default;
  ~PinnedSources() { let_go(); }

  // Takes another reference to the memory of those of a call's tensors that are pinned, and its staged values.
  template <class HandleOf, class HandleOfPart>
  void take(Workspace& work, HandleOf handle_of_source, HandleOfPart handle_of_part) {
    for (size_t i = 0; i < work.source_views.size(); ++i) {
      if (work.source_views[i].pinned) memory_.push_back(own_memory(handle_of_source(i)));
    }
    for (const DerivedSource& derived : work.derived) {
      for (const SourcePart* part : {&derived.source, &derived.index, &derived.lengths, &derived.lengths_index}) {
        if (part->view.pinned) memory_.push_back(own_memory(handle_of_part(part->tensor)));
      }
    }
    if (work.staged) staged_ = std::move(work.staged);
  }
  bool empty() const { return memory_.empty() && !staged_; }
  // Where CUDA refuses to tell when the work is done, they stay forever.
  void let_go() noexcept;

 private:
  int device_index_;
  Reader reader_;
  OwnedTensors memory_;
  OwnedTensor staged_;
};

struct NoLock {};

// Runs the launches of a call whose sources are the tensors of `handle_of_source(index)`, and their parts those of
// `handle_of_part(tensor)`. An `Unlocked` lives while the call may wait for the GPU.
template <class Unlocked = NoLock, class HandleOf, class HandleOfPart>
void run_call(std::span<const PlannedLaunch> launches, const Device& device, Workspace& work, HandleOf handle_of_source,
              HandleOfPart handle_of_part) {
  PinnedSources pinned(device.index, PinnedSources::Reader::Launch);
  pinned.take(work, handle_of_source, handle_of_part);
  [[maybe_unused]] const Unlocked unlocked;
  const PinnedSources reading(std::move(pinned));  // let go before the lock is taken again, after an error too
  run(launches, device);
}

}  // namespace fused_copy
