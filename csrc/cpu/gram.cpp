// Compiled once per instruction set: inner products of the rows, centred tile by tile on their lower median.
// Products are summed in float64, or, where the caller allows it, in float32 over short runs of columns.
#include <type_traits>

#include "select.h"
#include "walk.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int64_t kBlock = 4;  // rows of a register tile,
constexpr int64_t kRight =
    kVectorBytes == 64 ? 4 : 2;  // and rows it is multiplied with at a time: sums fit the registers
constexpr int64_t kCells = kBlock * kBlock;
constexpr int64_t kBetweenFetches = 4;  // vectors
constexpr int64_t kTaskGrams = 64;      // partial Grams at most
constexpr int64_t kTaskRows = 128;      // whose Grams tasks have of their own
constexpr int64_t kTaskCells = (kTaskRows / kBlock + 1) * (kTaskRows / kBlock + 2) / 2 * kCells;  // and the origin's;
// above, one Gram is shared and its blocks are split among threads.

// Sums of so many tiles go to others: no sum has many terms, for the contract's error bound. Rows that are constant
// over 1.5 million columns had errors of 1446 roundings, with all tiles of 140 rows in one sum.
constexpr int64_t kFreshTiles = 128;

// A lane's sum in float32 has at most so many terms: with the centring (2), the sum of the lanes (4) and what squares
// that underflow may take (below 1: 2^-126 a column, of rows that count as 2^-50 a column long), the contract's error
// bound of 40 roundings.
constexpr int64_t kSingleRun = 32;

// Columns of a tile.
template <class P>
constexpr int64_t kTile = sizeof(P) == 4 ? kSingleRun * Simd<float>::lanes : 256;
constexpr int64_t kRowBytes = 2048 + 64;  // of a centred tile; no power of two: rows fall into different cache sets
static_assert(kTile<float> * 4 <= 2048 && kTile<double> * 8 <= 2048, "a row of a tile fits");

// Where sums are: the lower triangle of a Gram, or its first `lines` columns of blocks, block after block; within a
// block kRight columns at a time.
struct Triangle {
  int64_t blocks, lines;

  RK_INLINE int64_t right_of(int64_t i) const { return min64(i + 1, lines); }  // blocks that block i is multiplied with
  RK_INLINE int64_t block_at(int64_t i, int64_t j) const {
    const int64_t whole = min64(i, lines);
    return (whole * (whole + 1) / 2 + (i - whole) * lines + j) * kCells;
  }
  RK_INLINE int64_t cell_at(int64_t i, int64_t j) const {
    const int64_t p = i % kBlock, q = j % kBlock;
    return block_at(i / kBlock, j / kBlock) + q / kRight * (kBlock * kRight) + p * kRight + q % kRight;
  }
  RK_INLINE int64_t size() const { return block_at(blocks, 0); }
};

// ---- sums of lanes -------------------------------------------------------------------------------------

