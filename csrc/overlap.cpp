#include "overlap.h"

#include <array>
#include <functional>
#include <numeric>
#include <utility>

#include "tensor_view.h"

namespace fused_copy {
namespace {

// A term of a sum: any whole number from 0 to `most`, times `step`.
struct Term {
  int64_t step;
  int64_t most;
};

constexpr int kOverlapBudget = 1 << 16;

// Whether `head` and the rest of the terms can add up to a value within [low, high]. Steps fall, `reach[i]` is the most
// that rest[i] and those after it can add. Strides that nest, as those of real tensors do, leave few choices a term.
Shared can_reach(Term head, std::span<const Term> rest, const __int128* reach, __int128 low, __int128 high,
                 int& budget) {
  if ((budget -= static_cast<int>(rest.size()) + 1) < 0) return Shared::Undecided;
  const __int128 step = head.step;
  if (high < 0 || low > step * head.most + reach[0]) return Shared::No;
  if (low <= 0) return Shared::Yes;
  // Terms add up to a multiple of any number that divides their steps, and those that follow to at most their reach.
  int64_t divisor = head.step;
  for (size_t i = 0;; ++i) {
    if (high - high % divisor < low - reach[i]) return Shared::No;
    if (i == rest.size()) break;
    divisor = std::gcd(divisor, rest[i].step);
  }
  if (rest.empty()) return Shared::Yes;
  // As many steps of the head as make a whole number of the next term's steps lengthen the next term, where that leaves
  // no gaps: two views of one buffer step alike. What is left is less than that many.
  const Term next = rest[0];
  divisor = std::gcd(head.step, next.step);
  const int64_t period = next.step / divisor;
  const bool joins = period <= head.most && head.step / divisor <= next.most + 1;
  const __int128 first = joins || low <= reach[0] ? 0 : (low - reach[0] + step - 1) / step;
  const __int128 last = std::min<__int128>(joins ? period - 1 : head.most, high / step);
  for (__int128 n = first; n <= last; ++n) {
    const auto periods = joins ? (head.most - static_cast<int64_t>(n)) / period : 0;
    const Term joined{next.step, next.most + periods * (head.step / divisor)};
    const Shared shared = can_reach(joined, rest.subspan(1), reach + 1, low - n * step, high - n * step, budget);
    if (shared != Shared::No) return shared;
  }
  return Shared::No;
}

struct TermList {
  std::array<Term, 2 * kMaxRank> terms;
  size_t count = 0;

  void add(int64_t step, int64_t most) {
    if (step > 0 && most > 0) terms[count++] = {step, most};
  }

