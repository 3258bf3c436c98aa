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

// For explain: one warp goes through all of them, by the kernel that can do all of the call's tasks.
std::string time_of(const SumsTask& sums, bool plain) {
  if (sums.count <= kManyLengths) return "";
  const double ns = kLengthNs[!plain ? 2 : sums.to == DType::Int64 ? 1 : 0];
  const auto us = static_cast<int64_t>(static_cast<double>(sums.count) * ns / 1000);
  return ", some " + std::to_string(us) + " us on a GPU";
}

bool is_aligned(const TensorView& view) { return view.address % info(view.dtype).size == 0; }

void check_aligned(int64_t pair, const char* part, const TensorView& view, const TensorView& destination) {
  if (is_aligned(view) && is_aligned(destination)) return;
  refuse(pair, part, "or its destination does not lie at a multiple of the element size: pass an aligned tensor");
}

// Bytes from one element to the next. Strides may be any numbers where there is no next one, in a dimension of one or
// an empty tensor: their products wrap.
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
    refuse(pair, name,
           "has " + std::to_string(row) + " at position " + std::to_string(i) + ": expected less than " +
               std::to_string(table.sizes[0]) + ", the table's rows, or a negative number for no row");
  });
}

bool is_given(const Integers& integers) { return integers.address != 0 || integers.in_values; }

bool is_plain(const Integers& integers) { return integers.stride == info(integers.dtype).size; }

bool fits_32_bits(int64_t number) { return number == static_cast<uint32_t>(number); }

// Units side by side in the destination, and in the source too, or items at a stride there.
bool is_plain_run(const GatherRecord& record, int64_t unit) {
  const Extent& run = record.extents[0];
  return record.extent_count == 1 &&
         (run.size == 1 ||
          (run.dst_stride == unit && (record.converts ? fits_32_bits(run.src_stride) : run.src_stride == unit)));
}

bool has_row(const TensorView& index, const void* values) {
  bool found = false;
  visit_index(index, values, [&](int64_t, int64_t row) { return found = row >= 0; });
  return found;
}

}  // namespace

const void* LaunchPlanner::host_memory(const SourcePart& part) const {
  if (part.by_value) return values_.data() + part.view.address;
  return part.view.device.type == DeviceType::Cpu && !part.view.pinned
             ? reinterpret_cast<const void*>(part.view.address)
             : nullptr;
}

void LaunchPlanner::check_part(int64_t pair, const char* name, const SourcePart& part, const Destinations& destinations,
                               size_t& gap) {
  const int64_t bytes = check_tensor(pair, name, part.view);
  check_or_defer(deferred_, [&] {
    check_lazy(pair, name, part.view);
    check_device(pair, name, destinations.views()[pair], part.view);
    if (bytes > 0) destinations.check_part_overlap(pair, name, part.view, bytes, derived_, gap);
  });
}

void LaunchPlanner::add_derived(const Destinations& destinations, const DerivedSource& derived, size_t& gap) {
  const auto check = [&](const char* name, const SourcePart& part) {
    if (part.given && !part.by_value) check_part(derived.pair, name, part, destinations, gap);
  };
  check(source_name(derived.derivation), derived.source);
  check("index", derived.index);
  check(derived.lengths_index.given ? "table of the lengths" : "lengths", derived.lengths);
  check("index of the lengths", derived.lengths_index);
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
                                       std::span<const std::byte> record) {
  PlannedTask& planned = tasks_.emplace_back();
  planned.task = {src, dst, 0, 0, 0, {operation, 0, kWarpLanesLog2, 0}};
  planned.pair = pair;
  planned.rank = 1;
  planned.kind = LaunchKind::Sources;
  planned.from_values = planned.is_whole_task = false;
  planned.record_words = static_cast<uint16_t>(record.size() / kWordBytes);
  std::memcpy(planned.record, record.data(), record.size());
  return planned;
}

