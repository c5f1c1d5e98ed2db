#include "node/slots.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "node/slices.h"
#include "reduce/identity.h"

namespace collective {

Slots::Slots(const AllreduceSpec& spec, double before, std::vector<Slot> slots)
    : spec_(spec),
      before_(before),
      unchanged_(spec.wire == spec.dtype && before == 1.0 && spec.dtype != DType::kBool),  // a bool becomes 0 or 1
      slots_(std::move(slots)) {
  offsets_.reserve(slots_.size() + 1);
  offsets_.push_back(0);
  for (const Slot& slot : slots_) offsets_.push_back(offsets_.back() + slot.count);
}

size_t Slots::find(size_t element) const {
  return static_cast<size_t>(std::upper_bound(offsets_.begin(), offsets_.end(), element) - offsets_.begin()) - 1;
}

template <typename Visit>
void Slots::for_each(size_t begin, size_t end, const Visit& visit) const {
  if (begin == end) return;
  for (size_t i = find(begin), at = begin; at < end; ++i) {
    const size_t count = std::min(end, offsets_[i + 1]) - at;
    if (count > 0) visit(slots_[i], at - offsets_[i], count, (at - begin) * size_of(spec_.wire));
    at += count;
  }
}

void Slots::pack(std::byte* wire, size_t begin, size_t end) const {
  for_each(begin, end, [&](const Slot& slot, size_t first, size_t count, size_t to) {
    if (slot.in == nullptr)
      fill_identity(spec_.wire, spec_.op, wire + to, count);
    else
      convert(spec_.wire, wire + to, spec_.dtype, static_cast<const std::byte*>(slot.in) + first * size_of(spec_.dtype),
              count, before_);
  });
}

void Slots::pack_shared(std::byte* wire, size_t begin, size_t end) const {
  if (begin == end) return;
  const size_t element_size = size_of(spec_.wire);
  if (const std::byte* in = packed_at(begin, end)) {
    std::memcpy(wire, in, (end - begin) * element_size);
    return;
  }
  alignas(kLineBytes) std::byte block[kBlockBytes];
  const size_t block_count = kBlockBytes / element_size;
  for (size_t at = begin; at < end; at += block_count) {
    const size_t count = std::min(block_count, end - at);
    pack(block, at, at + count);
    std::memcpy(wire + (at - begin) * element_size, block, count * element_size);
  }
}

void Slots::unpack(size_t begin, size_t end, const std::byte* wire) const {
  for_each(begin, end, [&](const Slot& slot, size_t first, size_t count, size_t from) {
    if (slot.out != nullptr)
      convert(spec_.dtype, static_cast<std::byte*>(slot.out) + first * size_of(spec_.dtype), spec_.wire, wire + from,
              count);
  });
}

void Slots::reduce(const Arithmetic& arithmetic, std::vector<const void*>& sources, size_t self, size_t begin,
                   size_t end, std::byte* copy) const {
  const size_t element_size = size_of(spec_.wire), block_count = kBlockBytes / element_size;
  const auto* const staged = static_cast<const std::byte*>(sources[self]);
  alignas(kLineBytes) std::byte block[kBlockBytes];  // for what has no better place
  for (size_t at = begin, done = 0; at < end; at += block_count) {
    const size_t count = std::min(block_count, end - at), nbytes = count * element_size;
    if (const std::byte* in = packed_at(at, at + count)) {
      sources[self] = in;
    } else if (staged != nullptr) {
      sources[self] = staged + done;
    } else {
      pack(block, at, at + count);
      sources[self] = block;
    }
    std::byte* const out = unpacked_at(at, at + count);
    std::byte* const result = out != nullptr ? out : block;
    reduce_ranks(arithmetic, result, sources.data(), static_cast<int>(sources.size()), count);
    // Not stored from registers, as a bucket's are: a peer holds these lines, and memcpy takes them over without
    // reading them. 2 ranks, 256 KiB 18 us this way and 31 with stores, 4 MiB 280 and 460, 64 MiB 6.1 ms and 8.9.
    if (copy != nullptr) std::memcpy(copy + done, result, nbytes);
    if (out == nullptr) unpack(at, at + count, result);
    for (const void*& source : sources) source = static_cast<const std::byte*>(source) + nbytes;
    done += nbytes;
  }
}

const std::byte* Slots::packed_at(size_t begin, size_t end) const {
  if (!unchanged_) return nullptr;
  const size_t i = find(begin);
  if (slots_[i].in == nullptr || end > offsets_[i + 1]) return nullptr;
  return static_cast<const std::byte*>(slots_[i].in) + (begin - offsets_[i]) * size_of(spec_.dtype);
}

std::byte* Slots::unpacked_at(size_t begin, size_t end) const {
  if (spec_.wire != spec_.dtype) return nullptr;
  const size_t i = find(begin);
  if (slots_[i].out == nullptr || end > offsets_[i + 1]) return nullptr;
  return static_cast<std::byte*>(slots_[i].out) + (begin - offsets_[i]) * size_of(spec_.dtype);
}

}  // namespace collective
