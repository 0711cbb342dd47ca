// The threads of a call: OpenMP's, whose pool the process's libraries share. Where RK_STD_THREADS is set,
// std::thread's, for the thread sanitizer, which does not see how libgomp's threads wait for each other.
#pragma once
#include <stdint.h>
#if defined(RK_STD_THREADS)
#include <pthread.h>

#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

#include "floats.h"

// Always inlined: a copy of its own could be the one of another instruction set.
#define RK_TEAM_INLINE inline __attribute__((always_inline))

namespace rk {

// One of a call's threads.
struct Member {
  int thread, threads;
#if defined(RK_STD_THREADS)
  struct Meeting {
    pthread_barrier_t barrier;
    int64_t next;
  };
  Meeting* meeting;
#endif

  // Waits for all.
  RK_TEAM_INLINE void meet() const {
    if (threads == 1) return;  // a barrier would be that of a region around the call, if there is one
#if defined(RK_STD_THREADS)
    pthread_barrier_wait(&meeting->barrier);
#else
#pragma omp barrier
#endif
  }

  // body(i) for each i below count, by whichever thread asks next; then waits for all.
  template <class Body>
  RK_TEAM_INLINE void share(int64_t count, Body&& body) const {
    if (threads == 1) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
#if defined(RK_STD_THREADS)
    meet();
    if (thread == 0) meeting->next = 0;
    meet();
    for (int64_t i; (i = __atomic_fetch_add(&meeting->next, 1, __ATOMIC_RELAXED)) < count;) body(i);
    meet();
#else
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) body(i);
#endif
  }
};

// Tasks and who takes which: whoever asks the next one; or, where what they read may still lie in the cores' own
// caches, each thread those of a part of its own, the same in every call, and in the end what is left of other parts.
class Tasks {
 public:
  // Median of 20 files in pieces of 8 MiB, over reading them by one thread: 1.2 to 1.7. Where rows were read by any
  // thread, and columns combined by any: 2.7 in one process of four, which is taken for cores without a cache in
  // common.
  static constexpr int64_t kKeptBytes = int64_t{1} << 24;

  RK_TEAM_INLINE Tasks(int64_t count, int threads, int64_t bytes) {
    parts_ = bytes <= kKeptBytes ? (threads < kMostParts ? threads : kMostParts) : 1;
    for (int64_t p = 0; p < parts_; ++p) part_[p] = {count * p / parts_, count * (p + 1) / parts_};
  }

  // The next task of a thread, or -1.
  RK_TEAM_INLINE int64_t take(int thread) {
    for (int k = 0; k < parts_; ++k) {
      Part& part = part_[(thread + k) % parts_];
      if (__atomic_load_n(&part.next, __ATOMIC_RELAXED) >= part.end) continue;
      const int64_t task = __atomic_fetch_add(&part.next, 1, __ATOMIC_RELAXED);
      if (task < part.end) return task;
    }
    return -1;
  }

 private:
  static constexpr int kMostParts = 16;  // as many threads as so few bytes have
  struct alignas(64) Part {
    int64_t next, end;
  };
  Part part_[kMostParts];
  int parts_;
};

// body(member) in each of the threads; a single one does without OpenMP, whose set-up a small call would feel.
template <class Body>
RK_TEAM_INLINE void in_threads(int threads, Body&& body) {
#if defined(RK_STD_THREADS)
  Member::Meeting meeting{};
  pthread_barrier_init(&meeting.barrier, nullptr, static_cast<unsigned>(threads));
  std::vector<std::thread> others;
  const auto run = [&](int thread) {
    const UsualFloats usual;
    body(Member{thread, threads, &meeting});
  };
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
  pthread_barrier_destroy(&meeting.barrier);
#else
  if (threads == 1) {
    body(Member{0, 1});
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const UsualFloats usual;  // the calling thread's are its caller's care
    body(Member{omp_get_thread_num(), omp_get_num_threads()});
  }
#endif
}

}  // namespace rk

#undef RK_TEAM_INLINE
