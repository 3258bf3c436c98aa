#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "back_end.h"
#include "derived_tasks.h"
#include "lane_walk.h"
#include "sources.h"

namespace fused_copy {
namespace {

float to_float(c10::Half value) { return static_cast<float>(value); }
float to_float(c10::BFloat16 value) { return static_cast<float>(value); }

template <class To>
To from_float(float value) {
  return To(value);
}

}  // namespace
}  // namespace fused_copy

#include "convert.h"

namespace fused_copy {
namespace {

using Types = CastTypes<c10::Half, c10::BFloat16>;

template <class Visit>
void for_each_row(const Tile& tile, Visit visit) {
  for (uint32_t row = 0; row < tile.rows; ++row) {
    visit(tile.src + tile.first_column * tile.src_column_stride + row * tile.src_row_stride,
          tile.dst + tile.first_column * tile.dst_column_stride + row * tile.dst_row_stride);
  }
}

void* at(uint64_t address) { return reinterpret_cast<void*>(address); }

void copy_tile(const Tile& tile, int unit_bytes) {
  const bool side_by_side = tile.src_column_stride == unit_bytes && tile.dst_column_stride == unit_bytes;
  for_each_row(tile, [&](uint64_t src, uint64_t dst) {
    if (side_by_side) {
      std::memcpy(at(dst), at(src), static_cast<size_t>(tile.columns) * unit_bytes);
      return;
    }
    for (uint32_t column = 0; column < tile.columns; ++column) {
      std::memcpy(at(dst + column * tile.dst_column_stride), at(src + column * tile.src_column_stride), unit_bytes);
    }
  });
}

void copy_ragged_tile(const Tile& tile, int unit_bytes) {
  const int64_t phase = static_cast<int64_t>(tile.dst % unit_bytes);
  const int64_t offset = static_cast<int64_t>(tile.first_column) * unit_bytes - phase;
  const int64_t begin = std::max<int64_t>(offset, 0);
  const int64_t end = std::min<int64_t>(offset + static_cast<int64_t>(tile.columns) * unit_bytes, tile.row_bytes);
  if (begin < end) std::memcpy(at(tile.dst + begin), at(tile.src + begin), static_cast<size_t>(end - begin));
}

void fill_tile(const Tile& tile, int unit_bytes, uint64_t pattern, bool upper_half_zero) {
  const uint64_t bits[2] = {pattern, upper_half_zero ? 0 : pattern};
  const auto* bytes = reinterpret_cast<const char*>(bits);
  for_each_row(tile, [&](uint64_t, uint64_t dst) {
    for (uint32_t column = 0; column < tile.columns; ++column) {
      const uint64_t place = (tile.first_column + column) * unit_bytes % sizeof bits;
      std::memcpy(at(dst + column * tile.dst_column_stride), bytes + place, unit_bytes);
    }
  });
}

template <class From, class To>
void cast_tile(const Tile& tile, int unit_elements) {
  const bool side_by_side =
      unit_elements == 1 && tile.src_column_stride == sizeof(From) && tile.dst_column_stride == sizeof(To);
  for_each_row(tile, [&](uint64_t src, uint64_t dst) {
    if (side_by_side) {  // a loop that the compiler makes vectors of
      const auto* from = static_cast<const From*>(at(src));
      auto* to = static_cast<To*>(at(dst));
      const uint32_t columns = tile.columns;  // which `to` may overlap, for all that the compiler knows
      for (uint32_t i = 0; i < columns; ++i) to[i] = convert<To, From, c10::Half, c10::BFloat16>(from[i]);
      return;
    }
    for (uint32_t column = 0; column < tile.columns; ++column) {
      const auto* from = static_cast<const From*>(at(src + column * tile.src_column_stride));
      auto* to = static_cast<To*>(at(dst + column * tile.dst_column_stride));
      for (int i = 0; i < unit_elements; ++i) to[i] = convert<To, From, c10::Half, c10::BFloat16>(from[i]);
    }
  });
}

using CastTile = void (*)(const Tile&, int);

template <int... kCodes>
constexpr std::array<CastTile, sizeof...(kCodes)> cast_table(std::integer_sequence<int, kCodes...>) {
  return {&cast_tile<Types::at<kCodes / kCastableDTypes>, Types::at<kCodes % kCastableDTypes>>...};
}
constexpr auto kCastTiles = cast_table(std::make_integer_sequence<int, kCasts>());

// The bytes [begin, end) of a row become the pattern, which begins with the row.
void fill_bytes(uint64_t dst, int64_t begin, int64_t end, const GatherRecord& gather) {
  const uint64_t bits[2] = {gather.pattern, gather.fills_16 ? 0 : gather.pattern};
  const auto* bytes = reinterpret_cast<const char*>(bits);
  for (int64_t i = begin; i < end; ++i) *static_cast<char*>(at(dst + (i - begin))) = bytes[i % sizeof bits];
}

void gather_tile(const std::byte* launch, const StridedTask& task, uint32_t tile) {
  const auto& gather = reinterpret_cast<const GatherRecord&>(*record_of(launch, task));
  const uint32_t row = divide(tile, {task.task.code.column_tiles_shift, task.column_tiles_multiplier});
  const int64_t first = static_cast<int64_t>(tile - row * task.task.column_tiles) * task.task.tile_columns;
  const GatheredRow found = find_row(launch, gather, row);
  const uint64_t src = task.task.src + found.table_row * gather.table_row_stride;
  const uint64_t dst = task.task.dst + row * gather.dst_row_stride;
  const int64_t unit = gather.converts ? 1 : int64_t{1} << task.task.code.width_log2;
  const int64_t last = gather.fills ? gather.units : (found.copied + unit - 1) / unit;
  for (int64_t i = first; i < std::min(last, first + task.task.tile_columns); ++i) {
    const auto [from, to] = locate_unit(gather, src, dst, i);
    const int64_t copied = std::clamp<int64_t>(found.copied - i * unit, 0, unit);
    if (!gather.converts) {
      std::memcpy(at(to), at(from), static_cast<size_t>(copied));
      if (gather.fills) fill_bytes(to + copied, i * unit + copied, (i + 1) * unit, gather);
    } else if (copied > 0) {
      const int64_t item = derive_item(gather, load_integer(from, gather.from));
      store_integer<c10::Half, c10::BFloat16>(to, gather.to, wrap(item, gather.from));
    } else {
      std::memcpy(at(to), &gather.pattern, info(gather.to).size);
    }
  }
}

void copy_items(const RowShare& share, uint32_t begin, uint32_t end, uint32_t item_stride, DType from, int page_shift,
                int64_t addend, DType to) {
  for (uint32_t i = begin; i < end; ++i) {
    const int64_t item = load_integer(share.src + uint64_t{i} * item_stride, from) >> page_shift;
    const auto sum = static_cast<int64_t>(static_cast<uint64_t>(item) + static_cast<uint64_t>(addend));
    store_integer<c10::Half, c10::BFloat16>(share.dst + uint64_t{i} * info(to).size, to, wrap(sum, from));
  }
}

constexpr DType index_dtype(bool is_64) { return is_64 ? DType::Int64 : DType::Int32; }

void copy_rows(const std::byte* launch, const RowsTask& rows, uint32_t tile) {
  const RowShare share = locate_row(launch, rows, tile, 0);
  const bool items = rows.task.code.operation == Operation::RowItems;
  const uint64_t unit = items ? info(index_dtype(rows.to_64)).size : uint64_t{1} << rows.task.code.width_log2;
  for (uint64_t first = share.first; first < share.end; first += share.step) {
    const auto end = static_cast<uint32_t>(std::min<uint64_t>(first + rows.task.tile_columns, share.end));
    const uint32_t whole = std::clamp(share.whole, static_cast<uint32_t>(first), end);
    uint64_t written = whole * unit;
    if (items) {
      copy_items(share, static_cast<uint32_t>(first), whole, rows.column_stride, index_dtype(rows.from_64),
                 rows.count_shift, 0, index_dtype(rows.to_64));
    } else {
      if (whole == share.whole && whole < end) written += share.cut_bytes;
      std::memcpy(at(share.dst + first * unit), at(share.src + first * unit), written - first * unit);
    }
    if (!rows.fills) continue;
    for (; written < end * unit; ++written) {
      *static_cast<char*>(at(share.dst + written)) = static_cast<char>(pattern_at(rows.pattern, written));
    }
  }
}

void add_number(const PlusTask& plus, uint32_t tile) {
  const RowShare share{.src = plus.task.src, .dst = plus.task.dst};
  const uint32_t first = tile * plus.task.tile_columns;
  copy_items(share, first, std::min(first + plus.task.tile_columns, plus.items), plus.item_stride,
             index_dtype(plus.from_64), 0, plus.addend, index_dtype(plus.to_64));
}

void fill_with_last_row(const std::byte* launch, const StridedTask& task) {
  const auto& gather = reinterpret_cast<const GatherRecord&>(*record_of(launch, task));
  int64_t last = gather.rows;
  GatheredRow found{};
  while (last-- > 0 && found.copied == 0) found = find_row(launch, gather, last);
  if (found.copied == 0) return;
  const uint64_t src = task.task.src + found.table_row * gather.table_row_stride;
  for (int64_t row = 0; row < gather.rows + gather.rest; ++row) {
    if (row < gather.rows && find_row(launch, gather, row).copied > 0) continue;
    const uint64_t dst = task.task.dst + row * gather.dst_row_stride;
    if (gather.from == gather.to) {
      std::memcpy(at(dst), at(src), info(gather.to).size);
    } else {
      store_integer<c10::Half, c10::BFloat16>(dst, gather.to, load_integer(src, gather.from));
    }
  }
}

void sum_up(const SumsTask& sums) {
  uint64_t sum = 0;
  for (int64_t i = 0; i <= sums.count + sums.rest; ++i) {
    store_integer<c10::Half, c10::BFloat16>(sums.task.dst + i * sums.dst_stride, sums.to, static_cast<int64_t>(sum));
    if (i < sums.count) sum += static_cast<uint64_t>(load_integer(sums.task.src + i * sums.lengths_stride, sums.from));
  }
}

void run_derived(const std::byte* launch, const StridedTask& task, uint32_t tile) {
  switch (task.task.code.operation) {
    case Operation::Gather: return gather_tile(launch, task, tile);
    case Operation::LastRow: return fill_with_last_row(launch, task);
    case Operation::Rows:
    case Operation::RowItems: return copy_rows(launch, reinterpret_cast<const RowsTask&>(task), tile);
    case Operation::Plus: return add_number(reinterpret_cast<const PlusTask&>(task), tile);
    case Operation::Sums: return sum_up(reinterpret_cast<const SumsTask&>(task));
    default: break;
  }
  __builtin_unreachable();
}

void run_tile(const Task& task, const Tile& tile) {
  const Operation operation = task.code.operation;
  const int unit = 1 << task.code.width_log2;
  if (is_cast(operation)) {
    return kCastTiles[static_cast<int>(operation) - static_cast<int>(Operation::Cast)](tile, unit);
  }
  switch (operation) {
    case Operation::Copy: return copy_tile(tile, unit);
    case Operation::CopyRagged: return copy_ragged_tile(tile, unit);
    case Operation::Fill: return fill_tile(tile, unit, task.src, false);
    case Operation::Fill16: return fill_tile(tile, unit, task.src, true);
    case Operation::Cast:
    case Operation::Gather:
    case Operation::LastRow:
    case Operation::Rows:
    case Operation::RowItems:
    case Operation::Plus:
    case Operation::Sums: break;
  }
  __builtin_unreachable();
}

void run_launch(const std::byte* launch) {
  const LaunchHeader& header = launch_header(launch);
  const uint32_t* first_tiles = launch_first_tiles(launch);
  for (uint32_t i = 0; i < header.tasks; ++i) {
    const Task& task = launch_task(launch, i);
    const UnitLog2 unit = unit_log2(task.code);
    const uint32_t tiles = (i + 1u < header.tasks ? first_tiles[i + 1] : header.tiles) - first_tiles[i];
    for (uint32_t t = 0; t < tiles; ++t) {
      if (is_derived(task.code.operation)) {
        run_derived(launch, reinterpret_cast<const StridedTask&>(task), t);
        continue;
      }
      run_tile(task, locate_tile(launch, task, i < header.strided, t, 1 << unit.src, 1 << unit.dst));
    }
  }
}

}  // namespace

void convert_array(const HostArray& array, DType to, std::byte* values) {
  const auto rank = array.sizes.size();
  const int from_item = info(array.dtype).size;
  const int to_item = info(to).size;
  Tile tile{.src = reinterpret_cast<uint64_t>(array.data),
            .dst = reinterpret_cast<uint64_t>(values),
            .columns = 1,
            .rows = 1,
            .src_column_stride = from_item,
            .dst_column_stride = to_item};
  uint64_t bits = tile.src;
  for (const int64_t stride : array.strides) bits |= static_cast<uint64_t>(stride);
  const bool aligned = bits % static_cast<uint64_t>(from_item) == 0;
  const auto run = [&](Tile row) {
    if (array.dtype == to) return copy_tile(row, to_item);
    const CastTile cast = kCastTiles[static_cast<int>(array.dtype) * kCastableDTypes + static_cast<int>(to)];
    if (aligned) return cast(row, 1);
    // NumPy's arrays may lie anywhere.
    alignas(8) std::byte item[8];
    Tile one = row;
    one.src = reinterpret_cast<uint64_t>(item);
    one.columns = 1;
    for (uint32_t i = 0; i < row.columns; ++i, row.src += row.src_column_stride, one.dst += to_item) {
      std::memcpy(item, at(row.src), static_cast<size_t>(from_item));
      cast(one, 1);
    }
  };
  if (rank == 0) return run(tile);
  constexpr int64_t kMostColumns = 1 << 30;
  const int64_t columns = array.sizes[rank - 1];
  tile.src_column_stride = array.strides[rank - 1];
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < rank; ++d) rows *= array.sizes[d];
  for (int64_t row = 0; row < rows; ++row) {
    Tile of_row = tile;
    int64_t left = row;
    for (size_t d = rank - 1; d-- > 0;) {
      of_row.src += static_cast<uint64_t>(left % array.sizes[d] * array.strides[d]);
      left /= array.sizes[d];
    }
    of_row.dst += static_cast<uint64_t>(row * columns * to_item);
    for (int64_t first = 0; first < columns; first += kMostColumns) {
      of_row.columns = static_cast<uint32_t>(std::min(columns - first, kMostColumns));
      run(of_row);
      of_row.src += static_cast<uint64_t>(kMostColumns * tile.src_column_stride);
      of_row.dst += static_cast<uint64_t>(kMostColumns * to_item);
    }
  }
}

void run_on_cpu(std::span<const PlannedLaunch> launches) {
  for (const PlannedLaunch& launch : launches) run_launch(launch.params.bytes);
}

}  // namespace fused_copy
