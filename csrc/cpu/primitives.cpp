// Compiled once per instruction set: the four primitives over the column grid, in OpenMP threads.
// All sums are float64; partial sums belong to grid tasks, not to threads, and are added in task order.
#include "select.h"
#include "sums.h"
#include "tiles.h"

namespace rk {
namespace RK_ISA {
namespace {

template <int64_t kCount>
struct Count {
  static constexpr int64_t value = kCount;
};

// ---- select_columns ------------------------------------------------------------------------------------

constexpr int64_t kMixRows = 4;  // mixtures made together,
static_assert(kMixRows <= kMostTogether, "shared_row looks at so many");
constexpr int64_t kMixVectors = kVectorBytes == 64 ? 4 : 2;  // and vectors of each: the sums fit the registers

// A matrix of weights and divisors in the order in which it is used: for each group of up to kMixRows mixtures the rows
// of which any of them takes some, and their weights side by side. Of float64 rows (kCentred) differences from a row
// that all mixtures of a group take are summed: equal rows so come back as they are, at the speed of plain sums.
template <bool kCentred>
class Mixing {
 public:
  bool prepare(const double* weights, const double* divisors, int64_t k, int64_t n) {
    k_ = k;
    n_ = n;
    const int64_t firsts = outline_.reserve<int64_t>(k + 1), bases = outline_.reserve<int64_t>(k);
    const int64_t averages = outline_.reserve<Average>(k);
    if (!outline_.allocate(1)) return false;
    first_ = outline_.part<int64_t>(0, firsts);
    base_ = outline_.part<int64_t>(0, bases);
    average_ = outline_.part<Average>(0, averages);
    for (int64_t r = 0; r < k; ++r) {
      average_[r] = average_of(weights + r * n, n, divisors ? divisors[r] : 1);
      averaging_ &= average_[r].averaging;
    }
    for (int64_t r = 0; r < k;) {
      int64_t count = min64(kMixRows, k - r);
      if (kCentred)
        while ((base_[groups_] = shared_row(weights, n, r, count)) == n && count > 1) --count;
      first_[groups_++] = r;
      r += count;
    }
    first_[groups_] = k;

    const int64_t starts = space_.reserve<int64_t>(groups_ + 1), rows = space_.reserve<int64_t>(groups_ * n);
    const int64_t factors = space_.reserve<double>(groups_ * n * kMixRows);
    if (!space_.allocate(1)) return false;
    start_ = space_.part<int64_t>(0, starts);
    row_ = space_.part<int64_t>(0, rows);
    factor_ = space_.part<double>(0, factors);
    int64_t used = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      start_[g] = used;
      for (int64_t i = 0; i < n; ++i) {
        bool any = false;
        for (int64_t p = 0; p < kMixRows; ++p) {
          const int64_t r = first_[g] + p;
          factor_[used * kMixRows + p] = r < first_[g + 1] ? weights[r * n + i] * average_[r].lift : 0;
          any |= factor_[used * kMixRows + p] != 0;
        }
        row_[used] = i;
        used += any;
      }
    }
    start_[groups_] = used;
    return true;
  }
  int64_t groups() const { return groups_; }
  bool averaging() const { return averaging_; }  // all of them

  // mixed[r * tile + j] = sum over i of weights[r, i] * x[i * tile + j], over the divisor, also or only rounded to C
  // (either may be null); of a tile that is lifted, lowered again. A row with a NaN or Inf (not finite[i]) is never
  // multiplied by 0.
  template <class C>
  void run(const double* x, int64_t columns, int64_t tile, const uint8_t* finite, double* mixed, C* rounded,
           Ahead& ahead, bool is_lifted) const {
    const FlushedFloats floats(is_lifted);
    const auto put = [&](int64_t r, int64_t j, F64 value) {
      if (kCentred && is_lifted) value = lowered(value);
      if (mixed) store(mixed + r * tile + j, value);
      if (rounded) store_rounded(rounded + r * tile + j, value);
    };
    for (int64_t g = 0; g < groups_; ++g) {
      ahead.step();
      bool special = false;
      for (int64_t u = start_[g]; u < start_[g + 1]; ++u) special |= !finite[row_[u]];
      int64_t j = 0;
      if (__builtin_expect(!special, true))
        for (; j + kMixVectors * kDoubles <= columns; j += kMixVectors * kDoubles)
          mix<kMixVectors>(g, x + j, tile, j, put);
      for (; j < columns; j += kDoubles)
        if (!special)
          mix<1>(g, x + j, tile, j, put);
        else
          for (int64_t r = first_[g]; r < first_[g + 1]; ++r) put(r, j, mixture(g, r, x + j, tile));
    }
  }

 private:
  RK_INLINE F64 base_of(int64_t g, const double* x, int64_t tile) const {
    return kCentred && base_[g] < n_ ? load(x + base_[g] * tile) : F64{};
  }
  RK_INLINE F64 finished(int64_t r, F64 base, F64 sum) const {
    const Divisor divisor(average_[r].divisor, average_[r].reciprocal);
    return kCentred ? moved(base * average_[r].whole, sum, divisor) : divided(sum, divisor);
  }