// The same of a task that takes the place of a StridedTask.
template <class WholeTask>
PlannedTask& LaunchPlanner::add_whole_task(int64_t pair, Operation operation, uint64_t src, uint64_t dst,
                                           const WholeTask& task) {
  static_assert(kIsWholeTask<WholeTask>);
  PlannedTask& planned = add_record(pair, operation, src, dst, std::as_bytes(std::span(&task, 1)));
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
  record.table_row_stride = src_row;
  record.dst_row_stride = dst_row;
  bytes_ += static_cast<uint64_t>(elements) * dst_item;
  if (by_row ? add_plain_rows(pair, table.address, destination.address, record, unit_log2)
             : add_plain_plus(pair, table.address, destination.address, record)) {
    return;
  }
  PlannedTask& planned =
      add_record(pair, Operation::Gather, table.address, destination.address, std::as_bytes(std::span(&record, 1)));
  planned.kind = LaunchKind::AllSources;
  planned.task.code.width_log2 = static_cast<uint8_t>(unit_log2);
  planned.unit_log2 = record.converts ? std::countr_zero<unsigned>(dst_item) : unit_log2;
  planned.columns = static_cast<uint64_t>(record.units);
  planned.row_tiles = static_cast<uint64_t>(record.rows);
}

// Adds the rows as a RowsTask, or returns false where they are not plain enough.
bool LaunchPlanner::add_plain_rows(int64_t pair, uint64_t table, uint64_t destination, const GatherRecord& record,
                                   int unit_log2) {
  const bool cut = is_given(record.lengths);
  const bool items = record.converts;
  // A length of each of the table's rows, by the same index.
  const bool of_table = is_given(record.lengths_index);
  const bool same_index = record.lengths_index == record.index && record.lengths_rows == record.table_rows;
  const auto page_size = static_cast<uint64_t>(record.page_size);
  const int64_t unit = items ? info(record.to).size : int64_t{1} << unit_log2;
  const bool small = record.units <= INT32_MAX / unit && record.columns <= INT32_MAX / record.page_size &&
                     record.rows <= INT32_MAX && record.table_rows <= INT32_MAX &&
                     fits_32_bits(record.table_row_stride) && fits_32_bits(record.dst_row_stride) &&
                     fits_32_bits(record.column_size);
  if (!is_plain_run(record, unit) || !is_plain(record.index) || (cut && !is_plain(record.lengths)) ||
      (of_table && !same_index) || (items && !std::has_single_bit(page_size)) ||
      (items && cut && record.column_size > 1) || record.fills_16 || !small) {
    return false;
  }
  const Integers& lengths = cut && !of_table ? record.lengths : record.index;
  const Integers& table_lengths = record.lengths;
  const RowsTask rows{.column_stride = static_cast<uint32_t>(items ? record.extents[0].src_stride
                                                             : cut ? record.column_size
                                                                   : unit),
                      .units = static_cast<uint32_t>(record.units),
                      .rows = static_cast<uint32_t>(record.rows),
                      .table_row_stride = static_cast<uint32_t>(record.table_row_stride),
                      .table_rows = static_cast<uint32_t>(record.table_rows),
                      .dst_row_stride = static_cast<uint32_t>(record.dst_row_stride),
                      .count_shift = static_cast<uint8_t>(items ? std::countr_zero(page_size) : unit_log2),
                      .index_64 = record.index.dtype == DType::Int64,
                      .lengths_64 = lengths.dtype == DType::Int64,
                      .table_lengths_64 = table_lengths.dtype == DType::Int64,
                      .cut = cut,
                      .lengths_of_table = of_table,
                      .fills = record.fills,
                      .from_64 = record.from == DType::Int64,
                      .to_64 = record.to == DType::Int64,
                      .index_in_values = record.index.in_values,
                      .lengths_in_values = lengths.in_values,
                      .table_lengths_in_values = table_lengths.in_values,
                      .simple = (items ? record.from == DType::Int32 && record.to == DType::Int32 : unit == 16) &&
                                lengths.dtype == record.index.dtype && !of_table && !record.fills &&
                                !record.index.in_values && !lengths.in_values,
                      .index = record.index.address,
                      .lengths = lengths.address,
                      .table_lengths = table_lengths.address,
                      .pattern = record.pattern};
  PlannedTask& planned = add_whole_task(pair, items ? Operation::RowItems : Operation::Rows, table, destination, rows);
  planned.task.code.width_log2 = static_cast<uint8_t>(unit_log2);
  planned.unit_log2 = std::countr_zero(static_cast<uint64_t>(unit));
  planned.task.last_columns = static_cast<uint32_t>(cut ? record.columns : record.units);
  planned.columns = static_cast<uint64_t>(record.units);
  planned.row_tiles = static_cast<uint64_t>(record.rows);
  if (items) count_sectors(planned, rows.column_stride);
  return true;
}

