// What the launching code shares: one block of device memory a call, tables of rows, checked launches.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "device.cuh"
#include "kernels.h"

namespace rk {
namespace cuda {

// call(a value of the storage type).
template <class F>
void by_dtype(DType dtype, F&& call) {
  switch (dtype) {
    case DType::float16:
      return call(Half{});
    case DType::bfloat16:
      return call(Bfloat{});
    case DType::float32:
      return call(float{});
    default:
      return call(double{});
  }
}

// Makes a device the current one, and the one before it again at the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : refused_(cudaGetDevice(&before_)) {
    if (refused_ == cudaSuccess) refused_ = cudaSetDevice(device);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  ~CurrentDevice() { cudaSetDevice(before_); }
  cudaError_t refused() const { return refused_; }

 private:
  int before_ = 0;
  cudaError_t refused_;
};

// Queues kernels on a call's stream and turns what the runtime refuses into errors that name the kernel and the sizes.
class Queue {
 public:
  Queue(const Rows& rows, const Call& call) : rows_(rows), call_(call), current_(call.device) {
    check(current_.refused(), "choosing the device");
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream(), &status), "asking for the state of the stream");
    // A graph would keep the address of tables that are gone when it is launched.
    if (status != cudaStreamCaptureStatusNone)
      throw Error("the stream is being captured into a CUDA graph, which calls of robustkern cannot be part of " +
                  sizes());
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(call_.stream); }
  const Call& call() const { return call_; }

  template <class... P, class... A>
  void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes, A&&... args) {
    rk::cuda::launch(kernel, grid, block, shared_bytes, stream(), std::forward<A>(args)...);
    check(cudaGetLastError(), name);
  }
  // Before a launch with more shared memory than any kernel may have unasked.
  template <class... P>
  void allow_shared_bytes(const char* name, void (*kernel)(P...), std::size_t bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
  }
  void upload(void* device, const void* host, std::size_t bytes) {
    if (bytes) check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream()), "uploading the tables");
  }
  void copy(void* to, const void* from, std::size_t bytes) {
    if (bytes) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream()), "copying the result");
  }
  void clear(void* device, std::size_t bytes) {
    if (bytes) check(cudaMemsetAsync(device, 0, bytes, stream()), "clearing the workspace");
  }
  // The one wait of a call: for results that the host goes on with.
  void download(void* host, const void* device, std::size_t bytes, const char* name) {
    if (bytes) check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream()), name);
    check(cudaStreamSynchronize(stream()), name);
  }

  void check(cudaError_t error, const char* what) const {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();  // so that it is not reported again by whoever asks next
    throw Error(std::string(what) + " failed " + sizes() + ": " + cudaGetErrorString(error) + " (" +
                cudaGetErrorName(error) + ")" + explanation());
  }

 private:
  std::string sizes() const {
    static const char* const dtypes[] = {"float16", "bfloat16", "float32", "float64"};
    return "for n=" + std::to_string(rows_.n) + " rows of d=" + std::to_string(rows_.columns()) + " " +
           dtypes[static_cast<int>(rows_.dtype)] + " columns on device " + std::to_string(call_.device);
  }
  static std::string explanation() {
#if defined(RK_EMULATED)
    return std::string(": ") + emulation::last_failure();
#else
    return "";
#endif
  }
  const Rows& rows_;
  const Call& call_;
  const CurrentDevice current_;
};

// A part of a call's device memory, before and after it is allocated.
template <class T>
struct Part {
  std::size_t at;
};

