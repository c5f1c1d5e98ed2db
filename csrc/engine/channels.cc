#include "engine/channels.h"

#include <algorithm>
#include <utility>

#include "base/log.h"
#include "device/allreduce_device.h"
#include "device/allreduce_device_ring.h"

namespace collective {

Channels::Channels(const Comm& comm, BufferPool& pool, int first_tag)
    : comm_(&comm), pool_(&pool), first_tag_(first_tag) {}

class Channels::Opening final : public Operation {
 public:
  Opening(Channels& channels, std::shared_ptr<Plan> plan, size_t count, std::shared_ptr<Ticket> ticket, bool on_devices,
          Device* device, std::shared_ptr<NcclComm> nccl)
      : channels_(&channels),
        plan_(std::move(plan)),
        first_(plan_->first),
        count_(count),
        ticket_(std::move(ticket)),
        nccl_(std::move(nccl)) {
    size_t nbytes = 0;
    for (size_t i = 0; i < count_; ++i) nbytes += device_nbytes(channel(i));
    if (on_devices) {
      std::string why_not = device == nullptr ? "its gradients are on several devices, or it has joined" : "";
      if (device != nullptr && !device->why_no_kernels().empty()) why_not = device->why_no_kernels();
      if (channels.comm_->size() > kMostRanks) why_not = why_of_too_many_ranks();
      on_device_ = std::make_unique<DeviceMemoryCreation>(*channels.comm_, tag(), why_not.empty() ? device : nullptr,
                                                          why_not, nbytes);
    } else {
      share_memory();
    }
  }

  Step step() override {
    if (on_device_ != nullptr) {
      const Step step = on_device_->step();
      if (step != Step::kDone) return step;
      device_memory_ = on_device_->take();
      if (device_memory_ == nullptr && channels_->comm_->rank() == 0)
        log_warning("gradients travel by way of the host, which is slower: " + on_device_->why());
      on_device_ = nullptr;
      share_memory();
      return Step::kMoved;
    }
    const Step step = creation_->step();
    if (step != Step::kDone) return step;
    for (size_t i = 0; i < count_; ++i) channel(i).open = true;
    plan_->memory = creation_->take();
    if (!plan_->memory) {
      if (channels_->comm_->rank() == 0)
        log_warning("gradients travel in MPI messages, which is slower: no shared memory: " + creation_->why());
      return Step::kDone;
    }
    size_t offset = 0, device_offset = 0;
    for (size_t i = 0; i < count_; ++i) {
      Channel& channel = this->channel(i);
      plan_->buckets.emplace_back(*plan_->memory, offset, channel.spec.wire, shared_count(channel));
      ticket_->buckets.emplace_back(plan_, &plan_->buckets.back());
      if (device_memory_ != nullptr) {
        const size_t counters_at = offset + NodeBucket::nbytes(channel.spec.wire, shared_count(channel));
        plan_->on_device.emplace_back(device_memory_, device_offset, device_nbytes(channel), 1, *plan_->memory,
                                      counters_at);
        if (nccl_ != nullptr && nccl_->places() == device_memory_->places())
          plan_->on_device.back().use(nccl_, first_ + static_cast<uint32_t>(i) + 1);
        ticket_->on_device.emplace_back(plan_, plan_->on_device.back().own());
        device_offset += device_nbytes(channel);
        channel.on_device = true;
      }
      offset += shared_nbytes(channel);
      channel.on_node = true;
    }
    return Step::kDone;
  }
  std::string describe() const override {
    return on_device_ != nullptr ? on_device_->describe() : creation_->describe();
  }

 private:
  static constexpr size_t kDeviceLine = 512;  // as the allocators of devices align

  Channel& channel(size_t i) { return channels_->channels_[first_ + i]; }
  int tag() const { return channels_->first_tag_ + static_cast<int>(first_); }
  static size_t device_nbytes(const Channel& channel) {
    return round_up(std::max(channel.count, size_t{1}) * size_of(channel.spec.wire), kDeviceLine);
  }
  // Of the node's memory.
  size_t shared_count(const Channel& channel) const {
    return (device_memory_ == nullptr ? channel.count : 0) + channel.flags;
  }
  size_t shared_nbytes(const Channel& channel) const {
    return NodeBucket::nbytes(channel.spec.wire, shared_count(channel)) +
           (device_memory_ == nullptr ? 0 : DeviceStaging::kCounterBytes);
  }

