#include "device/nccl_library.h"

#include <dlfcn.h>

#include <mutex>

#include "base/types.h"

namespace collective {
namespace {

constexpr int kLeastVersion = 21400;  // 2.14.0

Nccl& the_nccl() {
  static auto* const the_nccl = new Nccl;
  return *the_nccl;
}

void* open_first(const std::vector<std::string>& files, std::string& why) {
  constexpr const char* kName = "libnccl.so.2";
  if (void* const loaded = dlopen(kName, RTLD_NOW | RTLD_NOLOAD)) return loaded;
  std::vector<std::string> all = files;
  all.emplace_back(kName);
  for (const std::string& file : all) {
    if (void* const library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    const char* const error = dlerror();
    why += (why.empty() ? "" : "; ") + std::string(error != nullptr ? error : file);
  }
  return nullptr;
}

void load(Nccl& nccl, const std::vector<std::string>& files) {
  nccl.missing.clear();
  void* const library = open_first(files, nccl.missing);
  if (library == nullptr) return;
  nccl.missing.clear();
#define COLLECTIVE_LOAD(result, name, arguments)                            \
  nccl.name = reinterpret_cast<decltype(nccl.name)>(dlsym(library, #name)); \
  if (nccl.name == nullptr) nccl.missing = "libnccl.so.2 has no function " #name;
  COLLECTIVE_NCCL_FUNCTIONS(COLLECTIVE_LOAD)
#undef COLLECTIVE_LOAD
  int version = 0;
  if (!nccl.missing.empty()) return;
  if (nccl.ncclGetVersion(&version) != 0) nccl.missing = "NCCL does not report its version";
  nccl.version =
      std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." + std::to_string(version % 100);
  if (nccl.missing.empty() && version < kLeastVersion) nccl.missing = "NCCL is older than 2.14";
}

}  // namespace

void Nccl::check(int result, const char* what) const {
  if (result == 0 || result == kNcclInProgress) return;
  const std::string last = ncclGetLastError(nullptr);
  throw Error(ErrorCode::kInternal,
              std::string("NCCL: ") + what + ": " + ncclGetErrorString(result) + (last.empty() ? "" : ": " + last));
}

void load_nccl(const std::vector<std::string>& files) {
  static std::once_flag once;
  std::call_once(once, [&] { load(the_nccl(), files); });
}

const Nccl& nccl() { return the_nccl(); }

}  // namespace collective
