// Which instruction sets were built and can run here, and how many threads a call may use.
#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cstring>

#include "../kernels.h"

namespace rk {

namespace baseline {
extern const Kernels table;
}
#if defined(RK_X86_64)
namespace v3 {
extern const Kernels table;
}
namespace v4 {
extern const Kernels table;
}
#endif

namespace {

bool runs_here([[maybe_unused]] const char* isa) {
#if defined(RK_X86_64)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c");
  if (std::strcmp(isa, "v3") == 0) return v3;
  if (std::strcmp(isa, "v4") == 0)
    return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return true;
}

const Kernels* const kTables[] = {
#if defined(RK_X86_64)
    &v4::table, &v3::table,
#endif
    &baseline::table};

// libgomp's thread pool does not survive a fork: a child that inherits a used pool would wait for threads that do not
// exist. Whether it was used nobody tells, as other libraries share it; so every forked child stays on one thread.
std::atomic<bool> pool_lost{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { pool_lost = true; });

// So many bytes are worth a thread: 256 Ki float32 values, most primitives' task. 10 rows of float32 on two idle cores,
// least microseconds on one thread and on two: median 28 and 25 at 1.1 MiB, 102 and 51 at 3.8 MiB; weighted sum 32 and
// 27, 127 and 63; of less they have one task. The Gram matrix gains earlier (68 and 43 at 0.8 MiB), but where other
// work keeps a core busy the threads wait for each other for 7 milliseconds, however small the call is.
constexpr std::int64_t kBytesPerThread = 1 << 20;

}  // namespace

const char* const* supported_isas() {
  static const char* names[sizeof(kTables) / sizeof(kTables[0]) + 1] = {};
  static const bool filled = [] {
    int count = 0;
    for (const Kernels* table : kTables)
      if (runs_here(table->isa)) names[count++] = table->isa;
    return true;
  }();
  (void)filled;
  return names;
}

const Kernels* kernels_for(const char* isa) {
  for (const Kernels* table : kTables)
    if (std::strcmp(table->isa, isa) == 0 && runs_here(isa)) return table;
  return nullptr;
}

int max_threads() { return pool_lost ? 1 : omp_get_max_threads(); }

int usable_threads(int requested, std::int64_t bytes) {
  if (pool_lost || fork_handler != 0) return 1;
  const std::int64_t limit = requested > 0 ? requested : omp_get_max_threads();
  const std::int64_t useful = bytes / kBytesPerThread;
  return static_cast<int>(limit < useful ? limit : useful > 1 ? useful : 1);
}

}  // namespace rk
