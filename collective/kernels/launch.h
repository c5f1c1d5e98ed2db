// What a kernel of kernels.cu is told: one argument, by value. Read by the host's compilers and, in kernels.cu, by
// NVRTC, which has no standard headers.
#pragma once

namespace collective {

inline constexpr int kMostRanks = 32;

// Threads per block. The kernels go by what they are launched with, but are compiled for at most this many.
inline constexpr unsigned kThreads = 256;

// What a block converts at once, in the wider of the two types, since each thread has four vectors of 16 bytes in
// flight. With larger ones multiprocessors idle at the end of a launch.
inline constexpr unsigned long long kTileBytes = 16384;

// Blocks to launch: one for each tile, or for each kTileBytes of a target, but at most this many per multiprocessor (as
// many as fit on one where registers allow it): each goes on to its next tile in the grid's stride.
inline constexpr unsigned kBlocksPerMultiprocessor = 8;

// Tensors of one launch. They are passed among the arguments, which the driver copies at once and a kernel reads
// through a cache of its own: device memory for them would have to be filled before each launch, and kept until its
// end.
inline constexpr int kMostPieces = 108;

// All pointers are aligned for the parts of an element: a complex one for its real numbers. All counts are in elements.
struct Piece {
  const void* from;  // null: the identity is stored
  void* to;          // may equal `from` where both types have one size; no other overlap
  unsigned long long count;
  unsigned long long first_tile;  // of those of all pieces
};

struct Launch {
  double scale;  // 1 for bool

  // convert_<from>_<to>
  int piece_count;
  unsigned long long tile_count;
  unsigned long long identity[2];  // one element of the target's type, in the first bytes
  Piece pieces[kMostPieces];

  // reduce_<dtype>_<op>
  unsigned long long count;
  long long divisor;  // before the scale; 1 for bool
  int source_count;   // at least 1
  int target_count;
  const void* sources[kMostRanks];
  void* targets[kMostRanks];  // may be sources, but no two the same; no other overlap
};
static_assert(sizeof(Launch) <= 4096);  // what a kernel's arguments may take

#ifndef __CUDACC__
// The next tensor; element_bytes: of the wider type.
inline void add_piece(Launch& launch, const void* from, void* to, unsigned long long count,
                      unsigned long long element_bytes) {
  const unsigned long long tile = kTileBytes / element_bytes;
  launch.pieces[launch.piece_count++] = {from, to, count, launch.tile_count};
  launch.tile_count += (count + tile - 1) / tile;
}
#endif

}  // namespace collective
