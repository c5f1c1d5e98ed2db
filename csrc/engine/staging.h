// Agreed operations on device arrays: done by the devices where the ranks share their memory and it pays, otherwise
// staged through the host, cut into the parts of a Staged.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "engine/devices.h"
#include "engine/operations.h"

namespace collective {

// The most parts of an operation, and so the most tags that it may need.
inline constexpr size_t kMostParts = 256;

// Whether this is an operation on device memory. If so, all ranks treat it as one, also a rank that has joined and has no
// array, and perhaps no device.
inline bool is_staged(const Descriptor& d) { return d.device != "cpu"; }

// As make_operation(). The number of parts, and so that of tags, follows from what is agreed. devices: what the ranks
// can do with theirs.
std::unique_ptr<Operation> make_staged(const Place& place, const std::function<int()>& next_tag,
                                       const std::vector<Task>& bucket, Devices& devices);

// A send or receive of an array on a device; `make` makes the one of its copy on the host.
std::unique_ptr<Operation> make_staged(const PairSubmission& pair,
                                       const std::function<std::unique_ptr<Operation>(void* data)>& make);

}  // namespace collective
