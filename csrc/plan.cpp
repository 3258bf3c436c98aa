#include "plan.h"

#include <algorithm>

namespace fused_copy {
namespace {

// A callable whose self is a capsule that shares the ownership of `object`.
template <class T>
py::object bind(const std::shared_ptr<T>& object, PyMethodDef* method) {
  using Shared = std::shared_ptr<T>;
  const py::capsule self(new Shared(object), [](void* shared) { delete static_cast<Shared*>(shared); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(method, self.ptr()));
}

template <class T>
T& self_of(PyObject* capsule) {
  return **static_cast<std::shared_ptr<T>*>(PyCapsule_GetPointer(capsule, nullptr));
}

PyObject* call_replay(PyObject* self, PyObject* const* sources, Py_ssize_t count) {
  return translate_errors([&] {
    self_of<BoundPlan>(self).replay({sources, static_cast<size_t>(count)});
    return Py_NewRef(Py_None);
  });
}

PyObject* call_update(PyObject* self, PyObject* const* sources, Py_ssize_t count) {
  return translate_errors([&] {
    self_of<GraphCopy>(self).update({sources, static_cast<size_t>(count)});
    return Py_NewRef(Py_None);
  });
}

PyMethodDef replay_method = fast_method(
    "replay", &call_replay, "replay(*sources) -> None: copies every source into its destination, in one launch.");
PyMethodDef update_method =
    fast_method("update", &call_update, "update(*sources) -> None: the graph's next launches copy these sources.");

// The pointer that a method of CUDAGraph returns as an integer; null where it raises, whose text then goes to
// `refusal`.
void* graph_pointer(PyObject* method, const py::object& graph, std::string* refusal = nullptr) {
  try {
    return PyLong_AsVoidPtr(call(method, graph.ptr()).ptr());
  } catch (const py::error_already_set& error) {
    if (refusal) *refusal = error.what();
    return nullptr;
  }
}

constexpr const char* kPlainSources =
    "fused_copy: sources in a graph must be plain tensors, not subclasses or fake ones";

}  // namespace

BoundPlan::BoundPlan(py::tuple destinations, py::handle fill, py::object names, py::object elsewhere)
    : destinations_(std::move(destinations)), names_(std::move(names)), elsewhere_(std::move(elsewhere)) {
  std::vector<Fill> fills;
  const bool has_fills = read_fills(fill, names_, fills);  // runs Python code: before tensors are read
  std::vector<TensorView> views;
  if (!read_tensors(items_of(destinations_), "destination", names_, views) || is_intercepted()) throw NotPlain();
  read_autograd(items_of(destinations_), views);
  counts_versions_ =
      std::ranges::any_of(items_of(destinations_), [](PyObject* tensor) { return !is_inference(tensor); });
  size_t numbers = 0;
  for (const TensorView& view : views) numbers += 2 * view.rank;
  shapes_.reserve(numbers);
  const auto copy_of = [&](const int64_t* values, int64_t count) {
    shapes_.insert(shapes_.end(), values, values + count);
    return shapes_.data() + shapes_.size() - count;
  };
  for (TensorView& view : views) {
    view.sizes = copy_of(view.sizes, view.rank);
    view.strides = copy_of(view.strides, view.rank);
  }
  with_names(names_, [&] { bound_.bind(views, has_fills ? &fills : nullptr); });
}

void BoundPlan::check_autograd(Workspace& work) const {
  work.destination_views.assign(bound_.views().begin(), bound_.views().end());
  read_autograd(items_of(destinations_), work.destination_views);
  const auto refused = [](const TensorView& view) { return view.requires_grad || view.inference; };
  if (std::ranges::any_of(work.destination_views, refused)) work.destinations.bind(work.destination_views, nullptr);
}

std::optional<std::span<const PlannedLaunch>> BoundPlan::plan(TensorSpan sources, bool grad_mode,
                                                              Workspace& work) const {
  if (!read_tensors(sources, "source", names_, work.source_views) || is_intercepted()) return std::nullopt;
  return with_names(names_, [&] {
    if (grad_mode) check_autograd(work);
    locate_pinned(bound_.views(), work.source_views);
    return work.planner.plan(bound_, work.source_views);
  });
}

void BoundPlan::replay(TensorSpan sources) const {
  if (!use_reference) {
    BorrowedWorkspace work;
    const bool grad_mode = aoti_torch_grad_mode_is_enabled();
    if (const auto launches = plan(sources, grad_mode, *work)) {
      // In inference mode, where engines replay, it would cost as much as the rest of the call.
      if (counts_versions_ && (grad_mode || !is_inference_mode())) {
        call(torch_api.increment_version, destinations_.ptr());
      }
      run_call<WithoutGil>(*launches, device(), work->source_views, [&](size_t i) { return handle_of(sources[i]); });
      return;
    }
  }
  const auto result =
      py::reinterpret_steal<py::object>(PyObject_Vectorcall(elsewhere_.ptr(), sources.data(), sources.size(), nullptr));
  if (!result) throw py::error_already_set();
}

std::shared_ptr<GraphCopy> GraphCopy::capture(std::shared_ptr<BoundPlan> plan, py::object graph, py::tuple sources) {
  const Device device = plan->device();
  if (device.type != DeviceType::Cuda) {
    throw std::runtime_error("fused_copy: capture needs destinations on a GPU: these are on " + device_name(device));
  }
  std::string refusal;
  if (graph_pointer(torch_api.graph, graph, &refusal) != nullptr) {
    throw std::runtime_error("fused_copy: the graph was captured already: call capture within torch.cuda.graph(graph)");
  }
  if (refusal.find("keep_graph") != std::string::npos) {
    throw std::runtime_error(
        "fused_copy: the graph does not keep its nodes for updates: make it with "
        "torch.cuda.CUDAGraph(keep_graph=True)");
  }
  if (!is_capturing(device.index)) {
    throw std::runtime_error("fused_copy: the current stream of " + device_name(device) +
                             " is not capturing: call capture within torch.cuda.graph(graph)");
  }
  BorrowedWorkspace work;
  const TensorSpan items = items_of(sources);
  const auto launches = plan->plan(items, aoti_torch_grad_mode_is_enabled(), *work);
  if (!launches) throw py::type_error(kPlainSources);
  const std::shared_ptr<GraphCopy> copy(new GraphCopy(std::move(plan), std::move(graph)));
  copy->captured_.take(items, work->source_views);
  // A copy of nothing is recorded too, so that an update can make it one of something.
  for (size_t i = 0; i < std::max<size_t>(launches->size(), 1); ++i) {
    const CapturedLaunch captured = capture_launch(i < launches->size() ? &(*launches)[i] : nullptr, device.index);
    copy->captured_graph_ = captured.graph;
    copy->nodes_.push_back(captured.node);
  }
  return copy;
}

void GraphCopy::update(TensorSpan sources) {
  if (updating_.test_and_set(std::memory_order_acquire)) {
    throw std::runtime_error("fused_copy: another update of this copy is under way: make one after the other");
  }
  struct Done {
    std::atomic_flag& updating;
    ~Done() { updating.clear(std::memory_order_release); }
  } const done{updating_};
  BorrowedWorkspace work;
  const auto launches = plan_->plan(sources, aoti_torch_grad_mode_is_enabled(), *work);
  if (!launches) throw py::type_error(kPlainSources);
  if (launches->size() > nodes_.size()) {
    throw std::runtime_error("fused_copy: these sources need " + std::to_string(launches->size()) +
                             " launches but the graph holds " + std::to_string(nodes_.size()) +
                             ": capture the copy with sources that need as many");
  }
  void* const executable = this->executable();
  next_.take(sources, work->source_views);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    try {
      // Before the graph is instantiated, its own node takes the parameters, and the instance will have them.
      set_node(executable, nodes_[i], i < launches->size() ? &(*launches)[i] : nullptr, device_index());
    } catch (const std::exception&) {
      if (i > 0) abandoned_.push_back(std::exchange(next_, Held(device_index())));
      next_.let_go();
      throw;
    }
  }
  Held& replaced = executable == nullptr ? captured_ : current_;
  std::swap(replaced, next_);
  next_.let_go();
  abandoned_.clear();
}

void* GraphCopy::executable() {
  void* const executable = graph_pointer(torch_api.graph_exec, graph_);
  if (executable == nullptr || executable != executable_) {
    void* const graph = graph_pointer(torch_api.graph, graph_);
    if (graph == nullptr) {
      throw std::runtime_error(
          "fused_copy: the graph has no nodes to update: it is still being captured, or it was reset");
    }
    if (graph != captured_graph_) {
      throw std::runtime_error("fused_copy: the copy was not captured in this graph, or the graph was captured anew");
    }
  }
  return executable_ = executable;
}

void GraphCopy::Held::take(TensorSpan tensors, std::span<const TensorView> views) {
  let_go();
  for (PyObject* tensor : tensors) sources.push_back(py::reinterpret_borrow<py::object>(tensor));
  pinned.take(views, [&](size_t i) { return handle_of(tensors[i]); });
}

void GraphCopy::Held::let_go() {
  if (!pinned.empty()) {
    const WithoutGil unlocked;
    pinned.let_go();
  }
  sources.clear();
}

py::object bind_replay(const std::shared_ptr<BoundPlan>& plan) { return bind(plan, &replay_method); }
py::object bind_update(const std::shared_ptr<GraphCopy>& copy) { return bind(copy, &update_method); }

}  // namespace fused_copy
