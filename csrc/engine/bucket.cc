#include "engine/bucket.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "base/float_mode.h"
#include "device/device_kernels.h"

namespace collective {
namespace {

void write_one(DType dtype, std::byte* target) {
  const auto write = [target](auto value) { std::memcpy(target, &value, sizeof value); };
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kBool: write(uint8_t{1}); break;
    case DType::kUInt16:
    case DType::kInt16: write(uint16_t{1}); break;
    case DType::kInt32: write(int32_t{1}); break;
    case DType::kInt64: write(int64_t{1}); break;
    case DType::kFloat16: write(uint16_t{0x3C00}); break;
    case DType::kBFloat16: write(uint16_t{0x3F80}); break;
    case DType::kFloat32:
    case DType::kComplex64: write(1.0F); break;  // the imaginary part stays zero
    case DType::kFloat64:
    case DType::kComplex128: write(1.0); break;
  }
}

}  // namespace

BucketShape BucketLayout::shape() const {
  return {dtype, wire, std::accumulate(counts.begin(), counts.end(), size_t{0}), counts.size() + notes, device >= 0};
}

Bucket::Bucket(std::shared_ptr<Engine> engine, size_t group, std::string name, std::shared_ptr<Plan> plan,
               size_t number, BucketLayout layout)
    : engine_(std::move(engine)),
      group_(group),
      name_(std::move(name)),
      plan_(std::move(plan)),
      number_(plan_->first + static_cast<uint32_t>(number)),
      layout_(std::move(layout)),
      storage_(plan_->storages.at(number).get()) {
  offsets_.push_back(0);
  for (const size_t count : layout_.counts) offsets_.push_back(offsets_.back() + count);
  storage_->prepare(layout_.device);
}

std::shared_ptr<Ticket> Bucket::start(const std::vector<const void*>& tensors, const std::vector<size_t>& notes,
                                      std::shared_ptr<DeviceMark> mark) {
  const std::vector<size_t>& counts = layout_.counts;
  if (tensors.size() != counts.size())
    throw Error(ErrorCode::kInvalid, "a bucket of " + std::to_string(counts.size()) + " tensors was given " +
                                         std::to_string(tensors.size()));
  const size_t element = size_of(dtype());
  std::byte* const flags = storage_->own_flags.data();
  std::memset(flags, 0, storage_->own_flags.nbytes());
  BucketRun run{{}, {flags, nullptr, flag_count()}};
  run.keep = plan_;
  run.tensors.reserve(counts.size());
  for (size_t i = 0; i < counts.size(); ++i) {
    run.tensors.push_back({tensors[i], nullptr, counts[i]});
    // A tensor without elements has no address, but it is present.
    if (tensors[i] != nullptr || counts[i] == 0) write_one(dtype(), flags + i * element);
  }
  for (const size_t note : notes)
    if (note < layout_.notes) write_one(dtype(), flags + (counts.size() + note) * element);
  if (mark != nullptr) run.marks.push_back(mark);
  for (auto& fetched : storage_->fetched) run.marks.push_back(std::move(fetched));
  storage_->fetched.clear();
  if (mark != nullptr && !storage_->on_device()) {
    Device& device = mark->device();
    std::byte* base = storage_->tensors();
    if (!storage_->is_direct()) {
      run.memory.push_back(device.pinned(offsets_.back() * element));
      base = run.memory[0].data();
    }
    for (size_t i = 0; i < counts.size(); ++i) {
      if (tensors[i] == nullptr) continue;
      std::byte* const host = base + offsets_[i] * element;
      run.loads.push_back({&device, const_cast<void*>(tensors[i]), host, counts[i] * element});
      run.tensors[i].in = host;
    }
  }
  return engine_->submit(group_, name_, BucketSubmission{number_, offsets_.back() * element, std::move(run)}, false);
}

std::shared_ptr<std::byte> Bucket::place(size_t i) const {
  return {plan_, storage_->tensors() + offsets_.at(i) * size_of(layout_.wire)};
}