  template <int64_t kVectors, class Put>
  RK_INLINE void mix(int64_t g, const double* x, int64_t tile, int64_t j, Put&& put) const {
    F64 sum[kMixRows][kVectors], base[kVectors], check = {};
    clear(sum);
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) base[v] = base_of(g, x + v * kDoubles, tile);
    for (int64_t u = start_[g]; u < start_[g + 1]; ++u) {
      const double *row = x + row_[u] * tile, *factor = factor_ + u * kMixRows;
      F64 value[kVectors];
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) {
        value[v] = load(row + v * kDoubles);
        if (kCentred) value[v] -= base[v];
      }
#pragma GCC unroll 4
      for (int64_t p = 0; p < kMixRows; ++p) {
        const F64 weight = splat<F64>(factor[p]);
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) sum[p][v] = fmadd(weight, value[v], sum[p][v]);
      }
    }
    const int64_t count = first_[g + 1] - first_[g];
#pragma GCC unroll 4
    for (int64_t p = 0; p < kMixRows; ++p)
      if (p < count)
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) {
          const F64 result = finished(first_[g] + p, base[v], sum[p][v]);
          check = fmadd(result, F64{}, check);
          put(first_[g] + p, j + v * kDoubles, result);
        }
    if (__builtin_expect(any_nan(check), false))
      for (int64_t p = 0; p < count; ++p)
        for (int64_t v = 0; v < kVectors; ++v)
          put(first_[g] + p, j + v * kDoubles, mixture(g, first_[g] + p, x + v * kDoubles, tile));
  }
  // The same of one mixture, where rows are no numbers or sums overflow: a sum of an infinity or a NaN is itself the
  // result, one of numbers is taken again.
  __attribute__((noinline)) F64 mixture(int64_t g, int64_t r, const double* x, int64_t tile) const {
    const Average& average = average_[r];
    const F64 base = base_of(g, x, tile);
    F64 sum = {}, plain = {}, check = {};
    const auto for_rows = [&](auto&& add) {
      for (int64_t u = start_[g]; u < start_[g + 1]; ++u) {  // the others' rows are not looked at
        const double weight = factor_[u * kMixRows + r - first_[g]];
        if (weight != 0) add(splat<F64>(weight), load(x + row_[u] * tile));
      }
    };
    for_rows([&](F64 weight, F64 value) {
      sum = fmadd(weight, value - base, sum);
      plain = fmadd(weight, value * kRoom, plain);
      check = fmadd(value, F64{}, check);
    });
    const F64 result = finished(r, base, sum);
    if (!any_nan(result - result)) return result;
    F64 value = check == 0 ? result : plain;
    if (any_nan(check == 0 ? result - result : F64{})) {
      DoubledSum shrunken{};
      for_rows([&](F64 weight, F64 term) { add_product(shrunken, weight, term * kRoom); });
      value = check == 0 ? grown(shrunken, average.divisor, average.averaging) : plain;
    }
    return result - result == 0 ? result : value;
  }

  Workspace outline_, space_;
  double* factor_ = nullptr;
  Average* average_ = nullptr;
  // Of each group: its first mixture, the row that they are differences from, and where its rows begin.
  int64_t *first_ = nullptr, *base_ = nullptr, *start_ = nullptr, *row_ = nullptr;
  int64_t groups_ = 0, k_ = 0, n_ = 0;
  bool averaging_ = true;
};

// A tile as float64, and which rows of it are numbers throughout. True where it is lifted, for subnormal numbers in it.
template <class S>
bool widen_tile(const S* const* src, int64_t n, int64_t columns, int64_t tile, bool may_be_lifted, double* wide,
                uint8_t* finite) {
  const FlushedFloats floats(sizeof(S) == 8);
  Liftable liftable;
  for (int64_t i = 0; i < n; ++i) {
    F64 check = {};
    for (int64_t j = 0; j < columns; j += kDoubles) {
      const F64 x = load_double(src[i] + j);
      check = fmadd(x, F64{}, check);
      if (sizeof(S) == 8) liftable.look(x);
      store(wide + i * tile + j, x);
    }
    finite[i] = !any_nan(check);
  }
  if (!may_be_lifted || !liftable.subnormal() || !liftable.liftable()) return false;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i * tile; j < i * tile + columns; j += kDoubles) store(wide + j, lifted(load(wide + j)));
  return true;
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
  for (; j < columns; j += kDoubles) {
    const F64 difference = (load_double(a + j) - load(c + j)) * scale;
    sum[0] = fmadd(difference, difference, sum[0]);
  }
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Adds to a sum that carries its roundings.
RK_INLINE void add_doubled(double& high, double& low, double more_high, double more_low) {
  const double sum = high + more_high, virtual_b = sum - high;
  low += ((high - (sum - virtual_b)) + (more_high - virtual_b)) + more_low;
  high = sum;
}

template <class S>
struct SelectParts {  // a thread's scratch
  using C = ComputeOf<S>;
  int64_t buffer, src, wide, mixed, mixed_rounded, mixed_src, measured, network, out, centre, rounded, nonfinite,
      mixed_nonfinite, finite;
};

