// The functions of the CUDA driver (libcuda) that are used here, looked up when first needed: building and importing
// need nothing of CUDA. Declared after its reference manual (CUDA Driver API). A device is an int, every other handle a
// pointer, and an address a uintptr_t.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace collective {

// CUipcMemHandle: by which other processes of the node map memory of a device.
struct CudaMemoryHandle {
  char bytes[64];
};

#define COLLECTIVE_CUDA_FUNCTIONS(X)                                                                            \
  X(cuInit, "cuInit", (unsigned flags))                                                                         \
  X(cuGetErrorName, "cuGetErrorName", (int error, const char** name))                                           \
  X(cuGetErrorString, "cuGetErrorString", (int error, const char** text))                                       \
  X(cuDeviceGetCount, "cuDeviceGetCount", (int* count))                                                         \
  X(cuDeviceGet, "cuDeviceGet", (int* device, int ordinal))                                                     \
  X(cuDeviceGetName, "cuDeviceGetName", (char* name, int length, int device))                                   \
  X(cuDeviceGetPCIBusId, "cuDeviceGetPCIBusId", (char* id, int length, int device))                             \
  X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int* value, int attribute, int device))                      \
  X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void** context, int device))                         \
  X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (void* context))                                                   \
  X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (void** context))                                                    \
  X(cuCtxGetStreamPriorityRange, "cuCtxGetStreamPriorityRange", (int* least, int* greatest))                    \
  X(cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", (int* mode))                        \
  X(cuStreamIsCapturing, "cuStreamIsCapturing", (void* stream, int* status))                                    \
  X(cuMemAlloc, "cuMemAlloc_v2", (uintptr_t* address, size_t nbytes))                                           \
  X(cuMemFree, "cuMemFree_v2", (uintptr_t address))                                                             \
  X(cuMemFreeHost, "cuMemFreeHost", (void* data))                                                               \
  X(cuMemHostAlloc, "cuMemHostAlloc", (void** data, size_t nbytes, unsigned flags))                             \
  X(cuMemHostRegister, "cuMemHostRegister_v2", (void* data, size_t nbytes, unsigned flags))                     \
  X(cuMemHostUnregister, "cuMemHostUnregister", (void* data))                                                   \
  X(cuMemcpyAsync, "cuMemcpyAsync", (uintptr_t to, uintptr_t from, size_t nbytes, void* stream))                \
  X(cuIpcGetMemHandle, "cuIpcGetMemHandle", (CudaMemoryHandle * handle, uintptr_t address))                     \
  X(cuIpcOpenMemHandle, "cuIpcOpenMemHandle_v2", (uintptr_t* address, CudaMemoryHandle handle, unsigned flags)) \
  X(cuIpcCloseMemHandle, "cuIpcCloseMemHandle", (uintptr_t address))                                            \
  X(cuModuleLoadData, "cuModuleLoadData", (void** module, const void* image))                                   \
  X(cuModuleGetFunction, "cuModuleGetFunction", (void** function, void* module, const char* name))              \
  X(cuLaunchKernel, "cuLaunchKernel",                                                                           \
    (void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,     \
     unsigned block_z, unsigned shared_nbytes, void* stream, void** arguments, void** extra))                   \
  X(cuStreamCreateWithPriority, "cuStreamCreateWithPriority", (void** stream, unsigned flags, int priority))    \
  X(cuEventCreate, "cuEventCreate", (void** event, unsigned flags))                                             \
  X(cuEventRecord, "cuEventRecord", (void* event, void* stream))                                                \
  X(cuEventQuery, "cuEventQuery", (void* event))

struct CudaDriver {
#define COLLECTIVE_DECLARE(name, symbol, arguments) int(*name) arguments = nullptr;
  COLLECTIVE_CUDA_FUNCTIONS(COLLECTIVE_DECLARE)
#undef COLLECTIVE_DECLARE
  std::string missing;  // why it cannot be used; empty: it can
  int devices = 0;

  // Its name, its number and the driver's description.
  std::string error_text(int error) const;
};

// Lives as long as the process: the driver shuts down before static objects are destroyed.
const CudaDriver& cuda_driver();

}  // namespace collective
