// Takes the place of gpu.cpp and kernel.cu in a build without nvcc.
#include <stdexcept>

#include "back_end.h"

namespace fused_copy {

extern const GpuBuild kGpuBuild = {};

void launch_on_gpu(std::span<const PlannedLaunch>, int) {
  throw std::runtime_error(
      "fused_copy: this build has no GPU code: put nvcc 12.9 or newer on PATH and install again, in a clone: pip "
      "install --force-reinstall --no-deps .");
}

std::optional<uint64_t> pinned_address(uint64_t, int64_t, int) { return std::nullopt; }

bool GpuEvent::done() const { return true; }
void GpuEvent::Destroy::operator()(void*) const {}
AllowDuringCapture::AllowDuringCapture() = default;
AllowDuringCapture::~AllowDuringCapture() = default;
void keep_with_capture(void*, void (*)(void*), int) {}

GpuEvent record_event(int) { return GpuEvent(nullptr); }

void launch_nothing(int) { launch_on_gpu({}, 0); }
bool is_capturing(int) { return false; }
CapturedLaunch capture_launch(const PlannedLaunch*, int) { return {}; }
void set_node(void*, GraphNode&, const PlannedLaunch*, int) {}

}  // namespace fused_copy
