#include "sources.h"

namespace fused_copy {

void HostValues::describe(SourcePart& part, std::span<const int64_t> sizes, DType dtype) {
  const auto rank = static_cast<int64_t>(sizes.size());
  if (chunk_ == chunks_.size()) chunks_.push_back(std::make_unique<Chunk>());
  if (used_ + 2 * rank > std::size(chunks_[chunk_]->numbers)) {
    ++chunk_, used_ = 0;
    if (chunk_ == chunks_.size()) chunks_.push_back(std::make_unique<Chunk>());
  }
  int64_t* const numbers = chunks_[chunk_]->numbers + used_;
  used_ += 2 * rank;
  int64_t elements = 1;
  for (int64_t d = rank; d-- > 0;) {
    numbers[d] = sizes[d];
    numbers[rank + d] = elements;
    elements *= sizes[d];
  }
  part.given = part.by_value = true;
  part.view = {.address = used_blocks_ * kAlignment,
               .sizes = numbers,
               .strides = numbers + rank,
               .rank = rank,
               .storage_bytes = elements * info(dtype).size,
               .dtype = dtype};
}

std::byte* HostValues::add(SourcePart& part, std::span<const int64_t> sizes, DType dtype) {
  describe(part, sizes, dtype);
  used_blocks_ += (static_cast<size_t>(part.view.storage_bytes) + kAlignment - 1) / kAlignment;
  if (used_blocks_ > blocks_.size()) blocks_.resize(used_blocks_);
  return at(part.view.address);
}

}  // namespace fused_copy