// One block of device memory, cut into parts: first those that come from the host, then those that begin as zeros, then
// scratch. Reserve, allocate, point, send, use.
class Workspace {
 public:
  template <class T>
  Part<T> upload(const T* values, std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T), at = host_.size();
    host_.resize((at + bytes + 15) / 16 * 16);
    if (bytes) std::memcpy(host_.data() + at, values, bytes);
    return {at};
  }
  // Pointers into this block, which point() sets once it is allocated.
  Part<const void*> pointers(std::int64_t count) {
    const std::size_t at = host_.size();
    host_.resize((at + static_cast<std::size_t>(count) * sizeof(void*) + 15) / 16 * 16);
    return {at};
  }
  template <class T>
  Part<T> zeros(std::int64_t count) {
    return reserve<T>(zeros_bytes_, kZeros, count);
  }
  template <class T>
  Part<T> scratch(std::int64_t count) {
    return reserve<T>(scratch_bytes_, kScratch, count);
  }
  void allocate(Queue& queue) {
    const std::size_t host = round_up(host_.size()), zeros = round_up(zeros_bytes_);
    base_ = static_cast<char*>(queue.call().allocate(queue.call().context, host + zeros + scratch_bytes_ + kAlignment));
    base_ += (kAlignment - reinterpret_cast<std::uintptr_t>(base_) % kAlignment) % kAlignment;
    zeros_ = base_ + host;
    scratch_ = zeros_ + zeros;
  }
  template <class T>
  void point(Part<const void*> at, Part<T> first, std::int64_t stride, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      const void* pointer = (*this)[first] + i * stride;
      std::memcpy(host_.data() + at.at + static_cast<std::size_t>(i) * sizeof(pointer), &pointer, sizeof(pointer));
    }
  }
  void send(Queue& queue) const {
    queue.upload(base_, host_.data(), host_.size());
    queue.clear(zeros_, zeros_bytes_);
  }
  template <class T>
  T* operator[](Part<T> part) const {
    char* base = part.at & kZeros ? zeros_ : part.at & kScratch ? scratch_ : base_;
    return reinterpret_cast<T*>(base + (part.at & ~(kZeros | kScratch)));
  }

 private:
  static constexpr std::size_t kAlignment = 256, kZeros = std::size_t{1} << 62, kScratch = std::size_t{1} << 61;
  static std::size_t round_up(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
  template <class T>
  Part<T> reserve(std::size_t& total, std::size_t kind, std::int64_t count) {
    const std::size_t at = total;
    total = round_up(total + static_cast<std::size_t>(count) * sizeof(T));
    return {at | kind};
  }
  std::vector<char> host_;
  std::size_t zeros_bytes_ = 0, scratch_bytes_ = 0;
  char *base_ = nullptr, *zeros_ = nullptr, *scratch_ = nullptr;
};

inline std::int64_t tiles_of(std::int64_t columns, int width) { return (columns + width - 1) / width; }

// Rows as kernels see them, in tiles of one width.
class UploadedRows {
 public:
  UploadedRows(Workspace& space, const Rows& rows, int width) : space_(space), rows_(rows), width_(width) {
    data_ = space.upload(rows.data, rows.n_segments * rows.n);
    if (rows.n_segments == 1) return;
    std::vector<std::int64_t> starts(static_cast<std::size_t>(rows.n_segments) + 1);
    for (std::int64_t s = 0; s < rows.n_segments; ++s)
      starts[static_cast<std::size_t>(s) + 1] =
          starts[static_cast<std::size_t>(s)] + tiles_of(rows.offsets[s + 1] - rows.offsets[s], width);
    n_tiles_ = starts.back();
    offsets_ = space.upload(rows.offsets, rows.n_segments + 1);
    starts_ = space.upload(starts.data(), rows.n_segments + 1);
  }
  std::int64_t n_tiles() const { return rows_.n_segments == 1 ? tiles_of(rows_.columns(), width_) : n_tiles_; }
  Table table() const {
    if (rows_.n_segments == 1) return run(0, 0, rows_.columns(), width_);
    return {space_[data_], space_[offsets_], space_[starts_], rows_.n_segments, rows_.n, 0, 0, n_tiles_};
  }
  // Some columns of a segment.
  Table run(std::int64_t segment, std::int64_t first, std::int64_t columns, int width) const {
    return {space_[data_] + segment * rows_.n, nullptr, nullptr, 1, rows_.n, first, columns, tiles_of(columns, width)};
  }

 private:
  const Workspace& space_;
  const Rows& rows_;
  int width_;
  std::int64_t n_tiles_ = 0;
  Part<const void*> data_;
  Part<std::int64_t> offsets_{}, starts_{};
};

// Blocks of a grid at most, which walk on from tile to tile. Tests lower it, so that few columns are several tiles.
inline std::int64_t most_blocks = (std::int64_t{1} << 31) - 1;

inline std::int64_t lesser(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

inline unsigned grid_for(std::int64_t n_tiles) { return static_cast<unsigned>(lesser(n_tiles, most_blocks)); }

// How many blocks share the tiles where each keeps sums of its own, between `least` and `most`, in memory for so many
// sums: the same on every device, for the same bits.
inline std::int64_t summing_blocks(std::int64_t n_tiles, std::int64_t sums_per_block, std::int64_t all_sums,
                                   std::int64_t least, std::int64_t most) {
  const std::int64_t fit = all_sums / (sums_per_block > 0 ? sums_per_block : 1);
  return lesser(grid_for(n_tiles), fit < least ? least : lesser(fit, most));
}
// For a sum or two of each row.
inline std::int64_t summing_blocks(std::int64_t n_tiles, std::int64_t sums_per_block) {
  return summing_blocks(n_tiles, sums_per_block, std::int64_t{1} << 21, 64, 2048);
}

// True where rows and results may be read and written 16 bytes at a time.
inline bool all_aligned(const void* const* pointers, std::int64_t count) {
  std::uintptr_t bits = 0;
  for (std::int64_t i = 0; i < count; ++i) bits |= reinterpret_cast<std::uintptr_t>(pointers[i]);
  return bits % 16 == 0;
}

}  // namespace cuda
}  // namespace rk
