// The vocabulary of the engine: element types, reduction operators, errors. No MPI, no Python, no framework.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace collective {

// The values travel between ranks and cross into Python: append only.
enum class DType : uint8_t {
  kUInt8 = 0,
  kInt8 = 1,
  kUInt16 = 2,
  kInt16 = 3,
  kInt32 = 4,
  kInt64 = 5,
  kFloat16 = 6,
  kBFloat16 = 7,
  kFloat32 = 8,
  kFloat64 = 9,
  kComplex64 = 10,
  kComplex128 = 11,
  kBool = 12,
};
inline constexpr int kDTypeCount = 13;

// Horovod's numbers (horovod/common/message.h), so that scripts which pass them as integers keep their meaning, followed
// by what torch.distributed has besides.
enum class ReduceOp : uint8_t {
  kAverage = 0,
  kSum = 1,
  kAdasum = 2,
  kMin = 3,
  kMax = 4,
  kProduct = 5,
  kBitAnd = 6,
  kBitOr = 7,
  kBitXor = 8,
};

constexpr bool is_bitwise(ReduceOp op) { return op >= ReduceOp::kBitAnd; }

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kBool: return 1;
    case DType::kUInt16:
    case DType::kInt16:
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kInt32:
    case DType::kFloat32: return 4;
    case DType::kInt64:
    case DType::kFloat64:
    case DType::kComplex64: return 8;
    case DType::kComplex128: return 16;
  }
  return 0;  // unreachable: the switch is exhaustive
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kUInt8: return "uint8";
    case DType::kInt8: return "int8";
    case DType::kUInt16: return "uint16";
    case DType::kInt16: return "int16";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kComplex64: return "complex64";
    case DType::kComplex128: return "complex128";
    case DType::kBool: return "bool";
  }
  return "?";
}

constexpr const char* name_of(ReduceOp op) {
  switch (op) {
    case ReduceOp::kAverage: return "Average";
    case ReduceOp::kSum: return "Sum";
    case ReduceOp::kAdasum: return "Adasum";
    case ReduceOp::kMin: return "Min";
    case ReduceOp::kMax: return "Max";
    case ReduceOp::kProduct: return "Product";
    case ReduceOp::kBitAnd: return "BitAnd";
    case ReduceOp::kBitOr: return "BitOr";
    case ReduceOp::kBitXor: return "BitXor";
  }
  return "?";
}

// What went wrong, as far as the caller can act on it; collective/errors.py has one class for each.
enum class ErrorCode : uint8_t {
  kNone = 0,
  kInvalid = 1,        // an argument that is wrong on this rank alone
  kMismatch = 2,       // ranks asked for different things under one name
  kDuplicateName = 3,  // the name is already in flight on this rank
  kTimeout = 4,        // a peer did not arrive in time
  kShutdown = 5,       // this rank or a peer has left
  kInternal = 6,       // MPI failed, or an invariant broke: the engine stops
};

struct Error : std::runtime_error {
  Error(ErrorCode code, const std::string& text) : std::runtime_error(text), code(code) {}
  ErrorCode code;
};

// The engine of another rank has stopped, and all have been told why.
struct PeerStopped : Error {
  using Error::Error;
};

}  // namespace collective