template <class S>
Status select_columns_of(const Rows& rows, const Select& select, int threads) {
  using C = ComputeOf<S>;
  const int64_t n = rows.n, k = select.mix ? select.n_mixed : n;
  const int64_t n_measured = select.measure ? select.n_measured : n;
  const bool same = select.measure == select.mix && select.measure_divisors == select.mix_divisors;
  const bool remeasure = select.sq_distances && select.measure && !same;
  // Mixtures take room of their own; distances read the tile a second time, so it should still be in the first-level
  // cache.
  const bool small_tile = select.sq_distances && n <= 32;
  const int64_t tile = select.mix || remeasure
                           ? max64(2048 / max64(n, k) / 64, 1) * 64
                           : round_up(tile_columns(n, small_tile ? 4 * sizeof(S) : sizeof(S)), kStored<S>);
  Grid grid = streaming_grid(rows, tile);
  // The partial distances stay far below the input: at least 512 columns to a task.
  if (select.sq_distances) grid = make_grid(grid.columns, max64(grid.task_columns, (511 + tile) / tile * tile));

  const bool streamed = rows.columns() * static_cast<int64_t>(sizeof(S)) >= kStreamedBytes;

  Mixing<sizeof(S) == 8> mixing, measuring;
  if (select.mix && !mixing.prepare(select.mix, select.mix_divisors, k, n)) return Status::out_of_memory;
  if (remeasure && !measuring.prepare(select.measure, select.measure_divisors, n_measured, n))
    return Status::out_of_memory;
  const bool may_be_lifted = mixing.averaging() && measuring.averaging();  // or what is lifted may overflow
  Window window{k, select.lo, select.hi, select.multiplicities, select.nearest};
  window.narrow = sizeof(S) == 2;
  if (!prepare_window(window)) return Status::out_of_memory;
  Workspace space;
  SelectParts<S> at;
  at.buffer = space.reserve<S>(n * kStored<S>);
  at.src = space.reserve<const S*>(n);
  at.wide = space.reserve<double>(select.mix || remeasure ? n * tile : 0);
  at.mixed = space.reserve<double>(select.mix ? k * tile : 0);
  at.mixed_rounded = space.reserve<C>(select.mix ? k * tile : 0);
  at.mixed_src = space.reserve<const C*>(k);
  at.measured = space.reserve<double>(remeasure ? n_measured * tile : 0);
  // Mixed rows are of the compute type.
  const int64_t scratch = select.mix ? select_scratch<C>(window) : select_scratch<S>(window);
  at.network = space.reserve<C>(scratch);
  at.out = space.reserve<C>(tile);
  at.centre = space.reserve<double>(select.sq_distances ? tile : 0);
  at.rounded = space.reserve<S>(tile);
  at.nonfinite = space.reserve<uint8_t>(n);
  at.mixed_nonfinite = space.reserve<uint8_t>(k);
  at.finite = space.reserve<uint8_t>(n);
  Workspace sums;
  const int64_t partial = sums.reserve<double>(select.sq_distances ? grid.n_tasks * n_measured : 0);
  if (!space.allocate(threads) || !sums.allocate(1)) {
    release_window(window);
    return Status::out_of_memory;
  }
  double* partials = sums.part<double>(0, partial);

  Tasks tasks = tasks_of<S>(grid, rows, threads);
  in_threads(threads, [&](const Member& member) {
    const int thread = member.thread;
    S* buffer = space.part<S>(thread, at.buffer);
    const S** src = space.part<const S*>(thread, at.src);
    double* wide = space.part<double>(thread, at.wide);
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
    memset(nonfinite, 0, static_cast<size_t>(n));
    memset(network, 0, sizeof(C) * static_cast<size_t>(scratch));

    // One tile whose columns are whole vectors, or a tail below one vector.
    const auto run_tile = [&](int64_t segment, int64_t first, int64_t columns, double* distances) {
      const int64_t padded = round_up(columns, kStored<S>);
      Ahead ahead =
          ahead_of<S>(rows, segment, first + columns, columns, select.mix ? mixing.groups() : padded / kStored<S>);
      read_tile<S>(rows, segment, first, columns, kStored<S>, buffer, src);
      bool is_lifted = false;
      if (select.mix) {
        const bool keep = distances && same;
        is_lifted = widen_tile(src, n, padded, tile, may_be_lifted, wide, finite);
        mixing.run(wide, padded, tile, finite, keep ? mixed : nullptr, mixed_rounded, ahead, is_lifted);
        for (int64_t r = 0; r < k; ++r) mixed_src[r] = mixed_rounded + r * tile;
        memset(mixed_nonfinite, 0, static_cast<size_t>(k));
        select_tile<C>(window, mixed_src, padded, network, out, mixed_nonfinite, ahead);
        for (int64_t i = 0; i < n; ++i) nonfinite[i] |= !finite[i];
      } else {
        select_tile<S>(window, src, padded, network, out, nonfinite, ahead);
      }
      narrow_run(out, columns, rounded);
      if (select.out)
        write_run(reinterpret_cast<char*>(static_cast<S*>(select.out[segment]) + first),
                  reinterpret_cast<const char*>(rounded), columns * static_cast<int64_t>(sizeof(S)), streamed);
      if (!distances) return;
      // Distances are to what is stored: 16-bit results are widened again.
      widen_run(rounded, columns, out);
      for (int64_t j = 0; j < padded; j += kDoubles) store(centre + j, load_double(out + j));
      if (remeasure) {
        if (!select.mix) is_lifted = widen_tile(src, n, padded, tile, may_be_lifted, wide, finite);
        measuring.run(wide, padded, tile, finite, measured, static_cast<C*>(nullptr), ahead, is_lifted);
      }
      const FlushedFloats floats(sizeof(S) == 8 && select.scale <= 1);  // squares of subnormal numbers vanish
      const double* virtual_rows = remeasure ? measured : mixed;
      for (int64_t i = 0; i < n_measured; ++i)
        distances[i] += select.measure ? sq_distance(virtual_rows + i * tile, centre, padded, select.scale)
                                       : sq_distance(src[i], centre, padded, select.scale);
    };

    for (int64_t task; (task = tasks.take(member.thread)) >= 0;) {
      double* distances = select.sq_distances ? partials + task * n_measured : nullptr;
      if (distances) memset(distances, 0, sizeof(double) * static_cast<size_t>(n_measured));
      for_task_pieces(rows, grid, task, [&](int64_t segment, int64_t first, int64_t count) {
        const int64_t whole = count / kStored<S> * kStored<S>;
        for (int64_t j = 0; j < whole; j += tile) run_tile(segment, first + j, min64(tile, whole - j), distances);
        if (whole < count) run_tile(segment, first + whole, count - whole, distances);
      });
    }
    mark(select.nonfinite, nonfinite, n);
  });
  if (select.sq_distances) {
    for (int64_t i = 0; i < n_measured; ++i) {
      double high = 0, low = 0, plain = 0;
      for (int64_t task = 0; task < grid.n_tasks; ++task) {
        add_doubled(high, low, partials[task * n_measured + i], 0);
        plain += partials[task * n_measured + i];
      }
      select.sq_distances[i] = plain - plain == 0 ? high + low : plain;  // an overflow stays an infinity
    }
  }
  release_window(window);
  return Status::ok;
}

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

