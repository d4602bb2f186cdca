# The CUDA library: one for each major version of CUDA, loaded only by a torch with that version. Its objects are what the
# tests' stand-in runtime executes, too.
set(wheel_architectures 80 86 89 90 100 120)
set(architectures ${VITKERNELS_CUDA_ARCHITECTURES})
set(is_wheel OFF)
if(architectures STREQUAL "all")
  set(is_wheel ON)
  set(architectures ${wheel_architectures})
elseif(NOT architectures AND NOT why_no_cuda)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE capabilities ERROR_QUIET RESULT_VARIABLE no_gpu)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]+" architectures "${capabilities}")
  string(REPLACE "." "" architectures "${architectures}")
  list(REMOVE_DUPLICATES architectures)
  # Older GPUs lack what the kernels use, and nvcc may not know a newer one, for which the PTX is there.
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE known_to_nvcc)
  foreach(architecture ${architectures})
    if(architecture LESS 80 OR NOT known_to_nvcc MATCHES "sm_${architecture}[^0-9]")
      list(REMOVE_ITEM architectures ${architecture})
    endif()
  endforeach()
  if(no_gpu OR NOT architectures)
    set(architectures 80 90)
  endif()
endif()
list(TRANSFORM architectures APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
# In every object: what the tests execute, and what a GPU of another architecture compiles.
list(APPEND CMAKE_CUDA_ARCHITECTURES 80-virtual)

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

add_library(vitkernels_cuda_flags INTERFACE)
target_link_libraries(vitkernels_cuda_flags INTERFACE vitkernels_flags cutlass)
target_include_directories(vitkernels_cuda_flags SYSTEM INTERFACE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
# The stand-in runtime reads the PTX as it lies in the objects, and names source lines. Line numbers change no
# instruction, but they would put paths of the build machine into a wheel.
if(is_wheel)
  set(nvcc_flags --compress-mode=size)
else()
  set(nvcc_flags --compress-mode=none -lineinfo)
endif()
target_compile_options(vitkernels_cuda_flags INTERFACE
                       "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;${nvcc_flags}>")

add_library(vitkernels_cuda_objects OBJECT EXCLUDE_FROM_ALL csrc/cuda/library.cpp csrc/schema.cpp ${op_sources} ${cuda_op_sources}
                                                            ${cuda_kernel_sources})
target_link_libraries(vitkernels_cuda_objects PUBLIC vitkernels_cuda_flags torch_stable)
list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
target_compile_definitions(vitkernels_cuda_objects PRIVATE USE_CUDA  # declares torch's shims for streams
                                                           VITKERNELS_CUDA_ARCHITECTURES="${architectures}")
set(cuda_objects $<TARGET_OBJECTS:vitkernels_cuda_objects>)
foreach(dtype kFloat32 kBFloat16 kFloat16)
  set(sources ${cuda_kernel_sources_by_dtype})
  if(NOT dtype STREQUAL "kFloat32")
    list(APPEND sources ${cuda_kernel_sources_16_bit})
  endif()
  if(NOT dtype STREQUAL "kFloat16")
    list(APPEND sources ${cuda_kernel_sources_of_wide_range})
  endif()
  add_library(vitkernels_cuda_${dtype} OBJECT EXCLUDE_FROM_ALL ${sources})
  target_link_libraries(vitkernels_cuda_${dtype} PRIVATE vitkernels_cuda_flags)
  target_compile_definitions(vitkernels_cuda_${dtype} PRIVATE VK_DTYPE=${dtype})
  list(APPEND cuda_objects $<TARGET_OBJECTS:vitkernels_cuda_${dtype}>)
endforeach()

add_library(torch_cuda SHARED EXCLUDE_FROM_ALL csrc/cuda/torch_cuda_stub.cpp)
set_target_properties(torch_cuda PROPERTIES CXX_VISIBILITY_PRESET default
                                            LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/stub)

# The runtime is linked in, so that the library does not depend on the one that torch brings.
add_library(vitkernels_cuda MODULE EXCLUDE_FROM_ALL ${cuda_objects})
target_link_libraries(vitkernels_cuda PRIVATE torch_stable torch_cuda)
set_target_properties(vitkernels_cuda PROPERTIES OUTPUT_NAME vitkernels_cuda${cuda_major} INSTALL_RPATH ""
  LINKER_LANGUAGE CUDA CUDA_RUNTIME_LIBRARY Static)
if(NOT why_no_cuda)
  set_target_properties(vitkernels_cuda PROPERTIES EXCLUDE_FROM_ALL OFF)
  install(TARGETS vitkernels_cuda LIBRARY DESTINATION .)
endif()
