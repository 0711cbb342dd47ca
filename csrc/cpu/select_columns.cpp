// Compiled once per instruction set: select_columns, of the rows or of mixtures of them, and distances to what is
// selected, tile by tile: one read of the data.
#include "mixing.h"
#include "select.h"
#include "walk.h"

namespace rk {
namespace RK_ISA {
namespace {

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

template <class S>
struct Call {
  const Rows& rows;
  const Select& select;
  const int64_t n = rows.n, k = select.mix ? select.n_mixed : n, n_measured = select.measure ? select.n_measured : n;
  // The mixtures that are measured: none, those that are selected from, or others.
  const bool same = select.measure == select.mix && select.measure_divisors == select.mix_divisors;
  const bool remeasures = select.sq_distances && select.measure && !same;
  const Grid grid = grid_of();
  const bool streamed = rows.columns() * static_cast<int64_t>(sizeof(S)) >= kStreamedBytes;
  Mixing<sizeof(S) == 8> mixing, measuring;
  bool may_be_lifted = false;
  Window window{k, select.lo, select.hi, select.multiplicities, select.nearest, sizeof(S) == 2};
  TaskSums<false> distances;

  Call(const Rows& rows, const Select& select) : rows(rows), select(select) {}

  bool prepare() {  // false: out of memory
    if (select.mix && !mixing.prepare(select.mix, select.mix_divisors, k, n)) return false;
    if (remeasures && !measuring.prepare(select.measure, select.measure_divisors, n_measured, n)) return false;
    may_be_lifted = mixing.averaging() && measuring.averaging();  // or what is lifted may overflow
    return window.prepare() && (!select.sq_distances || distances.prepare(grid, n_measured));
  }
  // Scratch of the selection: mixed rows are of the compute type.
  int64_t scratch() const { return select.mix ? select_scratch<ComputeOf<S>>(window) : select_scratch<S>(window); }

 private:
  Grid grid_of() const {
    // Mixtures take room of their own; distances read the tile a second time, so it should still be in the first-level
    // cache.
    const bool small_tile = select.sq_distances && n <= 32;
    const int64_t tile = select.mix || remeasures
                             ? max64(2048 / max64(n, k) / 64, 1) * 64
                             : round_up(tile_columns(n, small_tile ? 4 * sizeof(S) : sizeof(S)), kStored<S>);
    const Grid grid = streaming_grid(rows, tile, kStored<S>);
    // The partial distances stay far below the input: at least 512 columns to a task.
    return select.sq_distances ? make_grid(rows, max64(grid.task_columns, (511 + tile) / tile * tile), tile, kStored<S>)
                               : grid;
  }
};

template <class S>
class Worker : public Steps {
 public:
  using C = ComputeOf<S>;
  explicit Worker(const Call<S>& call) : call_(call), select_(call.select) {}

  void lay(Layout& at) {
    const int64_t tile = call_.grid.tile, mixed = select_.mix ? call_.k * tile : 0;
    at(buffer_, call_.n * kStored<S>);
    at(src_, call_.n);
    at(wide_, select_.mix || call_.remeasures ? call_.n * tile : 0);
    at(mixed_, mixed);
    at(mixed_rounded_, mixed);
    at(mixed_src_, call_.k);
    at(measured_, call_.remeasures ? call_.n_measured * tile : 0);
    at(scratch_, call_.scratch());
    at(out_, tile);
    at(centre_, select_.sq_distances ? tile : 0);
    at(rounded_, tile);
    at(nonfinite_, call_.n);
    at(mixed_nonfinite_, call_.k);
    at(finite_, call_.n);
  }
  void start() {
    memset(nonfinite_, 0, static_cast<size_t>(call_.n));
    memset(scratch_, 0, sizeof(C) * static_cast<size_t>(call_.scratch()));
  }
  void begin(int64_t task) { distances_ = select_.sq_distances ? call_.distances.of(task) : nullptr; }
  void finish() { mark(select_.nonfinite, nonfinite_, call_.n); }

