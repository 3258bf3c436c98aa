// Destinations bound once, and their copy as nodes of a CUDA graph.
#pragma once

#include <memory>
#include <vector>

#include "python_tensors.h"

namespace fused_copy {

struct NotPlain {};

// Destinations that were checked and are held. Immutable, so that threads may share it.
class BoundPlan {
 public:
  // Throws as a call with these destinations does, NotPlain where they are for the dispatcher.
  BoundPlan(py::tuple destinations, py::handle fill, py::object names);
  BoundPlan(const BoundPlan&) = delete;
  BoundPlan& operator=(const BoundPlan&) = delete;

  // Copies. False, and nothing done, where the call is for the dispatcher or the reference.
  bool replay(TensorSpan sources) const;

  // Reads the sources into the workspace and plans the launches that copy them. None where they are for the dispatcher.
  std::optional<std::span<const PlannedLaunch>> plan(TensorSpan sources, bool grad_mode, Workspace& work) const;

  const Device& device() const { return bound_.device(); }

 private:
  void check_autograd() const;

  py::tuple destinations_;
  py::object names_;
  std::vector<int64_t> shapes_;  // sizes and strides that the views point to, so that the tensors may change theirs
  Destinations bound_;
};

// A plan's copy recorded in a CUDA graph.
class GraphCopy {
 public:
  // Records the copy of the sources in the capture that is under way on the device's current stream.
  static std::shared_ptr<GraphCopy> capture(std::shared_ptr<BoundPlan> plan, py::object graph, py::tuple sources);
  GraphCopy(const GraphCopy&) = delete;
  GraphCopy& operator=(const GraphCopy&) = delete;
  ~GraphCopy() { release_pinned(); }

  // Makes the next launches of the graph copy these sources.
  void update(TensorSpan sources);

  size_t launches() const { return nodes_.size(); }

 private:
  GraphCopy(std::shared_ptr<BoundPlan> plan, py::object graph, py::tuple sources)
      : plan_(std::move(plan)), graph_(std::move(graph)), captured_sources_(std::move(sources)) {}
  void hold(TensorSpan sources, const Workspace& work);
  void release_pinned();

  std::shared_ptr<BoundPlan> plan_;
  py::object graph_;
  py::tuple captured_sources_;       // what the graph reads again should it be instantiated anew
  std::vector<py::object> sources_;  // what its next launches read
  std::vector<AtenTensorHandle> pinned_;
  std::vector<void*> nodes_;
  void* captured_graph_ = nullptr;
  void* executable_ = nullptr;  // the one whose nodes were last checked to be these
};

// `replay` and `update` as callables with C's calling convention, which cost less per call than a binding of pybind11.
py::object bind_replay(const std::shared_ptr<BoundPlan>& plan);
py::object bind_update(const std::shared_ptr<GraphCopy>& copy);

}  // namespace fused_copy
