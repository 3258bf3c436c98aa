// torch.ops.fused_copy.replay, against torch's stable ABI alone: tensor handles -> metadata -> planner -> back end.
#define TORCH_TARGET_VERSION 0x020a000000000000

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "errors.h"
#include "front_door.h"
#include "tensors.h"

// Since torch 2.10. Weak, so that the same binary loads with torch 2.9, where Python registers the op.
#pragma weak torch_call_dispatcher
#pragma weak torch_delete_list
#pragma weak torch_delete_string
#pragma weak torch_library_impl
#pragma weak torch_list_get_item
#pragma weak torch_list_size
#pragma weak torch_string_c_str
#pragma weak torch_string_length

namespace fused_copy {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// Calls an operator with a tensor, which it does not take over, and further arguments.
StableIValue call_operator(const char* name, AtenTensorHandle tensor, std::initializer_list<StableIValue> others = {}) {
  std::vector<StableIValue> stack(1 + others.size());
  std::ranges::copy(others, stack.begin() + 1);
  stack[0] = reinterpret_cast<StableIValue>(own_tensor(tensor).release());
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack[0];
}

bool is(const char* question, AtenTensorHandle tensor) { return to<bool>(call_operator(question, tensor)); }

// Which properties to ask the dispatcher for, as only it tells them: each answer costs about as much as reading all
// the rest of a tensor.
struct Questions {
  bool lazy;
  bool autograd;
};

bool requires_grad(AtenTensorHandle tensor) {
  // The stable ABI does not tell. With grad mode on, a view of a tensor has a gradient function if, and only if, the
  // tensor requires grad.
  const OwnedTensor view(to<AtenTensorHandle>(call_operator("aten::alias", tensor)));
  return !is("aten::is_leaf", view.get());
}

TensorView read_tensor(AtenTensorHandle tensor, const Questions& ask) {
  TensorView view = fused_copy::read_tensor(tensor);
  if (!view.strided || view.device.type > DeviceType::Cuda) return view;
  view.lazy = ask.lazy && (is("aten::is_conj", tensor) || is("aten::is_neg", tensor));
  if (ask.autograd) {
    // Inference mode turns grad mode off, so an inference tensor is outside of it here.
    view.autograd.inference = is("aten::is_inference", tensor);
    view.autograd.requires_grad = !view.autograd.inference && requires_grad(tensor);
  }
  return view;
}

// Tells autograd that a tensor is about to change, by an in-place operator that writes nothing.
void increment_version(AtenTensorHandle tensor) {
  const StableIValue none = from(int64_t{0});
  const OwnedTensor same(to<AtenTensorHandle>(call_operator("aten::transpose_", tensor, {none, none})));
}

// A list argument, which it takes over from the dispatcher's stack; null for None.
class List {
 public:
  explicit List(StableListHandle list) : list_(list) {}
  ~List() {
    if (list_ != nullptr) torch_delete_list(list_);
  }
  List(const List&) = delete;
  List& operator=(const List&) = delete;

  bool is_none() const { return list_ == nullptr; }
  size_t size() const {
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list_, &size));
    return size;
  }
  template <class Item>
  Item item(size_t index) const {
    StableIValue value;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list_, index, &value));
    return to<Item>(value);
  }

 private:
  StableListHandle list_;
};

StableListHandle optional_list(StableIValue argument) {
  const std::unique_ptr<StableIValue> value(to<StableIValue*>(argument));
  return value == nullptr ? nullptr : to<StableListHandle>(*value);
}

OwnedTensors tensors_of(const List& list) {
  const size_t size = list.size();
  OwnedTensors tensors;
  tensors.reserve(size);
  for (size_t i = 0; i < size; ++i) tensors.emplace_back(list.item<AtenTensorHandle>(i));
  return tensors;
}

void read_tensors(const OwnedTensors& tensors, const char* role, const Questions& ask, std::vector<TensorView>& views) {
  for (const OwnedTensor& tensor : tensors) {
    try {
      views.push_back(read_tensor(tensor.get(), ask));
    } catch (const Withheld& withheld) {
      throw withheld_memory(static_cast<int64_t>(views.size()), role, withheld.what());
    }
  }
}

