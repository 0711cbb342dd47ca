// Compiled once per instruction set: row_sq_distances and sq_distances_to_average.
#include "walk.h"

namespace rk {
namespace RK_ISA {
namespace {

// ---- row_sq_distances ----------------------------------------------------------------------------------

// Columns of a tile. Of 128 rows, with 256 bytes of each at a time, exact distances took 5.6 reads and plain ones 3.4;
// with 4096 bytes 3.0 and 1.5, and plain ones of four rows together 1.1.
constexpr int64_t kDistanceColumns = 1024;
constexpr int64_t kTogether = 4;  // centres that a row is measured from at a time
constexpr int64_t kChains = 4;    // sums of a row, because each waits for the one before

// Adds the squared distance of a row times scale to a centre over a tile, exactly.
template <class S>
RK_INLINE void add_exactly(const S* x, const double* centre, int64_t columns, double scale, DoubledSum* total) {
  DoubledSum sum[kChains];
  memcpy(sum, total, sizeof(sum));
  int64_t j = 0;
  for (; j + kChains * kDoubles <= columns; j += kChains * kDoubles)
#pragma GCC unroll 4
    for (int64_t v = 0; v < kChains; ++v)
      add_square(sum[v], load_double(x + j + v * kDoubles) * scale, load(centre + j + v * kDoubles));
  for (; j < columns; j += kDoubles)  // padding: zeros on both sides
    add_square(sum[0], load_double(x + j) * scale, load(centre + j));
  memcpy(total, sum, sizeof(sum));
}

// The squared distances of some rows times scale to some centres over a tile, in float64, row after row. Meanwhile the
// next rows are fetched.
template <int64_t kRows, int64_t kCentres, class S>
RK_INLINE void sq_distances(const S* const* x, const S* const* next, const double* centres, int64_t columns,
                            double scale, double* out) {
  constexpr int64_t kVectors = kRows * kCentres < 4 ? 4 : kRows * kCentres < 8 ? 2 : 1, step = kVectors * kDoubles;
  F64 sum[kRows * kCentres][kVectors] = {};
  const auto add = [&](int64_t j, int64_t v) {
    F64 centre[kCentres];
#pragma GCC unroll 4
    for (int64_t c = 0; c < kCentres; ++c) centre[c] = load(centres + c * kDistanceColumns + j);
#pragma GCC unroll 4
    for (int64_t p = 0; p < kRows; ++p) {
      F64 value = load_double(x[p] + j);
      if (scale != 1) value *= scale;
#pragma GCC unroll 4
      for (int64_t c = 0; c < kCentres; ++c) {
        const F64 difference = value - centre[c];
        sum[p * kCentres + c][v] = fmadd(difference, difference, sum[p * kCentres + c][v]);
      }
    }
  };
  int64_t j = 0;
  for (; j + step <= columns; j += step) {
#pragma GCC unroll 4
    for (int64_t p = 0; p < kRows; ++p)
      for (int64_t byte = 0; byte < step * static_cast<int64_t>(sizeof(S)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(next[p] + j) + byte);
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) add(j + v * kDoubles, v);
  }
  for (; j < columns; j += kDoubles) add(j, 0);
#pragma GCC unroll 8
  for (int64_t k = 0; k < kRows * kCentres; ++k) {
    F64 total = sum[k][0];
    for (int64_t v = 1; v < kVectors; ++v) total += sum[k][v];
    out[k] = sum_lanes(total);
  }
}

// Adds those of all n rows to partial sums, centre after centre.
template <int64_t kCentres, class S>
void add_sq_distances(const S* const* src, int64_t n, const double* centres, int64_t columns, double scale,
                      double* partial) {
  constexpr int64_t kRows = kCentres == 1 ? 4 : 2;
  double found[kRows * kCentres];
  int64_t i = 0;
  const auto keep = [&](int64_t rows) {
    for (int64_t p = 0; p < rows; ++p)
      for (int64_t c = 0; c < kCentres; ++c) {
        double* sum = partial + 2 * (c * n + i + p);
        add_doubled(sum[0], sum[1], found[p * kCentres + c], 0);
      }
    i += rows;
  };
  while (i + kRows <= n) {
    sq_distances<kRows, kCentres>(src + i, src + (i + 2 * kRows <= n ? i + kRows : i), centres, columns, scale, found);
    keep(kRows);
  }
  while (i < n) {
    sq_distances<1, kCentres>(src + i, src + i, centres, columns, scale, found);
    keep(1);
  }
}
template <class S>
void add_sq_distances(int64_t count, const S* const* src, int64_t n, const double* centres, int64_t columns,
                      double scale, double* partial) {
  switch (count) {
    case 1:
      return add_sq_distances<1>(src, n, centres, columns, scale, partial);
    case 2:
      return add_sq_distances<2>(src, n, centres, columns, scale, partial);
    case 3:
      return add_sq_distances<3>(src, n, centres, columns, scale, partial);
    default:
      return add_sq_distances<kTogether>(src, n, centres, columns, scale, partial);
  }
}

template <class S>
struct ToCentres {
  const Rows& rows;
  const Centres& from;
  double scale;
  const int64_t n = rows.n, count = from.count * n;
  const Rows centres{from.data, rows.offsets, rows.n_segments, from.count, rows.dtype};
  const Grid grid = streaming_grid(rows, kDistanceColumns, kStored<S>);
  TaskSums<true> sums;

