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

// What is looked up in torch once, when the module is imported.
struct Torch {
  PyTypeObject* tensor_type;
  ptrdiff_t handle_offset;  // see handle_of(); 0 where it was not found
  PyObject* is_conj;        // unbound methods of torch.Tensor
  PyObject* is_neg;
  PyObject* is_inference;
  PyObject* is_inference_mode_enabled;
  PyObject* dispatch_modes;            // how many modes intercept operators
  PyObject* is_tracing;                // whether torch.jit.trace records them
  bool (*includes_key)(uint16_t key);  // tells both without Python; null where this torch does otherwise
  uint16_t modes_key;
  uint16_t tracer_key;
  PyObject* increment_version;
  PyObject* graph;  // unbound methods of torch.cuda.CUDAGraph
  PyObject* graph_exec;
};
extern Torch torch_api;

// Whether torch's own operators shall copy.
extern std::atomic<bool> use_reference;

void look_up_torch();

// A function with CPython's fast calling convention, which costs less per call than a binding of pybind11.
inline PyMethodDef fast_method(const char* name, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t),
                               const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, doc};
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
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Calls a function of at most one argument. Throws the Python error of a call that failed.
py::object call(PyObject* function, PyObject* argument = nullptr);

// A tensor's handle of torch's stable ABI, good while the object lives: a handle is the address of an at::Tensor, and
// the Python object of a tensor contains one. Null where it holds another's at the moment, or none was found at import.
AtenTensorHandle handle_of(PyObject* tensor);

using TensorSpan = std::span<PyObject* const>;

// The items of a list or a tuple.
inline TensorSpan items_of(py::handle sequence) {
  return {PySequence_Fast_ITEMS(sequence.ptr()), static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence.ptr()))};
}

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

// Reads tensors past torch's dispatcher. False where they are for it: subclasses, tensors that have no memory, dtypes
// that only it can name, the wrappers of transforms. Raises TypeError for what is no tensor.
bool read_tensors(TensorSpan tensors, const char* role, py::handle names, std::vector<TensorView>& views);

// Reads the tensors that torch's dispatcher hands to an implementation, whatever they are.
void read_dispatched_tensors(TensorSpan tensors, std::vector<TensorView>& views);

// Adds what autograd must know of destinations while grad mode is on.
void read_autograd(TensorSpan destinations, std::vector<TensorView>& views);

// Reads a sequence of numbers and None. False where there is None instead of one.
bool read_fills(py::handle fills, py::handle names, std::vector<Fill>& into);

// Whether modes or a tracer want to see operators.
bool is_intercepted();

bool is_inference_mode();

// Whether a tensor was made in inference mode.
bool is_inference(PyObject* tensor);

}  // namespace fused_copy
