// How a primitive goes over the columns: tasks of a fixed grid, so that bits do not depend on the number of threads;
// tasks cut at segment borders into pieces, pieces into tiles that stay in cache; and the memory of its threads.
#pragma once
#include <stdlib.h>

#include "sums.h"
#include "team.h"
#include "tiles.h"

namespace rk {
namespace RK_ISA {

// ---- memory --------------------------------------------------------------------------------------------

// Cuts a block of memory into parts, one after another: without a block it only counts the bytes.
class Layout {
 public:
  explicit Layout(char* base) : base_(base) {}
  template <class T>
  void operator()(T*& part, int64_t count) {
    if (base_) part = reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

// An aligned block, that lay(layout) cuts into parts, for each thread; freed at the end of the scope.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (base_ != small_) free(base_);
  }

  template <class Lay>
  bool allocate(int threads, Lay&& lay) {
    Layout counted(nullptr);
    lay(counted);
    stride_ = (counted.bytes() + 4095) / 4096 * 4096 + 64;
    if (threads == 1 && counted.bytes() <= static_cast<int64_t>(sizeof(small_)))
      base_ = small_;
    else
      base_ = static_cast<char*>(aligned_alloc(64, static_cast<size_t>((stride_ * threads + 63) / 64 * 64)));
    return base_ != nullptr;
  }
  template <class Lay>
  void place(int thread, Lay&& lay) const {
    Layout placed(base_ + thread * stride_);
    lay(placed);
  }
  // One block for all threads.
  template <class Lay>
  bool allocate(Lay&& lay) {
    if (!allocate(1, lay)) return false;
    place(0, lay);
    return true;
  }

 private:
  alignas(64) char small_[8192];  // a small call would feel an allocation
  char* base_ = nullptr;
  int64_t stride_ = 0;
};

// ---- the grid ------------------------------------------------------------------------------------------

struct Grid {
  int64_t columns, task_columns, n_tasks;
  int64_t tile, unit;  // columns of a tile; a power of two of which tiles are multiples, but the last of a piece
};

RK_INLINE Grid make_grid(const Rows& rows, int64_t task_columns, int64_t tile, int64_t unit) {
  return {rows.columns(), task_columns, (rows.columns() + task_columns - 1) / task_columns, tile, unit};
}

// Tasks of about a quarter of a million values: small enough to balance, large enough to hide their overhead.
RK_INLINE Grid streaming_grid(const Rows& rows, int64_t tile, int64_t unit) {
  const int64_t wanted = (int64_t{1} << 18) / max64(rows.n, 1);
  return make_grid(rows, max64(wanted / tile, 1) * tile, tile, unit);
}

// body(piece) for each piece of the columns [begin, end) of all segments.
template <class Body>
RK_INLINE void for_pieces(const Rows& rows, int64_t begin, int64_t end, Body&& body) {
  int64_t low = 0, high = rows.n_segments - 1;  // the last segment that starts at or before begin
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (rows.offsets[middle] <= begin)
      low = middle;
    else
      high = middle - 1;
  }
  for (int64_t s = low; begin < end; ++s) {
    const int64_t stop = min64(end, rows.offsets[s + 1]);
    if (stop > begin) body(Tile{s, begin - rows.offsets[s], stop - begin});
    begin = max64(begin, stop);
  }
}

// body(tile) for each tile of a task: whole units of a piece, then what is left of it.
template <class Body>
RK_INLINE void for_tiles(const Rows& rows, const Grid& grid, int64_t task, Body&& body) {
  const int64_t begin = task * grid.task_columns;
  for_pieces(rows, begin, min64(begin + grid.task_columns, grid.columns), [&](const Tile& piece) {
    const int64_t whole = piece.columns & -grid.unit;
    for (int64_t j = 0; j < whole; j += grid.tile)
      body(Tile{piece.segment, piece.first + j, min64(grid.tile, whole - j)});
    if (whole < piece.columns) body(Tile{piece.segment, piece.first + whole, piece.columns - whole});
  });
}

// ---- the walk ------------------------------------------------------------------------------------------

// What a thread does on a walk: a worker names the parts of its memory in lay(layout), and works on tiles in run(tile).
struct Steps {
  void start() {}
  void begin(int64_t) {}  // a task
  void end(int64_t) {}
  void finish() {}
};

// Workers, made of a call, walk over its rows in threads. False: out of memory.
template <class Worker, class Call>
bool walk(const Call& call, int threads) {
  Workspace space;
  Worker any(call);
  if (!space.allocate(threads, [&](Layout& at) { any.lay(at); })) return false;
  Tasks tasks(call.grid.n_tasks, threads, call.grid.columns * call.rows.n * item_size(call.rows.dtype));
  in_threads(threads, [&](const Member& member) {
    Worker worker(call);
    space.place(member.thread, [&](Layout& at) { worker.lay(at); });
    worker.start();
    for (int64_t task; (task = tasks.take(member.thread)) >= 0;) {
      worker.begin(task);
      for_tiles(call.rows, call.grid, task, [&](const Tile& tile) { worker.run(tile); });
      worker.end(task);
    }
    worker.finish();
  });
  return true;
}

// Sets the marks that a thread has found among those of all threads. No lock: a process that forks meanwhile would hand
// its child one that is taken for good.
RK_INLINE void mark(uint8_t* all, const uint8_t* found, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (found[i]) __atomic_store_n(all + i, uint8_t{1}, __ATOMIC_RELAXED);
}

// Partial sums, which belong to tasks, not to threads, and are added in task order; kDoubled: each with what its
// roundings lost beside it.
template <bool kDoubled>
class TaskSums {
 public:
  bool prepare(const Grid& grid, int64_t count) {
    n_tasks_ = grid.n_tasks;
    count_ = count;
    if (!space_.allocate([&](Layout& at) { at(sums_, n_tasks_ * count * kParts); })) return false;
    memset(sums_, 0, sizeof(double) * static_cast<size_t>(n_tasks_ * count * kParts));
    return true;
  }
  double* of(int64_t task) const { return sums_ + task * count_ * kParts; }
  void add_up(double* out) const {
    for (int64_t at = 0; at < count_; ++at) {
      double high = 0, low = 0, plain = 0;
      for (int64_t task = 0; task < n_tasks_; ++task) {
        const double* sum = of(task) + at * kParts;
        add_doubled(high, low, sum[0], kDoubled ? sum[1] : 0);
        plain += sum[0];
      }
      out[at] = plain - plain == 0 ? high + low : plain;  // an overflow stays an infinity
    }
  }

 private:
  static constexpr int64_t kParts = kDoubled ? 2 : 1;
  Workspace space_;
  double* sums_ = nullptr;
  int64_t n_tasks_ = 0, count_ = 0;
};

}  // namespace RK_ISA
}  // namespace rk
