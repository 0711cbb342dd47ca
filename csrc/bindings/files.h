// Rows in files, as Python gives them: a call goes through them part by part.
#pragma once
#include <vector>

#include "../cpu/stretches.h"
#include "calls.h"

namespace rk {
namespace bindings {

inline bool is_in_files(nanobind::handle data) { return PyTuple_Check(data.ptr()); }

// A tuple of what `Stretches` has, with the sizes that arrays have of themselves.
inline Stretches stretches_of(nanobind::handle data) {
  const auto given = nanobind::cast<nanobind::tuple>(data);
  require(given.size() == 9, "rows in files take nine entries");
  const auto files = nanobind::cast<Array<const std::int64_t, 1>>(given[0]);
  const auto places = nanobind::cast<Array<const std::int64_t, 1>>(given[1]);
  const auto digests = nanobind::cast<Array<std::uint64_t, 2>>(given[6]);
  const Stretches found{files.data(),
                        places.data(),
                        static_cast<std::int64_t>(files.shape(0)),
                        nanobind::cast<std::int64_t>(given[2]),
                        nanobind::cast<std::int64_t>(given[3]),
                        given[4].is_none() ? nullptr : key_of(given[4]),
                        nanobind::cast<std::uint64_t>(given[5]),
                        digests.data(),
                        reinterpret_cast<char*>(nanobind::cast<std::uintptr_t>(given[7])),
                        nanobind::cast<std::int64_t>(given[8])};
  require(found.n >= 1 && found.n <= 65535 && places.shape(0) == files.shape(0), "one place for each file");
  require(found.bytes >= 0 && found.part >= kPage && found.part % kPage == 0, "parts must be whole pages");
  require(digests.shape(0) == static_cast<std::size_t>(found.parts()) && digests.shape(1) == files.shape(0),
          "one hash for each part and row");
  return found;
}

// They are one segment, and nowhere in memory.
inline Rows rows_of(const Stretches& files, const Offsets& offsets, int dtype) {
  const Rows rows{nullptr, offsets.data(), 1, files.n, dtype_of(dtype)};
  require(offsets.shape(0) == 2 && rows.columns() * item_of(rows.dtype) == files.bytes,
          "rows in files are one segment of as many bytes");
  return rows;
}

// A part of the columns in memory, and where its result goes.
struct Part {
  std::int64_t index;
  Rows rows;
  void* const* out;
};

// body(part) by one thread for each part of the rows; `out` are `targets` results for all columns, or null. False where
// a file could not be read.
template <class Body>
bool in_parts(const Kernels& table, const Stretches& files, const Rows& rows, void* const* out, std::int64_t targets,
              int threads, Body&& body) {
  require(files.most_threads() >= 1, "the memory must hold a part of each row");
  Status status = Status::ok;
  bool read;
  {
    const Outside outside;
    const int team = usable_threads(threads, files.bytes * files.n);
    std::vector<void*> places(out ? static_cast<std::size_t>(targets * files.parts()) : 0);
    read = files.read(table, team, nullptr, [&](const Stretches::Part& part) {
      const std::int64_t offsets[] = {0, part.bytes / item_of(rows.dtype)};
      void** into = out ? places.data() + targets * part.index : nullptr;
      for (std::int64_t r = 0; out && r < targets; ++r) into[r] = static_cast<char*>(out[r]) + part.first;
      const Status found = body(Part{part.index, {part.rows, offsets, 1, rows.n, rows.dtype}, into});
      if (found != Status::ok) __atomic_store_n(&status, found, __ATOMIC_RELAXED);
    });
  }
  check(status);
  return read;
}

}  // namespace bindings
}  // namespace rk
