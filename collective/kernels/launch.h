// What a kernel of kernels.cu is told: one argument, by value. Read by the host's compilers and, in kernels.cu, by
// NVRTC, which has no standard headers.
#pragma once

namespace collective {

inline constexpr int kMostRanks = 32;

// Threads of a block. The kernels go by what they are launched with, but are compiled for no more.
inline constexpr unsigned kThreads = 256;

// A Piece should be of this size in the wider of its two types: what a block moves at once, since each thread has four
// vectors of 16 bytes in flight. Larger ones leave multiprocessors idle at the end of a launch.
inline constexpr unsigned long long kPieceBytes = 16384;

// Blocks to launch: one for each piece, or for each kPieceBytes of a target, but no more than this many for each
// multiprocessor (which is what fits on one where registers allow it): each goes on to the next in the grid's stride.
inline constexpr unsigned kBlocksPerMultiprocessor = 8;

// All pointers are aligned for the parts of an element: a complex one for its real numbers. All counts are in elements.
struct Piece {
  const void* from;  // null: the identity is stored
  void* to;          // may equal `from` where both types have one size; no other overlap
  unsigned long long count;
};

struct Launch {
  double scale;  // 1 for bool

  // convert_<from>_<to>
  const Piece* pieces;  // in memory of the device
  unsigned long long piece_count;
  unsigned long long identity[2];  // one element of the target's type, in the first bytes

  // reduce_<dtype>_<op>
  unsigned long long count;
  long long divisor;  // of integers, before the scale; 1 for all others
  int source_count;   // from 1 on
  int target_count;   // from 1 on
  const void* sources[kMostRanks];
  void* targets[kMostRanks];  // may be sources, but no two the same; no other overlap
};
static_assert(sizeof(Launch) < 4096);  // what a kernel's arguments may take

}  // namespace collective