// cells[k] += the sum of the lanes of sums[k], for all k at once: one vector of sums instead of a sum per vector.
template <class V>
RK_INLINE void add_lane_sums(const V (&sums)[kBlock * kRight], double* cells) {
  constexpr int lanes = sizeof(V) == sizeof(F32) && __is_same(V, F32) ? Simd<float>::lanes : kDoubles;
  for (int64_t k = 0; k < kBlock * kRight; ++k) {
    double total = 0;
    for (int lane = 0; lane < lanes; ++lane) total += static_cast<double>(sums[k][lane]);
    cells[k] += total;
  }
}
#if defined(__AVX512F__)
// Halves of two vectors added: the first's in the low half.
RK_INLINE F32 fold_halves(F32 a, F32 b) { return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee); }
RK_INLINE F32 fold_quarters(F32 a, F32 b) {
  return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
}
RK_INLINE F32 fold_pairs(F32 a, F32 b) { return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b); }
RK_INLINE F32 fold_ends(F32 a, F32 b) {
  const __m512d p = _mm512_castps_pd(a), q = _mm512_castps_pd(b);
  return _mm512_castpd_ps(_mm512_unpacklo_pd(p, q)) + _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
}
template <>
RK_INLINE void add_lane_sums<F32>(const F32 (&sums)[16], double* cells) {
  // Vector 4 * part + k ends up in quarter `part`, lane k.
  F32 halves[8], quarters[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    halves[k] = fold_halves(sums[k], sums[8 + k]);
    halves[4 + k] = fold_halves(sums[4 + k], sums[12 + k]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) quarters[k] = fold_quarters(halves[k], halves[4 + k]);
  const F32 mixed = fold_ends(fold_pairs(quarters[0], quarters[1]), fold_pairs(quarters[2], quarters[3]));
  // The quarters hold the vectors of parts 0, 2, 1, 3.
  const F32 total = _mm512_shuffle_f32x4(mixed, mixed, 0xd8);
  store(cells, load(cells) + F64(_mm512_cvtps_pd(_mm512_castps512_ps256(total))));
  store(cells + 8, load(cells + 8) + F64(_mm512_cvtps_pd(_mm512_extractf32x8_ps(total, 1))));
}
template <>
RK_INLINE void add_lane_sums<F64>(const F64 (&sums)[16], double* cells) {
#pragma GCC unroll 2
  for (int half = 0; half < 16; half += 8) {
    F64 pairs[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      pairs[k] = F64(_mm512_unpacklo_pd(sums[half + 2 * k], sums[half + 2 * k + 1])) +
                 F64(_mm512_unpackhi_pd(sums[half + 2 * k], sums[half + 2 * k + 1]));
    const F64 low =
        F64(_mm512_shuffle_f64x2(pairs[0], pairs[1], 0x44)) + F64(_mm512_shuffle_f64x2(pairs[0], pairs[1], 0xee));
    const F64 high =
        F64(_mm512_shuffle_f64x2(pairs[2], pairs[3], 0x44)) + F64(_mm512_shuffle_f64x2(pairs[2], pairs[3], 0xee));
    const F64 total = F64(_mm512_shuffle_f64x2(low, high, 0x88)) + F64(_mm512_shuffle_f64x2(low, high, 0xdd));
    store(cells + half, load(cells + half) + total);
  }
}
#elif defined(__AVX2__)
template <>
RK_INLINE void add_lane_sums<F32>(const F32 (&sums)[8], double* cells) {
  const F32 low = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
  const F32 high = _mm256_hadd_ps(_mm256_hadd_ps(sums[4], sums[5]), _mm256_hadd_ps(sums[6], sums[7]));
  store(cells,
        load(cells) + F64(_mm256_cvtps_pd(_mm_add_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1)))));
  store(cells + 4, load(cells + 4) +
                       F64(_mm256_cvtps_pd(_mm_add_ps(_mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1)))));
}
template <>
RK_INLINE void add_lane_sums<F64>(const F64 (&sums)[8], double* cells) {
#pragma GCC unroll 2
  for (int half = 0; half < 8; half += 4) {
    const F64 a = _mm256_hadd_pd(sums[half], sums[half + 1]), b = _mm256_hadd_pd(sums[half + 2], sums[half + 3]);
    store(cells + half,
          load(cells + half) + F64(_mm256_permute2f128_pd(a, b, 0x20)) + F64(_mm256_permute2f128_pd(a, b, 0x31)));
  }
}
#endif

