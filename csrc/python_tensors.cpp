#include "python_tensors.h"

namespace fused_copy {

Torch torch_api;
std::atomic<bool> use_reference = false;

std::string name_of(py::handle names, int64_t pair) {
  return names.is_none() || pair < 0 ? std::string() : py::str(names[py::int_(pair)]).cast<std::string>();
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

// From the tensor's first element to the end of its storage, which DLPack does not tell: in a storage that was freed or
// resized the copy would leave it.
int64_t bytes_in_storage(PyObject* tensor, int item_bytes) {
  BorrowedHandle handle(tensor);
  int64_t size, offset;
  if (aoti_torch_get_storage_size(handle.get(), &size) != 0) return 0;
  if (aoti_torch_get_storage_offset(handle.get(), &offset) != 0) return 0;
  return size - offset * item_bytes;
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
  // The wrappers of torch.func's transforms and freed tensors have no memory: the dispatcher knows which it is.
  if (tensor.data == nullptr) {
    bool empty = false;
    for (int32_t d = 0; d < tensor.ndim; ++d) empty |= tensor.shape[d] == 0;
    if (!empty) return false;
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

}  // namespace

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
  torch_api.is_inference_mode_enabled = keep(torch.attr("is_inference_mode_enabled"));
  torch_api.dispatch_modes = keep(c.attr("_len_torch_dispatch_stack"));
  const py::object graph = c.attr("_CUDAGraph");
  if (py::hasattr(graph, "raw_cuda_graph_exec")) {
    torch_api.graph = keep(graph.attr("raw_cuda_graph"));
    torch_api.graph_exec = keep(graph.attr("raw_cuda_graph_exec"));
  }
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

BorrowedHandle::BorrowedHandle(PyObject* tensor) {
  const auto address = py::reinterpret_steal<py::object>(torch_api.impl->get(tensor, torch_api.impl->closure));
  if (!address) throw py::error_already_set();
  impl_ = PyLong_AsVoidPtr(address.ptr());
}

bool is_intercepted() { return call_int(torch_api.dispatch_modes) > 0; }

bool read_tensors(TensorSpan tensors, const char* role, py::handle names, std::vector<TensorView>& views) {
  bool plain = torch_api.exchange != nullptr;
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyTypeObject* type = Py_TYPE(tensors[i]);
    if (type == torch_api.tensor_type) {
      plain = plain && read_tensor(tensors[i], views.emplace_back());
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

void read_autograd(TensorSpan destinations, std::vector<TensorView>& views) {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  const bool inference_mode = call_bool(torch_api.is_inference_mode_enabled);
  for (size_t i = 0; i < views.size(); ++i) {
    views[i].requires_grad = py::handle(destinations[i]).attr("requires_grad").ptr() == Py_True;
    views[i].inference = !inference_mode && call_bool(torch_api.is_inference, destinations[i]);
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
