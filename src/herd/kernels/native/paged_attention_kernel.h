// Queries against one page of keys and values, in registers: scores, softmax, weighted sum of the values. The layout
// of a page is described in page_layout.py. What a unit of work is, and the order of pages: paged_attention.cpp.
//
// A query's result depends only on its own sequence, to the bit: each of its sums runs in one order over the same 16
// lanes, whichever queries share the registers with it and however wide the registers are.
#pragma once

#include "vectors.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace herd {
namespace {

constexpr int64_t TOKENS = 16, PAGE = 64, BLOCK = 32;  // page_layout.LANES, PAGE, BLOCK

// TALL queries share each register of keys or values, and SUMS registers hold sums: of 32 registers with AVX-512, of 16
// with AVX2.
constexpr int TALL = LANES == 16 ? 12 : LANES == 8 ? 6 : 4, SUMS = LANES == 16 ? 24 : LANES == 8 ? 12 : 16;

// Fetches what the next page has at the same place. Decoding waits for memory, so it asks for a line with every line
// that it uses; with many queries a page is fetched at once.
template <int M>
inline void fetch(const void* at, int64_t ahead) {
  if constexpr (M < TALL) __builtin_prefetch((const uint8_t*)at + ahead, 0, 2);
}

// The layout of one KV head in a page, for each type of cache. `scores` computes M queries x C columns of LANES keys;
// `query` is a row of K words, as `prepare` makes it. `value` returns LANES channels of one token.
struct Wide {
  static constexpr int64_t itemsize = 4;
  static constexpr bool scaled = false;
  template <int M, int C>
  static void scores(const uint8_t* head, int64_t column, int64_t ahead, const float* query, int64_t K,
                     vec (&sum)[M][C]) {
    const float* keys[C];
    for (int c = 0; c < C; c++) keys[c] = (const float*)head + first_key(column + c, K);
    for (int64_t k = 0; k < K; k++) {
      vec key[C];
      for (int c = 0; c < C; c++) key[c] = *(const vec*)(keys[c] + k * TOKENS), fetch<M>(keys[c] + k * TOKENS, ahead);
      for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++) sum[m][c] += query[m * K + k] * key[c];
    }
  }
  // The first of the words of a column's keys; a token has `words` of them, TOKENS apart.
  static int64_t first_key(int64_t column, int64_t words) {
    return column * LANES / TOKENS * words * TOKENS + column * LANES % TOKENS;
  }
  static vec value(const uint8_t* values, int64_t at) { return *(const vec*)((const float*)values + at); }
};

struct Half {
  static constexpr int64_t itemsize = 2;
  static constexpr bool scaled = false;
  template <int M, int C>
  static void scores(const uint8_t* head, int64_t column, int64_t ahead, const float* query, int64_t K,
                     vec (&sum)[M][C]) {
    const int32_t* keys[C];
    for (int c = 0; c < C; c++) keys[c] = (const int32_t*)head + Wide::first_key(column + c, K / 2);
    for (int64_t k = 0; k < K; k += 2) {
      ivec pair[C];
      for (int c = 0; c < C; c++) {
        const int32_t* at = keys[c] + k / 2 * TOKENS;
        pair[c] = *(const ivec*)at, fetch<M>(at, ahead);
      }
      for (int c = 0; c < C; c++) {
        const vec even = as_float(pair[c] << 16);
        for (int m = 0; m < M; m++) sum[m][c] += query[m * K + k] * even;
      }
      for (int c = 0; c < C; c++) {
        const vec odd = as_float(pair[c] & ~0xffff);
        for (int m = 0; m < M; m++) sum[m][c] += query[m * K + k + 1] * odd;
      }
    }
  }
  static vec value(const uint8_t* values, int64_t at) { return load16((const bf16*)values + at); }
};

