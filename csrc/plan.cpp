#include "plan.h"

#include <algorithm>

namespace fused_copy {
namespace {

// The C++ object within a Python object, without pybind11's conversion, which costs as much as the rest of a call.
template <class T>
T& object_in(PyObject* self) {
  return *static_cast<T*>(reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr());
}

// A call's sources in the destinations' order, held while the call runs.
class Sources {
 public:
  Sources(const BoundPlan& plan, PyObject* const* arguments, Py_ssize_t count, PyObject* keywords)
      : span_(arguments, static_cast<size_t>(count)) {
    const bool one_by_one =
        keywords == nullptr && (count != 1 || PyObject_TypeCheck(arguments[0], torch_api.tensor_type) ||
                                (plan.size() == 1 && PyList_Check(arguments[0])));
    if (one_by_one) return;
    ordered_ = plan.in_order(span_, keywords);
    span_ = items_of(ordered_);
  }
  operator TensorSpan() const { return span_; }

 private:
  TensorSpan span_;
  py::object ordered_;
};

PyObject* call_replay(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* keywords) {
  return translate_errors([&] {
    const auto& plan = object_in<BoundPlan>(self);
    plan.replay(Sources(plan, arguments, count, keywords));
    return Py_NewRef(Py_None);
  });
}

PyObject* call_update(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* keywords) {
  return translate_errors([&] {
    auto& copy = object_in<GraphCopy>(self);
    copy.update(Sources(copy.plan(), arguments, count, keywords));
    return Py_NewRef(Py_None);
  });
}

PyMethodDef plan_replay_method =
    fast_method("replay", &call_replay,
                "replay(*sources)\n--\n\nCopies every source into its destination, in one launch.\n\n"
                "Takes the sources in the destinations' order, or one mapping of the destinations' names to them.");
PyMethodDef copy_update_method =
    fast_method("update", &call_update,
                "update(*sources)\n--\n\nThe graph's next launches copy these sources.\n\n"
                "Takes the sources in the destinations' order, or one mapping of the destinations' names to them.");

template <PyMethodDef* kMethod>
py::object bound_method(const py::object& self) {
  return py::reinterpret_steal<py::object>(PyCFunction_New(kMethod, self.ptr()));
}

// Makes a type's objects visible to Python's garbage collector: a tensor's attribute may hold the tensor's own plan.
template <class T>
void make_collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!py::detail::is_holder_constructed(self)) return 0;
    Visit visitor(visit, arg);
    object_in<T>(self).traverse(visitor);
    return visitor.result();
  };
  type.tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) object_in<T>(self).clear();
    return 0;
  };
}

// A plan and an empty text, or null and the reason where the destinations are not plain.
std::pair<std::unique_ptr<BoundPlan>, std::string> bind_plan(py::tuple destinations, py::object fill,
                                                             py::object names) {
  const Role role{"destination", names};
  const TensorSpan items = items_of(destinations);
  const bool plain = are_plain(items, role);
  if (!torch_api.problem.empty()) return {nullptr, torch_api.problem};
  if (!plain) return {nullptr, dispatched_tensor(items, role)};
  auto plan = std::make_unique<BoundPlan>(destinations, std::move(fill), names);
  if (!plan->read()) return {nullptr, dispatched_tensor(items, role)};
  if (const Deferred& refusal = plan->deferred()) {
    const std::string text = describe(*refusal, name_of(names, refusal->pair));
    if (backend != Backend::Fallback) throw std::runtime_error(text);
    return {nullptr, text};
  }
  return {std::move(plan), ""};
}

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

// A new reference to a dictionary's item; null where there is none, or looking for it raised.
PyObject* new_item(PyObject* dictionary, PyObject* key) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* item;  // a new reference: without a GIL another thread may remove the item at any time
  PyDict_GetItemRef(dictionary, key, &item);
  return item;
#else
  return Py_XNewRef(PyDict_GetItemWithError(dictionary, key));
#endif
}

