#include "engine/devices.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <utility>

#include "base/log.h"
#include "device/device_memory.h"
#include "messages/reports.h"

namespace collective {
namespace {

// Of device memory, each of two places: what of a long array is on its way between the ranks. (Not measured on a device.)
constexpr size_t kPlaceBytes = size_t{16} << 20, kPlaces = 2;

constexpr const char* kWay = "reduced by the devices, in memory that they share";

std::atomic<Device*> sent_from{nullptr};

}  // namespace

Device* Devices::whose_memory_is_sent() { return sent_from.load(std::memory_order_relaxed); }

bool has_kernels(const Descriptor& d) {
  return (d.kind == Kind::kAllreduce || d.kind == Kind::kReduce) && d.op != ReduceOp::kAdasum && !is_bitwise(d.op);
}

// Memory of the devices of a node.
class Devices::Sharing final : public Operation {
 public:
  Sharing(Devices& devices, int tag, Device* device, std::string why_not)
      : devices_(&devices),
        tag_(tag),
        creation_(*devices.comm_, tag, device, std::move(why_not), kPlaces * kPlaceBytes) {}

  Step step() override {
    if (nccl_ != nullptr) {
      const Step step = nccl_->step();
      if (step == Step::kDone) devices_->know_nccl(nccl_->take(), nccl_->why());
      return step;
    }
    const Step step = creation_.step();
    if (step != Step::kDone) return step;
    if (creation_.not_yet()) {
      devices_->state_ = State::kNotYet;
      return Step::kDone;
    }
    const std::shared_ptr<DeviceMemory> memory = creation_.take();
    if (memory == nullptr) {
      devices_->know_host_way(creation_.why());
      return Step::kDone;
    }
    devices_->way_ = kWay;
    const SharedMemory alone(0, {devices_->alone_.data()}, devices_->alone_.nbytes());
    devices_->staging_ = std::make_unique<DeviceStaging>(
        memory, 0, kPlaceBytes, kPlaces, devices_->memory_ != nullptr ? *devices_->memory_ : alone, devices_->offset_);
    if (!devices_->wants_nccl_ || devices_->memory_ == nullptr) {
      devices_->state_ = State::kKnown;
      return Step::kDone;
    }
    nccl_ = std::make_unique<NcclCreation>(*devices_->comm_, tag_, *memory, *devices_->memory_,
                                           devices_->offset_ + DeviceStaging::kCounterBytes);
    return Step::kMoved;
  }
  std::string describe() const override { return nccl_ != nullptr ? nccl_->describe() : creation_.describe(); }

 private:
  Devices* devices_;
  int tag_;
  DeviceMemoryCreation creation_;
  std::unique_ptr<NcclCreation> nccl_;
};

// Whether all ranks' MPI sends memory of devices.
class Devices::Messages final : public Operation {
 public:
  Messages(Devices& devices, int tag, Device* device, const std::string& why_no_kernels)
      : devices_(&devices), device_(device), reports_(*devices.comm_, tag) {
    Report& own = reports_.own();
    char host[256] = {};
    gethostname(host, sizeof host - 1);
    own.node = std::hash<std::string>()(host);
    own.absent = device == nullptr;
    const Device::Messages found = device == nullptr ? Device::Messages{} : device->messages();
    own.tried = found.tried;
    reports_.fail(device == nullptr ? "it has no array on a device yet"
                                    : (why_no_kernels.empty() ? found.why_not : why_no_kernels));
    reports_.attempt([&] {
      for (size_t i = 0; i < kPlaces; ++i) places_.push_back(std::make_shared<DeviceRingPlace>(*device, kPlaceBytes));
    });
    reports_.exchange();
  }

  Step step() override {
    if (!reports_.exchanged()) return Step::kIdle;
    const std::vector<Report>& all = reports_.all();
    if (std::any_of(all.begin(), all.end(), [](const Report& r) { return r.absent; })) {
      devices_->state_ = State::kNotYet;
      return Step::kDone;
    }
    std::string why = reports_.failure();
    // One rank of a node tries for all of its ranks; in a set of ranks it may be missing.
    for (const Report& rank : all)
      if (why.empty() &&
          std::none_of(all.begin(), all.end(), [&](const Report& r) { return r.node == rank.node && r.tried; }))
        why = "of some node no rank takes part that has tried whether MPI sends memory of devices";
    if (!why.empty()) {
      devices_->know_host_way(why);
      return Step::kDone;
    }
    devices_->state_ = State::kKnown;
    devices_->way_ = "sent by MPI from the memory of devices, and reduced there";
    devices_->places_ = std::move(places_);
    sent_from = device_;
    return Step::kDone;
  }
  std::string describe() const override {
    return "devices: waits for rank " + std::to_string(reports_.missing()) + " to tell what its MPI sends";
  }

 private:
  struct Report {
    uint64_t node;
    bool absent, tried;
    char failure[300];
  };
  Devices* devices_;
  Device* device_;
  std::vector<std::shared_ptr<DeviceRingPlace>> places_;
  Reports<Report> reports_;
};

bool Devices::is_wanted_by(const Descriptor& d) const {
  // Buckets on a node have device memory of their own, and need nothing here but NCCL.
  return state_ == State::kUnknown && d.device != "cpu" &&
         (has_kernels(d) || (d.kind == Kind::kBuckets && (memory_ == nullptr || wants_nccl_)));
}

std::unique_ptr<Operation> Devices::look(int tag, Device* device) {
  state_ = State::kLooking;
  std::string why_not = device == nullptr ? "" : device->why_no_kernels();
  if (comm_->size() > kMostRanks && memory_ != nullptr) why_not = why_of_too_many_ranks();
  if (comm_->size() == 1) {
    alone_ = Buffer(DeviceStaging::kCounterBytes);
    std::memset(alone_.data(), 0, alone_.nbytes());
  } else if (memory_ == nullptr) {
    if (wants_nccl_) warn_of_nccl("the ranks are on several nodes, or share no memory");
    return std::make_unique<Messages>(*this, tag, device, why_not);
  }
  return std::make_unique<Sharing>(*this, tag, why_not.empty() ? device : nullptr, why_not);
}

void Devices::know_host_way(const std::string& why_not) {
  state_ = State::kKnown;
  way_ = "reduced by way of the host, which is slower: " + why_not;
  static std::atomic<bool> told{false};  // one warning for all process sets: the reason is that of the node
  if (comm_->size() > 1 && comm_->rank() == 0 && !told.exchange(true)) log_warning("arrays on devices are " + way_);
}

void Devices::know_nccl(std::shared_ptr<NcclComm> nccl, const std::string& why_not) {
  state_ = State::kKnown;
  nccl_ = std::move(nccl);
  if (nccl_ != nullptr) {
    staging_->use(nccl_, 0);
    way_ = std::string(kWay) + ", sums by NCCL " + collective::nccl().version;
    return;
  }
  way_ = std::string(kWay) + "; not by NCCL: " + why_not;
  warn_of_nccl(why_not);
}

void Devices::warn_of_nccl(const std::string& why_not) const {
  static std::atomic<bool> told{false};
  if (comm_->rank() == 0 && !told.exchange(true)) log_warning("COLLECTIVE_NCCL=1, but NCCL is not used: " + why_not);
}

}  // namespace collective
