#include "messages/mpi_library.h"

#include <dlfcn.h>

#include <filesystem>
#include <system_error>

#include "messages/mpi_call.h"

namespace collective {

void require_mpi_threads() {
  int flag = 0;
  MPI_Initialized(&flag);
  if (flag == 0 || mpi_is_finalized())
    throw Error(ErrorCode::kInvalid, flag == 0 ? "MPI is not initialised" : "MPI is already finalised");
  int provided = MPI_THREAD_SINGLE;
  check(MPI_Query_thread(&provided), "MPI_Query_thread");
  if (provided != MPI_THREAD_MULTIPLE)
    throw Error(ErrorCode::kInvalid,
                "MPI was initialised without MPI_THREAD_MULTIPLE, which the background engine needs. Let mpi4py "
                "initialise MPI (its default asks for it), or call MPI_Init_thread with MPI_THREAD_MULTIPLE.");
}

int highest_tag() {
  void* value = nullptr;
  int flag = 0;
  check(MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, &value, &flag), "MPI_Comm_get_attr");
  return flag == 0 ? 32767 : *static_cast<int*>(value);
}

std::string built_for_mpi() {
#if defined(OMPI_MAJOR_VERSION)
  return "Open MPI " + std::to_string(OMPI_MAJOR_VERSION) + "." + std::to_string(OMPI_MINOR_VERSION) + "." +
         std::to_string(OMPI_RELEASE_VERSION);
#elif defined(I_MPI_VERSION)
  return std::string("Intel MPI ") + I_MPI_VERSION;
#elif defined(MPICH_VERSION)
  return std::string("MPICH ") + MPICH_VERSION;  // also Cray MPICH, MVAPICH; Intel MPI has the same ABI
#else
  return "MPI " + std::to_string(MPI_VERSION) + "." + std::to_string(MPI_SUBVERSION);
#endif
}

std::string running_mpi() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  check(MPI_Get_library_version(text, &length), "MPI_Get_library_version");
  return {text, static_cast<size_t>(length)};
}

std::string running_mpi_path() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&MPI_Get_library_version), &info) == 0 || info.dli_fname == nullptr)
    return "unknown file";
  // A run path relative to this library comes with its "..".
  const std::filesystem::path found = info.dli_fname;
  std::error_code failed;
  const std::filesystem::path directory = std::filesystem::canonical(found.parent_path(), failed);
  return failed ? found.string() : (directory / found.filename()).string();
}

}  // namespace collective
