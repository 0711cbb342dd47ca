// A tile of the columns: how large, how it is read, what is fetched ahead of it, how its results are written.
#pragma once
#include "simd.h"

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
RK_INLINE int64_t item_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Columns of a segment of the rows.
struct Tile {
  int64_t segment, first, columns;

  template <class S>
  const S* of(const Rows& rows, int64_t row) const {
    return static_cast<const S*>(rows.data[segment * rows.n + row]) + first;
  }
};

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
  Ahead() : Ahead(nullptr, 0, 0, 0, 1) {}  // nothing
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

// The tile after one, if the segment goes on.
template <class S>
RK_INLINE Ahead ahead_of(const Rows& rows, const Tile& tile, int64_t steps) {
  const int64_t end = tile.first + tile.columns, length = rows.offsets[tile.segment + 1] - rows.offsets[tile.segment];
  constexpr int64_t item = static_cast<int64_t>(sizeof(S));
  return Ahead(rows.data + tile.segment * rows.n, rows.n, end * item, min64(tile.columns, length - end) * item, steps);
}

// Points src[i] at the values of row i: in place where they are whole vectors, otherwise (a tail) copied into `buffer`
// (n, stride), with zeros up to a whole vector.
template <class S>
RK_INLINE void read_tile(const Rows& rows, const Tile& tile, int64_t stride, S* buffer, const S** src) {
  const int64_t padded = round_up(tile.columns, kStored<S>);
  for (int64_t i = 0; i < rows.n; ++i) {
    src[i] = tile.of<S>(rows, i);
    if (padded == tile.columns) continue;
    S* copy = buffer + i * stride;
    memcpy(copy, src[i], sizeof(S) * static_cast<size_t>(tile.columns));
    memset(copy + tile.columns, 0, sizeof(S) * static_cast<size_t>(padded - tile.columns));
    src[i] = copy;
  }
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
// Columns of a row of results.
template <class S>
RK_INLINE void write_tile(void* row, const Tile& tile, const S* values, bool streamed) {
  write_run(reinterpret_cast<char*>(static_cast<S*>(row) + tile.first), reinterpret_cast<const char*>(values),
            tile.columns * static_cast<int64_t>(sizeof(S)), streamed);
}

}  // namespace RK_ISA
}  // namespace rk
