// How the columns are walked: a fixed grid of tasks (so that bits do not depend on the number of threads),
// tasks cut at segment borders into pieces, pieces walked in tiles that stay in cache.
#pragma once
#include <stdlib.h>

#include "simd.h"
#include "team.h"

namespace rk {
namespace RK_ISA {

RK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
RK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
RK_INLINE int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

template <class S>
using ComputeOf = typename Storage<S>::Compute;

// call(a value of the storage type).
template <class F>
RK_INLINE Status by_dtype(DType dtype, F&& call) {
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

// Columns per tile: about 64 KiB of values, a multiple of 64 (of 16 for thousands of rows). From 33 to 128 rows runs of
// 512 bytes: what is fetched ahead comes at the pace of the sorting (median of 64 rows: 1.5 reads with 1 KiB, 1.3 so).
RK_INLINE int64_t tile_columns(int64_t n, int64_t value_bytes) {
  if (n > 32 && n <= 128) return 512 / value_bytes;
  const int64_t fit = 65536 / (max64(n, 1) * value_bytes);
  return fit >= 64 ? min64(fit / 64 * 64, 1024) : n <= 1024 ? 64 : 16;
}

// Fetches the next tile into the second-level cache, row by row, while the present one is computed: for rows too many
// for the hardware to follow. A burst of prefetches fills the miss queue and waits, so they are strewn over the work:
// pair() of lines wherever some dozen cycles have passed, step() where a share of the work is done.
class Ahead {
 public:
  // A tile of `bytes` of each row begins `skip` bytes into it; step() will be called `steps` times.
  Ahead(const void* const* rows, int64_t n, int64_t skip, int64_t bytes, int64_t steps)
      : rows_(rows), left_(bytes > 0 ? n : 0), skip_(skip), bytes_(bytes) {
    const int64_t pairs = left_ * ((bytes + 127) / 128);
    share_ = credit_ = (pairs + steps - 1) / max64(steps, 1);
    next_row();
  }
  RK_INLINE void pair() {
    if (credit_ <= 0) return;
    --credit_;
    __builtin_prefetch(next_, 0, 2);
    __builtin_prefetch(next_ + 64, 0, 2);
    next_ += 128;
    if (next_ >= end_) next_row();
  }
  RK_INLINE void step() {
    while (credit_ > 0) pair();
    credit_ = left_ < 0 ? 0 : share_;
  }

 private:
  void next_row() {
    if (--left_ < 0) {
      credit_ = 0;
      return;
    }
    next_ = static_cast<const char*>(*rows_++) + skip_;
    end_ = next_ + bytes_;
  }
  const void* const* rows_;
  int64_t left_, skip_, bytes_, share_, credit_;
  const char *next_ = nullptr, *end_ = nullptr;
};

struct Grid {
  int64_t columns, task_columns, n_tasks;
};

RK_INLINE Grid make_grid(int64_t columns, int64_t task_columns) {
  return {columns, task_columns, (columns + task_columns - 1) / task_columns};
}

// Tasks of about a quarter of a million values: small enough to balance, large enough to hide their overhead.
RK_INLINE Grid streaming_grid(const Rows& rows, int64_t tile) {
  const int64_t wanted = (int64_t{1} << 18) / max64(rows.n, 1);
  return make_grid(rows.columns(), max64(wanted / tile, 1) * tile);
}

// body(segment, first column within it, columns) for each piece of the columns [begin, end) of all segments.
template <class Body>
RK_INLINE void for_pieces(const Rows& rows, int64_t begin, int64_t end, Body&& body) {
  int64_t low = 0, high = rows.n_segments - 1;  // the last segment that starts at or before begin
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (rows.offsets[middle] <= begin)
      low = middle;
    else
      high = middle - 1;
  }
  for (int64_t s = low; begin < end; ++s) {
    const int64_t stop = min64(end, rows.offsets[s + 1]);
    if (stop > begin) body(s, begin - rows.offsets[s], stop - begin);
    begin = max64(begin, stop);
  }
}

template <class Body>
RK_INLINE void for_task_pieces(const Rows& rows, const Grid& grid, int64_t task, Body&& body) {
  const int64_t begin = task * grid.task_columns;
  for_pieces(rows, begin, min64(begin + grid.task_columns, grid.columns), body);
}

// Results so large that no cache would keep them are written past it, which saves reading them first.
constexpr int64_t kStreamedBytes = int64_t{1} << 23;

RK_INLINE void write_run(char* dst, const char* src, int64_t bytes, [[maybe_unused]] bool streamed) {
#if defined(__AVX2__)
  if (streamed) {
    const int64_t head = min64((32 - reinterpret_cast<intptr_t>(dst) % 32) % 32, bytes);
    memcpy(dst, src, static_cast<size_t>(head));
    int64_t j = head;
    for (; j + 32 <= bytes; j += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + j),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + j)));
    memcpy(dst + j, src + j, static_cast<size_t>(bytes - j));
    return;
  }