// Bytes with a bf16 scale for every BLOCK of a head's channels. Keys are stored with 128 added, as `Four` needs
// them, and the values of two tokens side by side, as dot2 needs them. A query row has WORDS words for four channels,
// then K / BLOCK scales, then as many starting values -128 * sum(bytes).
struct Bytes {
  static constexpr int64_t itemsize = 1;
  static constexpr bool scaled = true;
  template <int M, int C>
  static void scores(const uint8_t* head, int64_t column, int64_t ahead, const float* query, int64_t K,
                     vec (&sum)[M][C]) {
    constexpr int D = C > 1 && M <= 4 ? 2 : 1;  // columns at once: few queries alone would wait for their own sums
    const int64_t blocks = K / BLOCK, scales_at = K / 4 * WORDS;
    const int32_t* const words = (const int32_t*)query;
    for (int c = 0; c < C; c += D) {
      const int32_t* keys[D];
      for (int d = 0; d < D; d++) keys[d] = (const int32_t*)head + Wide::first_key(column + c + d, K / 4);
      const bf16* const scales = (const bf16*)(head + PAGE * K) + (column + c) * LANES;
      for (int64_t b = 0; b < blocks; b++) {
        ivec dot[D][M];
        for (int d = 0; d < D; d++)
          for (int m = 0; m < M; m++) dot[d][m] = words[m * K + scales_at + blocks + b] + ivec{};
#pragma GCC unroll 8
        for (int64_t k = b * (BLOCK / 4); k < (b + 1) * (BLOCK / 4); k++)
          for (int d = 0; d < D; d++) {
            const Four four(*(const ivec*)(keys[d] + k * TOKENS));
            fetch<M>(keys[d] + k * TOKENS, ahead);
            for (int m = 0; m < M; m++) dot[d][m] = four.dot(dot[d][m], words + m * K + k * WORDS);
          }
        for (int d = 0; d < D; d++) {
          const vec scale = load16(scales + b * PAGE + d * LANES);
          for (int m = 0; m < M; m++) {
            const vec both = scale * query[m * K + scales_at + b];
            sum[m][c + d] += __builtin_convertvector(dot[d][m], vec) * both;
          }
        }
      }
    }
  }
};

struct Shape {
  int64_t H, G, K, R, layer, layers, head_bytes, pages, width;
  const uint8_t* pool;
  const int32_t* tables;
  float scale;
  uint8_t* head(int64_t page, int64_t g) const {
    return const_cast<uint8_t*>(pool) + ((page * layers + layer) * G + g) * head_bytes;
  }
};

// Rounds BLOCK numbers to bytes with a scale in bf16, like paged_attention.quantize.
inline float quantize(const float* x, int8_t* to) {
  float most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < BLOCK; i++) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
  bf16 rounded;
  put(rounded, most / 127.0f);
  const float scale = get(rounded);
  for (int64_t i = 0; i < BLOCK; i++) {
    const float steps = scale > 0 ? std::nearbyint(x[i] / scale) : 0.0f;
    to[i] = int8_t(steps >= -127.0f ? (steps <= 127.0f ? steps : 127.0f) : -127.0f);
  }
  return scale;
}

template <class Kind>
void prepare(const Shape& s, float* query) {
  if constexpr (Kind::scaled) {
    alignas(64) float row[512];
    alignas(64) int8_t codes[BLOCK];
    const int64_t blocks = s.K / BLOCK, scales_at = s.K / 4 * WORDS;
    std::memcpy(row, query, s.K * sizeof(float));
    for (int64_t b = 0; b < blocks; b++) {
      query[scales_at + b] = quantize(row + b * BLOCK, codes) * s.scale;
      int32_t sum = 0;
      for (int64_t i = 0; i < BLOCK; i++) {
        sum += codes[i];
        if constexpr (WORDS == 1)
          ((int8_t*)query)[b * BLOCK + i] = codes[i];
        else
          ((int16_t*)query)[b * BLOCK + i / 4 * 4 + i % 2 * 2 + i % 4 / 2] = codes[i];
      }
      ((int32_t*)query)[scales_at + blocks + b] = -128 * sum;
    }
  } else {
    for (int64_t k = 0; k < s.K; k++) query[k] *= s.scale;
  }
}

