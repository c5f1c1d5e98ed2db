#include "reduce/identity.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace collective {
namespace {

template <typename T>
void fill(void* target, size_t count, T value) {
  std::fill_n(static_cast<T*>(target), count, value);
}

template <typename T>
T identity_of(ReduceOp op) {
  using Limits = std::numeric_limits<T>;
  switch (op) {
    case ReduceOp::kMin: return Limits::has_infinity ? Limits::infinity() : Limits::max();
    case ReduceOp::kMax: return Limits::has_infinity ? -Limits::infinity() : Limits::lowest();
    case ReduceOp::kProduct: return T{1};
    case ReduceOp::kBitAnd: return static_cast<T>(-1);  // of integers, all bits
    case ReduceOp::kAverage:
    case ReduceOp::kSum:
    case ReduceOp::kAdasum:
    case ReduceOp::kBitOr:
    case ReduceOp::kBitXor: return T{0};
  }
  return T{0};
}

// Sixteen-bit floats by their bits.
uint16_t half_identity(ReduceOp op, uint16_t one, uint16_t infinity) {
  switch (op) {
    case ReduceOp::kMin: return infinity;
    case ReduceOp::kMax: return infinity | 0x8000;
    case ReduceOp::kProduct: return one;
    case ReduceOp::kAverage:
    case ReduceOp::kSum:
    case ReduceOp::kAdasum:
    case ReduceOp::kBitAnd:
    case ReduceOp::kBitOr:
    case ReduceOp::kBitXor: return 0;
  }
  return 0;
}

template <typename T>
void fill_complex(void* target, size_t count, ReduceOp op) {
  T* parts = static_cast<T*>(target);
  for (size_t i = 0; i < count; ++i) {
    parts[2 * i] = op == ReduceOp::kProduct ? T{1} : T{0};
    parts[2 * i + 1] = T{0};
  }
}

}  // namespace

void fill_identity(DType dtype, ReduceOp op, void* target, size_t count) {
  switch (dtype) {
    case DType::kUInt8: fill(target, count, identity_of<uint8_t>(op)); break;
    case DType::kInt8: fill(target, count, identity_of<int8_t>(op)); break;
    case DType::kUInt16: fill(target, count, identity_of<uint16_t>(op)); break;
    case DType::kInt16: fill(target, count, identity_of<int16_t>(op)); break;
    case DType::kInt32: fill(target, count, identity_of<int32_t>(op)); break;
    case DType::kInt64: fill(target, count, identity_of<int64_t>(op)); break;
    case DType::kFloat16: fill(target, count, half_identity(op, 0x3C00, 0x7C00)); break;
    case DType::kBFloat16: fill(target, count, half_identity(op, 0x3F80, 0x7F80)); break;
    case DType::kFloat32: fill(target, count, identity_of<float>(op)); break;
    case DType::kFloat64: fill(target, count, identity_of<double>(op)); break;
    case DType::kComplex64: fill_complex<float>(target, count, op); break;
    case DType::kComplex128: fill_complex<double>(target, count, op); break;
    case DType::kBool: {
      const bool all = op == ReduceOp::kMin || op == ReduceOp::kProduct || op == ReduceOp::kBitAnd;
      std::memset(target, all ? 1 : 0, count);
      break;
    }
  }
}

}  // namespace collective
