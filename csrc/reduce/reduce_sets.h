// What reduce.cc knows of an instruction set: a few functions. Each set is one file, reduce_kernels_<set>.cc, which
// includes reduce_kernels.h into a namespace of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "base/types.h"

namespace collective {

// Arguments have been checked by reduce.cc; the contracts are those of reduce.h.
struct KernelSet {
  const char* name;
  // divisor: 1 for integers.
  void (*reduce)(DType dtype, ReduceOp op, void* dst, const void* const* srcs, int n, size_t count, double scale,
                 int64_t divisor);
  // False for types that it does not handle.
  bool (*sum_to_many)(DType dtype, void* const* dsts, int m, const void* const* srcs, int n, size_t count, double scale,
                      int64_t divisor);
  void (*convert)(DType dst_type, void* dst, DType src_type, const void* src, size_t count, double scale);
  void (*divide)(DType dtype, void* dst, const void* src, size_t count, int64_t divisor);
};

// The compilers' vector type of kBytes bytes.
template <class T, int kBytes>
struct VecOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

extern const KernelSet kPortableSet;
extern const KernelSet kAvx2Set;    // x86-64 only
extern const KernelSet kAvx512Set;  // x86-64 only

}  // namespace collective

// Everything between COLLECTIVE_TARGET_BEGIN(isa) and COLLECTIVE_TARGET_END is compiled for `isa`, whatever flags the
// build has. Headers come before: code of the standard library must never be emitted for a set, because the linker
// keeps one copy of an inline function and might pick that one for every processor.
//
// COLLECTIVE_NO_CONTRACTION: a*b+c rounds twice, as without FMA. Otherwise the sets would differ in the last bit.
#define COLLECTIVE_INLINE [[gnu::always_inline]] inline
#define COLLECTIVE_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define COLLECTIVE_TARGET_BEGIN(isa) \
  COLLECTIVE_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define COLLECTIVE_TARGET_END COLLECTIVE_PRAGMA(clang attribute pop)
#define COLLECTIVE_NO_CONTRACTION COLLECTIVE_PRAGMA(STDC FP_CONTRACT OFF)
#else
#define COLLECTIVE_TARGET_BEGIN(isa) COLLECTIVE_PRAGMA(GCC push_options) COLLECTIVE_PRAGMA(GCC target(isa))
#define COLLECTIVE_TARGET_END COLLECTIVE_PRAGMA(GCC pop_options)
#define COLLECTIVE_NO_CONTRACTION COLLECTIVE_PRAGMA(GCC optimize("fp-contract=off"))
#endif
