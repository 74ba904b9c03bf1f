// Reads memory as fast as possible: the upper bound for decoding, which reads every weight once per token.
// Reference: bandwidth.py.
#include <atomic>

#include "common.h"

namespace herd {
namespace {

// Eight lines of 64 bytes, each with its own sum, so that no load waits for an addition. The compiler
// splits them into two or more registers where the machine's are narrower.
typedef uint64_t line __attribute__((vector_size(64), aligned(8), may_alias));
constexpr int64_t LINES = 8, TURN = LINES * 8;  // words
constexpr int64_t AHEAD = 512;                 // words: 4 KiB

// The wrapping sum of all 64-bit words. Every byte is read once, each thread reading its own part of
// memory.
int64_t read_all(Tensor words) {
  const uint64_t* p = static_cast<const uint64_t*>(words.data_ptr());
  std::atomic<uint64_t> total{0};
  parallel(words.numel() / TURN, 1 << 12, [&](int64_t begin, int64_t end) {
    line sums[LINES] = {};
    for (int64_t i = begin * TURN; i < end * TURN; i += TURN)
#pragma GCC unroll 8
      for (int64_t j = 0; j < LINES; j++) {
        __builtin_prefetch(p + i + 8 * j + AHEAD);
        sums[j] += *(const line*)(p + i + 8 * j);
      }
    uint64_t sum = 0;
    for (line each : sums)
      for (int i = 0; i < 8; i++) sum += each[i];
    total += sum;
  });
  return int64_t(total.load());
}

}  // namespace
}  // namespace herd

STABLE_TORCH_LIBRARY_FRAGMENT(herd_native, m) { m.def("read_all(Tensor words) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(herd_native, CPU, m) { m.impl("read_all", TORCH_BOX(&herd::read_all)); }
