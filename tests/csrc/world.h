// The ranks of a test without Python: MPI processes, or threads of one process for the thread sanitizer.
//
//   mpirun -n 4 build/csrc/test_node [seed]
//   build/csrc/test_node_tsan threads 4 [seed]
#pragma once

#include <malloc.h>
#include <mpi.h>
#include <unistd.h>

#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <latch>
#include <string>
#include <thread>
#include <vector>

#include "messages/comm.h"
#include "node/shared_memory_creation.h"

// A rank's view of the test: processes and threads differ in these only.
struct World {
  int rank, size;
  std::function<collective::SharedMemory(size_t nbytes)> memory;  // collective
  std::function<void()> barrier;
  unsigned seed;
  bool is_threads;
};

[[noreturn]] inline void fail(const World& world, const std::string& text) {
  std::fprintf(stderr, "rank %d of %d: %s\n", world.rank, world.size, text.c_str());
  std::fflush(stderr);
  std::_Exit(1);
}

struct Test {
  std::string name;
  std::function<void(const World&)> function;
};

inline void run_all(const World& world, const std::vector<Test>& tests) {
  for (const Test& test : tests) {
    const auto start = std::chrono::steady_clock::now();
    test.function(world);
    world.barrier();
    if (world.rank == 0)
      std::printf("%d %s: %s passed in %.1f s\n", world.size, world.is_threads ? "threads" : "ranks", test.name.c_str(),
                  std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    std::fflush(stdout);
  }
}

[[noreturn]] inline void run_threads(int size, unsigned seed, const std::vector<Test>& tests) {
  std::barrier<> barrier(size);
  std::latch over(size);
  std::vector<std::byte*> parts(static_cast<size_t>(size));
  for (int rank = 0; rank < size; ++rank)
    std::thread([&, rank] {
      World world{rank, size, {}, [&] { barrier.arrive_and_wait(); }, seed, true};
      world.memory = [&, rank](size_t nbytes) {
        const size_t reserved = collective::round_up(nbytes, 4096);
        auto* part = static_cast<std::byte*>(std::aligned_alloc(4096, reserved));  // kept to the end
        std::memset(part, 0, nbytes);
        barrier.arrive_and_wait();
        parts[static_cast<size_t>(rank)] = part;
        barrier.arrive_and_wait();
        return collective::SharedMemory(rank, parts, nbytes);
      };
      run_all(world, tests);
      over.count_down();
      pause();  // for ever: when a thread ends, the memory hooks of an MPI may crash in the thread sanitizer
    }).detach();
  over.wait();
  std::exit(0);
}

inline int run_processes(unsigned seed, const std::vector<Test>& tests) {
  int provided = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided);
  collective::Comm comm = collective::Comm::duplicate(MPI_COMM_WORLD);
  World world{comm.rank(), comm.size(), {}, [] { MPI_Barrier(MPI_COMM_WORLD); }, seed, false};
  world.memory = [&](size_t nbytes) {
    std::string why;
    auto memory = collective::try_share_memory(comm, 1, nbytes, std::chrono::seconds(30), why);
    if (!memory) fail(world, "no shared memory: " + why);
    return std::move(*memory);
  };
  run_all(world, tests);
  comm.release();
  MPI_Finalize();
  return 0;
}

// What main() does.
inline int run(int argc, char** argv, const std::vector<Test>& tests) {
  const bool threads = argc > 2 && std::strcmp(argv[1], "threads") == 0;
  const int seed_at = threads ? 3 : 1;
  // Memory that was freed is used again, instead of the system's, page by page: a third of the time.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  const unsigned seed = argc > seed_at ? static_cast<unsigned>(std::atoi(argv[seed_at])) : 1;
  if (threads) run_threads(std::atoi(argv[2]), seed, tests);
  return run_processes(seed, tests);
}
