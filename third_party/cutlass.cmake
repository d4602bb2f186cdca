# CUTLASS is headers only: target `cutlass`, from a checkout (CUTLASS_DIR) or the pinned wheel (README.md), if there is
# one.
set(CUTLASS_DIR "" CACHE PATH "A checkout of CUTLASS, instead of the headers in the Python environment")

if(CUTLASS_DIR)
  set(cutlass_include ${CUTLASS_DIR}/include)
else()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
    OUTPUT_VARIABLE cutlass_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(cutlass_include ${cutlass_package}/source/include)
endif()
if(NOT EXISTS ${cutlass_include}/cute/tensor.hpp)
  set(why_no_cutlass "CUTLASS was not found: pip install --no-deps nvidia-cutlass==4.2.0.0, or set CUTLASS_DIR to a checkout")
  return()
endif()
file(STRINGS ${cutlass_include}/cutlass/version.h cutlass_version REGEX "define CUTLASS_(MAJOR|MINOR|PATCH)")
string(REGEX MATCHALL "[0-9]+" cutlass_version "${cutlass_version}")
list(JOIN cutlass_version "." cutlass_version)
message(STATUS "CUTLASS ${cutlass_version} in ${cutlass_include}")

add_library(cutlass INTERFACE)
target_include_directories(cutlass SYSTEM INTERFACE ${cutlass_include})
