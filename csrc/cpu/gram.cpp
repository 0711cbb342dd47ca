// Compiled once per instruction set: inner products of the rows, centred tile by tile on their lower median.
// Products are summed in float64, or, where the caller allows it, in float32 over short runs of columns.
#include <type_traits>

#include "select.h"

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

template <class S>
struct Scratch {  // a thread's parts of the workspace
  using C = ComputeOf<S>;
  S* buffer;
  C *network, *centre;
  const S **src, **chosen;
  uint8_t *seen, *bad;
};

template <class S>
struct Centring {
  using C = ComputeOf<S>;
  Window window;
  int64_t lone;   // the row that is the centre; -1: the median is
  int64_t apart;  // every so many rows one has a say in the median; 1: all have
  double scale;
  bool origin;

  // Writes columns of the rows minus the lower median to x, in rows of kRowBytes filled up with zeros to whole
  // vectors. The place of a row in which some of them hold a NaN or Inf is all zeros, and bad[row] is set.
  template <class P>
  void run(const Rows& rows, int64_t segment, int64_t first, int64_t columns, P* x, const Scratch<S>& at) const {
    Ahead none = ahead_of<S>(rows, segment, first, 0, 1);
    for (int64_t begin = 0; begin < columns; begin += kStrip) {
      const int64_t count = min64(kStrip, columns - begin), padded = round_up(count, kStored<S>);
      memset(at.seen, 0, static_cast<size_t>(rows.n));
      read_tile<S>(rows, segment, first + begin, count, kStrip, at.buffer, at.src);
      if (lone >= 0) {
        widen_run(at.src[lone], padded, at.centre);
      } else {
        for (int64_t i = 0; i < window.n; ++i) at.chosen[i] = at.src[i * apart];
        select_tile(window, at.chosen, padded, at.network, at.centre, at.seen, none);
      }
      bool careful = false;
      if (lone >= 0 || apart > 1)
        for (int64_t i = 0; i < rows.n; ++i) at.seen[i] = !is_finite_run(at.src[i], padded);
      for (int64_t i = 0; i < rows.n; ++i) careful |= at.seen[i] != 0;
      if (careful) {
        for (int64_t i = 0; i < rows.n; ++i) at.bad[i] |= at.seen[i];
        for (int64_t j = 0; j < padded; ++j)  // a median that is no number centres nothing
          if (at.centre[j] - at.centre[j] != 0) at.centre[j] = 0;
      }
      subtract(at, rows.n, padded, x + begin);
    }
  }

 private:
  void subtract(const Scratch<S>& at, int64_t n, int64_t padded, float* x) const {
    constexpr int64_t lanes = Simd<float>::lanes, stride = kRowBytes / 4;
    float minus[kStrip];  // the centre's share: products with a power of two are exact
    const F32 factor = splat<F32>(static_cast<float>(scale));
    for (int64_t j = 0; j < padded; j += lanes) store(minus + j, load_single(at.centre + j) * -factor);
    for (int64_t i = 0; i < n; ++i)
      if (at.seen[i])
        memset(x + i * stride, 0, sizeof(float) * static_cast<size_t>(padded));
      else
        for (int64_t j = 0; j < padded; j += lanes)
          store(x + i * stride + j, fmadd(load_single(at.src[i] + j), factor, load(minus + j)));
    if (origin) memcpy(x + n * stride, minus, sizeof(float) * static_cast<size_t>(padded));
  }
  void subtract(const Scratch<S>& at, int64_t n, int64_t padded, double* x) const {
    constexpr int64_t stride = kRowBytes / 8;
    double minus[kStrip];
    const F64 factor = splat<F64>(scale);
    for (int64_t j = 0; j < padded; j += kDoubles) store(minus + j, load_double(at.centre + j) * -factor);
    for (int64_t i = 0; i < n; ++i)
      if (at.seen[i])
        memset(x + i * stride, 0, sizeof(double) * static_cast<size_t>(padded));
      else
        for (int64_t j = 0; j < padded; j += kDoubles)
          store(x + i * stride + j, fmadd(load_double(at.src[i] + j), factor, load(minus + j)));
    if (origin) memcpy(x + n * stride, minus, sizeof(double) * static_cast<size_t>(padded));
  }
};