  void share_memory() {
    size_t nbytes = 0;
    for (size_t i = 0; i < count_; ++i) nbytes += shared_nbytes(channel(i));
    creation_ = std::make_unique<SharedMemoryCreation>(*channels_->comm_, tag(), nbytes);
  }

  Channels* channels_;
  std::shared_ptr<Plan> plan_;
  uint32_t first_;
  size_t count_;
  std::shared_ptr<Ticket> ticket_;
  std::shared_ptr<NcclComm> nccl_;
  std::unique_ptr<DeviceMemoryCreation> on_device_;
  std::shared_ptr<DeviceMemory> device_memory_;
  std::unique_ptr<SharedMemoryCreation> creation_;
};

std::shared_ptr<DeviceRingPlace> Channels::make_place(Device& device, const Channel& channel) {
  return std::make_shared<DeviceRingPlace>(device, std::max(channel.count, size_t{1}) * size_of(channel.spec.wire));
}

// Where messages go from device to device: a bucket there on every rank.
class Channels::OpeningOnDevices final : public Operation {
 public:
  OpeningOnDevices(Channels& channels, uint32_t first, size_t count, std::shared_ptr<Ticket> ticket, Device* device,
                   Device* sends)
      : channels_(&channels),
        first_(first),
        count_(count),
        device_(device),
        ticket_(std::move(ticket)),
        reports_(*channels.comm_, channels.first_tag_ + static_cast<int>(first)) {
    if (device == nullptr || device != sends) reports_.fail("its gradients are on several devices, or it has joined");
    reports_.attempt([&] {
      for (size_t i = 0; i < count; ++i) places_.push_back(make_place(*device, channels.channels_[first + i]));
    });
    reports_.exchange();
  }

  Step step() override {
    if (!reports_.exchanged()) return Step::kIdle;
    const std::string why = reports_.failure();
    if (!why.empty()) {
      if (channels_->comm_->rank() == 0) log_warning("gradients are sent by way of the host: " + why);
      places_.clear();
    }
    for (size_t i = 0; i < count_; ++i) channels_->channels_[first_ + i].open = true;
    for (size_t i = 0; i < places_.size(); ++i) {
      Channel& channel = channels_->channels_[first_ + i];
      channel.on_device = true;
      channel.device = device_;
      channel.place = places_[i];
      ticket_->on_device.emplace_back(places_[i], places_[i]->data());
    }
    return Step::kDone;
  }
  std::string describe() const override {
    return "buckets on devices: waits for rank " + std::to_string(reports_.missing()) + " to make its own";
  }

 private:
  struct Report {
    char failure[300];
  };
  Channels* channels_;
  uint32_t first_;
  size_t count_;
  Device* device_;
  std::shared_ptr<Ticket> ticket_;
  std::vector<std::shared_ptr<DeviceRingPlace>> places_;
  Reports<Report> reports_;
};

// A bucket's run on devices: tensors there, then flags on the host, for both may be messages of one tag.
class Channels::OnDevice final : public Operation {
 public:
  OnDevice(std::unique_ptr<Operation> tensors, std::unique_ptr<Operation> flags)
      : tensors_(std::move(tensors)), flags_(std::move(flags)) {}

  Step step() override {
    if (tensors_ == nullptr) return flags_->step();
    const Step step = tensors_->step();
    if (step != Step::kDone) return step;
    tensors_ = nullptr;
    return Step::kMoved;
  }
  std::string describe() const override { return tensors_ != nullptr ? tensors_->describe() : flags_->describe(); }

