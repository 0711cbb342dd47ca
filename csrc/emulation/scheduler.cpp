// Runs the kernels of emulation.h. Compiled without -fsanitize=thread, since its own state is not the kernel's: it
// tells the sanitizers about its fibers instead (RK_EMULATION_ASAN, RK_EMULATION_TSAN).
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "emulation.h"

#if !defined(__x86_64__) && !defined(RK_EMULATION_UCONTEXT)
#define RK_EMULATION_UCONTEXT
#endif
#ifdef RK_EMULATION_UCONTEXT
#include <ucontext.h>
#endif
#ifdef RK_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef RK_EMULATION_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace rk {
namespace emulation {

Stats stats;

namespace {

#ifdef RK_EMULATION_TSAN
constexpr bool kTsan = true;
#else
constexpr bool kTsan = false;
#endif

// --- fibers

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr size_t kGuardBytes = 4096;
// Stacks begin at every line of a page in turn: those of a block's threads would share few places in the caches.
constexpr size_t kLine = 64, kPage = 4096;

#ifdef RK_EMULATION_UCONTEXT
using Context = ucontext_t;
void swap_context(Context* from, Context* to) { swapcontext(from, to); }
void prepare_context(Context* context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#else
// What a called function must preserve lies on the stack; the context is where that stack ends.
using Context = void*;
extern "C" void rk_emulation_swap_context(Context* from, Context* to);
asm(R"(
  .text
  .hidden rk_emulation_swap_context
  .globl rk_emulation_swap_context
  .type rk_emulation_swap_context, @function
rk_emulation_swap_context:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov (%rsi), %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size rk_emulation_swap_context, . - rk_emulation_swap_context
)");
void swap_context(Context* from, Context* to) { rk_emulation_swap_context(from, to); }
void prepare_context(Context* context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // where entry would return to, which it does not
  *--top = reinterpret_cast<void*>(entry);
  *context = top - 6;
}
#endif

struct Fiber {
  Context context{};
  char* stack = nullptr;
  size_t used_bytes = 0;               // of the stack
  const void* stack_bottom = nullptr;  // as AddressSanitizer wants it; the host's is learnt at the first switch
  size_t stack_bytes = 0;
  void* asan_frames = nullptr;
  void* tsan = nullptr;
};

Fiber *host, *running, *previous;

// The first thing done on a fiber after a switch to it.
void arrived() {
#ifdef RK_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(running->asan_frames, &previous->stack_bottom, &previous->stack_bytes);
#endif
}

void switch_to(Fiber& to) {
  ++stats.switches;
  previous = running;
  running = &to;
#ifdef RK_EMULATION_ASAN
  __sanitizer_start_switch_fiber(&previous->asan_frames, to.stack_bottom, to.stack_bytes);
#endif
#ifdef RK_EMULATION_TSAN
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: orders nothing
#endif
  swap_context(&previous->context, &to.context);
  arrived();
}

// --- what thread sanitizers hear. An identity is a fiber as they know it; all but the kernel's own work is the host's.

#ifdef RK_EMULATION_TSAN
void work_as(void* identity) { __tsan_switch_to_fiber(identity, 1); }
void acquire(void* tag) { __tsan_acquire(tag); }
void release(void* tag) { __tsan_release(tag); }
#else
void work_as(void*) {}
void acquire(void*) {}
void release(void*) {}
#endif

char grid_tag, host_tag;  // what threads have done, what the host has done for them
void* janitor;            // frees what threads have used: it knows what they did, which the next blocks must not

// --- errors and limits of launches

std::mutex one_grid;  // and all that follows

constexpr size_t kSharedBytes = size_t{48} << 10, kSharedBytesOptin = size_t{99} << 10;

struct KernelLimits {
  bool opted_in = false;
  size_t dynamic_bytes = 0;  // once opted in
  size_t static_bytes = 0;   // as seen when it last ran
};
std::map<const void*, KernelLimits> kernel_limits;
KernelLimits* current_limits;

uint64_t launch_count, failing_launch;
cudaError_t failing_error;

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

bool in_range(dim3 size, unsigned x, unsigned y, unsigned z) {
  return size.x - 1 < x && size.y - 1 < y && size.z - 1 < z;  // 0 wraps around
}

bool fits(const KernelLimits& limits, size_t bytes) {
  if (limits.static_bytes > kSharedBytes) return false;
  const size_t most = limits.opted_in ? limits.dynamic_bytes : kSharedBytes - limits.static_bytes;
  return bytes <= most && limits.static_bytes + bytes <= kSharedBytesOptin;
}

cudaError_t launch_error(const KernelLimits& limits, dim3 grid, dim3 block, size_t shared_bytes) {
  if (launch_count == failing_launch) return failing_error;
  if (!in_range(grid, 0x7FFFFFFFu, 65535, 65535) || !in_range(block, 1024, 1024, 64))
    return cudaErrorInvalidConfiguration;
  if (uint64_t{block.x} * block.y * block.z > 1024) return cudaErrorInvalidConfiguration;
  return fits(limits, shared_bytes) ? cudaSuccess : cudaErrorInvalidValue;
}

// --- the present block

struct Thread {
  uint3 index;
  unsigned warp, lane;
  Fiber* fiber;  // none before it starts and after it has ended
  // The barrier or warp primitive in which it waits.
  Site site;
  Operation operation;
  unsigned mask;
  int argument, width;
  uint64_t value, result;
  // Its last atomic, and whether a fence precedes it.
  bool fenced;
  const void* last_atomic;
};
struct Warp {
  unsigned alive, ready, waiting;  // masks of lanes; waiting: in a warp primitive
};
struct Barrier {
  unsigned arrived, votes, result;
  Site site;
};

std::vector<Thread> threads;
Warp warps[32];
unsigned alive, ready_warps;
Barrier barrier;
Thread* current;
void (*call_kernel)(const void*);
const void* kernel_args;
std::vector<std::pair<const void*, void*>> static_arrays;
void* dynamic_array;
size_t static_bytes, dynamic_bytes;
bool stopped;  // by a failure
cudaError_t stop_error;

int order = [] {
  const char* given = getenv("RK_EMULATION_ORDER");
  return given ? atoi(given) : static_cast<int>(forward);
}();
uint32_t random_state;

thread_local std::string failure;

uint32_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  return random_state ^= random_state << 5;
}

unsigned lowest(unsigned mask) { return static_cast<unsigned>(__builtin_ctz(mask)); }

unsigned choose(unsigned mask) {
  if (order == forward) return lowest(mask);
  if (order == backward) return 31 - static_cast<unsigned>(__builtin_clz(mask));
  const unsigned first = random_bits() >> 27;
  return (lowest(mask >> first | mask << ((32 - first) % 32)) + first) % 32;
}

// A warp goes on for as long as one of its lanes can (unless shuffled).
Thread* take_ready() {
  if (ready_warps == 0) return nullptr;
  const unsigned w = choose(ready_warps), lane = choose(warps[w].ready);
  warps[w].ready &= ~(1u << lane);
  if (warps[w].ready == 0) ready_warps &= ~(1u << w);
  return &threads[w * 32 + lane];
}

void make_ready(unsigned warp, unsigned lanes) {
  if (lanes == 0) return;
  warps[warp].ready |= lanes;
  ready_warps |= 1u << warp;
}

void become(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
}

// --- the life of a fiber

// Never destroyed: leak checkers would miss the fibers. Under a thread sanitizer each has its thread, see fiber_of().
std::vector<Fiber*>& fibers = *new std::vector<Fiber*>;
size_t first_fiber;

void run_threads();

void prepare(Fiber& fiber) {
  prepare_context(&fiber.context, fiber.stack, fiber.used_bytes, run_threads);
  fiber.asan_frames = nullptr;
}

Fiber* new_fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    perror("no memory for the stack of an emulated thread");
    abort();
  }
  static size_t made;
  auto* fiber = new Fiber;
  fiber->used_bytes = kStackBytes - made++ * kLine % kPage;
  fiber->stack = static_cast<char*>(memory) + kGuardBytes;
  fiber->stack_bottom = fiber->stack;
  fiber->stack_bytes = kStackBytes;
#ifdef RK_EMULATION_TSAN
  fiber->tsan = __tsan_create_fiber(0);
#endif
  prepare(*fiber);
  return fiber;
}

