// Compiled once per instruction set: the four primitives over the column grid, in OpenMP threads.
// All sums are float64; partial sums belong to grid tasks, not to threads, and are added in task order.
#include <omp.h>

#include "select.h"
#include "tiles.h"

namespace rk {
namespace RK_ISA {
namespace {

template <int64_t kCount>
struct Count {
  static constexpr int64_t value = kCount;
};

// ---- select_columns ------------------------------------------------------------------------------------

// 1 where all the values of a row are numbers.
template <class C>
RK_INLINE bool is_finite_run(const C* row, int64_t columns) {
  typename Simd<C>::V check = {};
  for (int64_t j = 0; j < columns; j += Simd<C>::lanes) check += load(row + j) * static_cast<C>(0);
  return !any_nan(check);
}

constexpr int64_t kMixRows = 4;

// mixed[r * tile + j] = sum over i of weights[r, i] * src[i][j], also or only rounded to C (either may be null); what
// has weight 0 is left out, NaN and Inf too. kMixRows mixtures at a time, so that a value is loaded and widened once
// for them; the results have room for whole groups. `used` is scratch of n.
template <class C>
void mix_tile(const double* weights, int64_t k, int64_t n, const C* const* src, int64_t columns, int64_t tile,
              double* mixed, C* rounded, uint8_t* finite, int64_t* used, Ahead& ahead) {
  constexpr int64_t kRows = kMixRows, kVectors = 2;
  for (int64_t i = 0; i < n; ++i) finite[i] = is_finite_run(src[i], columns);
  for (int64_t r = 0; r < k; r += kRows) {
    const double* w[kRows];
    for (int64_t p = 0; p < kRows; ++p) w[p] = weights + min64(r + p, k - 1) * n;
    ahead.step();
    int64_t n_used = 0;
    bool special = false;
    for (int64_t i = 0; i < n; ++i) {
      if (w[0][i] == 0 && w[1][i] == 0 && w[2][i] == 0 && w[3][i] == 0) continue;
      if (finite[i])
        used[n_used++] = i;
      else
        special = true;
    }
    const auto mix = [&](int64_t j, auto vectors) {
      constexpr int64_t width = decltype(vectors)::value;
      F64 sum[kRows][width];
      clear(sum);
      for (int64_t u = 0; u < n_used; ++u) {
        const int64_t i = used[u];
        F64 x[width];
#pragma GCC unroll 2
        for (int64_t v = 0; v < width; ++v) x[v] = load_double(src[i] + j + v * kDoubles);
#pragma GCC unroll 4
        for (int64_t p = 0; p < kRows; ++p) {
          const F64 factor = splat<F64>(w[p][i]);
#pragma GCC unroll 2
          for (int64_t v = 0; v < width; ++v) sum[p][v] = fmadd(factor, x[v], sum[p][v]);
        }
      }
#pragma GCC unroll 4
      for (int64_t p = 0; p < kRows; ++p)
#pragma GCC unroll 2
        for (int64_t v = 0; v < width; ++v) {
          const int64_t at = (r + p) * tile + j + v * kDoubles;
          if (mixed) store(mixed + at, sum[p][v]);
          if (rounded) store_rounded(rounded + at, sum[p][v]);
        }
    };
    int64_t j = 0;
    for (; j + kVectors * kDoubles <= columns; j += kVectors * kDoubles) mix(j, Count<kVectors>{});
    for (; j < columns; j += kDoubles) mix(j, Count<1>{});
    if (!special) continue;
    for (int64_t p = 0; p < min64(kRows, k - r); ++p)  // again one by one: a weight of 0 must not meet a NaN or Inf
      for (j = 0; j < columns; j += kDoubles) {
        F64 sum = {};
        for (int64_t i = 0; i < n; ++i)
          if (w[p][i] != 0) sum = fmadd(splat<F64>(w[p][i]), load_double(src[i] + j), sum);
        if (mixed) store(mixed + (r + p) * tile + j, sum);
        if (rounded) store_rounded(rounded + (r + p) * tile + j, sum);
      }
  }
}

// sum over the tile of ((a[j] - c[j]) * scale)^2, in four independent sums to hide their latency.
template <class A>
RK_INLINE double sq_distance(const A* a, const double* c, int64_t columns, double scale) {
  constexpr int64_t step = 4 * kDoubles;
  F64 sum[4] = {};
  int64_t j = 0;
  for (; j + step <= columns; j += step)
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v) {
      F64 difference = load_double(a + j + v * kDoubles) - load(c + j + v * kDoubles);
      if (scale != 1) difference *= scale;
      sum[v] = fmadd(difference, difference, sum[v]);
    }
  double total = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; j < columns; ++j) {
    const double difference = (static_cast<double>(load_scalar(a + j)) - c[j]) * scale;
    total += difference * difference;
  }
  return total;
}

template <class C>
void note_nonfinite(const C* const* src, int64_t n, int64_t columns, uint8_t* nonfinite) {
  for (int64_t i = 0; i < n; ++i) {
    C check = 0;
    for (int64_t j = 0; j < columns; ++j) {
      const C x = load_scalar(src[i] + j);
      check += x - x;
    }
    if (check != 0) nonfinite[i] = 1;
  }
}

template <class S>
struct SelectParts {  // a thread's scratch
  using C = ComputeOf<S>;
  int64_t buffer, src, mixed, mixed_rounded, mixed_src, measured, network, out, centre, rounded, nonfinite,
      mixed_nonfinite, finite, used;
};

template <class S>
Status select_columns_of(const Rows& rows, const Select& select, int threads) {
  using C = ComputeOf<S>;
  constexpr int64_t lanes = Simd<C>::lanes;
  const int64_t n = rows.n, k = select.mix ? select.n_mixed : n;
  const int64_t n_measured = select.measure ? select.n_measured : n;
  const bool remeasure = select.sq_distances && select.measure && select.measure != select.mix;
  const int64_t tile = tile_columns(max64(n, k), select.mix ? 32 : sizeof(C));
  const int64_t stride = buffer_columns<S>(tile);
  Grid grid = streaming_grid(rows, tile);
  // The partial distances stay far below the input: at least 512 columns to a task.
  if (select.sq_distances) grid = make_grid(grid.columns, max64(grid.task_columns, (511 + tile) / tile * tile));

  const bool streamed = rows.columns() * static_cast<int64_t>(sizeof(S)) >= kStreamedBytes;

  Window window{k, select.lo, select.hi, select.multiplicities, select.nearest};
  if (!prepare_window(window)) return Status::out_of_memory;
  Workspace space;
  SelectParts<S> at;
  at.buffer = space.reserve<C>(n * stride);
  at.src = space.reserve<const C*>(n);
  at.mixed = space.reserve<double>(select.mix ? (k + kMixRows) * tile : 0);
  at.mixed_rounded = space.reserve<C>(select.mix ? (k + kMixRows) * tile : 0);
  at.mixed_src = space.reserve<const C*>(k);
  at.measured = space.reserve<double>(remeasure ? (n_measured + kMixRows) * tile : 0);
  at.network = space.reserve<C>(select_scratch(window, sizeof(C) == 8));
  at.out = space.reserve<C>(tile);
  at.centre = space.reserve<double>(select.sq_distances ? tile : 0);
  at.rounded = space.reserve<S>(tile);
  at.nonfinite = space.reserve<uint8_t>(n);
  at.mixed_nonfinite = space.reserve<uint8_t>(k);
  at.finite = space.reserve<uint8_t>(n);
  at.used = space.reserve<int64_t>(n);
  Workspace sums;
  const int64_t partial = sums.reserve<double>(select.sq_distances ? grid.n_tasks * n_measured : 0);
  if (!space.allocate(threads) || !sums.allocate(1)) {
    release_window(window);
    return Status::out_of_memory;
  }
  double* partials = sums.part<double>(0, partial);

  int64_t next = 0;
  in_threads(threads, [&](int thread) {
    C* buffer = space.part<C>(thread, at.buffer);
    const C** src = space.part<const C*>(thread, at.src);
    double* mixed = space.part<double>(thread, at.mixed);
    C* mixed_rounded = space.part<C>(thread, at.mixed_rounded);
    const C** mixed_src = space.part<const C*>(thread, at.mixed_src);
    double* measured = space.part<double>(thread, at.measured);
    C* network = space.part<C>(thread, at.network);
    C* out = space.part<C>(thread, at.out);
    double* centre = space.part<double>(thread, at.centre);
    S* rounded = space.part<S>(thread, at.rounded);
    uint8_t* nonfinite = space.part<uint8_t>(thread, at.nonfinite);
    uint8_t* mixed_nonfinite = space.part<uint8_t>(thread, at.mixed_nonfinite);
    uint8_t* finite = space.part<uint8_t>(thread, at.finite);
    int64_t* used = space.part<int64_t>(thread, at.used);
    memset(nonfinite, 0, static_cast<size_t>(n));
    memset(network, 0, sizeof(C) * static_cast<size_t>(select_scratch(window, sizeof(C) == 8)));

    // One tile whose columns are whole vectors, or a tail below one vector.
    const auto run_tile = [&](int64_t segment, int64_t first, int64_t columns, double* distances) {
      const int64_t padded = (columns + lanes - 1) / lanes * lanes;
      Ahead ahead = ahead_of<S>(rows, segment, first + columns, columns,
                                select.mix ? (k + kMixRows - 1) / kMixRows : padded / lanes);
      read_tile<S>(rows, segment, first, columns, stride, buffer, src);
      const C* const* selected = src;
      if (select.mix) {
        const bool keep = distances && select.measure == select.mix;
        mix_tile(select.mix, k, n, src, padded, tile, keep ? mixed : nullptr, mixed_rounded, finite, used, ahead);
        for (int64_t r = 0; r < k; ++r) mixed_src[r] = mixed_rounded + r * tile;
        memset(mixed_nonfinite, 0, static_cast<size_t>(k));
        select_tile(window, mixed_src, padded, network, out, mixed_nonfinite, ahead);
        bool any = false;
        for (int64_t r = 0; r < k; ++r) any |= mixed_nonfinite[r] != 0;
        if (any) note_nonfinite(selected, n, columns, nonfinite);
      } else {
        select_tile(window, selected, padded, network, out, nonfinite, ahead);
      }
      narrow_run(out, columns, rounded);
      if (select.out)
        write_run(reinterpret_cast<char*>(static_cast<S*>(select.out[segment]) + first),
                  reinterpret_cast<const char*>(rounded), columns * static_cast<int64_t>(sizeof(S)), streamed);
      if (!distances) return;
      // Distances are to what is stored: 16-bit results are widened again.
      widen_run(rounded, columns, out);
      for (int64_t j = 0; j < padded; j += kDoubles) store(centre + j, load_double(out + j));
      if (remeasure)
        mix_tile<C>(select.measure, n_measured, n, src, padded, tile, measured, nullptr, finite, used, ahead);
      const double* virtual_rows = remeasure ? measured : mixed;
      for (int64_t i = 0; i < n_measured; ++i)
        distances[i] += select.measure ? sq_distance(virtual_rows + i * tile, centre, columns, select.scale)
                                       : sq_distance(src[i], centre, columns, select.scale);
    };

    for (int64_t task; (task = take(next)) < grid.n_tasks;) {
      double* distances = select.sq_distances ? partials + task * n_measured : nullptr;
      if (distances) memset(distances, 0, sizeof(double) * static_cast<size_t>(n_measured));
      for_task_pieces(rows, grid, task, [&](int64_t segment, int64_t first, int64_t count) {
        const int64_t whole = count / lanes * lanes;
        for (int64_t j = 0; j < whole; j += tile) run_tile(segment, first + j, min64(tile, whole - j), distances);
        if (whole < count) run_tile(segment, first + whole, count - whole, distances);
      });
    }
#pragma omp critical
    for (int64_t i = 0; i < n; ++i) select.nonfinite[i] |= nonfinite[i];
  });
  if (select.sq_distances) {
    for (int64_t i = 0; i < n_measured; ++i) select.sq_distances[i] = 0;
    for (int64_t task = 0; task < grid.n_tasks; ++task)
      for (int64_t i = 0; i < n_measured; ++i) select.sq_distances[i] += partials[task * n_measured + i];
  }
  release_window(window);
  return Status::ok;
}

// ---- row_sq_distances ----------------------------------------------------------------------------------

// A sum of float64 and what its roundings lost (Dekker; Knuth's two-sum): about 106 bits.
struct DoubledSum {
  F64 high, low;
};

RK_INLINE F64 product_error(F64 a, F64 product) {
#if defined(__AVX512F__) || defined(__FMA__)
  return fmadd(a, a, -product);
#else
  const F64 split = a * 134217729.0, head = split - (split - a), tail = a - head;
  return ((head * head - product) + 2.0 * head * tail) + tail * tail;
#endif
}

RK_INLINE void two_sum(F64 a, F64 b, F64& sum, F64& error) {
  sum = a + b;
  const F64 virtual_b = sum - a;
  error = (a - (sum - virtual_b)) + (b - virtual_b);
}

RK_INLINE void add_square(DoubledSum& total, F64 a, F64 b) {
  F64 difference, lost;
  two_sum(a, -b, difference, lost);
  const F64 square = difference * difference;
  const F64 square_lost = product_error(difference, square) + 2.0 * difference * lost;
  F64 carried;
  two_sum(total.high, square, total.high, carried);
  total.low += carried + square_lost;
}

RK_INLINE void add_doubled(double& high, double& low, double more_high, double more_low) {
  const double sum = high + more_high, virtual_b = sum - high;
  low += ((high - (sum - virtual_b)) + (more_high - virtual_b)) + more_low;
  high = sum;
}

template <class S>
Status row_sq_distances_of(const Rows& rows, const void* const* centre_data, double scale, double* out, int threads) {
  using C = ComputeOf<S>;
  constexpr int64_t lanes = Simd<C>::lanes;
  const int64_t n = rows.n, tile = tile_columns(n + 1, sizeof(C)), stride = buffer_columns<S>(tile);
  const Grid base = streaming_grid(rows, tile);
  const Grid grid = make_grid(base.columns, max64(base.task_columns, (1023 + tile) / tile * tile));
  const Rows centre_row{centre_data, rows.offsets, rows.n_segments, 1, rows.dtype};
  Workspace space, sums;
  const int64_t at_buffer = space.reserve<C>(n * stride), at_src = space.reserve<const C*>(n);
  const int64_t at_centre = space.reserve<C>(stride), at_total = space.reserve<DoubledSum>(n);
  const int64_t at_partials = sums.reserve<double>(grid.n_tasks * n * 2);
  if (!space.allocate(threads) || !sums.allocate(1)) return Status::out_of_memory;
  double* partials = sums.part<double>(0, at_partials);

  int64_t next = 0;
  in_threads(threads, [&](int thread) {
    C* buffer = space.part<C>(thread, at_buffer);
    const C** src = space.part<const C*>(thread, at_src);
    C* centre_buffer = space.part<C>(thread, at_centre);
    DoubledSum* total = space.part<DoubledSum>(thread, at_total);
    for (int64_t task; (task = take(next)) < grid.n_tasks;) {
      memset(total, 0, sizeof(DoubledSum) * static_cast<size_t>(n));
      const auto run_tile = [&](int64_t segment, int64_t first, int64_t columns) {
        const C* centre;
        read_tile<S>(rows, segment, first, columns, stride, buffer, src);
        read_tile<S>(centre_row, segment, first, columns, stride, centre_buffer, &centre);
        for (int64_t i = 0; i < n; ++i) {
          DoubledSum sum = total[i];
          for (int64_t j = 0; j < columns; j += kDoubles)  // padding: zeros on both sides
            add_square(sum, load_double(src[i] + j) * scale, load_double(centre + j) * scale);
          total[i] = sum;
        }
      };
      for_task_pieces(rows, grid, task, [&](int64_t segment, int64_t first, int64_t count) {
        const int64_t whole = count / lanes * lanes;
        for (int64_t j = 0; j < whole; j += tile) run_tile(segment, first + j, min64(tile, whole - j));
        if (whole < count) run_tile(segment, first + whole, count - whole);
      });
      for (int64_t i = 0; i < n; ++i) {
        double high = 0, low = 0;
        for (int lane = 0; lane < kDoubles; ++lane) add_doubled(high, low, total[i].high[lane], total[i].low[lane]);
        partials[2 * (task * n + i)] = high;
        partials[2 * (task * n + i) + 1] = low;
      }
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    double high = 0, low = 0, plain = 0;
    for (int64_t task = 0; task < grid.n_tasks; ++task) {
      add_doubled(high, low, partials[2 * (task * n + i)], partials[2 * (task * n + i) + 1]);
      plain += partials[2 * (task * n + i)];
    }
    out[i] = plain - plain == 0 ? high + low : plain;  // an overflow stays an infinity
  }
  return Status::ok;
}

// ---- weighted_row_sum ----------------------------------------------------------------------------------

constexpr int64_t kSumColumns = 2048;  // a row at a time: memory likes long runs (mean of 64 rows: 2.2 reads, 1.1 so)
constexpr int64_t kSumRows = 4;        // or some rows: sums are loaded and stored once for them

// sums[j] (+)= the weighted values of kCount rows in their order; `columns` is a multiple of the vector. Meanwhile fetches
// as much of the rows `next`.
template <int64_t kCount, class S>
RK_INLINE void add_rows(const S* const* rows, const S* const* next, const double* weights, int64_t columns, bool begin,
                        double* sums) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(S));
  F64 factor[kCount];
  for (int64_t i = 0; i < kCount; ++i) factor[i] = splat<F64>(weights[i]);
  for (int64_t j = 0; j < columns; j += kDoubles) {
    if (j % line == 0)
#pragma GCC unroll 4
      for (int64_t i = 0; i < kSumRows; ++i) __builtin_prefetch(next[i] + j, 0, 2);
    F64 sum = begin ? F64{} : load(sums + j);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kCount; ++i) sum = fmadd(factor[i], load_double(rows[i] + j), sum);
    store(sums + j, sum);
  }
}

