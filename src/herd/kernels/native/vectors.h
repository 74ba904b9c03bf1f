// Vectors of LANES floats or integers, one register each, and the few operations on them that compilers do not find by
// themselves.
#pragma once

#include "common.h"

#include <algorithm>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace herd {
namespace {

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int8_t bytes __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
typedef int16_t shorts __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline vec as_float(ivec x) { return (vec)x; }

inline vec load16(const bf16* p) {
#if defined(__AVX512F__)
  return as_float((ivec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);  // as below, in one step
#elif defined(__AVX2__)
  return as_float((ivec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  return as_float(__builtin_convertvector(*(const halves*)p, ivec) << 16);
#endif
}

inline vec load(const bf16* p) { return load16(p); }
inline vec load(const float* p) { return *(const vec*)p; }

inline void store(float* to, vec x) { *(vec*)to = x; }
inline void store(bf16* to, vec x) {
  alignas(64) float lanes[LANES];
  *(vec*)lanes = x;
#pragma omp simd
  for (int i = 0; i < LANES; i++) put(to[i], lanes[i]);
}

// Rounds to whole numbers, to even ones from half way.
inline ivec nearest(vec x) {
#if defined(__AVX512F__)
  return (ivec)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (ivec)_mm256_cvtps_epi32((__m256)x);
#else
  ivec whole;
  for (int i = 0; i < LANES; i++) whole[i] = int32_t(std::nearbyint(x[i]));
  return whole;
#endif
}

// Converts numbers to bytes that can contain them.
inline void narrow(ivec x, int8_t* to) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packs_epi32((__m256i)x, (__m256i)x), bytes = _mm256_packs_epi16(pairs, pairs);
  _mm_storel_epi64((__m128i*)to, _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
#else
  for (int i = 0; i < LANES; i++) to[i] = int8_t(x[i]);
#endif
}

inline int32_t highest(ivec x) {
  alignas(64) int32_t lanes[LANES], out = INT32_MIN;
  *(ivec*)lanes = x;
#pragma omp simd reduction(max : out)
  for (int i = 0; i < LANES; i++) out = std::max(out, lanes[i]);
  return out;
}

inline int32_t total(ivec x) {
  alignas(64) int32_t lanes[LANES], out = 0;
  *(ivec*)lanes = x;
#pragma omp simd reduction(+ : out)
  for (int i = 0; i < LANES; i++) out += lanes[i];
  return out;
}

// Converts bytes to signed 16-bit numbers.
inline ivec widen(const uint8_t* p) {
#if defined(__AVX512BW__)
  return (ivec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));  // compilers go byte by byte
#elif defined(__AVX2__)
  return (ivec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
  return (ivec)__builtin_convertvector(*(const bytes*)p, shorts);
#endif
}

// a x b + c with one rounding, explicitly, because a compiler could choose which of two products it fuses.
inline vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_FEATURE_FMA)
  vec sum;
  for (int i = 0; i < LANES; i++) sum[i] = std::fma(a[i], b[i], c[i]);
  return sum;
#else
  return a * b + c;
#endif
}

// Adds two products of signed 16-bit numbers to each lane.
inline ivec dot2(ivec sum, ivec a, int32_t b) {
#if defined(__AVX512VNNI__)
  return (ivec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, _mm512_set1_epi32(b));
#elif defined(__AVX512BW__)
  return sum + (ivec)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi32(b));
#elif defined(__AVXVNNI__)
  return (ivec)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, _mm256_set1_epi32(b));
#elif defined(__AVX2__)
  return sum + (ivec)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi32(b));
#else
  return sum + ((a << 16) >> 16) * int32_t(int16_t(b)) + (a >> 16) * (b >> 16);
#endif
}

// Four channels of LANES keys as unsigned bytes, to be multiplied by four signed bytes of a query. Without an
// instruction for this they become two pairs of 16-bit numbers: channels 0 and 2, and 1 and 3. WORDS: 32-bit words of
// a query for four channels.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int64_t WORDS = 1;
struct Four {
  ivec all;
  explicit Four(ivec keys) : all(keys) {}
  ivec dot(ivec sum, const int32_t* query) const {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)all, _mm512_set1_epi32(*query));
#else
    return (ivec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)all, _mm256_set1_epi32(*query));
#endif
  }
};
#else
constexpr int64_t WORDS = 2;
struct Four {
  ivec even, odd;
  explicit Four(ivec keys) : even(keys & 0xff00ff), odd((keys >> 8) & 0xff00ff) {}
  ivec dot(ivec sum, const int32_t* query) const { return dot2(dot2(sum, even, query[0]), odd, query[1]); }
};
#endif

}  // namespace
}  // namespace herd
