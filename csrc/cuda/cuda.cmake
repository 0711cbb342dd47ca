# The CUDA backend, robustkern._cuda: a module of its own, so that robustkern works without a GPU's driver.
# RK_CUDA_STATE becomes robustkern._cpu.cuda: what was built, or why nothing was.

if(RK_CUDA STREQUAL "OFF")
  set(RK_CUDA_STATE "not built: switched off by RK_CUDA=OFF. Reinstall robustkern without it")
  return()
elseif(NOT RK_CUDA MATCHES "^(AUTO|ON)$")
  message(FATAL_ERROR "RK_CUDA must be AUTO, ON or OFF; got '${RK_CUDA}'")
endif()

# Sets `reason`, empty where check/ can be built. In a project of its own: to enable a language whose compiler is missing,
# too old or at odds with the host's ends the build, and to have no CUDA is no reason to lose the C++ backend.
function(rk_try_cuda)
  set(folder "${CMAKE_BINARY_DIR}/cuda-check")
  file(REMOVE_RECURSE "${folder}")
  file(WRITE "${folder}/settings.cmake" "set(RK_ARCHITECTURES [==[${CMAKE_CUDA_ARCHITECTURES}]==] CACHE STRING \"\")\n")
  foreach(name CMAKE_MAKE_PROGRAM CMAKE_TOOLCHAIN_FILE CMAKE_CXX_COMPILER CMAKE_CXX_FLAGS CMAKE_CUDA_COMPILER
               CMAKE_CUDA_HOST_COMPILER CMAKE_CUDA_FLAGS CUDAToolkit_ROOT)
    if(NOT "${${name}}" MATCHES "^$|NOTFOUND$")
      file(APPEND "${folder}/settings.cmake" "set(${name} [==[${${name}}]==] CACHE STRING \"\")\n")
    endif()
  endforeach()
  set(cmake "${CMAKE_COMMAND}" -E env LC_ALL=C "${CMAKE_COMMAND}")
  set(results RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
  execute_process(COMMAND ${cmake} -C "${folder}/settings.cmake" -G "${CMAKE_GENERATOR}" -B "${folder}"
                          -S "${CMAKE_SOURCE_DIR}/csrc/cuda/check" ${results})
  if(NOT failed)
    execute_process(COMMAND ${cmake} --build "${folder}" ${results})
  endif()
  set(reason "")
  if(failed)
    file(WRITE "${folder}/said.txt" "${said}")
    # In one line, as it can go through a command line into a string; then the first error, a compiler's or else CMake's.
    string(REGEX REPLACE "[^A-Za-z0-9'!()*+,./:<=>?@_{}~-]+" " " said "${said}")
    if(said MATCHES "No CMAKE_CUDA_COMPILER could be found")
      set(reason "there was no CUDA compiler")
    elseif(said MATCHES "(error|fatal) *: (.*)")
      set(reason "CUDA did not work: ${CMAKE_MATCH_2}")
    elseif(said MATCHES "CMake Error at [^ ]+ [^ ]+ (.*)")
      set(reason "CUDA did not work: ${CMAKE_MATCH_1}")
    else()
      set(reason "CUDA did not work: ${said}")
    endif()
    string(REGEX REPLACE " (Call Stack|-- Config|CMake will not|The nvcc flag|ninja: build|make [0-9]+ :).*" "" reason
                         "${reason}")
    string(SUBSTRING "${reason}" 0 200 reason)
    string(REGEX REPLACE "[ .]+$" "" reason "${reason}")
  endif()
  set(reason "${reason}" PARENT_SCOPE)
endfunction()

# From Turing on; 8.6 and 8.9 run the code of 8.0. The last one also as PTX, for what is newer. What does not depend on
# the architecture is compiled twice, before and from Blackwell on, and assembled for each: a fifth of a build's time.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 90-real 100-real 120)
  set(RK_CUDA_INDEPENDENT "--generate-code=arch=compute_75,code=[sm_75,sm_80,sm_90]"
                          "--generate-code=arch=compute_100,code=[sm_100,sm_120,compute_100]")
endif()
if(NOT RK_CUDA_TRIED STREQUAL "works: ${CMAKE_CUDA_COMPILER} for ${CMAKE_CUDA_ARCHITECTURES}")
  message(STATUS "Trying CUDA")
  rk_try_cuda()
  if(reason)
    string(CONCAT remedy "Install CUDA 12.8 or newer with nvcc on PATH (or CUDACXX set to it) and a host compiler that "
                         "it supports (or CUDAHOSTCXX set to one), then reinstall robustkern")
    set(RK_CUDA_STATE "not built: ${reason}. ${remedy}")
    if(RK_CUDA STREQUAL "ON")
      file(READ "${CMAKE_BINARY_DIR}/cuda-check/said.txt" said)
      message("${said}")
      message(FATAL_ERROR "RK_CUDA=ON, but ${reason}. ${remedy}. RK_CUDA=OFF builds without.")
    endif()
    return()
  endif()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(RK_CUDA_TRIED "works: ${CMAKE_CUDA_COMPILER} for ${CMAKE_CUDA_ARCHITECTURES}" CACHE INTERNAL "not to try again")
string(REPLACE ";" " " RK_CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
set(RK_CUDA_STATE "built with CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${RK_CUDA_ARCHITECTURES}")

# Sums that carry their rounding errors need every product rounded: no contraction, as on the CPU.
add_library(rk_cuda_independent OBJECT csrc/cuda/select.cu csrc/cuda/sums.cu)
add_library(rk_cuda OBJECT csrc/cuda/mixed.cu csrc/cuda/gram.cu)
foreach(target rk_cuda_independent rk_cuda)
  set_target_properties(${target} PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden)
  target_compile_options(${target} PRIVATE --threads=2 -fmad=false -Xfatbin=-compress-all -Xcompiler=-Wall,-Wextra)
  if(RK_WERROR)
    target_compile_options(${target} PRIVATE -Werror=all-warnings -Xcompiler=-Werror -Xptxas=-warn-spills,-Werror)
  endif()
endforeach()
if(RK_CUDA_INDEPENDENT)
  set_target_properties(rk_cuda_independent PROPERTIES CUDA_ARCHITECTURES OFF)
  target_compile_options(rk_cuda_independent PRIVATE ${RK_CUDA_INDEPENDENT})
endif()

nanobind_add_module(_cuda NB_STATIC FREE_THREADED csrc/bindings/module_cuda.cpp $<TARGET_OBJECTS:rk_cuda>
                    $<TARGET_OBJECTS:rk_cuda_independent>)
target_compile_definitions(_cuda PRIVATE RK_VERSION="${PROJECT_VERSION}" RK_CUDA_ARCHITECTURES="${RK_CUDA_ARCHITECTURES}")
target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${RK_WARNINGS}>)
# Static: whatever CUDA runtime torch or CuPy bring stays theirs.
target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
install(TARGETS _cuda LIBRARY DESTINATION robustkern)