  ToCentres(const Rows& rows, const Centres& from, double scale) : rows(rows), from(from), scale(scale) {}
};

template <class S, bool kExact>
class CentresWorker : public Steps {
 public:
  explicit CentresWorker(const ToCentres<S>& call) : call_(call), floats_(sizeof(S) == 8 && call.scale <= 1) {}

  void lay(Layout& at) {
    at(buffer_, call_.n * kStored<S>);
    at(src_, call_.n);
    at(tails_, call_.from.count * kStored<S>);
    at(centre_src_, call_.from.count);
    at(centres_, kTogether * kDistanceColumns);
    at(total_, kExact ? call_.count * kChains : 0);
  }
  void start() { memset(centres_, 0, sizeof(double) * kTogether * kDistanceColumns); }
  void begin(int64_t task) {
    partial_ = call_.sums.of(task);
    if (kExact) memset(total_, 0, sizeof(DoubledSum) * static_cast<size_t>(call_.count * kChains));
  }
  void run(const Tile& tile) {
    const int64_t padded = round_up(tile.columns, kStored<S>), n = call_.n;
    read_tile<S>(call_.rows, tile, kStored<S>, buffer_, src_);
    if (call_.from.data) read_tile<S>(call_.centres, tile, kStored<S>, tails_, centre_src_);
    for (int64_t c = 0; c < call_.from.count; c += kTogether) {
      const int64_t together = min64(kTogether, call_.from.count - c);
      for (int64_t p = 0; call_.from.data && p < together; ++p)
        for (int64_t j = 0; j < padded; j += kDoubles)
          store(centres_ + p * kDistanceColumns + j, load_double(centre_src_[c + p] + j) * call_.scale);
      if (!kExact) {
        add_sq_distances(together, src_, n, centres_, padded, call_.scale, partial_ + 2 * c * n);
        continue;
      }
      for (int64_t i = 0; i < n; ++i)
        for (int64_t p = 0; p < together; ++p)
          add_exactly(src_[i], centres_ + p * kDistanceColumns, padded, call_.scale,
                      total_ + ((c + p) * n + i) * kChains);
    }
  }
  void end(int64_t) {
    for (int64_t at = 0; kExact && at < call_.count; ++at)
      for (int64_t v = at * kChains; v < (at + 1) * kChains; ++v)
        for (int lane = 0; lane < kDoubles; ++lane)
          add_doubled(partial_[2 * at], partial_[2 * at + 1], total_[v].high[lane], total_[v].low[lane]);
  }

 private:
  const ToCentres<S>& call_;
  const FlushedFloats floats_;  // squares of subnormal float64 numbers vanish
  S *buffer_ = nullptr, *tails_ = nullptr;
  const S **src_ = nullptr, **centre_src_ = nullptr;
  double *centres_ = nullptr, *partial_ = nullptr;
  DoubledSum* total_ = nullptr;
};

template <class S, bool kExact>
Status row_sq_distances_of(const Rows& rows, const Centres& from, double scale, double* out, int threads) {
  ToCentres<S> call(rows, from, scale);
  if (!call.sums.prepare(call.grid, call.count) || !walk<CentresWorker<S, kExact>>(call, threads))
    return Status::out_of_memory;
  call.sums.add_up(out);
  return Status::ok;
}

// ---- sq_distances_to_average ---------------------------------------------------------------------------

constexpr int64_t kAverageRows = 4;  // at a time

// sums[j] += the shares of some rows' differences from the base; meanwhile fetches as much of the rows `next`.
template <int64_t kCount, class S>
RK_INLINE void add_differences(const S* const* rows, const S* const* next, const S* base, const double* shares,
                               int64_t columns, double* sums) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(S));
  F64 share[kCount];
  for (int64_t i = 0; i < kCount; ++i) share[i] = splat<F64>(shares[i]);
  for (int64_t j = 0; j < columns; j += kDoubles) {
    if (j % line == 0)
#pragma GCC unroll 4
      for (int64_t i = 0; i < kCount; ++i) __builtin_prefetch(next[i] + j, 0, 2);
    const F64 from = load_double(base + j);
    F64 sum = load(sums + j);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kCount; ++i) sum = fmadd(share[i], load_double(rows[i] + j) - from, sum);
    store(sums + j, sum);
  }
}

