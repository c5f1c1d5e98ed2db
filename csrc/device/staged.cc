#include "device/staged.h"

#include <algorithm>
#include <utility>

namespace collective {

Staged::Staged(std::vector<std::shared_ptr<DeviceMark>> after, std::vector<PinnedMemory> memory,
               std::vector<Part> parts, size_t depth, std::shared_ptr<void> keep)
    : after_(std::move(after)),
      keep_(std::move(keep)),
      memory_(std::move(memory)),
      parts_(std::move(parts)),
      depth_(depth) {}

size_t Staged::page_locked() const {
  size_t nbytes = 0;
  for (const PinnedMemory& memory : memory_) nbytes += memory.nbytes();
  return nbytes;
}

Staged::Marks Staged::queue(const std::vector<Copy>& copies, bool loads) {
  std::vector<Device*> devices;
  for (const Copy& copy : copies) {
    if (loads)
      copy.device->loads().copy(copy.host, copy.array, copy.nbytes);
    else
      copy.device->stores().copy(copy.array, copy.host, copy.nbytes);
    if (std::find(devices.begin(), devices.end(), copy.device) == devices.end()) devices.push_back(copy.device);
  }
  Marks marks;
  for (Device* device : devices) marks.push_back((loads ? device->loads() : device->stores()).mark());
  return marks;
}

bool Staged::reached(const Marks& marks) {
  return std::all_of(marks.begin(), marks.end(), [](const auto& mark) { return mark->reached(); });
}

Step Staged::step() {
  if (!reached(after_)) return Step::kIdle;
  after_.clear();
  bool moved = false;
  for (; over_ < done_ && reached(stored_[over_]); ++over_) moved = true;
  for (; loaded_.size() < std::min(parts_.size(), over_ + depth_); moved = true) {
    queueing_ = true;
    loaded_.push_back(queue(parts_[loaded_.size()].loads, true));
    queueing_ = false;
  }
  if (over_ == parts_.size()) return Step::kDone;
  if (done_ == parts_.size() || (operation_ == nullptr && (done_ == loaded_.size() || !reached(loaded_[done_]))))
    return moved ? Step::kMoved : Step::kIdle;
  Part& part = parts_[done_];
  if (operation_ == nullptr) operation_ = part.operation ? std::move(part.operation) : part.make();
  const Step step = operation_ == nullptr ? Step::kDone : operation_->step();
  if (step != Step::kDone) return moved ? Step::kMoved : step;
  if (operation_ != nullptr && operation_->failure()) {
    failure_ = operation_->failure();
    operation_.reset();
    return Step::kDone;
  }
  operation_.reset();
  queueing_ = true;
  stored_.push_back(queue(part.stores, false));
  queueing_ = false;
  ++done_;
  return Step::kMoved;
}

std::string Staged::describe() const {
  const std::string part = "part " + std::to_string(std::min(done_ + 1, parts_.size())) + " of " +
                           std::to_string(parts_.size()) + " by way of the host: ";
  if (operation_ != nullptr) return part + operation_->describe();
  return part + (done_ == parts_.size() ? "waits for the device to store it"
                                        : "waits for the device: for what its user queued before, or to load it");
}

}  // namespace collective
