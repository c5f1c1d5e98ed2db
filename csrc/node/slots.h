// The virtual concatenation of the tensors of one operation, and the way each element takes into the wire's type and
// out of it. Serves the algorithms of a node: any range, in any order, and no copy where there is nothing to convert.
#pragma once

#include <cstddef>
#include <vector>

#include "reduce/spec.h"

namespace collective {

class Slots {
 public:
  // before: the factor by which elements are multiplied on their way in.
  Slots(const AllreduceSpec& spec, double before, std::vector<Slot> slots);

  // Elements in all slots.
  size_t count() const { return offsets_.back(); }
  const std::vector<Slot>& list() const { return slots_; }
  // Where slot i begins, in elements.
  size_t offset(size_t i) const { return offsets_[i]; }
  // The slot that holds this element.
  size_t find(size_t element) const;
  // Whether elements go to the wire unchanged.
  bool unchanged() const { return unchanged_; }

  // Elements [begin, end) in the wire's type, scaled; the identity where a slot has no `in`.
  void pack(std::byte* wire, size_t begin, size_t end) const;
  // The same into memory that peers have last read or written: by memcpy alone, from a block in the L1 cache where
  // there is something to convert or to gather (see kBlockBytes).
  void pack_shared(std::byte* wire, size_t begin, size_t end) const;
  // Elements [begin, end) from the wire's type to where the slots want them.
  void unpack(size_t begin, size_t end, const std::byte* wire) const;
  // Reduces all ranks' elements [begin, end) to where the slots want them, and, unless null, to `copy`. sources[rank]:
  // that rank's elements in the wire's type; the pointers advance to `end`. Those of `self` are read from the slots
  // where they lie there just as they would be packed; if its source is null, always, by way of a block where they do
  // not.
  void reduce(const Arithmetic& arithmetic, std::vector<const void*>& sources, size_t self, size_t begin, size_t end,
              std::byte* copy) const;

  // Where elements [begin, end) lie, in one piece, just as they would be packed; null where they do not.
  const std::byte* packed_at(size_t begin, size_t end) const;
  // Where elements [begin, end) belong, in one piece, in the wire's type; null where they do not.
  std::byte* unpacked_at(size_t begin, size_t end) const;

 private:
  template <typename Visit>
  void for_each(size_t begin, size_t end, const Visit& visit) const;

  AllreduceSpec spec_;
  double before_;
  bool unchanged_;
  std::vector<Slot> slots_;
  std::vector<size_t> offsets_;  // elements; one more than there are slots
};

}  // namespace collective
