#include "python_tensors.h"

#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <future>

#include "tensors.h"

namespace fused_copy {

Torch torch_api;
std::atomic<Backend> backend = Backend::Fused;

std::string text_of(py::handle object, PyObject* (*convert)(PyObject*)) {
  const auto text = py::reinterpret_steal<py::object>(convert(object.ptr()));
  const auto bytes = py::reinterpret_steal<py::object>(
      text ? PyUnicode_AsEncodedString(text.ptr(), "utf-8", "backslashreplace") : nullptr);
  if (bytes) return PyBytes_AS_STRING(bytes.ptr());
  PyErr_Clear();
  return Py_TYPE(object.ptr())->tp_name;
}

std::string name_of(py::handle names, int64_t pair) {
  const bool has_name = !names.is_none() && pair >= 0 && pair < static_cast<int64_t>(py::len(names));
  return has_name ? text_of(names[py::int_(pair)]) : std::string();
}

py::object call(PyObject* function, PyObject* argument) {
  PyObject* const arguments[] = {nullptr, argument};
  PyObject* result =
      PyObject_Vectorcall(function, arguments + 1, (argument ? 1 : 0) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

InvalidInput withheld_by_torch(PyObject* tensor, int64_t pair, const char* role, std::string reason) {
  if (reason.empty()) {
    try {
      py::handle(tensor).attr("data_ptr")();
    } catch (py::error_already_set& error) {
      reason = text_of(error.value());
    }
  }
  return withheld_memory(pair, role, reason);
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

// A word of the TensorImpl, whose address is what a handle points to.
uint64_t word_of(AtenTensorHandle tensor, ptrdiff_t offset) {
  uint64_t word;
  std::memcpy(&word, *reinterpret_cast<const char* const*>(tensor) + offset, sizeof word);
  return word;
}

// Whether the conjugate or the negative bit is set. Both are dispatch keys, in a word of the TensorImpl. Torch's
// methods tell them too, but cost more than reading all the rest of a tensor.
bool is_lazy(PyObject* object, AtenTensorHandle handle) {
  if (torch_api.keys_offset != 0) return (word_of(handle, torch_api.keys_offset) & torch_api.lazy_keys) != 0;
  return call_bool(torch_api.is_neg, object) || call_bool(torch_api.is_conj, object);
}

// Where in a tensor's Python object the at::Tensor lies, an address that torch also tells as `_cdata`. Up to torch 2.12
// a flag stands before it that says whether the tensor is owned. 0 where this torch does otherwise.
ptrdiff_t find_handle_offset(const py::object& ones, const py::object& int32) {
  const py::object trial = ones(8, py::arg("dtype") = int32, py::arg("device") = "cpu")[py::slice(3, 8, 1)];
  const py::object others = py::make_tuple(trial, ones(1, py::arg("requires_grad") = true, py::arg("device") = "cpu"));
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

// Where in a tensor its dispatch keys lie, among which those of the two bits are `lazy_keys`: the word that is the same
// in all plain tensors, and in the others but for one bit each. 0 where no word is so.
ptrdiff_t find_keys_offset(const py::module_& torch, uint64_t& lazy_keys) {
  constexpr ptrdiff_t kTensorBytes = 192;  // no torch from 2.9 on has smaller ones
  const auto ones = [&](const char* dtype) {
    return torch.attr("ones")(2, py::arg("dtype") = torch.attr(dtype), py::arg("device") = "cpu");
  };
  const py::object plain = ones("int32"), also_plain = ones("complex64");
  const py::object negative = torch.attr("_neg_view")(plain), conjugate = torch.attr("conj")(also_plain);
  const py::object both = torch.attr("_neg_view")(conjugate);
  for (ptrdiff_t offset = 0; offset < kTensorBytes; offset += sizeof(uint64_t)) {
    const auto word = [&](const py::object& tensor) { return word_of(handle_of(tensor.ptr()), offset); };
    const uint64_t none = word(plain);
    const uint64_t negative_key = word(negative) ^ none, conjugate_key = word(conjugate) ^ none;
    lazy_keys = negative_key | conjugate_key;
    if (word(also_plain) == none && std::has_single_bit(negative_key) && std::has_single_bit(conjugate_key) &&
        negative_key != conjugate_key && (none & lazy_keys) == 0 && word(both) == (none | lazy_keys)) {
      return offset;
    }
  }
  return 0;
}

// Torch's own function that tells whether this thread adds a dispatch key to every call: it takes a tenth of the time
// of asking in Python. As it is no part of the stable ABI, it is used only if its answers follow the keys that are set.
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

// Makes tensors and reads them.
void look_up() {
  // The references are kept for the life of the process, as torch is.
  std::string missing;
  const auto find = [&](const py::object& owner, const char* name, bool needed = true) -> PyObject* {
    if (py::hasattr(owner, name)) return py::object(owner.attr(name)).release().ptr();
    if (needed) missing += (missing.empty() ? "" : ", ") + std::string(name);
    return nullptr;
  };
  const py::module_ torch = py::module_::import("torch");
  const py::object tensor = torch.attr("Tensor"), c = torch.attr("_C");
  torch_api.tensor_type = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
  torch_api.parameter_type =
      reinterpret_cast<PyTypeObject*>(py::object(torch.attr("nn").attr("Parameter")).release().ptr());
  torch_api.is_conj = find(tensor, "is_conj");
  torch_api.is_neg = find(tensor, "is_neg");
  torch_api.is_inference = find(tensor, "is_inference");
  torch_api.is_inference_mode_enabled = find(torch, "is_inference_mode_enabled");
  torch_api.dispatch_modes = find(c, "_len_torch_dispatch_stack");
  torch_api.is_tracing = find(c, "_is_tracing");
  torch_api.increment_version = find(c, "_increment_version");
  find(tensor, "_cdata");
  torch_api.has_cuda = !torch.attr("version").attr("cuda").is_none();
  if (py::hasattr(c, "_CUDAGraph")) {
    const py::object graph = c.attr("_CUDAGraph");
    torch_api.graph = find(graph, "raw_cuda_graph", false);
    torch_api.graph_exec = find(graph, "raw_cuda_graph_exec", false);
  }
  const py::module_ profiler = py::module_::import("torch.autograd.profiler");
  if (py::hasattr(profiler, "_is_profiler_enabled")) {
    torch_api.profiler_flag = PyUnicode_InternFromString("_is_profiler_enabled");
    torch_api.profiler = py::object(profiler.attr("__dict__")).release().ptr();
  }
  if (!missing.empty()) {
    torch_api.problem = "this torch has no " + missing;
    return;
  }
  torch_api.handle_offset = find_handle_offset(torch.attr("ones"), torch.attr("int32"));
  torch_api.problem = torch_api.handle_offset ? "" : "this torch keeps its tensors in objects of an unknown form";
  if (torch_api.handle_offset && py::hasattr(torch, "_neg_view")) {
    torch_api.keys_offset = find_keys_offset(torch, torch_api.lazy_keys);
  }
  if (py::hasattr(c, "_dispatch_key_parse") && py::hasattr(c, "_dispatch_tls_set_dispatch_key_included")) {
    find_includes_key(c);
  }
}

}  // namespace

void look_up_torch() {
  const py::gil_scoped_release released;
  const auto with_gil = [] {
    const py::gil_scoped_acquire held;
    look_up();
  };
  std::async(std::launch::async, with_gil).get();
}

bool read_plain_tensor(PyObject* object, int64_t pair, Role role, TensorView& view, Known& known) {
  const AtenTensorHandle handle = handle_of(object);
  if (handle == nullptr) return false;
  const uint64_t keys = torch_api.keys_offset != 0 ? word_of(handle, torch_api.keys_offset) : 0;
  const Autograd autograd = view.autograd;
  try {
    view = keys != 0 && keys == known.keys ? read_tensor(handle, known.device_type) : read_tensor(handle);
  } catch (const Withheld& error) {
    const InvalidInput refusal = withheld_by_torch(object, pair, role.name, error.what());
    throw std::runtime_error(describe(refusal, name_of(role.names, pair)));
  } catch (const std::runtime_error&) {
    return false;  // the wrappers of torch.func's transforms have no memory
  }
  if (!view.strided || view.dtype == DType::Unsupported || view.device.type > DeviceType::Cuda) return false;
  if (view.address == 0 && !is_empty(view)) return false;
  known = {keys, view.device.type};
  view.lazy = is_lazy(object, handle);
  view.autograd = autograd;
  return true;
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

bool are_plain(TensorSpan tensors, Role role) {
  bool plain = true;
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyTypeObject* const type = Py_TYPE(tensors[i]);
    if (type == torch_api.tensor_type || type == torch_api.parameter_type) continue;
    plain = false;
    if (PyType_IsSubtype(type, torch_api.tensor_type)) continue;
    const auto pair = static_cast<int64_t>(i);
    throw py::type_error(describe({pair, std::string(role.name) + " is " + type->tp_name + ": expected a torch.Tensor"},
                                  name_of(role.names, pair)));
  }
  return plain;
}

std::string dispatched_tensor(TensorSpan tensors, Role role) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto pair = static_cast<int64_t>(i);
    TensorView view{};
    Known known;
    if (are_plain(tensors.subspan(i, 1), role) && read_plain_tensor(tensors[i], pair, role, view, known)) continue;
    const std::string name = name_of(role.names, pair);
    return std::string(role.name) + " " + (name.empty() ? std::to_string(pair) : name) + " is " +
           (are_plain(tensors.subspan(i, 1), role) ? "no plain memory" : Py_TYPE(tensors[i])->tp_name);
  }
  return {};
}

void ask_autograd(TensorSpan destinations, std::vector<TensorView>& views) {
  views.assign(destinations.size(), {});
  if (!aoti_torch_grad_mode_is_enabled()) return;
  const bool inference_mode = is_inference_mode();
  for (size_t i = 0; i < views.size(); ++i) {
    views[i].autograd.requires_grad = py::handle(destinations[i]).attr("requires_grad").ptr() == Py_True;
    views[i].autograd.inference = !inference_mode && is_inference(destinations[i]);
  }
}

bool read_tensors(TensorSpan tensors, Role role, std::vector<TensorView>& views) {
  views.resize(tensors.size());
  Known known;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!read_plain_tensor(tensors[i], static_cast<int64_t>(i), role, views[i], known)) return false;
  }
  return true;
}