  void run(const Tile& tile) {
    const int64_t padded = round_up(tile.columns, kStored<S>);
    Ahead ahead = ahead_of<S>(call_.rows, tile, select_.mix ? call_.mixing.groups() : padded / kStored<S>);
    read_tile<S>(call_.rows, tile, kStored<S>, buffer_, src_);
    if (select_.mix)
      select_mixed(padded, ahead);
    else
      select_tile<S>(call_.window, src_, padded, scratch_, out_, nonfinite_, ahead);
    narrow_run(out_, tile.columns, rounded_);
    if (select_.out) write_tile(select_.out[tile.segment], tile, rounded_, call_.streamed);
    if (distances_) measure(tile.columns, ahead);
  }

 private:
  void widen(int64_t padded) {
    is_lifted_ = widen_tile(src_, call_.n, padded, call_.grid.tile, call_.may_be_lifted, wide_, finite_);
  }
  void select_mixed(int64_t padded, Ahead& ahead) {
    const int64_t tile = call_.grid.tile;
    widen(padded);
    call_.mixing.run(wide_, padded, tile, finite_, distances_ && call_.same ? mixed_ : nullptr, mixed_rounded_, ahead,
                     is_lifted_);
    for (int64_t r = 0; r < call_.k; ++r) mixed_src_[r] = mixed_rounded_ + r * tile;
    memset(mixed_nonfinite_, 0, static_cast<size_t>(call_.k));
    select_tile<C>(call_.window, mixed_src_, padded, scratch_, out_, mixed_nonfinite_, ahead);
    for (int64_t i = 0; i < call_.n; ++i) nonfinite_[i] |= !finite_[i];
  }
  void measure(int64_t columns, Ahead& ahead) {
    const int64_t padded = round_up(columns, kStored<S>), tile = call_.grid.tile;
    // Distances are to what is stored: 16-bit results are widened again.
    widen_run(rounded_, columns, out_);
    for (int64_t j = 0; j < padded; j += kDoubles) store(centre_ + j, load_double(out_ + j));
    if (call_.remeasures) {
      if (!select_.mix) widen(padded);
      call_.measuring.run(wide_, padded, tile, finite_, measured_, static_cast<C*>(nullptr), ahead, is_lifted_);
    }
    const FlushedFloats floats(sizeof(S) == 8 && select_.scale <= 1);  // squares of subnormal numbers vanish
    const double* virtual_rows = call_.remeasures ? measured_ : mixed_;
    for (int64_t i = 0; i < call_.n_measured; ++i)
      distances_[i] += select_.measure ? sq_distance(virtual_rows + i * tile, centre_, padded, select_.scale)
                                       : sq_distance(src_[i], centre_, padded, select_.scale);
  }

  const Call<S>& call_;
  const Select& select_;
  S *buffer_ = nullptr, *rounded_ = nullptr;
  const S** src_ = nullptr;
  double *wide_ = nullptr, *mixed_ = nullptr, *measured_ = nullptr, *centre_ = nullptr, *distances_ = nullptr;
  C *mixed_rounded_ = nullptr, *scratch_ = nullptr, *out_ = nullptr;
  const C** mixed_src_ = nullptr;
  uint8_t *nonfinite_ = nullptr, *mixed_nonfinite_ = nullptr, *finite_ = nullptr;
  bool is_lifted_ = false;
};

template <class S>
Status select_columns_of(const Rows& rows, const Select& select, int threads) {
  Call<S> call(rows, select);
  if (!call.prepare() || !walk<Worker<S>>(call, threads)) return Status::out_of_memory;
  if (select.sq_distances) call.distances.add_up(select.sq_distances);
  return Status::ok;
}

}  // namespace

Status select_columns(const Rows& rows, const Select& select, int threads) {
  return by_dtype(rows.dtype, [&](auto s) { return select_columns_of<decltype(s)>(rows, select, threads); });
}

}  // namespace RK_ISA
}  // namespace rk
