// Prints a digest of what every kernel makes of many inputs, one line each: processors whose lines are the same compute
// the same bits. Any NaN counts as one, and zeros of both signs: which of two equal ones is kept is not promised.
#include "../../csrc/kernels.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/common/half.h"

namespace {

using rk::DType;

struct Random {
  std::uint64_t state;
  std::uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  double normal() {  // a sum of uniform numbers: no function whose last bit differs between libraries
    double sum = -6;
    for (int k = 0; k < 12; ++k) sum += uniform();
    return sum;
  }
};

constexpr const char* kKinds[] = {"normal", "ties", "nan_and_inf", "far", "subnormal", "offset"};

double value(Random& random, int kind, DType dtype) {
  const double x = random.normal(), chance = random.uniform();
  const bool wide = dtype == DType::float64, half = dtype == DType::float16;
  switch (kind) {
    case 1:
      return std::floor(x);
    case 2:
      return chance < 0.02 ? NAN : chance < 0.04 ? HUGE_VAL : chance < 0.06 ? -HUGE_VAL : x;
    case 3:
      return chance < 0.2 ? x * (half ? 1e4 : wide ? 1e307 : 1e37) : x;
    case 4:
      return x * (half ? 1e-7 : wide ? 1e-310 : 1e-40);
    case 5:
      return x + (half ? 100 : wide ? 1e12 : 1e4);
    default:
      return x;
  }
}

std::size_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

void put(char* at, DType dtype, double x) {
  const float single = static_cast<float>(x);
  if (dtype == DType::float64) std::memcpy(at, &x, 8);
  if (dtype == DType::float32) std::memcpy(at, &single, 4);
  if (dtype == DType::float16) {
    const rk::Half stored = rk::narrow(single, rk::Half{});
    std::memcpy(at, &stored, 2);
  }
  if (dtype == DType::bfloat16) {
    const rk::Bfloat stored = rk::narrow(single, rk::Bfloat{});
    std::memcpy(at, &stored, 2);
  }
}

class Digest {
 public:
  void add(const void* data, std::size_t bytes, DType dtype) {
    for (std::size_t k = 0; k < bytes; k += size_of(dtype)) {
      std::uint64_t bits = 0;
      std::memcpy(&bits, static_cast<const char*>(data) + k, size_of(dtype));
      const std::uint64_t infinity[] = {0x7c00, 0x7f80, 0x7f800000, 0x7ff0000000000000};
      const std::uint64_t magnitude = bits & ~(std::uint64_t{1} << (8 * size_of(dtype) - 1));
      mix(magnitude > infinity[static_cast<int>(dtype)] ? ~std::uint64_t{0} : magnitude == 0 ? 0 : bits);
    }
  }
  void add(const std::vector<double>& values) { add(values.data(), 8 * values.size(), DType::float64); }
  void mix(std::uint64_t word) { hash_ = (hash_ ^ word) * 0x100000001b3; }
  unsigned long long value() const { return hash_; }

