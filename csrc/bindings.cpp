// The door from Python that does not pass torch's dispatcher.
#include "metadata.h"
#include "plan.h"
#include "python_tensors.h"

namespace fused_copy {
namespace {

py::object as_sequence(py::handle object, const char* role) {
  // A tuple of its own: what runs during the call, a finalizer or another thread, may change the caller's list.
  const bool is_tensor = PyObject_TypeCheck(object.ptr(), torch_api.tensor_type);
  auto sequence = py::reinterpret_steal<py::object>(is_tensor ? nullptr : PySequence_Tuple(object.ptr()));
  if (sequence) return sequence;
  PyErr_Clear();
  throw py::type_error(std::string("fused_copy: ") + role + " is " + Py_TYPE(object.ptr())->tp_name +
                       ": expected a list, a tuple or a mapping of tensors");
}

// One call's tensors.
class Call {
 public:
  Call(py::handle dst, py::handle src, py::handle fill, py::handle names)
      : destinations_(as_sequence(dst, "destination")), sources_(as_sequence(src, "source")), names_(names) {
    // Before the tensors: it may run Python code, which could free what was read of one.
    work_->has_fills = read_fills(fill, names_, work_->fills);
  }

  // False where the call is for the dispatcher.
  bool read() {
    const bool plain_destinations =
        read_tensors(items_of(destinations_), "destination", names_, work_->destination_views);
    const bool plain_sources = read_tensors(items_of(sources_), "source", names_, work_->source_views);
    if (!plain_destinations || !plain_sources || is_intercepted()) return false;
    read_autograd(items_of(destinations_), work_->destination_views);
    return true;
  }

  // Reads what the dispatcher hands to the op's implementation.
  void read_dispatched() {
    read_dispatched_tensors(items_of(destinations_), work_->destination_views);
    read_dispatched_tensors(items_of(sources_), work_->source_views);
    read_autograd(items_of(destinations_), work_->destination_views);
  }

  void plan() {
    launches_ = with_names(names_, [&] { return plan_call(*work_); });
  }

  void run() {
    call(torch_api.increment_version, destinations_.ptr());
    run_call<WithoutGil>(launches_, work_->destinations.device(), work_->source_views,
                         [&](size_t i) { return handle_of(items_of(sources_)[i]); });
  }

  // The launches' kernel parameters in bytes, and each pair's path and bytes.
  py::tuple explain() {
    py::list launches, pairs;
    for (const PlannedLaunch& launch : launches_) launches.append(launch.used_words * 8);
    for (size_t i = 0; i < work_->source_views.size(); ++i) {
      const auto [path, bytes] = work_->planner.path(static_cast<int64_t>(i));
      pairs.append(py::make_tuple(path + (work_->source_views[i].pinned ? ", from pinned memory" : ""), bytes));
    }
    return py::make_tuple(launches, pairs);
  }

 private:
  py::object destinations_;
  py::object sources_;
  py::handle names_;
  BorrowedWorkspace work_;
  std::span<const PlannedLaunch> launches_;
};

// replay(dst, src, fill, names): copies. False, and nothing done, where the call is for the dispatcher or the
// reference.
PyObject* replay(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return translate_errors([&] {
    if (count != 4) throw py::type_error("fused_copy: expected dst, src, fill and names");
    Call call(arguments[0], arguments[1], arguments[2], arguments[3]);
    const bool ours = call.read() && !use_reference;
    if (ours) {
      call.plan();
      call.run();
    }
    return PyBool_FromLong(ours);
  });
}
PyMethodDef replay_method = fast_method("replay", &replay, nullptr);

// The op's implementation where it is registered from Python.
void replay_dispatched(py::handle dst, py::handle src, py::handle fill) {
  Call call(dst, src, fill, py::none());
  call.read_dispatched();
  call.plan();
  call.run();
}

// Makes the checks of a call and says what it would do. None where the call is for the dispatcher.
py::object explain(py::handle dst, py::handle src, py::handle fill, py::handle names) {
  Call call(dst, src, fill, names);
  if (!call.read()) return py::none();
  call.plan();
  return call.explain();
}

// What the binary was built with and for; None where that is the CPU alone.
py::object build_info() {
  const auto& [cuda_version, architectures, ptx] = kGpuBuild;
  if (architectures.empty()) return py::none();
  py::tuple machine_code(architectures.size());
  for (size_t i = 0; i < architectures.size(); ++i) machine_code[i] = architectures[i] / 10;
  return py::dict(py::arg("cuda") = cuda_version, py::arg("machine_code") = machine_code,
                  py::arg("ptx") = py::make_tuple(ptx));
}

// A graph's node that copies nothing, recorded and set as a copy's, to parameters that change as a copy's do:
// addresses, as torch.cuda.CUDAGraph tells its own.
uint64_t capture_nothing(int device) { return reinterpret_cast<uint64_t>(capture_launch(nullptr, device).node.node); }
void set_nothing(uint64_t executable, uint64_t node, int device) {
  static PlannedLaunch launch{{}, kHeaderWords + 1};
  ++launch.params.words[kHeaderWords];
  GraphNode graph_node{reinterpret_cast<void*>(node), 1};
  set_node(reinterpret_cast<void*>(executable), graph_node, &launch, device);
}

// None where the destinations are for the dispatcher.
std::shared_ptr<BoundPlan> bind_plan(py::tuple dst, py::handle fill, py::object names, py::object elsewhere) {
  try {
    return std::make_shared<BoundPlan>(std::move(dst), fill, std::move(names), std::move(elsewhere));
  } catch (NotPlain) {
    return nullptr;
  }
}

}  // namespace
}  // namespace fused_copy

namespace py = pybind11;

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  using namespace fused_copy;
  look_up_torch();
  module.attr("has_gpu_code") = !kGpuBuild.architectures.empty();
  module.attr("build_info") = build_info();
  module.attr("registers_op") = registers_op();
  module.attr("replay") = py::reinterpret_steal<py::object>(PyCFunction_New(&replay_method, nullptr));
  module.def("replay_dispatched", &replay_dispatched, py::arg("dst"), py::arg("src"), py::arg("fill"));
  module.def("explain", &explain, py::arg("dst"), py::arg("src"), py::arg("fill"), py::arg("names"));
  define_check_metadata(module);
  module.def("launch_nothing", &launch_nothing, py::arg("device"));
  module.def("capture_nothing", &capture_nothing, py::arg("device"));
  module.def("set_nothing", &set_nothing, py::arg("executable"), py::arg("node"), py::arg("device"));
  module.def("use_reference", [](bool use) { use_reference = use; }, py::arg("use"));
  py::class_<BoundPlan, std::shared_ptr<BoundPlan>>(module, "BoundPlan")
      .def_property_readonly("replay", &bind_replay)
      .def("capture", &GraphCopy::capture, py::arg("graph"), py::arg("sources"));
  py::class_<GraphCopy, std::shared_ptr<GraphCopy>>(module, "BoundGraphCopy")
      .def_property_readonly("launches", &GraphCopy::launches)
      .def_property_readonly("update", &bind_update);
  module.def("bind", &bind_plan, py::arg("dst"), py::arg("fill"), py::arg("names"), py::arg("elsewhere"));
}