 private:
  std::unique_ptr<Operation> tensors_, flags_;
};

std::unique_ptr<Operation> Channels::open(uint32_t first, const Descriptor& d, std::shared_ptr<Ticket> ticket,
                                          bool shares_memory, Device* device, Device* sends,
                                          const std::shared_ptr<NcclComm>& nccl) {
  const size_t count = d.channel_count();
  const bool sends_from_devices = !shares_memory && d.device != "cpu" && sends != nullptr;
  channels_.resize(std::max(channels_.size(), first + count));
  started_.resize(channels_.size());
  ticket->channel = first;
  if (count == 0) return nullptr;
  const auto plan = std::make_shared<Plan>();
  plan->first = first;
  plans_[++opened_] = plan;
  ticket->plan = plan;
  for (size_t i = 0; i < count; ++i) {
    Channel& channel = channels_[first + i] = Channel{};
    const int64_t* const extents = &d.shape[Descriptor::kExtents * i];
    channel.spec = {static_cast<DType>(extents[0]), static_cast<DType>(extents[1]), d.op, d.prescale, d.postscale};
    channel.count = static_cast<size_t>(extents[2]);
    channel.flags = static_cast<size_t>(extents[3]);
    channel.plan = opened_;
    channel.number = i;
    channel.open = !shares_memory && !sends_from_devices;
  }
  if (sends_from_devices)
    return std::make_unique<OpeningOnDevices>(*this, first, count, std::move(ticket), device, sends);
  if (!shares_memory) return nullptr;
  return std::make_unique<Opening>(*this, plan, count, std::move(ticket), d.device != "cpu", device, nccl);
}

Channels::Run Channels::start(ChannelSubmission submission) {
  const uint32_t number = submission.channel;
  const Channel& channel = channels_.at(number);
  ++started_[number];
  AllreduceSpec spec = channel.spec;
  spec.dtype = submission.dtype;
  Run run{nullptr, std::move(submission.keep)};
  const int tag = first_tag_ + static_cast<int>(number);
  const auto found = plans_.find(channel.plan);
  if (found == plans_.end()) throw Error(ErrorCode::kInternal, "a bucket was started whose plan all ranks had let go");
  std::vector<Slot> flags;
  if (channel.on_device) {
    flags.push_back(submission.slots.back());
    submission.slots.pop_back();
  }
  const std::shared_ptr<Plan>& plan = found->second;
  if (run.keep == nullptr) run.keep = plan;
  if (channel.on_node) {
    NodeBucket& bucket = plan->buckets[channel.number];
    if (channel.on_device) {
      run.operation = std::make_unique<OnDevice>(
          std::make_unique<AllreduceDevice>(plan->on_device[channel.number], spec, std::move(submission.slots),
                                            std::move(submission.marks)),
          std::make_unique<AllreduceBucketNode>(bucket, spec, std::move(flags)));
      return run;
    }
    run.operation = std::make_unique<AllreduceBucketNode>(bucket, spec, std::move(submission.slots));
  } else if (channel.on_device) {
    std::shared_ptr<DeviceRingPlace> place = channel.place.lock();
    if (place == nullptr) {  // the script has let it go, and has joined
      place = make_place(*channel.device, channel);
      channels_[number].place = place;
    }
    run.operation = std::make_unique<OnDevice>(
        std::make_unique<AllreduceDeviceRing>(*comm_, *pool_, tag, std::move(place), spec, std::move(submission.slots),
                                              std::move(submission.marks)),
        std::make_unique<Allreduce>(*comm_, *pool_, tag, spec, std::move(flags), submission.storage));
    return run;
  } else {
    run.operation =
        std::make_unique<Allreduce>(*comm_, *pool_, tag, spec, std::move(submission.slots), submission.storage);
  }
  if (!submission.marks.empty()) {
    std::vector<Staged::Part> parts(1);
    parts[0].loads = std::move(submission.loads);
    parts[0].operation = std::move(run.operation);
    run.operation = std::make_unique<Staged>(std::move(submission.marks), std::move(submission.memory),
                                             std::move(parts), 1, run.keep);
  }
  return run;
}

std::vector<uint32_t> Channels::take_let_go() {
  Device::let_go();  // what has been fetched by now
  std::vector<uint32_t> firsts;
  for (const auto& [number, plan] : plans_) {
    if (plan->told || plan.use_count() > 1) continue;  // once 1, it stays: only a holder can make another
    plan->told = true;
    firsts.push_back(plan->first);
  }
  return firsts;
}

void Channels::release(uint32_t first) {
  const uint64_t plan = channels_.at(first).plan;
  plans_.erase(plan);
  for (size_t i = first; i < channels_.size() && channels_[i].plan == plan; ++i) channels_[i].open = false;
}

Channels::Run Channels::start_neutral(uint32_t number) {
  const Channel& channel = channels_.at(number);
  return start({number,
                channel.spec.dtype,
                {{nullptr, nullptr, channel.count}, {nullptr, nullptr, channel.flags}},
                nullptr,
                nullptr});
}

}  // namespace collective