template <class S>
Status weighted_row_sum_of(const Rows& rows, const double* weights, int64_t k, void* const* out, int threads) {
  using C = ComputeOf<S>;
  const int64_t n = rows.n;
  const Grid grid = make_grid(rows.columns(), max64((int64_t{1} << 18) / max64(n, 1) / kSumColumns, 1) * kSumColumns);
  const bool streamed = rows.columns() * static_cast<int64_t>(sizeof(S)) >= kStreamedBytes;
  Workspace space;
  const int64_t at_used = space.reserve<int64_t>(n), at_weights = space.reserve<double>(n);
  const int64_t width = min64(kSumColumns, round_up(rows.columns(), kDoubles));
  const int64_t at_sums = space.reserve<double>(width), at_tail = space.reserve<S>(kSumRows * kDoubles);
  const int64_t at_rounded = space.reserve<C>(width), at_stored = space.reserve<S>(width);
  if (!space.allocate(threads)) return Status::out_of_memory;

  int64_t next_task = 0;
  in_threads(threads, [&](int thread) {
    int64_t* used = space.part<int64_t>(thread, at_used);
    double* w = space.part<double>(thread, at_weights);
    double* sums = space.part<double>(thread, at_sums);
    S* tail = space.part<S>(thread, at_tail);
    C* rounded = space.part<C>(thread, at_rounded);
    S* stored = space.part<S>(thread, at_stored);
    // The sums of some columns of a segment; only rows with some weight are looked at, in row order.
    const auto add_columns = [&](int64_t segment, int64_t first, int64_t columns, int64_t n_used, auto tailed) {
      const int64_t padded = round_up(columns, kDoubles);
      for (int64_t i = 0; i < n_used; i += kSumRows) {
        const int64_t count = min64(kSumRows, n_used - i);
        const S *src[kSumRows], *next[kSumRows];
        for (int64_t p = 0; p < kSumRows; ++p) {
          const int64_t then = i + count + p < n_used ? i + count + p : i + count < n_used ? i + count : min64(p, n_used - 1);
          next[p] = static_cast<const S*>(rows.data[segment * n + used[then]]) + first +
                    (i + count < n_used ? 0 : columns);
        }
        for (int64_t p = 0; p < count; ++p) {
          src[p] = static_cast<const S*>(rows.data[segment * n + used[i + p]]) + first;
          if (tailed.value) {
            memset(tail + p * kDoubles, 0, sizeof(S) * kDoubles);
            memcpy(tail + p * kDoubles, src[p], sizeof(S) * static_cast<size_t>(columns));
            src[p] = tail + p * kDoubles;
          }
        }
        if (count == 4)
          add_rows<4>(src, next, w + i, padded, i == 0, sums);
        else if (count == 3)
          add_rows<3>(src, next, w + i, padded, i == 0, sums);
        else if (count == 2)
          add_rows<2>(src, next, w + i, padded, i == 0, sums);
        else
          add_rows<1>(src, next, w + i, padded, i == 0, sums);
      }
      if (n_used == 0) memset(sums, 0, sizeof(double) * static_cast<size_t>(padded));
      for (int64_t j = 0; j < padded; j += kDoubles) store_rounded(rounded + j, load(sums + j));
      narrow_run(rounded, columns, stored);
    };
    for (int64_t task; (task = take(next_task)) < grid.n_tasks;)
      for (int64_t r = 0; r < k; ++r) {
        int64_t n_used = 0;
        for (int64_t i = 0; i < n; ++i)
          if (weights[r * n + i] != 0) {
            used[n_used] = i;
            w[n_used++] = weights[r * n + i];
          }
        for_task_pieces(rows, grid, task, [&](int64_t segment, int64_t first, int64_t count) {
          S* target = static_cast<S*>(out[segment * k + r]);
          const auto write = [&](int64_t from, int64_t columns) {
            write_run(reinterpret_cast<char*>(target + from), reinterpret_cast<const char*>(stored),
                      columns * static_cast<int64_t>(sizeof(S)), streamed);
          };
          const int64_t whole = count / kDoubles * kDoubles;
          for (int64_t j = 0; j < whole; j += kSumColumns) {
            add_columns(segment, first + j, min64(kSumColumns, whole - j), n_used, Count<0>{});
            write(first + j, min64(kSumColumns, whole - j));
          }
          if (whole < count) {
            add_columns(segment, first + whole, count - whole, n_used, Count<1>{});
            write(first + whole, count - whole);
          }
        });
      }
  });
  return Status::ok;
}

// ---- storage types -------------------------------------------------------------------------------------

Status select_columns(const Rows& rows, const Select& select, int threads) {
  return by_dtype(rows.dtype, [&](auto s) { return select_columns_of<decltype(s)>(rows, select, threads); });
}
Status row_sq_distances(const Rows& rows, const void* const* centre, double scale, double* out, int threads) {
  return by_dtype(rows.dtype,
                  [&](auto s) { return row_sq_distances_of<decltype(s)>(rows, centre, scale, out, threads); });
}
Status weighted_row_sum(const Rows& rows, const double* weights, int64_t k, void* const* out, int threads) {
  return by_dtype(rows.dtype, [&](auto s) { return weighted_row_sum_of<decltype(s)>(rows, weights, k, out, threads); });
}

}  // namespace

Status gram(const Rows& rows, const int64_t* multiplicities, bool origin, double scale, bool single, double* out,
            int threads);                            // gram.cpp
uint64_t read_pass(const Rows& rows, int threads);  // read_pass.cpp

extern const Kernels table;
const Kernels table{RK_ISA_NAME, select_columns, gram, row_sq_distances, weighted_row_sum, read_pass};

}  // namespace RK_ISA
}  // namespace rk
