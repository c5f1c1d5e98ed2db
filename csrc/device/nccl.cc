#include "device/nccl.h"

#include <chrono>
#include <future>
#include <system_error>
#include <thread>
#include <utility>

#include "base/log.h"

namespace collective {
namespace {

constexpr int kSum = 0;  // ncclSum
constexpr auto kLongestEnd = std::chrono::seconds(10);

// ncclDataType_t; -1: it has none.
int nccl_type(DType dtype) {
  switch (dtype) {
    case DType::kInt8: return 0;
    case DType::kUInt8: return 1;
    case DType::kInt32: return 2;
    case DType::kInt64: return 4;
    case DType::kFloat16: return 6;
    case DType::kFloat32: return 7;
    case DType::kFloat64: return 8;
    case DType::kBFloat16: return 9;
    case DType::kUInt16:
    case DType::kInt16:
    case DType::kComplex64:
    case DType::kComplex128:
    case DType::kBool: return -1;
  }
  return -1;  // unreachable: the switch is exhaustive
}

// In a thread of its own: it waits for kernels, and may wait until all ranks have called it. Nobody here can wait for
// that.
std::future<void> abort(const Device& device, void* comm, std::shared_ptr<void> memory = nullptr) noexcept {
  try {
    std::packaged_task<void()> task([&device, comm, memory] {
      const Device::Current current(device);
      nccl().ncclCommAbort(comm);
    });
    std::future<void> over = task.get_future();
    std::thread(std::move(task)).detach();
    return over;
  } catch (const std::system_error&) {
    new std::shared_ptr<void>(memory);  // no more threads: both stay until the process ends
    return {};
  }
}

}  // namespace

Turns::Turns(const SharedMemory& memory, size_t offset)
    : rank_(memory.rank()),
      call_(reinterpret_cast<uint64_t*>(memory.part(0) + offset)),
      taken_(memory, offset + kLineBytes) {}

bool Turns::take(uint32_t what) {
  const uint64_t next = (taken_.own() + 1) << 32 | what;
  if (rank_ == 0) {
    if (!taken_.all_reached(taken_.own())) return false;
    call().store(next, std::memory_order_release);  // pairs with the load below
  } else if (call().load(std::memory_order_acquire) != next) {
    return false;
  }
  taken_.publish(taken_.own() + 1);
  return true;
}

NcclComm::NcclComm(Device& device, void* comm, std::vector<std::string> places, const Turns& turns)
    : device_(&device), comm_(comm), places_(std::move(places)), turns_(turns) {}

bool NcclComm::sums(const AllreduceSpec& spec) {
  const DType dtype = spec.wire;
  if (nccl_type(dtype) < 0 || (spec.op != ReduceOp::kSum && spec.op != ReduceOp::kAverage)) return false;
  if (dtype == DType::kBFloat16 || dtype == DType::kFloat32 || dtype == DType::kFloat64) return true;
  // A factor that is applied first must not leave float16's range, which an average's own does not; integers take none.
  return spec.postscale == 1.0 && (spec.op == ReduceOp::kSum || dtype == DType::kFloat16);
}

bool NcclComm::ready() const {
  if (comm_ == nullptr) throw Error(ErrorCode::kInternal, "NCCL: its communicator has been given up");
  int state = 0;
  nccl().check(nccl().ncclCommGetAsyncError(comm_, &state), "ncclCommGetAsyncError");
  nccl().check(state, "all-reduce");
  return state != kNcclInProgress;
}

void NcclComm::all_reduce(DType dtype, void* place, size_t count) {
  const Device::Current current(*device_);
  nccl().check(nccl().ncclAllReduce(place, place, count, nccl_type(dtype), kSum, comm_, device_->waiting().handle()),
               "ncclAllReduce");
}

void NcclComm::give_up(std::shared_ptr<void> memory) noexcept {
  if (comm_ != nullptr) abort(*device_, std::exchange(comm_, nullptr), std::move(memory));
}

void NcclComm::close() {
  if (comm_ == nullptr) return;
  const std::future<void> over = abort(*device_, std::exchange(comm_, nullptr));
  if (!over.valid() || over.wait_for(kLongestEnd) != std::future_status::ready)
    log_warning("NCCL: its communicator does not end");
}

NcclCreation::NcclCreation(const Comm& comm, int tag, const DeviceMemory& devices, const SharedMemory& memory,
                           size_t offset)
    : comm_(&comm),
      device_(&devices.device()),
      places_(devices.places()),
      turns_(memory, offset),
      verdicts_(memory, offset + Turns::kBytes),
      reports_(comm, tag) {}

NcclCreation::~NcclCreation() { give_up(); }

void NcclCreation::give_up() noexcept {
  if (nccl_comm_ != nullptr) abort(*device_, std::exchange(nccl_comm_, nullptr));
}

// Whether it is connected, or never will be.
bool NcclCreation::connected() {
  for (int rank = 0; rank < comm_->size(); ++rank)
    if (verdicts_.reached(rank, kFailed)) {
      give_up();  // the other rank says why
      return true;
    }
  int state = 0;
  nccl().check(nccl().ncclCommGetAsyncError(nccl_comm_, &state), "ncclCommGetAsyncError");
  nccl().check(state, "ncclCommInitRankConfig");
  return state != kNcclInProgress;
}

Step NcclCreation::step() {
  switch (phase_) {
    case Phase::kStart:
      reports_.attempt([this] {
        if (!nccl().missing.empty()) throw Error(ErrorCode::kInvalid, nccl().missing);
        for (int rank = 0; rank < comm_->size(); ++rank)
          if (rank != comm_->rank() &&
              places_[static_cast<size_t>(rank)] == places_[static_cast<size_t>(comm_->rank())])
            throw Error(ErrorCode::kInvalid, "it shares a device with " + comm_->names().text_of(rank));
        const Device::Current current(*device_);
        if (comm_->rank() == 0) nccl().check(nccl().ncclGetUniqueId(&reports_.own().id), "ncclGetUniqueId");
      });
      reports_.exchange();
      phase_ = Phase::kIds;
      return Step::kMoved;
    case Phase::kIds:
      if (!reports_.exchanged()) return Step::kIdle;
      why_ = reports_.failure();
      if (!why_.empty()) break;
      reports_.attempt([this] {
        const Device::Current current(*device_);
        device_->waiting();  // may fail, and must not once all have connected
        NcclConfig config;
        nccl().check(
            nccl().ncclCommInitRankConfig(&nccl_comm_, comm_->size(), reports_.all()[0].id, comm_->rank(), &config),
            "ncclCommInitRankConfig");
      });
      phase_ = Phase::kConnect;
      return Step::kMoved;
    case Phase::kConnect: {
      bool over = true;
      reports_.attempt([&] { over = connected(); });
      if (!over) return Step::kIdle;
      verdicts_.publish(nccl_comm_ != nullptr && reports_.own().failure[0] == '\0' ? kConnected : kFailed);
      reports_.exchange();
      phase_ = Phase::kVerdicts;
      return Step::kMoved;
    }
    case Phase::kVerdicts:
      if (!reports_.exchanged()) return Step::kIdle;
      why_ = reports_.failure();
      if (!why_.empty()) break;
      made_ = std::make_shared<NcclComm>(*device_, std::exchange(nccl_comm_, nullptr), places_, turns_);
      break;
    case Phase::kDone: break;
  }
  phase_ = Phase::kDone;
  give_up();
  return Step::kDone;
}

std::string NcclCreation::describe() const {
  if (phase_ == Phase::kConnect) return "NCCL: waits for its communicator";
  return "NCCL: waits for rank " + std::to_string(reports_.missing());
}

}  // namespace collective