// out[i] = the sum of what the tasks found.
void add_tasks(const double* partials, int64_t n_tasks, int64_t count, double* out) {
  for (int64_t at = 0; at < count; ++at) {
    double high = 0, low = 0, plain = 0;
    for (int64_t task = 0; task < n_tasks; ++task) {
      add_doubled(high, low, partials[2 * (task * count + at)], partials[2 * (task * count + at) + 1]);
      plain += partials[2 * (task * count + at)];
    }
    out[at] = plain - plain == 0 ? high + low : plain;  // an overflow stays an infinity
  }
}

template <class S, bool kExact>
Status row_sq_distances_of(const Rows& rows, const Centres& from, double scale, double* out, int threads) {
  const int64_t n = rows.n, count = from.count * n;
  const Grid grid = streaming_grid(rows, kDistanceColumns);
  const Rows centre_rows{from.data, rows.offsets, rows.n_segments, from.count, rows.dtype};
  Workspace space, sums;
  const int64_t at_buffer = space.reserve<S>(n * kStored<S>), at_src = space.reserve<const S*>(n);
  const int64_t at_tails = space.reserve<S>(from.count * kStored<S>), at_from = space.reserve<const S*>(from.count);
  const int64_t at_centres = space.reserve<double>(kTogether * kDistanceColumns);
  const int64_t at_total = space.reserve<DoubledSum>(kExact ? count * kChains : 0);
  const int64_t at_partials = sums.reserve<double>(grid.n_tasks * count * 2);
  if (!space.allocate(threads) || !sums.allocate(1)) return Status::out_of_memory;
  double* partials = sums.part<double>(0, at_partials);
  memset(partials, 0, sizeof(double) * static_cast<size_t>(grid.n_tasks * count * 2));

  Tasks tasks = tasks_of<S>(grid, rows, threads);
  in_threads(threads, [&](const Member& member) {
    const FlushedFloats floats(sizeof(S) == 8 && scale <= 1);  // squares of subnormal float64 numbers vanish
    const int thread = member.thread;
    S* buffer = space.part<S>(thread, at_buffer);
    const S** src = space.part<const S*>(thread, at_src);
    S* tails = space.part<S>(thread, at_tails);
    const S** centre_src = space.part<const S*>(thread, at_from);
    double* centres = space.part<double>(thread, at_centres);
    memset(centres, 0, sizeof(double) * kTogether * kDistanceColumns);
    DoubledSum* total = space.part<DoubledSum>(thread, at_total);
    for (int64_t task; (task = tasks.take(member.thread)) >= 0;) {
      double* partial = partials + 2 * task * count;
      if (kExact) memset(total, 0, sizeof(DoubledSum) * static_cast<size_t>(count * kChains));
      const auto run_tile = [&](int64_t segment, int64_t first, int64_t columns) {
        const int64_t padded = round_up(columns, kStored<S>);
        read_tile<S>(rows, segment, first, columns, kStored<S>, buffer, src);
        if (from.data) read_tile<S>(centre_rows, segment, first, columns, kStored<S>, tails, centre_src);
        for (int64_t c = 0; c < from.count; c += kTogether) {
          const int64_t together = min64(kTogether, from.count - c);
          for (int64_t p = 0; from.data && p < together; ++p)
            for (int64_t j = 0; j < padded; j += kDoubles)
              store(centres + p * kDistanceColumns + j, load_double(centre_src[c + p] + j) * scale);
          if (!kExact) {
            add_sq_distances(together, src, n, centres, padded, scale, partial + 2 * c * n);
            continue;
          }
          for (int64_t i = 0; i < n; ++i)
            for (int64_t p = 0; p < together; ++p)
              add_exactly(src[i], centres + p * kDistanceColumns, padded, scale, total + ((c + p) * n + i) * kChains);
        }
      };
      for_task_pieces(rows, grid, task, [&](int64_t segment, int64_t first, int64_t columns) {
        const int64_t whole = columns / kStored<S> * kStored<S>;
        for (int64_t j = 0; j < whole; j += kDistanceColumns)
          run_tile(segment, first + j, min64(kDistanceColumns, whole - j));
        if (whole < columns) run_tile(segment, first + whole, columns - whole);
      });
      for (int64_t at = 0; kExact && at < count; ++at)
        for (int64_t v = at * kChains; v < (at + 1) * kChains; ++v)
          for (int lane = 0; lane < kDoubles; ++lane)
            add_doubled(partial[2 * at], partial[2 * at + 1], total[v].high[lane], total[v].low[lane]);
    }
  });
  add_tasks(partials, grid.n_tasks, count, out);
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

// The row of the largest share is the base: digits that all rows have in common are not rounded away, and far rows,
// which have little, stay out.
template <class S>
Status sq_distances_to_average_of(const Rows& rows, const double* shares, double* out, int threads) {
  const int64_t n = rows.n;
  int64_t base = 0;
  for (int64_t i = 1; i < n; ++i)
    if (shares[i] > shares[base]) base = i;
  const Grid grid = streaming_grid(rows, kDistanceColumns);
  Workspace space, sums;
  const int64_t at_buffer = space.reserve<S>(n * kStored<S>), at_src = space.reserve<const S*>(n);
  const int64_t at_used = space.reserve<const S*>(n), at_shares = space.reserve<double>(n);
  const int64_t at_sums = space.reserve<double>(kDistanceColumns);
  const int64_t at_partials = sums.reserve<double>(grid.n_tasks * n * 2);
  if (!space.allocate(threads) || !sums.allocate(1)) return Status::out_of_memory;
  double* partials = sums.part<double>(0, at_partials);
  memset(partials, 0, sizeof(double) * static_cast<size_t>(grid.n_tasks * n * 2));

  Tasks tasks = tasks_of<S>(grid, rows, threads);
  in_threads(threads, [&](const Member& member) {
    const int thread = member.thread;
    S* buffer = space.part<S>(thread, at_buffer);
    const S** src = space.part<const S*>(thread, at_src);
    const S** used = space.part<const S*>(thread, at_used);
    double* share = space.part<double>(thread, at_shares);
    double* average = space.part<double>(thread, at_sums);
    int64_t n_used = 0;
    for (int64_t i = 0; i < n; ++i)
      if (shares[i] != 0) share[n_used++] = shares[i];
    const auto run_tile = [&](int64_t segment, int64_t first, int64_t columns, double* partial) {
      const int64_t padded = round_up(columns, kStored<S>);
      read_tile<S>(rows, segment, first, columns, kStored<S>, buffer, src);
      for (int64_t i = 0, u = 0; i < n; ++i)
        if (shares[i] != 0) used[u++] = src[i];
      memset(average, 0, sizeof(double) * static_cast<size_t>(padded));
      int64_t i = 0;
      for (; i + kAverageRows <= n_used; i += kAverageRows)
        add_differences<kAverageRows>(used + i, used + (i + 2 * kAverageRows <= n_used ? i + kAverageRows : i),
                                      src[base], share + i, padded, average);
      for (; i < n_used; ++i) add_differences<1>(used + i, used + i, src[base], share + i, padded, average);
      for (i = 0; i + kAverageRows <= n; i += kAverageRows)
        add_sq_distances_from<kAverageRows>(src + i, src[base], average, padded, partial + 2 * i);
      for (; i < n; ++i) add_sq_distances_from<1>(src + i, src[base], average, padded, partial + 2 * i);
    };
    for (int64_t task; (task = tasks.take(thread)) >= 0;)
      for_task_pieces(rows, grid, task, [&](int64_t segment, int64_t first, int64_t columns) {
        const int64_t whole = columns / kStored<S> * kStored<S>;
        for (int64_t j = 0; j < whole; j += kDistanceColumns)
          run_tile(segment, first + j, min64(kDistanceColumns, whole - j), partials + 2 * task * n);
        if (whole < columns) run_tile(segment, first + whole, columns - whole, partials + 2 * task * n);
      });
  });
  add_tasks(partials, grid.n_tasks, n, out);
  return Status::ok;
}

// ---- weighted_row_sum ----------------------------------------------------------------------------------

// A row at a time: memory likes long runs (mean of 64 rows: 2.2 reads, 1.1 so).
template <class S>
constexpr int64_t kSumColumns = sizeof(S) == 8 ? 1024 : 2048;
constexpr int64_t kSumRows = 4;  // or some rows: sums are loaded and stored once for them

bool is_power_of_two(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits << 12 == 0;  // of numbers that are not subnormal
}

enum class Terms { plain, shrunken, lifted };  // float64 values as they are, times kRoom, times kLift
template <Terms kTerms>
struct As {
  static constexpr Terms value = kTerms;
};

// sums[j] (+)= the weighted values of kCount rows in their order; `columns` is a multiple of the vector. Meanwhile
// fetches as much of the rows `next`. Of float64 rows with what the roundings lost, after the sums; kExact: products
// with powers of two lose nothing.
template <int64_t kCount, Terms kTerms, bool kExact, class S>
RK_INLINE void add_rows(const S* const* rows, const S* const* next, const double* weights, int64_t columns, bool begin,
                        double* sums) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(S));
  F64 factor[kCount];
  for (int64_t i = 0; i < kCount; ++i) factor[i] = splat<F64>(weights[i]);
  for (int64_t j = 0; j < columns; j += kDoubles) {
    if (j % line == 0)
#pragma GCC unroll 4
      for (int64_t i = 0; i < kSumRows; ++i) __builtin_prefetch(next[i] + j, 0, 2);
    if constexpr (sizeof(S) == 8) {
      double *high = sums + j, *low = sums + kSumColumns<S> + j;
      DoubledSum sum = {};
      if (!begin) sum = {load(high), load(low)};
#pragma GCC unroll 4
      for (int64_t i = 0; i < kCount; ++i) {
        const F64 x = load(rows[i] + j);
        const F64 value = kTerms == Terms::shrunken ? x * kRoom : kTerms == Terms::lifted ? lifted(x) : x;
        if (kExact)
          add(sum, factor[i] * value);
        else
          add_product(sum, factor[i], value);
      }
      store(high, sum.high);
      store(low, sum.low);
    } else {
      F64 sum = begin ? F64{} : load(sums + j);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kCount; ++i) sum = fmadd(factor[i], load_double(rows[i] + j), sum);
      store(sums + j, sum);
    }
  }
}

