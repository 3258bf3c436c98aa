// Reads tensors from Python objects. No torch C++ header here or where this is included, whose pybind11 is not the one
// of the package; shim.h is plain C.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <atomic>
#include <span>
#include <string>
#include <vector>

#include "errors.h"
#include "front_door.h"

namespace fused_copy {

namespace py = pybind11;

// Lets other threads run Python meanwhile. A launch waits while the GPU's queue is full, and the queue may itself wait
// for a host function that is written in Python.
using WithoutGil = py::gil_scoped_release;

// What is looked up in torch once, when the package is imported.
struct Torch {
  PyTypeObject* tensor_type;
  PyTypeObject* parameter_type;
  ptrdiff_t handle_offset;  // see handle_of(); 0: not found, so no call takes the fast path
  ptrdiff_t keys_offset;    // see is_lazy(); 0: not found
  uint64_t lazy_keys;
  PyObject* is_conj;  // unbound methods of torch.Tensor
  PyObject* is_neg;
  PyObject* is_inference;
  PyObject* is_inference_mode_enabled;
  PyObject* dispatch_modes;            // how many modes intercept operators
  PyObject* is_tracing;                // whether torch.jit.trace records them
  bool (*includes_key)(uint16_t key);  // tells both without Python; null where this torch does otherwise
  uint16_t modes_key;
  uint16_t tracer_key;
  PyObject* increment_version;
  bool has_cuda;
  PyObject* graph;  // unbound methods of torch.cuda.CUDAGraph; null where this torch has none
  PyObject* graph_exec;
  PyObject* profiler;  // the module's dictionary; null where this torch does not tell whether it records
  PyObject* profiler_flag;
  std::string problem = "fused_copy was not imported as a package";  // why no call takes the fast path; empty: none
};
extern Torch torch_api;

// Which code copies: one launch, torch's own operators, or those where one launch cannot.
enum class Backend { Fused, Reference, Fallback };
extern std::atomic<Backend> backend;

// In a thread of its own: the calling one may have a device context, a mode or a transform, a new one has none.
void look_up_torch();

// A function with CPython's fast calling convention, which costs less per call than a binding of pybind11.
using FastFunction = PyObject*(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);
inline PyMethodDef fast_method(const char* name, FastFunction* function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL | METH_KEYWORDS, doc};
}

// Runs the body of such a function. What it throws becomes Python's error.
template <class Body>
PyObject* translate_errors(Body body) {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Calls a function of at most one argument. Throws the Python error of a call that failed.
py::object call(PyObject* function, PyObject* argument = nullptr);

// Calls a function of a Python module, which is imported for it: for rare cases.
py::object call_python(const char* module, const char* function, const py::tuple& arguments);

// A call's name in torch's profiler, while that records.
class Profiled {
 public:
  explicit Profiled(const char* name) {
    if (torch_api.profiler && PyDict_GetItemWithError(torch_api.profiler, torch_api.profiler_flag) == Py_True) {
      enter(name);
    }
  }
  ~Profiled() {
    if (record_) exit();
  }
  Profiled(const Profiled&) = delete;
  Profiled& operator=(const Profiled&) = delete;

 private:
  void enter(const char* name);
  void exit() noexcept;
  py::object record_;
};

// A tensor's handle of torch's stable ABI, good while the object lives: a handle is the address of an at::Tensor, and
// the Python object of a tensor contains one. Null where it holds another's at the moment, or none was found at import.
AtenTensorHandle handle_of(PyObject* tensor);

using TensorSpan = std::span<PyObject* const>;

// The items of a list or a tuple.
inline TensorSpan items_of(py::handle sequence) {
  return {PySequence_Fast_ITEMS(sequence.ptr()), static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence.ptr()))};
}

// str() of an object, or another text, for an error: whatever it holds, and also where it raises.
std::string text_of(py::handle object, PyObject* (*convert)(PyObject*) = &PyObject_Str);

// The name of a pair in a tuple of names or None; empty where it has none.
std::string name_of(py::handle names, int64_t pair);

// Runs a body whose InvalidInput becomes a RuntimeError that names the pair.
template <class Body>
auto with_names(py::handle names, Body body) {
  try {
    return body();
  } catch (const InvalidInput& error) {
    throw std::runtime_error(describe(error, name_of(names, error.pair)));
  }
}

// Which of a call's tensors these are.
struct Role {
  const char* name;
  py::handle names;  // of the pairs, or None
};

// Whether all are torch.Tensor or torch.nn.Parameter themselves. False: some are subclasses, which must go through
// torch's dispatcher. Raises TypeError for what is no tensor.
bool are_plain(TensorSpan tensors, Role role);

// Names the first of these tensors that must go through torch's dispatcher; empty where none must.
std::string dispatched_tensor(TensorSpan tensors, Role role);

// Fills in the views' `autograd`, while grad mode is on. Comes before the rest of the tensors is read.
void ask_autograd(TensorSpan destinations, std::vector<TensorView>& views);

// The refusal of a tensor whose memory torch withholds, with torch's reason; where that is not given, Python is asked.
InvalidInput withheld_by_torch(PyObject* tensor, int64_t pair, const char* role, std::string reason);

// A plain tensor's dispatch keys and device. Others with the same keys have the same layout, and a device of its type.
struct Known {
  uint64_t keys = 0;
  DeviceType device_type;
};

// Reads a plain tensor. False for tensors that must go through torch's dispatcher to be read or refused.
bool read_plain_tensor(PyObject* object, int64_t pair, Role role, TensorView& view, Known& known);

// Reads plain tensors without torch's dispatcher, and keeps the views' `autograd`. False where some must go through it:
// tensors that have no memory, dtypes that only it can name, the wrappers of transforms. Runs no Python code, so that
// what was read holds until the launch.
bool read_tensors(TensorSpan tensors, Role role, std::vector<TensorView>& views);

// Reads the tensors that torch's dispatcher hands to an implementation, whatever they are.
void read_dispatched_tensors(TensorSpan tensors, Role role, std::vector<TensorView>& views);
void read_dispatched_tensor(PyObject* tensor, int64_t pair, const char* role, TensorView& view);

// Reads a tuple of numbers and None. False where there is None instead of one.
bool read_fills(py::handle fills, py::handle names, std::vector<Fill>& into);

// Whether modes or a tracer want to see operators.
bool is_intercepted();

bool is_inference_mode();

// Whether a tensor was made in inference mode.
bool is_inference(PyObject* tensor);

}  // namespace fused_copy