// Adds the products of the rows of block i with those of the blocks up to it, over the columns of a tile.
template <class P>
RK_INLINE void add_products(const P* x, const Triangle& triangle, int64_t i, int64_t columns, double* cells,
                            Ahead& ahead) {
  using V = typename Simd<P>::V;
  constexpr int64_t lanes = Simd<P>::lanes, stride = kRowBytes / static_cast<int64_t>(sizeof(P));
  const P* a = x + i * kBlock * stride;
  double* out = cells + triangle.block_at(i, 0);
  for (int64_t j = 0; j < triangle.right_of(i) * kBlock; j += kRight, out += kBlock * kRight) {
    V sums[kBlock * kRight];
#pragma GCC unroll 16  // as a loop it would be compiled to a block operation
    for (int64_t k = 0; k < kBlock * kRight; ++k) sums[k] = V{};
    const P* b = x + j * stride;
    for (int64_t begin = 0; begin < columns; begin += kBetweenFetches * lanes) {
      ahead.step();
      const int64_t end = min64(begin + kBetweenFetches * lanes, columns);
      for (int64_t c = begin; c < end; c += lanes) {
        V left[kBlock];
#pragma GCC unroll 4
        for (int64_t p = 0; p < kBlock; ++p) left[p] = load(a + p * stride + c);
#pragma GCC unroll 4
        for (int64_t q = 0; q < kRight; ++q) {
          const V right = load(b + q * stride + c);
#pragma GCC unroll 4
          for (int64_t p = 0; p < kBlock; ++p) sums[p * kRight + q] = fmadd(left[p], right, sums[p * kRight + q]);
        }
      }
    }
    add_lane_sums(sums, out);
  }
}

// Adds sums of some tiles to others, and begins again.
RK_INLINE void move_sums(double* fresh, int64_t count, double* sums) {
  for (int64_t k = 0; k < count; ++k) sums[k] += fresh[k];
  memset(fresh, 0, sizeof(double) * static_cast<size_t>(count));
}

// ---- centring ------------------------------------------------------------------------------------------

constexpr int64_t kStrip = 64;  // columns centred at a time: of 64 rows they stay in the first-level cache
// From 25 rows on so many of them give the centre for float32 products: their median takes 5 cycles a column, that of
// 64 rows 50, of 128 rows 130.
constexpr int64_t kCentreRows = 16;

// What is centred, and on what.
struct Centre {
  const Rows& rows;
  int64_t lone;   // the row that is the centre; -1: the median is
  int64_t apart;  // every so many rows one has a say in the median; 1: all have
  double scale;
  bool origin;
  Window window;
};

// A thread's part in it.
template <class S>
class Centring {
 public:
  using C = ComputeOf<S>;
  explicit Centring(const Centre& centre) : centre_(centre), rows_(centre.rows) {}

  void lay(Layout& at) {
    at(buffer_, rows_.n * kStrip);
    at(src_, rows_.n);
    at(chosen_, rows_.n);
    at(network_, select_scratch<S>(centre_.window));
    at(middle_, kStrip);
    at(seen_, rows_.n);
    at(bad_, rows_.n);
  }
  void start() {
    memset(bad_, 0, static_cast<size_t>(rows_.n));
    memset(network_, 0, sizeof(C) * static_cast<size_t>(select_scratch<S>(centre_.window)));
  }
  const uint8_t* bad() const { return bad_; }

  // Writes columns of the rows minus the lower median to x, in rows of kRowBytes filled up with zeros to whole
  // vectors. The place of a row in which some of them hold a NaN or Inf is all zeros, and bad[row] is set.
  template <class P>
  void run(const Tile& tile, P* x) {
    for (int64_t begin = 0; begin < tile.columns; begin += kStrip) {
      const Tile strip{tile.segment, tile.first + begin, min64(kStrip, tile.columns - begin)};
      const int64_t padded = round_up(strip.columns, kStored<S>);
      read_tile<S>(rows_, strip, kStrip, buffer_, src_);
      find_middle(padded);
      bool careful = false;
      for (int64_t i = 0; i < rows_.n; ++i) careful |= seen_[i] != 0;
      if (careful) {
        for (int64_t i = 0; i < rows_.n; ++i) bad_[i] |= seen_[i];
        for (int64_t j = 0; j < padded; ++j)  // a median that is no number centres nothing
          if (middle_[j] - middle_[j] != 0) middle_[j] = 0;
      }
      subtract(padded, x + begin);
    }
  }