// A thread sanitizer takes threads with one identity for one thread, and is slow to make them (0.3 ms, 0.8 MB). So
// those of some blocks are used in turn: races are seen between a block and the next ones, not between all blocks.
constexpr size_t kIdentities = 512;

Fiber* fiber_of([[maybe_unused]] const Thread& thread) {
  if (kTsan) {
    Fiber*& fiber = fibers[first_fiber + thread.warp * 32 + thread.lane];
    if (fiber == nullptr) fiber = new_fiber();
    return fiber;
  }
  if (fibers.empty()) return new_fiber();
  Fiber* fiber = fibers.back();
  fibers.pop_back();
  return fiber;
}

void choose_fibers(uint64_t nth_block) {
  if (!kTsan) return;
  first_fiber = nth_block % std::max<size_t>(kIdentities / threads.size(), 2) * threads.size();
  if (first_fiber + threads.size() > fibers.size()) fibers.resize(first_fiber + threads.size());
}

void give_back(Fiber* fiber) {
  if (!kTsan) fibers.push_back(fiber);
}

void go_on(Thread& thread) {
  become(thread);
  if (thread.fiber == nullptr) thread.fiber = fiber_of(thread);
  switch_to(*thread.fiber);
}

// --- failures

void stop(cudaError_t error, const Thread& thread, Site site, const char* format, va_list values) {
  char what[400], text[800];
  vsnprintf(what, sizeof what, format, values);
  snprintf(text, sizeof text, "%s:%d: %s [block (%u,%u,%u), thread (%u,%u,%u)]", site.file, site.line, what, blockIdx.x,
           blockIdx.y, blockIdx.z, thread.index.x, thread.index.y, thread.index.z);
  failure = text;
  stopped = true;
  stop_error = error;
}

