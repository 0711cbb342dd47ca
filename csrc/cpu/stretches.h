// Rows that lie in files, a stretch of each: read some of the columns at a time, and hashed, by the thread that goes on
// with them, while they are in its core's caches.
#pragma once
#include <unistd.h>

#include <atomic>
#include <vector>

#include "../kernels.h"
#include "team.h"

namespace rk {

// Copies from a file take up to six times as long where they go to a few bytes further into a page than they come from.
constexpr int64_t kPage = 4096, kLine = 64;

struct Stretches {
  const int64_t* files;   // (n) descriptors
  const int64_t* places;  // (n) where a row begins in its file
  int64_t n, bytes;       // of each row
  int64_t part;           // so many of them at a time, whole pages
  const uint32_t* key;    // or null: nothing is hashed
  uint64_t point;
  uint64_t* digests;  // (parts, n)
  char* memory;       // for parts on the way, on a page's border
  int64_t memory_bytes;

  struct Part {
    int64_t index, first, bytes;  // which, and where in a row it begins
    const void* const* rows;
  };

  int64_t parts() const { return (bytes + part - 1) / part; }
  // How many threads have memory for a part of all rows.
  int most_threads() const {
    const int64_t fit = memory_bytes / memory_of_thread();
    return fit < 1024 ? static_cast<int>(fit) : 1024;
  }

  // body(part) for each part, once it is read: into the rows that begin at `into`, or where that is null into memory of
  // the thread, at least one of which must fit. False where a file could not be read.
  template <class Body>
  bool read(const Kernels& table, int threads, char* const* into, Body&& body) const {
    if (!into && threads > most_threads()) threads = most_threads();
    std::vector<char*> rows(static_cast<size_t>(n * threads));
    Tasks tasks(parts(), threads, bytes * n);
    std::atomic<bool> all{true};
    in_threads(threads, [&](const Member& member) {
      char** own = rows.data() + n * member.thread;
      for (int64_t k; all && (k = tasks.take(member.thread)) >= 0;) {
        const int64_t first = k * part, count = first + part < bytes ? part : bytes - first;
        for (int64_t i = 0; i < n && all; ++i) {
          own[i] = into ? into[i] + first : memory + memory_of_thread() * member.thread + slot(i, places[i] + first);
          if (!read_run(static_cast<int>(files[i]), places[i] + first, count, own[i]))
            all = false;
          else if (key)
            digests[k * n + i] = table.digest(own[i], count, key, point);
        }
        if (all) body(Part{k, first, count, reinterpret_cast<const void* const*>(own)});
      }
    });
    return all;
  }

 private:
  // Rows are no whole pages apart: their lines would share places in the caches.
  int64_t memory_of_thread() const { return (n * (part + 2 * kLine) + kPage - 1) / kPage * kPage; }
  int64_t slot(int64_t i, int64_t place) const {
    const int64_t at = i * (part + 2 * kLine), further = (at - place) & (kPage - 1);
    return further > 0 && further < kLine ? at + kLine : at;
  }
  static bool read_run(int file, int64_t place, int64_t count, char* to) {
    while (count > 0) {
      const ssize_t got = pread(file, to, static_cast<size_t>(count), place);
      if (got <= 0) return false;
      place += got, to += got, count -= got;
    }
    return true;
  }
};

}  // namespace rk
