// Destinations bound once, and their copy as nodes of a CUDA graph.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "python_sources.h"
#include "tensors.h"

namespace fused_copy {

// Visits the Python objects that another one holds, for Python's garbage collector.
class Visit {
 public:
  Visit(visitproc visit, void* argument) : visit_(visit), argument_(argument) {}
  void operator()(const py::object& object) {
    if (object && result_ == 0) result_ = visit_(object.ptr(), argument_);
  }
  int result() const { return result_; }

 private:
  visitproc visit_;
  void* argument_;
  int result_ = 0;
};

// Destinations that were checked and are held. Immutable, so that threads may share it, until Python collects it as
// garbage.
class BoundPlan {
 public:
  // Checks plain destinations as a call with them does, and throws as it does, but for what is deferred.
  BoundPlan(py::tuple destinations, py::object fill, py::object names);
  BoundPlan(const BoundPlan&) = delete;
  BoundPlan& operator=(const BoundPlan&) = delete;

  // False where the destinations are for the dispatcher.
  bool read();
  const Deferred& deferred() const { return bound_.deferred(); }

  void replay(TensorSpan sources) const;

  // The sources that a call was given, one by one or as one mapping of the destinations' names. Throws TypeError,
  // KeyError.
  py::object in_order(TensorSpan arguments, PyObject* keywords) const;

  // Reads the sources into the workspace and plans the launches that copy them. None where they are for the dispatcher.
  // Throws InvalidInput.
  std::optional<std::span<const PlannedLaunch>> plan(TensorSpan sources, Workspace& work) const;

  // plan() for a graph, which takes plain tensors alone. Throws what Python shows.
  std::span<const PlannedLaunch> plan_for_graph(TensorSpan sources, Workspace& work) const;

  const Device& device() const { return bound_.device(); }
  size_t size() const { return bound_.views().size(); }

  void traverse(Visit& visit) const;
  void clear();

 private:
  void check_memory() const;
  void refuse_memory(size_t index, AtenTensorHandle handle) const;
  // Throws InvalidInput where autograd refuses a destination, as ask_autograd() was told.
  void check_autograd(std::span<const TensorView> asked) const;

  py::object destinations_;  // a tuple; null once it was collected
  py::object fill_;
  py::object names_;
  OwnedTensors held_memory_;  // keeps the storages alive, as graphs may write into them after the tensors are gone
  std::vector<Memory> bound_memory_;
  std::vector<int64_t> shapes_;  // copies of sizes and strides, for the views to point to
  Destinations bound_;
  bool counts_versions_ = false;  // inference tensors have no version counters
};

// A plan's copy recorded in a CUDA graph.
class GraphCopy {
 public:
  // Records the copy of the sources, a tuple, in the capture that is under way on the device's current stream.
  static std::unique_ptr<GraphCopy> capture(py::object plan, const py::object& graph, const py::tuple& sources);
  GraphCopy(const GraphCopy&) = delete;
  GraphCopy& operator=(const GraphCopy&) = delete;

  // Makes the next launches of the graph copy these sources. Throws where it is called while it runs.
  void update(TensorSpan sources);

  const BoundPlan& plan() const { return *bound_; }
  size_t launches() const { return nodes_.size(); }

  void traverse(Visit& visit) const;
  void clear();

 private:
  // Sources that launches of the graph may read.
  struct Held {
    explicit Held(int device_index) : pinned(device_index, PinnedSources::Reader::Graph) {}
    Held(Held&&) = default;
    Held& operator=(Held&&) = default;
    ~Held() { let_go(); }
    // Holds these in place of what it held.
    void take(TensorSpan tensors, Workspace& work);
    void let_go();

    std::vector<py::object> sources;
    PinnedSources pinned;
  };

  GraphCopy(py::object plan, const BoundPlan* bound, const py::object& graph)
      : plan_(std::move(plan)),
        bound_(bound),
        graph_(graph),
        captured_(device_index()),
        current_(device_index()),
        next_(device_index()) {}
  int device_index() const { return bound_->device().index; }
  // The executable of the graph that owns the nodes, null where it has none. Throws where they are not this graph's.
  void* executable(const py::object& owner);

  py::object plan_;
  const BoundPlan* bound_;  // the object within plan_
  py::weakref graph_;       // weak: kept alive, it would be destroyed at a time when a capture may be under way
  std::vector<GraphNode> nodes_;
  void* captured_graph_ = nullptr;
  void* executable_ = nullptr;   // the executable that was last checked to have these nodes
  Held captured_;                // what every executable begins with
  Held current_;                 // what the executable's nodes read
  std::vector<Held> abandoned_;  // what some nodes may read, after an update that CUDA refused midway
  Held next_;                    // empty outside of an update, but keeps its capacity
  std::atomic_flag updating_;
};

// Adds both types to the binary module.
void define_plan(py::module_& module);

}  // namespace fused_copy
