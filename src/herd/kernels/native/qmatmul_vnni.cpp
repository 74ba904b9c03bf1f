// AVX-512 with VNNI: sixteen rows per vector, four products per lane and instruction.
#include "qmatmul.h"

#if defined(HERD_VNNI) && defined(__x86_64__)
#define NAME "AVX-512 VNNI"
#define LANES_OF 16
#define HAS_DOT 1
#define DOT _mm512_dpbusd_epi32
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#include "qmatmul_x86.h"

const herd::quantized::Path* herd::quantized::vnni_path() {
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  return here ? &PATH : nullptr;
}
#else
const herd::quantized::Path* herd::quantized::vnni_path() { return nullptr; }
#endif
