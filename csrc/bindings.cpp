// The binary module `fused_copy._C`: the functions that Python calls instead of torch's dispatcher.
#include "metadata.h"
#include "plan.h"
#include "python_sources.h"
#include "python_tensors.h"

namespace fused_copy {
namespace {

// Copies the sequence: a finalizer or another thread may change the caller's list during the call.
py::tuple as_tuple(py::handle sequence) {
  auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(sequence.ptr()));
  if (!items) throw py::error_already_set();
  return items;
}

// One call's tensors: lists or tuples, and numbers to fill with as another one, or None.
class Call {
 public:
  Call(py::handle dst, py::handle src, py::handle fill, py::handle names)
      : destinations_(as_tuple(dst)), sources_(as_tuple(src)), fill_(py::none()), names_(names) {
    if (!fill.is_none()) fill_ = as_tuple(fill);
    // Converting a number may run Python code, which could free a tensor: so numbers come before tensors are read.
    work_->has_fills = read_fills(fill_, names_, work_->fills);
  }

  // False where the call must go through torch's dispatcher.
  bool read() {
    const TensorSpan destinations = items_of(destinations_), sources = items_of(sources_);
    const bool plain_destinations = are_plain(destinations, destination_role());
    const SourceKinds kinds = kinds_of(sources);
    if (!plain_destinations || kinds == SourceKinds::Dispatched || torch_api.handle_offset == 0 || is_intercepted()) {
      return false;
    }
    ask_autograd(destinations, work_->destination_views);
    if (!read_tensors(destinations, destination_role(), work_->destination_views)) return false;
    if (kinds == SourceKinds::Tensors) return read_tensors(sources, source_role(), work_->source_views);
    // Reading numbers may run Python code, which could change a destination: so these are read anew afterwards.
    read_values(sources, work_->destination_views, names_, *work_);
    return read_tensors(destinations, destination_role(), work_->destination_views) &&
           read_sources(sources, source_role(), *work_);
  }

  // Reads what the dispatcher hands to the op's implementation.
  void read_dispatched() {
    ask_autograd(items_of(destinations_), work_->destination_views);
    read_dispatched_tensors(items_of(destinations_), destination_role(), work_->destination_views);
    if (kinds_of(items_of(sources_)) == SourceKinds::Tensors) {
      return read_dispatched_tensors(items_of(sources_), source_role(), work_->source_views);
    }
    read_values(items_of(sources_), work_->destination_views, names_, *work_);
    read_sources(items_of(sources_), source_role(), *work_, /*dispatched=*/true);
  }

  // Throws InvalidInput.
  void plan() { launches_ = plan_call(*work_); }

  void run() {
    run_call<WithoutGil>(
        launches_, work_->destinations.device(), *work_, [&](size_t i) { return handle_of(items_of(sources_)[i]); },
        &handle_of_part);
    call(torch_api.increment_version, destinations_.ptr());
  }

  // Has torch's own operators copy, by a function of backends.py.
  template <class... More>
  void run_by_torch(const char* function, const More&... more) {
    call_python("fused_copy.backends", function, py::make_tuple(destinations_, sources_, fill_, more...));
  }

  std::string describe(const InvalidInput& error) const {
    return fused_copy::describe(error, name_of(names_, error.pair));
  }

  // The launches' kernel parameters in bytes, and each pair's path and bytes.
  py::tuple explain() {
    py::list launches, pairs;
    for (const PlannedLaunch& launch : launches_) launches.append(launch.used_words * kWordBytes);
    for (size_t i = 0; i < work_->source_views.size(); ++i) {
      const auto [path, bytes] = work_->planner.path(static_cast<int64_t>(i));
      pairs.append(py::make_tuple(path + (work_->source_views[i].pinned ? ", from pinned memory" : ""), bytes));
    }
    return py::make_tuple(launches, pairs);
  }

 private:
  Role destination_role() const { return {"destination", names_}; }
  Role source_role() const { return {"source", names_}; }