// Adds the integers plus a number as a PlusTask, or returns false where they are not plain enough.
bool LaunchPlanner::add_plain_plus(int64_t pair, uint64_t source, uint64_t destination, const GatherRecord& record) {
  const int dst_item = info(record.to).size;
  if (!is_index_dtype(record.from) || !is_index_dtype(record.to) || !is_plain_run(record, dst_item) ||
      record.units > INT32_MAX / dst_item) {
    return false;
  }
  const PlusTask plus{.item_stride = static_cast<uint32_t>(record.extents[0].src_stride),
                      .addend = record.addend,
                      .items = static_cast<uint32_t>(record.units),
                      .from_64 = record.from == DType::Int64,
                      .to_64 = record.to == DType::Int64};
  PlannedTask& planned = add_whole_task(pair, Operation::Plus, source, destination, plus);
  planned.unit_log2 = std::countr_zero<unsigned>(dst_item);
  planned.columns = static_cast<uint64_t>(record.units);
  planned.row_tiles = 1;
  count_sectors(planned, plus.item_stride);
  return true;
}

// Of items that lie apart a warp's loads take a sector each: they count as what they read.
void LaunchPlanner::count_sectors(PlannedTask& planned, uint32_t item_stride) {
  const int sector_log2 = std::min(static_cast<int>(std::bit_width(item_stride)) - 1, kSectorBytesLog2);
  if (sector_log2 <= planned.unit_log2) return;
  planned.unit_log2 = sector_log2;
  bytes_ += planned.columns * planned.row_tiles << sector_log2;
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
      refuse(pair, "lengths",
             "are " + std::to_string(counted.sizes[0]) + " for an index of " + std::to_string(index.sizes[0]) +
                 ": pass one for each row");
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
        add_record(pair, Operation::LastRow, table.address, destination.address, std::as_bytes(std::span(&record, 1)));
    planned.kind = LaunchKind::AllSources;
    bytes_ += static_cast<uint64_t>(record.rest) * info(destination.dtype).size;
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
  const SumsTask sums{.from = lengths.dtype,
                      .to = destination.dtype,
                      .lengths_stride = step_of(lengths, 0),
                      .dst_stride = step_of(destination, 0),
                      .count = lengths.sizes[0],
                      .rest = destinations.rest(pair).kind == Rest::Last ? destination.sizes[0] - count : 0};
  PlannedTask& planned = add_whole_task(pair, Operation::Sums, lengths.address, destination.address, sums);
  if (!is_plain_sum(sums.from, sums.to)) planned.kind = LaunchKind::AllSources;
  planned.from_values = derived.source.by_value;
  planned.row_tiles = 1;
  bytes_ += static_cast<uint64_t>(count + sums.rest) * dst_item;
  add_rest(destinations, pair, corner);
}