void read_dispatched_tensors(TensorSpan tensors, Role role, std::vector<TensorView>& views) {
  views.resize(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    read_dispatched_tensor(tensors[i], static_cast<int64_t>(i), role.name, views[i]);
  }
}

void read_dispatched_tensor(PyObject* tensor, int64_t pair, const char* role, TensorView& view) {
  const AtenTensorHandle handle = handle_of(tensor);
  if (handle == nullptr) throw std::runtime_error("fused_copy: this version of torch is not supported");
  const Autograd autograd = view.autograd;
  try {
    view = read_tensor(handle);
  } catch (const Withheld& error) {
    throw std::runtime_error(describe(withheld_by_torch(tensor, pair, role, error.what())));
  }
  view.lazy = is_lazy(tensor, handle);
  view.autograd = autograd;
}

namespace {

// Whether the number is the double that it was converted to: 2**53 + 1, a Fraction or a NumPy integer may not be.
bool is_exactly(py::handle number, double value) {
  if (PyFloat_Check(number.ptr()) || std::isnan(value)) return true;
  // A type that defines no comparison cannot be compared: its __float__ is believed.
  if (Py_TYPE(number.ptr())->tp_richcompare == PyBaseObject_Type.tp_richcompare) return true;
  // NumPy's and torch's integers compare with a float as floats: their __index__ is exact.
  auto exact = py::reinterpret_steal<py::object>(PyIndex_Check(number.ptr()) ? PyNumber_Index(number.ptr()) : nullptr);
  if (!exact) {
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    exact = py::reinterpret_borrow<py::object>(number);
  }
  return py::float_(value).equal(exact);
}

}  // namespace