// From within the kernel; its fibers are abandoned.
[[noreturn]] __attribute__((format(printf, 3, 4))) void fail(cudaError_t error, Site site, const char* format, ...) {
  work_as(host->tsan);
  va_list values;
  va_start(values, format);
  stop(error, *current, site, format, values);
  va_end(values);
  switch_to(*host);
  abort();
}

__attribute__((format(printf, 3, 4))) void fail_from_host(const Thread& thread, Site site, const char* format, ...) {
  va_list values;
  va_start(values, format);
  stop(cudaErrorLaunchFailure, thread, site, format, values);
  va_end(values);
}

const char* name_of(Operation operation) {
  constexpr const char* kNames[] = {"__syncwarp",       "__shfl_sync",     "__shfl_up_sync",
                                    "__shfl_down_sync", "__shfl_xor_sync", "__ballot_sync, __any_sync or __all_sync"};
  return kNames[static_cast<int>(operation)];
}

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

// --- waiting

// Until something makes the present thread ready. Straight to the next thread: half the switches. Thread sanitizers
// would take what one thread starts for ordered after it, so there the host starts everything.
void wait() {
  Thread* next = kTsan ? nullptr : take_ready();
  if (next != nullptr)
    go_on(*next);
  else
    switch_to(*host);
}

void end_thread() {
  Warp& warp = warps[current->warp];
  warp.alive &= ~(1u << current->lane);
  --alive;
  for (unsigned rest = warp.waiting; rest != 0; rest &= rest - 1) {
    const Thread& other = threads[current->warp * 32 + lowest(rest)];
    if (other.mask >> current->lane & 1)
      fail(cudaErrorLaunchFailure, other.site, "divergent %s: lane %u waits for this thread, which has exited",
           name_of(other.operation), other.lane);
  }
  release(&grid_tag);
}