// The object of a weak reference, null where it is gone.
py::object referent(const py::weakref& reference) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* object;
  PyWeakref_GetRef(reference.ptr(), &object);
  return py::reinterpret_steal<py::object>(object);
#else
  PyObject* const object = PyWeakref_GetObject(reference.ptr());
  return object == Py_None ? py::object() : py::reinterpret_borrow<py::object>(object);
#endif
}

}  // namespace

BoundPlan::BoundPlan(py::tuple destinations, py::object fill, py::object names)
    : destinations_(std::move(destinations)), fill_(std::move(fill)), names_(std::move(names)) {}

bool BoundPlan::read() {
  const TensorSpan destinations = items_of(destinations_);
  std::vector<Fill> fills;
  std::vector<TensorView> views;
  const bool has_fills = read_fills(fill_, names_, fills);
  ask_autograd(destinations, views);
  counts_versions_ = std::ranges::any_of(destinations, [](PyObject* tensor) { return !is_inference(tensor); });
  if (!read_tensors(destinations, {"destination", names_}, views)) return false;
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
  for (PyObject* tensor : destinations) {
    held_memory_.push_back(own_memory(handle_of(tensor)));
    bound_memory_.push_back(memory_of(handle_of(tensor)));
  }
  return true;
}

py::object BoundPlan::in_order(TensorSpan arguments, PyObject* keywords) const {
  PyObject* const only = keywords == nullptr && arguments.size() == 1 ? arguments[0] : nullptr;
  if (only != nullptr && PyDict_CheckExact(only) && !names_.is_none()) {
    const TensorSpan names = items_of(names_);
    py::tuple ordered(names.size());
    size_t found = 0;
    for (; found < names.size(); ++found) {
      PyObject* const source = new_item(only, names[found]);
      if (source == nullptr) break;
      PyTuple_SET_ITEM(ordered.ptr(), static_cast<Py_ssize_t>(found), source);
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    if (found == names.size() && PyDict_GET_SIZE(only) == static_cast<Py_ssize_t>(found)) return ordered;
  }
  // Mappings that are no dict, and errors.
  py::tuple positional(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) positional[i] = py::handle(arguments[i]);
  return call_python("fused_copy.ops", "sources_in_order",
                     py::make_tuple(names_, positional, size(), keywords != nullptr));
}

// A destination that was moved or shortened since it was bound: its old memory may by now belong to others.
void BoundPlan::check_memory() const {
  if (!destinations_) throw std::runtime_error("fused_copy: the plan was collected as garbage: bind a new one");
  const TensorSpan destinations = items_of(destinations_);
  for (size_t i = 0; i < bound_memory_.size(); ++i) {
    const AtenTensorHandle handle = handle_of(destinations[i]);
    if (handle == nullptr || !has_memory(handle, bound_memory_[i])) refuse_memory(i, handle);
  }
}

void BoundPlan::refuse_memory(size_t index, AtenTensorHandle handle) const {
  const TensorView& bound = bound_.views()[index];
  const int64_t needed = byte_extent(bound);
  if (needed == 0) return;
  TensorView now{};
  try {
    if (handle != nullptr) now = read_tensor(handle);
  } catch (const Withheld& error) {
    throw withheld_by_torch(items_of(destinations_)[index], static_cast<int64_t>(index), "destination", error.what());
  } catch (const std::runtime_error&) {
    // The tensor has no memory any more.
  }
  if (now.address == bound.address && now.storage_bytes >= needed) return;
  throw InvalidInput(static_cast<int64_t>(index),
                     now.address == bound.address
                         ? "destination has " + std::to_string(std::max<int64_t>(now.storage_bytes, 0)) +
                               " bytes of storage left where the plan needs " + std::to_string(needed) +
                               ": it was resized; bind a new plan"
                         : "destination lies in other memory than when the plan was bound: it was moved or freed "
                           "(.data =, set_(), resize_(), share_memory_()); bind a new plan");
}

void BoundPlan::check_autograd(std::span<const TensorView> asked) const {
  for (size_t i = 0; i < asked.size(); ++i) {
    if (!asked[i].autograd.requires_grad && !asked[i].autograd.inference) continue;
    TensorView view = bound_.views()[i];
    view.autograd = asked[i].autograd;
    check_tensor(static_cast<int64_t>(i), "destination", view);
  }
}

std::optional<std::span<const PlannedLaunch>> BoundPlan::plan(TensorSpan sources, Workspace& work) const {
  const Role role{"source", names_};
  const bool grad_mode = aoti_torch_grad_mode_is_enabled();
  const SourceKinds kinds = kinds_of(sources);
  const bool plain = kinds != SourceKinds::Dispatched && !is_intercepted();
  if (plain && kinds == SourceKinds::Mixed) read_values(sources, bound_.views(), names_, work);
  if (plain && grad_mode && destinations_) ask_autograd(items_of(destinations_), work.destination_views);
  check_memory();
  if (!plain || !(kinds == SourceKinds::Mixed ? read_sources(sources, role, work)
                                              : read_tensors(sources, role, work.source_views))) {
    return std::nullopt;
  }
  if (grad_mode) check_autograd(work.destination_views);
  return plan_sources(bound_, work);
}

std::span<const PlannedLaunch> BoundPlan::plan_for_graph(TensorSpan sources, Workspace& work) const {
  return with_names(names_, [&] {
    if (const auto launches = plan(sources, work)) return *launches;
    throw py::type_error("fused_copy: sources in a graph must be plain tensors, not subclasses or fake ones");
  });
}

void BoundPlan::replay(TensorSpan sources) const {
  const Profiled profiled("fused_copy.Plan.replay");
  const auto by_torch = [&](const char* module, const char* function, const auto&... more) {
    py::tuple tensors(sources.size());
    for (size_t i = 0; i < sources.size(); ++i) tensors[i] = py::handle(sources[i]);
    call_python(module, function, py::make_tuple(destinations_, tensors, fill_, more...));
  };
  BorrowedWorkspace work;
  std::optional<std::span<const PlannedLaunch>> launches;
  try {
    launches = plan(sources, *work);
  } catch (const InvalidInput& error) {
    const std::string text = describe(error, name_of(names_, error.pair));
    if (!error.torch_can || backend != Backend::Fallback) throw std::runtime_error(text);
    return by_torch("fused_copy.backends", "fall_back", text);
  }
  if (!launches) return by_torch("fused_copy.ops", "replay_dispatched");
  if (backend == Backend::Reference) return by_torch("fused_copy.backends", "copy_each");
  run_call<WithoutGil>(*launches, device(), *work, [&](size_t i) { return handle_of(sources[i]); }, &handle_of_part);
  // Skipped in inference mode, where engines replay and no one reads versions: it would double the call's time.
  if (counts_versions_ && (aoti_torch_grad_mode_is_enabled() || !is_inference_mode())) {
    call(torch_api.increment_version, destinations_.ptr());
  }
}

void BoundPlan::traverse(Visit& visit) const {
  for (const py::object* object : {&destinations_, &fill_, &names_}) visit(*object);
}

void BoundPlan::clear() {
  // Held to the end: finalizers of what is dropped may call this plan.
  const py::object destinations = std::exchange(destinations_, {}), fill = std::exchange(fill_, py::none());
  const py::object names = std::exchange(names_, py::none());
}

std::unique_ptr<GraphCopy> GraphCopy::capture(py::object plan, const py::object& graph, const py::tuple& sources) {
  const Profiled profiled("fused_copy.Plan.capture");
  const auto& bound = object_in<BoundPlan>(plan.ptr());
  const Device device = bound.device();
  if (device.type != DeviceType::Cuda) {
    throw std::runtime_error("fused_copy: capture needs destinations on a GPU: these are on " + device_name(device));
  }
  if (torch_api.graph == nullptr || torch_api.graph_exec == nullptr) {
    throw std::runtime_error(
        "fused_copy: this torch does not tell its CUDA graphs' addresses (CUDAGraph.raw_cuda_graph and "
        "raw_cuda_graph_exec), which an update needs: record plan.replay instead");
  }
  if (kGpuBuild.machine_code.empty()) launch_on_gpu({}, device.index);  // which says what to install
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
  const auto launches = bound.plan_for_graph(items, *work);
  std::unique_ptr<GraphCopy> copy(new GraphCopy(std::move(plan), &bound, graph));
  copy->captured_.take(items, *work);
  // An empty copy is recorded too, so that an update can give its node something to copy.
  for (size_t i = 0; i < std::max<size_t>(launches.size(), 1); ++i) {
    const CapturedLaunch captured = capture_launch(i < launches.size() ? &launches[i] : nullptr, device.index);
    copy->captured_graph_ = captured.graph;
    copy->nodes_.push_back(captured.node);
  }
  return copy;
}

void GraphCopy::update(TensorSpan sources) {
  const Profiled profiled("fused_copy.GraphCopy.update");
  if (updating_.test_and_set(std::memory_order_acquire)) {
    throw std::runtime_error("fused_copy: another update of this copy is under way: make one after the other");
  }
  struct Done {
    std::atomic_flag& updating;
    ~Done() { updating.clear(std::memory_order_release); }
  } const done{updating_};
  BorrowedWorkspace work;
  const py::object graph = referent(graph_);
  if (!graph)
    throw std::runtime_error("fused_copy: the graph that the copy was captured in is gone: capture a new one");
  void* const executable = this->executable(graph);
  const auto launches = bound_->plan_for_graph(sources, *work);
  if (launches.size() > nodes_.size()) {
    throw std::runtime_error("fused_copy: these sources need " + std::to_string(launches.size()) +
                             " launches but the graph holds " + std::to_string(nodes_.size()) +
                             ": capture the copy with sources that need as many");
  }
  next_.take(sources, *work);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    try {
      // Before the graph is instantiated its own node is changed, which every instance begins with.
      set_node(executable, nodes_[i], i < launches.size() ? &launches[i] : nullptr, device_index());
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

void* GraphCopy::executable(const py::object& owner) {
  void* const executable = graph_pointer(torch_api.graph_exec, owner);
  if (executable == nullptr || executable != executable_) {
    void* const graph = graph_pointer(torch_api.graph, owner);
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

void GraphCopy::Held::take(TensorSpan tensors, Workspace& work) {
  let_go();
  for (PyObject* tensor : tensors) sources.push_back(py::reinterpret_borrow<py::object>(tensor));
  pinned.take(work, [&](size_t i) { return handle_of(tensors[i]); }, &handle_of_part);
}

void GraphCopy::Held::let_go() {
  if (!pinned.empty()) {
    const WithoutGil unlocked;
    pinned.let_go();
  }
  sources.clear();
}

void GraphCopy::traverse(Visit& visit) const {
  visit(plan_);
  for (const Held* held : {&captured_, &current_, &next_}) std::ranges::for_each(held->sources, std::ref(visit));
  for (const Held& held : abandoned_) std::ranges::for_each(held.sources, std::ref(visit));
}

// Keeps the plan, which calls under way still use; the collector clears the plan by itself.
void GraphCopy::clear() {
  std::vector<std::vector<py::object>> sources;
  for (Held* held : {&captured_, &current_, &next_}) sources.push_back(std::move(held->sources));
  for (Held& held : abandoned_) sources.push_back(std::move(held.sources));
}

void define_plan(py::module_& module) {
  py::class_<BoundPlan>(module, "BoundPlan", py::custom_type_setup(&make_collectable<BoundPlan>))
      .def_property_readonly("replay", &bound_method<&plan_replay_method>)
      .def("capture", &GraphCopy::capture, py::arg("graph"), py::arg("sources"));
  py::class_<GraphCopy>(module, "BoundGraphCopy", py::custom_type_setup(&make_collectable<GraphCopy>))
      .def_property_readonly("launches", &GraphCopy::launches)
      .def_property_readonly("update", &bound_method<&copy_update_method>);
  module.def("bind", &bind_plan, py::arg("dst"), py::arg("fill"), py::arg("names"));
}

}  // namespace fused_copy