 private:
  // The centre, and which rows hold a NaN or Inf.
  void find_middle(int64_t padded) {
    memset(seen_, 0, static_cast<size_t>(rows_.n));
    if (centre_.lone >= 0) {
      widen_run(src_[centre_.lone], padded, middle_);
    } else {
      Ahead nothing;
      for (int64_t i = 0; i < centre_.window.n; ++i) chosen_[i] = src_[i * centre_.apart];
      select_tile(centre_.window, chosen_, padded, network_, middle_, seen_, nothing);
    }
    if (centre_.lone >= 0 || centre_.apart > 1)
      for (int64_t i = 0; i < rows_.n; ++i) seen_[i] = !is_finite_run(src_[i], padded);
  }
  void subtract(int64_t padded, float* x) const {
    constexpr int64_t lanes = Simd<float>::lanes, stride = kRowBytes / 4;
    float minus[kStrip];  // the centre's share: products with a power of two are exact
    const F32 factor = splat<F32>(static_cast<float>(centre_.scale));
    for (int64_t j = 0; j < padded; j += lanes) store(minus + j, load_single(middle_ + j) * -factor);
    for (int64_t i = 0; i < rows_.n; ++i)
      if (seen_[i])
        memset(x + i * stride, 0, sizeof(float) * static_cast<size_t>(padded));
      else
        for (int64_t j = 0; j < padded; j += lanes)
          store(x + i * stride + j, fmadd(load_single(src_[i] + j), factor, load(minus + j)));
    if (centre_.origin) memcpy(x + rows_.n * stride, minus, sizeof(float) * static_cast<size_t>(padded));
  }
  void subtract(int64_t padded, double* x) const {
    constexpr int64_t stride = kRowBytes / 8;
    double minus[kStrip];
    const F64 factor = splat<F64>(centre_.scale);
    for (int64_t j = 0; j < padded; j += kDoubles) store(minus + j, load_double(middle_ + j) * -factor);
    for (int64_t i = 0; i < rows_.n; ++i)
      if (seen_[i])
        memset(x + i * stride, 0, sizeof(double) * static_cast<size_t>(padded));
      else
        for (int64_t j = 0; j < padded; j += kDoubles)
          store(x + i * stride + j, fmadd(load_double(src_[i] + j), factor, load(minus + j)));
    if (centre_.origin) memcpy(x + rows_.n * stride, minus, sizeof(double) * static_cast<size_t>(padded));
  }

  const Centre& centre_;
  const Rows& rows_;
  S* buffer_ = nullptr;
  C *network_ = nullptr, *middle_ = nullptr;
  const S **src_ = nullptr, **chosen_ = nullptr;
  uint8_t *seen_ = nullptr, *bad_ = nullptr;
};

// ---- gram ----------------------------------------------------------------------------------------------

// Products in type P: float64, or float32.
template <class S, class P>
struct Call {
  const Rows& rows;
  const int64_t* multiplicities;
  const bool origin;
  const double scale;
  const int64_t lines;
  const int64_t n = rows.n, m = n + (origin ? 1 : 0), blocks = (m + kBlock - 1) / kBlock;
  const Triangle triangle{blocks, (lines + kBlock - 1) / kBlock};
  const bool shared = triangle.size() > kTaskCells;  // one Gram
  Centre centre = centre_of();
  const Grid grid = grid_of();
  const int64_t n_grams = shared ? 1 : grid.n_tasks;
  Workspace space;
  double* grams = nullptr;
  uint8_t* bad = nullptr;

  Call(const Rows& rows, const int64_t* multiplicities, bool origin, double scale, int64_t lines)
      : rows(rows), multiplicities(multiplicities), origin(origin), scale(scale), lines(lines) {}

