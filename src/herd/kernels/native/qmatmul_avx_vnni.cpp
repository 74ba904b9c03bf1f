// AVX-VNNI: processors with AVX2 that multiply four codes per instruction, such as Alder Lake.
#include "qmatmul.h"

#if defined(HERD_AVX_VNNI) && defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define NAME "AVX-VNNI"
#define LANES_OF 8
#define HAS_DOT 1
#define DOT _mm256_dpbusd_avx_epi32
#define TARGET "avx2,fma,f16c,avxvnni"
#include "qmatmul_x86.h"

const herd::quantized::Path* herd::quantized::avx_vnni_path() {
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("avxvnni");
  return here ? &PATH : nullptr;
}
#else
const herd::quantized::Path* herd::quantized::avx_vnni_path() { return nullptr; }
#endif