// What a fiber does: one thread after another for as long as they need not wait, which makes kernels without barriers
// cheap. An idle fiber waits here too, for a thread that will be current.
void run_threads() {
  arrived();
  for (;;) {
    current->fenced = false;
    current->last_atomic = nullptr;
    acquire(&host_tag);
    call_kernel(kernel_args);
    end_thread();
    Fiber* fiber = std::exchange(current->fiber, nullptr);
    Thread* next = kTsan ? nullptr : take_ready();
    if (next != nullptr && next->fiber == nullptr) {
      next->fiber = fiber;
      become(*next);
      continue;
    }
    give_back(fiber);
    if (next != nullptr)
      go_on(*next);
    else
      switch_to(*host);
  }
}

// What the given lanes of each warp did is visible to each of them.
void order_memory([[maybe_unused]] unsigned first_warp, [[maybe_unused]] unsigned last_warp,
                  [[maybe_unused]] unsigned lanes) {
#ifdef RK_EMULATION_TSAN
  void* const identity = running->tsan;
  work_as(host->tsan);
  void* const tag = malloc(1);  // a new one each time: one block's barriers must not order another's work
  for (auto visit : {release, acquire}) {
    for (unsigned w = first_warp; w <= last_warp; ++w) {
      for (unsigned rest = warps[w].alive & lanes; rest != 0; rest &= rest - 1) {
        work_as(threads[w * 32 + lowest(rest)].fiber->tsan);
        visit(tag);
      }
    }
  }
  work_as(host->tsan);
  free(tag);
  work_as(identity);
#endif
}

// Nothing can run: opens the barrier if everyone is there.
void open_barrier() {
  const Thread* barred = nullptr;   // a thread that waits in the barrier,
  const Thread* waiting = nullptr;  // in a warp primitive
  for (const Thread& thread : threads) {
    const Warp& warp = warps[thread.warp];
    if (warp.waiting >> thread.lane & 1)
      waiting = waiting ? waiting : &thread;
    else if (warp.alive >> thread.lane & 1)
      barred = barred ? barred : &thread;
  }
  if (waiting != nullptr) {
    const Site site = barred ? barred->site : waiting->site;
    fail_from_host(*waiting, waiting->site, "deadlock in %s with mask %08x: %u threads wait at %s:%d, %zu have exited",
                   name_of(waiting->operation), waiting->mask, barrier.arrived, site.file, site.line,
                   threads.size() - alive);
  } else if (alive != threads.size()) {
    fail_from_host(*barred, barrier.site, "divergent barrier: %u of %zu threads are there, the others have exited",
                   alive, threads.size());
  } else {
    order_memory(0, threads.back().warp, ~0u);
    barrier = {0, 0, barrier.votes, {}};
    for (unsigned w = 0; w <= threads.back().warp; ++w) make_ready(w, warps[w].alive);
  }
}

// --- blocks and grids

void run_block() {
  alive = static_cast<unsigned>(threads.size());
  barrier = {};
  for (unsigned first = 0; first < alive; first += 32) {
    const unsigned lanes = alive - first < 32 ? (1u << (alive - first)) - 1 : ~0u;
    warps[first / 32] = {lanes, 0, 0};
    make_ready(first / 32, lanes);
  }
  dynamic_array = malloc(dynamic_bytes);
  memset(dynamic_array, 0xFF, dynamic_bytes);
  release(&host_tag);
  while (alive != 0 && !stopped) {
    if (Thread* next = take_ready()) {
      go_on(*next);
    } else {
      open_barrier();
    }
  }
  if (stopped) {
    for (Thread& thread : threads) {
      Fiber* fiber = std::exchange(thread.fiber, nullptr);
      if (fiber == nullptr) continue;
      work_as(fiber->tsan);
      release(&grid_tag);
      work_as(host->tsan);
#ifdef RK_EMULATION_ASAN
      __asan_unpoison_memory_region(fiber->stack, kStackBytes);
#endif
      prepare(*fiber);
      give_back(fiber);
    }
    ready_warps = 0;
  }
  work_as(janitor);
  acquire(&grid_tag);
  for (const auto& array : static_arrays) free(array.second);
  free(dynamic_array);
  work_as(host->tsan);
  static_arrays.clear();
  static_bytes = 0;
  stats.threads += threads.size();
  ++stats.blocks;
}