#endif
  memcpy(dst, src, static_cast<size_t>(bytes));
}

// The tile after one that ends at a column of a segment, if the segment goes on.
template <class S>
RK_INLINE Ahead ahead_of(const Rows& rows, int64_t segment, int64_t end, int64_t columns, int64_t steps) {
  const int64_t left = rows.offsets[segment + 1] - rows.offsets[segment] - end;
  constexpr int64_t item = static_cast<int64_t>(sizeof(S));
  return Ahead(rows.data + segment * rows.n, rows.n, end * item, min64(columns, left) * item, steps);
}

// Sets the marks that a thread has found among those of all threads. No lock: a process that forks meanwhile would hand
// its child one that is taken for good.
RK_INLINE void mark(uint8_t* all, const uint8_t* found, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (found[i]) __atomic_store_n(all + i, uint8_t{1}, __ATOMIC_RELAXED);
}

// The tasks of a grid over rows, or some of them, for the threads of a call.
template <class S>
RK_INLINE Tasks tasks_of(const Grid& grid, const Rows& rows, int threads) {
  return Tasks(grid.n_tasks, threads, grid.columns * rows.n * static_cast<int64_t>(sizeof(S)));
}

// True where all the values of a row are numbers; `columns` is a multiple of the vector.
template <class S>
RK_INLINE bool is_finite_run(const S* row, int64_t columns) {
  if constexpr (sizeof(S) == 2) {
    I16 most = {};
    for (int64_t j = 0; j < columns; j += kStored<S>)
      most = vmax(most, *reinterpret_cast<const UnalignedI16*>(row + j) & 0x7fff);
    return !any_set(most >= Storage<S>::infinity);
  } else {
    typename Simd<S>::V check = {};
    for (int64_t j = 0; j < columns; j += kStored<S>) check = fmadd(load(row + j), typename Simd<S>::V{}, check);
    return !any_nan(check);
  }
}

// One aligned block cut into typed parts, one of them per thread; freed at the end of the scope.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (base_ != small_) free(base_);
  }

  // Reserves count values and returns the part's offset; call before allocate().
  template <class T>
  int64_t reserve(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;
    return at;
  }
  bool allocate(int threads) {
    stride_ = (bytes_ + 4095) / 4096 * 4096 + 64;
    if (threads == 1 && bytes_ <= static_cast<int64_t>(sizeof(small_))) {
      base_ = small_;
      return true;
    }
    base_ = static_cast<char*>(aligned_alloc(64, static_cast<size_t>((stride_ * threads + 63) / 64 * 64)));
    return base_ != nullptr;
  }
  template <class T>
  T* part(int thread, int64_t offset) const {
    return reinterpret_cast<T*>(base_ + thread * stride_ + offset);
  }

 private:
  alignas(64) char small_[8192];  // a small call would feel an allocation
  char* base_ = nullptr;
  int64_t bytes_ = 0, stride_ = 0;
};

// Points src[i] at `columns` values of row i: in place where they are whole vectors, otherwise (a tail) copied into
// `buffer` (n, stride), with zeros up to a whole vector.
template <class S>
RK_INLINE void read_tile(const Rows& rows, int64_t segment, int64_t first, int64_t columns, int64_t stride, S* buffer,
                         const S** src) {
  const int64_t padded = round_up(columns, kStored<S>);
  for (int64_t i = 0; i < rows.n; ++i) {
    src[i] = static_cast<const S*>(rows.data[segment * rows.n + i]) + first;
    if (padded == columns) continue;
    S* copy = buffer + i * stride;
    memcpy(copy, src[i], sizeof(S) * static_cast<size_t>(columns));
    memset(copy + columns, 0, sizeof(S) * static_cast<size_t>(padded - columns));
    src[i] = copy;
  }
}

}  // namespace RK_ISA
}  // namespace rk
