// The contract of the four primitives on raw pointers: what robustkern/contract/primitives.py says in Python.
// Nothing outside csrc/bindings knows Python; nothing here knows an instruction set.
#pragma once
#include <cstdint>

namespace rk {

enum class DType : std::int32_t { float16 = 0, bfloat16 = 1, float32 = 2, float64 = 3 };

enum class Status : std::int32_t { ok = 0, out_of_memory = 1 };

// n rows cut into the same segments (the leaves of a pytree; one segment for a plain array).
// data[s * n + i] points at row i's part of segment s: contiguous, any alignment, never written.
struct Rows {
  const void* const* data;
  const std::int64_t* offsets;  // (n_segments + 1) running column count, offsets[0] == 0
  std::int64_t n_segments;
  std::int64_t n;
  DType dtype;

  std::int64_t columns() const { return offsets[n_segments]; }
};

// select_columns: the mean of the cells [lo, hi) of each column's sorted values.
// Without multiplicities a row is one cell; with them row i stands for multiplicities[i] equal cells.
// With a mix, the selection is over the rows mix @ rows / mix_divisors (never stored beyond one column tile).
// With sq_distances, the squared distance of every row of measure @ rows / measure_divisors (of the rows themselves
// where measure is null) to the selected row as it is stored, summed in float64.
// NaN ranks above +inf; a window that reaches a NaN gives NaN.
// With nearest, the window (then without multiplicities) is a centre, and the result the mean of so many values nearest
// to it, by exact distances: to the middle of one or two cells, to the mean of more as a sum of float64 tells it.
struct Select {
  std::int64_t lo, hi;
  std::int64_t nearest;                // 0: the mean of the window itself
  const std::int64_t* multiplicities;  // (selected rows) or null; their sum is below 2^62
  const double* mix;                   // (n_mixed, n) or null; entries equal to 0 are never multiplied
  const double* mix_divisors;          // (n_mixed) or null: all 1
  std::int64_t n_mixed;
  const double* measure;  // (n_measured, n) or null; may be, as its divisors, the same pointer as mix
  const double* measure_divisors;
  std::int64_t n_measured;
  double scale;             // power of two by which differences are multiplied before squaring
  void* const* out;         // (n_segments) in the rows' dtype, or null: only distances are wanted
  double* sq_distances;     // (n_measured, or n) or null
  std::uint8_t* nonfinite;  // (n) set to 1 for each row in which a NaN or Inf was seen
};

// What update_momenta does to each row: momentum = gradient_scales[i] * gradient + keep * (momentum - correction), the
// correction times correction_scales[i]. Where keep is 0, momenta and corrections are never read.
struct Momenta {
  const void* const* corrections;   // like the gradients' data, or null: no correction
  double keep;                      // how much of the old momentum stays
  const double* gradient_scales;    // (n)
  const double* correction_scales;  // (n), or null without corrections
};

// The row that alone counts for a median, -1 where several do.
inline std::int64_t lone_row(const std::int64_t* multiplicities, std::int64_t n) {
  std::int64_t found = -1;
  for (std::int64_t i = 0; multiplicities && i < n; ++i) {
    if (multiplicities[i] == 0) continue;
    if (found >= 0) return -1;
    found = i;
  }
  return found;
}

// Rows with the same segments and dtype as others, which are measured from them; null: the origin, and count is 1.
struct Centres {
  const void* const* data;
  std::int64_t count;
};

constexpr int kDigestWords = 256;

struct Kernels {
  const char* isa;
  Status (*select_columns)(const Rows&, const Select&, int threads);
  // (lines, m) inner products, m = n + origin, of the rows minus their column-wise lower median, times
  // scale; the origin is one more row of zeros. Products and sums in float64. Rows that hold a NaN or
  // Inf get NaN in their row and column of the result. Fewer lines than m: of the first rows.
  // multiplicities (n) or null: as in Select, for the median.
  // single: products of 16 and 32-bit rows may be summed in float32, 32 terms at a time, and the centre be the median
  // of every so many rows; an entry's error is then at most 2^-24 * 40 * |x_i| |x_j| of the rows centred so, where
  // none counts as shorter than 2^-50 sqrt(columns), and infinite on the diagonal where squares overflow.
  Status (*gram)(const Rows&, const std::int64_t* multiplicities, bool origin, double scale, bool single,
                 std::int64_t lines, double* out, int threads);
  // (centres, n) squared distances, in doubled float64: correct to the last bit but for rounding of about 1e-30; or,
  // not exact, in float64. A NaN or Inf in the row or the centre gives NaN or Inf.
  Status (*row_sq_distances)(const Rows&, const Centres&, double scale, bool exact, double* out, int threads);
  // (n) squared distances to the rows' average by shares (n) that add up to 1, which is not rounded: in float64, of
  // differences from one of the rows that have a share. Rows of share 0 are not in the average.
  Status (*sq_distances_to_average)(const Rows&, const double* shares, double* out, int threads);
  // out[s * k + j] = segment s of row j of weights (k, n) @ rows / divisors (k, or null: all 1): sums in float64, of
  // float64 rows with what their roundings lose, divided and rounded once. Rows of weight 0 are never read.
  Status (*weighted_row_sum)(const Rows&, const double* weights, const double* divisors, std::int64_t k,
                             void* const* out, int threads);
  // For training, no primitive: each value of the n momenta (same segments and dtype, contiguous, no overlap with
  // anything), in place, computed in float64. Three reads and a write of the data.
  Status (*update_momenta)(const Rows& gradients, const Momenta&, void* const* momenta, int threads);
  // No primitive, but what their speed is measured against: the sum modulo 2^64 of the rows' segments read as
  // little 64-bit words, the last of a segment filled with zero bytes, in one stream per row and thread.
  std::uint64_t (*read_pass)(const Rows&, int threads);
  // No primitive, for files: a hash of bytes below 2^61 - 1, under a secret key of kDigestWords words and a point below
  // 2^61 - 1: a polynomial at the point over NH of the blocks of kDigestWords little words, the last filled with zero
  // bytes, that begins with the number of bytes. Two pieces that differ have equal hashes with a chance of 2^-32.
  std::uint64_t (*digest)(const void* data, std::int64_t bytes, const std::uint32_t* key, std::uint64_t point);
};

// The table for an instruction set by name, or null where it is not built or not supported here.
const Kernels* kernels_for(const char* isa);
// Names that kernels_for knows on this machine, best first, null-terminated.
const char* const* supported_isas();

// How many threads a call over this many bytes may use: `requested` (0: what OpenMP allows), fewer
// for small inputs, one in a child forked after OpenMP was in use (its pool did not survive the fork).
int usable_threads(int requested, std::int64_t bytes);
int max_threads();

}  // namespace rk
