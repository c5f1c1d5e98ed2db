// Element-wise reduction and conversion of host memory. No MPI, no allocation, no threads: a call uses the calling core
// only. All pointers may be unaligned. All counts are in elements.
//
// Same bits: the result depends on the arguments alone, never on the instruction set, alignment or position in the
// buffer. The one exception is *which* NaN comes out where two different NaNs meet (the processor picks); that it is a
// NaN is certain.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/types.h"

namespace collective {

// dst[i] = (srcs[0][i] op srcs[1][i] op ... op srcs[n-1][i]) / divisor * scale, folded left to right. One pass over
// memory: n loads and one store per element. dst may equal any of the srcs; any other overlap of dst with a source is
// not allowed.
//
//   float16, bfloat16   computed in float32, rounded once at the end: to nearest even, NaN stays NaN, overflow gives
//                       infinity
//   floats, complex     divisor and scale are applied in the compute type: float32 for float16, bfloat16, float32;
//                       float64 for float64. Each rounds once, so n * x / n is x wherever the sum is exact
//   Min, Max            a NaN in any source gives NaN (as numpy.minimum, torch.minimum); of +0 and -0 the last source's
//   integers            Sum and Product wrap modulo 2^bits; scale != 1 multiplies the wrapped result in float64,
//                       truncates toward zero and saturates (NaN gives 0); the divisor, which comes before, is as in
//                       divide()
//   bool                any non-zero byte is true, results are 0 or 1; Sum, Max and BitOr are "or", Product, Min and
//                       BitAnd are "and", BitXor is "differs"
//   BitAnd and so on    of integers and bool; of nothing else
//
// Average is Sum here; the caller passes a divisor, or for a power of two the scale that gives the same bits.
// count == 0 is legal. Throws Error(kInvalid) for Min or Max of complex, for bits of floats and complex, for a
// divisor < 1, and for either factor with bool; Error(kInternal) for Adasum and for n < 1.
//
// Dividing costs nothing where memory is the limit: 3 sources of 64 MB, GB/s with a divisor of three and without,
// AVX-512: float32 11.5 and 10.5, bfloat16 10.0 and 9.9. In the L2 cache, with sources of 256 KiB, it shows: 58 and 98,
// 25 and 52.
void reduce(DType dtype, ReduceOp op, void* dst, const void* const* srcs, int n, size_t count, double scale = 1.0,
            int64_t divisor = 1);

// The same to m destinations. Each may equal any of the srcs, but no two may be equal. Sums of floats are stored to all
// from registers.
void reduce_to_many(DType dtype, ReduceOp op, void* const* dsts, int m, const void* const* srcs, int n, size_t count,
                    double scale = 1.0, int64_t divisor = 1);

// dst[i] = dst_type(src[i] * scale) in one pass, rounded once (nearest even). The product is taken in float64 where
// either type is float64, else in float32. Pairs: the same type twice (any dtype; as reduce() of one source), and any
// two of float16, bfloat16, float32, float64. dst may equal src where both types have one size; any other overlap is
// not allowed. Throws Error(kInternal) for any other pair.
void convert(DType dst_type, void* dst, DType src_type, const void* src, size_t count, double scale = 1.0);

// dst[i] = src[i] / divisor, truncated toward zero: the exact average of integers. dst may equal src, no other overlap.
// Throws Error(kInvalid) for a dtype that is not an integer (bool is not one) and for divisor < 1.
void divide(DType dtype, void* dst, const void* src, size_t count, int64_t divisor);

// The instruction set in use: "avx512", "avx2" or "portable" (which is NEON on aarch64, through the compiler).
// Picked from the processor at the first call.
const char* simd_name();

// For tests and benchmarks: use this set from now on, in all threads. nullptr: pick from the processor again.
// Throws Error(kInvalid) where the processor lacks it or no set has that name.
void force_simd(const char* name);

}  // namespace collective
