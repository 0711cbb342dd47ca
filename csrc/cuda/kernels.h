// The four primitives on a GPU: the contract of ../kernels.h, with rows, centres and results on the device, and
// weights, multiplicities, Grams, distances and flags on the host.
#pragma once
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels.h"

namespace rk {
namespace cuda {

// Where a call runs. Everything it does is queued on the stream; what returns numbers to the host waits for the stream
// once, at its end. A call that returns none (weighted_row_sum) does not wait.
struct Call {
  int device;
  void* stream;
  // Device memory that lives at least until the work now queued on the stream is done; may throw.
  void* (*allocate)(void* context, std::size_t bytes);
  void* context;
};

// What the runtime refused: the message names the kernel and the sizes.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

void select_columns(const Rows&, const Select&, const Call&);
void gram(const Rows&, const std::int64_t* multiplicities, bool origin, double scale, bool single, std::int64_t lines,
          double* out, const Call&);
// Always exact; reads the rows once for each centre.
void row_sq_distances(const Rows&, const Centres&, double scale, double* out, const Call&);
// Reads the rows once for each sum: grouped sums (of mixtures) cost less, and are not as exact.
void weighted_row_sum(const Rows&, const double* weights, const double* divisors, std::int64_t k, void* const* out,
                      const Call&);

// Waits for a stream: for libraries whose own streams do not wait for it.
void synchronize(int device, void* stream);

// Lowers for tests how many blocks a grid may have.
void set_most_blocks(std::int64_t blocks);

struct Device {
  std::string name;
  int major, minor, multiprocessors;
  std::size_t memory_bytes;
  bool fast_doubles;
};

// Whether a device has tensor instructions for float64 at about the speed of its memory, and there is code for it
// (tensor.cuh): data centres' do, from A100 on.
bool has_fast_doubles(int device);

// The devices of this machine. Throws with the reason where there is none: no driver, too old a driver, no device.
std::vector<Device> devices();
int runtime_version();
int driver_version();  // 0 without a driver

}  // namespace cuda
}  // namespace rk