// Writes a head's new key and value to their positions in the page.
template <class Kind>
void store(const Shape& s, uint8_t* head, int64_t place, const float* key, const float* value) {
  const int64_t K = s.K, group = place / TOKENS, lane = place % TOKENS, width = s.width;
  const auto value_at = [&](int64_t k) { return (k / width * PAGE + place) * width + k % width; };
  if constexpr (Kind::scaled) {
    uint8_t* const values = head + PAGE * K + PAGE * (K / BLOCK) * 2;
    alignas(64) int8_t part[BLOCK];
    for (int64_t b = 0; b < K / BLOCK; b++) {
      put(((bf16*)(head + PAGE * K))[b * PAGE + place], quantize(key + b * BLOCK, part));
      for (int64_t i = 0; i < BLOCK; i++) {
        const int64_t k = b * BLOCK + i;
        head[((group * (K / 4) + k / 4) * TOKENS + lane) * 4 + k % 4] = uint8_t(part[i] + 128);
      }
      put(((bf16*)(values + PAGE * K))[b * PAGE + place], quantize(value + b * BLOCK, part));
      for (int64_t i = 0; i < BLOCK; i++) values[((b * PAGE + place) / 2 * BLOCK + i) * 2 + place % 2] = part[i];
    }
  } else if constexpr (Kind::itemsize == 2) {
    bf16 *const keys = (bf16*)head, *const values = keys + PAGE * K;
    for (int64_t k = 0; k < K; k++) {
      put(keys[((group * (K / 2) + k / 2) * TOKENS + lane) * 2 + k % 2], key[k]);
      put(values[value_at(k)], value[k]);
    }
  } else {
    float *const keys = (float*)head, *const values = keys + PAGE * K;
    for (int64_t k = 0; k < K; k++) {
      keys[(group * K + k) * TOKENS + lane] = key[k];
      values[value_at(k)] = value[k];
    }
  }
}

// The memory of a thread: prepared queries and, for each, the running softmax over the keys of this part
// and over all.
struct Scratch {
  std::unique_ptr<float[]> memory;  // not set to zero
  float *query, *out, *sum, *top, *total, *total_sum, *total_top, *score;
  float *steps, *most;  // of the page's values, see `steps_of`
  Scratch(int64_t queries, int64_t K)
      : memory(new float[queries * (3 * K + TOKENS + 3) + (TALL + K / BLOCK) * PAGE + K / BLOCK]) {
    float* at = memory.get();
    const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    query = take(queries * K), out = take(queries * K), total = take(queries * K), sum = take(queries * TOKENS);
    score = take(TALL * PAGE), steps = take(K / BLOCK * PAGE), most = take(K / BLOCK);
    top = take(queries), total_sum = take(queries), total_top = take(queries);
  }
};

// Factors for the sums of a page: previous sum x `shrink` + this page's sum x `grow`.
struct Factors {
  float shrink, grow;
};

// Turns scores of M queries against a page into weights exp(score - the page's largest), 0 for keys that a query does
// not see. Each step is done for all queries before the next, because one query alone would wait for its own results.
template <int M>
__attribute__((noinline)) void soften(float* score, const int64_t* visible, float* top, float* sum, Factors* f) {
  float best[M];
  for (int m = 0; m < M; m++) {
    float *const row = score + m * PAGE, most = -INFINITY;
    for (int64_t j = std::max<int64_t>(visible[m], 0); j < PAGE; j++) row[j] = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < PAGE; j++) most = row[j] > most ? row[j] : most;
    best[m] = most;
  }
  for (int m = 0; m < M; m++) {
    const float anchor = best[m] == -INFINITY ? 0.0f : best[m];
#pragma omp simd
    for (int64_t j = 0; j < PAGE; j++) score[m * PAGE + j] = fast_exp(score[m * PAGE + j] - anchor);
  }
#pragma omp simd
  for (int m = 0; m < M; m++) {
    const float highest = top[m] > best[m] ? top[m] : best[m], zero = highest == -INFINITY ? 0.0f : highest;
    f[m] = {fast_exp(top[m] - zero), fast_exp(best[m] - zero)};
    top[m] = highest;
  }
  for (int m = 0; m < M; m++)
