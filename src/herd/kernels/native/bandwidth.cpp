// How fast memory can be read: the ceiling of decoding, which reads every weight once a token. Reference: bandwidth.py.
#include <atomic>

#include "common.h"

namespace herd {
namespace {

constexpr int64_t TURN = 64;  // words: eight 64-byte lines, eight sums, so that no load waits for an addition

// The sum of all 64-bit words, wrapping; every byte is read once, from its thread's own stretch of memory.
int64_t read_all(Tensor words) {
  const uint64_t* p = static_cast<const uint64_t*>(words.data_ptr());
  std::atomic<uint64_t> total{0};
  parallel(words.numel() / TURN, 1 << 12, [&](int64_t begin, int64_t end) {
    uint64_t sums[TURN] = {};
    for (int64_t i = begin * TURN; i < end * TURN; i += TURN) {
#pragma omp simd
      for (int64_t j = 0; j < TURN; j++) sums[j] += p[i + j];
    }
    uint64_t sum = 0;
    for (uint64_t s : sums) sum += s;
    total += sum;
  });
  return int64_t(total.load());
}

}  // namespace
}  // namespace herd

STABLE_TORCH_LIBRARY_FRAGMENT(herd_native, m) { m.def("read_all(Tensor words) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(herd_native, CPU, m) { m.impl("read_all", TORCH_BOX(&herd::read_all)); }
