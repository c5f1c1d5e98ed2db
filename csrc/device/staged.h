// An operation on arrays on a device by way of page-locked host memory: loaded there, done there like any other,
// stored.
//
// In parts, so that one is loaded while another is on its way between ranks and a third is stored:
//
//     part 0   load | operation | store
//     part 1          load | operation | store        loads and stores each in a stream of the engine's own,
//     part 2                 load | operation | store      operations on the host, one at a time
//
// It starts when the device has reached a mark, behind all that the caller had queued before submitting. (What is
// agreed by name is submitted to the others only then, so it needs none.) It is done when the last byte is stored, so
// whoever has waited may use the arrays on any stream. Marks are polled; if the engine's streams waited for them
// instead, operations would queue up behind the slowest user.
//
// memory traffic:  a copy of N to the host and one back, by the device, besides the operation's on the host
// limits:          page-locked host memory as large as the parts in flight; the device keeps it for the next operation
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/operation.h"
#include "device/device.h"

namespace collective {

class Staged final : public Operation {
 public:
  struct Copy {
    Device* device;
    void* array;  // on the device
    std::byte* host;
    size_t nbytes;
  };
  struct Part {
    std::vector<Copy> loads, stores;
    // What is done on the host. A lane's operations are made in the agreed order, so beforehand (`operation`); others,
    // which may read at once, when the part is loaded (`make`; null where there is nothing to do).
    std::unique_ptr<Operation> operation{};
    std::function<std::unique_ptr<Operation>()> make{};
  };

  // The parts are in `memory`, or in what `keep` keeps; part i where part i - depth was. after: the marks to wait for.
  Staged(std::vector<std::shared_ptr<DeviceMark>> after, std::vector<PinnedMemory> memory, std::vector<Part> parts,
         size_t depth, std::shared_ptr<void> keep = nullptr);
  Step step() override;
  std::string describe() const override;
  bool under_way() const override { return done_ > 0 || (operation_ != nullptr && operation_->under_way()); }
  const std::optional<Error>& failure() const override { return failure_; }
  size_t page_locked() const override;
  void give_up() noexcept override {
    if (operation_ != nullptr) operation_->give_up();
  }

 private:
  using Marks = std::vector<std::shared_ptr<DeviceMark>>;
  // Queues the copies and returns the marks behind them, one for each device.
  static Marks queue(const std::vector<Copy>& copies, bool loads);
  static bool reached(const Marks& marks);

  Marks after_;
  std::shared_ptr<void> keep_;
  std::vector<PinnedMemory> memory_;
  std::vector<Part> parts_;
  size_t depth_;
  std::vector<Marks> loaded_, stored_;  // by part
  std::unique_ptr<Operation> operation_;
  size_t done_ = 0;        // parts whose operation is done
  size_t over_ = 0;        // parts that are stored
  bool queueing_ = false;  // or stopped there by an error
  std::optional<Error> failure_;
};

}  // namespace collective