void replay(StableIValue* stack, bool lazy) {
  // This function owns all three lists, and gives each back even where reading another one throws.
  const List dst(to<StableListHandle>(stack[0])), src(to<StableListHandle>(stack[1]));
  const List fill(optional_list(stack[2]));
  const OwnedTensors destinations = tensors_of(dst), sources = tensors_of(src);
  BorrowedWorkspace work;
  work->has_fills = !fill.is_none();
  for (size_t i = 0, size = fill.is_none() ? 0 : fill.size(); i < size; ++i) {
    const auto number = fill.item<std::optional<double>>(i);
    work->fills.push_back(number ? Fill(*number) : Fill());
  }
  const bool grad_mode = aoti_torch_grad_mode_is_enabled();
  try {
    read_tensors(destinations, "destination", {lazy, grad_mode}, work->destination_views);
    read_tensors(sources, "source", {lazy, false}, work->source_views);
    const auto launches = plan_call(*work);
    run_call(
        launches, work->destinations.device(), *work, [&](size_t i) { return sources[i].get(); },
        [](const void*) -> AtenTensorHandle { return nullptr; });
    if (grad_mode) {
      for (const OwnedTensor& tensor : destinations) increment_version(tensor.get());
    }
  } catch (const InvalidInput& error) {
    throw std::runtime_error(describe(error));
  }
}

InvalidInput unknown_source(int64_t pair, const std::string& name) {
  std::string names = kTensorForm;
  for (const SourceForm& form : kSourceForms) names += std::string(", ") + form.name;
  return {pair, "source is \"" + name + "\": expected one of " + names};
}

// Reads the parts of a call's sources, in their order. Throws InvalidInput.
void read_sources(const List& names, const List& numbers, const OwnedTensors& parts, const Questions& ask,
                  Workspace& work) {
  size_t next = 0;
  const auto read = [&](int64_t pair, const char* role) {
    if (next == parts.size()) {
      throw InvalidInput(pair, "source has no " + std::string(role) + " left of " + std::to_string(parts.size()) +
                                   " parts: pass those of every source, one after the other");
    }
    try {
      return read_tensor(parts[next++].get(), ask);
    } catch (const Withheld& withheld) {
      throw withheld_memory(pair, role, withheld.what());
    }
  };
  if (names.size() != numbers.size()) {
    throw InvalidInput(-1, "got " + std::to_string(names.size()) + " sources and " + std::to_string(numbers.size()) +
                               " numbers: pass one number for each source");
  }
  for (size_t i = 0, size = names.size(); i < size; ++i) {
    const auto pair = static_cast<int64_t>(i);
    const auto name = names.item<std::string>(i);
    if (name == kTensorForm) {
      work.source_views.push_back(read(pair, "source"));
      continue;
    }
    const SourceForm* const form = std::ranges::find(kSourceForms, std::string_view(name), &SourceForm::name);
    if (form == std::end(kSourceForms)) throw unknown_source(pair, name);
    DerivedSource& derived = work.derived.emplace_back();
    derived.pair = pair;
    derived.derivation = form->derivation;
    derived.number = numbers.item<int64_t>(i);
    for (int p = 0; p < form->parts; ++p) {
      SourcePart& part = derived.*kParts[p];
      part.given = true;
      part.tensor = parts[next < parts.size() ? next : 0].get();
      part.view = read(pair, p == 0   ? source_name(form->derivation)
                             : p == 1 ? "index"
                             : p == 2 ? "lengths"
                                      : "index of the lengths");
    }
    work.source_views.push_back(kNoTensor);
  }
  if (next != parts.size()) {
    throw InvalidInput(-1,
                       "got " + std::to_string(parts.size()) + " parts for sources that have " + std::to_string(next));
  }
}

