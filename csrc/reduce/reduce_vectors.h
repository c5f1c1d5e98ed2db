// Vectors of one instruction set, and the element types as they look in them. Included by reduce_kernels_<set>.cc
// inside a namespace of its own (hence no include guard and no #include here), after it has defined
//
//   kWidth                               bytes of a vector register
//   Vec<T, kBytes = kWidth>              a vector of T
//   Vec<uint32_t> widen(const char* p)   the kWidth / 4 16-bit words at p, zero-extended
//   void narrow(char* p, Vec<uint32_t>)  the low halves of words whose high halves are zero
//
// The compilers' own vector types, not loops for the vectoriser: every set computes the same expression of the same
// shape, dst may be one of the sources without alias checks, and n sources are folded in registers however many there
// are.

template <class V>
COLLECTIVE_INLINE V load(const char* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
COLLECTIVE_INLINE void store(char* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

using Floats = Vec<float>;
using Words = Vec<uint32_t>;

// Two vectors treated as one; nests.
template <class V>
struct Two {
  V a, b;
};

// ---- element types ----
// V is the vector type of the computation, kCount the number of elements in it, kBytes their size in memory; get()
// loads, put() rounds and stores. The two types of a conversion share one V.

template <class T>
struct Plain {
  using V = Vec<T>;
  static constexpr size_t kCount = kWidth / sizeof(T), kBytes = kWidth;
  COLLECTIVE_INLINE static V get(const char* p) { return load<V>(p); }
  COLLECTIVE_INLINE static void put(char* p, V v) { store(p, v); }
};

struct Bool {
  using V = Vec<uint8_t>;
  static constexpr size_t kCount = kWidth, kBytes = kWidth;
  COLLECTIVE_INLINE static V get(const char* p) { return (V)(load<V>(p) != 0) & 1; }
  COLLECTIVE_INLINE static void put(char* p, V v) { store(p, v); }
};

struct FloatAsDouble {
  using V = Vec<double>;
  using Narrow = Vec<float, kWidth / 2>;
  static constexpr size_t kCount = kWidth / 8, kBytes = kWidth / 2;
  COLLECTIVE_INLINE static V get(const char* p) { return __builtin_convertvector(load<Narrow>(p), V); }
  COLLECTIVE_INLINE static void put(char* p, V v) { store(p, __builtin_convertvector(v, Narrow)); }
};

// float64 to float32 rounded to odd: an inexact result gets a last bit of one, so that a second rounding, to 16 bits,
// sees on which side of a tie it was. Rounding to nearest twice goes wrong, for example for 1 + 2^-11 + 2^-30 to
// float16.
struct DoubleToOddFloat : FloatAsDouble {
  COLLECTIVE_INLINE static void put(char* p, V v) {
    using Bits = Vec<uint32_t, kWidth / 2>;
    using Masks = Vec<uint64_t>;
    Narrow nearest = __builtin_convertvector(v, Narrow);
    V back = __builtin_convertvector(nearest, V);
    Masks away = (Masks)(((back > v) & (v > 0)) | ((back < v) & (v < 0)));  // the magnitude was rounded up
    Masks inexact = (Masks)(back != v);
    store(p, ((Bits)nearest + __builtin_convertvector(away, Bits)) | (__builtin_convertvector(inexact, Bits) & 1));
  }
};

// A 16-bit format is a Codec: decode() reads the low half of every word and ignores the high half; encode() returns the
// low half, with the high half zero.
struct BFloatCodec {
  COLLECTIVE_INLINE static Floats decode(Words low) { return (Floats)(low << 16); }
  // A NaN is truncated, since rounding could carry into the sign bit. It stays a NaN, since one that comes out of a
  // multiplication has its highest mantissa bit set. AVX512_BF16's vcvtne2ps2bf16 flushes denormals to zero, so its
  // bits would differ from those of the other sets.
  COLLECTIVE_INLINE static Words encode(Floats v) {
    Words bits = (Words)v;
    Words half_a_unit = 0x7fff + ((bits >> 16) & 1);
    return (bits + (v == v ? half_a_unit : Words{})) >> 16;
  }
};

// Elements in their order, for conversions.
template <class Codec>
struct InOrder {
  using V = Floats;
  static constexpr size_t kCount = kWidth / 4, kBytes = kWidth / 2;
  COLLECTIVE_INLINE static V get(const char* p) { return Codec::decode(widen(p)); }
  COLLECTIVE_INLINE static void put(char* p, V v) { narrow(p, Codec::encode(v)); }
};

// Even elements in one vector and odd ones in the other, for reductions: they are split and joined without shuffles,
// which is worth a factor of two to three. (Which are called even does not matter, so neither does the byte order.)
template <class Codec>
struct EvenOdd {
  using V = Two<Floats>;
  static constexpr size_t kCount = kWidth / 2, kBytes = kWidth;
  COLLECTIVE_INLINE static V get(const char* p) {
    Words words = load<Words>(p);
    return {Codec::decode(words), Codec::decode(words >> 16)};
  }
  COLLECTIVE_INLINE static void put(char* p, V v) { store(p, Codec::encode(v.a) | (Codec::encode(v.b) << 16)); }
};

template <class E>
struct Doubled {
  using V = Two<typename E::V>;
  static constexpr size_t kCount = 2 * E::kCount, kBytes = 2 * E::kBytes;
  COLLECTIVE_INLINE static V get(const char* p) { return {E::get(p), E::get(p + E::kBytes)}; }
  COLLECTIVE_INLINE static void put(char* p, V v) { E::put(p, v.a), E::put(p + E::kBytes, v.b); }
};

// ---- operators ----

struct Sum {
  template <class V>
  COLLECTIVE_INLINE static V apply(V x, V y) {
    return x + y;
  }
};
struct Product {
  template <class V>
  COLLECTIVE_INLINE static V apply(V x, V y) {
    return x * y;
  }
};
// x < y ? x : y is one instruction, and gives y where either is NaN. So a NaN in y survives; one in x is put back.
COLLECTIVE_INLINE Vec<float> keep_nan(Vec<float> x, Vec<float> result) { return x != x ? x : result; }
COLLECTIVE_INLINE Vec<double> keep_nan(Vec<double> x, Vec<double> result) { return x != x ? x : result; }
template <class V>
COLLECTIVE_INLINE V keep_nan(V, V result) {
  return result;
}
struct Min {
  template <class V>
  COLLECTIVE_INLINE static V apply(V x, V y) {
    return keep_nan(x, x < y ? x : y);
  }
};
struct Max {
  template <class V>
  COLLECTIVE_INLINE static V apply(V x, V y) {
    return keep_nan(x, x > y ? x : y);
  }
};
struct Or {
  template <class V>
  COLLECTIVE_INLINE static V apply(V x, V y) {
    return x | y;
  }
};
struct And {
  template <class V>
  COLLECTIVE_INLINE static V apply(V x, V y) {
    return x & y;
  }
};
struct Xor {
  template <class V>
  COLLECTIVE_INLINE static V apply(V x, V y) {
    return x ^ y;
  }
};

template <class Op, class V>
COLLECTIVE_INLINE V combine(V x, V y) {
  return Op::apply(x, y);
}
template <class Op, class V>
COLLECTIVE_INLINE Two<V> combine(Two<V> x, Two<V> y) {
  return {combine<Op>(x.a, y.a), combine<Op>(x.b, y.b)};
}

// What is applied to an element once it is combined from all sources: x / divisor * scale.
struct Finish {
  double scale, divisor;
};

// Floating-point values are always multiplied, even by one: that costs nothing where memory is the limit, and saves a
// second version of every kernel. They are divided only by a divisor other than one; division is correctly rounded,
// where a product with 1/n is not: 7 threes times 1/7 is 3.0000002. Integers are finished by scale_integers() and
// divide_integers().
COLLECTIVE_INLINE Vec<float> finished(Vec<float> v, Finish how) {
  if (how.divisor != 1) v /= static_cast<float>(how.divisor);
  return v * static_cast<float>(how.scale);
}
COLLECTIVE_INLINE Vec<double> finished(Vec<double> v, Finish how) {
  if (how.divisor != 1) v /= how.divisor;
  return v * how.scale;
}
template <class V>
COLLECTIVE_INLINE V finished(V v, Finish) {
  return v;
}
template <class V>
COLLECTIVE_INLINE Two<V> finished(Two<V> v, Finish how) {
  return {finished(v.a, how), finished(v.b, how)};
}
