// Reads tensors from Python objects, through torch's DLPack C exchange API. No torch C++ header here or where this is
// included, whose pybind11 is not the one of the package; dlpack.h and shim.h are plain C.
#pragma once

#include <ATen/dlpack.h>
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

// What is looked up in torch once, when the module is imported.
struct Torch {
  PyTypeObject* tensor_type;
  const DLPackExchangeAPI* exchange;  // null before torch 2.10
  const PyGetSetDef* impl;            // torch.Tensor._cdata
  PyObject* is_conj;                  // unbound methods of torch.Tensor
  PyObject* is_neg;
  PyObject* is_inference;
  PyObject* is_inference_mode_enabled;
  PyObject* dispatch_modes;  // how many modes intercept operators
  PyObject* increment_version;
  PyObject* graph;  // unbound methods of torch.cuda.CUDAGraph
  PyObject* graph_exec;
  PyObject* uint8;
  PyObject* int8;
};
extern Torch torch_api;

// Whether torch's own operators shall copy.
extern std::atomic<bool> use_reference;

void look_up_torch();

// Calls a function of at most one argument. Throws the Python error of a call that failed.
py::object call(PyObject* function, PyObject* argument = nullptr);

// A borrowed handle of torch's stable ABI, good while the tensor lives. Such a handle is the address of a pointer to
// the tensor's TensorImpl, and `_cdata` is that pointer; look_up_torch() tries it out.
class BorrowedHandle {
 public:
  explicit BorrowedHandle(PyObject* tensor);
  AtenTensorHandle get() { return reinterpret_cast<AtenTensorHandle>(&impl_); }

 private:
  void* impl_;
};

using TensorSpan = std::span<PyObject* const>;

// The name of a pair in a tuple of names or None.
std::string name_of(py::handle names, int64_t pair);

// Reads tensors past torch's dispatcher. False where they are for it: subclasses, tensors that have no memory, an older
// torch, the wrappers of transforms. Raises TypeError for what is no tensor.
bool read_tensors(TensorSpan tensors, const char* role, py::handle names, std::vector<TensorView>& views);

// Adds what autograd must know of destinations while grad mode is on.
void read_autograd(TensorSpan destinations, std::vector<TensorView>& views);

// Reads a sequence of numbers and None. False where there is None instead of one.
bool read_fills(py::handle fills, py::handle names, std::vector<Fill>& into);

// Whether modes want to see operators.
bool is_intercepted();

}  // namespace fused_copy
