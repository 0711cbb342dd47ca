// Sorting networks: Batcher's odd-even merge sort (Knuth, TAOCP 5.3.4) for any number of wires,
// and the part of it that a window of ranks needs. Free of std headers so that host and device share it.
#pragma once

namespace rk {

struct Comparator {
  unsigned short low, high;  // after it, wire `low` holds the smaller value
};

// Merges the sorted wires [first, first + size) of which every `stride`-th takes part; those from n on are left out.
template <class Emit>
constexpr void odd_even_merge(int first, int size, int stride, int n, Emit& emit) {
  const int step = 2 * stride;
  if (step < size) {
    odd_even_merge(first, size, step, n, emit);
    odd_even_merge(first + stride, size, step, n, emit);
    for (int i = first + stride; i + stride < first + size && i + stride < n; i += step) emit(i, i + stride);
  } else if (first + stride < n) {
    emit(first, first + stride);
  }
}

template <class Emit>
constexpr void odd_even_merge_sort(int first, int size, int n, Emit& emit) {
  if (size < 2 || first >= n) return;
  odd_even_merge_sort(first, size / 2, n, emit);
  odd_even_merge_sort(first + size / 2, size / 2, n, emit);
  odd_even_merge(first, size, 1, n, emit);
}

// Calls emit(low, high) for each comparator of the network over n wires, in order: one half after the other, so that
// the wires in use at a time are few and stay in registers (at 32 wires and 16 registers a third of the spills of
// the order by levels).
template <class Emit>
constexpr void sorting_network(int n, Emit&& emit) {
  int size = 1;
  while (size < n) size *= 2;
  odd_even_merge_sort(0, size, n, emit);
}

constexpr int sorting_network_size(int n) {
  int count = 0;
  sorting_network(n, [&](int, int) { ++count; });
  return count;
}

// Keeps, in order, the comparators whose outputs can reach the ranks [lo, hi); returns how many.
// `needed` is scratch of one flag a wire.
constexpr int prune(Comparator* net, int count, bool* needed, int n, int lo, int hi) {
  for (int i = 0; i < n; ++i) needed[i] = lo <= i && i < hi;
  int first = count;
  for (int c = count - 1; c >= 0; --c) {
    if (!needed[net[c].low] && !needed[net[c].high]) continue;
    needed[net[c].low] = needed[net[c].high] = true;
    net[--first] = net[c];
  }
  for (int c = first; c < count; ++c) net[c - first] = net[c];
  return count - first;
}

// The pruned network over N wires as a constant, for unrolled code.
template <int N>
struct FixedNetwork {
  Comparator net[N < 2 ? 1 : sorting_network_size(N)]{};
  int count = 0;

  constexpr FixedNetwork(int lo, int hi) {
    sorting_network(N, [&](int a, int b) {
      net[count].low = static_cast<unsigned short>(a);
      net[count].high = static_cast<unsigned short>(b);
      ++count;
    });
    bool needed[N]{};
    count = prune(net, count, needed, N, lo, hi);
  }
};

}  // namespace rk
