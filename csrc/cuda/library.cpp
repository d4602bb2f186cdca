// What the CUDA library says about itself without being loaded: Python looks for this text in the file.
extern "C" __attribute__((used, visibility("hidden"))) const char vitkernels_cuda_architectures[] =
    "vitkernels_cuda_architectures=" VITKERNELS_CUDA_ARCHITECTURES ";";
