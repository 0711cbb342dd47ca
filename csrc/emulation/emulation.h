// CUDA C++ on the CPU, for tests: kernel sources are compiled by the host's compiler and run without a GPU.
//
//   g++ -std=c++17 -x c++ -DRK_EMULATED -ffp-contract=off -Wno-unknown-pragmas kernels.cu scheduler.cpp
//
// Every CUDA thread is a fiber, blocks run one after another. It is stricter than a GPU: a barrier or a warp primitive
// that some threads do not reach stops the grid, and uninitialised memory holds NaN. Under sanitizers (scheduler.cpp
// then wants RK_EMULATION_ASAN or RK_EMULATION_TSAN) errors of memory and races are reported as in C++ threads: only
// __syncthreads, __syncwarp and atomics after __threadfence order memory. It does not see the compiler for GPUs,
// streams (all work is done when its call returns), weak memory beyond these races, or speed.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

// --- vector types

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

#define RK_VECTOR2(T, name, alignment) \
  struct alignas(alignment) name {     \
    T x, y;                            \
  };                                   \
  constexpr name make_##name(T x, T y) { return {x, y}; }
#define RK_VECTOR4(T, name, alignment) \
  struct alignas(alignment) name {     \
    T x, y, z, w;                      \
  };                                   \
  constexpr name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
RK_VECTOR2(float, float2, 8)
RK_VECTOR4(float, float4, 16)
RK_VECTOR2(double, double2, 16)
RK_VECTOR2(int, int2, 8)
RK_VECTOR4(int, int4, 16)
RK_VECTOR2(unsigned, uint2, 8)
RK_VECTOR4(unsigned, uint4, 16)
RK_VECTOR2(unsigned short, ushort2, 4)
RK_VECTOR4(unsigned short, ushort4, 8)
RK_VECTOR2(unsigned long long, ulonglong2, 16)
#undef RK_VECTOR2
#undef RK_VECTOR4

// --- what a thread sees of itself: set at every switch

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace rk {
namespace emulation {

enum class Operation { syncwarp, shfl, shfl_up, shfl_down, shfl_xor, ballot };
struct Site {
  const char* file;
  int line;
};

unsigned block_barrier(bool predicate, Site site);  // the number of threads whose predicate holds
uint64_t warp_primitive(Operation operation, unsigned mask, uint64_t value, int argument, int width, Site site);
bool begin_atomic(const void* address);  // whether the thread has passed a fence, so that the atomic orders memory
void fence();
void* static_shared(const void* key, size_t bytes, Site site);
void* dynamic_shared();

// For tests.
struct Stats {
  uint64_t grids, blocks, threads, switches, barriers, warp_primitives, atomics;
};
extern Stats stats;
const char* last_failure();  // of this host thread's last kernel that failed: what, where, block and thread
enum Order { forward, backward, shuffled };
void set_order(int order);  // in which blocks, warps and lanes that can run do so; at first RK_EMULATION_ORDER
void fail_launch(int nth, int error);  // the nth launch from now (1: the next) gives this error and does not run
uint64_t launches();                   // until now, failed ones included
uint64_t waits();                      // until now: how often the host waited for a stream
void set_fast_doubles(bool fast);      // whether devices say that float64 is half as fast as float32, or 1/64
void set_capturing(bool capturing);    // whether streams say that they are captured into a graph

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "at most 64 bits");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(Operation operation, unsigned mask, T value, int argument, int width, Site site) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) >= 4, "CUDA shuffles values of 4 or 8 bytes");
  return from_bits<T>(warp_primitive(operation, mask, to_bits(value), argument, width, site));
}

template <class T, class... Allowed>
constexpr bool one_of = (std::is_same<T, Allowed>::value || ...);

// Real atomics, though no two threads run at once: thread sanitizers know them.
template <class T, class Change>
T atomically(T* address, Change change) {
  T old, next;
  const bool ordered = begin_atomic(address);
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  if (ordered) {
    do next = change(old);
    while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  } else {
    do next = change(old);
    while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  }
  return old;
}

template <class T>
struct Same {
  using type = T;
};
template <class T>
using Given = typename Same<T>::type;  // not deduced: converted, as by CUDA's overloads

}  // namespace emulation
}  // namespace rk

// --- shared memory: new for each block, all NaN

#define RK_SHARED(T, name, extents)                                                        \
  [[maybe_unused]] auto& name = *static_cast<T(*) extents>(::rk::emulation::static_shared( \
      []() -> const void* {                                                                \
        static const char key = 0;                                                         \
        return &key;                                                                       \
      }(),                                                                                 \
      sizeof(T extents), ::rk::emulation::Site{__FILE__, __LINE__}))
#define RK_DYNAMIC_SHARED(T, name) [[maybe_unused]] T* const name = static_cast<T*>(::rk::emulation::dynamic_shared())

// --- barriers and warp primitives, which know where they were called

#define RK_FROM const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define RK_SITE \
  ::rk::emulation::Site { file, line }

