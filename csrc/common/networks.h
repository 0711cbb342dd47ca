// Sorting networks: Batcher's merge exchange (Knuth, TAOCP 5.2.2, algorithm M) for any number of wires,
// and the part of it that a window of ranks needs. Free of std headers so that host and device share it.
#pragma once

namespace rk {

struct Comparator {
  unsigned short low, high;  // after it, wire `low` holds the smaller value
};

// Calls emit(low, high) for each comparator of the network over n wires, in order.
template <class Emit>
constexpr void merge_exchange(int n, Emit&& emit) {
  if (n < 2) return;
  int top = 1;
  while (top * 2 < n) top *= 2;
  for (int p = top; p > 0; p /= 2) {
    int q = top, r = 0, d = p;
    while (true) {
      for (int i = 0; i < n - d; ++i)
        if ((i & p) == r) emit(i, i + d);
      if (q == p) break;
      d = q - p;
      q /= 2;
      r = p;
    }
  }
}

constexpr int merge_exchange_size(int n) {
  int count = 0;
  merge_exchange(n, [&](int, int) { ++count; });
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
  Comparator net[N < 2 ? 1 : merge_exchange_size(N)]{};
  int count = 0;

  constexpr FixedNetwork(int lo, int hi) {
    merge_exchange(N, [&](int a, int b) {
      net[count].low = static_cast<unsigned short>(a);
      net[count].high = static_cast<unsigned short>(b);
      ++count;
    });
    bool needed[N]{};
    count = prune(net, count, needed, N, lo, hi);
  }
};

}  // namespace rk
