// Segmented ring: reduce-scatter, all-gather, or both in a row (all-reduce).
//
// The p ranks stand in a ring; each sends only to its right and receives only from its left neighbour. The data is
// cut into p chunks. In step k a rank sends the chunk that it received (and reduced) in step k-1:
//
//        rank 0          rank 1          rank 2           reduce-scatter, p = 3; a0 = chunk a of rank 0
//      a0 b0 c0        a1 b1 c1        a2 b2 c2
//   k=0   a0 ->           b1 ->           c2 ->           each adds what it receives to its own chunk
//      a0 b0 c02       a01 b1 c1       a2 b12 c2
//   k=1   c02 ->          a01 ->          b12 ->
//      a0 b012 c02     a01 b1 c012     a012 b12 c2        rank r holds chunk r+1, complete
//   k=2..3                                                all-gather: the complete chunks go round once more
//
// A chunk travels in segments, and a segment is forwarded as soon as it is reduced, so that after the first one
// receiving, reducing and sending go on at the same time; receives are posted before their data comes. The ring visits
// the ranks of a node one after the other (Comm::order()), so that each byte enters and leaves a node once.
//
// steps:              2(p-1) for an all-reduce, p-1 for either half
// bytes on the wire:  2(p-1)/p N per rank each way (the lower bound); half of it for either half
// memory traffic:     reduce: 2 loads + 1 store per received element; gather: received in place
// limits:             latency grows with p: short messages use allreduce_doubling
// source:             Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, JPDC 69(2), 2009
#pragma once

#include <cstddef>
#include <vector>

#include "base/buffer.h"
#include "base/operation.h"
#include "base/ranges.h"
#include "messages/comm.h"
#include "reduce/arithmetic.h"

namespace collective {

struct Segment {
  int step;
  size_t begin, count;  // elements
};

// Walks the segments of one chunk per step, chunk indices falling by one from step to step.
class Schedule {
 public:
  Schedule(const std::vector<Range>& chunks, int first_chunk, int steps, size_t segment_count)
      : chunks_(&chunks), chunk_(first_chunk), steps_(steps), segment_count_(segment_count) {
    enter();
  }
  bool done() const { return step_ >= steps_; }
  Segment front() const;
  void pop();

 private:
  void enter();  // the next chunk that is not empty
  const Range& chunk() const { return (*chunks_)[static_cast<size_t>(chunk_)]; }
  const std::vector<Range>* chunks_;
  int chunk_, steps_;
  size_t segment_count_;
  int step_ = 0;
  size_t position_ = 0;
};

// Combines what a ring receives in place of the host, and completes that some time later: a device.
class RingReducer {
 public:
  virtual ~RingReducer() = default;
  // As Arithmetic::combine().
  virtual void start(const Arithmetic& arithmetic, void* dst, const void* a, const void* b, size_t count,
                     bool last) = 0;
  // Whether the oldest combination that was started is complete; if so, it is forgotten.
  virtual bool pop_over() = 0;
  // The size of a segment, how many are in flight each way, and the memory into which as many are received.
  virtual size_t segment_bytes() const = 0;
  virtual size_t depth() const = 0;
  virtual std::byte* scratch() = 0;
};

// A rank's contribution to an all-reduce, and its use of the results, where the elements do not lie in one array.
class RingData {
 public:
  virtual ~RingData() = default;
  // Elements of this rank to their place in `out`.
  virtual void store(Range elements) = 0;
  // Combines what has been received with this rank's elements, to their place in `out`; `last`: these are results.
  virtual void combine(const void* received, Range elements, bool last) = 0;
  // Results have been received to their place in `out`.
  virtual void take(Range elements) = 0;
};

class Ring final : public Operation {
 public:
  enum class Phases { kReduceScatter, kAllgather, kAllreduce };

  // chunks: by rank, in elements, the same on all ranks. After a reduce-scatter rank r holds chunk r; before an
  // all-gather its chunk r must be in `out`. `in` and `out` may be equal; a reduce-scatter leaves partial sums in the
  // other chunks of `out`. reducer: what combines, where the data is not in host memory; null: this processor.
  Ring(const Comm& comm, BufferPool& pool, int tag, Phases phases, const void* in, void* out,
       const std::vector<Range>& chunks, const Arithmetic& arithmetic, RingReducer* reducer = nullptr);
  // The same of `data`, which must outlive it; not an all-gather.
  Ring(const Comm& comm, BufferPool& pool, int tag, Phases phases, RingData& data, void* out,
       const std::vector<Range>& chunks, const Arithmetic& arithmetic);

  Step step() override;
  std::string describe() const override;

 private:
  // On a node, each way: chosen by measurements over shared memory, 2 ranks.
  static constexpr Segments kSegments{size_t{128} << 10, 4};

  bool complete_sends();
  bool take_combined();
  bool complete_receives();
  bool post_receives();
  bool start_sends();
  // Where the reduce-scatter receives segment number i.
  std::byte* scratch(size_t i) const { return scratch_ + i % depth_ * scratch_stride_; }

  const Comm* comm_;
  int tag_;
  int left_, right_;
  int reduce_steps_;  // how many of the steps reduce: the first ones
  const std::byte* in_;
  std::byte* out_;
  std::vector<Range> chunks_;  // in the order of the ring
  Arithmetic arithmetic_;
  RingReducer* reducer_;
  RingData* data_ = nullptr;  // in place of in_
  size_t element_size_;
  size_t segment_count_, depth_;

  Schedule to_send_, to_post_, to_complete_;
  // Running numbers of segments, in the order of the schedules.
  size_t sends_started_ = 0, sends_done_ = 0, receives_posted_ = 0;
  size_t receives_taken_ = 0;  // received, and perhaps still being combined
  size_t receives_done_ = 0;   // received and combined
  size_t combined_total_ = 0;  // the first ones taken, which are combined; later ones are only gathered
  size_t own_segments_;        // of the first chunk sent, which waits for no receive
  size_t total_segments_;      // of all chunks
  PooledBuffer pooled_;        // before what receives into it
  std::vector<Request> sends_, receives_;
  std::byte* scratch_ = nullptr;
  size_t scratch_stride_ = 0;  // bytes
};

}  // namespace collective
