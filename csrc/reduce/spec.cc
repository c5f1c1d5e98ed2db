#include "reduce/spec.h"

#include <bit>

namespace collective {
namespace {

bool is_integer(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kUInt16:
    case DType::kInt16:
    case DType::kInt32:
    case DType::kInt64: return true;
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kFloat32:
    case DType::kFloat64:
    case DType::kComplex64:
    case DType::kComplex128:
    case DType::kBool: return false;
  }
  return false;
}

}  // namespace

Scaling scaling_of(const AllreduceSpec& spec, int size, Passes passes) {
  Scaling s{spec.prescale, {spec.wire, spec.op, spec.postscale, 1}};
  if (spec.op != ReduceOp::kAverage) return s;
  s.arithmetic.divisor = size;
  if (is_integer(spec.dtype)) return s;
  const auto power = static_cast<int>(std::bit_ceil(static_cast<unsigned>(size)));
  // A sum of float16 may exceed 65504 where the average does not, and so may a float32 when it is packed. Dividing by a
  // power of two first costs bits only in the smallest values (below 2^-14 times that power); dividing by p would cost
  // bits in all.
  if (spec.wire == DType::kFloat16 && !(passes == Passes::kOnePass && spec.dtype == DType::kFloat16)) {
    s.before /= power;
    s.arithmetic.scale *= power;
  }
  if (power == size) {  // the same bits as dividing, and cheaper
    s.arithmetic.divisor = 1;
    s.arithmetic.scale /= size;
  }
  return s;
}

}  // namespace collective
