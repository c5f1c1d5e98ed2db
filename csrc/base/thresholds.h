// Which algorithm from which size on, in bytes of the whole operation. All ranks must decide alike, so these follow from
// what is agreed, and are no settings. `python -m collective.info` shows them.
#pragma once

#include <array>
#include <cstddef>

namespace collective::thresholds {

// All-reduce in messages: recursive doubling, which has fewer steps; from here on the ring, which sends less.
inline constexpr size_t kRing = size_t{16} << 10;

// Broadcast in messages: a binomial tree, whose depth is log2(p); from here on a chain, in which every rank sends once.
inline constexpr size_t kBroadcastChain = size_t{64} << 10;

// All-reduce on a node, to be divided by p - 1.
// Up to this length every rank reduces everything. Measured on 2 cores, one synchronisation against two, float32: 2
// ranks 1 KiB 0.7 us against 0.9, 16 KiB 1.6 against 2.0, 128 KiB 7.9 against 8.6; 3 ranks 64 KiB 8.0 against 10.4, 128
// KiB 16.6 against 16.1; 4 ranks 32 KiB 8.0 against 11.7, 128 KiB 26 against 23 (where ranks share cores, so that a
// synchronisation is expensive). What must be converted is read once more: float16, 2 ranks, 32 KiB 5.1 against 4.4.
// With the payload, 48 bytes, in the counter's own line: 322 ns instead of 328.
inline constexpr size_t kNodeSlices = size_t{128} << 10;

// Alltoall on a node of more than 2 ranks, what a rank sends: through the lane; above this in messages.
// In an alltoall all bytes but few are read once, so that a copy into shared memory on their way is a third of the work
// with many ranks; MPI, where it may read its peers' memory, saves that. Measured, all of it with its agreement, lane
// against messages: 2 ranks 1 MiB 57 us against 99, 16 MiB 1910 against 2400, 64 MiB 8390 against 9390; 4 ranks (on 2
// cores) 1 MiB 230 against 340, 4 MiB 1240 against 1580, 16 MiB 5570 against 5190, 64 MiB 20.4 ms against 18.2. The
// other operations are faster in the lane at all lengths.
inline constexpr size_t kAlltoallByMessages = size_t{8} << 20;

// All-reduce of arrays of devices: by way of the host; from here on by the devices.
// Less goes by way of the host: two copies of it take less time than three kernels between which the ranks meet. (Not
// measured on a device.)
inline constexpr size_t kDevices = size_t{64} << 10;

struct Threshold {
  const char* what;
  size_t bytes;
  const char *below, *above;
};
inline constexpr std::array<Threshold, 5> kAll{{
    {"allreduce in messages", kRing, "recursive doubling", "ring"},
    {"broadcast in messages", kBroadcastChain, "binomial tree", "chain"},
    {"allreduce on a node, x 1/(p-1)", kNodeSlices, "every rank reduces all", "every rank reduces its slices"},
    {"alltoall on a node, p > 2", kAlltoallByMessages, "shared memory", "messages"},
    {"allreduce of device arrays", kDevices, "by way of the host", "by the devices"},
}};

}  // namespace collective::thresholds
