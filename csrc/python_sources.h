// Reads what may stand for a source beside a tensor from Python objects: None, numbers, lists, arrays, rows of a table,
// sums of lengths, integers plus a number.
#pragma once

#include "python_tensors.h"

namespace fused_copy {

// What a call's sources are.
enum class SourceKinds {
  Tensors,     // plain tensors alone
  Mixed,       // others too, made of plain tensors
  Dispatched,  // some are subclasses of tensors, or made of such, and must go through torch's dispatcher
};
SourceKinds kinds_of(TensorSpan sources);

// Notes the types of fused_copy.rows, cu_seqlens and plus, which are named tuples.
void use_source_types(py::handle rows, py::handle sums, py::handle plus);

// Takes the host values among the sources into the workspace, and notes what the others are made of, for
// read_sources(). May run Python code. Throws TypeError for what can be no source, and a RuntimeError for numbers that
// do not fit.
void read_values(TensorSpan sources, std::span<const TensorView> destinations, py::handle names, Workspace& work);

// Reads the tensors among the sources and those that they are made of, as read_tensors() does, or those that the
// dispatcher hands on: then whatever they are.
bool read_sources(TensorSpan sources, Role role, Workspace& work, bool dispatched = false);

// The handle of a part's tensor.
AtenTensorHandle handle_of_part(const void* tensor);

}  // namespace fused_copy
