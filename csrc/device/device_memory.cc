#include "device/device_memory.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <utility>

namespace collective {

DeviceMemory::DeviceMemory(Device& device, int rank, const Device::Block& own, std::vector<std::byte*> parts,
                           std::vector<std::string> places)
    : device_(&device), rank_(rank), pid_(getpid()), own_(own), parts_(std::move(parts)), places_(std::move(places)) {}

DeviceMemory::~DeviceMemory() {
  if (getpid() != pid_) return;
  for (std::byte* part : parts_) {
    if (part == nullptr || part == own_.data) continue;
    try {
      device_->unmap(part);
    } catch (const Error&) {
      // The driver has ended, and its mappings with it.
    }
  }
  device_->take_back(own_);
}

DeviceMemoryCreation::DeviceMemoryCreation(const Comm& comm, int tag, Device* device, std::string why_not,
                                           size_t nbytes)
    : comm_(&comm),
      device_(device),
      why_not_(std::move(why_not)),
      nbytes_(nbytes),
      reports_(comm, tag),
      parts_(static_cast<size_t>(comm.size())) {}

DeviceMemoryCreation::~DeviceMemoryCreation() { give_back(); }

void DeviceMemoryCreation::give_back() noexcept {
  if (own_.data != nullptr) DeviceMemory(*device_, comm_->rank(), own_, std::move(parts_), {});
  own_ = {};
}

void DeviceMemoryCreation::reserve() {
  reports_.own().absent = device_ == nullptr && why_not_.empty();
  if (device_ == nullptr)
    throw Error(ErrorCode::kInvalid, why_not_.empty() ? "it has no array on a device yet" : why_not_);
  own_ = device_->lend(nbytes_ + kCookieBytes);
  parts_[static_cast<size_t>(comm_->rank())] = own_.data;
  Report& report = reports_.own();
  std::snprintf(report.place, sizeof report.place, "%s", Device::look_up(device_->number()).second.c_str());
  if (comm_->size() > 1) {
    device_->share(own_);
    report.handle = *own_.handle;
  }
  std::random_device random;
  for (std::byte& byte : report.cookie) byte = static_cast<std::byte>(random());
  cookies_ = device_->pinned(kCookieBytes * static_cast<size_t>(comm_->size()));
  std::memcpy(cookies_.data(), report.cookie, kCookieBytes);
  device_->stores().copy(own_.data + nbytes_, cookies_.data(), kCookieBytes);
  copied_ = device_->stores().mark();
}

void DeviceMemoryCreation::map() {
  for (size_t rank = 0; rank < parts_.size(); ++rank)
    if (parts_[rank] == nullptr) parts_[rank] = device_->map(reports_.all()[rank].handle);
  for (size_t rank = 0; rank < parts_.size(); ++rank)
    device_->loads().copy(cookies_.data() + rank * kCookieBytes, parts_[rank] + nbytes_, kCookieBytes);
  copied_ = device_->loads().mark();
}

void DeviceMemoryCreation::compare() {
  for (size_t rank = 0; rank < parts_.size(); ++rank)
    if (std::memcmp(cookies_.data() + rank * kCookieBytes, reports_.all()[rank].cookie, kCookieBytes) != 0)
      throw Error(ErrorCode::kInternal, "the memory it has mapped for rank " +
                                            std::to_string(comm_->names().job_rank(static_cast<int>(rank))) +
                                            " is not that rank's");
}

Step DeviceMemoryCreation::step() {
  bool copied = true;
  if (phase_ == Phase::kWrite || phase_ == Phase::kRead)
    reports_.attempt([&] { copied = copied_ == nullptr || copied_->reached(); });
  switch (phase_) {
    case Phase::kReserve:
      reports_.attempt([this] { reserve(); });
      phase_ = Phase::kWrite;
      return Step::kMoved;
    case Phase::kWrite:
      if (!copied) return Step::kIdle;
      reports_.exchange();
      phase_ = Phase::kOffers;
      return Step::kMoved;
    case Phase::kOffers:
      if (!reports_.exchanged()) return Step::kIdle;
      why_ = reports_.failure();
      not_yet_ = std::any_of(reports_.all().begin(), reports_.all().end(), [](const Report& r) { return r.absent; });
      if (!why_.empty()) break;
      reports_.attempt([this] { map(); });
      phase_ = Phase::kRead;
      return Step::kMoved;
    case Phase::kRead:
      if (!copied) return Step::kIdle;
      reports_.attempt([this] { compare(); });
      reports_.exchange();
      phase_ = Phase::kVerdicts;
      return Step::kMoved;
    case Phase::kVerdicts:
      if (!reports_.exchanged()) return Step::kIdle;
      why_ = reports_.failure();
      if (!why_.empty()) break;
      {
        std::vector<std::string> places;
        for (const Report& report : reports_.all()) places.emplace_back(report.place);
        memory_ = std::make_unique<DeviceMemory>(*device_, comm_->rank(), own_, std::move(parts_), std::move(places));
      }
      own_ = {};
      break;
    case Phase::kDone: break;
  }
  phase_ = Phase::kDone;
  give_back();
  return Step::kDone;
}

std::string DeviceMemoryCreation::describe() const {
  if (phase_ == Phase::kOffers || phase_ == Phase::kVerdicts)
    return "memory of devices: waits for rank " + std::to_string(reports_.missing()) +
           (phase_ == Phase::kOffers ? " to offer its part" : " to map the others' parts");
  return "memory of devices: waits for device " + std::to_string(device_ != nullptr ? device_->number() : -1);
}

}  // namespace collective
