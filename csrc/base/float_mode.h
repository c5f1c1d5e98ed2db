// The floating-point mode in which the engine computes, whichever thread drives it.
//
// Rounding, flush-to-zero and denormals-are-zero are settings of a thread. Whether the engine's thread or a waiting
// caller's drives an operation depends on timing, so in the caller's mode the bits would differ between ranks wherever
// a script has called torch.set_flush_denormal(True). In here the mode is IEEE 754's default: round to nearest even,
// denormals kept, no traps.
#pragma once

#include <cfenv>
#include <cstdint>

#ifdef __x86_64__
#include <xmmintrin.h>
#endif

namespace collective {

// Sets the default mode for its lifetime, then restores the thread's own. Where the thread is in that mode already, as
// it usually is, this is one read: 4 ns on x86-64, against 50 where the mode must be set, and 600 with fesetenv(),
// which also handles the old x87 register stack.
class FloatMode {
 public:
#ifdef __x86_64__
  FloatMode() : callers_(_mm_getcsr()) {
    if (differs()) _mm_setcsr(kDefault);
  }
  ~FloatMode() {
    if (differs()) _mm_setcsr(callers_);
  }
#elif defined(__aarch64__)
  FloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(callers_));
    if (differs()) asm volatile("msr fpcr, %0" : : "r"(kDefault) : "memory");
  }
  ~FloatMode() {
    if (differs()) asm volatile("msr fpcr, %0" : : "r"(callers_) : "memory");
  }
#else
  FloatMode() {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FloatMode() { std::fesetenv(&callers_); }
#endif
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
#ifdef __x86_64__
  static constexpr unsigned kDefault = 0x1F80, kFlags = 0x3F;  // all exceptions masked; those raised so far
  bool differs() const { return (callers_ & ~kFlags) != kDefault; }
  unsigned callers_;
#elif defined(__aarch64__)
  static constexpr uint64_t kDefault = 0;
  bool differs() const { return callers_ != kDefault; }
  uint64_t callers_;
#else
  std::fenv_t callers_;
#endif
};

}  // namespace collective