  bool prepare() {  // false: out of memory
    const auto lay = [&](Layout& at) {
      at(grams, n_grams * triangle.size());
      at(bad, m);
    };
    if ((centre.lone < 0 && !centre.window.prepare()) || !space.allocate(lay)) return false;
    memset(grams, 0, sizeof(double) * static_cast<size_t>(n_grams * triangle.size()));
    memset(bad, 0, static_cast<size_t>(m));
    return true;
  }
  void add_up(double* out) const {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j <= i && j < lines; ++j) {
        double sum = 0;
        for (int64_t g = 0; g < n_grams; ++g) sum += grams[g * triangle.size() + triangle.cell_at(i, j)];
        if (bad[i] || bad[j]) sum = __builtin_nan("");
        out[j * m + i] = sum;
        if (i < lines) out[i * m + j] = sum;
      }
  }

 private:
  Centre centre_of() const {
    int64_t cells = multiplicities ? 0 : n;
    if (multiplicities)
      for (int64_t i = 0; i < n; ++i) cells += multiplicities[i];
    const bool sparse = sizeof(P) == 4 && n > kCentreRows * 3 / 2 && !multiplicities;
    const int64_t apart = sparse ? (n + kCentreRows - 1) / kCentreRows : 1;
    const int64_t chosen = (n + apart - 1) / apart, middle = ((sparse ? chosen : cells) - 1) / 2;
    return {rows, lone_row(multiplicities, n), apart, scale, origin, {chosen, middle, middle + 1, multiplicities}};
  }
  // Tasks of whole tiles; where the Gram is shared, one task after another is a tile that all threads work on.
  Grid grid_of() const {
    const int64_t tile = n <= 32 ? kTile<P> / 2 : n > kTaskRows && !shared ? kStrip : kTile<P>;
    const int64_t per_task = (rows.columns() + kTaskGrams - 1) / kTaskGrams;
    return make_grid(rows, shared ? tile : max64(round_up(per_task, tile), tile), tile, 1);
  }
};

// Squares of float64 rows that are subnormal vanish, unless they are scaled up; float32 sums are good to more anyway.
// But not where float16 is widened by products with subnormal numbers.
template <class S, class P>
bool are_flushed(double scale) {
#if defined(__F16C__)
  constexpr bool widened_by_products = false;
#else
  constexpr bool widened_by_products = std::is_same<S, Half>::value;
#endif
  return sizeof(P) == 4 ? !widened_by_products : sizeof(S) == 8 && scale <= 1;
}

// A tile that is centred, and the sums of some tiles.
template <class P>
struct Products {
  P* x = nullptr;
  double* fresh = nullptr;

  void lay(Layout& at, int64_t blocks, const Triangle& triangle) {
    at(x, blocks * kBlock * kRowBytes / static_cast<int64_t>(sizeof(P)));
    at(fresh, triangle.size());
  }
  void start(int64_t blocks, const Triangle& triangle) {
    memset(x, 0, static_cast<size_t>(blocks * kBlock * kRowBytes));  // rows that only fill up stay zeros
    memset(fresh, 0, sizeof(double) * static_cast<size_t>(triangle.size()));
  }
};

// Of tasks that have Grams of their own.
template <class S, class P>
class Worker : public Steps {
 public:
  explicit Worker(const Call<S, P>& call)
      : call_(call), floats_(are_flushed<S, P>(call.scale)), centring_(call.centre) {}