bool Bucket::flag(size_t i) const {
  const size_t element = size_of(layout_.wire);
  const std::byte* const flag = storage_->flags() + i * element;
  return std::any_of(flag, flag + element, [](std::byte b) { return b != std::byte{0}; });
}

void Bucket::fetch(const std::vector<void*>& targets) const {
  const FloatMode mode;
  for (size_t i = 0; i < layout_.counts.size(); ++i)
    if (targets.at(i) != nullptr) convert(dtype(), targets[i], layout_.wire, place(i).get(), layout_.counts[i]);
}

void Bucket::fetch(const std::vector<void*>& targets, Device& device, uintptr_t stream) {
  const std::vector<size_t>& counts = layout_.counts;
  const size_t element = size_of(dtype());
  DeviceStream queue(device, stream);
  device.mark(stream);  // refuses one that is captured
  // On the device, or in page-locked memory, from where the device copies; else it is converted there first.
  std::shared_ptr<PinnedMemory> bounce;
  if (storage_->on_device()) {
    std::vector<Conversion> tensors;
    for (size_t i = 0; i < counts.size(); ++i)
      if (targets.at(i) != nullptr) tensors.push_back({place(i).get(), targets[i], counts[i]});
    queue_convert(device, queue, dtype(), layout_.wire, tensors, 1.0, storage_->spec().op);
  } else {
    if (!storage_->is_direct()) bounce = std::make_shared<PinnedMemory>(device.pinned(offsets_.back() * element));
    std::byte* const base = bounce == nullptr ? storage_->tensors() : bounce->data();
    std::vector<void*> hosts(targets.size());
    for (size_t i = 0; i < counts.size(); ++i)
      if (targets.at(i) != nullptr) hosts[i] = base + offsets_[i] * element;
    if (bounce != nullptr) fetch(hosts);
    for (size_t i = 0; i < counts.size(); ++i)
      if (targets[i] != nullptr) queue.copy(targets[i], hosts[i], counts[i] * element);
  }
  storage_->fetched.push_back(device.mark(stream));
  device.keep(storage_->fetched.back(),
              std::make_shared<std::pair<std::shared_ptr<void>, std::shared_ptr<void>>>(plan_, bounce));
}

std::vector<std::shared_ptr<Bucket>> BucketOpening::buckets(const std::vector<std::string>& contents) const {
  std::vector<std::shared_ptr<Bucket>> opened;
  for (size_t i = 0; i < layouts.size(); ++i) {
    std::string called = name + ".bucket" + std::to_string(i);
    if (i < contents.size()) called += " (" + contents[i] + ")";
    opened.push_back(std::make_shared<Bucket>(engine, group, std::move(called), ticket->plan, i, layouts[i]));
  }
  return opened;
}

BucketOpening open_buckets(std::shared_ptr<Engine> engine, size_t group, const std::string& name,
                           std::vector<BucketLayout> layouts, const AllreduceSpec& spec, std::string described,
                           std::string device, std::shared_ptr<DeviceMark> mark) {
  if (spec.op != ReduceOp::kSum && spec.op != ReduceOp::kAverage)
    throw Error(ErrorCode::kInvalid, std::string("a bucket reduces by Sum or Average, not by ") + name_of(spec.op));
  Descriptor d;
  d.kind = Kind::kBuckets;
  d.dtype = spec.dtype;
  d.wire = spec.wire;
  d.op = spec.op;
  d.prescale = spec.prescale;
  d.postscale = spec.postscale;
  d.device = std::move(device);
  d.layout = std::move(described);
  for (const BucketLayout& layout : layouts) d.buckets.push_back(layout.shape());
  auto ticket = engine->submit(group, name, NamedSubmission{std::move(d), {}, 0, {}, false, std::move(mark)}, true);
  return {std::move(engine), group, name, std::move(layouts), std::move(ticket)};
}

}  // namespace collective
