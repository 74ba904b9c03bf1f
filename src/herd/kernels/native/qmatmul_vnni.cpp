// AVX-512 with VNNI: sixteen rows per vector, four products per lane and instruction.
#include "qmatmul.h"

#include <utility>

#if defined(HERD_VNNI) && defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

namespace herd::quantized {
namespace {

#include "qmatmul_kernel.h"

struct Vnni {
  static constexpr int LANES = 16, GROUP = 6, PAIRED = 6;
  static constexpr bool WHOLE_BYTES = true;
  typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(64), aligned(4), may_alias));
  typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));

  static Ints all(int32_t x) { return (Ints)_mm512_set1_epi32(x); }
  static Floats all(float x) { return (Floats)_mm512_set1_ps(x); }
  template <bool BYTES>
  static Ints dot(Ints sum, Ints codes, Ints x) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
  }
  static Ints look_up(const uint8_t* table, Ints places) {
    return (Ints)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), (__m512i)places);
  }
  static Ints widen(const uint16_t* from) {
    return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  }
  static Floats from_halves(Ints x) { return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)x)); }
  static Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
};

constexpr Path PATH = make_path<Vnni>("AVX-512 VNNI");

}  // namespace
}  // namespace herd::quantized

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const herd::quantized::Path* herd::quantized::vnni_path() {
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni");
  return here ? &PATH : nullptr;
}
#else
const herd::quantized::Path* herd::quantized::vnni_path() { return nullptr; }
#endif
