#include "cuda/device.h"

// What the CUDA library says about itself without being loaded: Python looks for this text in the file.
extern "C" __attribute__((used, visibility("hidden"))) const char vitkernels_cuda_architectures[] =
    "vitkernels_cuda_architectures=" VITKERNELS_CUDA_ARCHITECTURES ";";

namespace vitkernels {
namespace {

// As `python -m vitkernels info` shows them: sm_90, compute_80 (PTX).
std::string architectures() {
  std::istringstream names(VITKERNELS_CUDA_ARCHITECTURES);  // 90-real 80-virtual
  std::string text;
  for (std::string name; names >> name;) {
    const size_t dash = name.find('-');
    const std::string number = name.substr(0, dash);
    text += text.empty() ? "" : ", ";
    text += name.substr(dash) == "-real" ? "sm_" + number : "compute_" + number + " (PTX)";
  }
  return text;
}

bool is_of_another_gpu(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion || error == cudaErrorJitCompilerNotFound;
}

}  // namespace

void check_cuda(const Checker& checker, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next call must not find it
  int device = 0, major = 0, minor = 0;
  const bool known = is_of_another_gpu(error) && cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  checker.check(!known, "no kernel for a GPU of compute capability ", major, ".", minor, ", the library has ",
                architectures(), " (CUDA error: ", cudaGetErrorString(error), ")");
  checker.check(false, "CUDA error: ", cudaGetErrorString(error));
}

}  // namespace vitkernels
