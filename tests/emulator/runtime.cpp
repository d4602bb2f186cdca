// The entry points of the CUDA runtime that objects compiled by nvcc call, and those of torch that launchers call.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "launch.h"
#include "memory.h"
#include "report.h"

using emulator::Image;
using emulator::Kernel;
using emulator::last_error;
using emulator::state;

namespace {

// Constructors of the objects run before this library's, their destructors after it: the tables are never destroyed.
struct Registry {
  std::map<const void*, std::unique_ptr<Kernel>> kernels;  // by the host function that stands for them
  std::map<const void*, std::pair<Image*, std::string>> variables;
  std::vector<std::unique_ptr<Image>> images;
};
Registry& registry() {
  static Registry* r = new Registry;
  return *r;
}

Kernel* kernel_of(const void* host_function) {
  const auto found = registry().kernels.find(host_function);
  if (found != registry().kernels.end()) return found->second.get();
  for (const auto& [host, kernel] : registry().kernels) {
    if (kernel.get() == host_function) return kernel.get();  // a handle from __cudaGetKernel
  }
  return nullptr;
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error() = error;
  return error;
}

cudaError_t reject(const std::string& message, cudaError_t error) {
  state().errors.push_back({"launch", "", "", 0, "", message});
  return remember(error);
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
std::vector<Configuration>& configurations() {
  static thread_local std::vector<Configuration> stack;
  return stack;
}

struct FatBinaryWrapper {  // what __cudaRegisterFatBinary is given
  int magic, version;
  const void* data;
  void* unused;
};

int attribute(cudaDeviceAttr which) {
  const emulator::Options& o = state().options;
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: return o.compute_capability / 10;
    case cudaDevAttrComputeCapabilityMinor: return o.compute_capability % 10;
    case cudaDevAttrMultiProcessorCount: return o.multiprocessors;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 * 1024;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return static_cast<int>(o.shared_limit);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return static_cast<int>(o.shared_limit) + 1024;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 1536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxGridDimX: return 0x7fffffff;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 0xffff;
    default: return 0;
  }
}

}  // namespace

extern "C" {

// Registration --------------------------------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void* wrapper) {
  registry().images.push_back(std::make_unique<Image>(static_cast<FatBinaryWrapper*>(wrapper)->data));
  return reinterpret_cast<void**>(registry().images.back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaUnregisterFatBinary(void** handle) {
  const auto* image = reinterpret_cast<Image*>(handle);
  std::erase_if(registry().kernels, [=](const auto& entry) { return entry.second->image == image; });
  std::erase_if(registry().variables, [=](const auto& entry) { return entry.second.first == image; });
  std::erase_if(registry().images, [=](const auto& owned) { return owned.get() == image; });
}

void __cudaRegisterFunction(void** handle, const char* host_function, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  registry().kernels[host_function] = std::make_unique<Kernel>(Kernel{reinterpret_cast<Image*>(handle), name});
}

void __cudaRegisterVar(void** handle, char* host_variable, char*, const char* name, int, size_t, int, int) {
  registry().variables[host_variable] = {reinterpret_cast<Image*>(handle), name};
}

// Launches ------------------------------------------------------------------------------------------------------------

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations().push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations().empty()) return cudaErrorMissingConfiguration;
  const Configuration c = configurations().back();
  configurations().pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *static_cast<void**>(stream) = c.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* host_function) {
  Kernel* kernel = kernel_of(host_function);
  *handle = reinterpret_cast<cudaKernel_t>(kernel);
  return kernel ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  Kernel* kernel = kernel_of(function);
  return kernel ? emulator::launch(*kernel, grid, block, arguments, shared)
                : reject("no such kernel is registered", cudaErrorInvalidDeviceFunction);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  if (config->numAttrs) {
    return reject("launch attribute " + std::to_string(config->attrs[0].id) + " is not emulated", cudaErrorNotSupported);
  }
  return cudaLaunchKernel(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  Kernel* kernel = kernel_of(function);
  if (!kernel) return reject("no such kernel is registered", cudaErrorInvalidDeviceFunction);
  int64_t declared = 0;
  if (const cudaError_t error = emulator::static_shared_bytes(*kernel, declared); error != cudaSuccess) return remember(error);
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value + declared > state().options.shared_limit) return remember(cudaErrorInvalidValue);
  kernel->dynamic_shared_limit = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   size_t dynamic_shared, unsigned) {
  Kernel* kernel = kernel_of(function);
  if (!kernel) return reject("no such kernel is registered", cudaErrorInvalidDeviceFunction);
  int64_t declared = 0;
  if (const cudaError_t error = emulator::static_shared_bytes(*kernel, declared); error != cudaSuccess) return remember(error);
  const int64_t shared = declared + static_cast<int64_t>(dynamic_shared) + 1024;  // 1 KB goes to the system
  const int64_t by_shared = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / shared;
  *blocks = static_cast<int>(std::min<int64_t>(by_shared, attribute(cudaDevAttrMaxThreadsPerMultiProcessor) / std::max(threads, 1)));
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

// Errors --------------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return std::exchange(last_error(), cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error(); }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorMisalignedAddress: return "cudaErrorMisalignedAddress";
    case cudaErrorAssert: return "cudaErrorAssert";
    case cudaErrorInvalidPtx: return "cudaErrorInvalidPtx";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    default: return "cudaErrorUnknown";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// The device: there is one, with index 0. Work is done when a call returns --------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : remember(cudaErrorInvalidDevice); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) { return *value = attribute(which), cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

// Memory is the host's ------------------------------------------------------------------------------------------------

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  emulator::Memory::instance().mark_written(to, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  emulator::Memory::instance().mark_written(to, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  const auto found = registry().variables.find(symbol);
  if (found == registry().variables.end()) return remember(cudaErrorInvalidSymbol);
  *address = found->second.first->variable(found->second.second, state().options.compute_capability);
  return *address ? cudaSuccess : remember(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, cudaMemcpyKind kind) {
  void* to = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&to, symbol);
  return error == cudaSuccess ? cudaMemcpy(static_cast<char*>(to) + offset, from, bytes, kind) : error;
}

// Torch's shims, which its CPU build lacks: one device, one stream ----------------------------------------------------

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
int32_t aoti_torch_create_device_guard(int32_t, void** guard) { return *guard = nullptr, 0; }
int32_t aoti_torch_delete_device_guard(void*) { return 0; }

}  // extern "C"
