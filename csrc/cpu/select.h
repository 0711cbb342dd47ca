// Selection on one tile: out[j] = mean of the cells [lo, hi) of the sorted values of column j, or of the values nearest
// to it.
#pragma once
#include <stdlib.h>

#include "tiles.h"

namespace rk {
namespace RK_ISA {

// What one selection needs besides the tile; built once per call, read by all threads.
struct Window {
  int64_t n, lo, hi;
  const int64_t* multiplicities = nullptr;
  int64_t nearest = 0;      // 0: the mean of the window itself
  bool narrow = false;      // results go on to be rounded to 16 bits
  int64_t total = 0;        // the sum of the multiplicities
  void* network = nullptr;  // owned; where all rows are sorted, and there are too many to unroll
  int64_t comparators = 0;
  // With multiplicities and at most two cells: them and the window's first and last cell in units of their greatest
  // common divisor, which often makes them small. Owned; null for wider windows.
  int64_t *reduced = nullptr, reduced_total = 0, first_cell = 0, last_cell = 0;

  bool prepare();  // false: out of memory
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;
  ~Window() {
    free(network);
    free(reduced);
  }
};

// Scratch values (of the compute type) that select_tile needs for rows of S; zeros before the first tile of a thread.
template <class S>
int64_t select_scratch(const Window& window);

// src: n pointers to `columns` values, a multiple of the vector; out in the compute type.
// nonfinite[i] becomes 1 where row i holds a NaN or Inf. Steps ahead once a vector.
template <class S>
void select_tile(const Window&, const S* const* src, int64_t columns, ComputeOf<S>* scratch, ComputeOf<S>* out,
                 uint8_t* nonfinite, Ahead& ahead);

}  // namespace RK_ISA
}  // namespace rk