// The blocks of a grid in the present order: all residues of first + i * stride, which has no factor in common with n.
struct BlockOrder {
  uint64_t first = 0, stride = 1, n;
  explicit BlockOrder(uint64_t blocks) : n(blocks) {
    if (order == backward) first = stride = n - 1;
    if (order != shuffled) return;
    first = random_bits() % n;
    stride = n * 5 / 8 + 1;
    while (std::gcd(stride, n) != 1) ++stride;
  }
  uint64_t operator[](uint64_t i) const {
    return static_cast<uint64_t>((first + static_cast<unsigned __int128>(i) * stride) % n);
  }
};

void run_grid(dim3 grid, dim3 block) {
  Fiber host_fiber;
  host = running = &host_fiber;
  stopped = false;
  random_state = 0x9E3779B9u;
  gridDim = grid;
  blockDim = block;
  threads.assign(block.x * block.y * block.z, Thread{});
  for (unsigned i = 0; i < threads.size(); ++i) {
    threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    threads[i].warp = i / 32;
    threads[i].lane = i % 32;
  }
#ifdef RK_EMULATION_TSAN
  host->tsan = __tsan_get_current_fiber();
  janitor = __tsan_create_fiber(0);
#endif
  const uint64_t row = grid.x, plane = row * grid.y;
  const BlockOrder blocks(plane * grid.z);
  for (uint64_t i = 0; i < blocks.n && !stopped; ++i) {
    const uint64_t b = blocks[i];
    blockIdx = {static_cast<unsigned>(b % row), static_cast<unsigned>(b / row % grid.y),
                static_cast<unsigned>(b / plane)};
    choose_fibers(i);
    run_block();
  }
  acquire(&grid_tag);
#ifdef RK_EMULATION_TSAN
  __tsan_destroy_fiber(janitor);
#endif
  ++stats.grids;
}

}  // namespace

// --- what kernels call

unsigned block_barrier(bool predicate, Site site) {
  ++stats.barriers;
  if (barrier.arrived != 0 && !same(barrier.site, site))
    fail(cudaErrorLaunchFailure, site, "divergent barrier: %u threads wait at %s:%d", barrier.arrived,
         barrier.site.file, barrier.site.line);
  current->site = site;
  if (barrier.arrived++ == 0) barrier.site = site;
  barrier.votes += predicate;
  wait();
  return barrier.result;
}

static uint64_t result_of(const Thread& thread, const Thread* lanes, uint64_t ballot) {
  if (thread.operation == Operation::syncwarp) return 0;
  if (thread.operation == Operation::ballot) return ballot;
  const int lane = static_cast<int>(thread.lane), begin = lane & ~(thread.width - 1), end = begin + thread.width;
  int from = lane;
  switch (thread.operation) {
    case Operation::shfl:
      from = begin + (thread.argument & (thread.width - 1));
      break;
    case Operation::shfl_up:
      from = lane - thread.argument < begin ? lane : lane - thread.argument;
      break;
    case Operation::shfl_down:
      from = lane + thread.argument >= end ? lane : lane + thread.argument;
      break;
    default:
      from = (lane ^ thread.argument) >= end ? lane : lane ^ thread.argument;
  }
  return from >= 0 && from < 32 && thread.mask >> from & 1 ? lanes[from].value : ~uint64_t{0};  // undefined: NaN
}

