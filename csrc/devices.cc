#include "devices.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <utility>

#include "device_memory.h"
#include "log.h"
#include "reports.h"

namespace collective {
namespace {

// Of device memory, each of two places: what of a long array is on its way between the ranks. (Not measured on a device.)
constexpr size_t kPlaceBytes = size_t{16} << 20, kPlaces = 2;

std::atomic<Device*> sent_from{nullptr};

}  // namespace

Device* Devices::whose_memory_is_sent() { return sent_from.load(std::memory_order_relaxed); }

bool has_kernels(const Descriptor& d) {
  return (d.kind == Kind::kAllreduce || d.kind == Kind::kReduce) && d.op != ReduceOp::kAdasum;
}

// Memory of the devices of a node.
class Devices::Sharing final : public Operation {
 public:
  Sharing(Devices& devices, int tag, Device* device, std::string why_not)
      : devices_(&devices), creation_(*devices.comm_, tag, device, std::move(why_not), kPlaces * kPlaceBytes) {}

  Step step() override {
    const Step step = creation_.step();
    if (step != Step::kDone) return step;
    if (creation_.not_yet()) {
      devices_->state_ = State::kNotYet;
      return Step::kDone;
    }
    devices_->know(creation_.why());
    std::shared_ptr<DeviceMemory> memory = creation_.take();
    if (memory == nullptr) return Step::kDone;
    devices_->way_ = "reduced by the devices, in memory that they share";
    const SharedMemory alone(0, {devices_->alone_.data()}, devices_->alone_.nbytes());
    devices_->staging_ =
        std::make_unique<DeviceStaging>(std::move(memory), 0, kPlaceBytes, kPlaces,
                                        devices_->memory_ != nullptr ? *devices_->memory_ : alone, devices_->offset_);
    return Step::kDone;
  }
  std::string describe() const override { return creation_.describe(); }

 private:
  Devices* devices_;
  DeviceMemoryCreation creation_;
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
    std::string why = reports_.failure("rank ");
    // One rank of a node tries for all of its ranks; in a set of ranks it may be missing.
    for (const Report& rank : all)
      if (why.empty() &&
          std::none_of(all.begin(), all.end(), [&](const Report& r) { return r.node == rank.node && r.tried; }))
        why = "of some node no rank takes part that has tried whether MPI sends memory of devices";
    devices_->know(why);
    if (!why.empty()) return Step::kDone;
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
  // Channels on a node bring memory of their own.
  return state_ == State::kUnknown && d.device != "cpu" &&
         (has_kernels(d) || (d.kind == Kind::kChannel && memory_ == nullptr));
}

std::unique_ptr<Operation> Devices::look(int tag, Device* device) {
  state_ = State::kLooking;
  std::string why_not = device == nullptr ? "" : device->why_no_kernels();
  if (comm_->size() > kMostRanks && memory_ != nullptr) why_not = why_of_too_many_ranks();
  if (comm_->size() == 1) {
    alone_ = Buffer(kCounterBytes);
    std::memset(alone_.data(), 0, alone_.nbytes());
  } else if (memory_ == nullptr) {
    return std::make_unique<Messages>(*this, tag, device, why_not);
  }
  return std::make_unique<Sharing>(*this, tag, why_not.empty() ? device : nullptr, why_not);
}

// Why the ranks' devices do nothing together; empty: they do.
void Devices::know(const std::string& why_not) {
  state_ = State::kKnown;
  if (why_not.empty()) return;
  way_ = "reduced by way of the host, which is slower: " + why_not;
  static std::atomic<bool> told{false};  // one warning for all process sets: the reason is that of the node
  if (comm_->size() > 1 && comm_->rank() == 0 && !told.exchange(true)) log_warning("arrays on devices are " + way_);
}

}  // namespace collective
