// The kernels for AVX2 and F16C (Haswell, Zen and later). Without FMA: no kernel would gain from it, and none may
// contract.
#ifdef __x86_64__
#include <immintrin.h>

#include "reduce/reduce_sets.h"

COLLECTIVE_TARGET_BEGIN("avx2,f16c")
COLLECTIVE_NO_CONTRACTION

namespace collective::avx2 {

inline constexpr int kWidth = 32;
template <class T, int kBytes = kWidth>
using Vec = typename VecOf<T, kBytes>::type;

COLLECTIVE_INLINE Vec<uint32_t> widen(const char* p) {
  return (Vec<uint32_t>)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

COLLECTIVE_INLINE void narrow(char* p, Vec<uint32_t> words) {
  __m256i packed = _mm256_packus_epi32((__m256i)words, (__m256i)words);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

#include "reduce/reduce_vectors.h"

struct Half {
  using V = Floats;
  static constexpr size_t kCount = 8, kBytes = 16;
  COLLECTIVE_INLINE static V get(const char* p) {
    V v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    __asm__("" : "+v"(v));  // or clang compares and multiplies float16 instead, element by element in software
    return v;
  }
  COLLECTIVE_INLINE static void put(char* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};
using HalfInOrder = Half;

#include "reduce/reduce_kernels.h"

}  // namespace collective::avx2

COLLECTIVE_TARGET_END

namespace collective {
const KernelSet kAvx2Set = {"avx2", avx2::reduce, avx2::sum_to_many, avx2::convert, avx2::divide};
}
#endif