uint64_t warp_primitive(Operation operation, unsigned mask, uint64_t value, int argument, int width, Site site) {
  ++stats.warp_primitives;
  Thread& self = *current;
  Warp& warp = warps[self.warp];
  Thread* const lanes = &threads[self.warp * 32];
  if (!(mask >> self.lane & 1))
    fail(cudaErrorLaunchFailure, site, "%s: lane %u is not in its own mask %08x", name_of(operation), self.lane, mask);
  if (mask & ~warp.alive)
    fail(cudaErrorLaunchFailure, site, "%s: lanes of the mask %08x have exited or do not exist, alive are %08x",
         name_of(operation), mask, warp.alive);
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail(cudaErrorLaunchFailure, site, "%s: the width %d is not a power of two up to 32", name_of(operation), width);
  self.site = site;
  self.operation = operation;
  self.mask = mask;
  self.argument = argument;
  self.width = width;
  self.value = value;
  if (const unsigned before = warp.waiting & mask) {
    const Thread& other = lanes[lowest(before)];
    if (other.mask == mask && (other.operation != operation || !same(other.site, site)))
      fail(cudaErrorLaunchFailure, site, "divergent warp primitive: lane %u waits in %s at %s:%d, this one is in %s",
           other.lane, name_of(other.operation), other.site.file, other.site.line, name_of(operation));
  }
  warp.waiting |= 1u << self.lane;
  bool complete = (warp.waiting & mask) == mask;
  for (unsigned rest = complete ? mask : 0; rest != 0; rest &= rest - 1) complete &= lanes[lowest(rest)].mask == mask;
  if (!complete) {  // lanes with another mask come here later
    wait();
    return self.result;
  }
  uint64_t ballot = 0;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1)
    ballot |= uint64_t{lanes[lowest(rest)].value != 0} << lowest(rest);
  for (unsigned rest = mask; rest != 0; rest &= rest - 1)
    lanes[lowest(rest)].result = result_of(lanes[lowest(rest)], lanes, ballot);
  if (operation == Operation::syncwarp) order_memory(self.warp, self.warp, mask);  // a shuffle orders no memory
  warp.waiting &= ~mask;
  make_ready(self.warp, mask & ~(1u << self.lane));
  return self.result;
}

// Thread sanitizers know no fences: a fence acquires from the thread's last atomic and makes its next ones release.
bool begin_atomic(const void* address) {
  ++stats.atomics;
  current->last_atomic = address;
  return current->fenced;
}
void fence() {
  if (current->last_atomic != nullptr) acquire(const_cast<void*>(current->last_atomic));
  current->fenced = true;
}

void* static_shared(const void* key, size_t bytes, Site site) {
  acquire(&host_tag);
  for (const auto& array : static_arrays) {
    if (array.first == key) return array.second;
  }
  static_bytes += bytes;
  if (static_bytes > current_limits->static_bytes) current_limits->static_bytes = static_bytes;
  if (!fits(*current_limits, dynamic_bytes))
    fail(cudaErrorInvalidValue, site, "too much shared memory: %zu bytes static and %zu dynamic", static_bytes,
         dynamic_bytes);
  work_as(host->tsan);  // the block's, not the thread's
  void* array = malloc(bytes);
  memset(array, 0xFF, bytes);
  static_arrays.emplace_back(key, array);
  release(&host_tag);
  work_as(running->tsan);
  acquire(&host_tag);
  return array;
}
void* dynamic_shared() { return dynamic_array; }

void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*),
            const void* args) {
  const std::lock_guard<std::mutex> lock(one_grid);
  ++launch_count;
  current_limits = &kernel_limits[kernel];
  if (record(launch_error(*current_limits, grid, block, shared_bytes)) != cudaSuccess) return;
  call_kernel = call;
  kernel_args = args;
  dynamic_bytes = shared_bytes;
  run_grid(grid, block);
  if (stopped) record(stop_error);
}

// --- for tests

const char* last_failure() { return failure.c_str(); }

void set_order(int wanted) {
  const std::lock_guard<std::mutex> lock(one_grid);
  order = wanted;
}

void fail_launch(int nth, int error) {
  const std::lock_guard<std::mutex> lock(one_grid);
  failing_launch = launch_count + static_cast<uint64_t>(nth);
  failing_error = static_cast<cudaError_t>(error);
}

std::atomic<uint64_t> wait_count{0};
std::atomic<bool> capturing{false}, fast_doubles{true};
uint64_t waits() { return wait_count; }
void set_capturing(bool wanted) { capturing = wanted; }
void set_fast_doubles(bool fast) { fast_doubles = fast; }

