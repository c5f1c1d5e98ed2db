// An operation on arrays of a device by way of page-locked host memory: loaded there, done there as any other, stored.
//
// In parts, so that one is loaded while another one is on its way between ranks and a third is stored:
//
//     part 0   load | operation | store
//     part 1          load | operation | store        loads and stores each in a stream of the engine's own,
//     part 2                 load | operation | store      operations on the host, one at a time
//
// It begins when the device has reached a mark: all that the caller had queued before it submitted. (What is agreed by
// name is submitted to the others only then, so it needs none.) It is over when the last byte is stored, so whoever has
// waited may use the arrays on any stream. Marks are looked at, where the engine's streams might wait for them: then
// operations would queue up behind the slowest of their users.
//
// limits:  page-locked host memory as large as the parts that are on their way; its device keeps it for the next
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
    // What is done on the host. A lane's operations are made in the agreed order, so before; others, which may read
    // at once, when the part is loaded (null where there is nothing to do).
    std::unique_ptr<Operation> operation{};
    std::function<std::unique_ptr<Operation>()> make{};
  };

  // The parts are in `memory`, or in what `keep` keeps; part i where part i - depth was. after: the marks that come
  // before.
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
  // Queues the copies and gives the marks behind them, one for each device.
  static Marks queue(const std::vector<Copy>& copies, bool loads);
  static bool reached(const Marks& marks);

  Marks after_;
  std::shared_ptr<void> keep_;
  std::vector<PinnedMemory> memory_;
  std::vector<Part> parts_;
  size_t depth_;
  std::vector<Marks> loaded_, stored_;  // by part
  std::unique_ptr<Operation> operation_;
  size_t done_ = 0;        // parts whose operation is over
  size_t over_ = 0;        // parts that are stored
  bool queueing_ = false;  // or stopped there by an error
  std::optional<Error> failure_;
};

}  // namespace collective
