#include "messages/ring.h"

#include <algorithm>
#include <utility>

namespace collective {

std::vector<size_t> even_offsets(size_t rows, size_t row_elements, int p) {
  const auto parts = static_cast<size_t>(p);
  std::vector<size_t> offsets(parts + 1);
  for (size_t i = 0; i <= parts; ++i) offsets[i] = (rows / parts * i + std::min(i, rows % parts)) * row_elements;
  return offsets;
}

void Schedule::enter() {
  position_ = 0;
  const int p = static_cast<int>(offsets_->size()) - 1;
  chunk_ = (chunk_ % p + p) % p;
  while (step_ < steps_ && (*offsets_)[static_cast<size_t>(chunk_)] == (*offsets_)[static_cast<size_t>(chunk_) + 1]) {
    ++step_;
    chunk_ = (chunk_ + p - 1) % p;
  }
}

Segment Schedule::front() const {
  const size_t begin = (*offsets_)[static_cast<size_t>(chunk_)] + position_;
  return {step_, begin, std::min(segment_count_, (*offsets_)[static_cast<size_t>(chunk_) + 1] - begin)};
}

void Schedule::pop() {
  const Segment segment = front();
  position_ += segment.count;
  if (segment.begin + segment.count < (*offsets_)[static_cast<size_t>(chunk_) + 1]) return;
  ++step_;
  --chunk_;
  enter();
}

namespace {

// The chunk that is sent in step 0: after a reduce-scatter alone rank r is to hold chunk r, hence the -1.
int first_chunk(Ring::Phases phases, int rank) { return phases == Ring::Phases::kReduceScatter ? rank - 1 : rank; }

int step_count(Ring::Phases phases, int size) { return phases == Ring::Phases::kAllreduce ? 2 * (size - 1) : size - 1; }

}  // namespace

Ring::Ring(const Comm& comm, BufferPool& pool, int tag, Phases phases, const void* in, void* out,
           std::vector<size_t> offsets, const Arithmetic& arithmetic, RingReducer* reducer)
    : comm_(&comm),
      tag_(tag),
      left_((comm.rank() + comm.size() - 1) % comm.size()),
      right_((comm.rank() + 1) % comm.size()),
      reduce_steps_(phases == Phases::kAllgather ? 0 : comm.size() - 1),
      in_(static_cast<const std::byte*>(in)),
      out_(static_cast<std::byte*>(out)),
      offsets_(std::move(offsets)),
      arithmetic_(arithmetic),
      reducer_(reducer),
      element_size_(size_of(arithmetic.dtype)),
      segment_count_((reducer != nullptr ? reducer->segment_bytes() : kSegmentBytes) / element_size_),
      depth_(reducer != nullptr ? reducer->depth() : kDepth),
      to_send_(offsets_, first_chunk(phases, comm.rank()), step_count(phases, comm.size()), segment_count_),
      to_post_(offsets_, first_chunk(phases, comm.rank()) - 1, step_count(phases, comm.size()), segment_count_),
      to_complete_(to_post_),
      sends_(depth_),
      receives_(depth_) {
  const auto segments_of = [this](size_t chunk) {
    return (offsets_[chunk + 1] - offsets_[chunk] + segment_count_ - 1) / segment_count_;
  };
  const int p = comm.size();
  own_segments_ = segments_of(static_cast<size_t>((first_chunk(phases, comm.rank()) + p) % p));
  total_segments_ = 0;
  size_t largest = 0;
  for (size_t chunk = 0; chunk + 1 < offsets_.size(); ++chunk) {
    total_segments_ += segments_of(chunk);
    largest = std::max(largest, offsets_[chunk + 1] - offsets_[chunk]);
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
    if (reducer_ != nullptr)
      reducer_->start(arithmetic_, out_ + offset, scratch(receives_taken_), in_ + offset, segment.count, last);
    else
      arithmetic_.combine(out_ + offset, scratch(receives_taken_), in_ + offset, segment.count, last);
    combined_total_ = receives_taken_ + 1;
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
  while (!to_send_.done() && sends_started_ - sends_done_ < depth_ &&
         (sends_started_ < own_segments_ || receives_done_ > sends_started_ - own_segments_)) {
    const Segment segment = to_send_.front();
    const bool untouched = segment.step == 0 && reduce_steps_ > 0;
    const std::byte* source = (untouched ? in_ : out_) + segment.begin * element_size_;
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
