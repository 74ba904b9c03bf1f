// The paths of x86 processors. They differ in the length of vectors (LANES rows, 8 or 16) and in the
// instruction that multiplies codes by activations (DOT: four products per lane at once).
//
// Without such an instruction, pairs of products are added in 16 bits (add_pairs), and these sums in 32 (add_sums).
//
// A .cpp file defines NAME, LANES_OF, HAS_DOT, DOT and TARGET, and includes this file: its code must be
// compiled for its own instructions.
#include "qmatmul.h"

#include <utility>

#include <immintrin.h>

#define HERD_PRAGMA(x) _Pragma(#x)
#define HERD_EXPAND(x) HERD_PRAGMA(x)
#if defined(__clang__)
HERD_EXPAND(clang attribute push(__attribute__((target(TARGET))), apply_to = function))
#else
#pragma GCC push_options
HERD_EXPAND(GCC target(TARGET))
#endif

namespace herd::quantized {
namespace {

#include "qmatmul_kernel.h"

struct Isa {
  // Six tokens by two tiles fill 32 registers, and three by the two halves of a tile fill 16.
  static constexpr int LANES = LANES_OF, GROUP = LANES == 16 ? 6 : 3, PAIRED = LANES == 16 ? 6 : 0;
  static constexpr bool WHOLE_BYTES = HAS_DOT;
  typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
  typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if HAS_DOT
  static Ints dot(Ints sum, Ints codes, Ints x) { return (Ints)DOT((Vector)sum, (Vector)codes, (Vector)x); }
#endif
  // Compilers would add in another order, as a tree, for which there are too few registers.
  static Ints in_order(Ints sum) {
    asm("" : "+v"(sum));
    return sum;
  }
#if LANES_OF == 16
  typedef __m512i Vector;
  static Ints all(int32_t x) { return (Ints)_mm512_set1_epi32(x); }
  static Floats all(float x) { return (Floats)_mm512_set1_ps(x); }
  static Ints add_pairs(Ints pairs, Ints codes, Ints x) {
    return in_order((Ints)_mm512_add_epi16((__m512i)pairs, _mm512_maddubs_epi16((__m512i)codes, (__m512i)x)));
  }
  static Ints add_sums(Ints sum, Ints pairs) {
    return (Ints)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi16(1)));
  }
  static Ints look_up(const uint8_t* table, Ints places) {
    return (Ints)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), (__m512i)places);
  }
  static Ints widen(const uint16_t* from) {
    return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  }
  static Floats from_halves(Ints x) { return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)x)); }
  static Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#else
  typedef __m256i Vector;
  static Ints all(int32_t x) { return (Ints)_mm256_set1_epi32(x); }
  static Floats all(float x) { return (Floats)_mm256_set1_ps(x); }
  static Ints add_pairs(Ints pairs, Ints codes, Ints x) {
    return in_order((Ints)_mm256_add_epi16((__m256i)pairs, _mm256_maddubs_epi16((__m256i)codes, (__m256i)x)));
  }
  static Ints add_sums(Ints sum, Ints pairs) {
    return (Ints)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1)));
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
#endif
};

constexpr Path PATH = make_path<Isa>(NAME);

}  // namespace
}  // namespace herd::quantized

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
