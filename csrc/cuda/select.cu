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
class MixedSelection {
 public:
  MixedSelection(const Rows& rows, const Select& select, Queue& queue)
      : rows_(rows), select_(select), queue_(queue), plain_(select, k_), of_mixtures_(select, k_) {
    space_.allocate(queue);
    if (select.mix) {
      space_.point(mixed_rows_, mixed_, stride_, k_);
      space_.point(result_row_, result_, 0, 1);
    } else {
      space_.point(result_row_, stored_, 0, 1);
    }
    if (measures_) space_.point(measured_rows_, measured_, stride_, n_measured_);
    space_.send(queue);
  }
  void run() {
    for (int64_t s = 0; s < rows_.n_segments; ++s)
      for (int64_t first = 0; first < length_of(s); first += run_) {
        const int64_t left = length_of(s) - first;
        run(Run{s, first, left < run_ ? left : run_});
      }
    if (n_measured_) add_partials(queue_, space_[partials_], blocks_, n_measured_, space_[found_.distances]);
    found_.download(queue_, space_, select_, "select_columns");
  }

 private:
  using C = ComputeOf<S>;
  struct Run {  // of columns
    int64_t segment, first, columns;
  };

  int64_t length_of(int64_t segment) const { return rows_.offsets[segment + 1] - rows_.offsets[segment]; }
  int64_t run_of() const {
    const int64_t column_bytes = (select_.mix ? k_ * static_cast<int64_t>(sizeof(C)) : 0) +
                                 (measures_ ? n_measured_ * 8 : 0) + n_ * static_cast<int64_t>(sizeof(S));
    int64_t longest = 0;
    for (int64_t s = 0; s < rows_.n_segments; ++s) longest = length_of(s) > longest ? length_of(s) : longest;
    const int64_t fit = kRunBytes / column_bytes / kRunColumns * kRunColumns;
    return fit < kRunColumns ? kRunColumns : fit < longest ? fit : longest;
  }
  Table table_of(const Run& run, int width) const { return uploaded_.run(run.segment, run.first, run.columns, width); }
  Table made(const Run& run, Part<const void*> rows_at, int64_t count, int width) const {
    return {space_[rows_at], nullptr, nullptr, 1, count, 0, run.columns, tiles_of(run.columns, width)};
  }
  void* const* targets(Part<const void*> to) const { return const_cast<void* const*>(space_[to]); }

  void run(const Run& run) {
    queue_.launch(
        "find_nonfinite", &find_nonfinite<S>,
        dim3(grid_for(tiles_of(run.columns, kRunColumns)), static_cast<unsigned>(lesser(tiles_of(n_, 4), 256))),
        dim3(kSumThreads), 0, table_of(run, kRunColumns), space_[found_.flags]);
    Selection args = selection_of(select_);
    args.multiplicities = select_.multiplicities ? space_[multiplicities_] : nullptr;
    args.out = targets(result_row_);
    if (select_.mix) {
      sum_run<S, C>(queue_, uploaded_, run.segment, run.first, run.columns, mixing_.on_device(space_),
                    targets(mixed_rows_), aligned_);
      args.rows = made(run, mixed_rows_, k_, of_mixtures_.width());
      args.flags = space_[mixed_flags_];
      args.vectorised = true;
      of_mixtures_.launch(queue_, args, args.rows.n_tiles);
      queue_.launch("store_result", &store_result<S>, dim3(grid_for(tiles_of(run.columns, kSumThreads))),
                    dim3(kSumThreads), 0, static_cast<const C*>(space_[result_]), run.columns, space_[stored_]);
    } else {
      args.rows = table_of(run, plain_.width());
      args.flags = space_[found_.flags];
      args.vectorised = aligned_;
      plain_.launch(queue_, args, args.rows.n_tiles);
    }
    if (select_.out)
      queue_.copy(static_cast<S*>(select_.out[run.segment]) + run.first, space_[stored_],
                  static_cast<std::size_t>(run.columns) * sizeof(S));
    if (n_measured_) measure(run);
  }
  void measure(const Run& run) {
    const int64_t tiles = tiles_of(run.columns, kRunColumns);
    const dim3 grid(static_cast<unsigned>(tiles < blocks_ ? tiles : blocks_));
    if (measures_) {
      sum_run<S, double>(queue_, uploaded_, run.segment, run.first, run.columns, measuring_.on_device(space_),
                         targets(measured_rows_), aligned_);
      queue_.launch("sq_distances", &sq_distances<double, S>, grid, dim3(kSumThreads), 0,
                    made(run, measured_rows_, n_measured_, kRunColumns), static_cast<const S*>(space_[stored_]),
                    select_.scale, space_[partials_]);
    } else {
      queue_.launch("sq_distances", &sq_distances<S, S>, grid, dim3(kSumThreads), 0, table_of(run, kRunColumns),
                    static_cast<const S*>(space_[stored_]), select_.scale, space_[partials_]);
    }
  }

  const Rows& rows_;
  const Select& select_;
  Queue& queue_;
  const int64_t n_ = rows_.n, k_ = select_.mix ? select_.n_mixed : n_;
  const int64_t n_measured_ = !select_.sq_distances ? 0 : select_.measure ? select_.n_measured : n_;
  const bool measures_ = n_measured_ && select_.measure;
  const int64_t run_ = run_of(), stride_ = (run_ + 63) / 64 * 64;
  const bool aligned_ = all_aligned(rows_.data, rows_.n_segments* n_);
  const Selector<S> plain_;
  const Selector<C> of_mixtures_;
  Workspace space_;
  const Found found_{space_, n_, n_measured_};
  const UploadedRows uploaded_{space_, rows_, 1};
  const UploadedWeights mixing_{space_, select_.mix, select_.mix_divisors, select_.mix ? k_ : 0, n_, rows_.dtype};
  const UploadedWeights measuring_{space_, select_.measure, select_.measure_divisors, measures_ ? n_measured_ : 0,
                                   n_,     rows_.dtype};
  const Part<int64_t> multiplicities_ = space_.upload(select_.multiplicities, select_.multiplicities ? k_ : 0);
  const int64_t blocks_ = summing_blocks(tiles_of(run_, kRunColumns), n_measured_);
  const Part<double> partials_ = space_.zeros<double>(blocks_ * n_measured_);
  const Part<C> mixed_ = space_.scratch<C>(select_.mix ? k_ * stride_ : 0);
  const Part<double> measured_ = space_.scratch<double>(measures_ ? n_measured_ * stride_ : 0);
  const Part<C> result_ = space_.scratch<C>(stride_);
  const Part<S> stored_ = space_.scratch<S>(stride_);
  const Part<unsigned> mixed_flags_ = space_.zeros<unsigned>(select_.mix ? k_ : 0);
  const Part<const void*> mixed_rows_ = space_.pointers(k_), measured_rows_ = space_.pointers(n_measured_);
  const Part<const void*> result_row_ = space_.pointers(1);
};

}  // namespace

void select_columns(const Rows& rows, const Select& select, const Call& call) {
  Queue queue(rows, call);
  by_dtype(rows.dtype, [&](auto s) {
    using S = decltype(s);
    if (mixes_by_network(rows, select, call.device)) {
      select_mixed_by_network(rows, select, queue);
    } else if (select.mix || (select.sq_distances && select.measure)) {
      MixedSelection<S>(rows, select, queue).run();
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
