#include "python_tensors.h"

#include <dlfcn.h>

#include <algorithm>

#include "tensors.h"

namespace fused_copy {

Torch torch_api;
std::atomic<bool> use_reference = false;

std::string name_of(py::handle names, int64_t pair) {
  const bool has_name = !names.is_none() && pair >= 0 && pair < static_cast<int64_t>(py::len(names));
  return has_name ? py::str(names[py::int_(pair)]).cast<std::string>() : std::string();
}

py::object call(PyObject* function, PyObject* argument) {
  PyObject* const arguments[] = {nullptr, argument};
  PyObject* result =
      PyObject_Vectorcall(function, arguments + 1, (argument ? 1 : 0) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

namespace {

bool call_bool(PyObject* function, PyObject* argument = nullptr) {
  const py::object result = call(function, argument);
  return result.ptr() == Py_True;
}

int64_t call_int(PyObject* function, PyObject* argument = nullptr) {
  const int64_t value = PyLong_AsLongLong(call(function, argument).ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Asks what is asked of torch's methods alone, as it costs as much as the rest of a tensor.
void read_lazy(PyObject* object, TensorView& view) {
  const bool may_be = (view.dtype >= DType::Float16 && view.dtype <= DType::Float64) ||
                      (view.dtype >= DType::Complex32 && view.dtype <= DType::Complex128);
  view.lazy = may_be && (call_bool(torch_api.is_neg, object) || call_bool(torch_api.is_conj, object));
}

bool is_empty(const TensorView& view) {
  return std::any_of(view.sizes, view.sizes + view.rank, [](int64_t size) { return size == 0; });
}

// Reads a plain tensor. False for what only the dispatcher can read or refuse.
bool read_plain_tensor(PyObject* object, TensorView& view) {
  const AtenTensorHandle handle = handle_of(object);
  if (handle == nullptr) return false;
  try {
    view = read_tensor(handle);
  } catch (const std::runtime_error&) {
    return false;  // the wrappers of torch.func's transforms have no memory
  }
  if (!view.strided || view.dtype == DType::Unsupported || view.device.type > DeviceType::Cuda) return false;
  if (view.address == 0 && !is_empty(view)) return false;
  read_lazy(object, view);
  return true;
}

// Where in a tensor's Python object the at::Tensor lies, an address that torch also tells as `_cdata`. Up to torch 2.12
// a flag stands before it that says whether the tensor is owned. 0 where this torch does otherwise.
ptrdiff_t find_handle_offset(const py::module_& torch) {
  const py::object trial = torch.attr("ones")(8, py::arg("dtype") = torch.attr("int32"))[py::slice(3, 8, 1)];
  const py::object others = py::make_tuple(trial, torch.attr("ones")(1, py::arg("requires_grad") = true));
  for (const ptrdiff_t offset : {sizeof(PyObject), sizeof(PyObject) + sizeof(void*)}) {
    torch_api.handle_offset = static_cast<ptrdiff_t>(offset);
    bool found = true;
    for (const py::handle tensor : others) {
      const AtenTensorHandle handle = handle_of(tensor.ptr());
      found = found && handle != nullptr &&
              *reinterpret_cast<void**>(handle) == PyLong_AsVoidPtr(py::object(tensor.attr("_cdata")).ptr());
    }
    if (!found) continue;
    const TensorView view = read_tensor(handle_of(trial.ptr()));
    if (view.address == trial.attr("data_ptr")().cast<uint64_t>() && view.storage_bytes == 5 * 4) return offset;
  }
  return 0;
}

// torch's own function that tells which keys this thread adds to every call: a tenth of the time of asking in Python.
// It is no part of the stable ABI, so it has to answer as the keys are set.
void find_includes_key(const py::object& c) {
  const auto includes = reinterpret_cast<bool (*)(uint16_t)>(
      dlsym(RTLD_DEFAULT, "_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE"));
  if (includes == nullptr) return;
  const auto key_of = [&](const char* name) {
    const py::object key = c.attr("_dispatch_key_parse")(name);
    const auto number = py::int_(key).cast<uint16_t>();
    const bool before = includes(number);
    c.attr("_dispatch_tls_set_dispatch_key_included")(key, true);
    const bool during = includes(number);
    c.attr("_dispatch_tls_set_dispatch_key_included")(key, before);
    return !before && during && !includes(number) ? number : uint16_t{0};
  };
  torch_api.modes_key = key_of("Python");
  torch_api.tracer_key = key_of("Tracer");
  if (torch_api.modes_key && torch_api.tracer_key) torch_api.includes_key = includes;
}

}  // namespace

void look_up_torch() {
  // The references are kept for the life of the process, as torch is.
  const auto keep = [](py::object object) { return object.release().ptr(); };
  const py::module_ torch = py::module_::import("torch");
  const py::object tensor = torch.attr("Tensor");
  const py::object c = torch.attr("_C");
  torch_api.tensor_type = reinterpret_cast<PyTypeObject*>(keep(tensor));
  torch_api.is_conj = keep(tensor.attr("is_conj"));
  torch_api.is_neg = keep(tensor.attr("is_neg"));
  torch_api.is_inference = keep(tensor.attr("is_inference"));
  torch_api.is_inference_mode_enabled = keep(torch.attr("is_inference_mode_enabled"));
  torch_api.dispatch_modes = keep(c.attr("_len_torch_dispatch_stack"));
  torch_api.is_tracing = keep(c.attr("_is_tracing"));
  find_includes_key(c);
  const py::object graph = c.attr("_CUDAGraph");
  if (py::hasattr(graph, "raw_cuda_graph_exec")) {
    torch_api.graph = keep(graph.attr("raw_cuda_graph"));
    torch_api.graph_exec = keep(graph.attr("raw_cuda_graph_exec"));
  }
  torch_api.increment_version = keep(c.attr("_increment_version"));
  torch_api.handle_offset = find_handle_offset(torch);
}

AtenTensorHandle handle_of(PyObject* tensor) {
  char* const object = reinterpret_cast<char*>(tensor);
  const bool flagged = torch_api.handle_offset > static_cast<ptrdiff_t>(sizeof(PyObject));
  if (torch_api.handle_offset == 0 || (flagged && object[sizeof(PyObject)] != 0)) return nullptr;
  return reinterpret_cast<AtenTensorHandle>(object + torch_api.handle_offset);
}

bool is_intercepted() {
  if (const auto includes = torch_api.includes_key)
    return includes(torch_api.modes_key) || includes(torch_api.tracer_key);
  return call_int(torch_api.dispatch_modes) > 0 || call_bool(torch_api.is_tracing);
}

bool is_inference_mode() { return call_bool(torch_api.is_inference_mode_enabled); }

bool is_inference(PyObject* tensor) { return call_bool(torch_api.is_inference, tensor); }

bool read_tensors(TensorSpan tensors, const char* role, py::handle names, std::vector<TensorView>& views) {
  bool plain = true;
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyTypeObject* type = Py_TYPE(tensors[i]);
    if (type == torch_api.tensor_type) {
      plain = plain && read_plain_tensor(tensors[i], views.emplace_back());
      continue;
    }
    plain = false;
    if (PyType_IsSubtype(type, torch_api.tensor_type)) continue;
    const auto pair = static_cast<int64_t>(i);
    throw py::type_error(describe({pair, std::string(role) + " is " + type->tp_name + ": expected a torch.Tensor"},
                                  name_of(names, pair)));
  }
  return plain;
}

void read_dispatched_tensors(TensorSpan tensors, std::vector<TensorView>& views) {
  for (PyObject* tensor : tensors) {
    const AtenTensorHandle handle = handle_of(tensor);
    if (handle == nullptr) throw std::runtime_error("fused_copy: this version of torch is not supported");
    read_lazy(tensor, views.emplace_back(read_tensor(handle)));
  }
}

void read_autograd(TensorSpan destinations, std::vector<TensorView>& views) {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  const bool inference_mode = is_inference_mode();
  for (size_t i = 0; i < views.size(); ++i) {
    views[i].requires_grad = py::handle(destinations[i]).attr("requires_grad").ptr() == Py_True;
    views[i].inference = !inference_mode && is_inference(destinations[i]);
  }
}

bool read_fills(py::handle fills, py::handle names, std::vector<Fill>& into) {
  if (fills.is_none()) return false;
  for (const py::handle fill : fills) {
    const auto pair = static_cast<int64_t>(into.size());
    if (fill.is_none()) {
      into.emplace_back();
      continue;
    }
    const double value = PyFloat_AsDouble(fill.ptr());
    // A large integer that a double cannot hold would become another number on its way.
    if (PyErr_Occurred() || (PyLong_Check(fill.ptr()) && !py::float_(value).equal(fill))) {
      PyErr_Clear();
      throw py::type_error(describe({pair, "fill is " + py::repr(fill).cast<std::string>() +
                                               ": expected None or a number that a float holds exactly"},
                                    name_of(names, pair)));
    }
    into.emplace_back(value);
  }
  return true;
}

}  // namespace fused_copy
