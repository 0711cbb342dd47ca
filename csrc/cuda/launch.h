// Launches that several primitives share.
#pragma once
#include "host.h"
#include "sums.cuh"

namespace rk {
namespace cuda {

// Queues the column-wise lower median of the rows, which stand for so many equal ones where multiplicities are given.
void lower_median_of(const Rows& rows, const int64_t* multiplicities, void* const* out, Queue& queue);  // select.cu

// out[i] = the sum of what the blocks left for i.
inline void add_partials(Queue& queue, const double* partials, int64_t blocks, int64_t count, double* out) {
  queue.launch("add_blocks", &add_blocks<double>, dim3(static_cast<unsigned>(tiles_of(count, kSumThreads))),
               dim3(kSumThreads), 0, partials, blocks, count, out);
}

// Rows of weights (k, n) as the kernels read them.
class UploadedWeights {
 public:
  UploadedWeights(Workspace& space, const double* weights, int64_t k, int64_t n, int64_t sums = kGroupedSums)
      : groups_((k + sums - 1) / sums), k_(k) {
    std::vector<int64_t> start(static_cast<std::size_t>(groups_) + 1), row;
    std::vector<double> factor;
    std::vector<std::uint8_t> averaging(static_cast<std::size_t>(k));
    for (int64_t g = 0; g < groups_; ++g) {
      for (int64_t i = 0; i < n; ++i) {
        const auto weight = [&](int64_t r) { return g * sums + r < k ? weights[(g * sums + r) * n + i] : 0.0; };
        bool any = false;
        for (int64_t r = 0; r < sums; ++r) any |= weight(r) != 0;
        if (!any) continue;
        row.push_back(i);
        for (int64_t r = 0; r < sums; ++r) factor.push_back(weight(r));
      }
      start[static_cast<std::size_t>(g) + 1] = static_cast<int64_t>(row.size());
    }
    for (int64_t r = 0; r < k; ++r) {
      double total = 0;
      for (int64_t i = 0; i < n; ++i) total += weights[r * n + i] < 0 ? -weights[r * n + i] : weights[r * n + i];
      averaging[static_cast<std::size_t>(r)] = total <= 1 + 0x1p-40;
    }
    start_ = space.upload(start.data(), groups_ + 1);
    row_ = space.upload(row.data(), static_cast<int64_t>(row.size()));
    factor_ = space.upload(factor.data(), static_cast<int64_t>(factor.size()));
    averaging_ = space.upload(averaging.data(), k);
  }
  int64_t groups() const { return groups_; }
  Weights on_device(const Workspace& space) const {
    return {space[start_], space[row_], space[factor_], space[averaging_], k_};
  }

 private:
  int64_t groups_, k_;
  Part<int64_t> start_, row_;
  Part<double> factor_;
  Part<std::uint8_t> averaging_;
};

// Several weighted sums of some columns of a segment, in groups.
template <class S, class O>
void sum_run(Queue& queue, const UploadedRows& rows, int64_t segment, int64_t first, int64_t columns,
             const Weights& weights, void* const* out, bool vectorised) {
  const Table table = rows.run(segment, first, columns, kSumColumns<S, kGroupedSums> * kSumThreads);
  const auto groups = static_cast<unsigned>((weights.k + kGroupedSums - 1) / kGroupedSums);
  queue.launch("weighted_sums", &weighted_sums<S, O, kGroupedSums>, dim3(grid_for(table.n_tiles), groups),
               dim3(kSumThreads), 0, table, weights, out, vectorised);
}

}  // namespace cuda
}  // namespace rk
