#include "engine/plans.h"

#include <algorithm>
#include <utility>

#include "engine/ledger.h"
#include "engine/plan_opening.h"

namespace collective {

std::unique_ptr<Operation> Plans::open(uint32_t first, const Descriptor& descriptor, Ticket& ticket, bool on_node,
                                       Device* device, const Devices& devices, const Nodes* nodes) {
  const size_t count = descriptor.buckets.size();
  numbers_.resize(std::max(numbers_.size(), first + count));
  started_.resize(numbers_.size());
  const auto plan = std::make_shared<Plan>();
  plan->first = first;
  ticket.plan = plan;
  if (count == 0) return nullptr;
  plans_[++opened_] = plan;
  std::fill_n(numbers_.begin() + first, count, opened_);
  PlanContext context{*comm_, *pool_, first_tag_ + static_cast<int>(first), descriptor};
  if (on_node) return open_on_node(std::move(context), plan, device, devices.nccl());
  if (descriptor.device != "cpu" && devices.messages() != nullptr)
    return open_on_devices(std::move(context), plan, device == devices.messages() ? device : nullptr);
  if (nodes != nullptr) return open_on_nodes(std::move(context), plan, *nodes);
  open_for_messages(context, *plan);
  return nullptr;
}

bool Plans::is_open(uint32_t bucket) const {
  const auto plan = plans_.find(plan_of(bucket));
  return plan != plans_.end() && !plan->second->storages.empty();
}

const std::shared_ptr<Plan>& Plans::plan_at(uint32_t bucket) const {
  const auto plan = plans_.find(plan_of(bucket));
  if (plan == plans_.end()) throw Error(ErrorCode::kInternal, "a bucket was started whose plan all ranks had let go");
  return plan->second;
}

size_t Plans::nbytes(uint32_t bucket) const {
  const Plan& plan = *plan_at(bucket);
  return plan.storages.at(bucket - plan.first)->nbytes();
}

uint64_t Plans::series_of(uint32_t bucket) const {
  const Plan& plan = *plan_at(bucket);
  const uint32_t index = bucket - plan.first;
  return Series::of_bucket(plan_of(bucket), index, index + 1 == plan.storages.size());
}

std::unique_ptr<Operation> Plans::start(uint32_t bucket, BucketRun run) {
  const Plan& plan = *plan_at(bucket);
  ++started_[bucket];
  return plan.storages.at(bucket - plan.first)->run(std::move(run));
}

std::unique_ptr<Operation> Plans::start_neutrally(uint32_t bucket, std::shared_ptr<void>& keep) {
  const std::shared_ptr<Plan>& plan = plan_at(bucket);
  keep = plan;
  return start(bucket, plan->storages.at(bucket - plan->first)->neutral());
}

std::vector<uint32_t> Plans::take_let_go() {
  Device::let_go();  // what has been fetched by now
  std::vector<uint32_t> firsts;
  for (const auto& [number, plan] : plans_) {
    if (plan->told || plan.use_count() > 1) continue;  // once 1, it stays: only a holder can make another
    plan->told = true;
    firsts.push_back(plan->first);
  }
  return firsts;
}

}  // namespace collective
