# robustkern._cuda for this processor: the same kernels and bindings, run by csrc/emulation. For tests; never installed.
# RK_EMULATION: plain, address (ASan and UBSan) or thread (TSan).

set(RK_SANITIZE ${RK_WATCH_${RK_EMULATION}})

add_library(rk_kernels OBJECT csrc/cuda/select.cu csrc/cuda/mixed.cu csrc/cuda/gram.cu csrc/cuda/sums.cu)
set_source_files_properties(csrc/cuda/select.cu csrc/cuda/mixed.cu csrc/cuda/gram.cu csrc/cuda/sums.cu PROPERTIES LANGUAGE CXX)
target_compile_options(rk_kernels PRIVATE -Wno-unknown-pragmas ${RK_SANITIZE})
# The scheduler's own state is not the kernels': it is not watched, but tells who watches what it switches to.
add_library(rk_scheduler OBJECT csrc/emulation/scheduler.cpp)
target_compile_definitions(rk_scheduler PRIVATE $<$<STREQUAL:${RK_EMULATION},address>:RK_EMULATION_ASAN>
                                                $<$<STREQUAL:${RK_EMULATION},thread>:RK_EMULATION_TSAN>)

nanobind_add_module(_cuda NB_STATIC csrc/bindings/module_cuda.cpp $<TARGET_OBJECTS:rk_kernels>
                    $<TARGET_OBJECTS:rk_scheduler>)
target_compile_definitions(_cuda PRIVATE RK_VERSION="${PROJECT_VERSION}" RK_CUDA_ARCHITECTURES="emulated")
target_link_options(_cuda PRIVATE ${RK_SANITIZE})
# Without sanitizers -O2 takes no longer to compile, and a quarter less to run.
set(RK_OPTIMIZATION -O$<IF:$<STREQUAL:${RK_EMULATION},plain>,2,1>)
foreach(target rk_kernels rk_scheduler _cuda)
  target_compile_definitions(${target} PRIVATE RK_EMULATED)
  target_compile_options(${target} BEFORE PRIVATE ${RK_WARNINGS} ${RK_OPTIMIZATION} -g1 -ffp-contract=off)
endforeach()
