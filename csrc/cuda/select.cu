// select_columns on a GPU: which kernel a selection takes, and mixtures, run by run of columns.
#include "counting.cuh"
#include "host.h"
#include "launch.h"
#include "merging.cuh"
#include "sums.cuh"
#include "weighted.cuh"

namespace rk {
namespace cuda {
namespace {

// What every GPU of compute capability 7.5 or more lets a block that counts have, less what the kernel needs besides:
// 448 rows of float32, half as many of float64. Of more rows the values are read again and again.
constexpr std::size_t kKeptBytes = 56 << 10;
constexpr std::size_t kUnaskedBytes = 40 << 10;  // and this much, of 48 KiB in all, without being asked
// Mixtures, and rows measured as float64, are made of so many bytes of columns at a time, which stay in a GPU's cache.
constexpr int64_t kRunBytes = int64_t{1} << 24;

template <class S>
class Selector {
  using C = ComputeOf<S>;

 public:
  Selector(const Select& select, int64_t n) : select_(select), n_(n) {
    const bool median = is_median(select, n);
    if (select.multiplicities && n <= kWeightedRows)
      weighted();
    else if (select.multiplicities || n > kMergedRows)
      by_counting();
    else if (n > kNetworkRows)
      by_merging(median);
    else if (median)
      with_network<true>();
    else
      with_network<false>();
  }
  int width() const { return width_; }

  void launch(Queue& queue, Selection args, int64_t blocks) const {
    args.low_pads = low_pads_;
    if (shared_bytes_ > kUnaskedBytes) queue.allow_shared_bytes(name_, kernel_, kKeptBytes);
    queue.launch(name_, kernel_, dim3(grid_for(blocks)), dim3(static_cast<unsigned>(threads_)), shared_bytes_, args);
  }

 private:
  template <bool kMedian>
  void with_network() {
    by_size(std::conditional_t<kMedian, MedianSizes, SortSizes>{}, n_, [&](auto size) {
      constexpr int N = decltype(size)::value;
      using Shape = NetworkShape<S, N, kMedian>;
      kernel_ = &select_by_network<S, N, kMedian>;
      threads_ = Shape::kThreads;
      width_ = Shape::kWidth;
      low_pads_ = kMedian ? median_pads(N, n_) : 0;
    });
    name_ = "select_by_network";
  }
  void by_merging(bool median) {
    by_size(std::integer_sequence<int, 4, 8, 16, 32>{}, (n_ + kRunRows - 1) / kRunRows, [&](auto size) {
      constexpr int kRuns = decltype(size)::value;
      using Shape = MergeShape<S, kRuns>;
      kernel_ = median ? &select_by_merging<S, kRuns, true> : &select_by_merging<S, kRuns, false>;
      threads_ = Shape::kThreads;
      width_ = Shape::kColumns;
      low_pads_ = median ? median_pads(kRuns * kRunRows, n_) : 0;
    });
    name_ = "select_by_merging";
  }
  void weighted() {
    by_size(SortSizes{}, n_, [&](auto size) {
      constexpr int N = decltype(size)::value;
      if constexpr (N <= kWeightedRows) {
        kernel_ = &select_weighted<S, N>;
        threads_ = WeightedShape<S, N>::kThreads;
        width_ = WeightedShape<S, N>::kWidth;
      }
    });
    name_ = "select_weighted";
  }
  void by_counting() {
    const int64_t warps = (n_ + kRowsOfWarp - 1) / kRowsOfWarp;
    threads_ = kWarp * static_cast<int>(warps < kMaxWarps ? warps : kMaxWarps);
    width_ = kCountedColumns;
    shared_bytes_ = static_cast<std::size_t>(n_) * kCountedColumns * sizeof(C);
    const bool keeps = select_.multiplicities && shared_bytes_ <= kKeptBytes;  // without them rows are too many
    if (!keeps) shared_bytes_ = 0;
    kernel_ = keeps                    ? &select_by_counting<S, true, true>
              : select_.multiplicities ? &select_by_counting<S, true, false>
                                       : &select_by_counting<S, false, false>;
    name_ = "select_by_counting";
  }

  const Select& select_;
  int64_t n_;
  const char* name_ = nullptr;
  void (*kernel_)(Selection) = nullptr;
  int threads_ = 0, width_ = 0, low_pads_ = 0;
  std::size_t shared_bytes_ = 0;
};

// Flags and distances, side by side, as they come back from the device.
struct Found {
  Part<unsigned> flags;
  Part<double> distances;
  int64_t n, n_measured;

  Found(Workspace& space, int64_t rows, int64_t measured)
      : flags(space.zeros<unsigned>(rows)), distances(space.zeros<double>(measured)), n(rows), n_measured(measured) {}

