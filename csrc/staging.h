// Agreed operations on arrays of devices, cut into the parts of a Staged.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "operations.h"

namespace collective {

// Parts of an operation at most: so many tags it may need.
inline constexpr size_t kMostParts = 256;

// Whether the ranks have agreed on an operation on device memory; then it goes this way on all of them, also where a
// rank has joined and has no array, and perhaps no device.
bool is_staged(const std::vector<Task>& bucket);

// As make_operation(). The number of parts, and so that of tags, follows from what is agreed.
std::unique_ptr<Operation> make_staged(const Place& place, const std::function<int()>& next_tag,
                                       const std::vector<Task>& bucket);

// A send or receive of an array on a device; `make` makes the one of its copy on the host.
std::unique_ptr<Operation> make_staged(const PairSubmission& pair,
                                       const std::function<std::unique_ptr<Operation>(void* data)>& make);

}  // namespace collective
