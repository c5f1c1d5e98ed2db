// The kernels for any processor: vectors of 16 bytes, which the compiler maps to what the build targets (SSE2 on
// x86-64, NEON on aarch64). float16 is converted in integer arithmetic, with the same bits as by the instructions that
// other processors have for it.
#ifdef __aarch64__
#include <arm_neon.h>
#endif

#include "reduce/reduce_sets.h"

COLLECTIVE_NO_CONTRACTION

namespace collective::portable {

inline constexpr int kWidth = 16;
template <class T, int kBytes = kWidth>
using Vec = typename VecOf<T, kBytes>::type;

using Shorts = Vec<uint16_t, kWidth / 2>;

COLLECTIVE_INLINE Vec<uint32_t> widen(const char* p) {
  Shorts shorts;
  __builtin_memcpy(&shorts, p, sizeof shorts);
  return __builtin_convertvector(shorts, Vec<uint32_t>);
}

COLLECTIVE_INLINE void narrow(char* p, Vec<uint32_t> words) {
  Shorts shorts = __builtin_convertvector(words, Shorts);
  __builtin_memcpy(p, &shorts, sizeof shorts);
}

#include "reduce/reduce_vectors.h"

#ifdef __aarch64__
struct Half {
  using V = Floats;
  static constexpr size_t kCount = 4, kBytes = 8;
  COLLECTIVE_INLINE static V get(const char* p) { return (V)vcvt_f32_f16(load<float16x4_t>(p)); }
  COLLECTIVE_INLINE static void put(char* p, V v) { store(p, vcvt_f16_f32((float32x4_t)v)); }
};
using HalfInOrder = Half;
#else
// Both directions treat denormals by adding or subtracting a power of two whose last place is that of the float16,
// which makes the adder shift and round. No float32 denormal occurs, so flush-to-zero mode does not change the result.
struct HalfCodec {
  using Ints = Vec<int32_t>;
  COLLECTIVE_INLINE static Floats decode(Words low) {
    Words sign = (low & 0x8000) << 16, magnitude = (low & 0x7fff) << 13;
    Ints m = (Ints)magnitude;
    Words normal = magnitude + (112 << 23);  // the exponents' biases differ by 127 - 15
    Words tiny = (Words)((Floats)(magnitude + (113 << 23)) - 0x1p-14f);
    Words special = magnitude | 0x7f800000 | ((Words)(m > (31 << 23)) & 0x400000);  // infinity, or NaN made quiet
    return (Floats)((m < (1 << 23) ? tiny : m < (31 << 23) ? normal : special) | sign);
  }
  COLLECTIVE_INLINE static Words encode(Floats v) {
    Words bits = (Words)v, magnitude = bits & 0x7fffffff;
    Ints m = (Ints)magnitude;
    Words normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    Words tiny = (Words)((Floats)magnitude + 0.5f) - 0x3f000000;
    Words special = 0x7c00 | ((Words)(m > 0x7f800000) & (0x200 | ((magnitude >> 13) & 0x3ff)));
    return (m < (113 << 23) ? tiny : m < (143 << 23) ? normal : special) | ((bits >> 16) & 0x8000);
  }
};
using Half = EvenOdd<HalfCodec>;
using HalfInOrder = InOrder<HalfCodec>;
#endif

#include "reduce/reduce_kernels.h"

}  // namespace collective::portable

namespace collective {
const KernelSet kPortableSet = {"portable", portable::reduce, portable::sum_to_many, portable::convert,
                                portable::divide};
}
