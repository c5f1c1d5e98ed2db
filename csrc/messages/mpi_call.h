// What every call of MPI needs. For the files of this folder that include mpi.h.
#pragma once

#include <mpi.h>

#include <string>

#include "base/types.h"

namespace collective {

// Throws kInternal, with MPI's own text, unless `status`, the result of `call`, is MPI_SUCCESS.
inline void check(int status, const char* call) {
  if (status == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(status, text, &length);
  throw Error(ErrorCode::kInternal, std::string(call) + " failed: " + std::string(text, length));
}

inline bool mpi_is_finalized() {
  int flag = 0;
  MPI_Finalized(&flag);
  return flag != 0;
}

}  // namespace collective
