// The door from Python that does not pass torch's dispatcher.
#include "plan.h"
#include "python_tensors.h"

namespace fused_copy {
namespace {

TensorSpan items_of(const py::object& sequence) {
  return {PySequence_Fast_ITEMS(sequence.ptr()), static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence.ptr()))};
}

py::object as_sequence(py::handle object, const char* role) {
  auto sequence = py::reinterpret_steal<py::object>(PySequence_Fast(object.ptr(), ""));
  if (sequence && !PyObject_TypeCheck(object.ptr(), torch_api.tensor_type)) return sequence;
  PyErr_Clear();
  throw py::type_error(std::string("fused_copy: ") + role + " is " + Py_TYPE(object.ptr())->tp_name +
                       ": expected a list, a tuple or a mapping of tensors");
}

// One call's tensors.
class Call {
 public:
  Call(py::handle dst, py::handle src, py::handle fill, py::handle names)
      : destinations_(as_sequence(dst, "destination")),
        sources_(as_sequence(src, "source")),
        fill_(fill),
        names_(names) {}

  // False where the call is for the dispatcher.
  bool read() {
    const bool plain = read_tensors(items_of(destinations_), "destination", names_, work_->destination_views) &
                       static_cast<int>(read_tensors(items_of(sources_), "source", names_, work_->source_views));
    if (!plain || is_intercepted()) return false;
    read_autograd(items_of(destinations_), work_->destination_views);
    work_->has_fills = read_fills(fill_, names_, work_->fills);
    return true;
  }

  void plan() {
    try {
      launches_ = plan_call(*work_);
    } catch (const InvalidInput& error) {
      throw std::runtime_error(describe(error, name_of(names_, error.pair)));
    }
  }

  void run() {
    call(torch_api.increment_version, destinations_.ptr());
    run_call(launches_, work_->destinations.device(), work_->source_views,
             [&](size_t i) { return own_handle(BorrowedHandle(items_of(sources_)[i]).get()); });
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
  py::handle fill_;
  py::handle names_;
  BorrowedWorkspace work_;
  std::span<const PlannedLaunch> launches_;
};

// Copies. False, and nothing done, where the call is for the dispatcher or the reference.
bool replay(py::handle dst, py::handle src, py::handle fill, py::handle names) {
  Call call(dst, src, fill, names);
  if (!call.read() || use_reference) return false;
  call.plan();
  call.run();
  return true;
}

// Makes the checks of a call and says what it would do. None where the call is for the dispatcher.
py::object explain(py::handle dst, py::handle src, py::handle fill, py::handle names) {
  Call call(dst, src, fill, names);
  if (!call.read()) return py::none();
  call.plan();
  return call.explain();
}

// None where the destinations are for the dispatcher.
std::shared_ptr<BoundPlan> bind_plan(py::tuple dst, py::handle fill, py::object names) {
  try {
    return std::make_shared<BoundPlan>(std::move(dst), fill, std::move(names));
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
  module.attr("has_gpu_code") = kHasGpuCode;
  module.def("replay", &replay, py::arg("dst"), py::arg("src"), py::arg("fill"), py::arg("names"));
  module.def("explain", &explain, py::arg("dst"), py::arg("src"), py::arg("fill"), py::arg("names"));
  module.def("launch_nothing", &launch_nothing, py::arg("device"));
  module.def("use_reference", [](bool use) { use_reference = use; }, py::arg("use"));
  py::class_<BoundPlan, std::shared_ptr<BoundPlan>>(module, "BoundPlan")
      .def_property_readonly("replay", &bind_replay)
      .def("capture", &GraphCopy::capture, py::arg("graph"), py::arg("sources"));
  py::class_<GraphCopy, std::shared_ptr<GraphCopy>>(module, "BoundGraphCopy")
      .def_property_readonly("launches", &GraphCopy::launches)
      .def_property_readonly("update", &bind_update);
  module.def("bind", &bind_plan, py::arg("dst"), py::arg("fill"), py::arg("names"));
}
