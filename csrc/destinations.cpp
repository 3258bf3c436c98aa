#include "destinations.h"

#include <algorithm>

#include "fill_pattern.h"
#include "sources.h"

namespace fused_copy {
namespace {

// The verb of an error about two tensors that overlap, or whose search was given up undecided.
std::string verb(Shared shared, const char* known) { return shared == Shared::Yes ? known : "may share"; }
const char* doubt(Shared shared) {
  return shared == Shared::Yes ? "" : " (it could not be shown that they do not overlap: their strides do not nest)";
}

}  // namespace

void Destinations::bind(std::span<const TensorView> views, const std::vector<Fill>* fills) {
  if (fills != nullptr && fills->size() != views.size()) {
    throw InvalidInput(-1, "got " + std::to_string(fills->size()) + " fills for " + std::to_string(views.size()) +
                               " destinations: pass one number or None for each destination");
  }
  views_.assign(views.begin(), views.end());
  rests_.clear();
  index_.clear();
  deferred_.reset();
  device_ = views.empty() ? Device{} : views[0].device;
  for (size_t i = 0; i < views.size(); ++i) {
    const auto pair = static_cast<int64_t>(i);
    const TensorView& view = views[i];
    const int64_t bytes = check_tensor(pair, "destination", view);
    if (fills != nullptr) bind_fill(pair, (*fills)[i], view);
    check_or_defer(deferred_, [&] {
      check_lazy(pair, "destination", view);
      if (view.device == device_) return;
      throw InvalidInput(pair,
                         "destination is on " + device_name(view.device) + " but destination 0 is on " +
                             device_name(device_) + ": pass destinations of one device",
                         /*torch_can=*/true);
    });
    if (bytes == 0) continue;
    if (const Shared shared = shares_own_elements(view); shared != Shared::No) {
      throw InvalidInput(pair, "destination of shape " + shape_of(view) + " and strides " + strides_of(view) +
                                   " has elements that " + verb(shared, "share") + " memory" +
                                   (shared == Shared::Yes ? " (an expanded or overlapping view)" : doubt(shared)) +
                                   ": pass one in which every element has its own");
    }
    index_.add(pair, view.address, view.address + static_cast<uint64_t>(bytes));
  }
  check_or_defer(deferred_, [&] {
    const auto [shared, one, other] = index_.order(views_);
    if (shared == Shared::No) return;
    throw InvalidInput(std::max(one, other),
                       "destination " + verb(shared, "shares") + " memory with the destination of pair " +
                           std::to_string(std::min(one, other)) + doubt(shared) +
                           ": the copies of one call have no order, so destinations must not overlap",
                       /*torch_can=*/true);
  });
}

void Destinations::bind_fill(int64_t pair, const Fill& fill, const TensorView& view) {
  RestFill& rest = rests_.emplace_back(RestFill{fill.kind});
  if (fill.kind == Rest::Last && view.rank != 1) {
    throw InvalidInput(pair, "fill is \"last\" but the destination has shape " + shape_of(view) +
                                 ": expected one dimension, or a number to fill with");
  }
  if (fill.kind != Rest::Pattern) return;
  const std::optional<uint64_t> pattern = fill_pattern(fill.number, view.dtype);
  if (!pattern) refuse_fill(pair, fill.number, view);
  rest.pattern = *pattern;
}

size_t Destinations::capacity_bytes() const { return bytes_of(views_) + bytes_of(rests_) + index_.capacity_bytes(); }

bool Destinations::check_source_overlap(int64_t pair, const TensorView& source, int64_t source_bytes,
                                        std::span<const DerivedSource> derived, size_t& gap) const {
  if (index_.is_free(source.address, source.address + static_cast<uint64_t>(source_bytes), gap)) return false;
  const TensorView& destination = views_[pair];
  bool same_memory = source.address == destination.address && source.dtype == destination.dtype;
  for (int64_t d = 0; same_memory && d < source.rank; ++d) {
    same_memory = source.sizes[d] == 1 || source.strides[d] == destination.strides[d];
  }
  // Destinations do not overlap each other, so a source that is its own destination overlaps no other one.
  if (same_memory) return true;
  if (const auto text = shared_with(pair, source, derived)) {
    throw InvalidInput(pair,
                       "source " + *text +
                           ": the copies of one call have no order, so a source may not overlap a destination "
                           "unless it is the very same memory; pass a clone",
                       /*torch_can=*/true);
  }
  return false;
}

void Destinations::check_part_overlap(int64_t pair, const char* name, const TensorView& part, int64_t bytes,
                                      std::span<const DerivedSource> derived, size_t& gap) const {
  if (index_.is_free(part.address, part.address + static_cast<uint64_t>(bytes), gap)) return;
  if (const auto text = shared_with(pair, part, derived)) {
    throw InvalidInput(pair,
                       (is_part(name) ? "" : std::string(name) + " ") + *text +
                           ": the copies of one call have no order, so what a source is made of may not overlap a "
                           "destination; pass a clone",
                       /*torch_can=*/true, is_part(name) ? name : nullptr);
  }
}

OverlapIndex::Found Destinations::find_written(const TensorView& view, std::span<const DerivedSource> derived) const {
  const auto is_written = [&](int64_t pair) {
    const auto of_pair = std::ranges::lower_bound(derived, pair, {}, &DerivedSource::pair);
    return of_pair == derived.end() || of_pair->pair != pair || of_pair->derivation != Derivation::Nothing;
  };
  const OverlapIndex::Found found = index_.find(view, views_);
  if (found.shared == Shared::No || is_written(found.view)) return found;
  // It may lie in several destinations, of which that one is left out.
  OverlapIndex written;
  index_.visit([&](int64_t pair, uint64_t begin, uint64_t end) {
    if (is_written(pair)) written.add(pair, begin, end);
  });
  written.order(views_);
  return written.find(view, views_);
}

std::optional<std::string> Destinations::shared_with(int64_t pair, const TensorView& view,
                                                     std::span<const DerivedSource> derived) const {
  const auto [shared, other, _] = find_written(view, derived);
  if (shared == Shared::No) return std::nullopt;
  return verb(shared, "shares") + " memory with the destination" +
         (other == pair ? std::string() : " of pair " + std::to_string(other)) + doubt(shared);
}

}  // namespace fused_copy
