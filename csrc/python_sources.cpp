#include "python_sources.h"

#include <pybind11/numpy.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

namespace fused_copy {
namespace {

PyTypeObject* rows_type;
PyTypeObject* sums_type;
PyTypeObject* plus_type;
PyObject* page_size_of_one;

bool is_derived_type(PyTypeObject* type) { return type == rows_type || type == sums_type || type == plus_type; }

bool is_plain_tensor(PyObject* object) {
  PyTypeObject* const type = Py_TYPE(object);
  return type == torch_api.tensor_type || type == torch_api.parameter_type;
}

bool is_tensor(PyObject* object) {
  if (is_plain_tensor(object)) return true;
  return !is_derived_type(Py_TYPE(object)) && PyObject_TypeCheck(object, torch_api.tensor_type) != 0;
}

[[noreturn]] void raise_type_error(int64_t pair, const char* part, py::handle names, const std::string& text) {
  throw py::type_error(describe({pair, text, false, part}, name_of(names, pair)));
}

// For an error that is about to be told anew, with the pair: all but those of this kind are the caller's own.
void clear_error(PyObject* kind) {
  if (!PyErr_ExceptionMatches(kind)) throw py::error_already_set();
  PyErr_Clear();
}

constexpr const char* kValues = source_name(Derivation::Values);

// Where the numbers of a list go, and what errors about them say.
struct Destination {
  int64_t pair;
  const char* part;
  py::handle names;
  DType dtype;
};

[[noreturn, gnu::cold]] void refuse_value(const Destination& to, py::handle value, size_t position,
                                          const std::string& expected) {
  throw std::runtime_error(describe(
      {to.pair,
       "have " + text_of(value, &PyObject_Repr) + " at position " + std::to_string(position) + ": expected " + expected,
       false, to.part},
      name_of(to.names, to.pair)));
}

[[noreturn, gnu::cold]] void refuse_item(const Destination& to, py::handle item, size_t position) {
  raise_type_error(to.pair, to.part, to.names,
                   "have " + text_of(item, &PyObject_Repr) + " (" + Py_TYPE(item.ptr())->tp_name + ") at position " +
                       std::to_string(position) + ": expected " + (to.part == kValues ? "numbers" : "integers") +
                       "; pass a tensor or an array for anything else");
}

std::string range_of(const NumberFormat& format) {
  const bool is_signed = format.kind == NumberFormat::Signed;
  const uint64_t top = ~uint64_t{0} >> (64 - format.bits) >> is_signed;
  return (is_signed ? std::to_string(-static_cast<int64_t>(top) - 1) : "0") + " to " + std::to_string(top);
}

// The number as an integer of the format, as its low bytes.
uint64_t integer_of(const Destination& to, PyObject* item, size_t position) {
  const NumberFormat& format = info(to.dtype).format;
  const bool is_signed = format.kind == NumberFormat::Signed;
  if (!PyLong_Check(item)) {
    if (!PyFloat_Check(item) && PyIndex_Check(item) && !is_tensor(item)) {
      const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(item));
      if (!integer) {
        clear_error(PyExc_TypeError);
        refuse_item(to, item, position);
      }
      return integer_of(to, integer.ptr(), position);
    }
    if (is_tensor(item) || to.part != kValues) refuse_item(to, item, position);
    const double number = PyFloat_AsDouble(item);
    if (number == -1 && PyErr_Occurred()) {
      clear_error(PyExc_TypeError);
      refuse_item(to, item, position);
    }
    if (format.bits == 1) return number != 0;
    // As torch converts: towards zero, what lies within the range.
    const double whole = std::trunc(number);
    const double most = std::ldexp(1.0, format.bits - is_signed);
    if (!(number <= most - 1 && number < most && (is_signed ? number >= -most : number > -1))) {
      refuse_value(to, item, position, std::string("what ") + info(to.dtype).name + " holds, " + range_of(format));
    }
    return is_signed ? static_cast<uint64_t>(static_cast<int64_t>(whole)) : static_cast<uint64_t>(whole);
  }
  int overflow;
  const long long number = PyLong_AsLongLongAndOverflow(item, &overflow);
  const uint64_t top = ~uint64_t{0} >> (64 - format.bits) >> is_signed;
  if (overflow == 0) {
    if (is_signed ? number >= -static_cast<int64_t>(top) - 1 && number <= static_cast<int64_t>(top)
                  : number >= 0 && static_cast<uint64_t>(number) <= top) {
      return static_cast<uint64_t>(number);
    }
  } else if (overflow > 0 && top == ~uint64_t{0}) {
    const unsigned long long large = PyLong_AsUnsignedLongLong(item);
    if (!PyErr_Occurred()) return large;
    PyErr_Clear();
  }
  refuse_value(to, item, position, std::string("what ") + info(to.dtype).name + " holds, " + range_of(format));
}

double float_of(const Destination& to, PyObject* item, size_t position) {
  if (PyFloat_CheckExact(item)) return PyFloat_AS_DOUBLE(item);
  if (is_tensor(item)) refuse_item(to, item, position);
  // Without the float in between that PyFloat_AsDouble() makes of an integer.
  const double number = PyLong_CheckExact(item) ? PyLong_AsDouble(item) : PyFloat_AsDouble(item);
  if (!(number == -1 && PyErr_Occurred())) return number;
  const bool too_large = PyErr_ExceptionMatches(PyExc_OverflowError) != 0;
  clear_error(too_large ? PyExc_OverflowError : PyExc_TypeError);
  if (too_large) refuse_value(to, item, position, "what a float holds");
  refuse_item(to, item, position);
}

// Puts items as long as they are plain integers that fit, which runs no Python code, and returns how many were.
template <class Integer>
size_t put_plain_integers(TensorSpan items, Integer* numbers) {
  for (size_t i = 0; i < items.size(); ++i) {
    if (!PyLong_CheckExact(items[i])) return i;
#if PY_VERSION_HEX >= 0x030C0000
    // Of one digit: those of ids, positions and lengths.
    const auto* const digits = reinterpret_cast<PyLongObject*>(items[i]);
    if (PyUnstable_Long_IsCompact(digits)) {
      const Py_ssize_t number = PyUnstable_Long_CompactValue(digits);
      if (number != static_cast<Integer>(number)) return i;
      numbers[i] = static_cast<Integer>(number);
      continue;
    }
#endif
    int overflow;
    const long long number = PyLong_AsLongLongAndOverflow(items[i], &overflow);
    if (overflow != 0 || number != static_cast<Integer>(number)) return i;
    numbers[i] = static_cast<Integer>(number);
  }
  return items.size();
}

size_t put_plain_integers(DType dtype, TensorSpan items, std::byte* place) {
  switch (dtype) {
    case DType::Int32: return put_plain_integers(items, reinterpret_cast<int32_t*>(place));
    case DType::Int64: return put_plain_integers(items, reinterpret_cast<int64_t*>(place));
    default: return 0;
  }
}

void put_numbers(const Destination& to, TensorSpan items, std::byte* place) {
  const NumberFormat& format = info(to.dtype).format;
  const auto size = static_cast<size_t>(info(to.dtype).size);
  if (is_integer(format)) {
    for (size_t i = put_plain_integers(to.dtype, items, place); i < items.size(); ++i) {
      const uint64_t number = integer_of(to, items[i], i);
      std::memcpy(place + i * size, &number, size);
    }
    return;
  }
  if (!is_castable(to.dtype)) {
    throw std::runtime_error(describe(
        {to.pair,
         std::string("cannot become ") + info(to.dtype).name + " from Python's numbers: pass a tensor of that dtype",
         false, to.part},
        name_of(to.names, to.pair)));
  }
  std::array<double, 64> numbers;
  for (size_t first = 0; first < items.size(); first += numbers.size()) {
    const auto count = static_cast<int64_t>(std::min(numbers.size(), items.size() - first));
    for (int64_t i = 0; i < count; ++i) numbers[i] = float_of(to, items[first + i], first + i);
    constexpr int64_t kStride = sizeof(double);
    convert_array({numbers.data(), {&count, 1}, {&kStride, 1}, DType::Float64}, to.dtype, place + first * size);
  }
}

// An array's dtype, by the format of its items as Python's struct module and NumPy name it, and their bytes;
// Unsupported: torch has none.
DType dtype_of(const char* format, Py_ssize_t item_bytes) {
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  if (format[0] == '\0' || (format[1] != '\0' && format[0] != 'Z')) return DType::Unsupported;
  const auto integer = [&](NumberFormat::Kind kind) {
    for (const DTypeInfo& row : kDTypes) {
      if (row.format.kind == kind && row.format.bits == 8 * item_bytes) return row.dtype;
    }
    return DType::Unsupported;
  };
  switch (*format) {
    case '?': return DType::Bool;
    case 'b':
    case 'h':
    case 'i':
    case 'l':
    case 'q': return integer(NumberFormat::Signed);
    case 'B':
    case 'H':
    case 'I':
    case 'L':
    case 'Q': return integer(NumberFormat::Unsigned);
    case 'e': return DType::Float16;
    case 'f': return DType::Float32;
    case 'd': return DType::Float64;
    case 'Z': return format[1] == 'f' ? DType::Complex64 : format[1] == 'd' ? DType::Complex128 : DType::Unsupported;
    default: return DType::Unsupported;
  }
}

// How an array lies. Strides are in bytes.
struct ArrayLayout {
  const void* data;
  size_t rank;
  const Py_ssize_t* sizes;
  const Py_ssize_t* strides;
  DType dtype;
};

// NumPy's own type, which is there where an object has it. Not a class derived from it.
bool is_numpy_array(PyTypeObject* type) {
  static std::atomic<PyTypeObject*> known;
  if (type == known.load(std::memory_order_relaxed)) return true;
  if ((type->tp_flags & Py_TPFLAGS_HEAPTYPE) != 0 || std::strcmp(type->tp_name, "numpy.ndarray") != 0) return false;
  known.store(type, std::memory_order_relaxed);
  return true;
}

// A NumPy array of plain numbers, read where NumPy keeps what its buffer would tell, which takes a third of a
// microsecond to make. Without a GIL another thread may change that meanwhile: there the buffer is asked for.
std::optional<ArrayLayout> read_numpy_array(PyObject* object) {
#ifndef Py_GIL_DISABLED
  if (!is_numpy_array(Py_TYPE(object))) return std::nullopt;
  const auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = array.dtype();
  if (dtype.byteorder() != '=' && dtype.byteorder() != '|') return std::nullopt;
  static_assert(sizeof(long) == 8);
  constexpr std::pair<const char*, int> kCodes[] = {{"lLqQd", 8}, {"iIf", 4}, {"?bB", 1}, {"hHe", 2}};
  const char code[] = {dtype.char_(), '\0'};
  for (const auto& [codes, item_bytes] : kCodes) {
    if (std::strchr(codes, code[0]) == nullptr) continue;
    return ArrayLayout{array.data(), static_cast<size_t>(array.ndim()), array.shape(), array.strides(),
                       dtype_of(code, item_bytes)};
  }
#endif
  return std::nullopt;
}

class Buffer {
 public:
  // Nothing where the object does not say how its items lie. NumPy's dates do not: an array of them raises, and a
  // single one is bytes without strides. Other exporters leave out the strides of numbers, as ctypes does.
  explicit Buffer(PyObject* object) {
    if (PyObject_GetBuffer(object, &buffer_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      return;
    }
    shown_ = buffer_.ndim == 0 || buffer_.strides != nullptr;
    if (!shown_ && std::strcmp(format(), "B") != 0) {
      PyBuffer_FillContiguousStrides(buffer_.ndim, buffer_.shape, own_strides_.data(), buffer_.itemsize, 'C');
      shown_ = true;
    }
  }
  ~Buffer() { PyBuffer_Release(&buffer_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  explicit operator bool() const { return shown_; }
  const char* format() const { return buffer_.format ? buffer_.format : "B"; }
  const Py_ssize_t* strides() const { return buffer_.strides ? buffer_.strides : own_strides_.data(); }
  const Py_buffer* operator->() const { return &buffer_; }

 private:
  Py_buffer buffer_{};
  std::array<Py_ssize_t, PyBUF_MAX_NDIM> own_strides_;
  bool shown_ = false;
};

// Reads one source, or one part of it, that is no tensor.
class ValueReader {
 public:
  ValueReader(std::span<const TensorView> destinations, py::handle names, HostValues& values)
      : destinations_(destinations), names_(names), values_(values) {}

  // `dtype` is what the values become; none: their own, and int64 for Python's numbers.
  void read(int64_t pair, const char* name, PyObject* object, std::optional<DType> dtype, SourcePart& part) {
    const Destination to{pair, name, names_, dtype.value_or(DType::Int64)};
    if (PyList_Check(object)) return read_list(to, object, part);
    // A part may be none of this package's tuples, which would be taken for numbers.
    const bool derived = is_derived_type(Py_TYPE(object));
    if (PyTuple_Check(object) && !derived) return read_list(to, object, part);
    if (PyLong_Check(object) || PyFloat_Check(object)) return read_number(to, object, part);
    if (PyObject_CheckBuffer(object) && !PyBytes_Check(object) && !PyByteArray_Check(object)) {
      return read_array(to, object, dtype, part);
    }
    if (PyNumber_Check(object)) return read_number(to, object, part);
    raise_type_error(pair, name == kValues ? "source" : name, names_,
                     std::string(derived ? "is fused_copy." : "is ") + Py_TYPE(object)->tp_name +
                         ": expected a torch.Tensor, numbers in a list, a tuple or an array" +
                         (name == kValues ? ", None, fused_copy.rows, fused_copy.cu_seqlens or fused_copy.plus" : ""));
  }

 private:
  std::byte* add_row(const Destination& to, size_t items, SourcePart& part) {
    const auto size = static_cast<int64_t>(items);
    return values_.add(part, {&size, 1}, to.dtype);
  }

  void read_list(const Destination& to, PyObject* list, SourcePart& part) {
    std::byte* place = nullptr;
    size_t size = 0;
#ifndef Py_GIL_DISABLED
    if (PyList_CheckExact(list) && (to.dtype == DType::Int32 || to.dtype == DType::Int64)) {
      const TensorSpan items = items_of(list);
      size = items.size();
      place = add_row(to, size, part);
      if (put_plain_integers(to.dtype, items, place) == size) return;
    }
#endif
    // Copied: another thread, or a number's own code, may change the list meanwhile.
    const auto copy = py::reinterpret_steal<py::object>(PySequence_Tuple(list));
    if (!copy) throw py::error_already_set();
    const TensorSpan items = items_of(copy);
    if (place == nullptr || items.size() != size) place = add_row(to, items.size(), part);
    put_numbers(to, items, place);
  }

  // One number, of the destination's shape.
  std::span<const int64_t> ones(const Destination& to) {
    const TensorView& destination = destinations_[to.pair];
    const bool one_element =
        std::all_of(destination.sizes, destination.sizes + destination.rank, [](int64_t size) { return size == 1; });
    if (to.part != kValues || !one_element) {
      raise_type_error(
          to.pair, to.part, names_,
          "are one number: expected a list or an array" +
              (to.part == kValues ? ", as the destination has shape " + shape_of(destination) + " and not one element"
                                  : std::string()));
    }
    ones_.fill(1);
    return {ones_.data(), static_cast<size_t>(destination.rank)};
  }

  void read_number(const Destination& to, PyObject* number, SourcePart& part) {
    put_numbers(to, {&number, 1}, values_.add(part, ones(to), to.dtype));
  }

  void read_array(const Destination& to, PyObject* object, std::optional<DType> dtype, SourcePart& part) {
    if (const auto array = read_numpy_array(object)) return read_layout(to, *array, dtype, part);
    const Buffer buffer(object);
    const DType own = buffer ? dtype_of(buffer.format(), buffer->itemsize) : DType::Unsupported;
    if (own == DType::Unsupported) {
      raise_type_error(to.pair, to.part, names_,
                       std::string("are ") + Py_TYPE(object)->tp_name +
                           (buffer ? std::string(" of a dtype that torch does not have (") + buffer.format() + ")"
                                   : " that do not show their dtype or strides") +
                           ": pass numbers of one of torch's dtypes");
    }
    read_layout(to, {buffer->buf, static_cast<size_t>(buffer->ndim), buffer->shape, buffer.strides(), own}, dtype,
                part);
  }

  void read_layout(const Destination& to, const ArrayLayout& array, std::optional<DType> dtype, SourcePart& part) {
    const DType becomes = dtype.value_or(array.dtype);
    if (array.dtype != becomes && !(is_castable(array.dtype) && is_castable(becomes))) {
      throw std::runtime_error(describe({to.pair,
                                         std::string("are ") + info(array.dtype).name + " but the destination is " +
                                             info(becomes).name + ": pass the same dtype, or two that can be cast",
                                         false, to.part},
                                        name_of(names_, to.pair)));
    }
    if (array.rank > static_cast<size_t>(kMaxRank))
      raise_type_error(to.pair, to.part, names_, "have too many dimensions");
    std::array<int64_t, kMaxRank> sizes, strides;
    std::copy_n(array.sizes, array.rank, sizes.begin());
    std::copy_n(array.strides, array.rank, strides.begin());
    const std::span<const int64_t> shape =
        array.rank == 0 ? ones(to) : std::span<const int64_t>(sizes.data(), array.rank);
    // Left for the planner to refuse: an array may be a single number that repeats more often than memory holds.
    if (to.part == kValues && !fits(shape, destinations_[to.pair])) return values_.describe(part, shape, becomes);
    std::byte* const place = values_.add(part, shape, becomes);
    convert_array({array.data, {sizes.data(), array.rank}, {strides.data(), array.rank}, array.dtype}, becomes, place);
  }

  std::span<const TensorView> destinations_;
  py::handle names_;
  HostValues& values_;
  std::array<int64_t, kMaxRank> ones_;
};

// The parts of a source that is made of several, with the objects that they are.
struct PartObject {
  const char* name;
  PyObject* object;
  SourcePart DerivedSource::* part;
};

// The items of one of this package's named tuples.
PyObject* field(PyObject* tuple, Py_ssize_t at) { return PyTuple_GET_ITEM(tuple, at); }

template <class Visit>
void visit_parts(PyObject* source, Visit visit) {
  PyTypeObject* const type = Py_TYPE(source);
  if (type != rows_type) {
    return visit(PartObject{type == sums_type ? "lengths" : "source", field(source, 0), &DerivedSource::source});
  }
  visit(PartObject{"table", field(source, 0), &DerivedSource::source});
  visit(PartObject{"index", field(source, 1), &DerivedSource::index});
  PyObject* const lengths = field(source, 2);
  if (lengths == Py_None) return;
  if (Py_TYPE(lengths) == rows_type) {
    visit(PartObject{"table of the lengths", field(lengths, 0), &DerivedSource::lengths});
    visit(PartObject{"index of the lengths", field(lengths, 1), &DerivedSource::lengths_index});
  } else {
    visit(PartObject{"lengths", lengths, &DerivedSource::lengths});
  }
}

int64_t read_integer(int64_t pair, const char* name, PyObject* object, py::handle names) {
  const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(object));
  if (!integer) {
    clear_error(PyExc_TypeError);
    raise_type_error(pair, name, names, std::string("is ") + Py_TYPE(object)->tp_name + ": expected an integer");
  }
  int overflow;
  const long long value = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
  if (overflow != 0) {
    throw std::runtime_error(
        describe({pair, "is " + text_of(integer) + ": expected what int64 holds", false, name}, name_of(names, pair)));
  }
  return value;
}

PyObject* call_new(PyObject* type, PyObject* const* arguments, Py_ssize_t count, PyObject* keywords) {
  return translate_errors([&] {
    py::tuple positional(count);
    for (Py_ssize_t i = 0; i < count; ++i) positional[i] = py::handle(arguments[i]);
    py::dict named;
    const Py_ssize_t names = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
    for (Py_ssize_t i = 0; i < names; ++i) {
      named[py::handle(PyTuple_GET_ITEM(keywords, i))] = py::handle(arguments[count + i]);
    }
    auto* const tuple_type = reinterpret_cast<PyTypeObject*>(type);
    return tuple_type->tp_new(tuple_type, positional.ptr(), named.ptr());
  });
}

// Makes one of the named tuples from positional arguments, in a tenth of the time that its own __new__ takes, which is
// called for all others. `least` fields have no default.
template <Py_ssize_t kFields, Py_ssize_t kLeast>
PyObject* make_source(PyObject* type, PyObject* const* arguments, size_t flagged_count, PyObject* keywords) {
  const Py_ssize_t count = PyVectorcall_NARGS(flagged_count);
  if (keywords != nullptr || count < kLeast || count > kFields) {
    return call_new(type, arguments, count, keywords);
  }
  auto* const tuple_type = reinterpret_cast<PyTypeObject*>(type);
  PyObject* const made = tuple_type->tp_alloc(tuple_type, kFields);
  if (made == nullptr) return nullptr;
  PyObject* const defaults[] = {Py_None, page_size_of_one};
  for (Py_ssize_t i = 0; i < kFields; ++i) {
    PyTuple_SET_ITEM(made, i, Py_NewRef(i < count ? arguments[i] : defaults[i - kLeast]));
  }
  return made;
}

}  // namespace

void use_source_types(py::handle rows, py::handle sums, py::handle plus) {
  page_size_of_one = PyLong_FromLong(1);
  const auto keep = [](py::handle type, vectorcallfunc make) {
    auto* const kept = reinterpret_cast<PyTypeObject*>(Py_NewRef(type.ptr()));
    kept->tp_vectorcall = make;
    return kept;
  };
  rows_type = keep(rows, &make_source<4, 2>);
  sums_type = keep(sums, &make_source<1, 1>);
  plus_type = keep(plus, &make_source<2, 2>);
}

AtenTensorHandle handle_of_part(const void* tensor) {
  return handle_of(const_cast<PyObject*>(static_cast<const PyObject*>(tensor)));
}

SourceKinds kinds_of(TensorSpan sources) {
  SourceKinds kinds = SourceKinds::Tensors;
  for (PyObject* const source : sources) {
    if (is_plain_tensor(source)) continue;
    if (is_tensor(source)) return SourceKinds::Dispatched;
    kinds = SourceKinds::Mixed;
    if (!is_derived_type(Py_TYPE(source))) continue;
    bool dispatched = false;
    visit_parts(source,
                [&](const PartObject& part) { dispatched |= !is_plain_tensor(part.object) && is_tensor(part.object); });
    if (dispatched) return SourceKinds::Dispatched;
  }
  return kinds;
}

void read_values(TensorSpan sources, std::span<const TensorView> destinations, py::handle names, Workspace& work) {
  ValueReader reader(destinations, names, work.values);
  for (size_t i = 0; i < sources.size() && i < destinations.size(); ++i) {
    PyObject* const source = sources[i];
    if (is_tensor(source)) continue;
    const auto pair = static_cast<int64_t>(i);
    DerivedSource& derived = work.derived.emplace_back(pair, Derivation::Nothing);
    PyTypeObject* const type = Py_TYPE(source);
    if (is_derived_type(type)) {
      derived.derivation = type == rows_type   ? Derivation::Rows
                           : type == sums_type ? Derivation::Sums
                                               : Derivation::Plus;
      visit_parts(source, [&](const PartObject& part) {
        SourcePart& into = derived.*part.part;
        if (is_tensor(part.object)) {
          into.given = true;
          into.tensor = part.object;
        } else if (part.part == &DerivedSource::source && type == rows_type) {
          raise_type_error(pair, part.name, names,
                           std::string("is ") + Py_TYPE(part.object)->tp_name + ": expected a torch.Tensor");
        } else {
          reader.read(pair, part.name, part.object, std::nullopt, into);
        }
      });
      if (type == rows_type) {
        derived.number = read_integer(pair, "page_size", field(source, 3), names);
        PyObject* const lengths = field(source, 2);
        if (Py_TYPE(lengths) == rows_type &&
            (field(lengths, 2) != Py_None ||
             read_integer(pair, "page_size of the lengths", field(lengths, 3), names) != 1)) {
          raise_type_error(pair, "lengths", names,
                           "are rows with lengths or pages of their own: expected rows(table, index) alone");
        }
      } else if (type == plus_type) {
        derived.number = read_integer(pair, "n", field(source, 1), names);
      }
    } else if (source != Py_None) {
      derived.derivation = Derivation::Values;
      reader.read(pair, kValues, source, destinations[i].dtype, derived.source);
    }
  }
}

bool read_sources(TensorSpan sources, Role role, Workspace& work, bool dispatched) {
  work.source_views.assign(sources.size(), kNoTensor);
  Known known;
  // A step's lengths are a part of several sources: what was read just now is not read again.
  std::array<std::pair<PyObject*, const TensorView*>, 4> recent{};
  size_t reads = 0;
  const auto read = [&](PyObject* tensor, int64_t pair, Role of, TensorView& view) {
    for (const auto& [object, known_view] : recent) {
      if (object == tensor) return view = *known_view, true;
    }
    if (dispatched) {
      read_dispatched_tensor(tensor, pair, of.name, view);
    } else if (!read_plain_tensor(tensor, pair, of, view, known)) {
      return false;
    }
    recent[reads++ % recent.size()] = {tensor, &view};
    return true;
  };
  for (size_t i = 0; i < sources.size(); ++i) {
    if (is_tensor(sources[i]) && !read(sources[i], static_cast<int64_t>(i), role, work.source_views[i])) return false;
  }
  for (DerivedSource& derived : work.derived) {
    PyObject* const source = sources[derived.pair];
    if (!is_derived_type(Py_TYPE(source))) continue;
    bool plain = true;
    visit_parts(source, [&](const PartObject& object) {
      SourcePart& part = derived.*object.part;
      if (part.tensor == nullptr) return;
      plain = plain && read(object.object, derived.pair, {object.name, role.names}, part.view);
    });
    if (!plain) return false;
  }
  return true;
}

}  // namespace fused_copy
