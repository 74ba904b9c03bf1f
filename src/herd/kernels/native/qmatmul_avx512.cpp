// AVX-512 without VNNI (Skylake-X and its kin).
#include "qmatmul.h"

#if defined(HERD_AVX512) && defined(__x86_64__)
#define NAME "AVX-512"
#define LANES_OF 16
#define HAS_DOT 0
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl"
#include "qmatmul_x86.h"

const herd::quantized::Path* herd::quantized::avx512_path() {
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return here ? &PATH : nullptr;
}
#else
const herd::quantized::Path* herd::quantized::avx512_path() { return nullptr; }
#endif
