#include "reduce/reduce.h"

#include <atomic>
#include <cstring>

#include "reduce/reduce_sets.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace collective {
namespace {

struct Candidate {
  const KernelSet* set;
  bool (*runs_here)();
};

#ifdef __x86_64__
// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __builtin_cpu_init();  // clang 14's __builtin_cpu_supports does not know "f16c"
  return __builtin_cpu_supports("avx2") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

bool always() { return true; }

// Best first.
constexpr Candidate kCandidates[] = {
#ifdef __x86_64__
    {&kAvx512Set, has_avx512},
    {&kAvx2Set, has_avx2},
#endif
    {&kPortableSet, always},
};

const KernelSet* pick() {
  for (const Candidate& candidate : kCandidates)
    if (candidate.runs_here()) return candidate.set;
  throw Error(ErrorCode::kInternal, "no kernel set runs on this processor");  // unreachable: the last one does
}

std::atomic<const KernelSet*>& current() {
  static std::atomic<const KernelSet*> set{pick()};
  return set;
}

const KernelSet& kernels() { return *current().load(std::memory_order_relaxed); }  // the sets are constants

bool is_complex(DType dtype) { return dtype == DType::kComplex64 || dtype == DType::kComplex128; }

bool is_float(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16 || dtype == DType::kFloat32 || dtype == DType::kFloat64;
}

}  // namespace

void reduce(DType dtype, ReduceOp op, void* dst, const void* const* srcs, int n, size_t count, double scale,
            int64_t divisor) {
  if (op == ReduceOp::kAdasum || n < 1)
    throw Error(ErrorCode::kInternal,
                std::string("reduce: op ") + name_of(op) + " of " + std::to_string(n) + " sources");
  if ((is_complex(dtype) && (op == ReduceOp::kMin || op == ReduceOp::kMax)) ||
      (is_bitwise(op) && (is_float(dtype) || is_complex(dtype))))
    throw Error(ErrorCode::kInvalid, std::string("op ") + name_of(op) + " is not defined for " + name_of(dtype));
  if (dtype == DType::kBool && (scale != 1 || divisor != 1)) throw Error(ErrorCode::kInvalid, "bool cannot be scaled");
  if (divisor < 1) throw Error(ErrorCode::kInvalid, "reduce: divide by " + std::to_string(divisor));
  if (count == 0) return;
  if (divisor != 1 && !is_float(dtype) && !is_complex(dtype)) {
    reduce(dtype, op, dst, srcs, n, count);
    divide(dtype, dst, dst, count, divisor);
    if (scale != 1) convert(dtype, dst, dtype, dst, count, scale);
    return;
  }
  if (n > 1 || scale != 1 || divisor != 1 || dtype == DType::kBool)
    kernels().reduce(dtype, op, dst, srcs, n, count, scale, divisor);
  else if (dst != srcs[0])
    std::memcpy(dst, srcs[0], count * size_of(dtype));
}

void reduce_to_many(DType dtype, ReduceOp op, void* const* dsts, int m, const void* const* srcs, int n, size_t count,
                    double scale, int64_t divisor) {
  const bool sums = op == ReduceOp::kSum || op == ReduceOp::kAverage;
  if (sums && m > 1 && n > 1 && count > 0 && kernels().sum_to_many(dtype, dsts, m, srcs, n, count, scale, divisor))
    return;
  reduce(dtype, op, dsts[0], srcs, n, count, scale, divisor);
  for (int k = 1; k < m; ++k)
    if (count > 0) std::memcpy(dsts[k], dsts[0], count * size_of(dtype));
}

void convert(DType dst_type, void* dst, DType src_type, const void* src, size_t count, double scale) {
  if (dst_type == src_type) return reduce(dst_type, ReduceOp::kSum, dst, &src, 1, count, scale);
  if (!is_float(dst_type) || !is_float(src_type))
    throw Error(ErrorCode::kInternal, std::string("convert: ") + name_of(src_type) + " to " + name_of(dst_type));
  if (count > 0) kernels().convert(dst_type, dst, src_type, src, count, scale);
}

void divide(DType dtype, void* dst, const void* src, size_t count, int64_t divisor) {
  if (is_float(dtype) || is_complex(dtype) || dtype == DType::kBool)
    throw Error(ErrorCode::kInvalid, std::string("divide is for integers, not for ") + name_of(dtype));
  if (divisor < 1) throw Error(ErrorCode::kInvalid, "divide by " + std::to_string(divisor));
  if (count > 0) kernels().divide(dtype, dst, src, count, divisor);
}

const char* simd_name() { return kernels().name; }

void force_simd(const char* name) {
  if (name == nullptr) return current().store(pick(), std::memory_order_relaxed);
  for (const Candidate& candidate : kCandidates) {
    if (std::strcmp(name, candidate.set->name) != 0) continue;
    if (!candidate.runs_here()) throw Error(ErrorCode::kInvalid, std::string("this processor lacks ") + name);
    return current().store(candidate.set, std::memory_order_relaxed);
  }
  throw Error(ErrorCode::kInvalid, std::string("no instruction set is called ") + name);
}

}  // namespace collective