template <class S>
Status weighted_row_sum_of(const Rows& rows, const double* weights, const double* divisors, int64_t k, void* const* out,
                           int threads) {
  using C = ComputeOf<S>;
  constexpr int64_t run = kSumColumns<S>;
  const int64_t n = rows.n;
  const Grid grid = make_grid(rows.columns(), max64((int64_t{1} << 18) / max64(n, 1) / run, 1) * run);
  const bool streamed = rows.columns() * static_cast<int64_t>(sizeof(S)) >= kStreamedBytes;
  Workspace space;
  const int64_t at_used = space.reserve<int64_t>(n), at_weights = space.reserve<double>(n);
  const int64_t width = min64(run, round_up(rows.columns(), kDoubles));
  const int64_t at_sums = space.reserve<double>(sizeof(S) == 8 ? run + width : width);
  const int64_t at_tail = space.reserve<S>(kSumRows * kDoubles);
  const int64_t at_rounded = space.reserve<C>(width), at_stored = space.reserve<S>(width);
  if (!space.allocate(threads)) return Status::out_of_memory;

  Tasks tasks = tasks_of<S>(grid, rows, threads);
  in_threads(threads, [&](const Member& member) {
    const int thread = member.thread;
    int64_t* used = space.part<int64_t>(thread, at_used);
    double* w = space.part<double>(thread, at_weights);
    double* sums = space.part<double>(thread, at_sums);
    S* tail = space.part<S>(thread, at_tail);
    C* rounded = space.part<C>(thread, at_rounded);
    S* stored = space.part<S>(thread, at_stored);
    // One sum of some columns of a segment; only rows with some weight are looked at, in row order.
    const auto add_columns = [&](int64_t r, int64_t segment, int64_t first, int64_t columns, double lift, auto tailed,
                                 auto terms) {
      constexpr Terms kTerms = terms.value;
      int64_t n_used = 0;
      bool exact = sizeof(S) == 8 && kTerms == Terms::plain;
      for (int64_t i = 0; i < n; ++i)
        if (weights[r * n + i] != 0) {
          used[n_used] = i;
          w[n_used] = weights[r * n + i] * lift;
          exact &= is_power_of_two(w[n_used++]);
        }
      const int64_t padded = round_up(columns, kDoubles);
      for (int64_t i = 0; i < n_used; i += kSumRows) {
        const int64_t count = min64(kSumRows, n_used - i);
        const S *src[kSumRows], *next[kSumRows];
        for (int64_t p = 0; p < kSumRows; ++p) {
          const int64_t then = i + count + p < n_used ? i + count + p
                               : i + count < n_used   ? i + count
                                                      : min64(p, n_used - 1);
          next[p] =
              static_cast<const S*>(rows.data[segment * n + used[then]]) + first + (i + count < n_used ? 0 : columns);
        }
        for (int64_t p = 0; p < count; ++p) {
          src[p] = static_cast<const S*>(rows.data[segment * n + used[i + p]]) + first;
          if (tailed.value) {
            memset(tail + p * kDoubles, 0, sizeof(S) * kDoubles);
            memcpy(tail + p * kDoubles, src[p], sizeof(S) * static_cast<size_t>(columns));
            src[p] = tail + p * kDoubles;
          }
        }
        const auto add = [&](auto is_exact) {
          constexpr bool kExact = sizeof(S) == 8 && kTerms == Terms::plain && is_exact.value != 0;
          if (count == 4)
            add_rows<4, kTerms, kExact>(src, next, w + i, padded, i == 0, sums);
          else if (count == 3)
            add_rows<3, kTerms, kExact>(src, next, w + i, padded, i == 0, sums);
          else if (count == 2)
            add_rows<2, kTerms, kExact>(src, next, w + i, padded, i == 0, sums);
          else
            add_rows<1, kTerms, kExact>(src, next, w + i, padded, i == 0, sums);
        };
        if (exact)
          add(Count<1>{});
        else
          add(Count<0>{});
      }
      if (n_used == 0) {
        memset(sums, 0, sizeof(double) * static_cast<size_t>(padded));
        if (sizeof(S) == 8) memset(sums + run, 0, sizeof(double) * static_cast<size_t>(padded));
      }
    };
    const auto sum_columns = [&](int64_t r, int64_t segment, int64_t first, int64_t columns, auto tailed) {
      const Average average = average_of(weights + r * n, n, divisors ? divisors[r] : 1);
      const int64_t padded = round_up(columns, kDoubles);
      const Divisor by(average.divisor, average.reciprocal);
      const auto add = [&](double lift, auto terms) { add_columns(r, segment, first, columns, lift, tailed, terms); };
      if constexpr (sizeof(S) == 8) {
        const auto sum = [&](int64_t j) { return DoubledSum{load(sums + j), load(sums + run + j)}; };
        const auto again = [&](auto&& wanted, auto&& result) {
          for (int64_t j = 0; j < padded; j += kDoubles) {
            const F64 value = load(rounded + j);
            store(rounded + j, wanted(value) ? result(sum(j)) : value);
          }
        };
        const auto is_tiny = [](F64 value) { return size_of(value) < kTiny; };
        F64 check = {};
        Simd<double>::Key tiny = {};
        {
          const FlushedFloats floats(average.averaging);  // only averages that are tiny rest on subnormal numbers
          add(average.lift, As<Terms::plain>{});
          for (int64_t j = 0; j < padded; j += kDoubles) {
            const F64 value = divided(sum(j), by);
            check = fmadd(value, F64{}, check);
            tiny |= reinterpret_cast<Simd<double>::Key>(is_tiny(value));
            store(rounded + j, value);
          }
        }
        if (average.averaging && any_nan(reinterpret_cast<F64>(tiny))) {
          Liftable found;  // in columns of tiny averages
          for (int64_t i = 0; i < n; ++i)
            if (weights[r * n + i] != 0) {
              const S* row = static_cast<const S*>(rows.data[segment * n + i]) + first;
              for (int64_t j = 0; j < columns; j += kDoubles) {
                double tail[kDoubles] = {};
                if (j + kDoubles > columns) memcpy(tail, row + j, sizeof(S) * static_cast<size_t>(columns - j));
                const F64 value = load(j + kDoubles > columns ? tail : row + j);
                found.look(is_tiny(load(rounded + j)) ? value : F64{});
              }
            }
          if (found.liftable()) {
            const FlushedFloats floats(true);
            add(average.lift, As<Terms::lifted>{});
            again(is_tiny, [&](const DoubledSum& lifted_sum) { return lowered(divided(lifted_sum, by)); });
          } else if (!found.zero()) {
            add(average.lift, As<Terms::plain>{});
            again(is_tiny, [&](const DoubledSum& whole) { return divided(whole, by); });
          }
        }
        if (__builtin_expect(any_nan(check), false)) {
          const FlushedFloats floats(average.averaging);
          add(average.lift, As<Terms::shrunken>{});
          again([](F64 value) { return value - value != 0; },
                [&](const DoubledSum& found) { return grown(found, average.divisor, average.averaging); });
        }
      } else {
        add(average.lift, As<Terms::plain>{});
        const auto round = [&](auto&& quotient) {
          F64 check = {};
          for (int64_t j = 0; j < padded; j += kDoubles) {
            const F64 value = quotient(load(sums + j));
            check = fmadd(value, F64{}, check);
            store_rounded(rounded + j, sizeof(S) == 2 ? to_odd(value) : value);
          }
          return any_nan(check);
        };
        const bool again = round([&](F64 sum) { return divided(sum, by); });
        if (__builtin_expect(again, false)) round([&](F64 sum) { return sum / by.value; });
      }
      narrow_run(rounded, columns, stored);
      write_run(static_cast<char*>(out[segment * k + r]) + first * static_cast<int64_t>(sizeof(S)),
                reinterpret_cast<const char*>(stored), columns * static_cast<int64_t>(sizeof(S)), streamed);
    };
    for (int64_t task; (task = tasks.take(member.thread)) >= 0;)
      for_task_pieces(rows, grid, task, [&](int64_t segment, int64_t first, int64_t count) {
        const int64_t whole = count / kDoubles * kDoubles;
        for (int64_t j = 0; j < whole; j += run)
          for (int64_t r = 0; r < k; ++r)  // all sums of a tile that stays in cache: one read of the data
            sum_columns(r, segment, first + j, min64(run, whole - j), Count<0>{});
        if (whole < count)
          for (int64_t r = 0; r < k; ++r) sum_columns(r, segment, first + whole, count - whole, Count<1>{});
      });
  });
  return Status::ok;
}