bool read_fills(py::handle fills, py::handle names, std::vector<Fill>& into) {
  if (fills.is_none()) return false;
  for (const py::handle fill : fills) {
    const auto pair = static_cast<int64_t>(into.size());
    if (fill.is_none()) {
      into.emplace_back();
      continue;
    }
    if (PyUnicode_Check(fill.ptr()) && PyUnicode_CompareWithASCIIString(fill.ptr(), "last") == 0) {
      into.push_back(Fill::last());
      continue;
    }
    const double value = PyFloat_AsDouble(fill.ptr());
    const bool failed = value == -1 && PyErr_Occurred();
    // Only these errors say that it is no number; an interrupt or exhausted memory must reach the caller.
    const bool no_number =
        failed && (PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_ValueError) ||
                   PyErr_ExceptionMatches(PyExc_OverflowError));
    if (failed && !no_number) throw py::error_already_set();
    if (failed) PyErr_Clear();
    if (failed || !is_exactly(fill, value)) {
      throw py::type_error(
          describe({pair, "fill is " + text_of(fill, &PyObject_Repr) + " (" + Py_TYPE(fill.ptr())->tp_name +
                              "): expected None, \"last\" or a number that a float holds exactly"},
                   name_of(names, pair)));
    }
    into.emplace_back(value);
  }
  return true;
}

py::object call_python(const char* module, const char* function, const py::tuple& arguments) {
  const py::object callable = py::module_::import(module).attr(function);
  auto result = py::reinterpret_steal<py::object>(PyObject_CallObject(callable.ptr(), arguments.ptr()));
  if (!result) throw py::error_already_set();
  return result;
}

void Profiled::enter(const char* name) {
  record_ = call_python("torch.autograd.profiler", "record_function", py::make_tuple(name));
  record_.attr("__enter__")();
}

void Profiled::exit() noexcept {
  try {
    record_.attr("__exit__")(py::none(), py::none(), py::none());
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("fused_copy: the profiler");
  }
}

}  // namespace fused_copy