  void download(Queue& queue, const Workspace& space, const Select& select, const char* name) const {
    const char* begin = reinterpret_cast<const char*>(space[flags]);
    const auto bytes = static_cast<std::size_t>(reinterpret_cast<const char*>(space[distances] + n_measured) - begin);
    std::vector<char> host(bytes);
    queue.download(host.data(), begin, bytes, name);
    for (int64_t i = 0; i < n; ++i) {
      unsigned flag;
      std::memcpy(&flag, host.data() + i * static_cast<int64_t>(sizeof(flag)), sizeof(flag));
      select.nonfinite[i] |= flag != 0;
    }
    if (n_measured)
      std::memcpy(select.sq_distances, host.data() + (bytes - static_cast<std::size_t>(n_measured) * sizeof(double)),
                  static_cast<std::size_t>(n_measured) * sizeof(double));
  }
};

// The rows themselves: one read of them. Queues the work, and leaves what it found in the workspace.
template <class S>
Found queue_selection(const Rows& rows, const Select& select, Workspace& space, Queue& queue) {
  const Selector<S> selector(select, rows.n);
  const Found found(space, rows.n, select.sq_distances ? rows.n : 0);
  const UploadedRows uploaded(space, rows, selector.width());
  const auto out = space.upload(select.out, select.out ? rows.n_segments : 0);
  const auto multiplicities = space.upload(select.multiplicities, select.multiplicities ? rows.n : 0);
  const int64_t blocks =
      select.sq_distances ? summing_blocks(uploaded.n_tiles(), rows.n) : int64_t{grid_for(uploaded.n_tiles())};
  const auto partials = space.zeros<double>(select.sq_distances ? blocks * rows.n : 0);
  space.allocate(queue);
  space.send(queue);
  if (blocks == 0) return found;
  Selection args = selection_of(select);
  args.rows = uploaded.table();
  args.out = select.out ? space[out] : nullptr;
  args.multiplicities = select.multiplicities ? space[multiplicities] : nullptr;
  args.partials = select.sq_distances ? space[partials] : nullptr;
  args.flags = space[found.flags];
  args.vectorised =
      all_aligned(rows.data, rows.n_segments * rows.n) && (!select.out || all_aligned(select.out, rows.n_segments));
  selector.launch(queue, args, blocks);
  if (select.sq_distances) add_partials(queue, space[partials], blocks, rows.n, space[found.distances]);
  return found;
}

// Mixtures of the rows, or distances of them, by runs of columns that stay in cache: every run is read once from
// memory.
template <class S>
void select_mixed(const Rows& rows, const Select& select, Queue& queue) {
  using C = ComputeOf<S>;
  const int64_t n = rows.n, k = select.mix ? select.n_mixed : n;
  const int64_t n_measured = !select.sq_distances ? 0 : select.measure ? select.n_measured : n;
  const bool measures = n_measured && select.measure;
  const int64_t column_bytes = (select.mix ? k * static_cast<int64_t>(sizeof(C)) : 0) +
                               (measures ? n_measured * 8 : 0) + n * static_cast<int64_t>(sizeof(S));
  int64_t longest = 0;
  for (int64_t s = 0; s < rows.n_segments; ++s) {
    const int64_t columns = rows.offsets[s + 1] - rows.offsets[s];
    longest = columns > longest ? columns : longest;
  }
  const int64_t fit = kRunBytes / column_bytes / kRunColumns * kRunColumns;
  const int64_t run = fit < kRunColumns ? kRunColumns : fit < longest ? fit : longest;

  const Selector<S> plain(select, k);
  const Selector<C> of_mixtures(select, k);
  Workspace space;
  const Found found(space, n, n_measured);
  const UploadedRows uploaded(space, rows, 1);
  const UploadedWeights mixing(space, select.mix, select.mix_divisors, select.mix ? k : 0, n, rows.dtype);
  const UploadedWeights measuring(space, select.measure, select.measure_divisors, measures ? n_measured : 0, n,
                                  rows.dtype);
  const auto multiplicities = space.upload(select.multiplicities, select.multiplicities ? k : 0);
  const int64_t blocks = summing_blocks(tiles_of(run, kRunColumns), n_measured);
  const auto partials = space.zeros<double>(blocks * n_measured);
  const int64_t stride = (run + 63) / 64 * 64;
  const auto mixed = space.scratch<C>(select.mix ? k * stride : 0);
  const auto measured = space.scratch<double>(measures ? n_measured * stride : 0);
  const auto result = space.scratch<C>(stride);
  const auto stored = space.scratch<S>(stride);
  const auto mixed_flags = space.zeros<unsigned>(select.mix ? k : 0);
  const auto mixed_rows = space.pointers(k), measured_rows = space.pointers(n_measured), result_row = space.pointers(1);
  space.allocate(queue);
  if (select.mix) {
    space.point(mixed_rows, mixed, stride, k);
    space.point(result_row, result, 0, 1);
  } else {
    space.point(result_row, stored, 0, 1);
  }
  if (measures) space.point(measured_rows, measured, stride, n_measured);
  space.send(queue);

  const bool aligned = all_aligned(rows.data, rows.n_segments * n);
  for (int64_t s = 0; s < rows.n_segments; ++s)
    for (int64_t first = 0; first < rows.offsets[s + 1] - rows.offsets[s]; first += run) {
      const int64_t left = rows.offsets[s + 1] - rows.offsets[s] - first, columns = left < run ? left : run;
      const auto table_of = [&](int width) { return uploaded.run(s, first, columns, width); };
      const auto targets = [&](Part<const void*> to) { return const_cast<void* const*>(space[to]); };
      const auto made = [&](Part<const void*> rows_at, int64_t count, int width) {
        return Table{space[rows_at], nullptr, nullptr, 1, count, 0, columns, tiles_of(columns, width)};
      };
      queue.launch("find_nonfinite", &find_nonfinite<S>,
                   dim3(grid_for(tiles_of(columns, kRunColumns)), static_cast<unsigned>(lesser(tiles_of(n, 4), 256))),
                   dim3(kSumThreads), 0, table_of(kRunColumns), space[found.flags]);
      Selection args = selection_of(select);
      args.multiplicities = select.multiplicities ? space[multiplicities] : nullptr;
      args.out = targets(result_row);
      if (select.mix) {
        sum_run<S, C>(queue, uploaded, s, first, columns, mixing.on_device(space), targets(mixed_rows), aligned);
        args.rows = made(mixed_rows, k, of_mixtures.width());
        args.flags = space[mixed_flags];
        args.vectorised = true;
        of_mixtures.launch(queue, args, args.rows.n_tiles);
        queue.launch("store_result", &store_result<S>, dim3(grid_for(tiles_of(columns, kSumThreads))),
                     dim3(kSumThreads), 0, static_cast<const C*>(space[result]), columns, space[stored]);
      } else {
        args.rows = table_of(plain.width());
        args.flags = space[found.flags];
        args.vectorised = aligned;
        plain.launch(queue, args, args.rows.n_tiles);
      }
      if (select.out)
        queue.copy(static_cast<S*>(select.out[s]) + first, space[stored],
                   static_cast<std::size_t>(columns) * sizeof(S));
      if (!n_measured) continue;
      const int64_t tiles = tiles_of(columns, kRunColumns);
      const dim3 grid(static_cast<unsigned>(tiles < blocks ? tiles : blocks));
      if (measures) {
        sum_run<S, double>(queue, uploaded, s, first, columns, measuring.on_device(space), targets(measured_rows),
                           aligned);
        queue.launch("sq_distances", &sq_distances<double, S>, grid, dim3(kSumThreads), 0,
                     made(measured_rows, n_measured, kRunColumns), static_cast<const S*>(space[stored]), select.scale,
                     space[partials]);
      } else {
        queue.launch("sq_distances", &sq_distances<S, S>, grid, dim3(kSumThreads), 0, table_of(kRunColumns),
                     static_cast<const S*>(space[stored]), select.scale, space[partials]);
      }
    }
  if (n_measured) add_partials(queue, space[partials], blocks, n_measured, space[found.distances]);
  found.download(queue, space, select, "select_columns");
}

}  // namespace

void select_columns(const Rows& rows, const Select& select, const Call& call) {
  Queue queue(rows, call);
  by_dtype(rows.dtype, [&](auto s) {
    using S = decltype(s);
    if (mixes_by_network(rows, select, call.device)) {
      select_mixed_by_network(rows, select, queue);
    } else if (select.mix || (select.sq_distances && select.measure)) {
      select_mixed<S>(rows, select, queue);
    } else {
      Workspace space;
      queue_selection<S>(rows, select, space, queue).download(queue, space, select, "select_columns");
    }
  });
}

void lower_median_of(const Rows& rows, const int64_t* multiplicities, void* const* out, Queue& queue) {
  int64_t cells = multiplicities ? 0 : rows.n;
  if (multiplicities)
    for (int64_t i = 0; i < rows.n; ++i) cells += multiplicities[i];
  Select select{};
  select.lo = (cells - 1) / 2;
  select.hi = select.lo + 1;
  select.multiplicities = multiplicities;
  select.scale = 1;
  select.out = out;
  Workspace space;
  by_dtype(rows.dtype, [&](auto s) { queue_selection<decltype(s)>(rows, select, space, queue); });
}

}  // namespace cuda
}  // namespace rk