// ---- gram ----------------------------------------------------------------------------------------------

// Products in type P: float64, or float32.
template <class S, class P>
Status gram_of(const Rows& rows, const int64_t* multiplicities, bool origin, double scale, int64_t lines, double* out,
               int threads) {
  using C = ComputeOf<S>;
  const int64_t n = rows.n, m = n + (origin ? 1 : 0), blocks = (m + kBlock - 1) / kBlock;
  const Triangle triangle{blocks, (lines + kBlock - 1) / kBlock};
  const bool shared = triangle.size() > kTaskCells;
  const int64_t tile = n <= 32 ? kTile<P> / 2 : n > kTaskRows && !shared ? kStrip : kTile<P>;
  int64_t cells = multiplicities ? 0 : n;
  if (multiplicities)
    for (int64_t i = 0; i < n; ++i) cells += multiplicities[i];
  const bool sparse = sizeof(P) == 4 && n > kCentreRows * 3 / 2 && !multiplicities;
  const int64_t apart = sparse ? (n + kCentreRows - 1) / kCentreRows : 1;
  const int64_t chosen = (n + apart - 1) / apart, middle = ((sparse ? chosen : cells) - 1) / 2;
  const int64_t lone = lone_row(multiplicities, n);
  Centring<S> centring{{chosen, middle, middle + 1, multiplicities}, lone, apart, scale, origin};
  if (lone < 0 && !prepare_window(centring.window)) return Status::out_of_memory;

  // Tasks of whole tiles; where the Gram is shared, one task after another is a tile that all threads work on.
  const int64_t per_task = (rows.columns() + kTaskGrams - 1) / kTaskGrams;
  const Grid grid = make_grid(rows.columns(), shared ? tile : max64(round_up(per_task, tile), tile));

  Workspace space, sums;
  const int64_t at_buffer = space.reserve<S>(n * kStrip), at_src = space.reserve<const S*>(n);
  const int64_t at_chosen = space.reserve<const S*>(n);
  const int64_t at_network = space.reserve<C>(select_scratch<S>(centring.window));
  const int64_t at_centre = space.reserve<C>(kStrip);
  const int64_t at_seen = space.reserve<uint8_t>(n), at_bad = space.reserve<uint8_t>(n);
  const int64_t x_bytes = blocks * kBlock * kRowBytes, n_grams = shared ? 1 : grid.n_tasks;
  const int64_t at_x = (shared ? sums : space).reserve<char>(x_bytes);
  const int64_t at_fresh = (shared ? sums : space).reserve<double>(triangle.size());
  const int64_t at_grams = sums.reserve<double>(n_grams * triangle.size()), at_bad_rows = sums.reserve<uint8_t>(m);
  if (!space.allocate(threads) || !sums.allocate(1)) {
    release_window(centring.window);
    return Status::out_of_memory;
  }
  double* grams = sums.part<double>(0, at_grams);
  memset(grams, 0, sizeof(double) * static_cast<size_t>(n_grams * triangle.size()));
  uint8_t* bad_rows = sums.part<uint8_t>(0, at_bad_rows);
  memset(bad_rows, 0, static_cast<size_t>(m));

  Tasks tasks = tasks_of<S>(grid, rows, threads);
  // Squares of float64 rows that are subnormal vanish, unless they are scaled up; float32 sums are good to more anyway.
  // But not where float16 is widened by products with subnormal numbers.
#if defined(__F16C__)
  constexpr bool widened_by_products = false;
#else
  constexpr bool widened_by_products = std::is_same<S, Half>::value;
#endif
  const bool flushed = sizeof(P) == 4 ? !widened_by_products : sizeof(S) == 8 && scale <= 1;
  in_threads(threads, [&](const Member& member) {
    const FlushedFloats floats(flushed);
    const int thread = member.thread;
    const Scratch<S> scratch{space.part<S>(thread, at_buffer),        space.part<C>(thread, at_network),
                             space.part<C>(thread, at_centre),        space.part<const S*>(thread, at_src),
                             space.part<const S*>(thread, at_chosen), space.part<uint8_t>(thread, at_seen),
                             space.part<uint8_t>(thread, at_bad)};
    memset(scratch.bad, 0, static_cast<size_t>(n));
    memset(scratch.network, 0, sizeof(C) * static_cast<size_t>(select_scratch<S>(centring.window)));
    char* x_memory = shared ? sums.part<char>(0, at_x) : space.part<char>(thread, at_x);
    P* x = reinterpret_cast<P*>(x_memory);
    double* fresh = shared ? sums.part<double>(0, at_fresh) : space.part<double>(thread, at_fresh);
    int64_t tiles = 0;
    if (!shared || thread == 0) {
      memset(x_memory, 0, static_cast<size_t>(x_bytes));  // rows that only fill up stay zeros
      memset(fresh, 0, sizeof(double) * static_cast<size_t>(triangle.size()));
    }
    if (!shared) {
      for (int64_t task; (task = tasks.take(member.thread)) >= 0;) {
        double* mine = grams + task * triangle.size();
        for_task_pieces(rows, grid, task, [&](int64_t segment, int64_t first, int64_t count) {
          for (int64_t j = 0; j < count; j += tile) {
            const int64_t columns = min64(tile, count - j), padded = round_up(columns, kStored<S>);
            centring.run(rows, segment, first + j, columns, x, scratch);
            constexpr int64_t together = kBetweenFetches * Simd<P>::lanes;
            Ahead ahead =
                ahead_of<S>(rows, segment, first + j + columns, columns,
                            triangle.size() / kCells * (kBlock / kRight) * (round_up(padded, together) / together));
            for (int64_t i = 0; i < blocks; ++i) add_products(x, triangle, i, padded, fresh, ahead);
            if (++tiles % kFreshTiles == 0) move_sums(fresh, triangle.size(), mine);
          }
        });
        move_sums(fresh, triangle.size(), mine);
        tiles = 0;  // bits depend on the columns of a task alone
      }
    } else {
      // The threads centre a tile's parts, then share out the blocks of the one Gram. Each entry grows in column order
      // whoever adds to it, so bits do not depend on the number of threads.
      member.meet();
      for (int64_t task = 0; task < grid.n_tasks; ++task)
        for_task_pieces(rows, grid, task, [&](int64_t segment, int64_t first, int64_t count) {
          Ahead none = ahead_of<S>(rows, segment, first, 0, 1);
          member.share((count + kStrip - 1) / kStrip, [&](int64_t strip) {
            const int64_t j = strip * kStrip;
            centring.run(rows, segment, first + j, min64(kStrip, count - j), x + j, scratch);
          });
          const bool full = ++tiles % kFreshTiles == 0;
          member.share(blocks, [&](int64_t i) {  // the last, which have most products, first
            const int64_t block = blocks - 1 - i, at = triangle.block_at(block, 0);
            add_products(x, triangle, block, round_up(count, kStored<S>), fresh, none);
            if (full) move_sums(fresh + at, triangle.block_at(block + 1, 0) - at, grams + at);
          });
        });
      if (thread == 0) move_sums(fresh, triangle.size(), grams);
    }
    mark(bad_rows, scratch.bad, n);
  });
  release_window(centring.window);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j <= i && j < lines; ++j) {
      double sum = 0;
      for (int64_t g = 0; g < n_grams; ++g) sum += grams[g * triangle.size() + triangle.cell_at(i, j)];
      if (bad_rows[i] || bad_rows[j]) sum = __builtin_nan("");
      out[j * m + i] = sum;
      if (i < lines) out[i * m + j] = sum;
    }
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
