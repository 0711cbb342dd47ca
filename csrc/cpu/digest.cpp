// Compiled once per instruction set: tells whether a piece of a file is what it was when it was read before.
#include <cstring>

#include "tiles.h"

namespace rk {
namespace RK_ISA {

namespace {

// NH (Black et al. 1999, "UMAC") over one block, whose first half is paired with its second: sums of 32 bits wide,
// products of 64.
uint64_t nh(const unsigned char* block, const uint32_t* key) {
  uint32_t words[kDigestWords];
  memcpy(words, block, sizeof(words));
  uint64_t sum = 0;
  for (int i = 0; i < kDigestWords / 2; ++i)
    sum += static_cast<uint64_t>(words[i] + key[i]) * (words[kDigestWords / 2 + i] + key[kDigestWords / 2 + i]);
  return sum;
}

}  // namespace

uint64_t digest(const void* data, int64_t bytes, const uint32_t* key, uint64_t point) {
  constexpr uint64_t kPrime = (uint64_t{1} << 61) - 1;
  constexpr int64_t kBlock = kDigestWords * 4;
  const auto* at = static_cast<const unsigned char*>(data);
  uint64_t value = static_cast<uint64_t>(bytes) % kPrime;
  const auto join = [&](uint64_t hash) {
    const unsigned __int128 product = static_cast<unsigned __int128>(value) * point + hash % kPrime;
    const uint64_t folded = static_cast<uint64_t>(product & kPrime) + static_cast<uint64_t>(product >> 61);
    value = folded >= kPrime ? folded - kPrime : folded;
  };
  for (; bytes >= kBlock; bytes -= kBlock, at += kBlock) join(nh(at, key));
  if (bytes > 0) {
    unsigned char last[kBlock] = {};
    memcpy(last, at, static_cast<size_t>(bytes));
    join(nh(last, key));
  }
  return value;
}

}  // namespace RK_ISA
}  // namespace rk
