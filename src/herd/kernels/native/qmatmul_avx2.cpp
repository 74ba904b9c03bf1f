// AVX2: eight rows per vector.
#include "qmatmul.h"

#if defined(HERD_AVX2) && defined(__x86_64__)
#define NAME "AVX2"
#define LANES_OF 8
#define HAS_DOT 0
#define TARGET "avx2,fma,f16c"
#include "qmatmul_x86.h"

const herd::quantized::Path* herd::quantized::avx2_path() {
  const bool here = __builtin_cpu_supports("avx2") &&
                    __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return here ? &PATH : nullptr;
}
#else
const herd::quantized::Path* herd::quantized::avx2_path() { return nullptr; }
#endif