// ---- update_momenta ------------------------------------------------------------------------------------

constexpr int64_t kMomentumColumns = 2048;  // of a row at a time
// Bytes ahead of three streams that the hardware could follow by itself, but not as fast: 9.3 ms without, 8.7 so (17
// rows of 1e6 float32); 4 KiB ahead are alike.
constexpr int64_t kMomentumAhead = 1024;

// The new values of some columns of a row, a multiple of the vector.
template <bool kKeeps, bool kCorrects, class S, class C>
RK_INLINE void momentum_run(const S* gradient, const S* correction, const S* old, F64 scale, F64 minus, F64 keep,
                            int64_t columns, C* to) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(S));
  for (int64_t j = 0; j < columns; j += kDoubles) {
    if (j % line == 0) {
      __builtin_prefetch(reinterpret_cast<const char*>(gradient + j) + kMomentumAhead, 0, 3);
      if (kKeeps) __builtin_prefetch(reinterpret_cast<const char*>(old + j) + kMomentumAhead, 0, 3);
      if (kCorrects) __builtin_prefetch(reinterpret_cast<const char*>(correction + j) + kMomentumAhead, 0, 3);
    }
    F64 value = scale * load_double(gradient + j);
    if (kKeeps) {
      F64 before = load_double(old + j);
      if (kCorrects) before = fmadd(minus, load_double(correction + j), before);
      value = fmadd(keep, before, value);
    }
    store_rounded(to + j, value);
  }
}