  py::tuple destinations_;
  py::tuple sources_;
  py::object fill_;
  py::handle names_;
  BorrowedWorkspace work_;
  std::span<const PlannedLaunch> launches_;
};

// replay(dst, src, fill, names): copies. Returns False, having done nothing, where the call must go through torch's
// dispatcher.
PyObject* replay(PyObject*, PyObject* const* arguments, Py_ssize_t count, PyObject* keywords) {
  return translate_errors([&] {
    if (count != 4 || keywords != nullptr) throw py::type_error("fused_copy: expected dst, src, fill and names");
    const Profiled profiled("fused_copy.replay");
    Call call(arguments[0], arguments[1], arguments[2], arguments[3]);
    if (!call.read()) return Py_NewRef(Py_False);
    try {
      call.plan();
    } catch (const InvalidInput& error) {
      if (!error.torch_can || backend != Backend::Fallback) throw std::runtime_error(call.describe(error));
      call.run_by_torch("fall_back", call.describe(error));
      return Py_NewRef(Py_True);
    }
    if (backend == Backend::Reference) {
      call.run_by_torch("copy_each");
    } else {
      call.run();
    }
    return Py_NewRef(Py_True);
  });
}
PyMethodDef replay_method = fast_method("replay", &replay, nullptr);

// The op's implementation where it is registered from Python.
void replay_dispatched(py::handle dst, py::handle src, py::handle fill) {
  Call call(dst, src, fill, py::none());
  call.read_dispatched();
  with_names(py::none(), [&] { call.plan(); });
  call.run();
}

// Makes the checks of a call and says what it would do. None where the call must go through torch's dispatcher.
py::object explain(py::handle dst, py::handle src, py::handle fill, py::handle names) {
  Call call(dst, src, fill, names);
  if (!call.read()) return py::none();
  with_names(names, [&] { call.plan(); });
  return call.explain();
}

// check_metadata() of lists of tuples with the members of a Description.
void check_described(py::list dst, py::list src, py::object fill) {
  const auto numbers = [](py::handle sequence) {
    std::vector<int64_t> numbers;
    for (const py::handle number : sequence) numbers.push_back(number.cast<int64_t>());
    return numbers;
  };
  const auto descriptions = [&](const py::list& tensors) {
    std::vector<Description> found;
    for (const py::handle item : tensors) {
      const auto tensor = py::reinterpret_borrow<py::tuple>(item);
      found.push_back({tensor[0].cast<std::string>(), tensor[1].cast<std::string>(), tensor[2].cast<int32_t>(),
                       tensor[3].cast<bool>(), tensor[4].cast<bool>(), numbers(tensor[5]), numbers(tensor[6])});
    }
    return found;
  };
  std::vector<Fill> fills;
  const bool has_fills = read_fills(fill, py::none(), fills);
  with_names(py::none(), [&] { check_metadata(descriptions(dst), descriptions(src), has_fills ? &fills : nullptr); });
}

// What the binary was built with and for; None where that is the CPU alone.
py::object build_info() {
  const auto& [cuda_version, machine_code, ptx] = kGpuBuild;
  if (machine_code.empty()) return py::none();
  py::tuple compute_capabilities(machine_code.size());
  for (size_t i = 0; i < machine_code.size(); ++i) compute_capabilities[i] = machine_code[i];
  return py::dict(py::arg("cuda") = cuda_version, py::arg("machine_code") = compute_capabilities,
                  py::arg("ptx") = py::make_tuple(ptx));
}

// A graph's node that copies nothing, recorded and set as a copy's, to parameters that change as a copy's do:
// addresses, as torch.cuda.CUDAGraph tells its own.
uint64_t capture_nothing(int device) { return reinterpret_cast<uint64_t>(capture_launch(nullptr, device).node.node); }
void set_nothing(uint64_t executable, uint64_t node, int device) {
  static PlannedLaunch launch{{}, kHeaderWords + 1};
  std::byte& changing = launch.params.bytes[sizeof(LaunchHeader)];
  changing ^= std::byte{1};
  GraphNode graph_node{reinterpret_cast<void*>(node), 1};
  set_node(reinterpret_cast<void*>(executable), graph_node, &launch, device);
}

// Why no call takes the fast path beside this torch; None where calls can.
py::object fast_path_problem() {
  if (torch_api.problem.empty()) return py::none();
  return py::str(torch_api.problem);
}

// What else is missing in this torch, in words: without it calls are slower, or a feature is refused.
py::list missing() {
  py::list missing;
  if (torch_api.keys_offset == 0)
    missing.append("the place of a tensor's conjugate and negative bits: calls are slower");
  if (torch_api.includes_key == nullptr) missing.append("which dispatch keys a thread includes: calls are slower");
  if (torch_api.has_cuda && (torch_api.graph == nullptr || torch_api.graph_exec == nullptr)) {
    missing.append("CUDAGraph.raw_cuda_graph and raw_cuda_graph_exec: no Plan.capture");
  }
  if (torch_api.profiler == nullptr) missing.append("whether its profiler records: calls have no name there");
  return missing;
}

void use_backend(const std::string& name) {
  backend = name == "reference" ? Backend::Reference : name == "fallback" ? Backend::Fallback : Backend::Fused;
}

}  // namespace
}  // namespace fused_copy

namespace py = pybind11;

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  using namespace fused_copy;
  module.attr("has_gpu_code") = !kGpuBuild.machine_code.empty();
  module.attr("build_info") = build_info();
  module.attr("registers_op") = registers_op();
  module.attr("replay") = py::reinterpret_steal<py::object>(PyCFunction_New(&replay_method, nullptr));
  module.def("look_up_torch", &look_up_torch);
  module.def("use_source_types", &use_source_types, py::arg("rows"), py::arg("cu_seqlens"), py::arg("plus"));
  module.def("fast_path_problem", &fast_path_problem);
  module.def("missing", &missing);
  module.def("replay_dispatched", &replay_dispatched, py::arg("dst"), py::arg("src"), py::arg("fill"));
  module.def("explain", &explain, py::arg("dst"), py::arg("src"), py::arg("fill"), py::arg("names"));
  module.def("check_metadata", &check_described, py::arg("dst"), py::arg("src"), py::arg("fill"));
  module.def("use_backend", &use_backend, py::arg("name"));
  define_plan(module);
  // For tests and benchmarks alone.
  py::module_ testing = module.def_submodule("_testing");
  testing.def("launch_nothing", &launch_nothing, py::arg("device"));
  testing.def("capture_nothing", &capture_nothing, py::arg("device"));
  testing.def("set_nothing", &set_nothing, py::arg("executable"), py::arg("node"), py::arg("device"));
}