  void lay(Layout& at) {
    centring_.lay(at);
    products_.lay(at, call_.blocks, call_.triangle);
  }
  void start() {
    centring_.start();
    products_.start(call_.blocks, call_.triangle);
  }
  void begin(int64_t task) {
    mine_ = call_.grams + task * call_.triangle.size();
    tiles_ = 0;  // bits depend on the columns of a task alone
  }
  void run(const Tile& tile) {
    constexpr int64_t together = kBetweenFetches * Simd<P>::lanes;
    const int64_t padded = round_up(tile.columns, kStored<S>), size = call_.triangle.size();
    centring_.run(tile, products_.x);
    const int64_t steps = size / kCells * (kBlock / kRight) * (round_up(padded, together) / together);
    Ahead ahead = ahead_of<S>(call_.rows, tile, steps);
    for (int64_t i = 0; i < call_.blocks; ++i)
      add_products(products_.x, call_.triangle, i, padded, products_.fresh, ahead);
    if (++tiles_ % kFreshTiles == 0) move_sums(products_.fresh, size, mine_);
  }
  void end(int64_t) { move_sums(products_.fresh, call_.triangle.size(), mine_); }
  void finish() { mark(call_.bad, centring_.bad(), call_.n); }

 private:
  const Call<S, P>& call_;
  const FlushedFloats floats_;
  Centring<S> centring_;
  Products<P> products_;
  double* mine_ = nullptr;
  int64_t tiles_ = 0;
};

// Where the Gram is shared: the threads centre a tile's parts, then share out the blocks of the one Gram. Each entry
// grows in column order whoever adds to it, so bits do not depend on the number of threads.
template <class S, class P>
bool walk_together(const Call<S, P>& call, int threads) {
  const Triangle& triangle = call.triangle;
  Workspace space, common;
  Centring<S> any(call.centre);
  Products<P> products;
  if (!space.allocate(threads, [&](Layout& at) { any.lay(at); }) ||
      !common.allocate([&](Layout& at) { products.lay(at, call.blocks, triangle); }))
    return false;
  products.start(call.blocks, triangle);
  in_threads(threads, [&](const Member& member) {
    const FlushedFloats floats(are_flushed<S, P>(call.scale));
    Centring<S> centring(call.centre);
    space.place(member.thread, [&](Layout& at) { centring.lay(at); });
    centring.start();
    Ahead nothing;
    int64_t tiles = 0;
    for (int64_t task = 0; task < call.grid.n_tasks; ++task)
      for_tiles(call.rows, call.grid, task, [&](const Tile& tile) {
        member.share((tile.columns + kStrip - 1) / kStrip, [&](int64_t strip) {
          const int64_t j = strip * kStrip;
          centring.run(Tile{tile.segment, tile.first + j, min64(kStrip, tile.columns - j)}, products.x + j);
        });
        const bool full = ++tiles % kFreshTiles == 0;
        member.share(call.blocks, [&](int64_t i) {  // the last, which have most products, first
          const int64_t block = call.blocks - 1 - i, at = triangle.block_at(block, 0);
          add_products(products.x, triangle, block, round_up(tile.columns, kStored<S>), products.fresh, nothing);
          if (full) move_sums(products.fresh + at, triangle.block_at(block + 1, 0) - at, call.grams + at);
        });
      });
    mark(call.bad, centring.bad(), call.n);
  });
  move_sums(products.fresh, triangle.size(), call.grams);
  return true;
}

template <class S, class P>
Status gram_of(const Rows& rows, const int64_t* multiplicities, bool origin, double scale, int64_t lines, double* out,
               int threads) {
  Call<S, P> call(rows, multiplicities, origin, scale, lines);
  if (!call.prepare()) return Status::out_of_memory;
  const bool done = call.shared ? walk_together(call, threads) : walk<Worker<S, P>>(call, threads);
  if (!done) return Status::out_of_memory;
  call.add_up(out);
  return Status::ok;
}

}  // namespace

Status gram(const Rows& rows, const int64_t* multiplicities, bool origin, double scale, bool single, int64_t lines,
            double* out, int threads) {
  return by_dtype(rows.dtype, [&](auto s) {
    using S = decltype(s);
    if constexpr (sizeof(S) < 8)
      if (single) return gram_of<S, float>(rows, multiplicities, origin, scale, lines, out, threads);
    return gram_of<S, double>(rows, multiplicities, origin, scale, lines, out, threads);
  });
}

}  // namespace RK_ISA
}  // namespace rk
