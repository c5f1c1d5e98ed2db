#include "device/cuda_driver.h"

#include <dlfcn.h>

namespace collective {
namespace {

const CudaDriver* load() {
  auto* driver = new CudaDriver;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    driver->missing = std::string("no CUDA driver: ") + (why != nullptr ? why : "libcuda.so.1");
    return driver;
  }
#define COLLECTIVE_LOAD(name, symbol, arguments)                                   \
  driver->name = reinterpret_cast<decltype(driver->name)>(dlsym(library, symbol)); \
  if (driver->name == nullptr) driver->missing = "the CUDA driver has no function " symbol;
  COLLECTIVE_CUDA_FUNCTIONS(COLLECTIVE_LOAD)
#undef COLLECTIVE_LOAD
  if (!driver->missing.empty()) return driver;
  int error = driver->cuInit(0);
  if (error == 0) error = driver->cuDeviceGetCount(&driver->devices);
  if (error != 0)
    driver->missing = "the CUDA driver does not start: " + driver->error_text(error);
  else if (driver->devices == 0)
    driver->missing = "no CUDA device is visible";
  return driver;
}

}  // namespace

std::string CudaDriver::error_text(int error) const {
  const char *name = nullptr, *text = nullptr;
  cuGetErrorName(error, &name);
  cuGetErrorString(error, &text);
  return std::string(name != nullptr ? name : "error") + " (" + std::to_string(error) + ")" +
         (text != nullptr ? std::string(": ") + text : "");
}

const CudaDriver& cuda_driver() {
  static const CudaDriver* const driver = load();
  return *driver;
}

}  // namespace collective
