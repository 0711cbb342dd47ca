// The least that the CUDA backend needs: its headers and a kernel, see CMakeLists.txt.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace {

template <typename T>
__global__ void fill(T* values, T value) {
  values[blockIdx.x * blockDim.x + threadIdx.x] = std::is_integral<T>::value ? value : sqrt(value);
}

}  // namespace

extern "C" int check() {
  std::vector<float> values(32);
  fill<<<1, 32>>>(values.data(), 1.0f);
  return cudaGetLastError();
}
