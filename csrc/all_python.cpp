// All that includes pybind11, as one translation unit: what its headers make of each takes longer to compile than the
// files' own code.
#include "bindings.cpp"
#include "plan.cpp"
#include "python_sources.cpp"
#include "python_tensors.cpp"
