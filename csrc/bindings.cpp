// The door from Python that does not pass torch's dispatcher: tensors are read through torch's DLPack C exchange API.
// No torch C++ header here, whose pybind11 is not the one of the package; dlpack.h is plain C.
#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>

#include "errors.h"
#include "front_door.h"

namespace py = pybind11;

namespace fused_copy {
namespace {

// What is looked up in torch once, when the module is imported.
struct Torch {
  PyTypeObject* tensor_type;
  const DLPackExchangeAPI* exchange;  // null before torch 2.10
  const PyGetSetDef* impl;            // torch.Tensor._cdata
  PyObject* is_conj;                  // unbound methods of torch.Tensor
  PyObject* is_neg;
  PyObject* is_inference;
  PyObject* is_grad_enabled;
  PyObject* is_inference_mode_enabled;
  PyObject* dispatch_modes;   // how many modes intercept operators
  PyObject* functorch_level;  // None where no transform of torch.func is running
  PyObject* increment_version;
  PyObject* uint8;
  PyObject* int8;
};
Torch torch_api;

const char* type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

std::string name_of(py::handle names, int64_t pair) {
  return names.is_none() || pair < 0 ? std::string() : py::str(names[py::int_(pair)]).cast<std::string>();
}

// Owns what a call returned; throws the Python error of a call that failed.
py::object call(PyObject* function, PyObject* argument = nullptr) {
  PyObject* const arguments[] = {nullptr, argument};
  PyObject* result =
      PyObject_Vectorcall(function, arguments + 1, (argument ? 1 : 0) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

bool call_bool(PyObject* function, PyObject* argument = nullptr) {
  const py::object result = call(function, argument);
  return result.ptr() == Py_True;
}

int64_t call_int(PyObject* function, PyObject* argument = nullptr) {
  const int64_t value = PyLong_AsLongLong(call(function, argument).ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// A borrowed handle of torch's stable ABI, good while the tensor lives. Such a handle is the address of a pointer to
// the tensor's TensorImpl, and `_cdata` is that pointer; look_up_torch() tries it out.
class BorrowedHandle {
 public:
  explicit BorrowedHandle(PyObject* tensor) {
    const auto address = py::reinterpret_steal<py::object>(torch_api.impl->get(tensor, torch_api.impl->closure));
    if (!address) throw py::error_already_set();
    impl_ = PyLong_AsVoidPtr(address.ptr());
  }
  AtenTensorHandle get() { return reinterpret_cast<AtenTensorHandle>(&impl_); }

 private:
  void* impl_;
};

// From the tensor's first element to the end of its storage, which DLPack does not tell: in a storage that was freed or
// resized the copy would leave it.
int64_t bytes_in_storage(PyObject* tensor, int item_bytes) {
  BorrowedHandle handle(tensor);
  int64_t size, offset;
  if (aoti_torch_get_storage_size(handle.get(), &size) != 0) return 0;
  if (aoti_torch_get_storage_offset(handle.get(), &offset) != 0) return 0;
  return size - offset * item_bytes;
}

void look_up_torch() {
  // The references are kept for the life of the process, as torch is.
  const auto keep = [](py::object object) { return object.release().ptr(); };
  const py::module_ torch = py::module_::import("torch");
  const py::object tensor = torch.attr("Tensor");
  const py::object c = torch.attr("_C");
  torch_api.tensor_type = reinterpret_cast<PyTypeObject*>(keep(tensor));
  const py::object impl = tensor.attr("__mro__")[py::int_(1)].attr("__dict__")["_cdata"];
  torch_api.impl = reinterpret_cast<PyGetSetDescrObject*>(keep(impl))->d_getset;
  torch_api.is_conj = keep(tensor.attr("is_conj"));
  torch_api.is_neg = keep(tensor.attr("is_neg"));
  torch_api.is_inference = keep(tensor.attr("is_inference"));
  torch_api.uint8 = keep(torch.attr("uint8"));
  torch_api.int8 = keep(torch.attr("int8"));
  torch_api.is_grad_enabled = keep(torch.attr("is_grad_enabled"));
  torch_api.is_inference_mode_enabled = keep(torch.attr("is_inference_mode_enabled"));
  torch_api.dispatch_modes = keep(c.attr("_len_torch_dispatch_stack"));
  torch_api.functorch_level = keep(c.attr("_functorch").attr("maybe_current_level"));
  torch_api.increment_version = keep(c.attr("_increment_version"));
  if (py::hasattr(tensor, "__dlpack_c_exchange_api__")) {
    const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    const py::object trial = torch.attr("ones")(8, py::arg("dtype") = torch.attr("int32"))[py::slice(3, 8, 1)];
    const bool storage_readable = bytes_in_storage(trial.ptr(), 4) == 5 * 4;
    if (api->header.version.major == DLPACK_MAJOR_VERSION && storage_readable) torch_api.exchange = api;
  }
}

DType dtype_of(const DLDataType& dtype) {
  if (dtype.lanes != 1) {
    return dtype.code == kDLFloat4_e2m1fn && dtype.lanes == 2 ? DType::Float4E2M1FNx2 : DType::Unsupported;
  }
  switch (dtype.code << 8 | dtype.bits) {
    case kDLBool << 8 | 8: return DType::Bool;
    case kDLUInt << 8 | 8: return DType::UInt8;
    case kDLUInt << 8 | 16: return DType::UInt16;
    case kDLUInt << 8 | 32: return DType::UInt32;
    case kDLUInt << 8 | 64: return DType::UInt64;
    case kDLInt << 8 | 8: return DType::Int8;
    case kDLInt << 8 | 16: return DType::Int16;
    case kDLInt << 8 | 32: return DType::Int32;
    case kDLInt << 8 | 64: return DType::Int64;
    case kDLFloat << 8 | 16: return DType::Float16;
    case kDLFloat << 8 | 32: return DType::Float32;
    case kDLFloat << 8 | 64: return DType::Float64;
    case kDLBfloat << 8 | 16: return DType::BFloat16;
    case kDLComplex << 8 | 32: return DType::Complex32;
    case kDLComplex << 8 | 64: return DType::Complex64;
    case kDLComplex << 8 | 128: return DType::Complex128;
    case kDLFloat8_e4m3fn << 8 | 8: return DType::Float8E4M3FN;
    case kDLFloat8_e4m3fnuz << 8 | 8: return DType::Float8E4M3FNUZ;
    case kDLFloat8_e5m2 << 8 | 8: return DType::Float8E5M2;
    case kDLFloat8_e5m2fnuz << 8 | 8: return DType::Float8E5M2FNUZ;
    case kDLFloat8_e8m0fnu << 8 | 8: return DType::Float8E8M0FNU;
    default: return DType::Unsupported;
  }
}

bool may_be_negated(DType dtype) {
  return (dtype >= DType::Float16 && dtype <= DType::Float64) ||
         (dtype >= DType::Complex32 && dtype <= DType::Complex128);
}

// Reads a plain tensor. False for what only the dispatcher can read or refuse.
bool read_tensor(PyObject* object, TensorView& view) {
  DLTensor tensor;
  if (torch_api.exchange->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  view.dtype = dtype_of(tensor.dtype);
  if (view.dtype == DType::Unsupported) return false;
  if (view.dtype == DType::UInt8 || view.dtype == DType::Int8) {
    // torch exports its sub-byte integers as these two.
    const py::object dtype = py::handle(object).attr("dtype");
    if (dtype.ptr() != torch_api.uint8 && dtype.ptr() != torch_api.int8) return false;
  }
  switch (tensor.device.device_type) {
    case kDLCPU: view.device = {DeviceType::Cpu, 0}; break;
    case kDLCUDA: view.device = {DeviceType::Cuda, tensor.device.device_id}; break;
    default: return false;
  }
  view.address = reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset;
  view.sizes = tensor.shape;
  view.strides = tensor.strides;
  view.rank = tensor.ndim;
  view.storage_bytes = bytes_in_storage(object, dtype_size(view.dtype));
  view.lazy =
      may_be_negated(view.dtype) && (call_bool(torch_api.is_neg, object) || call_bool(torch_api.is_conj, object));
  return true;
}

// The items of one argument: a list or tuple of tensors.
class TensorSequence {
 public:
  TensorSequence(py::handle sequence, const char* role)
      : items_(py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), ""))), role_(role) {
    if (items_) return;
    PyErr_Clear();
    throw py::type_error(std::string("fused_copy: ") + role + " is " + type_name(sequence.ptr()) +
                         ": expected a list, a tuple or a mapping of tensors");
  }

  // Whether the items are torch.Tensor itself, none of a subclass. Raises TypeError where one is not a tensor at all.
  bool are_plain(py::handle names) const {
    bool plain = true;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items_.ptr()); ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(items_.ptr(), i);
      if (Py_TYPE(item) == torch_api.tensor_type) continue;
      plain = false;
      if (PyObject_TypeCheck(item, torch_api.tensor_type)) continue;
      throw py::type_error(describe({i, std::string(role_) + " is " + type_name(item) + ": expected a torch.Tensor"},
                                    name_of(names, i)));
    }
    return plain;
  }

  // Reads the items; they must be plain. False where one is for the dispatcher.
  bool read(std::vector<TensorView>& views) const {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items_.ptr()); ++i) {
      if (!read_tensor(PySequence_Fast_GET_ITEM(items_.ptr(), i), views.emplace_back())) return false;
    }
    return true;
  }