// The squared distances of some rows, less the base, to the sums over a tile.
template <int64_t kCount, class S>
RK_INLINE void add_sq_distances_from(const S* const* rows, const S* base, const double* sums, int64_t columns,
                                     double* partial) {
  F64 total[kCount] = {};
  for (int64_t j = 0; j < columns; j += kDoubles) {
    const F64 from = load_double(base + j), sum = load(sums + j);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kCount; ++i) {
      const F64 difference = load_double(rows[i] + j) - from - sum;
      total[i] = fmadd(difference, difference, total[i]);
    }
  }
  for (int64_t i = 0; i < kCount; ++i) add_doubled(partial[2 * i], partial[2 * i + 1], sum_lanes(total[i]), 0);
}

template <class S>
struct ToAverage {
  const Rows& rows;
  const double* shares;
  const int64_t n = rows.n;
  // The row of the largest share: digits that all rows have in common are not rounded away, and far rows, which have
  // little, stay out.
  const int64_t base = heaviest();
  const Grid grid = streaming_grid(rows, kDistanceColumns, kStored<S>);
  TaskSums<true> sums;

  ToAverage(const Rows& rows, const double* shares) : rows(rows), shares(shares) {}

 private:
  int64_t heaviest() const {
    int64_t found = 0;
    for (int64_t i = 1; i < n; ++i)
      if (shares[i] > shares[found]) found = i;
    return found;
  }
};

template <class S>
class AverageWorker : public Steps {
 public:
  explicit AverageWorker(const ToAverage<S>& call) : call_(call) {}

  void lay(Layout& at) {
    at(buffer_, call_.n * kStored<S>);
    at(src_, call_.n);
    at(used_, call_.n);
    at(share_, call_.n);
    at(average_, kDistanceColumns);
  }
  void start() {
    for (int64_t i = 0; i < call_.n; ++i)
      if (call_.shares[i] != 0) share_[n_used_++] = call_.shares[i];
  }
  void begin(int64_t task) { partial_ = call_.sums.of(task); }
  void run(const Tile& tile) {
    constexpr int64_t kRows = kAverageRows;
    const int64_t padded = round_up(tile.columns, kStored<S>), n = call_.n;
    read_tile<S>(call_.rows, tile, kStored<S>, buffer_, src_);
    const S* base = src_[call_.base];
    for (int64_t i = 0, u = 0; i < n; ++i)
      if (call_.shares[i] != 0) used_[u++] = src_[i];
    memset(average_, 0, sizeof(double) * static_cast<size_t>(padded));
    int64_t i = 0;
    for (; i + kRows <= n_used_; i += kRows)
      add_differences<kRows>(used_ + i, used_ + (i + 2 * kRows <= n_used_ ? i + kRows : i), base, share_ + i, padded,
                             average_);
    for (; i < n_used_; ++i) add_differences<1>(used_ + i, used_ + i, base, share_ + i, padded, average_);
    for (i = 0; i + kRows <= n; i += kRows)
      add_sq_distances_from<kRows>(src_ + i, base, average_, padded, partial_ + 2 * i);
    for (; i < n; ++i) add_sq_distances_from<1>(src_ + i, base, average_, padded, partial_ + 2 * i);
  }

 private:
  const ToAverage<S>& call_;
  S* buffer_ = nullptr;
  const S **src_ = nullptr, **used_ = nullptr;
  double *share_ = nullptr, *average_ = nullptr, *partial_ = nullptr;
  int64_t n_used_ = 0;
};

template <class S>
Status sq_distances_to_average_of(const Rows& rows, const double* shares, double* out, int threads) {
  ToAverage<S> call(rows, shares);
  if (!call.sums.prepare(call.grid, call.n) || !walk<AverageWorker<S>>(call, threads)) return Status::out_of_memory;
  call.sums.add_up(out);
  return Status::ok;
}

}  // namespace

Status row_sq_distances(const Rows& rows, const Centres& centres, double scale, bool exact, double* out, int threads) {
  return by_dtype(rows.dtype, [&](auto s) {
    return exact ? row_sq_distances_of<decltype(s), true>(rows, centres, scale, out, threads)
                 : row_sq_distances_of<decltype(s), false>(rows, centres, scale, out, threads);
  });
}
Status sq_distances_to_average(const Rows& rows, const double* shares, double* out, int threads) {
  return by_dtype(rows.dtype,
                  [&](auto s) { return sq_distances_to_average_of<decltype(s)>(rows, shares, out, threads); });
}

}  // namespace RK_ISA
}  // namespace rk
