// Reads memory as fast as possible: the upper bound for decoding, which reads every weight once per token.
// Reference: bandwidth.py.
#include <atomic>

#include "common.h"

namespace herd {
namespace {

// Eight registers, each with its own sum, so that no load waits for an addition.
typedef uint64_t reg __attribute__((vector_size(4 * LANES), aligned(8), may_alias));
constexpr int64_t SUMS = 8, WORDS = LANES / 2, TURN = SUMS * WORDS;  // words of a register, of a turn
constexpr int64_t AHEAD = 512;                                       // words: 4 KiB

// The wrapping sum of all 64-bit words. Every byte is read once, each thread reading its own part of
// memory.
int64_t read_all(Tensor words) {
  const uint64_t* p = static_cast<const uint64_t*>(words.data_ptr());
  std::atomic<uint64_t> total{0};
  parallel(words.numel() / TURN, 1 << 12, [&](int64_t begin, int64_t end) {
    reg sums[SUMS] = {};
    for (int64_t i = begin * TURN; i < end * TURN; i += TURN)
#pragma GCC unroll 8
      for (int64_t j = 0; j < SUMS; j++) {
        __builtin_prefetch(p + i + WORDS * j + AHEAD);
        sums[j] += *(const reg*)(p + i + WORDS * j);
      }
    uint64_t sum = 0;
    for (reg each : sums)
      for (int64_t i = 0; i < WORDS; i++) sum += each[i];
    total += sum;
  });
  return int64_t(total.load());
}

}  // namespace
}  // namespace herd

STABLE_TORCH_LIBRARY_FRAGMENT(herd_native, m) { m.def("read_all(Tensor words) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(herd_native, CPU, m) { m.impl("read_all", TORCH_BOX(&herd::read_all)); }
