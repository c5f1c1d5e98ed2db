// Sums between the devices of a node by NCCL, in place of this package's kernels: an option, for ranks that have a
// device each. Packing, unpacking and everything else stay as they are (see allreduce_device.h).
//
// NCCL's kernels wait for each other on the devices, so all ranks must call it in one order, and soon; two ranks that
// call in different orders hang. Here operations start in any order. So a call is made only when all ranks' data is
// there (nobody's device waits for anybody's script), and local rank 0 says which is next (Turns).
//
// Of several communicators, nobody can say in which order their kernels start, and kernels of two that wait for each
// other hang. So there is one, over all ranks; other sets of ranks use the package's kernels, which wait for nobody.
//
// limits:  sums and averages of types that NCCL has; sums of float16 and bfloat16 are rounded wherever NCCL adds, and
//          their order is NCCL's: the same bits on all ranks, but perhaps not in the next release
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/operation.h"
#include "device/device.h"
#include "device/device_memory.h"
#include "device/nccl_library.h"
#include "messages/reports.h"
#include "node/shared_memory.h"
#include "reduce/spec.h"

namespace collective {

// The order in which the ranks of a node take things: that in which local rank 0 comes to them.
class Turns {
 public:
  static constexpr size_t kBytes = 2 * kLineBytes;
  // At `offset` of every part of `memory`, zero there, which must outlive this.
  Turns(const SharedMemory& memory, size_t offset);
  // Whether it is the turn of `what`, which is then taken: this rank must act on it at once, for the others will. To be
  // asked only when every rank is ready for it, or soon will be whatever the others do.
  bool take(uint32_t what);

 private:
  std::atomic_ref<uint64_t> call() const { return std::atomic_ref<uint64_t>(*call_); }
  int rank_;
  uint64_t* call_;  // of local rank 0: how many there were, and the last one, 32 bits each
  Counters taken_;
};

// Over all ranks, which are on one node and have devices of their own. If destroyed without close(), it stays until the
// process ends.
class NcclComm {
 public:
  // comm: a communicator that is ready. places: of the ranks' devices.
  NcclComm(Device& device, void* comm, std::vector<std::string> places, const Turns& turns);
  NcclComm(const NcclComm&) = delete;
  NcclComm& operator=(const NcclComm&) = delete;

  // Whether NCCL can sum this; all factors are applied before.
  static bool sums(const AllreduceSpec& spec);
  const std::vector<std::string>& places() const { return places_; }
  Turns& turns() { return turns_; }
  // Whether NCCL has accepted the last call; a mark tells when that is complete. Throws what has gone wrong.
  bool ready() const;
  // Queues the sum of `count` elements of every rank, in place; they must be there by now. Only when ready, and when it
  // is this one's turn.
  void all_reduce(DType dtype, void* place, size_t count);
  // When NCCL has accepted the last call: what tells when that is complete.
  std::shared_ptr<DeviceMark> mark() { return device_->waiting().mark(); }
  // Ends what is in flight, soon, and keeps its memory until then; it cannot be used afterwards.
  void give_up(std::shared_ptr<void> memory) noexcept;
  // Ends it, when nothing is in flight. Collective.
  void close();

 private:
  Device* device_;
  void* comm_;
  std::vector<std::string> places_;
  Turns turns_;
};

// Makes one, without blocking, except for what NCCL does of its own accord when it starts. `tag` belongs to this
// creation alone while it lasts.
class NcclCreation final : public Operation {
 public:
  // What it takes of each part of the node's memory.
  static constexpr size_t kBytes = Turns::kBytes + kLineBytes;
  // devices: tells where they are. At `offset` of every part of `memory`, zero there.
  NcclCreation(const Comm& comm, int tag, const DeviceMemory& devices, const SharedMemory& memory, size_t offset);
  ~NcclCreation() override;

  Step step() override;
  std::string describe() const override;

  // Once done: the communicator, or why there is none, alike on all ranks.
  std::shared_ptr<NcclComm> take() { return std::move(made_); }
  const std::string& why() const { return why_; }

 private:
  struct Report {
    NcclId id;
    char failure[300];
  };
  enum class Phase { kStart, kIds, kConnect, kVerdicts, kDone };
  enum Verdict : uint64_t { kConnected = 1, kFailed = 2 };
  bool connected();
  void give_up() noexcept;

  const Comm* comm_;
  Device* device_;
  std::vector<std::string> places_;
  Turns turns_;
  Counters verdicts_;  // seen by ranks that are still connecting
  Reports<Report> reports_;
  Phase phase_ = Phase::kStart;
  void* nccl_comm_ = nullptr;
  std::shared_ptr<NcclComm> made_;
  std::string why_;
};

}  // namespace collective
