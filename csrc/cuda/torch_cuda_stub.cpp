// Linked in place of torch's libtorch_cuda.so, which a CPU build of torch lacks. What counts is the name that it leaves
// in the CUDA library: at run time the real one, which torch has loaded by then, provides the function.
#include <cstdint>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) { return 1; }
