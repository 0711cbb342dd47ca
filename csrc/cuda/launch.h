// Launches that several primitives share.
#pragma once
#include "host.h"
#include "select.cuh"
#include "sums.cuh"

namespace rk {
namespace cuda {

// Queues the column-wise lower median of the rows, which stand for so many equal ones where multiplicities are given.
void lower_median_of(const Rows& rows, const int64_t* multiplicities, void* const* out, Queue& queue);  // select.cu

// Selections among mixtures in one read of the rows, and whether rows, device and what is wanted permit it. mixed.cu
bool mixes_by_network(const Rows& rows, const Select& select, int device);
void select_mixed_by_network(const Rows& rows, const Select& select, Queue& queue);

constexpr int64_t kNetworkRows = 64;

inline bool is_median(const Select& select, int64_t n) {
  return !select.nearest && !select.multiplicities && select.lo >= (n - 1) / 2 && select.hi <= n / 2 + 1;
}

inline Selection selection_of(const Select& select) {
  Selection args{};
  args.lo = select.lo;
  args.hi = select.hi;
  args.nearest = select.nearest;
  args.scale = select.scale;
  return args;
}

// out[i] = the sum of what the blocks left for i.
inline void add_partials(Queue& queue, const double* partials, int64_t blocks, int64_t count, double* out) {
  queue.launch("add_blocks", &add_blocks<double>, dim3(static_cast<unsigned>(tiles_of(count, kWarp))),
               dim3(kAddThreads), 0, partials, blocks, count, out);
}

// Rows of weights (k, n) and their divisors (k, or null: all 1) as the kernels read them, up to so many in a group; of
// float64 rows only sums that share a row.
class UploadedWeights {
 public:
  UploadedWeights(Workspace& space, const double* weights, const double* divisors, int64_t k, int64_t n, DType dtype,
                  int64_t sums = kGroupedSums)
      : k_(k) {
    std::vector<int64_t> first{0}, base, start{0}, row;
    std::vector<double> factor;
    std::vector<Average> average;
    for (int64_t r = 0; r < k; ++r) average.push_back(average_of(weights + r * n, n, divisors ? divisors[r] : 1));
    for (int64_t r = 0; r < k; r = first.back()) {
      int64_t count = lesser(sums, k - r), shared = n;
      if (dtype == DType::float64)
        while ((shared = shared_row(weights, n, r, count)) == n && count > 1) --count;
      first.push_back(r + count);
      base.push_back(shared < n ? shared : -1);
      for (int64_t i = 0; i < n; ++i) {
        const auto weight = [&](int64_t p) {
          return p < count ? weights[(r + p) * n + i] * average[static_cast<std::size_t>(r + p)].lift : 0.0;
        };
        bool any = false;
        for (int64_t p = 0; p < sums; ++p) any |= weight(p) != 0;
        if (!any) continue;
        row.push_back(i);
        for (int64_t p = 0; p < sums; ++p) factor.push_back(weight(p));
      }
      start.push_back(static_cast<int64_t>(row.size()));
    }
    groups_ = static_cast<int64_t>(base.size());
    first_ = space.upload(first.data(), groups_ + 1);
    base_ = space.upload(base.data(), groups_);
    start_ = space.upload(start.data(), groups_ + 1);
    row_ = space.upload(row.data(), static_cast<int64_t>(row.size()));
    factor_ = space.upload(factor.data(), static_cast<int64_t>(factor.size()));
    average_ = space.upload(average.data(), k);
  }
  Weights on_device(const Workspace& space) const {
    return {space[first_], space[base_], space[start_], space[row_], space[factor_], space[average_], groups_, k_};
  }

 private:
  int64_t groups_ = 0, k_;
  Part<int64_t> first_, base_, start_, row_;
  Part<double> factor_;
  Part<Average> average_;
};

// Several weighted sums of some columns of a segment, in groups.
template <class S, class O>
void sum_run(Queue& queue, const UploadedRows& rows, int64_t segment, int64_t first, int64_t columns,
             const Weights& weights, void* const* out, bool vectorised) {
  const Table table = rows.run(segment, first, columns, kSumColumns<S, kGroupedSums> * kSumThreads);
  queue.launch("weighted_sums", &weighted_sums<S, O, kGroupedSums>,
               dim3(grid_for(table.n_tiles), static_cast<unsigned>(weights.groups)), dim3(kSumThreads), 0, table,
               weights, out, vectorised);
}

}  // namespace cuda
}  // namespace rk
