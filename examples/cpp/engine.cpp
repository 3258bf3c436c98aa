// A C++ engine's fill of its static buffers: fused_copy's op, called through torch's dispatcher.
//
// Nothing of fused_copy is included or linked. The op is registered when its extension is loaded (`import fused_copy`).
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>

namespace {

using Fills = c10::List<std::optional<double>>;
using Replay = void(at::TensorList, at::TensorList, std::optional<Fills>);

const c10::TypedOperatorHandle<Replay>& replay() {
  // Looking an op up takes the dispatcher's lock; the handle stays valid for as long as the extension is loaded.
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_copy::replay", "").typed<Replay>();
  return op;
}

// Fills whole buffers from this step's tensors. The lengths, which come last, become 1 in padded rows.
void fill_decode_buffers(at::TensorList buffers, at::TensorList step) {
  Fills fills;
  fills.resize(buffers.size());
  if (!buffers.empty()) fills.set(buffers.size() - 1, 1.0);
  replay().call(buffers, step, fills);
}

}  // namespace

TORCH_LIBRARY(engine, library) {
  library.def("fill_decode_buffers(Tensor(a!)[] buffers, Tensor[] step) -> ()");
  library.impl("fill_decode_buffers", c10::DispatchKey::CompositeExplicitAutograd, &fill_decode_buffers);
}
