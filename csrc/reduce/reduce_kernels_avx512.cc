// The kernels for AVX-512 (F, BW, DQ, VL: every processor that has it since Skylake-SP and Zen 4).
#ifdef __x86_64__
#include <immintrin.h>

#include "reduce/reduce_sets.h"

COLLECTIVE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")
COLLECTIVE_NO_CONTRACTION

namespace collective::avx512 {

inline constexpr int kWidth = 64;
template <class T, int kBytes = kWidth>
using Vec = typename VecOf<T, kBytes>::type;

// The maskz intrinsics with all mask bits set: for the plain ones g++ 12 warns about an uninitialised variable in its
// own header.
COLLECTIVE_INLINE Vec<uint32_t> widen(const char* p) {
  return (Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

COLLECTIVE_INLINE void narrow(char* p, Vec<uint32_t> words) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)words));
}

#include "reduce/reduce_vectors.h"

struct Half {
  using V = Floats;
  static constexpr size_t kCount = 16, kBytes = 32;
  COLLECTIVE_INLINE static V get(const char* p) {
    V v = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    __asm__("" : "+v"(v));  // or clang compares and multiplies float16 instead, element by element in software
    return v;
  }
  COLLECTIVE_INLINE static void put(char* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
  }
};
using HalfInOrder = Half;

#include "reduce/reduce_kernels.h"

}  // namespace collective::avx512

COLLECTIVE_TARGET_END

namespace collective {
const KernelSet kAvx512Set = {"avx512", avx512::reduce, avx512::sum_to_many, avx512::convert, avx512::divide};
}
#endif
