# The CUDA library: one for each major version of CUDA, loaded only by a torch with that version.
set(wheel_architectures 80 86 89 90 100 120)
set(compression none)
if(VITKERNELS_CUDA_ARCHITECTURES STREQUAL "all")
  set(VITKERNELS_CUDA_ARCHITECTURES ${wheel_architectures})
  set(compression size)
endif()
list(TRANSFORM VITKERNELS_CUDA_ARCHITECTURES APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
# In every object: what the tests execute, and what a GPU of another architecture compiles.
list(APPEND CMAKE_CUDA_ARCHITECTURES 80-virtual)
if(VITKERNELS_EMULATOR)
  set(CMAKE_CUDA_ARCHITECTURES 80-virtual)
endif()

enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25.1 knows none for nvcc
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
string(REGEX MATCH "^[0-9]+" cuda_major ${CMAKE_CUDA_COMPILER_VERSION})
message(STATUS "vitkernels: CUDA ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES}")

include(third_party/cutlass.cmake)

add_library(vitkernels_cuda_flags INTERFACE)
target_link_libraries(vitkernels_cuda_flags INTERFACE vitkernels_flags cutlass)
target_include_directories(vitkernels_cuda_flags SYSTEM INTERFACE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
# The stand-in runtime reads the PTX as it lies in the objects, and names source lines. Line numbers change no
# instruction, but they would put paths of the build machine into a wheel.
set(nvcc_flags --expt-relaxed-constexpr --compress-mode=${compression})
if(VITKERNELS_EMULATOR)
  list(APPEND nvcc_flags -lineinfo)
endif()
target_compile_options(vitkernels_cuda_flags INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:${nvcc_flags}>")

add_library(vitkernels_cuda_objects OBJECT csrc/attention/arguments.cpp
                                           csrc/attention/arguments_cuda.cpp
                                           csrc/attention/attention_backward_op_cuda.cpp
                                           csrc/attention/attention_launches_cuda.cpp
                                           csrc/attention/grid_arguments.cpp
                                           csrc/attention/attention_op_cuda.cpp
                                           csrc/attention/backward_tables_cuda.cu
                                           csrc/attention/backward_launches_cuda.cpp
                                           csrc/attention/backward_rows_cuda.cu
                                           csrc/attention/backward_terms_cuda.cu
                                           csrc/attention/grid_launches_cuda.cpp
                                           csrc/attention/merge_attentions_cuda.cu
                                           csrc/attention/merge_attentions_op_cuda.cpp
                                           csrc/attention/rel_pos_cuda.cu
                                           csrc/attention/sum_parts_cuda.cu
                                           csrc/attention/transposed_op_cuda.cpp
                                           csrc/cuda/library.cpp)
target_link_libraries(vitkernels_cuda_objects PUBLIC vitkernels_cuda_flags torch_stable)
list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
target_compile_definitions(vitkernels_cuda_objects PRIVATE USE_CUDA  # declares torch's shims for streams
                                                           VITKERNELS_CUDA_ARCHITECTURES="${architectures}")
set(cuda_objects $<TARGET_OBJECTS:vitkernels_cuda_objects>)

# Four head dimensions of one dtype are as much as the compiler should have at a time: 3 GB or more.
foreach(dtype kFloat32 kBFloat16 kFloat16)
  add_library(vitkernels_cuda_${dtype} OBJECT csrc/attention/backward_cuda.cu csrc/attention/forward_cuda.cu)
  target_link_libraries(vitkernels_cuda_${dtype} PRIVATE vitkernels_cuda_flags)
  target_compile_definitions(vitkernels_cuda_${dtype} PRIVATE VK_DTYPE=${dtype})
  list(APPEND cuda_objects $<TARGET_OBJECTS:vitkernels_cuda_${dtype}>)
endforeach()

add_library(torch_cuda SHARED csrc/cuda/torch_cuda_stub.cpp)
set_target_properties(torch_cuda PROPERTIES CXX_VISIBILITY_PRESET default
                                            LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/stub)

# The runtime is linked in, so that the library does not depend on the one that torch brings.
add_library(vitkernels_cuda MODULE ${cuda_objects})
target_link_libraries(vitkernels_cuda PRIVATE torch_stable torch_cuda)
set_target_properties(vitkernels_cuda PROPERTIES OUTPUT_NAME vitkernels_cuda${cuda_major} INSTALL_RPATH ""
  LINKER_LANGUAGE CUDA CUDA_RUNTIME_LIBRARY Static)
install(TARGETS vitkernels_cuda LIBRARY DESTINATION .)
