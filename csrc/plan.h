// Destinations bound once, and their copy as nodes of a CUDA graph.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "python_tensors.h"

namespace fused_copy {

struct NotPlain {};

// Destinations that were checked and are held. Immutable, so that threads may share it.
class BoundPlan {
 public:
  // Throws as a call with these destinations does, NotPlain where they are for the dispatcher.
  // `elsewhere(*sources)` is for calls that are for the dispatcher or the reference.
  BoundPlan(py::tuple destinations, py::handle fill, py::object names, py::object elsewhere);
  BoundPlan(const BoundPlan&) = delete;
  BoundPlan& operator=(const BoundPlan&) = delete;

  void replay(TensorSpan sources) const;

  // Reads the sources into the workspace and plans the launches that copy them. None where they are for the dispatcher.
  std::optional<std::span<const PlannedLaunch>> plan(TensorSpan sources, bool grad_mode, Workspace& work) const;

  const Device& device() const { return bound_.device(); }

 private:
  void check_autograd(Workspace& work) const;

  py::tuple destinations_;
  py::object names_;
  py::object elsewhere_;
  std::vector<int64_t> shapes_;  // sizes and strides that the views point to, so that the tensors may change theirs
  Destinations bound_;
  bool counts_versions_ = false;  // inference tensors have no version counters
};

// A plan's copy recorded in a CUDA graph.
class GraphCopy {
 public:
  // Records the copy of the sources in the capture that is under way on the device's current stream.
  static std::shared_ptr<GraphCopy> capture(std::shared_ptr<BoundPlan> plan, py::object graph, py::tuple sources);
  GraphCopy(const GraphCopy&) = delete;
  GraphCopy& operator=(const GraphCopy&) = delete;

  // Makes the next launches of the graph copy these sources. Throws where it is called while it runs.
  void update(TensorSpan sources);

  size_t launches() const { return nodes_.size(); }

 private:
  // Sources that launches of the graph may read.
  struct Held {
    explicit Held(int device_index) : pinned(device_index, PinnedSources::Reader::Graph) {}
    Held(Held&&) = default;
    Held& operator=(Held&&) = default;
    ~Held() { let_go(); }
    // Holds these in place of what it held.
    void take(TensorSpan tensors, std::span<const TensorView> views);
    void let_go();

    std::vector<py::object> sources;
    PinnedSources pinned;
  };

  GraphCopy(std::shared_ptr<BoundPlan> plan, py::object graph)
      : plan_(std::move(plan)),
        graph_(std::move(graph)),
        captured_(device_index()),
        current_(device_index()),
        next_(device_index()) {}
  int device_index() const { return plan_->device().index; }
  // The graph's executable, null where it has none. Throws where the nodes are not this graph's.
  void* executable();

  std::shared_ptr<BoundPlan> plan_;
  py::object graph_;
  std::vector<GraphNode> nodes_;
  void* captured_graph_ = nullptr;
  void* executable_ = nullptr;   // the one whose nodes were last checked to be these
  Held captured_;                // what an executable made anew begins with
  Held current_;                 // what the executable's nodes read
  std::vector<Held> abandoned_;  // what some of them read too, after an update that CUDA refused midway
  Held next_;                    // empty but for its memory, outside of an update
  std::atomic_flag updating_;
};

// `replay` and `update` as fast methods.
py::object bind_replay(const std::shared_ptr<BoundPlan>& plan);
py::object bind_update(const std::shared_ptr<GraphCopy>& copy);

}  // namespace fused_copy
