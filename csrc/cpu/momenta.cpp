// Compiled once per instruction set: update_momenta.
#include "walk.h"

namespace rk {
namespace RK_ISA {
namespace {

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

struct Call {
  const Rows& rows;  // the gradients
  const Momenta& how;
  void* const* momenta;
  const bool keeps = how.keep != 0, corrects = keeps && how.corrections;
  const int64_t task = max64((int64_t{1} << 18) / rows.n / kMomentumColumns, 1) * kMomentumColumns;
  const Grid grid = make_grid(rows, task, task, kDoubles);  // a piece is one tile, but for its tail
};

template <class S>
class Worker : public Steps {
 public:
  using C = ComputeOf<S>;
  explicit Worker(const Call& call) : call_(call) {}

  void lay(Layout& at) {
    at(tail_, 3 * kDoubles);
    at(rounded_, kMomentumColumns);
    at(stored_, kDoubles);
  }
  void run(const Tile& tile) {
    for (int64_t i = 0; i < call_.rows.n; ++i) {
      const int64_t at = tile.segment * call_.rows.n + i;
      const S* gradient = tile.of<S>(call_.rows, i);
      const S* correction = call_.corrects ? static_cast<const S*>(call_.how.corrections[at]) + tile.first : gradient;
      S* momentum = static_cast<S*>(call_.momenta[at]) + tile.first;
      if (tile.columns < kDoubles)
        update_tail(i, gradient, correction, momentum, tile.columns);
      else
        update(i, gradient, correction, momentum, tile.columns);
    }
  }

 private:
  void update(int64_t i, const S* gradient, const S* correction, S* momentum, int64_t columns) {
    for (int64_t j = 0; j < columns; j += kMomentumColumns) {
      const int64_t count = min64(kMomentumColumns, columns - j);
      if constexpr (sizeof(S) == sizeof(C)) {
        compute(i, gradient + j, correction + j, momentum + j, count, momentum + j);
      } else {
        compute(i, gradient + j, correction + j, momentum + j, count, rounded_);
        narrow_run(rounded_, count, momentum + j);
      }
    }
  }
  void update_tail(int64_t i, const S* gradient, const S* correction, S* momentum, int64_t columns) {
    const S* sources[] = {gradient, correction, momentum};
    const size_t bytes = sizeof(S) * static_cast<size_t>(columns);
    memset(tail_, 0, sizeof(S) * 3 * kDoubles);
    for (int64_t p = 0; p < (call_.keeps ? 3 : 1); ++p) memcpy(tail_ + p * kDoubles, sources[p], bytes);
    compute(i, tail_, tail_ + kDoubles, tail_ + 2 * kDoubles, kDoubles, rounded_);
    narrow_run(rounded_, columns, stored_);
    memcpy(momentum, stored_, bytes);
  }
  void compute(int64_t i, const S* gradient, const S* correction, const S* old, int64_t columns, C* to) const {
    const F64 scale = splat<F64>(call_.how.gradient_scales[i]), keep = splat<F64>(call_.how.keep);
    const F64 minus = splat<F64>(call_.corrects ? -call_.how.correction_scales[i] : 0.0);
    if (call_.corrects)
      momentum_run<true, true>(gradient, correction, old, scale, minus, keep, columns, to);
    else if (call_.keeps)
      momentum_run<true, false>(gradient, correction, old, scale, minus, keep, columns, to);
    else
      momentum_run<false, false>(gradient, correction, old, scale, minus, keep, columns, to);
  }

  const Call& call_;
  S *tail_ = nullptr, *stored_ = nullptr;
  C* rounded_ = nullptr;
};

}  // namespace

Status update_momenta(const Rows& gradients, const Momenta& how, void* const* momenta, int threads) {
  return by_dtype(gradients.dtype, [&](auto s) {
    using S = decltype(s);
    return walk<Worker<S>>(Call{gradients, how, momenta}, threads) ? Status::ok : Status::out_of_memory;
  });
}

}  // namespace RK_ISA
}  // namespace rk