uint64_t launches() {
  const std::lock_guard<std::mutex> lock(one_grid);
  return launch_count;
}

}  // namespace emulation
}  // namespace rk

// --- the host's interface

using rk::emulation::record;

namespace {

constexpr size_t kDeviceBytes = size_t{1} << 30;
std::mutex one_allocation;
std::map<void*, size_t> allocations;
size_t allocated_bytes;

struct ErrorText {
  cudaError_t error;
  const char *name, *text;
};
#define RK_ERROR(error, text) {error, #error, text}
constexpr ErrorText kErrors[] = {
    RK_ERROR(cudaSuccess, "no error"),
    RK_ERROR(cudaErrorInvalidValue, "invalid argument"),
    RK_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    RK_ERROR(cudaErrorInitializationError, "initialization error"),
    RK_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    RK_ERROR(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    RK_ERROR(cudaErrorInvalidDeviceFunction, "invalid device function"),
    RK_ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    RK_ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    RK_ERROR(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"),
    RK_ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    RK_ERROR(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    RK_ERROR(cudaErrorMisalignedAddress, "misaligned address"),
    RK_ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    RK_ERROR(cudaErrorUnknown, "unknown error"),
};
#undef RK_ERROR

}  // namespace

cudaError_t cudaPeekAtLastError() { return rk::emulation::last_error; }
cudaError_t cudaGetLastError() { return std::exchange(rk::emulation::last_error, cudaSuccess); }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = rk::emulation::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++rk::emulation::wait_count;
  return rk::emulation::last_error == cudaErrorLaunchFailure ? cudaGetLastError() : cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t error) {
  for (const ErrorText& known : kErrors) {
    if (known.error == error) return known.name;
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  for (const ErrorText& known : kErrors) {
    if (known.error == error) return known.text;
  }
  return "unrecognized error code";
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  const std::lock_guard<std::mutex> lock(one_allocation);
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (bytes > kDeviceBytes - allocated_bytes || posix_memalign(pointer, 256, bytes) != 0)
    return record(cudaErrorMemoryAllocation);
  memset(*pointer, 0xFF, bytes);
  allocations[*pointer] = bytes;
  allocated_bytes += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  const std::lock_guard<std::mutex> lock(one_allocation);
  if (pointer == nullptr) return cudaSuccess;
  const auto found = allocations.find(pointer);
  if (found == allocations.end()) return record(cudaErrorInvalidValue);
  allocated_bytes -= found->second;
  allocations.erase(found);
  free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  const std::lock_guard<std::mutex> lock(one_allocation);
  *free_bytes = kDeviceBytes - allocated_bytes;
  *total_bytes = kDeviceBytes;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes != 0) memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes != 0) memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return record(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return record(cudaErrorInvalidDevice);
  *properties = {};
  strcpy(properties->name, "emulated");
  properties->totalGlobalMem = kDeviceBytes;
  properties->sharedMemPerBlock = rk::emulation::kSharedBytes;
  properties->sharedMemPerBlockOptin = rk::emulation::kSharedBytesOptin;
  properties->major = 9;
  properties->multiProcessorCount = 4;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->l2CacheSize = 4 << 20;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, device)) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = properties.maxThreadsPerBlock;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(properties.sharedMemPerBlock);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(properties.sharedMemPerBlockOptin);
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = properties.warpSize;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiProcessorCount;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = properties.l2CacheSize;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      return cudaSuccess;
    case cudaDevAttrSingleToDoublePrecisionPerfRatio:
      *value = rk::emulation::fast_doubles ? 2 : 64;
      return cudaSuccess;
  }
  return record(cudaErrorInvalidValue);
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  using namespace rk::emulation;
  const std::lock_guard<std::mutex> lock(one_grid);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  KernelLimits& limits = kernel_limits[kernel];
  if (value < 0 || static_cast<size_t>(value) + limits.static_bytes > kSharedBytesOptin)
    return record(cudaErrorInvalidValue);
  limits.opted_in = true;
  limits.dynamic_bytes = static_cast<size_t>(value);
  return cudaSuccess;
}
