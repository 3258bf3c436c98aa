// The planner's part that knows what derived sources are made of.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "box.h"
#include "derived_tasks.h"
#include "planner.h"
#include "tuning.h"

namespace fused_copy {
namespace {

constexpr bool is_index_dtype(DType dtype) { return dtype == DType::Int32 || dtype == DType::Int64; }

constexpr bool is_number_dtype(DType dtype) {
  return is_castable(dtype) && is_integer(info(dtype).format) && dtype != DType::Bool;
}

[[noreturn, gnu::cold]] void refuse(int64_t pair, const char* part, const std::string& text) {
  throw InvalidInput(pair, text, false, part);
}

bool is_aligned(const TensorView& view) { return view.address % info(view.dtype).size == 0; }

void check_aligned(int64_t pair, const char* part, const TensorView& view, const TensorView& destination) {
  if (is_aligned(view) && is_aligned(destination)) return;
  refuse(pair, part, "or its destination does not lie at a multiple of the element size: pass an aligned tensor");
}

// Bytes from one element to the next. Strides may be any numbers where there is no next one, in a dimension of one or an
// empty tensor: their products wrap.
int64_t step_of(const TensorView& view, int64_t d, int64_t elements = 1) {
  if (view.sizes[d] <= 1) return 0;
  return static_cast<int64_t>(static_cast<uint64_t>(view.strides[d]) * elements * info(view.dtype).size);
}

Integers integers_of(const SourcePart& part) {
  const TensorView& view = part.view;
  // Never read, and yet there: an empty tensor's address may be 0.
  if (is_empty(view)) return {1, 0, view.dtype, false};
  // One alone has any stride: that of plain integers.
  const int64_t stride = view.sizes[0] > 1 ? step_of(view, 0) : info(view.dtype).size;
  return {view.address, stride, view.dtype, part.by_value};
}

void check_integers(int64_t pair, const char* name, const TensorView& view, bool index) {
  if (view.rank != 1) {
    refuse(pair, name, "has shape " + shape_of(view) + ": expected one dimension, got " + std::to_string(view.rank));
  }
  if (!(index ? is_index_dtype(view.dtype) : is_number_dtype(view.dtype))) {
    refuse(pair, name,
           std::string("is ") + info(view.dtype).name + ": expected " + (index ? "int32 or int64" : "integers"));
  }
  if (!is_empty(view) && !is_aligned(view)) {
    refuse(pair, name, "does not lie at a multiple of the element size: pass an aligned tensor");
  }
}

// Calls `visit(position, row)` until it returns true, for an index that the host can read.
template <class Visit>
void visit_index(const TensorView& index, const void* values, Visit visit) {
  const auto begin = reinterpret_cast<uint64_t>(values);
  const int64_t stride = step_of(index, 0);
  for (int64_t i = 0; i < index.sizes[0]; ++i) {
    if (visit(i, load_integer(begin + i * stride, index.dtype))) return;
  }
}

void check_index(int64_t pair, const char* name, const TensorView& index, const void* values, const TensorView& table) {
  visit_index(index, values, [&](int64_t i, int64_t row) -> bool {
    if (row < table.sizes[0]) return false;
    refuse(pair, name, "has " + std::to_string(row) + " at position " + std::to_string(i) + ": expected less than " +
                           std::to_string(table.sizes[0]) + ", the table's rows, or a negative number for no row");
  });
}

bool has_row(const TensorView& index, const void* values) {
  bool found = false;
  visit_index(index, values, [&](int64_t, int64_t row) { return found = row >= 0; });
  return found;
}

}  // namespace

const void* LaunchPlanner::host_memory(const SourcePart& part) const {
  if (part.by_value) return values_.data() + part.view.address;
  return part.view.device.type == DeviceType::Cpu && !part.view.pinned ? reinterpret_cast<const void*>(part.view.address)
                                                                       : nullptr;
}

void LaunchPlanner::check_part(int64_t pair, const char* name, const SourcePart& part, const Destinations& destinations,
                               size_t& gap) {
  if (!part.given || part.by_value) return;
  const int64_t bytes = check_tensor(pair, name, part.view);
  check_or_defer(deferred_, [&] {
    check_lazy(pair, name, part.view);
    check_device(pair, name, destinations.views()[pair], part.view);
    if (bytes > 0) destinations.check_part_overlap(pair, name, part.view, bytes, gap);
  });
}

void LaunchPlanner::add_derived(const Destinations& destinations, const DerivedSource& derived, size_t& gap) {
  const int64_t pair = derived.pair;
  check_part(pair, source_name(derived.derivation), derived.source, destinations, gap);
  check_part(pair, "index", derived.index, destinations, gap);
  check_part(pair, derived.lengths_index.given ? "table of the lengths" : "lengths", derived.lengths, destinations, gap);
  check_part(pair, "index of the lengths", derived.lengths_index, destinations, gap);
  switch (derived.derivation) {
    case Derivation::Nothing: return;
    case Derivation::Values: return add_values(destinations, derived);
    case Derivation::Rows: return add_rows(destinations, derived);
    case Derivation::Sums: return add_sums(destinations, derived);
    case Derivation::Plus: return add_plus(destinations, derived);
  }
  __builtin_unreachable();
}

void LaunchPlanner::add_values(const Destinations& destinations, const DerivedSource& derived) {
  const TensorView& destination = destinations.views()[derived.pair];
  check_shapes(derived.pair, destination, derived.source.view);
  const size_t before = tasks_.size();
  if (!is_empty(derived.source.view)) add_copy(derived.pair, destination, derived.source.view);
  if (destinations.rest(derived.pair).kind == Rest::Last) add_last(derived.pair, destination, derived.source.view);
  mark_values(derived.source, before);
  add_rest(destinations, derived.pair, derived.source.view);
}

// Of tasks from number `first` on, which copy from this part.
void LaunchPlanner::mark_values(const SourcePart& part, size_t first) {
  if (!part.by_value) return;
  for (PlannedTask& planned : std::span(tasks_).subspan(first)) planned.from_values = true;
}

PlannedTask& LaunchPlanner::add_record(int64_t pair, Operation operation, uint64_t src, uint64_t dst,
                                       std::span<const std::byte> record, uint64_t bytes) {
  PlannedTask& planned = tasks_.emplace_back();
  planned.task = {src, dst, 0, 0, 0, {operation, 0, kWarpLanesLog2, 0}};
  planned.pair = pair;
  planned.rank = 1;
  planned.kind = LaunchKind::Sources;
  planned.from_values = planned.is_whole_task = false;
  planned.record_words = static_cast<uint16_t>(record.size() / kWordBytes);
  std::memcpy(planned.record, record.data(), record.size());
  bytes_ += bytes;
  return planned;
}

// The same of a record that takes the place of a StridedTask.
PlannedTask& LaunchPlanner::add_whole_task(int64_t pair, Operation operation, uint64_t src, uint64_t dst,
                                           std::span<const std::byte> record) {
  PlannedTask& planned = add_record(pair, operation, src, dst, record, 0);
  planned.record_words = 0;
  planned.is_whole_task = true;
  return planned;
}

// The rows of `table` as `record` says, whose index and lengths are set, into a destination's corner of these sizes.
void LaunchPlanner::add_gather(int64_t pair, const TensorView& destination, const TensorView& table,
                               std::span<const int64_t> sizes, bool by_row, GatherRecord record) {
  if (std::ranges::find(sizes, 0) != sizes.end()) return;
  const int src_item = info(table.dtype).size;
  const int dst_item = info(destination.dtype).size;
  const auto rank = static_cast<int64_t>(sizes.size());
  const int64_t first = by_row ? 1 : 0;
  record.from = table.dtype;
  record.to = destination.dtype;
  record.converts = record.from != record.to || record.page_size != 1 || record.addend != 0;
  record.rows = by_row ? sizes[0] : 1;
  record.columns = rank > 1 ? sizes[1] : 1;
  record.column_size = record.converts ? 1 : src_item;
  for (int64_t d = 2; d < rank; ++d) record.column_size *= sizes[d];
  record.page_shift = std::has_single_bit(static_cast<uint64_t>(record.page_size))
                          ? static_cast<uint8_t>(std::countr_zero(static_cast<uint64_t>(record.page_size)))
                          : kNoShift;
  int64_t elements = record.rows;
  for (int64_t d = first; d < rank; ++d) elements *= sizes[d];
  if (!by_row) {
    record.table_rows = record.columns = 1;
    record.column_size = elements;
  }

  Box box;
  if (!record.converts) box.add(src_item, 1, 1);
  for (int64_t d = rank; d-- > first;) {
    if (sizes[d] > 1) box.add(sizes[d], step_of(table, d, d == 1 ? record.page_size : 1), step_of(destination, d));
  }
  const std::span<Extent> extents = box.in_order();
  check_dimensions(pair, extents.size() - (!record.converts && extents[0].size == src_item) + by_row);
  const int64_t src_row = by_row ? step_of(table, 0) : 0;
  const int64_t dst_row = by_row ? step_of(destination, 0) : 0;
  int unit_log2 = 0;
  size_t count = 0;
  if (record.converts) {
    check_aligned(pair, source_name(by_row ? Derivation::Rows : Derivation::Plus), table, destination);
    std::ranges::copy(extents, record.extents);
    count = extents.size();
    if (count == 0) record.extents[count++] = {1, src_item, dst_item};
  } else {
    uint64_t bits = table.address | destination.address | extents[0].size;
    bits |= src_row;
    if (record.rows > 1) bits |= dst_row;
    for (const Extent& extent : extents.subspan(1)) bits |= extent.src_stride | extent.dst_stride;
    unit_log2 = std::min(std::countr_zero(bits), kMaxUnitLog2);
    const int64_t unit = int64_t{1} << unit_log2;
    const bool one_unit = extents[0].size == unit && extents.size() > 1;
    if (!one_unit) record.extents[count++] = {extents[0].size >> unit_log2, unit, unit};
    for (const Extent& extent : extents.subspan(1)) record.extents[count++] = extent;
  }
  record.extent_count = static_cast<uint8_t>(count);
  record.units = 1;
  for (size_t d = 0; d < count; ++d) record.units *= record.extents[d].size;
  const int src_unit = record.converts ? src_item : 1 << unit_log2;
  const int dst_unit = record.converts ? dst_item : 1 << unit_log2;
  record.side_by_side = count == 1 && (record.extents[0].size == 1 || (record.extents[0].src_stride == src_unit &&
                                                                       record.extents[0].dst_stride == dst_unit));
  record.table_row_stride = src_row;
  record.dst_row_stride = dst_row;
  if (by_row && add_plain_rows(pair, table.address, destination.address, record, unit_log2)) {
    bytes_ += static_cast<uint64_t>(elements) * dst_item;
    return;
  }
  PlannedTask& planned = add_record(pair, Operation::Gather, table.address, destination.address,
                                    std::as_bytes(std::span(&record, 1)), static_cast<uint64_t>(elements) * dst_item);
  planned.task.code.width_log2 = static_cast<uint8_t>(unit_log2);
  planned.unit_log2 = std::countr_zero(static_cast<unsigned>(dst_unit));
  planned.columns = static_cast<uint64_t>(record.units);
}

// Adds the rows as a RowsTask, or returns false where they are not plain enough.
bool LaunchPlanner::add_plain_rows(int64_t pair, uint64_t table, uint64_t destination, const GatherRecord& record,
                                   int unit_log2) {
  const auto is_plain = [](const Integers& integers) { return integers.stride == info(integers.dtype).size; };
  const bool cut = record.lengths.address != 0 || record.lengths.in_values;
  const bool by_index_twice = record.lengths_index.address != 0 || record.lengths_index.in_values;
  const auto fits = [](int64_t number) { return number == static_cast<uint32_t>(number); };
  const Extent& run = record.extents[0];
  const bool run_is_plain = record.converts
                                ? record.extent_count == 1 && run.dst_stride == info(record.to).size &&
                                      fits(run.src_stride) && record.page_shift != kNoShift
                                : record.side_by_side;
  const auto warps = static_cast<uint64_t>(record.units) / kWarpLanes * static_cast<uint64_t>(record.rows);
  // Of items a tile takes each for a column.
  const bool cuts_items = cut && record.converts && record.column_size > 1;
  if (!run_is_plain || cuts_items || record.fills || by_index_twice || !is_plain(record.index) || (cut && !is_plain(record.lengths)) ||
      record.units < static_cast<int64_t>(kMinPlainColumns) || (cut && warps > kMaxCutRowWarps) ||
      record.columns > int64_t{1} << 30 || !fits(record.table_row_stride) || !fits(record.dst_row_stride) ||
      !fits(record.column_size)) {
    return false;
  }
  const RowsTask rows{.item_stride = static_cast<uint32_t>(run.src_stride),
                      .column_bytes = static_cast<uint32_t>(record.column_size),
                      .page_shift = record.page_shift,
                      .index_64 = record.index.dtype == DType::Int64,
                      .lengths_64 = record.lengths.dtype == DType::Int64,
                      .index_in_values = record.index.in_values,
                      .table_row_stride = record.table_row_stride,
                      .dst_row_stride = record.dst_row_stride,
                      .index = record.index.address,
                      .lengths = record.lengths.address,
                      .table_rows = record.table_rows,
                      .from_64 = record.from == DType::Int64,
                      .to_64 = record.to == DType::Int64,
                      .lengths_in_values = record.lengths.in_values};
  PlannedTask& planned = add_whole_task(pair, record.converts ? Operation::RowItems : Operation::Rows, table,
                                        destination, std::as_bytes(std::span(&rows, 1)));
  planned.task.code.width_log2 = static_cast<uint8_t>(unit_log2);
  planned.unit_log2 = record.converts ? std::countr_zero<unsigned>(info(record.to).size) : unit_log2;
  planned.columns = static_cast<uint64_t>(record.units);
  planned.row_tiles = static_cast<uint64_t>(record.rows);
  return true;
}

void LaunchPlanner::add_rows(const Destinations& destinations, const DerivedSource& derived) {
  const int64_t pair = derived.pair;
  const TensorView& destination = destinations.views()[pair];
  const TensorView& table = derived.source.view;
  const TensorView& index = derived.index.view;
  if (table.rank < 1) refuse(pair, "table", "has no dimensions: expected one at least, that of its rows");
  check_integers(pair, "index", index, true);
  if (destination.rank != table.rank) refuse_ranks(pair, destination, table);
  const bool integers = is_index_dtype(table.dtype) && is_index_dtype(destination.dtype);
  if (derived.number < 1) {
    refuse(pair, "page_size", "is " + std::to_string(derived.number) + ": expected 1 or more");
  }
  if (derived.number > 1 && (!integers || table.rank != 2)) {
    refuse(pair, "table",
           std::string("is ") + info(table.dtype).name + " of shape " + shape_of(table) +
               ": expected int32 or int64 and two dimensions, where there is a page_size");
  }
  std::array<int64_t, kMaxRank> sizes;
  std::copy(table.sizes, table.sizes + table.rank, sizes.begin());
  sizes[0] = index.sizes[0];
  if (table.rank > 1 && derived.number > 1) sizes[1] = sizes[1] / derived.number + (sizes[1] % derived.number != 0);
  TensorView corner = table;
  corner.sizes = sizes.data();
  check_shapes(pair, destination, corner);
  if (const void* const there = host_memory(derived.index)) check_index(pair, "index", index, there, table);
  GatherRecord record{};
  record.index = integers_of(derived.index);
  record.table_rows = table.sizes[0];
  record.page_size = derived.number;
  if (derived.lengths.given) {
    const TensorView& lengths = derived.lengths.view;
    if (table.rank < 2) refuse(pair, "lengths", "need a table of two dimensions or more, whose columns they count");
    check_integers(pair, derived.lengths_index.given ? "table of the lengths" : "lengths", lengths, true);
    record.lengths = integers_of(derived.lengths);
    record.lengths_rows = lengths.sizes[0];
    const TensorView& counted = derived.lengths_index.given ? derived.lengths_index.view : lengths;
    if (derived.lengths_index.given) {
      check_integers(pair, "index of the lengths", counted, true);
      if (const void* const there = host_memory(derived.lengths_index)) {
        check_index(pair, "index of the lengths", counted, there, lengths);
      }
      record.lengths_index = integers_of(derived.lengths_index);
    }
    if (counted.sizes[0] != index.sizes[0]) {
      refuse(pair, "lengths", "are " + std::to_string(counted.sizes[0]) + " for an index of " +
                                  std::to_string(index.sizes[0]) + ": pass one for each row");
    }
  }
  const RestFill& rest = destinations.rest(pair);
  if (rest.kind == Rest::Last) {
    const void* const there = host_memory(derived.index);
    if (sizes[0] == 0 || (there != nullptr && !has_row(index, there))) refuse_last(pair);
  }
  // After what torch cannot do either, which must not be found by its operators, pair by pair.
  if (table.dtype != destination.dtype && !integers) {
    throw InvalidInput(pair,
                       std::string("is ") + info(table.dtype).name + " but the destination is " +
                           info(destination.dtype).name + ": pass the same dtype, or int32 and int64",
                       /*torch_can=*/is_castable(table.dtype) && is_castable(destination.dtype), "table");
  }
  record.fills = rest.kind == Rest::Pattern;
  record.fills_16 = record.fills && info(destination.dtype).size == 16;
  record.pattern = rest.pattern;
  add_gather(pair, destination, table, {sizes.data(), static_cast<size_t>(table.rank)}, true, record);
  if (rest.kind == Rest::Last) {
    // Which of the rows is the last one is known where the index is: its warp also fills what lies behind them.
    check_aligned(pair, "table", table, destination);
    record.from = table.dtype;
    record.to = destination.dtype;
    record.rows = sizes[0];
    record.columns = record.column_size = 1;
    record.table_row_stride = step_of(table, 0);
    record.dst_row_stride = step_of(destination, 0);
    record.rest = destination.sizes[0] - sizes[0];
    PlannedTask& planned =
        add_record(pair, Operation::LastRow, table.address, destination.address, std::as_bytes(std::span(&record, 1)),
                   static_cast<uint64_t>(record.rest) * info(destination.dtype).size);
    planned.task.code.width_log2 = static_cast<uint8_t>(std::countr_zero<unsigned>(info(table.dtype).size));
  }
  add_rest(destinations, pair, corner);
}

void LaunchPlanner::add_plus(const Destinations& destinations, const DerivedSource& derived) {
  const int64_t pair = derived.pair;
  const TensorView& destination = destinations.views()[pair];
  const TensorView& source = derived.source.view;
  if (!is_number_dtype(source.dtype)) {
    refuse(pair, "source", std::string("is ") + info(source.dtype).name + ": expected integers to add a number to");
  }
  check_shapes(pair, destination, source);
  if (!is_castable(destination.dtype)) refuse_dtypes(pair, destination, source);
  GatherRecord record{};
  record.page_size = 1;
  record.addend = derived.number;
  const bool copies = derived.number == 0;
  const size_t before = tasks_.size();
  if (copies) {
    if (!is_empty(source)) add_copy(pair, destination, source);
  } else {
    add_gather(pair, destination, source, {source.sizes, static_cast<size_t>(source.rank)}, false, record);
  }
  if (destinations.rest(pair).kind == Rest::Last) {
    if (copies) {
      add_last(pair, destination, source);
    } else {
      const LastOf last(pair, destination, source);
      if (last.rest > 0) add_gather(pair, last.destination, last.source, {&last.rest, 1}, false, record);
    }
  }
  mark_values(derived.source, before);
  add_rest(destinations, pair, source);
}

void LaunchPlanner::add_sums(const Destinations& destinations, const DerivedSource& derived) {
  const int64_t pair = derived.pair;
  const TensorView& destination = destinations.views()[pair];
  const TensorView& lengths = derived.source.view;
  check_integers(pair, "lengths", lengths, false);
  if (!is_number_dtype(destination.dtype)) {
    throw InvalidInput(pair, std::string("destination is ") + info(destination.dtype).name +
                                 ": expected an integer dtype for sums of lengths");
  }
  const int64_t count = std::min(lengths.sizes[0], INT64_MAX - 1) + 1;
  const TensorView corner{.address = 1, .sizes = &count, .strides = lengths.strides, .rank = 1, .dtype = lengths.dtype};
  check_shapes(pair, destination, corner);
  const int dst_item = info(destination.dtype).size;
  check_aligned(pair, "lengths", lengths, destination);
  const SumsTask sums{.lengths_stride = step_of(lengths, 0),
                      .dst_stride = step_of(destination, 0),
                      .count = lengths.sizes[0],
                      .rest = destinations.rest(pair).kind == Rest::Last ? destination.sizes[0] - count : 0,
                      .from = lengths.dtype,
                      .to = destination.dtype};
  PlannedTask& planned = add_whole_task(pair, Operation::Sums, lengths.address, destination.address,
                                        std::as_bytes(std::span(&sums, 1)));
  planned.from_values = derived.source.by_value;
  planned.row_tiles = 1;
  bytes_ += static_cast<uint64_t>(count + sums.rest) * dst_item;
  add_rest(destinations, pair, corner);
}

// Decides what warps do of a task that has a record, and returns the number of its tiles.
uint64_t LaunchPlanner::shape_record(PlannedTask& planned, int tile_bytes_log2, DeviceType device) {
  Task& task = planned.task;
  if (planned.is_whole_task && task.code.operation != Operation::Sums) {
    int columns_log2 = tile_bytes_log2 - planned.unit_log2;
    if (device == DeviceType::Cuda) {
      columns_log2 = std::clamp(columns_log2, kWarpLanesLog2,
                                std::countr_zero<unsigned>(kWarpLanes * max_lane_units(1 << planned.unit_log2)));
    }
    const uint64_t column_tiles = divide_up_log2(planned.columns, columns_log2);
    task.tile_columns = 1u << columns_log2;
    task.last_columns = static_cast<uint32_t>(planned.columns - ((column_tiles - 1) << columns_log2));
    task.column_tiles = static_cast<uint32_t>(column_tiles);
    return std::min(column_tiles * planned.row_tiles, uint64_t{kNoTile} + 1);
  }
  task.tile_columns = task.last_columns = task.column_tiles = planned.tile_rows = 1;
  planned.row_tiles = 1;
  if (task.code.operation != Operation::Gather) return 1;
  GatherRecord record;
  std::memcpy(&record, planned.record, sizeof record);
  const auto rows = static_cast<uint64_t>(record.rows);
  if (device != DeviceType::Cuda) return std::min(rows, uint64_t{kNoTile} + 1);
  int columns_log2 = std::clamp(tile_bytes_log2 - planned.unit_log2, kWarpLanesLog2,
                                std::countr_zero<unsigned>(kWarpLanes * kGatherUnits));
  if (planned.columns <= kWarpLanes / 2 && rows > 1) {
    columns_log2 = std::bit_width(planned.columns - 1);
    task.code.lanes_log2 = static_cast<uint8_t>(columns_log2);
    planned.tile_rows = kWarpLanes >> columns_log2;
  }
  task.tile_columns = 1u << columns_log2;
  planned.row_tiles = (rows - 1) / planned.tile_rows + 1;
  const uint64_t column_tiles = divide_up_log2(planned.columns, columns_log2);
  const bool cut = record.lengths.address != 0 || record.lengths.in_values;
  const uint64_t shared = cut ? std::max<uint64_t>(kGatherWarps / planned.row_tiles, 1) : column_tiles;
  task.column_tiles = static_cast<uint32_t>(std::min({column_tiles, shared, uint64_t{kNoTile}}));
  return std::min(planned.row_tiles * task.column_tiles, uint64_t{kNoTile} + 1);
}

// Host values lie `base` bytes on from where the task's addresses count.
void LaunchPlanner::relocate(PlannedTask& planned, uint64_t base) {
  if (planned.from_values) planned.task.src += base;
  const auto move = [&](Integers& integers) {
    if (integers.in_values) integers.address += base;
  };
  switch (planned.task.code.operation) {
    case Operation::Gather:
    case Operation::LastRow: {
      auto& record = reinterpret_cast<GatherRecord&>(planned.record);
      for (Integers* integers : {&record.index, &record.lengths, &record.lengths_index}) move(*integers);
      return;
    }
    case Operation::Rows:
    case Operation::RowItems: {
      auto& rows = reinterpret_cast<RowsTask&>(planned.record);
      if (rows.index_in_values) rows.index += base;
      if (rows.lengths_in_values) rows.lengths += base;
      return;
    }
    default: return;
  }
}

std::pair<std::string, uint64_t> LaunchPlanner::record_path(const PlannedTask& planned) const {
  std::string text;
  if (planned.task.code.operation == Operation::Sums) {
    const auto& sums = reinterpret_cast<const SumsTask&>(planned.record);
    text = "sums of " + std::to_string(sums.count) + " by one warp";
    return {text + (planned.from_values ? values_text() : ""),
            static_cast<uint64_t>(sums.count + 1 + sums.rest) * info(sums.to).size};
  }
  if (planned.is_whole_task) {
    const auto& rows = reinterpret_cast<const RowsTask&>(planned.record);
    const bool items = planned.task.code.operation == Operation::RowItems;
    text = "rows by " + (items ? std::string("item") : std::to_string(1 << planned.task.code.width_log2) + " B");
    if (rows.page_shift > 0) text += ", pages of " + std::to_string(1 << rows.page_shift);
    if (rows.lengths != 0) text += ", cut at lengths";
    if (rows.index_in_values || rows.lengths_in_values) text += values_text();
    return {text, planned.row_tiles * planned.columns << planned.unit_log2};
  }
  const auto& record = reinterpret_cast<const GatherRecord&>(planned.record);
  if (planned.task.code.operation == Operation::LastRow) {
    return {"fill with the last row", static_cast<uint64_t>(record.rest) * info(record.to).size};
  }
  const bool plus = record.addend != 0;
  text = plus ? "integers plus " + std::to_string(record.addend)
              : "rows by " + (record.converts ? std::string("item") : std::to_string(1 << planned.task.code.width_log2) + " B");
  if (record.page_size != 1) text += ", pages of " + std::to_string(record.page_size);
  if (record.lengths.address != 0) text += ", cut at lengths";
  if (!record.side_by_side) text += ", strided";
  if (record.index.in_values || record.lengths.in_values || record.lengths_index.in_values) text += values_text();
  const uint64_t unit = record.converts ? info(record.to).size : 1u << planned.task.code.width_log2;
  return {text, static_cast<uint64_t>(record.rows * record.units) * unit};
}

}  // namespace fused_copy
