#include "engine/staging.h"

#include <algorithm>
#include <utility>

#include "base/ranges.h"
#include "base/thresholds.h"
#include "device/allreduce_device.h"
#include "device/allreduce_device_ring.h"
#include "device/staged.h"

namespace collective {
namespace {

using Marks = std::vector<std::shared_ptr<DeviceMark>>;

// Long enough for the copies of a part to run at full speed, short enough for the first to start soon.
constexpr size_t kPartBytes = size_t{4} << 20;
// Parts in flight at a time: one in each of the three stages, and some more because stages are uneven.
constexpr size_t kDepth = 8;

// A task whose array is on the host, and which owns what it points to.
struct HostTask {
  Ticket* ticket;
  Descriptor descriptor;
  Slot data;
  std::vector<int64_t> splits, rows, expected;
};

bool is_elementwise(const Descriptor& d) {
  return d.kind == Kind::kBroadcast ||
         ((d.kind == Kind::kAllreduce || d.kind == Kind::kReduce) && d.op != ReduceOp::kAdasum);
}

size_t part_count(const std::vector<Task>& bucket) {
  const Descriptor& d = *bucket[0].descriptor;
  if (bucket.size() > 1 || !is_elementwise(d)) return 1;
  // By the wire's type, so that what may be fused (see Limits), which would be in one part then, is in one alone, too.
  return std::clamp(d.count() * size_of(d.wire) / kPartBytes, size_t{1}, kMostParts);
}

size_t rows_here(const Descriptor& d, int size, int rank) {
  const std::vector<size_t> offsets = even_offsets(static_cast<size_t>(d.shape[0]), 1, size);
  return offsets[static_cast<size_t>(rank) + 1] - offsets[static_cast<size_t>(rank)];
}

// Elements of the array that the task writes.
size_t out_count(const Task& task, const Place& place) {
  const Descriptor& d = *task.descriptor;
  if (task.data.out == nullptr) return 0;
  if (d.kind != Kind::kReduceScatter || d.shape[0] == 0) return d.count();
  return d.count() / static_cast<size_t>(d.shape[0]) * rows_here(d, place.comm.size(), place.comm.rank());
}

std::byte* offset(const void* data, size_t nbytes) {
  return data == nullptr ? nullptr : static_cast<std::byte*>(const_cast<void*>(data)) + nbytes;
}

// Arrays on another device than the one that this rank shares are on the host in between, in page-locked memory, which
// kernels can read and write.
std::unique_ptr<Operation> make_on_devices(const Place& place, int tag, const std::vector<Task>& bucket,
                                           Devices& devices) {
  Device& here = devices.staging() != nullptr ? devices.staging()->device() : *devices.messages();
  std::vector<PinnedMemory> memory;
  std::vector<Staged::Part> parts(1);
  std::vector<Slot> slots;
  for (const Task& task : bucket) {
    Slot slot = task.data;
    slot.count = task.descriptor->count();
    if (task.descriptor->kind == Kind::kReduce && place.comm.rank() != task.descriptor->root) slot.out = nullptr;
    if (task.mark != nullptr && &task.mark->device() != &here) {
      Device& device = task.mark->device();
      const size_t nbytes = slot.count * size_of(task.descriptor->dtype);
      memory.push_back(device.pinned(nbytes));
      std::byte* const host = memory.back().data();
      if (slot.in != nullptr) parts[0].loads.push_back({&device, const_cast<void*>(slot.in), host, nbytes});
      if (slot.out != nullptr) parts[0].stores.push_back({&device, slot.out, host, nbytes});
      slot = {slot.in == nullptr ? nullptr : host, slot.out == nullptr ? nullptr : host, slot.count};
    }
    slots.push_back(slot);
  }
  const Descriptor& d = *bucket[0].descriptor;
  const AllreduceSpec spec{d.dtype, d.wire, d.op, d.prescale, d.postscale};
  if (devices.staging() != nullptr)
    parts[0].operation = std::make_unique<AllreduceDevice>(*devices.staging(), spec, std::move(slots), Marks{});
  else
    parts[0].operation = std::make_unique<AllreduceDeviceRing>(place.comm, place.pool, tag, devices.next_place(), spec,
                                                               std::move(slots), Marks{});
  if (memory.empty()) return std::move(parts[0].operation);
  return std::make_unique<Staged>(Marks{}, std::move(memory), std::move(parts), 1);
}

}  // namespace

std::unique_ptr<Operation> make_staged(const Place& place, const std::function<int()>& next_tag,
                                       const std::vector<Task>& bucket, Devices& devices) {
  size_t nbytes = 0;
  for (const Task& task : bucket) nbytes += task.descriptor->count() * size_of(task.descriptor->wire);
  if ((devices.staging() != nullptr || devices.messages() != nullptr) && has_kernels(*bucket[0].descriptor) &&
      nbytes >= thresholds::kDevices)
    return make_on_devices(place, next_tag(), bucket, devices);
  std::vector<PinnedMemory> memory;
  std::vector<Staged::Part> parts(part_count(bucket));
  std::vector<std::vector<HostTask>> tasks(parts.size());
  for (const Task& task : bucket) {
    const Descriptor& d = *task.descriptor;
    const size_t element = size_of(d.dtype);
    const bool loads = task.data.in != nullptr || (d.kind == Kind::kBroadcast && place.comm.rank() == d.root);
    const size_t in = task.data.in != nullptr ? task.data.count : 0, out = out_count(task, place);
    const std::vector<size_t> ends =
        even_offsets(d.count(), 1, static_cast<int>(parts.size()));  // the first is longest
    const size_t part_stride = ends[1] * element;
    std::byte *host_in = nullptr, *host_out = nullptr;
    Device* device = nullptr;
    if (task.mark != nullptr) {
      device = &task.mark->device();
      // In one place: what is reduced is not needed any more.
      memory.push_back(device->pinned(parts.size() > 1 ? std::min(parts.size(), kDepth) * part_stride
                                                       : std::max(in, out) * element));
      host_in = memory.back().data();
      if (d.kind == Kind::kReduceScatter) memory.push_back(device->pinned(out * element));
      host_out = memory.back().data();
    }
    for (size_t i = 0; i < parts.size(); ++i) {
      HostTask host{task.ticket, d, task.data, *task.splits, *task.rows, {}};
      if (task.expected != nullptr) host.expected = *task.expected;
      host.descriptor.device = "cpu";
      host.data.in = task.data.in == nullptr ? nullptr : host_in;
      host.data.out = task.data.out == nullptr ? nullptr : host_out;
      size_t begin = 0, at = 0, in_here = in, out_here = out;  // begin: of the part in the array; at: in the memory
      if (parts.size() > 1) {
        begin = ends[i] * element;
        at = i % kDepth * part_stride;
        const size_t count = ends[i + 1] - ends[i];
        in_here = std::min(in, count);
        out_here = std::min(out, count);
        host.descriptor.shape = {static_cast<int64_t>(count)};
        host.data = {offset(host.data.in, at), offset(host.data.out, at), count};
      }
      if (device != nullptr && loads) {
        const void* const from = task.data.in != nullptr ? task.data.in : task.data.out;
        const size_t count = task.data.in != nullptr ? in_here : out_here;
        parts[i].loads.push_back({device, offset(from, begin), host_in + at, count * element});
      }
      if (device != nullptr && out_here > 0 && !(d.kind == Kind::kBroadcast && loads))
        parts[i].stores.push_back({device, offset(task.data.out, begin), host_out + at, out_here * element});
      tasks[i].push_back(std::move(host));
    }
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    Place here = place;
    here.tag = next_tag();
    const auto make = [here, host = std::move(tasks[i])] {
      std::vector<Task> views;
      for (const HostTask& task : host)
        views.push_back({task.ticket, &task.descriptor, task.data, &task.splits, &task.rows, nullptr, &task.expected});
      return make_operation(here, views);
    };
    if (takes_turns(place, bucket))
      parts[i].operation = make();
    else
      parts[i].make = make;
  }
  return std::make_unique<Staged>(Marks{}, std::move(memory), std::move(parts), kDepth);
}

std::unique_ptr<Operation> make_staged(const PairSubmission& pair,
                                       const std::function<std::unique_ptr<Operation>(void* data)>& make) {
  Device& device = pair.mark->device();
  const size_t nbytes = pair.descriptor.count() * size_of(pair.descriptor.dtype);
  std::vector<PinnedMemory> memory;
  memory.push_back(device.pinned(nbytes));
  std::vector<Staged::Part> parts(1);
  const Staged::Copy copy{&device, pair.data, memory.back().data(), nbytes};
  (pair.sends ? parts[0].loads : parts[0].stores).push_back(copy);
  parts[0].operation = make(memory.back().data());
  return std::make_unique<Staged>(Marks{pair.mark}, std::move(memory), std::move(parts), 1);
}

}  // namespace collective