 private:
  std::uint64_t hash_ = 0xcbf29ce484222325;
};

void run(const rk::Kernels& kernels, DType dtype, std::int64_t n, std::int64_t d, int kind) {
  const auto item = static_cast<std::int64_t>(size_of(dtype));
  Random random{static_cast<std::uint64_t>(1 + n * 1000003 + d * 101 + kind * 7 + static_cast<int>(dtype))};
  std::vector<char> cells(static_cast<std::size_t>(n * d * item + 1));
  char* const begin = cells.data() + 1;  // aligned to nothing
  for (std::int64_t k = 0; k < n * d; ++k) put(begin + k * item, dtype, value(random, kind, dtype));
  const std::int64_t first = d / 3, offsets[] = {0, first, d};  // two segments
  std::vector<const void*> data(static_cast<std::size_t>(2 * n));
  for (std::int64_t i = 0; i < n; ++i) {
    data[static_cast<std::size_t>(i)] = begin + i * d * item;
    data[static_cast<std::size_t>(n + i)] = begin + (i * d + first) * item;
  }
  const rk::Rows rows{data.data(), offsets, 2, n, dtype};
  std::vector<char> out(static_cast<std::size_t>(2 * d * item));
  void* outs[] = {out.data(), out.data() + d * item, out.data() + first * item, out.data() + (d + first) * item};
  std::vector<double> weights(static_cast<std::size_t>(2 * n)), distances(static_cast<std::size_t>(n));
  std::vector<std::int64_t> cells_of(static_cast<std::size_t>(n));
  for (auto& weight : weights) weight = random.uniform() < 0.3 ? 0 : random.uniform();
  for (auto& count : cells_of) count = 1 + static_cast<std::int64_t>(random.next() % 5);

  Digest selected;
  const auto select = [&](std::int64_t lo, std::int64_t hi, std::int64_t nearest, const std::int64_t* multiplicities,
                          bool measures, bool mixes) {
    std::vector<std::uint8_t> nonfinite(static_cast<std::size_t>(n));
    void* targets[] = {outs[0], outs[2]};
    rk::Select asked{};
    asked.lo = lo, asked.hi = hi, asked.nearest = nearest, asked.multiplicities = multiplicities, asked.scale = 1;
    if (mixes) asked.mix = weights.data(), asked.n_mixed = 2;
    asked.out = targets, asked.nonfinite = nonfinite.data();
    asked.sq_distances = measures ? distances.data() : nullptr;
    kernels.select_columns(rows, asked, 1);
    selected.add(out.data(), static_cast<std::size_t>(d * item), dtype);
    if (measures) selected.add(distances);
    for (const auto flag : nonfinite) selected.mix(flag);
  };
  select((n - 1) / 2, n / 2 + 1, 0, nullptr, true, false);
  select(n / 4, n - n / 4, 0, nullptr, false, false);
  select((n - 1) / 2, n / 2 + 1, (n + 1) / 2, nullptr, false, false);
  select(n / 4, n - n / 4, n - n / 4, nullptr, false, false);
  std::int64_t total = 0;
  for (const auto count : cells_of) total += count;
  select((total - 1) / 2, total / 2 + 1, 0, cells_of.data(), false, false);
  select(total / 5, total - total / 5, 0, cells_of.data(), false, false);
  select(0, 2, 0, nullptr, false, true);

  Digest products, others;
  std::vector<double> gram(static_cast<std::size_t>((n + 1) * (n + 1)));
  for (const bool single : {false, true}) {
    kernels.gram(rows, nullptr, true, 1, single, n + 1, gram.data(), 1);
    products.add(gram);
  }
  kernels.gram(rows, cells_of.data(), true, 0.5, false, n + 1, gram.data(), 1);
  products.add(gram);
  std::vector<std::int64_t> last(static_cast<std::size_t>(n), 0);
  last.back() = 1;
  gram.assign(gram.size(), 0);
  kernels.gram(rows, last.data(), true, 1, false, (n + 1) / 2, gram.data(), 1);
  products.add(gram);
  const void* centre[] = {data[0], data[static_cast<std::size_t>(n)]};
  for (const bool exact : {true, false}) {
    kernels.row_sq_distances(rows, {centre, 1}, 1, exact, distances.data(), 1);
    others.add(distances);
    kernels.row_sq_distances(rows, {nullptr, 1}, 0.5, exact, distances.data(), 1);
    others.add(distances);
  }
  const double divisors[] = {3, 0.7};
  kernels.weighted_row_sum(rows, weights.data(), divisors, 2, outs, 1);
  others.add(out.data(), out.size(), dtype);
  others.mix(kernels.read_pass(rows, 1));

  std::printf("%s %d %lld x %lld: %016llx %016llx %016llx\n", kKinds[kind], static_cast<int>(dtype),
              static_cast<long long>(n), static_cast<long long>(d), selected.value(), products.value(), others.value());
}

}  // namespace

int main() {
  const rk::Kernels* const kernels = rk::kernels_for("baseline");
  if (kernels == nullptr) return 1;
  for (const DType dtype : {DType::float16, DType::bfloat16, DType::float32, DType::float64})
    for (int kind = 0; kind < 6; ++kind)
      for (const std::int64_t n : {1, 2, 3, 8, 9, 16, 31, 33, 64, 66, 129, 258, 300})
        for (const std::int64_t d : {5, 70}) run(*kernels, dtype, n, d, kind);
  return 0;
}
