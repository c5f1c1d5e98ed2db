// Speed of csrc/reduce against memcpy moving the same number of bytes (read + written), in one run on one core.
//
//   build/csrc/bench_reduce [filter ...]
//
// A row is printed when its text contains every filter, for example: bench_reduce float16 64M avx2.
// ratio = time of the kernel / time of memcpy for as many bytes; the goal is at most 1.3. Buffers of 256K stay in L2,
// where 16-bit types take more (they are bound by instructions, not by memory). "in place" is dst == srcs[0], what a
// ring does; the others write to a buffer of their own.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "reduce/reduce.h"

using namespace collective;

namespace {

std::vector<std::string> filters;

struct Buffer {
  explicit Buffer(size_t nbytes) : data(static_cast<char*>(std::aligned_alloc(4096, (nbytes + 4095) / 4096 * 4096))) {
    std::memset(data, 0, nbytes);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  char* data;
};

using Call = std::function<void()>;

// Processor seconds of this thread: others that run meanwhile do not count.
double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double seconds(const Call& call, long repeat) {
  const double start = now();
  for (long i = 0; i < repeat; i++) call();
  return (now() - start) / static_cast<double>(repeat);
}

// Seconds per call of each: the best of several rounds of about half a millisecond, in turns because the machine's
// speed drifts.
std::pair<double, double> best_seconds(const Call& a, const Call& b) {
  std::pair<double, double> best{1e9, 1e9};
  const double once = seconds(b, 1);
  const long repeat = std::max(1L, static_cast<long>(0.0005 / once)), rounds = once < 0.001 ? 100 : 10;
  for (long round = 0; round < rounds; round++) {
    best.first = std::min(best.first, seconds(a, repeat));
    best.second = std::min(best.second, seconds(b, repeat));
  }
  return best;
}

std::string text_of(size_t nbytes) {
  return nbytes >> 20 ? std::to_string(nbytes >> 20) + "M" : std::to_string(nbytes >> 10) + "K";
}

// `traffic`: bytes that the call reads and writes; `footprint`: bytes of its buffers, and of the two that memcpy is
// timed on.
void row(const std::string& what, size_t size, size_t traffic, size_t footprint, const Call& call) {
  const std::string name = std::string(simd_name()) + " " + text_of(size) + " " + what;
  for (const std::string& filter : filters)
    if (name.find(filter) == std::string::npos) return;
  Buffer from(footprint / 2), to(footprint / 2);
  auto [time, copy] = best_seconds(call, [&] { std::memcpy(to.data, from.data, footprint / 2); });
  const double ratio = time / (copy * static_cast<double>(traffic) / static_cast<double>(footprint));
  std::printf("%-9s %5s  %-36s %8.1f %8.2f\n", simd_name(), text_of(size).c_str(), what.c_str(),
              static_cast<double>(traffic) / time * 1e-9, ratio);
  std::fflush(stdout);
}

// `size`: bytes of each source and of dst. Values are zeros: speed does not depend on them (no kernel is given
// denormals).
void reductions(size_t size) {
  std::vector<std::unique_ptr<Buffer>> buffers;
  for (int k = 0; k < 9; k++) buffers.push_back(std::make_unique<Buffer>(size));
  std::vector<const void*> srcs;
  for (int k = 0; k < 8; k++) srcs.push_back(buffers[k]->data);
  for (int d = 0; d < kDTypeCount; d++) {
    const DType dtype = static_cast<DType>(d);
    const size_t count = size / size_of(dtype);
    const bool is_complex = dtype == DType::kComplex64 || dtype == DType::kComplex128;
    for (ReduceOp op : {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kProduct}) {
      if (is_complex && op == ReduceOp::kMin) continue;
      const std::string name = std::string(name_of(dtype)) + " " + name_of(op);
      row(name + " n=2 in place", size, 3 * size, 2 * size,
          [&] { reduce(dtype, op, buffers[0]->data, srcs.data(), 2, count); });
      row(name + " n=2", size, 3 * size, 3 * size, [&] { reduce(dtype, op, buffers[8]->data, srcs.data(), 2, count); });
      if (op == ReduceOp::kSum)
        for (int n : {3, 4, 8})
          row(name + " n=" + std::to_string(n), size, (n + 1) * size, (n + 1) * size,
              [&] { reduce(dtype, op, buffers[8]->data, srcs.data(), n, count); });
      if (op != ReduceOp::kSum || dtype < DType::kFloat16 || dtype == DType::kBool) continue;
      for (int n : {2, 3})
        row(std::string(name_of(dtype)) + " Average n=" + std::to_string(n), size, (n + 1) * size, (n + 1) * size,
            [&] { reduce(dtype, op, buffers[8]->data, srcs.data(), n, count, 1, 3); });
    }
  }
}

// `size`: bytes of the wider of the two types.
void conversions(size_t size) {
  Buffer from(size), to(size);
  const DType types[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64};
  for (DType src : types) {
    for (DType dst : types) {
      if (src == dst) continue;
      const size_t count = size / std::max(size_of(src), size_of(dst)), traffic = count * (size_of(src) + size_of(dst));
      row(std::string(name_of(src)) + " to " + name_of(dst), size, traffic, traffic,
          [&] { convert(dst, to.data, src, from.data, count, 0.5); });
    }
  }
}

void divisions(size_t size) {
  Buffer from(size), to(size);
  for (DType dtype : {DType::kUInt8, DType::kInt8, DType::kUInt16, DType::kInt16, DType::kInt32, DType::kInt64})
    row(std::string(name_of(dtype)) + " divide", size, 2 * size, 2 * size,
        [&] { divide(dtype, to.data, from.data, size / size_of(dtype), 7); });
  for (DType dtype : {DType::kUInt8, DType::kInt8, DType::kUInt16, DType::kInt16, DType::kInt32, DType::kInt64})
    row(std::string(name_of(dtype)) + " scale", size, 2 * size, 2 * size,
        [&] { convert(dtype, to.data, dtype, from.data, size / size_of(dtype), 0.3); });
}

}  // namespace

int main(int argc, char** argv) {
  filters.assign(argv + 1, argv + argc);
  std::printf("%-9s %5s  %-36s %8s %8s\n", "set", "size", "kernel", "GB/s", "ratio");
  for (size_t size : {size_t{256} << 10, size_t{64} << 20}) {
    for (const char* set : {"avx512", "avx2", "portable"}) {
      try {
        force_simd(set);
      } catch (const Error& error) {
        std::printf("%s\n", error.what());
        continue;
      }
      reductions(size);
      conversions(size);
      divisions(size);
    }
  }
}
