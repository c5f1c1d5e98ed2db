// Speed of the all-reduces inside a node against MPI_Allreduce and memcpy, in one run.
//
//   mpicxx -std=c++20 -O3 -pthread -Icsrc tests/csrc/bench_node.cc
//   csrc/{shared_memory,slots,allreduce_node,allreduce_bucket_node}.cc
//       csrc/{comm,allreduce,allreduce_doubling,ring}.cc csrc/reduce*.cc -o bench_node
//   mpirun -n 2 --bind-to core ./bench_node [rounds [KiB ...]]
//   mpirun -n 4 --oversubscribe ./bench_node
//
// float32, Sum. All ways take turns within a round. Time: the median over the rounds of the slowest rank's time. Ratio:
// the median over the rounds of MPI_Allreduce's time (one call, in place) by this one's.
//
//   memcpy            the same bytes, on all ranks at once
//   MPI, MPI pieces   MPI_Allreduce in place, in one call and in pieces of 4 MiB
//   node, node copy   AllreduceNode in place, and from one buffer to another
//   node fp16         the same in place with float16 in the staging areas
//   views             AllreduceBucketNode of what is there already
//   packed            AllreduceBucketNode that packs one tensor first; packed fp16: into a bucket of float16
#include <mpi.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "allreduce_bucket_node.h"
#include "allreduce_node.h"

using namespace collective;

namespace {

constexpr size_t kMost = size_t{256} << 20;
constexpr size_t kPiece = size_t{4} << 20;

// Steps without success before the core is offered to others: soon where they have none of their own.
int spins = 1000;

void finish(Operation& operation) {
  for (int idle = 0;;) {
    const Step step = operation.step();
    if (step == Step::kDone) return;
    if (step == Step::kMoved) {
      idle = 0;
    } else if (++idle % spins == 0) {
      sched_yield();
    }
  }
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Way {
  std::string name;
  std::function<void(size_t nbytes)> run;
  std::vector<double> seconds{};  // by round, of the slowest rank
};

void measure(std::vector<Way>& ways, size_t nbytes, int rounds, int rank) {
  const size_t repeats = std::clamp<size_t>((size_t{1} << 20) / nbytes, 1, 200);
  // In another order each round, alike on all ranks: what ran before leaves its traces in the caches and the scheduler.
  std::vector<size_t> order(ways.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::mt19937 random;
  for (int round = -1; round < rounds; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t i : order) {
      Way& way = ways[i];
      MPI_Barrier(MPI_COMM_WORLD);
      const double start = MPI_Wtime();
      for (size_t n = 0; n < repeats; ++n) way.run(nbytes);
      double seconds = (MPI_Wtime() - start) / static_cast<double>(repeats);
      MPI_Allreduce(MPI_IN_PLACE, &seconds, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
      if (round >= 0) way.seconds.push_back(seconds);  // the first round warms up
    }
  }
  if (rank != 0) return;
  const std::vector<double>& mpi = ways[1].seconds;
  for (const Way& way : ways) {
    std::vector<double> ratios;
    for (size_t i = 0; i < mpi.size(); ++i) ratios.push_back(mpi[i] / way.seconds[i]);
    const double best = *std::min_element(way.seconds.begin(), way.seconds.end());
    const double time = median(way.seconds);
    std::printf("%9zu %-12s %11.1f %11.1f %8.2f %8.2f %8.2f\n", nbytes >> 10, way.name.c_str(), time * 1e6, best * 1e6,
                static_cast<double>(nbytes) / time * 1e-9, median(ratios),
                *std::min_element(mpi.begin(), mpi.end()) / best);
  }
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  Comm comm = Comm::duplicate(MPI_COMM_WORLD);
  if (static_cast<unsigned>(comm.size()) > std::thread::hardware_concurrency()) spins = 20;
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 21;
  std::vector<size_t> sizes;
  for (int i = 2; i < argc; ++i) sizes.push_back(static_cast<size_t>(std::atof(argv[i]) * 1024));
  if (sizes.empty())
    for (size_t kib : {1, 16, 64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10}) sizes.push_back(kib << 10);

  std::string why;
  const auto share = [&](size_t nbytes) {
    auto memory = SharedMemory::try_create(comm, 1, nbytes, std::chrono::seconds(60), why);
    if (memory) return std::move(*memory);
    std::fprintf(stderr, "no shared memory: %s\n", why.c_str());
    std::exit(1);
  };
  SharedMemory lane_memory = share(Lane::nbytes());
  Lane lane(lane_memory, 0);
  // Values stay what they are: zeros.
  Buffer a(kMost), b(kMost);
  std::memset(a.data(), 0, kMost);
  std::memset(b.data(), 0, kMost);
  const AllreduceSpec spec{DType::kFloat32, DType::kFloat32, ReduceOp::kSum};
  const AllreduceSpec half{DType::kFloat32, DType::kFloat16, ReduceOp::kSum};

  if (comm.rank() == 0)
    std::printf("%d ranks, %s\n%9s %-12s %11s %11s %8s %8s %8s\n", comm.size(), simd_name(), "KiB", "way", "median us",
                "best us", "GB/s", "ratio", "of best");
  for (const size_t size : sizes) {
    const size_t n = size / 4;
    SharedMemory memory = share(NodeBucket::nbytes(DType::kFloat32, n));
    NodeBucket bucket(memory, 0, DType::kFloat32, n);
    SharedMemory half_memory = share(NodeBucket::nbytes(DType::kFloat16, n));
    NodeBucket half_bucket(half_memory, 0, DType::kFloat16, n);
    const auto node = [&](const AllreduceSpec& spec, const void* in, void* out) {
      AllreduceNode operation(lane, spec, {{in, out, n}});
      finish(operation);
    };
    const auto in_bucket = [&](NodeBucket& bucket, const AllreduceSpec& spec, const void* in) {
      AllreduceBucketNode operation(bucket, spec, {{in, nullptr, n}});
      finish(operation);
    };
    const auto mpi = [&](size_t begin, size_t count) {
      MPI_Allreduce(MPI_IN_PLACE, a.data() + begin * 4, static_cast<int>(count), MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    };
    std::vector<Way> ways{
        {"memcpy", [&](size_t nbytes) { std::memcpy(b.data(), a.data(), nbytes); }},
        {"MPI", [&](size_t) { mpi(0, n); }},
        {"MPI pieces",
         [&](size_t) {
           for (size_t i = 0; i < n; i += kPiece / 4) mpi(i, std::min(n - i, kPiece / 4));
         }},
        {"node", [&](size_t) { node(spec, a.data(), a.data()); }},
        {"node copy", [&](size_t) { node(spec, a.data(), b.data()); }},
        {"node fp16", [&](size_t) { node(half, a.data(), a.data()); }},
        {"views", [&](size_t) { in_bucket(bucket, spec, bucket.storage()); }},
        {"packed", [&](size_t) { in_bucket(bucket, spec, a.data()); }},
        {"packed fp16", [&](size_t) { in_bucket(half_bucket, half, a.data()); }},
    };
    measure(ways, size, rounds, comm.rank());
    // Nobody may leave, and unmap, while a peer still steps: it is over when all say so.
    MPI_Barrier(MPI_COMM_WORLD);
  }
  comm.release();
  MPI_Finalize();
}