#pragma omp simd
    for (int64_t i = 0; i < TOKENS; i++) {
      const float* row = score + m * PAGE + i;
      sum[m * TOKENS + i] = sum[m * TOKENS + i] * f[m].shrink +
                            ((row[0] + row[TOKENS]) + (row[2 * TOKENS] + row[3 * TOKENS])) * f[m].grow;
    }
}

// out = out x shrink + weights times values x grow, for M queries and N vectors of channels from vector `first` on.
template <class Kind, int M, int N>
inline void accumulate(const Shape& s, const uint8_t* values, int64_t first, int64_t n, int64_t ahead,
                       const float* weight, const Factors* f, float* out) {
  int64_t at[N];
  for (int i = 0; i < N; i++) {
    const int64_t channel = (first + i) * LANES;
    at[i] = channel / s.width * PAGE * s.width + channel % s.width;
  }
  vec sum[M][N] = {};
  for (int64_t j = 0; j < n; j++) {
    vec value[N];
    for (int i = 0; i < N; i++) {
      value[i] = Kind::value(values, at[i] + j * s.width);
      fetch<M>(values + (at[i] + j * s.width) * Kind::itemsize, ahead);
    }
    for (int m = 0; m < M; m++)
      for (int i = 0; i < N; i++) sum[m][i] += weight[m * PAGE + j] * value[i];
  }
  for (int m = 0; m < M; m++)
    for (int i = 0; i < N; i++) {
      vec* to = (vec*)(out + m * s.K + (first + i) * LANES);
      *to = fma(sum[m][i], f[m].grow + vec{}, *to * f[m].shrink);
    }
}

// The scales of one block of channels of the first `seen` tokens, in steps of 1 / STEPS of the largest, which is
// returned; 0 for the other tokens.
constexpr float STEPS = 32767;

inline float steps_of(const bf16* scales, int64_t seen, float* steps) {
  float most = 0;
  for (int64_t j = 0; j < PAGE; j += LANES) *(vec*)(steps + j) = load16(scales + j);
  for (int64_t j = seen; j < PAGE; j++) steps[j] = 0;
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < PAGE; j++) most = steps[j] > most ? steps[j] : most;
  const float inverse = most > 0 ? STEPS / most : 0.0f;
#pragma omp simd
  for (int64_t j = 0; j < PAGE; j++) steps[j] *= inverse;
  return most;
}

// The same as `accumulate` with int8 values, for block b of the channels with its scales. A query's weights times
// scales are rounded to the steps of the scales that it sees, so that all products are exact integers, at half the cost
// of floating point. Most queries see the whole page: for them t.steps are there.
template <int M>
inline void accumulate_bytes(const Shape& s, const uint8_t* page_values, int64_t b, int64_t n, int64_t ahead,
                             const int64_t* visible, Scratch& t, const Factors* f, float* out) {
  constexpr int N = 2;
  const uint8_t* const values = page_values + b * PAGE * BLOCK;
  const bf16* const scales = (const bf16*)(page_values + PAGE * s.K) + b * PAGE;
  alignas(64) int16_t codes[M][PAGE];
  alignas(64) float fewer[PAGE];
  float step[M], most = 0;
  int64_t before = -1;
  for (int m = 0; m < M; m++) {
    const int64_t seen = std::clamp<int64_t>(visible[m], 0, PAGE);
    const float* steps = seen == PAGE ? t.steps + b * PAGE : fewer;
    if (seen != before) most = seen == PAGE ? t.most[b] : steps_of(scales, seen, fewer);
    before = seen;
    step[m] = most / STEPS * f[m].grow;
#pragma omp simd
    for (int64_t j = 0; j < PAGE; j++) codes[m][j] = int16_t(int32_t(t.score[m * PAGE + j] * steps[j] + 0.5f));
  }
  for (int64_t first = 0; first < BLOCK / LANES; first += N) {
    ivec sum[M][N] = {};
    for (int64_t j = 0; j < n; j += 2) {
      ivec value[N];
      for (int i = 0; i < N; i++) {
        const uint8_t* at = values + j * BLOCK + (first + i) * 2 * LANES;
        value[i] = widen(at), fetch<M>(at, ahead);
      }
      for (int m = 0; m < M; m++) {
        int32_t pair;
        std::memcpy(&pair, codes[m] + j, 4);
        for (int i = 0; i < N; i++) sum[m][i] = dot2(sum[m][i], value[i], pair);
      }
    }
    for (int m = 0; m < M; m++)
      for (int i = 0; i < N; i++) {
        vec* to = (vec*)(out + m * s.K + b * BLOCK + (first + i) * LANES);
        *to = fma(__builtin_convertvector(sum[m][i], vec), step[m] + vec{}, *to * f[m].shrink);
      }
  }
}