void replay_from(StableIValue* stack, bool lazy) {
  const List dst(to<StableListHandle>(stack[0])), names(to<StableListHandle>(stack[1]));
  const List part_list(to<StableListHandle>(stack[2])), numbers(to<StableListHandle>(stack[3]));
  const List fill(optional_list(stack[4])), fill_last(optional_list(stack[5]));
  const OwnedTensors destinations = tensors_of(dst), parts = tensors_of(part_list);
  BorrowedWorkspace work;
  work->has_fills = !fill.is_none() || !fill_last.is_none();
  const size_t fills = !fill.is_none() ? fill.size() : fill_last.is_none() ? 0 : fill_last.size();
  if (!fill_last.is_none() && fill_last.size() != fills) {
    throw std::runtime_error("fused_copy: got " + std::to_string(fills) + " fills but " +
                             std::to_string(fill_last.size()) + " of fill_last: pass one of each for a destination");
  }
  for (size_t i = 0; i < fills; ++i) {
    const auto number = fill.is_none() ? std::nullopt : fill.item<std::optional<double>>(i);
    const bool last = !fill_last.is_none() && fill_last.item<bool>(i);
    work->fills.push_back(last ? Fill::last() : number ? Fill(*number) : Fill());
  }
  const bool grad_mode = aoti_torch_grad_mode_is_enabled();
  try {
    read_tensors(destinations, "destination", {lazy, grad_mode}, work->destination_views);
    read_sources(names, numbers, parts, {lazy, false}, *work);
    std::vector<AtenTensorHandle> sources(work->source_views.size());
    size_t next = 0;
    auto derived = work->derived.begin();
    for (size_t i = 0; i < sources.size(); ++i) {
      if (derived != work->derived.end() && derived->pair == static_cast<int64_t>(i)) {
        for (const auto part : kParts) next += (*derived.*part).given;
        ++derived;
      } else {
        sources[i] = parts[next++].get();
      }
    }
    const auto launches = plan_call(*work);
    run_call(
        launches, work->destinations.device(), *work, [&](size_t i) { return sources[i]; },
        [](const void* tensor) { return static_cast<AtenTensorHandle>(const_cast<void*>(tensor)); });
    if (grad_mode) {
      for (const OwnedTensor& tensor : destinations) increment_version(tensor.get());
    }
  } catch (const InvalidInput& error) {
    throw std::runtime_error(describe(error));
  }
}

void replay_from_boxed(StableIValue* stack, uint64_t, uint64_t) { replay_from(stack, /*lazy=*/false); }
void replay_from_lazy_boxed(StableIValue* stack, uint64_t, uint64_t) { replay_from(stack, /*lazy=*/true); }

void replay_boxed(StableIValue* stack, uint64_t, uint64_t) { replay(stack, /*lazy=*/false); }
void replay_lazy_boxed(StableIValue* stack, uint64_t, uint64_t) { replay(stack, /*lazy=*/true); }

// All ops, for one dispatch key: `lazy` tensors may come there.
void implement(torch::stable::detail::StableLibrary& library, bool lazy) {
  if (!registers_op()) return;
  library.impl("replay", lazy ? &replay_lazy_boxed : &replay_boxed);
  library.impl("replay_from", lazy ? &replay_from_lazy_boxed : &replay_from_boxed);
}

}  // namespace

bool registers_op() { return &torch_list_size != nullptr; }

}  // namespace fused_copy

STABLE_TORCH_LIBRARY(fused_copy, library) {
  library.def("replay(Tensor(a!)[] dst, Tensor[] src, float?[]? fill=None) -> ()");
  library.def(
      "replay_from(Tensor(a!)[] dst, str[] src, Tensor[] parts, SymInt[] numbers, float?[]? fill=None, "
      "bool[]? fill_last=None) -> ()");
}

// All back ends, so that tensors of one that is not supported meet this project's own error. No Autograd kernel.
STABLE_TORCH_LIBRARY_IMPL(fused_copy, CompositeExplicitAutograd, library) {
  fused_copy::implement(library, /*lazy=*/false);
}

// Nested tensors would otherwise end in the dispatcher's own error, a page long.
STABLE_TORCH_LIBRARY_IMPL(fused_copy, AutogradNestedTensor, library) { fused_copy::implement(library, /*lazy=*/false); }

// Without these, torch would copy conjugate and negative views first and hide that from the caller.
STABLE_TORCH_LIBRARY_IMPL(fused_copy, Conjugate, library) { fused_copy::implement(library, /*lazy=*/true); }
STABLE_TORCH_LIBRARY_IMPL(fused_copy, Negative, library) { fused_copy::implement(library, /*lazy=*/true); }