// Decides what warps do of a derived source's task, and returns the number of its tiles.
uint64_t LaunchPlanner::shape_derived(PlannedTask& planned, int tile_bytes_log2, DeviceType device) {
  Task& task = planned.task;
  if (task.code.operation == Operation::Sums || task.code.operation == Operation::LastRow) {
    task.tile_columns = task.last_columns = task.column_tiles = planned.tile_rows = 1;
    planned.row_tiles = 1;
    return 1;
  }
  const bool by_units = task.code.operation == Operation::Rows || task.code.operation == Operation::Gather;
  const bool is_rows = task.code.operation == Operation::Rows || task.code.operation == Operation::RowItems;
  if (device == DeviceType::Cuda) {
    tile_bytes_log2 = std::min(tile_bytes_log2, by_units ? kMaxTileBytesLog2 : kMaxItemTileBytesLog2);
  }
  int columns_log2 = std::max(tile_bytes_log2 - planned.unit_log2, kWarpLanesLog2);
  planned.tile_rows = 1;
  if (device == DeviceType::Cuda && planned.is_whole_task) {
    const int most = kWarpLanes * (by_units ? max_lane_units(1 << planned.unit_log2) : kLaneItems);
    columns_log2 = std::min(columns_log2, std::countr_zero<unsigned>(most));
    if (planned.columns < kMinPlainColumns && planned.row_tiles > 1) {
      columns_log2 = std::bit_width(planned.columns - 1);
      task.code.lanes_log2 = static_cast<uint8_t>(columns_log2);
      planned.row_tiles = divide_up_log2(planned.row_tiles, kWarpLanesLog2 - columns_log2);
    }
  }
  uint64_t column_tiles = divide_up_log2(planned.columns, columns_log2);
  if (is_rows && reinterpret_cast<const RowsTask&>(planned.record).cut)
    column_tiles = std::min(column_tiles, std::max<uint64_t>(kCutRowWarps / planned.row_tiles, 1));
  task.tile_columns = 1u << columns_log2;
  task.column_tiles = static_cast<uint32_t>(column_tiles);
  const auto tiles = static_cast<unsigned __int128>(column_tiles) * planned.row_tiles;
  return static_cast<uint64_t>(std::min<unsigned __int128>(tiles, uint64_t{kNoTile} + 1));
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
      if (rows.table_lengths_in_values) rows.table_lengths += base;
      return;
    }
    default: return;
  }
}

std::pair<std::string, uint64_t> LaunchPlanner::derived_path(const PlannedTask& planned) const {
  const auto values_if = [&](bool in_values) { return in_values ? values_text() : ""; };
  const std::string by_unit = std::to_string(1 << planned.task.code.width_log2) + " B";
  switch (planned.task.code.operation) {
    case Operation::Sums: {
      const auto& sums = reinterpret_cast<const SumsTask&>(planned.record);
      const bool plain = std::ranges::all_of(tasks_, [](const PlannedTask& task) { return is_plain(task.kind); });
      return {"sums of " + std::to_string(sums.count) + " by one warp" + time_of(sums, plain),
              static_cast<uint64_t>(sums.count + 1 + sums.rest) * info(sums.to).size};
    }
    case Operation::Plus: {
      const auto& plus = reinterpret_cast<const PlusTask&>(planned.record);
      return {"integers plus " + std::to_string(plus.addend), uint64_t{plus.items} * (plus.to_64 ? 8 : 4)};
    }
    case Operation::Rows:
    case Operation::RowItems: {
      const auto& rows = reinterpret_cast<const RowsTask&>(planned.record);
      const bool items = planned.task.code.operation == Operation::RowItems;
      const uint64_t unit = !items ? 1u << planned.task.code.width_log2 : rows.to_64 ? 8 : 4;
      return {std::string("rows by ") + (items ? "item" : by_unit) +
                  (items && rows.count_shift > 0 ? ", pages of " + std::to_string(1 << rows.count_shift) : "") +
                  (rows.cut ? ", cut at lengths" : "") +
                  values_if(rows.index_in_values || rows.lengths_in_values || rows.table_lengths_in_values),
              uint64_t{rows.rows} * rows.units * unit};
    }
    case Operation::LastRow: {
      const auto& last = reinterpret_cast<const GatherRecord&>(planned.record);
      return {"fill with the last row", static_cast<uint64_t>(last.rest) * info(last.to).size};
    }
    default: break;
  }
  const auto& gather = reinterpret_cast<const GatherRecord&>(planned.record);
  std::string text = gather.addend != 0 ? "integers plus " + std::to_string(gather.addend)
                                        : "rows by " + (gather.converts ? std::string("item") : by_unit);
  if (gather.page_size != 1) text += ", pages of " + std::to_string(gather.page_size);
  if (is_given(gather.lengths)) text += ", cut at lengths";
  text += ", one after the other";
  text += values_if(gather.index.in_values || gather.lengths.in_values || gather.lengths_index.in_values);
  const uint64_t unit = gather.converts ? info(gather.to).size : 1u << planned.task.code.width_log2;
  return {text, static_cast<uint64_t>(gather.rows * gather.units) * unit};
}

}  // namespace fused_copy
