// What one call works with.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "planner.h"

namespace fused_copy {

struct Workspace {
  std::vector<TensorView> destination_views;
  std::vector<TensorView> source_views;
  std::vector<Fill> fills;
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
  }
  ~BorrowedWorkspace() { idle() = std::move(workspace_); }
  BorrowedWorkspace(const BorrowedWorkspace&) = delete;
  BorrowedWorkspace& operator=(const BorrowedWorkspace&) = delete;
  Workspace* operator->() { return workspace_.get(); }

 private:
  static std::unique_ptr<Workspace>& idle() {
    thread_local std::unique_ptr<Workspace> workspace;
    return workspace;
  }
  std::unique_ptr<Workspace> workspace_;
};

}  // namespace fused_copy
