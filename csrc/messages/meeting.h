// A barrier that times out, and names the ranks that are missing.
#pragma once

#include <mpi.h>

#include <chrono>

namespace collective {

// Returns when every rank of `comm` has called it: blocking collective calls are safe from then on. Warns which ranks
// are missing, and throws kTimeout. Ranks that have waited long say so to the others, by empty messages with the
// largest tag, which are all received before it returns; it sends no others that the owner of `comm` could see.
void meet(MPI_Comm comm, std::chrono::duration<double> stall_warning, std::chrono::duration<double> timeout);

}  // namespace collective
