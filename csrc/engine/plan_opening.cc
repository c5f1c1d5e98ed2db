#include "engine/plan_opening.h"

#include <utility>

#include "base/log.h"
#include "messages/allreduce_doubling.h"
#include "messages/reports.h"
#include "node/shared_memory_creation.h"

namespace collective {
namespace {

constexpr const char* kCannotTakePart = "its gradients are on several devices, or it has joined";

class OpeningOnNode final : public Operation {
 public:
  OpeningOnNode(PlanContext context, std::shared_ptr<Plan> plan, Device* device, std::shared_ptr<NcclComm> nccl)
      : context_(std::move(context)), plan_(std::move(plan)), nccl_(std::move(nccl)) {
    if (context_.descriptor.device == "cpu") {
      share_memory();
      return;
    }
    std::string why_not = device == nullptr ? kCannotTakePart : device->why_no_kernels();
    if (context_.comm.size() > kMostRanks) why_not = why_of_too_many_ranks();
    size_t nbytes = 0;
    for (const BucketShape& shape : context_.descriptor.buckets) nbytes += DeviceNodeStorage::device_nbytes(shape);
    on_device_ = std::make_unique<DeviceMemoryCreation>(context_.comm, context_.tag, why_not.empty() ? device : nullptr,
                                                        why_not, nbytes);
  }

  Step step() override {
    if (on_device_ != nullptr) {
      const Step step = on_device_->step();
      if (step != Step::kDone) return step;
      device_memory_ = on_device_->take();
      if (device_memory_ == nullptr && context_.comm.rank() == 0)
        log_warning("gradients travel by way of the host, which is slower: " + on_device_->why());
      on_device_ = nullptr;
      share_memory();
      return Step::kMoved;
    }
    const Step step = creation_->step();
    if (step != Step::kDone) return step;
    plan_->memory = creation_->take();
    if (plan_->memory) {
      make_storages();
    } else {
      if (context_.comm.rank() == 0)
        log_warning("gradients travel in MPI messages, which is slower: no shared memory: " + creation_->why());
      open_for_messages(context_, *plan_);
    }
    return Step::kDone;
  }
  std::string describe() const override {
    return on_device_ != nullptr ? on_device_->describe() : creation_->describe();
  }

 private:
  size_t host_nbytes(const BucketShape& shape) const {
    return device_memory_ == nullptr ? NodeStorage::nbytes(shape) : DeviceNodeStorage::host_nbytes(shape);
  }

  void share_memory() {
    size_t nbytes = 0;
    for (const BucketShape& shape : context_.descriptor.buckets) nbytes += host_nbytes(shape);
    creation_ = std::make_unique<SharedMemoryCreation>(context_.comm, context_.tag, nbytes);
  }

  void make_storages() {
    const AllreduceSpec spec = context_.spec();
    const bool nccl_is_here =
        nccl_ != nullptr && device_memory_ != nullptr && nccl_->places() == device_memory_->places();
    size_t offset = 0, device_offset = 0;
    uint32_t number = plan_->first;
    for (const BucketShape& shape : context_.descriptor.buckets) {
      ++number;  // from 1 in the communicator, where 0 is Devices' own
      if (device_memory_ == nullptr) {
        plan_->storages.push_back(std::make_unique<NodeStorage>(spec, shape, *plan_->memory, offset));
      } else {
        plan_->storages.push_back(std::make_unique<DeviceNodeStorage>(spec, shape, *plan_->memory, offset,
                                                                      device_memory_, device_offset,
                                                                      nccl_is_here ? nccl_ : nullptr, number));
        device_offset += DeviceNodeStorage::device_nbytes(shape);
      }
      offset += host_nbytes(shape);
    }
  }

  PlanContext context_;
  std::shared_ptr<Plan> plan_;
  std::shared_ptr<NcclComm> nccl_;
  std::unique_ptr<DeviceMemoryCreation> on_device_;
  std::shared_ptr<DeviceMemory> device_memory_;
  std::unique_ptr<SharedMemoryCreation> creation_;
};

class OpeningOnDevices final : public Operation {
 public:
  OpeningOnDevices(PlanContext context, std::shared_ptr<Plan> plan, Device* device)
      : context_(std::move(context)), plan_(std::move(plan)), reports_(context_.comm, context_.tag) {
    if (device == nullptr) reports_.fail(kCannotTakePart);
    reports_.attempt([&] {
      int tag = context_.tag;
      for (const BucketShape& shape : context_.descriptor.buckets)
        storages_.push_back(
            std::make_unique<DeviceRingStorage>(context_.spec(), shape, context_.comm, context_.pool, tag++, *device));
    });
    reports_.exchange();
  }

