// What both front doors do with the tensors that they have read.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "back_end.h"
#include "planner.h"

namespace fused_copy {

struct Workspace {
  std::vector<TensorView> destination_views;
  std::vector<TensorView> source_views;
  std::vector<Fill> fills;
  bool has_fills = false;
  Destinations destinations;
  LaunchPlanner planner;
};

// Each thread keeps one workspace, so that calls do not allocate. A call within a call, as a finalizer may make one,
// gets another.
class BorrowedWorkspace {
 public:
  BorrowedWorkspace() : workspace_(idle() ? std::move(idle()) : std::make_unique<Workspace>()) {
    workspace_->destination_views.clear();
    workspace_->source_views.clear();
    workspace_->fills.clear();
    workspace_->has_fills = false;
  }
  ~BorrowedWorkspace() { idle() = std::move(workspace_); }
  BorrowedWorkspace(const BorrowedWorkspace&) = delete;
  BorrowedWorkspace& operator=(const BorrowedWorkspace&) = delete;
  Workspace* operator->() { return workspace_.get(); }
  Workspace& operator*() { return *workspace_; }

 private:
  static std::unique_ptr<Workspace>& idle() {
    thread_local std::unique_ptr<Workspace> workspace;
    return workspace;
  }
  std::unique_ptr<Workspace> workspace_;
};

// Gives pinned sources of GPU destinations the address by which the GPU reads them.
void locate_pinned(std::span<const TensorView> destinations, std::span<TensorView> sources);

// Whether this torch's stable ABI has lists of tensors, so that the op is implemented in C++.
bool registers_op();

// Plans the call whose tensors the workspace holds. Throws InvalidInput.
std::span<const PlannedLaunch> plan_call(Workspace& work);

// Another reference to the tensor of a handle of torch's stable ABI.
AtenTensorHandle own_handle(AtenTensorHandle tensor);

// Holds the tensors, which it takes over, until the work that the device's current stream has now is done. Under
// capture it lets them go at once: the graph's owner keeps what the graph reads.
void keep_until_done(int device_index, std::vector<AtenTensorHandle> tensors);

// Runs the launches and keeps pinned sources, of which `own(index)` gives an owned handle, until the GPU has read them:
// freed by the caller, their memory would be handed out again.
template <class Own>
void run_call(std::span<const PlannedLaunch> launches, const Device& device, std::span<const TensorView> sources,
              Own own) {
  run(launches, device);
  std::vector<AtenTensorHandle> pinned;
  for (size_t i = 0; i < sources.size(); ++i) {
    if (sources[i].pinned) pinned.push_back(own(i));
  }
  if (!pinned.empty()) keep_until_done(device.index, std::move(pinned));
}

}  // namespace fused_copy
