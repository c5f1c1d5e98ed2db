#include "channels.h"

#include <utility>

#include "log.h"

namespace collective {

Channels::Channels(const Comm& comm, BufferPool& pool, int first_tag, size_t most)
    : comm_(&comm), pool_(&pool), first_tag_(first_tag), most_(most) {}

class Channels::Opening final : public Operation {
 public:
  Opening(Channels& channels, uint32_t first, size_t count, size_t nbytes, std::shared_ptr<Ticket> ticket)
      : channels_(&channels),
        first_(first),
        count_(count),
        number_(channels.opened_++),
        ticket_(std::move(ticket)),
        creation_(*channels.comm_, channels.first_tag_ + static_cast<int>(first), nbytes, let_go()) {
    channels.plans_[number_] = nullptr;  // not let go before it is there
  }

  Step step() override {
    const Step step = creation_.step();
    if (step != Step::kDone) return step;
    for (uint64_t i = 0; i < kTold; ++i)
      if ((creation_.common_notes() >> i & 1) != 0) channels_->plans_.erase(number_ - 1 - i);
    for (size_t i = 0; i < count_; ++i) channels_->channels_[first_ + i].open = true;
    auto memory = creation_.take();
    if (!memory) {
      channels_->plans_.erase(number_);
      if (channels_->comm_->rank() == 0)
        log_warning("gradients travel in MPI messages, which is slower: no shared memory: " + creation_.why());
      return Step::kDone;
    }
    const auto plan = std::make_shared<Plan>(Plan{std::move(*memory), {}});
    size_t offset = 0;
    for (size_t i = 0; i < count_; ++i) {
      Channel& channel = channels_->channels_[first_ + i];
      plan->buckets.emplace_back(plan->memory, offset, channel.spec.wire, channel.count);
      offset += NodeBucket::nbytes(channel.spec.wire, channel.count);
      ticket_->buckets.emplace_back(plan, &plan->buckets.back());
      channel.plan = number_;
      channel.number = i;
      channel.on_node = true;
    }
    channels_->plans_[number_] = plan;
    return Step::kDone;
  }
  std::string describe() const override { return creation_.describe(); }

 private:
  static constexpr uint64_t kTold = 64;

  // Bit i: of the plan that was opened i + 1 before. Besides `plans_` those who run it have it, and the script.
  uint64_t let_go() const {
    uint64_t bits = 0;
    for (uint64_t i = 0; i < kTold && i < number_; ++i) {
      const auto plan = channels_->plans_.find(number_ - 1 - i);
      if (plan == channels_->plans_.end() || plan->second.use_count() == 1) bits |= uint64_t{1} << i;
    }
    return bits;
  }

  Channels* channels_;
  uint32_t first_;
  size_t count_;
  uint64_t number_;  // of the plan
  std::shared_ptr<Ticket> ticket_;
  SharedMemoryCreation creation_;
};

std::unique_ptr<Operation> Channels::open(uint32_t first, const Descriptor& d, std::shared_ptr<Ticket> ticket,
                                          bool shares_memory) {
  const size_t count = d.shape.size() / 3;
  if (first + count > most_)
    throw Error(ErrorCode::kInternal, "more than " + std::to_string(most_) + " buckets were opened");
  channels_.resize(first + count);
  started_.resize(first + count);
  ticket->channel = first;
  size_t nbytes = 0;
  for (size_t i = 0; i < count; ++i) {
    Channel& channel = channels_[first + i];
    channel.spec = {static_cast<DType>(d.shape[3 * i]), static_cast<DType>(d.shape[3 * i + 1]), d.op, d.prescale,
                    d.postscale};
    channel.count = static_cast<size_t>(d.shape[3 * i + 2]);
    nbytes += NodeBucket::nbytes(channel.spec.wire, channel.count);
    channel.open = !shares_memory;
  }
  if (!shares_memory || count == 0) return nullptr;
  return std::make_unique<Opening>(*this, first, count, nbytes, std::move(ticket));
}

Channels::Run Channels::start(ChannelSubmission submission) {
  const uint32_t number = submission.channel;
  const Channel& channel = channels_.at(number);
  ++started_[number];
  Run run{nullptr, std::move(submission.keep)};
  if (channel.on_node) {
    const auto plan = plans_.find(channel.plan);
    if (plan == plans_.end())
      throw Error(ErrorCode::kInternal, "a bucket was started whose memory all ranks had let go");
    run.operation = std::make_unique<AllreduceBucketNode>(plan->second->buckets[channel.number], channel.spec,
                                                          std::move(submission.slots));
    if (run.keep == nullptr) run.keep = plan->second;
  } else {
    run.operation = std::make_unique<Allreduce>(*comm_, *pool_, first_tag_ + static_cast<int>(number), channel.spec,
                                                std::move(submission.slots), submission.storage);
  }
  if (submission.mark != nullptr) {
    std::vector<Staged::Part> parts(1);
    parts[0].loads = std::move(submission.loads);
    parts[0].operation = std::move(run.operation);
    run.operation = std::make_unique<Staged>(submission.mark, std::move(submission.memory), std::move(parts), run.keep);
  }
  return run;
}

Channels::Run Channels::start_neutral(uint32_t channel) {
  return start({channel, {{nullptr, nullptr, channels_.at(channel).count}}, nullptr, nullptr});
}

}  // namespace collective