  Step step() override {
    if (!reports_.exchanged()) return Step::kIdle;
    if (const std::string why = reports_.failure(); why.empty()) {
      plan_->storages = std::move(storages_);
    } else {
      if (context_.comm.rank() == 0) log_warning("gradients are sent by way of the host: " + why);
      storages_.clear();
      open_for_messages(context_, *plan_);
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
  PlanContext context_;
  std::shared_ptr<Plan> plan_;
  std::vector<std::unique_ptr<BucketStorage>> storages_;
  Reports<Report> reports_;
};

class OpeningOnNodes final : public Operation {
 public:
  OpeningOnNodes(PlanContext context, std::shared_ptr<Plan> plan, const Nodes& nodes)
      : context_(std::move(context)), plan_(std::move(plan)), nodes_(&nodes) {
    size_t nbytes = 0;
    for (const BucketShape& shape : context_.descriptor.buckets) nbytes += NodeStorage::nbytes(shape);
    if (nodes.local.size() == 1)
      plan_->memory = SharedMemoryCreation::of_one_rank(nodes.local, nbytes);
    else
      creation_ = std::make_unique<SharedMemoryCreation>(nodes.local, context_.tag, nbytes);
  }

  Step step() override {
    if (verdict_ == nullptr) {
      if (creation_ != nullptr) {
        const Step step = creation_->step();
        if (step != Step::kDone) return step;
        plan_->memory = creation_->take();
      }
      shares_ = plan_->memory ? 1 : 0;
      verdict_ = std::make_unique<AllreduceDoubling>(context_.comm, context_.pool, context_.tag, &shares_, &all_share_,
                                                     1, Arithmetic{DType::kInt32, ReduceOp::kMin});
      return Step::kMoved;
    }
    const Step step = verdict_->step();
    if (step != Step::kDone) return step;
    if (all_share_ == 1) {
      size_t offset = 0;
      int tag = context_.tag;
      for (const BucketShape& shape : context_.descriptor.buckets) {
        plan_->storages.push_back(std::make_unique<NodesStorage>(context_.spec(), shape, *plan_->memory, offset,
                                                                 *nodes_, context_.comm.size(), context_.pool, tag++));
        offset += NodeStorage::nbytes(shape);
      }
    } else {
      if (shares_ == 0 && nodes_->local.rank() == 0)
        log_warning("gradients travel in MPI messages, which is slower: no shared memory: " + creation_->why());
      plan_->memory.reset();
      open_for_messages(context_, *plan_);
    }
    return Step::kDone;
  }
  std::string describe() const override {
    return verdict_ == nullptr ? (creation_ == nullptr ? "takes memory" : creation_->describe())
                               : "whether all nodes have shared memory: " + verdict_->describe();
  }

 private:
  PlanContext context_;
  std::shared_ptr<Plan> plan_;
  const Nodes* nodes_;
  std::unique_ptr<SharedMemoryCreation> creation_;  // where there is somebody to share with
  int32_t shares_ = 0, all_share_ = 0;
  std::unique_ptr<AllreduceDoubling> verdict_;
};

}  // namespace

std::unique_ptr<Operation> open_on_nodes(PlanContext context, std::shared_ptr<Plan> plan, const Nodes& nodes) {
  return std::make_unique<OpeningOnNodes>(std::move(context), std::move(plan), nodes);
}

void open_for_messages(const PlanContext& context, Plan& plan) {
  int tag = context.tag;
  for (const BucketShape& shape : context.descriptor.buckets)
    plan.storages.push_back(std::make_unique<MessageStorage>(context.spec(), shape, context.comm, context.pool, tag++));
}

std::unique_ptr<Operation> open_on_node(PlanContext context, std::shared_ptr<Plan> plan, Device* device,
                                        std::shared_ptr<NcclComm> nccl) {
  return std::make_unique<OpeningOnNode>(std::move(context), std::move(plan), device, std::move(nccl));
}

std::unique_ptr<Operation> open_on_devices(PlanContext context, std::shared_ptr<Plan> plan, Device* device) {
  return std::make_unique<OpeningOnDevices>(std::move(context), std::move(plan), device);
}

}  // namespace collective