  Shared can_reach(__int128 low, __int128 high) {
    if (count == 0) terms[count++] = {1, 0};
    std::sort(terms.begin(), terms.begin() + count, [](const Term& a, const Term& b) { return a.step > b.step; });
    std::array<__int128, 2 * kMaxRank> reach;
    reach[count - 1] = 0;
    for (size_t i = count - 1; i > 0; --i)
      reach[i - 1] = reach[i] + static_cast<__int128>(terms[i].step) * terms[i].most;
    int budget = kOverlapBudget;
    return fused_copy::can_reach(terms[0], {terms.data() + 1, count - 1}, reach.data(), low, high, budget);
  }
};

// Whether an element of `a` shares a byte with one of `b`; both are not empty.
Shared share_elements(const TensorView& a, const TensorView& b) {
  const int a_item = info(a.dtype).size;
  const int b_item = info(b.dtype).size;
  TermList list;
  // a + sum(i * s) = b + sum(j * t) with every t * j written as t * most - t * (most - j), so that all terms add.
  __int128 distance = static_cast<__int128>(b.address) - a.address;
  // A dimension of one has any stride, whose product with the element size may not be a number any more.
  for (int64_t d = 0; d < a.rank; ++d) {
    if (a.sizes[d] > 1) list.add(a.strides[d] * a_item, a.sizes[d] - 1);
  }
  for (int64_t d = 0; d < b.rank; ++d) {
    if (b.sizes[d] == 1) continue;
    list.add(b.strides[d] * b_item, b.sizes[d] - 1);
    distance += static_cast<__int128>(b.strides[d]) * b_item * (b.sizes[d] - 1);
  }
  return list.can_reach(distance - (a_item - 1), distance + (b_item - 1));
}

// Whether two elements of one tensor share memory, where its dimensions do not nest in their order.
[[gnu::noinline, gnu::cold]] Shared search_own_elements(const TensorView& view) {
  std::array<Term, kMaxRank> dims;
  size_t count = 0;
  for (int64_t d = 0; d < view.rank; ++d) {
    if (view.sizes[d] == 1) continue;
    if (view.strides[d] == 0) return Shared::Yes;
    dims[count++] = {view.strides[d], view.sizes[d] - 1};
  }
  std::sort(dims.begin(), dims.begin() + count, [](const Term& a, const Term& b) { return a.step < b.step; });
  bool nested = true;
  int64_t extent = 1;
  for (size_t i = 0; i < count; ++i) {
    nested &= dims[i].step >= extent;
    extent += dims[i].step * dims[i].most;
  }
  if (nested) return Shared::No;
  // Two elements meet where their indices differ by some d, not all zero, with sum(d * stride) = 0. Let `leading` be a
  // dimension in which d >= 1, and every other one range over [-most, most].
  for (size_t leading = 0; leading < count; ++leading) {
    TermList list;
    __int128 target = -static_cast<__int128>(dims[leading].step);
    list.add(dims[leading].step, dims[leading].most - 1);
    for (size_t i = leading + 1; i < count; ++i) {
      list.add(dims[i].step, 2 * dims[i].most);
      target += static_cast<__int128>(dims[i].step) * dims[i].most;
    }
    if (const Shared shared = list.can_reach(target, target); shared != Shared::No) return shared;
  }
  return Shared::No;
}

// Where the bytes of a tensor lie, by their addresses modulo a number, or whole for 0. Steps that are a multiple of the
// number lead nowhere else. The second part is where it goes on from 0.
struct Part {
  uint64_t begin = 0;
  uint64_t end = 0;
};
std::array<Part, 2> parts_of(const TensorView& view, uint64_t modulus) {
  const auto item = static_cast<uint64_t>(info(view.dtype).size);
  uint64_t extent = item;
  for (int64_t d = 0; d < view.rank; ++d) {
    const uint64_t step = view.sizes[d] > 1 ? view.strides[d] * item : 0;
    if (modulus == 0 || step % modulus != 0) extent += step * (view.sizes[d] - 1);
  }
  if (modulus == 0) return {{{view.address, view.address + extent}}};
  const uint64_t begin = view.address % modulus;
  const uint64_t end = begin + extent;
  if (end <= modulus) return {{{begin, end}}};
  return {{{begin, modulus}, {0, end - modulus}}};
}

// The greatest divisor of the tensor's `count` largest steps in bytes, or of all that it has.
int64_t divisor_of_largest(const TensorView& view, size_t count) {
  std::array<int64_t, kMaxRank> steps;
  size_t rank = 0;
  for (int64_t d = 0; d < view.rank; ++d) {
    if (view.sizes[d] > 1) steps[rank++] = view.strides[d] * info(view.dtype).size;
  }
  count = std::min(count, rank);
  std::partial_sort(steps.begin(), steps.begin() + count, steps.begin() + rank, std::greater<>());
  return std::accumulate(steps.begin(), steps.begin() + count, int64_t{0}, std::gcd<int64_t, int64_t>);
}

// Up to so many tensors are compared each with each, without an index.
constexpr size_t kFewTensors = 8;

}  // namespace

Shared shares_own_elements(const TensorView& view) {
  // The common case: each stride is at least as large as the extent of the dimensions after it.
  int64_t extent = 1;
  int64_t d = view.rank;
  for (; d > 0 && (view.sizes[d - 1] == 1 || view.strides[d - 1] >= extent); --d) {
    extent += view.sizes[d - 1] == 1 ? 0 : view.strides[d - 1] * (view.sizes[d - 1] - 1);
  }
  return d == 0 ? Shared::No : search_own_elements(view);
}

OverlapIndex::Found OverlapIndex::order(std::span<const TensorView> views) {
  return sort() ? Found{} : check(views, 0);
}

bool OverlapIndex::sort() {
  std::ranges::sort(ranges_, {}, &Range::begin);
  furthest_.resize(ranges_.size());
  finer_.clear();
  uint64_t furthest = 0;
  bool apart = true;
  for (size_t i = 0; i < ranges_.size(); ++i) {
    apart &= furthest <= ranges_[i].begin;
    furthest_[i] = furthest = std::max(furthest, ranges_[i].end);
  }
  return apart;
}

OverlapIndex::Found OverlapIndex::check(std::span<const TensorView> views, size_t level) {
  for (size_t first = 0, last; first < ranges_.size(); first = last) {
    last = run_end(first);
    if (last - first == 1) continue;
    if (const Found found = check_run(first, last, views, level); found.shared != Shared::No) return found;
  }
  return {};
}

OverlapIndex::Found OverlapIndex::check_run(size_t first, size_t last, std::span<const TensorView> views,
                                            size_t level) {
  const auto run = std::span(ranges_).subspan(first, last - first);
  std::vector<int64_t> numbers;
  size_t levels = 0;
  if (run.size() > kFewTensors) {
    for (const Range& range : run) numbers.push_back(range.view);
    std::ranges::sort(numbers);
    // One that goes on from 0 may be there twice.
    numbers.erase(std::ranges::unique(numbers).begin(), numbers.end());
    for (const int64_t number : numbers) levels = std::max<size_t>(levels, 2 * views[number].rank);
  }
  // By turns modulo what divides one more of everyone's largest steps, as rows, then planes, step alike, and by the
  // addresses of those that this leaves together.
  while (level++ < levels) {
    OverlapIndex finer;
    finer.first_ = first;
    finer.last_ = last;
    for (size_t i = 0; level % 2 == 1 && i < numbers.size(); ++i) {
      finer.modulus_ = std::gcd(finer.modulus_, divisor_of_largest(views[numbers[i]], level / 2 + 1));
    }
    for (const int64_t number : numbers) {
      for (const auto [begin, end] : parts_of(views[number], finer.modulus_)) {
        if (begin < end) finer.add(number, begin, end);
      }
    }
    finer.sort();
    if (finer.run_end(0) == finer.ranges_.size()) continue;
    const Found found = finer.check(views, level);
    finer_.push_back(std::move(finer));
    return found;
  }
  for (size_t i = 1; i < run.size(); ++i) {
    for (size_t j = i; j-- > 0 && furthest_[first + j] > run[i].begin;) {
      if (run[j].end <= run[i].begin) continue;
      const Shared shared = share_elements(views[run[j].view], views[run[i].view]);
      if (shared != Shared::No) return {shared, run[j].view, run[i].view};
    }
  }
  return {};
}

OverlapIndex::Found OverlapIndex::find(const TensorView& view, std::span<const TensorView> views) const {
  for (const auto [begin, end] : parts_of(view, modulus_)) {
    for (size_t at = count_before(end); at > 0 && furthest_[at - 1] > begin;) {
      Found found;
      const Range& range = ranges_[--at];
      const auto finer = std::ranges::upper_bound(finer_, at, {}, &OverlapIndex::first_);
      if (finer != finer_.begin() && at < finer[-1].last_) {
        found = finer[-1].find(view, views);
        at = finer[-1].first_;
      } else if (range.end > begin) {
        found = {share_elements(view, views[range.view]), range.view};
      }
      if (found.shared != Shared::No) return found;
    }
  }
  return {};
}

}  // namespace fused_copy
