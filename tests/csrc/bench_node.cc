// Speed of the all-reduces inside a node against MPI_Allreduce and memcpy, in one run.
//
//   mpirun -n 2 --bind-to core build/csrc/bench_node [rounds [KiB ...]]
//   mpirun -n 4 --oversubscribe build/csrc/bench_node
//
// float32, Sum. All ways take turns within a round. Times in microseconds, of the slowest rank: the median of the
// rounds, the best of them, and the median of the processor time, which is what to go by on a shared machine (then set
// OMPI_MCA_mpi_yield_when_idle=1, too). Ratios: the time of MPI_Allreduce, one call in place, divided by this one's; of
// the rounds, of the best, and of processor times.
//
//   memcpy            the same bytes, on all ranks at once
//   MPI, MPI pieces   MPI_Allreduce in place, in one call and in pieces of 4 MiB
//   node, node copy   AllreduceNode in place, and from one buffer to another
//   node fp16         the same in place with float16 in the staging areas
//   views             AllreduceBucketNode of what is there already
//   packed            AllreduceBucketNode that packs one tensor first; packed fp16: into a bucket of float16
#include <mpi.h>
#include <sched.h>
#include <time.h>

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

#include "node/allreduce_bucket_node.h"
#include "node/allreduce_node.h"

using namespace collective;

namespace {

constexpr size_t kMost = size_t{256} << 20;
constexpr size_t kPiece = size_t{4} << 20;

// Idle steps before the core is yielded to others: few where ranks share cores.
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

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

struct Way {
  std::string name;
  std::function<void()> run;
  std::vector<double> seconds{}, cpu{};  // by round, of the slowest rank
};

void measure(std::vector<Way>& ways, size_t nbytes, int rounds, int rank) {
  const size_t repeats = std::clamp<size_t>((size_t{1} << 20) / nbytes, 1, 200);
  // In a different order each round, the same on all ranks: what ran before leaves its traces in the caches and the
  // scheduler.
  std::vector<size_t> order(ways.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::mt19937 random;
  for (int round = 0; round < rounds; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t i : order) {
      // Once untimed: MPI reads its peers' buffers and leaves lines shared, and who writes there next pays (twice the
      // time, at 1 MiB).
      ways[i].run();
      MPI_Barrier(MPI_COMM_WORLD);
      double times[] = {-MPI_Wtime(), -cpu_seconds()};
      for (size_t n = 0; n < repeats; ++n) ways[i].run();
      times[0] += MPI_Wtime(), times[1] += cpu_seconds();
      MPI_Allreduce(MPI_IN_PLACE, times, 2, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
      ways[i].seconds.push_back(times[0] / static_cast<double>(repeats));
      ways[i].cpu.push_back(times[1] / static_cast<double>(repeats));
    }
  }
  if (rank != 0) return;
  const auto best = [](const std::vector<double>& values) { return *std::min_element(values.begin(), values.end()); };
  const Way& mpi = ways[1];
  for (const Way& way : ways) {
    std::vector<double> ratios;
    for (size_t i = 0; i < mpi.seconds.size(); ++i) ratios.push_back(mpi.seconds[i] / way.seconds[i]);
    std::printf("%9zu %-12s %10.1f %10.1f %10.1f %8.2f %8.2f %8.2f\n", nbytes >> 10, way.name.c_str(),
                median(way.seconds) * 1e6, best(way.seconds) * 1e6, median(way.cpu) * 1e6, median(ratios),
                best(mpi.seconds) / best(way.seconds), median(mpi.cpu) / median(way.cpu));
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
    auto memory = try_share_memory(comm, 1, nbytes, std::chrono::seconds(60), why);
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
    std::printf("%d ranks, %s\n%9s %-12s %10s %10s %10s %8s %8s %8s\n", comm.size(), simd_name(), "KiB", "way",
                "median", "best", "cpu", "ratio", "of best", "of cpu");
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
        {"memcpy", [&] { std::memcpy(b.data(), a.data(), size); }},
        {"MPI", [&] { mpi(0, n); }},
        {"MPI pieces",
         [&] {
           for (size_t i = 0; i < n; i += kPiece / 4) mpi(i, std::min(n - i, kPiece / 4));
         }},
        {"node", [&] { node(spec, a.data(), a.data()); }},
        {"node copy", [&] { node(spec, a.data(), b.data()); }},
        {"node fp16", [&] { node(half, a.data(), a.data()); }},
        {"views", [&] { in_bucket(bucket, spec, bucket.storage()); }},
        {"packed", [&] { in_bucket(bucket, spec, a.data()); }},
        {"packed fp16", [&] { in_bucket(half_bucket, half, a.data()); }},
    };
    measure(ways, size, rounds, comm.rank());
    // No rank may leave, and unmap, while a peer still steps: it is done when all say so.
    MPI_Barrier(MPI_COMM_WORLD);
  }
  comm.release();
  MPI_Finalize();
}