template <class S>
Status update_momenta_of(const Rows& gradients, const Momenta& how, void* const* momenta, int threads) {
  using C = ComputeOf<S>;
  const int64_t n = gradients.n;
  const Grid grid =
      make_grid(gradients.columns(), max64((int64_t{1} << 18) / n / kMomentumColumns, 1) * kMomentumColumns);
  Workspace space;
  const int64_t at_tail = space.reserve<S>(3 * kDoubles), at_rounded = space.reserve<C>(kMomentumColumns);
  const int64_t at_stored = space.reserve<S>(kDoubles);
  if (!space.allocate(threads)) return Status::out_of_memory;
  const bool keeps = how.keep != 0, corrects = keeps && how.corrections;
  const F64 keep = splat<F64>(how.keep);

  Tasks tasks = tasks_of<S>(grid, gradients, threads);
  in_threads(threads, [&](const Member& member) {
    const int thread = member.thread;
    S* tail = space.part<S>(thread, at_tail);
    C* rounded = space.part<C>(thread, at_rounded);
    S* stored = space.part<S>(thread, at_stored);
    const auto compute = [&](int64_t i, const S* gradient, const S* correction, const S* old, int64_t columns, C* to) {
      const F64 scale = splat<F64>(how.gradient_scales[i]);
      const F64 minus = splat<F64>(corrects ? -how.correction_scales[i] : 0.0);
      if (corrects)
        momentum_run<true, true>(gradient, correction, old, scale, minus, keep, columns, to);
      else if (keeps)
        momentum_run<true, false>(gradient, correction, old, scale, minus, keep, columns, to);
      else
        momentum_run<false, false>(gradient, correction, old, scale, minus, keep, columns, to);
    };
    for (int64_t task; (task = tasks.take(member.thread)) >= 0;)
      for_task_pieces(gradients, grid, task, [&](int64_t segment, int64_t first, int64_t count) {
        const int64_t whole = count / kDoubles * kDoubles;
        for (int64_t i = 0; i < n; ++i) {
          const int64_t at = segment * n + i;
          const S* gradient = static_cast<const S*>(gradients.data[at]) + first;
          const S* correction = corrects ? static_cast<const S*>(how.corrections[at]) + first : gradient;
          S* momentum = static_cast<S*>(momenta[at]) + first;
          for (int64_t j = 0; j < whole; j += kMomentumColumns) {
            const int64_t columns = min64(kMomentumColumns, whole - j);
            if constexpr (sizeof(S) == sizeof(C)) {
              compute(i, gradient + j, correction + j, momentum + j, columns, momentum + j);
            } else {
              compute(i, gradient + j, correction + j, momentum + j, columns, rounded);
              narrow_run(rounded, columns, momentum + j);
            }
          }
          if (whole == count) continue;
          const S* sources[] = {gradient, correction, momentum};
          memset(tail, 0, sizeof(S) * 3 * kDoubles);
          for (int64_t p = 0; p < (keeps ? 3 : 1); ++p)
            memcpy(tail + p * kDoubles, sources[p] + whole, sizeof(S) * static_cast<size_t>(count - whole));
          compute(i, tail, tail + kDoubles, tail + 2 * kDoubles, kDoubles, rounded);
          narrow_run(rounded, count - whole, stored);
          memcpy(momentum + whole, stored, sizeof(S) * static_cast<size_t>(count - whole));
        }
      });
  });
  return Status::ok;
}

