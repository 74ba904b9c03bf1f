// AVX2: eight rows per vector. Pairs of products are added in 16 bits, which would overflow with 8-bit
// codes; there the lower seven bits and the highest are multiplied one after the other: 128 * 127 * 2 fits.
#include "qmatmul.h"

#include <utility>

#if defined(HERD_AVX2) && defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace herd::quantized {
namespace {

#include "qmatmul_kernel.h"

struct Avx2 {
  static constexpr int LANES = 8, GROUP = 4, PAIRED = 2;
  static constexpr bool WHOLE_BYTES = false;
  typedef int32_t Ints __attribute__((vector_size(32), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(32), aligned(4), may_alias));
  typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));

  static Ints all(int32_t x) { return (Ints)_mm256_set1_epi32(x); }
  static Floats all(float x) { return (Floats)_mm256_set1_ps(x); }
  template <bool BYTES>
  static Ints dot(Ints sum, Ints codes, Ints tokens) {
    const __m256i w = (__m256i)codes, x = (__m256i)tokens;
    if constexpr (!BYTES) return add(sum, w, x);
    const __m256i low = _mm256_set1_epi8(127);
    return add(add(sum, _mm256_and_si256(w, low), x), _mm256_andnot_si256(low, w), x);
  }
  static Ints add(Ints sum, __m256i codes, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(codes, x);
    return (Ints)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Ints look_up(const uint8_t* table, Ints places) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table));
    return (Ints)_mm256_shuffle_epi8(both, (__m256i)places);
  }
  static Ints widen(const uint16_t* from) { return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)); }
  static Floats from_halves(Ints x) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)x, (__m256i)x), 0x08);
    return (Floats)_mm256_cvtph_ps(_mm256_castsi256_si128(packed));
  }
  static Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
};

constexpr Path PATH = make_path<Avx2>("AVX2");

}  // namespace
}  // namespace herd::quantized

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const herd::quantized::Path* herd::quantized::avx2_path() {
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return here ? &PATH : nullptr;
}
#else
const herd::quantized::Path* herd::quantized::avx2_path() { return nullptr; }
#endif
