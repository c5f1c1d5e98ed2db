// The MPI library of this process.
#pragma once

#include <string>

namespace collective {

// Throws kInvalid unless MPI is initialised, not finalised, and allows calls from several threads.
void require_mpi_threads();

// The highest tag that a message may have; at least 32767.
int highest_tag();

// The MPI whose headers this file was compiled with ("Open MPI 5.0.11") and the one that runs
// (MPI_Get_library_version, callable before MPI_Init), and the file it was loaded from.
std::string built_for_mpi();
std::string running_mpi();
std::string running_mpi_path();

}  // namespace collective