  PyObject* operator[](size_t i) const { return PySequence_Fast_GET_ITEM(items_.ptr(), static_cast<Py_ssize_t>(i)); }
  py::handle items() const { return items_; }

 private:
  py::object items_;
  const char* role_;
};

// What autograd must know of destinations while grad mode is on.
void read_autograd(py::handle destinations, std::vector<TensorView>& views) {
  if (!call_bool(torch_api.is_grad_enabled)) return;
  const bool inference_mode = call_bool(torch_api.is_inference_mode_enabled);
  for (size_t i = 0; i < views.size(); ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(destinations.ptr(), static_cast<Py_ssize_t>(i));
    views[i].requires_grad = py::handle(item).attr("requires_grad").ptr() == Py_True;
    views[i].inference = !inference_mode && call_bool(torch_api.is_inference, item);
  }
}

void read_fills(py::handle fills, py::handle names, std::vector<Fill>& into) {
  if (fills.is_none()) return;
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
}

// One call's tensors, read past torch's dispatcher.
class Call {
 public:
  Call(py::handle dst, py::handle src, py::handle fill, py::handle names)
      : destinations_(dst, "destination"), sources_(src, "source"), fill_(fill), names_(names) {}

  // False where the call is for the dispatcher: subclasses, modes that intercept operators, transforms, tensors that
  // have no memory.
  bool read() {
    const bool plain = destinations_.are_plain(names_) & sources_.are_plain(names_);
    if (!plain || torch_api.exchange == nullptr || call_int(torch_api.dispatch_modes) > 0 ||
        !call(torch_api.functorch_level).is_none() || !destinations_.read(work_->destination_views) ||
        !sources_.read(work_->source_views)) {
      return false;
    }
    read_autograd(destinations_.items(), work_->destination_views);
    read_fills(fill_, names_, work_->fills);
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
    call(torch_api.increment_version, destinations_.items().ptr());
    run_call(launches_, work_->destinations.device(), work_->source_views,
             [&](size_t i) { return own_handle(BorrowedHandle(sources_[i]).get()); });
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
  TensorSequence destinations_;
  TensorSequence sources_;
  py::handle fill_;
  py::handle names_;
  BorrowedWorkspace work_;
  std::span<const PlannedLaunch> launches_;
};

// Copies. False, and nothing done, where the call is for the dispatcher.
bool replay(py::handle dst, py::handle src, py::handle fill, py::handle names) {
  Call call(dst, src, fill, names);
  if (!call.read()) return false;
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

}  // namespace
}  // namespace fused_copy

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  fused_copy::look_up_torch();
  module.def("replay", &fused_copy::replay, py::arg("dst"), py::arg("src"), py::arg("fill"), py::arg("names"));
  module.def("explain", &fused_copy::explain, py::arg("dst"), py::arg("src"), py::arg("fill"), py::arg("names"));
  module.attr("has_gpu_code") = fused_copy::kHasGpuCode;
}
