#include "messages/ring.h"

#include <algorithm>
#include <utility>

namespace collective {

void Schedule::enter() {
  position_ = 0;
  const int p = static_cast<int>(chunks_->size());
  chunk_ = (chunk_ % p + p) % p;
  while (step_ < steps_ && chunk().count() == 0) {
    ++step_;
    chunk_ = (chunk_ + p - 1) % p;
  }
}

Segment Schedule::front() const {
  const size_t begin = chunk().begin + position_;
  return {step_, begin, std::min(segment_count_, chunk().end - begin)};
}

void Schedule::pop() {
  const Segment segment = front();
  position_ += segment.count;
  if (segment.begin + segment.count < chunk().end) return;
  ++step_;
  --chunk_;
  enter();
}

namespace {

// The chunk that is sent in step 0: after a reduce-scatter alone rank r is to hold chunk r, hence the -1.
int first_chunk(Ring::Phases phases, int position) {
  return phases == Ring::Phases::kReduceScatter ? position - 1 : position;
}

int step_count(Ring::Phases phases, int size) { return phases == Ring::Phases::kAllreduce ? 2 * (size - 1) : size - 1; }

// By rank -> by place in the ring.
std::vector<Range> in_order(const Comm& comm, const std::vector<Range>& chunks) {
  std::vector<Range> ordered;
  for (const int rank : comm.order()) ordered.push_back(chunks[static_cast<size_t>(rank)]);
  return ordered;
}

}  // namespace

Ring::Ring(const Comm& comm, BufferPool& pool, int tag, Phases phases, const void* in, void* out,
           const std::vector<Range>& chunks, const Arithmetic& arithmetic, RingReducer* reducer)
    : comm_(&comm),
      tag_(tag),
      left_(comm.at(comm.position() - 1)),
      right_(comm.at(comm.position() + 1)),
      reduce_steps_(phases == Phases::kAllgather ? 0 : comm.size() - 1),
      in_(static_cast<const std::byte*>(in)),
      out_(static_cast<std::byte*>(out)),
      chunks_(in_order(comm, chunks)),
      arithmetic_(arithmetic),
      reducer_(reducer),
      element_size_(size_of(arithmetic.dtype)),
      segment_count_((reducer != nullptr ? reducer->segment_bytes() : comm.segments(kSegments).nbytes) / element_size_),
      depth_(reducer != nullptr ? reducer->depth() : comm.segments(kSegments).depth),
      to_send_(chunks_, first_chunk(phases, comm.position()), step_count(phases, comm.size()), segment_count_),
      to_post_(chunks_, first_chunk(phases, comm.position()) - 1, step_count(phases, comm.size()), segment_count_),
      to_complete_(to_post_),
      sends_(depth_),
      receives_(depth_) {
  const auto segments_of = [this](const Range& chunk) { return (chunk.count() + segment_count_ - 1) / segment_count_; };
  const int p = comm.size();
  own_segments_ = segments_of(chunks_[static_cast<size_t>((first_chunk(phases, comm.position()) + p) % p)]);
  total_segments_ = 0;
  size_t largest = 0;
  for (const Range& chunk : chunks_) {
    total_segments_ += segments_of(chunk);
    largest = std::max(largest, chunk.count());
  }
  scratch_stride_ = std::min(largest, segment_count_) * element_size_;
  if (reduce_steps_ == 0 || largest == 0) return;
  if (reducer_ != nullptr) {
    scratch_ = reducer_->scratch();
  } else {
    pooled_ = pool.take(depth_ * scratch_stride_);
    scratch_ = pooled_.data();
  }
}

Ring::Ring(const Comm& comm, BufferPool& pool, int tag, Phases phases, RingData& data, void* out,
           const std::vector<Range>& chunks, const Arithmetic& arithmetic)
    : Ring(comm, pool, tag, phases, nullptr, out, chunks, arithmetic) {
  data_ = &data;
}

Step Ring::step() {
  bool moved = complete_sends();
  moved |= take_combined();
  moved |= complete_receives();
  moved |= post_receives();
  moved |= start_sends();
  if (to_send_.done() && to_complete_.done() && sends_done_ == sends_started_ && receives_done_ == receives_taken_)
    return Step::kDone;
  return moved ? Step::kMoved : Step::kIdle;
}

bool Ring::complete_sends() {
  const size_t before = sends_done_;
  while (sends_done_ < sends_started_ && sends_[sends_done_ % depth_].done()) ++sends_done_;
  return sends_done_ != before;
}

// Segments of the gathering steps, which come last, are not combined: they are done when received.
bool Ring::take_combined() {
  if (reducer_ == nullptr) return false;
  const size_t before = receives_done_;
  while (receives_done_ < receives_taken_ && (receives_done_ >= combined_total_ || reducer_->pop_over()))
    ++receives_done_;
  return receives_done_ != before;
}

bool Ring::complete_receives() {
  if (receives_taken_ == receives_posted_ || !receives_[receives_taken_ % depth_].done()) return false;
  const Segment segment = to_complete_.front();
  if (segment.step < reduce_steps_) {
    const size_t offset = segment.begin * element_size_;
    const bool last = segment.step == reduce_steps_ - 1;
    if (data_ != nullptr)
      data_->combine(scratch(receives_taken_), {segment.begin, segment.begin + segment.count}, last);
    else if (reducer_ != nullptr)
      reducer_->start(arithmetic_, out_ + offset, scratch(receives_taken_), in_ + offset, segment.count, last);
    else
      arithmetic_.combine(out_ + offset, scratch(receives_taken_), in_ + offset, segment.count, last);
    combined_total_ = receives_taken_ + 1;
  } else if (data_ != nullptr) {
    data_->take({segment.begin, segment.begin + segment.count});
  }
  to_complete_.pop();
  ++receives_taken_;
  if (reducer_ == nullptr) ++receives_done_;
  return true;
}

bool Ring::post_receives() {
  bool moved = false;
  while (!to_post_.done() && receives_posted_ - receives_done_ < depth_) {
    const Segment segment = to_post_.front();
    std::byte* target = out_ + segment.begin * element_size_;
    if (segment.step < reduce_steps_)
      target = scratch(receives_posted_);
    else if (receives_posted_ + own_segments_ >= total_segments_ &&
             sends_done_ <= receives_posted_ + own_segments_ - total_segments_)
      break;  // these elements are still being sent, from p-1 steps ago, in the reduce-scatter
    receives_[receives_posted_ % depth_] = comm_->irecv(target, segment.count * element_size_, left_, tag_);
    to_post_.pop();
    ++receives_posted_;
    moved = true;
  }
  return moved;
}

bool Ring::start_sends() {
  bool moved = false;
  // What must be computed first is started one at a time, so that a step stays short.
  while (!(moved && data_ != nullptr && sends_started_ < own_segments_) && !to_send_.done() &&
         sends_started_ - sends_done_ < depth_ &&
         (sends_started_ < own_segments_ || receives_done_ > sends_started_ - own_segments_)) {
    const Segment segment = to_send_.front();
    const bool untouched = segment.step == 0 && reduce_steps_ > 0;
    if (untouched && data_ != nullptr) data_->store({segment.begin, segment.begin + segment.count});
    const std::byte* source = (untouched && data_ == nullptr ? in_ : out_) + segment.begin * element_size_;
    sends_[sends_started_ % depth_] = comm_->isend(source, segment.count * element_size_, right_, tag_);
    to_send_.pop();
    ++sends_started_;
    moved = true;
  }
  return moved;
}

std::string Ring::describe() const {
  if (!to_complete_.done())
    return "ring: waits for " + comm_->names().text_of(left_) + ", step " + std::to_string(to_complete_.front().step) +
           ", segment " + std::to_string(receives_done_);
  return "ring: waits for " + comm_->names().text_of(right_) + " to take segment " + std::to_string(sends_done_);
}

}  // namespace collective
