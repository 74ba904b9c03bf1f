// AVX-512 without VNNI (Skylake-X and its kin): sixteen rows per vector. Pairs of products are added in 16 bits first, as
// with AVX2.
#include "qmatmul.h"

#include <utility>

#if defined(HERD_AVX512) && defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace herd::quantized {
namespace {

#include "qmatmul_kernel.h"

struct Avx512 {
  static constexpr int LANES = 16, GROUP = 6, PAIRED = 6;
  static constexpr bool WHOLE_BYTES = false;
  typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(64), aligned(4), may_alias));
  typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));

  static Ints all(int32_t x) { return (Ints)_mm512_set1_epi32(x); }
  static Floats all(float x) { return (Floats)_mm512_set1_ps(x); }
  template <bool BYTES>
  static Ints dot(Ints sum, Ints codes, Ints tokens) {
    const __m512i w = (__m512i)codes, x = (__m512i)tokens;
    if constexpr (!BYTES) return add(sum, w, x);
    const __m512i low = _mm512_set1_epi8(127);
    return add(add(sum, _mm512_and_si512(w, low), x), _mm512_andnot_si512(low, w), x);
  }
  static Ints add(Ints sum, __m512i codes, __m512i x) {
    const __m512i pairs = _mm512_maddubs_epi16(codes, x);
    return (Ints)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
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

constexpr Path PATH = make_path<Avx512>("AVX-512");

}  // namespace
}  // namespace herd::quantized

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const herd::quantized::Path* herd::quantized::avx512_path() {
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return here ? &PATH : nullptr;
}
#else
const herd::quantized::Path* herd::quantized::avx512_path() { return nullptr; }
#endif
