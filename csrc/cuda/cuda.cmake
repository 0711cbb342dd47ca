# The CUDA backend, robustkern._cuda: a module of its own, so that robustkern works without a GPU's driver.
# RK_CUDA_STATE becomes robustkern._cpu.cuda: what was built, or why nothing was.

if(RK_CUDA STREQUAL "OFF")
  set(RK_CUDA_STATE "not built: switched off (RK_CUDA=OFF)")
  return()
elseif(NOT RK_CUDA MATCHES "^(AUTO|ON)$")
  message(FATAL_ERROR "RK_CUDA must be AUTO, ON or OFF; got '${RK_CUDA}'")
endif()

# Leaves RK_CUDA_STATE with the reason, or, where CUDA was asked for, fails.
macro(rk_no_cuda reason)
  set(RK_CUDA_STATE "not built: ${reason} (install CUDA 12.8 or newer with nvcc on PATH, then reinstall robustkern)")
  if(RK_CUDA STREQUAL "ON")
    message(FATAL_ERROR "RK_CUDA=ON, but: ${reason}. Install CUDA 12.8 or newer, and put nvcc on PATH or set CUDACXX to it; "
                        "RK_CUDA=OFF builds without.")
  endif()
  message(STATUS "The CUDA backend is ${RK_CUDA_STATE}")
  return()
endmacro()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  rk_no_cuda("there was no CUDA compiler that works")
endif()
# From Turing on; the last one also as PTX, for what is newer.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 90-real 100-real 120)
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  rk_no_cuda("the CUDA compiler is version ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
find_package(CUDAToolkit)
if(NOT TARGET CUDA::cudart_static)
  rk_no_cuda("the CUDA installation has no static runtime")
endif()
string(REPLACE ";" " " RK_CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
set(RK_CUDA_STATE "built with CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${RK_CUDA_ARCHITECTURES}")

# Sums that carry their rounding errors need every product rounded: no contraction, as on the CPU.
add_library(rk_cuda OBJECT csrc/cuda/select.cu csrc/cuda/gram.cu csrc/cuda/sums.cu)
set_target_properties(rk_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden)
target_compile_options(rk_cuda PRIVATE --threads=2 -fmad=false -Xfatbin=-compress-all -Xcompiler=-Wall,-Wextra)
if(RK_WERROR)
  target_compile_options(rk_cuda PRIVATE -Werror=all-warnings -Xcompiler=-Werror -Xptxas=-warn-spills,-Werror)
endif()

nanobind_add_module(_cuda NB_STATIC FREE_THREADED csrc/bindings/module_cuda.cpp $<TARGET_OBJECTS:rk_cuda>)
target_compile_definitions(_cuda PRIVATE RK_VERSION="${PROJECT_VERSION}" RK_CUDA_ARCHITECTURES="${RK_CUDA_ARCHITECTURES}")
target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${RK_WARNINGS}>)
# Static: whatever CUDA runtime torch or CuPy bring stays theirs.
target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
install(TARGETS _cuda LIBRARY DESTINATION robustkern)