// ---- storage types -------------------------------------------------------------------------------------

Status select_columns(const Rows& rows, const Select& select, int threads) {
  return by_dtype(rows.dtype, [&](auto s) { return select_columns_of<decltype(s)>(rows, select, threads); });
}
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
Status weighted_row_sum(const Rows& rows, const double* weights, const double* divisors, int64_t k, void* const* out,
                        int threads) {
  return by_dtype(rows.dtype,
                  [&](auto s) { return weighted_row_sum_of<decltype(s)>(rows, weights, divisors, k, out, threads); });
}
Status update_momenta(const Rows& gradients, const Momenta& how, void* const* momenta, int threads) {
  return by_dtype(gradients.dtype,
                  [&](auto s) { return update_momenta_of<decltype(s)>(gradients, how, momenta, threads); });
}

}  // namespace

Status gram(const Rows& rows, const int64_t* multiplicities, bool origin, double scale, bool single, int64_t lines,
            double* out, int threads);                                                  // gram.cpp
uint64_t read_pass(const Rows& rows, int threads);                                      // read_pass.cpp
uint64_t digest(const void* data, int64_t bytes, const uint32_t* key, uint64_t point);  // digest.cpp

extern const Kernels table;
const Kernels table{RK_ISA_NAME,    select_columns, gram,  row_sq_distances, sq_distances_to_average, weighted_row_sum,
                    update_momenta, read_pass,      digest};

}  // namespace RK_ISA
}  // namespace rk