inline void prefetch(const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// The largest power of two, at most `most`, of vectors for each of M queries whose sums fit into the registers.
constexpr int beside(int M, int most) {
  while (most > 1 && M * most > SUMS) most /= 2;
  return most;
}

// M queries, from `m` on, against the keys of one page. `visible`: the number of keys that the last query
// sees; R consecutive queries have the same position. `next`: the following page, which is prefetched
// during the work on this one.
template <class Kind, int M>
void page_part(const Shape& s, const uint8_t* head, const uint8_t* next, Scratch& t, int64_t m, const int64_t* visible) {
  const int64_t K = s.K, n = std::min(PAGE, visible[m + M - 1]), ahead = next ? next - head : 0;
  if (n <= 0) return;
  if (M == TALL && next) prefetch(next, s.head_bytes);
  constexpr int C = beside(M, PAGE / LANES);
  for (int64_t column = 0; column * LANES < n; column += C) {
    vec sum[M][C] = {};
    Kind::template scores<M, C>(head, column, ahead, t.query + m * K, K, sum);
    for (int i = 0; i < M; i++)
      for (int c = 0; c < C; c++) *(vec*)(t.score + i * PAGE + (column + c) * LANES) = sum[i][c];
  }
  Factors f[M];
  soften<M>(t.score, visible + m, t.top + m, t.sum + m * TOKENS, f);
  float* out = t.out + m * K;
  if constexpr (Kind::scaled) {
    if (next) {
      prefetch(next + PAGE * K, s.head_bytes / 2 - PAGE * K);
      prefetch(next + s.head_bytes / 2 + PAGE * K, s.head_bytes / 2 - PAGE * K);
    }
    const uint8_t* values = head + s.head_bytes / 2;
    for (int64_t b = 0; b < K / BLOCK; b++) accumulate_bytes<M>(s, values, b, n, ahead, visible + m, t, f, out);
  } else {
    const uint8_t* values = head + PAGE * K * Kind::itemsize;
    constexpr int N = beside(M, 8);
    int64_t first = 0;
    for (; (first + N) * LANES <= K; first += N) accumulate<Kind, M, N>(s, values, first, n, ahead, t.score, f, out);
    for (; first * LANES < K; first++) accumulate<Kind, M, 1>(s, values, first, n, ahead, t.score, f, out);
  }
}

template <class Kind>
void page(const Shape& s, const uint8_t* head, const uint8_t* next, Scratch& t, int64_t n, const int64_t* visible) {
  if constexpr (Kind::scaled) {
    const bf16* scales = (const bf16*)(head + s.head_bytes / 2 + PAGE * s.K);
    if (visible[n - 1] >= PAGE)
      for (int64_t b = 0; b < s.K / BLOCK; b++) t.most[b] = steps_of(scales + b * PAGE, PAGE, t.steps + b * PAGE);
  }
  int64_t m = 0;
  const auto once = [&] { return std::exchange(next, nullptr); };
  for (; m + TALL <= n; m += TALL) page_part<Kind, TALL>(s, head, once(), t, m, visible);
  for (; m + 8 <= n && TALL > 8; m += 8) page_part<Kind, 8>(s, head, once(), t, m, visible);
  for (; m + 4 <= n; m += 4) page_part<Kind, 4>(s, head, once(), t, m, visible);
  for (; m + 2 <= n; m += 2) page_part<Kind, 2>(s, head, once(), t, m, visible);
  for (; m < n; m++) page_part<Kind, 1>(s, head, once(), t, m, visible);
}

}  // namespace
}  // namespace herd
