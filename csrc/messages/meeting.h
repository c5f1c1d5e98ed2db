// All ranks come together, with an end to the wait and the names of those that are missing.
#pragma once

#include <mpi.h>

#include <chrono>

namespace collective {

// Returns when every rank of `comm` has called it: what is collective and blocks may come then. Warns of who is missing,
// and throws kTimeout. The ranks that wait long tell each other by empty messages of the greatest tag; else there are
// none of tags that the owner of `comm` could meet.
void meet(MPI_Comm comm, std::chrono::duration<double> stall_warning, std::chrono::duration<double> timeout);

}  // namespace collective