inline void __syncthreads(RK_FROM) { rk::emulation::block_barrier(false, RK_SITE); }
inline int __syncthreads_count(int predicate, RK_FROM) {
  return static_cast<int>(rk::emulation::block_barrier(predicate != 0, RK_SITE));
}
inline int __syncthreads_or(int predicate, RK_FROM) {
  return rk::emulation::block_barrier(predicate != 0, RK_SITE) != 0;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, RK_FROM) {
  rk::emulation::warp_primitive(rk::emulation::Operation::syncwarp, mask, 0, 0, 32, RK_SITE);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, RK_FROM) {
  return rk::emulation::shuffle(rk::emulation::Operation::shfl, mask, value, lane, width, RK_SITE);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, RK_FROM) {
  return rk::emulation::shuffle(rk::emulation::Operation::shfl_up, mask, value, static_cast<int>(delta), width,
                                RK_SITE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, RK_FROM) {
  return rk::emulation::shuffle(rk::emulation::Operation::shfl_down, mask, value, static_cast<int>(delta), width,
                                RK_SITE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, RK_FROM) {
  return rk::emulation::shuffle(rk::emulation::Operation::shfl_xor, mask, value, lanes, width, RK_SITE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, RK_FROM) {
  using rk::emulation::Operation;
  return static_cast<unsigned>(rk::emulation::warp_primitive(Operation::ballot, mask, predicate != 0, 0, 32, RK_SITE));
}
inline int __any_sync(unsigned mask, int predicate, RK_FROM) { return __ballot_sync(mask, predicate, file, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, RK_FROM) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}
#undef RK_FROM
#undef RK_SITE

inline void __threadfence() { rk::emulation::fence(); }
inline void __threadfence_block() { rk::emulation::fence(); }

// --- atomics

template <class T>
T atomicAdd(T* address, rk::emulation::Given<T> value) {
  static_assert(rk::emulation::one_of<T, int, unsigned, unsigned long long, float, double>, "not in CUDA");
  return rk::emulation::atomically(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMin(T* address, rk::emulation::Given<T> value) {
  static_assert(rk::emulation::one_of<T, int, unsigned, long long, unsigned long long>, "not in CUDA");
  return rk::emulation::atomically(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* address, rk::emulation::Given<T> value) {
  static_assert(rk::emulation::one_of<T, int, unsigned, long long, unsigned long long>, "not in CUDA");
  return rk::emulation::atomically(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicOr(T* address, rk::emulation::Given<T> value) {
  static_assert(rk::emulation::one_of<T, int, unsigned, unsigned long long>, "not in CUDA");
  return rk::emulation::atomically(address, [=](T old) { return old | value; });
}
template <class T>
T atomicExch(T* address, rk::emulation::Given<T> value) {
  static_assert(rk::emulation::one_of<T, int, unsigned, unsigned long long, float>, "not in CUDA");
  return rk::emulation::atomically(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, rk::emulation::Given<T> expected, rk::emulation::Given<T> value) {
  static_assert(rk::emulation::one_of<T, int, unsigned, unsigned long long>, "not in CUDA");
  return rk::emulation::atomically(address, [=](T old) { return old == expected ? value : old; });
}

// --- intrinsics. Compile with -ffp-contract=off: these products and sums must not be fused.

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }

inline int __float_as_int(float value) { return rk::emulation::from_bits<int>(rk::emulation::to_bits(value)); }
inline unsigned __float_as_uint(float value) { return static_cast<unsigned>(rk::emulation::to_bits(value)); }
inline float __int_as_float(int bits) { return rk::emulation::from_bits<float>(rk::emulation::to_bits(bits)); }
inline float __uint_as_float(unsigned bits) { return rk::emulation::from_bits<float>(bits); }
inline long long __double_as_longlong(double value) { return static_cast<long long>(rk::emulation::to_bits(value)); }
inline double __longlong_as_double(long long bits) {
  return rk::emulation::from_bits<double>(static_cast<uint64_t>(bits));
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

// --- the part of the host's interface that launching code uses

typedef struct CUstream_st* cudaStream_t;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorUnknown = 999
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrSingleToDoublePrecisionPerfRatio = 87,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
  int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, l2CacheSize;
};

// Errors belong to a host thread. A kernel's failure comes from whatever asks first.
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaMalloc(void** pointer, size_t bytes);  // all NaN
template <class T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(pointer), bytes);
}
cudaError_t cudaFree(void* pointer);
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

namespace rk {
namespace emulation {

// call(args) runs the kernel as the present thread.
void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*),
            const void* args);

template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<std::decay_t<Parameters>...> args;
  template <size_t... I>
  void run(std::index_sequence<I...>) const {
    kernel(std::get<I>(args)...);
  }
  static void run_this(const void* call) {
    static_cast<const Call*>(call)->run(std::index_sequence_for<Parameters...>());
  }
};

}  // namespace emulation
namespace cuda {

template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Args... args) {
  const emulation::Call<Parameters...> call{kernel, {static_cast<Parameters>(args)...}};
  emulation::launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, call.run_this, &call);
}

}  // namespace cuda
}  // namespace rk
