#include "planner.h"

#include <algorithm>
#include <bit>

#include "box.h"
#include "tuning.h"

namespace fused_copy {
namespace {

constexpr __int128 kTooManyTiles = __int128{kNoTile} + 1;

// walk_plain_lane() reads rows' strides as 32 bits.
constexpr bool is_plain_stride(int64_t stride) { return stride == static_cast<uint32_t>(stride); }

}  // namespace

std::span<const PlannedLaunch> LaunchPlanner::plan(const Destinations& destinations, const CallSources& call,
                                                   Staging* staging) {
  const std::span<const TensorView> views = destinations.views();
  const std::span<const TensorView> sources = call.tensors;
  if (sources.size() != views.size()) {
    throw InvalidInput(-1, "got " + std::to_string(views.size()) + " destinations and " +
                               std::to_string(sources.size()) + " sources: pass one source for each destination");
  }
  tasks_.clear();
  bytes_ = 0;
  deferred_ = destinations.deferred();
  values_ = call.values;
  derived_ = call.derived;
  size_t gap = 0;
  const DerivedSource* derived = call.derived.data();
  const DerivedSource* const derived_end = derived + call.derived.size();
  for (size_t i = 0; i < sources.size(); ++i) {
    const auto pair = static_cast<int64_t>(i);
    if (derived != derived_end && derived->pair == pair) {
      check_or_defer(deferred_, [&] { add_derived(destinations, *derived++, gap); });
      continue;
    }
    const TensorView& source = sources[i];
    const TensorView& destination = views[i];
    const int64_t source_bytes = check_tensor(pair, "source", source);
    check_shapes(pair, destination, source);
    check_or_defer(deferred_, [&] {
      check_devices_and_dtypes(pair, destination, source);
      if (source_bytes > 0 && !destinations.check_source_overlap(pair, source, source_bytes, derived_, gap)) {
        add_copy(pair, destination, source);
      }
      if (destinations.has_rests()) {
        if (destinations.rest(pair).kind == Rest::Last) add_last(pair, destination, source);
        add_rest(destinations, pair, source);
      }
    });
  }
  if (deferred_) throw InvalidInput(*deferred_);
  return lay_out(destinations.device().type, staging);
}

void LaunchPlanner::add_rest(const Destinations& destinations, int64_t pair, const TensorView& corner) {
  const RestFill rest = destinations.rest(pair);
  if (rest.kind == Rest::Pattern) add_fill(pair, destinations.views()[pair], corner, rest.pattern);
}

void LaunchPlanner::add_last(int64_t pair, const TensorView& destination, const TensorView& source) {
  const LastOf last(pair, destination, source);
  if (last.rest > 0) add_copy(pair, last.destination, last.source);
}

void LaunchPlanner::add_copy(int64_t pair, const TensorView& destination, const TensorView& source) {
  const int src_item = info(source.dtype).size;
  const int dst_item = info(destination.dtype).size;
  const bool cast = source.dtype != destination.dtype;
  Box box;
  int64_t d = source.rank;
  if (!cast) {
    // The dimensions that lie side by side on both sides are one run of bytes, most often all of them.
    int64_t run = src_item;
    for (; d > 0; --d) {
      if (source.sizes[d - 1] == 1) continue;
      if (source.strides[d - 1] * src_item != run || destination.strides[d - 1] * src_item != run) break;
      run *= source.sizes[d - 1];
    }
    box.add(run, 1, 1);
  }
  while (d-- > 0) {
    if (source.sizes[d] > 1) box.add(source.sizes[d], source.strides[d] * src_item, destination.strides[d] * dst_item);
  }
  if (cast) {
    add_cast(pair, destination, source, box.extents());
  } else {
    add_bytes(pair, Operation::Copy, src_item, source.address, destination.address, box.extents());
  }
}

// The destination less its corner is a box for each dimension: there everything from the corner's edge on, within the
// corner in the dimensions before it, whole in those after it.
void LaunchPlanner::add_fill(int64_t pair, const TensorView& destination, const TensorView& source, uint64_t pattern) {
  if (is_empty(destination)) return;
  const int item = info(destination.dtype).size;
  for (int64_t edge = 0; edge < destination.rank; ++edge) {
    Box box;
    bool empty = false;
    box.add(item, 0, 1);
    for (int64_t d = destination.rank; d-- > 0;) {
      const int64_t size = d < edge   ? source.sizes[d]
                           : d > edge ? destination.sizes[d]
                                      : destination.sizes[d] - source.sizes[d];
      empty |= size == 0;
      if (size > 1) box.add(size, 0, destination.strides[d] * item);
    }
    if (empty) continue;
    const uint64_t begin =
        destination.address + static_cast<uint64_t>(source.sizes[edge] * destination.strides[edge]) * item;
    add_bytes(pair, item == 16 ? Operation::Fill16 : Operation::Fill, item, pattern, begin, box.extents());
  }
}

// Inlined: a call with so many arguments would cost a tenth of a pair's planning.
[[gnu::always_inline]] inline void LaunchPlanner::add_task(int64_t pair, Operation operation, int width_log2,
                                                           int unit_log2, uint64_t src, uint64_t dst, uint64_t columns,
                                                           std::span<const Extent> extents, bool dense) {
  PlannedTask& planned = tasks_.emplace_back();
  planned.task = {src, dst, 0, 0, 0, {operation, static_cast<uint8_t>(width_log2), kWarpLanesLog2, 0}};
  planned.pair = pair;
  planned.columns = columns;
  planned.unit_log2 = unit_log2;
  planned.rank = dense ? 0 : static_cast<int>(extents.size());
  planned.record_words = 0;
  planned.from_values = false;
  planned.is_whole_task = false;
  planned.kind = !is_cast(operation)         ? LaunchKind::Plain
                 : is_direct_cast(operation) ? LaunchKind::PlainCasting
                                             : LaunchKind::Casting;
  uint64_t units = columns;
  if (!dense) {
    std::ranges::copy(extents, planned.extents);
    for (const Extent& outer : extents.subspan(1)) units *= outer.size;
    const UnitLog2 unit = fused_copy::unit_log2(planned.task.code);
    const bool side_by_side = operation != Operation::CopyRagged && extents[0].dst_stride == 1 << unit.dst &&
                              (is_fill(operation) || extents[0].src_stride == 1 << unit.src);
    const bool plain = side_by_side && planned.rank == kInnerExtents && columns >= kMinPlainColumns &&
                       is_plain_stride(extents[1].src_stride) && is_plain_stride(extents[1].dst_stride);
    if (!plain) planned.kind = planned.kind | LaunchKind::General;
  }
  bytes_ += units << unit_log2;
}

// Adds a box whose extents count bytes, the first being the bytes of one element.
void LaunchPlanner::add_bytes(int64_t pair, Operation operation, int item_bytes, uint64_t src, uint64_t dst,
                              std::span<Extent> extents) {
  const bool copy = operation == Operation::Copy;
  const size_t rank = extents.size();
  const bool elements_apart = rank > 1 && extents[0].size == item_bytes;
  check_dimensions(pair, rank - elements_apart);

  const int64_t row_bytes = extents[0].size;
  uint64_t addresses = dst | (copy ? src : 0);
  uint64_t phases = copy ? src - dst : 0;
  for (size_t d = 1; d < rank; ++d) {
    addresses |= extents[d].dst_stride | extents[d].src_stride;
    phases |= extents[d].dst_stride - extents[d].src_stride;
  }
  int width_log2 = trailing_zeros(addresses | row_bytes);
  if (copy && row_bytes >= kMinRaggedRowBytes && trailing_zeros(phases) > width_log2) {
    width_log2 = trailing_zeros(phases);
    // A row that begins in the middle of a unit touches one unit more than its bytes fill.
    const uint64_t columns = divide_up_log2(row_bytes - 1, width_log2) + 1;
    extents[0].src_stride = extents[0].dst_stride = int64_t{1} << width_log2;
    add_task(pair, Operation::CopyRagged, width_log2, width_log2, src, dst, columns, extents, /*dense=*/false);
    return;
  }
  if (rank > 1 && row_bytes == int64_t{1} << width_log2) {
    const uint64_t columns = extents[1].size;
    add_task(pair, operation, width_log2, width_log2, src, dst, columns, extents.subspan(1), /*dense=*/false);
    return;
  }
  extents[0].size = row_bytes >> width_log2;
  extents[0].dst_stride = int64_t{1} << width_log2;
  extents[0].src_stride = copy ? extents[0].dst_stride : 0;
  add_task(pair, operation, width_log2, width_log2, src, dst, extents[0].size, extents, /*dense=*/rank == 1);
}

void LaunchPlanner::add_cast(int64_t pair, const TensorView& destination, const TensorView& source,
                             std::span<Extent> extents) {
  const int src_item = info(source.dtype).size;
  const int dst_item = info(destination.dtype).size;
  if (source.address % src_item != 0 || destination.address % dst_item != 0) {
    throw InvalidInput(pair, std::string("a cast from ") + info(source.dtype).name + " to " +
                                 info(destination.dtype).name +
                                 " needs addresses that are multiples of the element size: pass an aligned tensor");
  }
  check_dimensions(pair, extents.size());
  Extent one_element{1, src_item, dst_item};
  if (extents.empty()) extents = {&one_element, 1};
  const bool side_by_side = extents[0].src_stride == src_item && extents[0].dst_stride == dst_item;
  const int larger_log2 = std::max(castable_size_log2(static_cast<int>(source.dtype)),
                                   castable_size_log2(static_cast<int>(destination.dtype)));
  int width_log2 = 0;
  if (side_by_side) {
    // The larger side's unit is one 16-byte access, so that the accesses of a warp leave no gaps.
    const int wide = std::min(kMaxCastWidthLog2, kMaxUnitLog2 - larger_log2);
    const int src_unit = src_item << wide;
    const int dst_unit = dst_item << wide;
    const auto aligned = [](uint64_t bits, int unit) { return bits % std::min(unit, 1 << kMaxUnitLog2) == 0; };
    bool whole_units = extents[0].size % (1 << wide) == 0 && aligned(source.address, src_unit) &&
                       aligned(destination.address, dst_unit);
    for (const Extent& outer : extents.subspan(1)) {
      whole_units &= aligned(outer.src_stride, src_unit) && aligned(outer.dst_stride, dst_unit);
    }
    width_log2 = whole_units ? wide : 0;
    extents[0] = {extents[0].size >> width_log2, int64_t{src_item} << width_log2, int64_t{dst_item} << width_log2};
  }
  add_task(pair, cast_operation(source.dtype, destination.dtype), width_log2, width_log2 + larger_log2, source.address,
           destination.address, extents[0].size, extents, side_by_side && extents.size() == 1);
}

// Decides what one warp does of the task and returns the number of its tiles.
uint64_t LaunchPlanner::shape_tiles(PlannedTask& planned, int tile_bytes_log2, DeviceType device) {
  Task& task = planned.task;
  int full_columns_log2 = tile_bytes_log2 - planned.unit_log2;
  if (device == DeviceType::Cuda) {
    full_columns_log2 = std::clamp(full_columns_log2, kWarpLanesLog2,
                                   std::countr_zero<unsigned>(kWarpLanes * max_lane_units(1 << planned.unit_log2)));
  }
  int columns_log2 = full_columns_log2;
  planned.tile_rows = 1;
  if (planned.rank > 1 && planned.columns < kMinPlainColumns) {
    columns_log2 = std::bit_width(planned.columns - 1);
    task.code.lanes_log2 = static_cast<uint8_t>(columns_log2);
    planned.tile_rows = 1u << (full_columns_log2 - columns_log2);
  }
  const uint64_t column_tiles = divide_up_log2(planned.columns, columns_log2);
  task.tile_columns = 1u << columns_log2;
  task.last_columns = static_cast<uint32_t>(planned.columns - ((column_tiles - 1) << columns_log2));
  task.column_tiles = static_cast<uint32_t>(column_tiles);
  if (planned.rank < kInnerExtents) return column_tiles;
  planned.row_tiles = divide_up_log2(planned.extents[1].size, full_columns_log2 - columns_log2);
  __int128 tiles = static_cast<__int128>(column_tiles) * planned.row_tiles;
  for (int d = kInnerExtents; d < planned.rank; ++d) tiles = std::min(tiles, kTooManyTiles) * planned.extents[d].size;
  return static_cast<uint64_t>(std::min(tiles, kTooManyTiles));
}

std::span<const PlannedLaunch> LaunchPlanner::lay_out(DeviceType device, Staging* staging) {
  const int spread_log2 = std::bit_width(bytes_ / kManyTiles) - 1;
  const int least_log2 = device == DeviceType::Cpu ? kCpuTileBytesLog2 : std::max(spread_log2, kMinTileBytesLog2);
  const int tile_bytes_log2 = device == DeviceType::Cpu ? least_log2 : std::min(least_log2, kMaxTileBytesLog2);
  for (PlannedTask& planned : tasks_) {
    const uint64_t tiles = is_derived(planned.task.code.operation) ? shape_derived(planned, least_log2, device)
                                                                   : shape_tiles(planned, tile_bytes_log2, device);
    if (tiles >= kTooManyTiles) {
      throw InvalidInput(planned.pair, "has more elements than one launch can copy: split it", /*torch_can=*/true);
    }
    planned.tiles = static_cast<uint32_t>(tiles);
  }
  const bool reads_values = !values_.empty() && !tasks_.empty();
  const std::span<const std::byte> carried =
      reads_values ? place_values(device, staging) : std::span<const std::byte>();
  size_t launches = 0;
  for (std::span<const PlannedTask> left = tasks_; !left.empty();) {
    if (launches_.size() == launches) launches_.emplace_back();
    left = write_launch(left, carried, launches_[launches++]);
  }
  return {launches_.data(), launches};
}

// Decides where the host values lie that the tasks read, and returns those that the launch itself carries.
std::span<const std::byte> LaunchPlanner::place_values(DeviceType device, Staging* staging) {
  uint64_t base = reinterpret_cast<uint64_t>(values_.data());
  std::span<const std::byte> carried;
  if (device == DeviceType::Cuda) {
    base = values_place(tasks_, values_.size());
    if (base != 0) {
      carried = values_;
    } else {
      base = staging->stage(values_);
    }
  }
  for (PlannedTask& planned : tasks_) {
    relocate(planned, base);
    if (!carried.empty() && planned.from_values) planned.kind = planned.kind | LaunchKind::Sources;
  }
  values_carried_ = !carried.empty();
  values_staged_ = device == DeviceType::Cuda && carried.empty();
  return carried;
}

std::pair<std::string, uint64_t> LaunchPlanner::path(int64_t pair) const {
  std::string text;
  uint64_t bytes = 0;
  for (const PlannedTask& planned : std::ranges::equal_range(tasks_, pair, {}, &PlannedTask::pair)) {
    const Operation operation = planned.task.code.operation;
    const int width_log2 = planned.task.code.width_log2;
    const std::string unit = std::to_string(1 << width_log2);
    uint64_t rows = 1;
    for (int d = 1; d < planned.rank; ++d) rows *= planned.extents[d].size;
    if (!text.empty()) text += " + ";
    if (is_derived(operation)) {
      const auto [words, written] = derived_path(planned);
      text += words;
      bytes += written;
    } else if (is_cast(operation)) {
      bytes += rows * planned.columns << unit_log2(planned.task.code).dst;
      text += "cast by " + unit;
    } else {
      const bool ragged = operation == Operation::CopyRagged;
      bytes += ragged ? rows * planned.extents[0].size : rows * planned.columns << width_log2;
      text += (is_fill(operation) ? "fill by " : "copy by ") + unit + " B";
      if (ragged) text += ", cut at both ends";
    }
    if (planned.rank > 1) text += ", strided rows";
    if (planned.from_values) text += values_text();
  }
  return {text.empty() ? "nothing to do" : text, bytes};
}

}  // namespace fused_copy
