// Attention over a paged KV cache: writes the new keys and values, then every new token attends to its
// sequence so far. FlashAttention-2's online softmax (arXiv 2307.08691) over pages (vLLM, arXiv 2309.06180),
// with keys split at fixed positions for parallel decoding (Flash-Decoding). Reference in plain torch:
// paged_attention.py; layout of a page: page_layout.py.
//
// A query's result depends only on its own sequence, to the bit: each of its sums runs in one order over
// the same 16 lanes, whichever queries share the registers with it, and keys are split every SPLIT whether
// or not the parts run in parallel. So a token is the same decoded alone, in a batch, as part of a prompt,
// or with any number of threads.
#include "operators.h"

#include <algorithm>
#include <atomic>
#include <memory>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace herd {
namespace {

constexpr int64_t LANES = 16, PAGE = 64, BLOCK = 32;
constexpr int64_t SPLIT = 8 * PAGE;    // keys of one part
constexpr int64_t SHARED = 8;          // up to this many new tokens, a row's parts run in parallel
constexpr int64_t QUERIES = 128;       // query vectors of a unit of work; with their sums they fit into L2
#if defined(__AVX512F__)
constexpr int TALL = 12;  // 12 x 2 sums, 2 values, weights: 32 registers
#else
constexpr int TALL = 4;
#endif

// The compiler splits these into two or four registers where the machine's are narrower.
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int8_t bytes __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
typedef int16_t shorts __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline vec as_float(ivec x) { return (vec)x; }

inline vec load16(const bf16* p) {
#if defined(__AVX512F__)
  return as_float((ivec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);  // as below, in one step
#else
  return as_float(__builtin_convertvector(*(const halves*)p, ivec) << 16);
#endif
}

// Converts 32 bytes to signed 16-bit numbers.
inline ivec widen(const uint8_t* p) {
#if defined(__AVX512BW__)
  return (ivec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));  // compilers go byte by byte
#else
  return (ivec)__builtin_convertvector(*(const bytes*)p, shorts);
#endif
}

// a x b + c with one rounding, explicitly, because a compiler could choose which of two products it fuses.
inline vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
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
#elif defined(__AVX2__)
  __m256i half[2];
  std::memcpy(half, &a, sizeof a);
  for (__m256i& x : half) x = _mm256_madd_epi16(x, _mm256_set1_epi32(b));
  std::memcpy(&a, half, sizeof a);
  return sum + a;
#else
  return sum + ((a << 16) >> 16) * int32_t(int16_t(b)) + (a >> 16) * (b >> 16);
#endif
}

// Adds four products of unsigned bytes of `a` and signed bytes of `b` to each lane.
inline ivec dot4(ivec sum, ivec a, int32_t b) {
#if defined(__AVX512VNNI__)
  return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, _mm512_set1_epi32(b));
#else
  for (int i = 0; i < 4; i++) sum += ((a >> (8 * i)) & 255) * int32_t(int8_t(b >> (8 * i)));
  return sum;
#endif
}

// The layout of one KV head in a page, for each type of cache. `query` is a row of K words, as `prepare`
// makes it.
struct Wide {
  static constexpr int64_t itemsize = 4;
  static constexpr bool scaled = false;
  template <int M>
  static void scores(const uint8_t* head, int64_t group, const float* query, int64_t K, vec* sum) {
    const vec* keys = (const vec*)head + group * K;
    for (int64_t k = 0; k < K; k++)
      for (int m = 0; m < M; m++) sum[m] += query[m * K + k] * keys[k];
  }
  static vec value(const uint8_t* values, int64_t at) { return *(const vec*)((const float*)values + at); }
};

struct Half {
  static constexpr int64_t itemsize = 2;
  static constexpr bool scaled = false;
  template <int M>
  static void scores(const uint8_t* head, int64_t group, const float* query, int64_t K, vec* sum) {
    const ivec* keys = (const ivec*)head + group * (K / 2);
    for (int64_t k = 0; k < K; k += 2) {
      const ivec pair = keys[k / 2];
      const vec even = as_float(pair << 16), odd = as_float(pair & ~0xffff);
      for (int m = 0; m < M; m++) sum[m] += query[m * K + k] * even;
      for (int m = 0; m < M; m++) sum[m] += query[m * K + k + 1] * odd;
    }
  }
  static vec value(const uint8_t* values, int64_t at) { return load16((const bf16*)values + at); }
};

// Bytes with a bf16 scale for every BLOCK of a head's channels. Keys are stored with 128 added, as dot4 needs
// them, and the values of two tokens side by side, as dot2 needs them. A query row has K bytes, then K /
// BLOCK scales, then as many starting values -128 * sum(bytes).
struct Bytes {
  static constexpr int64_t itemsize = 1;
  static constexpr bool scaled = true;
  template <int M>
  static void scores(const uint8_t* head, int64_t group, const float* query, int64_t K, vec* sum) {
    const ivec* keys = (const ivec*)head + group * (K / 4);
    const bf16* scales = (const bf16*)(head + PAGE * K) + group * LANES;
    for (int64_t b = 0; b < K / BLOCK; b++) {
      ivec dot[M];
      for (int m = 0; m < M; m++) dot[m] = ((const int32_t*)query)[m * K + K / 4 + K / BLOCK + b] + ivec{};
#pragma GCC unroll 8
      for (int64_t k = b * (BLOCK / 4); k < (b + 1) * (BLOCK / 4); k++)
        for (int m = 0; m < M; m++) dot[m] = dot4(dot[m], keys[k], ((const int32_t*)query)[m * K + k]);
      const vec scale = load16(scales + b * PAGE);
      for (int m = 0; m < M; m++) {
        const vec both = scale * query[m * K + K / 4 + b];
        sum[m] += __builtin_convertvector(dot[m], vec) * both;
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

// The new tokens of one sequence: `start` is the index of the first among all new tokens, `position` that
// in its own sequence.
struct Row {
  int64_t table, start, n, position, partials;
  int64_t splits() const { return (position + n + SPLIT - 1) / SPLIT; }
  bool shared() const { return n <= SHARED && splits() > 1; }
};

// A unit of work: a block of a row's tokens for one KV head, against part `split` of its keys; < 0: all of
// them.
struct Unit {
  int64_t row, g, begin, end, split;
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
    int8_t* to = (int8_t*)query;
    std::memcpy(row, query, s.K * sizeof(float));
    for (int64_t b = 0; b < s.K / BLOCK; b++) {
      query[s.K / 4 + b] = quantize(row + b * BLOCK, to + b * BLOCK) * s.scale;
      int32_t sum = 0;
      for (int64_t i = 0; i < BLOCK; i++) sum += to[b * BLOCK + i];
      ((int32_t*)query)[s.K / 4 + s.K / BLOCK + b] = -128 * sum;
    }
  } else {
    for (int64_t k = 0; k < s.K; k++) query[k] *= s.scale;
  }
}

// Writes a head's new key and value to their positions in the page.
template <class Kind>
void store(const Shape& s, uint8_t* head, int64_t place, const float* key, const float* value) {
  const int64_t K = s.K, group = place / LANES, lane = place % LANES, width = s.width;
  const auto value_at = [&](int64_t k) { return (k / width * PAGE + place) * width + k % width; };
  if constexpr (Kind::scaled) {
    uint8_t* const values = head + PAGE * K + PAGE * (K / BLOCK) * 2;
    alignas(64) int8_t part[BLOCK];
    for (int64_t b = 0; b < K / BLOCK; b++) {
      put(((bf16*)(head + PAGE * K))[b * PAGE + place], quantize(key + b * BLOCK, part));
      for (int64_t i = 0; i < BLOCK; i++) {
        const int64_t k = b * BLOCK + i;
        head[((group * (K / 4) + k / 4) * LANES + lane) * 4 + k % 4] = uint8_t(part[i] + 128);
      }
      put(((bf16*)(values + PAGE * K))[b * PAGE + place], quantize(value + b * BLOCK, part));
      for (int64_t i = 0; i < BLOCK; i++) values[((b * PAGE + place) / 2 * BLOCK + i) * 2 + place % 2] = part[i];
    }
  } else if constexpr (Kind::itemsize == 2) {
    bf16 *const keys = (bf16*)head, *const values = keys + PAGE * K;
    for (int64_t k = 0; k < K; k++) {
      put(keys[((group * (K / 2) + k / 2) * LANES + lane) * 2 + k % 2], key[k]);
      put(values[value_at(k)], value[k]);
    }
  } else {
    float *const keys = (float*)head, *const values = keys + PAGE * K;
    for (int64_t k = 0; k < K; k++) {
      keys[(group * K + k) * LANES + lane] = key[k];
      values[value_at(k)] = value[k];
    }
  }
}

// The memory of a thread: prepared queries and, for each, the running softmax over the keys of this part
// and over all.
struct Scratch {
  std::unique_ptr<float[]> memory;  // not set to zero
  float *query, *out, *sum, *top, *total, *total_sum, *total_top, *score;
  Scratch(int64_t queries, int64_t K) : memory(new float[queries * (3 * K + LANES + 3) + TALL * PAGE]) {
    float* at = memory.get();
    const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    query = take(queries * K), out = take(queries * K), total = take(queries * K), sum = take(queries * LANES);
    score = take(TALL * PAGE);
    top = take(queries), total_sum = take(queries), total_top = take(queries);
  }
};

// Factors for the sums of a page: previous sum x `shrink` + this page's sum x `grow`.
struct Factors {
  float shrink, grow;
};

// Turns scores of one query against a page into weights exp(score - the page's largest), 0 for keys that it
// does not see.
__attribute__((noinline)) Factors soften(float* score, int64_t visible, float* top, float* sum) {
  for (int64_t j = std::max<int64_t>(visible, 0); j < PAGE; j++) score[j] = -INFINITY;
  float best = -INFINITY;
#pragma omp simd reduction(max : best)
  for (int64_t j = 0; j < PAGE; j++) best = score[j] > best ? score[j] : best;
  const float anchor = best == -INFINITY ? 0.0f : best;
#pragma omp simd
  for (int64_t j = 0; j < PAGE; j++) score[j] = fast_exp(score[j] - anchor);
  const float highest = std::max(*top, best), zero = highest == -INFINITY ? 0.0f : highest;
  const Factors f{fast_exp(*top - zero), fast_exp(best - zero)};
#pragma omp simd
  for (int64_t i = 0; i < LANES; i++)
    sum[i] = sum[i] * f.shrink +
             ((score[i] + score[LANES + i]) + (score[2 * LANES + i] + score[3 * LANES + i])) * f.grow;
  *top = highest;
  return f;
}

// Adds the softmax of one part to that of the parts before it.
__attribute__((noinline)) void merge(int64_t K, float top, float sum, const float* out, float* all_top, float* all_sum,
                                     float* all) {
  if (top == -INFINITY) return;
  const float best = std::max(*all_top, top), old = fast_exp(*all_top - best), fresh = fast_exp(top - best);
  *all_top = best;
  *all_sum = *all_sum * old + sum * fresh;
#pragma omp simd
  for (int64_t k = 0; k < K; k++) all[k] = all[k] * old + out[k] * fresh;
}

inline float add_lanes(const float* sum) {
  float halves[8];
  for (int i = 0; i < 8; i++) halves[i] = sum[i] + sum[i + 8];
  return ((halves[0] + halves[4]) + (halves[2] + halves[6])) + ((halves[1] + halves[5]) + (halves[3] + halves[7]));
}

// out = out x shrink + weights times values x grow, for M queries and N vectors of channels.
template <class Kind, int M, int N>
inline void accumulate(const uint8_t* values, int64_t n, const float* weight, const Factors* f, float* out, int64_t K) {
  vec sum[M][N] = {};
  for (int64_t j = 0; j < n; j++) {
    vec value[N];
    for (int i = 0; i < N; i++) value[i] = Kind::value(values, (j * N + i) * LANES);
    for (int m = 0; m < M; m++)
      for (int i = 0; i < N; i++) sum[m][i] += weight[m * PAGE + j] * value[i];
  }
  for (int m = 0; m < M; m++)
    for (int i = 0; i < N; i++) {
      vec* to = (vec*)(out + m * K + i * LANES);
      *to = fma(sum[m][i], f[m].grow + vec{}, *to * f[m].shrink);
    }
}

// The same with int8 values, a block of channels with its scales at a time. A query's weights times scales
// are rounded to steps of 1 / STEPS of the largest scale that it sees, so that all products are exact
// integers, at half the cost of floating point.
constexpr float STEPS = 32767;

template <int M>
inline void accumulate_bytes(const uint8_t* values, const bf16* scales, int64_t n, const int64_t* visible,
                             const float* weight, const Factors* f, float* out, int64_t K) {
  constexpr int N = BLOCK / LANES;
  alignas(64) int16_t codes[M][PAGE];
  alignas(64) float steps[PAGE];
  float step[M], most = 0;
  int64_t before = -1;
  for (int m = 0; m < M; m++) {
    const int64_t seen = std::clamp<int64_t>(visible[m], 0, PAGE);
    if (seen != before) {
      before = seen, most = 0;
      for (int64_t j = 0; j < PAGE; j += LANES) *(vec*)(steps + j) = load16(scales + j);
      for (int64_t j = seen; j < PAGE; j++) steps[j] = 0;
#pragma omp simd reduction(max : most)
      for (int64_t j = 0; j < PAGE; j++) most = steps[j] > most ? steps[j] : most;
      const float inverse = most > 0 ? STEPS / most : 0.0f;
#pragma omp simd
      for (int64_t j = 0; j < PAGE; j++) steps[j] *= inverse;
    }
    step[m] = most / STEPS * f[m].grow;
#pragma omp simd
    for (int64_t j = 0; j < PAGE; j++) codes[m][j] = int16_t(int32_t(weight[m * PAGE + j] * steps[j] + 0.5f));
  }
  ivec sum[M][N] = {};
  for (int64_t j = 0; j < n; j += 2) {
    ivec value[N];
    for (int i = 0; i < N; i++) value[i] = widen(values + j * BLOCK + i * 2 * LANES);
    for (int m = 0; m < M; m++) {
      int32_t pair;
      std::memcpy(&pair, codes[m] + j, 4);
      for (int i = 0; i < N; i++) sum[m][i] = dot2(sum[m][i], value[i], pair);
    }
  }
  for (int m = 0; m < M; m++)
    for (int i = 0; i < N; i++) {
      vec* to = (vec*)(out + m * K + i * LANES);
      *to = fma(__builtin_convertvector(sum[m][i], vec), step[m] + vec{}, *to * f[m].shrink);
    }
}

inline void prefetch(const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// M queries, from `m` on, against the keys of one page. `visible`: the number of keys that the last query
// sees; R consecutive queries have the same position. `next`: the following page, which is prefetched
// during the work on this one.
template <class Kind, int M>
void page_part(const Shape& s, const uint8_t* head, const uint8_t* next, Scratch& t, int64_t m, const int64_t* visible) {
  const int64_t K = s.K, n = std::min(PAGE, visible[m + M - 1]);
  if (n <= 0) return;
  const int64_t key_bytes = K * LANES * Kind::itemsize;
  for (int64_t group = 0; group * LANES < n; group++) {
    vec sum[M] = {};
    if (next) prefetch(next + group * key_bytes, key_bytes);
    Kind::template scores<M>(head, group, t.query + m * K, K, sum);
    for (int i = 0; i < M; i++) *(vec*)(t.score + i * PAGE + group * LANES) = sum[i];
  }
  Factors f[M];
  for (int i = 0; i < M; i++)
    f[i] = soften(t.score + i * PAGE, visible[m + i], t.top + m + i, t.sum + (m + i) * LANES);
  const int64_t offset = PAGE * K * Kind::itemsize + (Kind::scaled ? PAGE * (K / BLOCK) * 2 : 0);
  const bf16* scales = (const bf16*)(head + offset + PAGE * K * Kind::itemsize);
  if (next && Kind::scaled) {
    prefetch(next + PAGE * K, offset - PAGE * K);
    prefetch(next + offset + PAGE * K, offset - PAGE * K);
  }
  const int64_t block_bytes = PAGE * s.width * Kind::itemsize;
  for (int64_t b = 0; b < K / s.width; b++) {
    if (next) prefetch(next + offset + b * block_bytes, block_bytes);
    const uint8_t* values = head + offset + b * block_bytes;
    float* out = t.out + m * K + b * s.width;
    if constexpr (Kind::scaled)
      accumulate_bytes<M>(values, scales + b * PAGE, n, visible + m, t.score, f, out, K);
    else if (s.width == 2 * LANES)
      accumulate<Kind, M, 2>(values, n, t.score, f, out, K);
    else
      accumulate<Kind, M, 1>(values, n, t.score, f, out, K);
  }
}

template <class Kind>
void page(const Shape& s, const uint8_t* head, const uint8_t* next, Scratch& t, int64_t n, const int64_t* visible) {
  int64_t m = 0;
  const auto once = [&] { return std::exchange(next, nullptr); };
  for (; m + TALL <= n; m += TALL) page_part<Kind, TALL>(s, head, once(), t, m, visible);
  for (; m + 8 <= n && TALL > 8; m += 8) page_part<Kind, 8>(s, head, once(), t, m, visible);
  for (; m + 4 <= n; m += 4) page_part<Kind, 4>(s, head, once(), t, m, visible);
  for (; m + 2 <= n; m += 2) page_part<Kind, 2>(s, head, once(), t, m, visible);
  for (; m < n; m++) page_part<Kind, 1>(s, head, once(), t, m, visible);
}

// Computes a unit. Its result goes to `out` (N, H, K) or, where the row's parts run in parallel, to
// `partials`: for each (token, head, part) of a row K sums, the softmax's largest score and its sum.
template <class Kind, class T>
void attend(const Shape& s, const Row& row, const Unit& unit, Scratch& t, const T* q, T* out, float* partials) {
  const int64_t K = s.K, R = s.R, n = (unit.end - unit.begin) * R, parts = row.splits();
  const int32_t* table = s.tables + row.table * s.pages;
  int64_t visible[QUERIES];
  for (int64_t m = 0; m < n; m++) {
    const T* from = q + ((row.start + unit.begin + m / R) * s.H + unit.g * R + m % R) * K;
    for (int64_t k = 0; k < K; k++) t.query[m * K + k] = get(from[k]);
    prepare<Kind>(s, t.query + m * K);
  }
  const int64_t keys = row.position + unit.end;  // the last query sees them all
  std::fill(t.total, t.total + n * K, 0.0f);
  std::fill(t.total_sum, t.total_sum + n, 0.0f);
  std::fill(t.total_top, t.total_top + n, -INFINITY);
  const int64_t first = unit.split < 0 ? 0 : unit.split, last = unit.split < 0 ? parts : unit.split + 1;
  for (int64_t split = first; split < last && split * SPLIT < keys; split++) {
    std::fill(t.out, t.out + n * K, 0.0f);
    std::fill(t.sum, t.sum + n * LANES, 0.0f);
    std::fill(t.top, t.top + n, -INFINITY);
    const int64_t end = std::min(keys, (split + 1) * SPLIT);
    for (int64_t key = split * SPLIT; key < end; key += PAGE) {
      for (int64_t m = 0; m < n; m++) visible[m] = row.position + unit.begin + m / R + 1 - key;
      const int64_t at = key / PAGE;
      const uint8_t* next = key + PAGE < end ? s.head(table[at + 1], unit.g) : nullptr;
      page<Kind>(s, s.head(table[at], unit.g), next, t, n, visible);
    }
    for (int64_t m = 0; m < n; m++) {
      const float sum = add_lanes(t.sum + m * LANES);
      if (unit.split < 0) {
        merge(K, t.top[m], sum, t.out + m * K, t.total_top + m, t.total_sum + m, t.total + m * K);
      } else {
        const int64_t head = (unit.begin + m / R) * s.H + unit.g * R + m % R;
        float* to = partials + row.partials + (head * parts + split) * (K + 2);
        std::memcpy(to, t.out + m * K, K * sizeof(float));
        to[K] = t.top[m], to[K + 1] = sum;
      }
    }
  }
  if (unit.split >= 0) return;
  for (int64_t m = 0; m < n; m++) {
    T* to = out + ((row.start + unit.begin + m / R) * s.H + unit.g * R + m % R) * K;
    const float share = 1.0f / t.total_sum[m];
    for (int64_t k = 0; k < K; k++) put(to[k], t.total[m * K + k] * share);
  }
}

// Joins the parts of a row that ran in parallel, in their order.
template <class T>
void join(const Shape& s, const Row& row, int64_t head, const float* partials, T* out) {
  const int64_t K = s.K, parts = row.splits();
  std::vector<float> all(K);
  float top = -INFINITY, sum = 0;
  for (int64_t split = 0; split < parts; split++) {
    const float* from = partials + row.partials + (head * parts + split) * (K + 2);
    merge(K, from[K], from[K + 1], from, &top, &sum, all.data());
  }
  const float share = 1.0f / sum;
  T* to = out + (row.start * s.H + head) * K;
  for (int64_t k = 0; k < K; k++) put(to[k], all[k] * share);
}

template <class Kind, class T>
void write(const Shape& s, const std::vector<Row>& rows, const T* k, const T* v, int64_t k_stride, int64_t v_stride) {
  for (const Row& row : rows) {
    const int32_t* table = s.tables + row.table * s.pages;
    parallel(row.n, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> wide(2 * s.K);
      for (int64_t t = begin; t < end; t++)
        for (int64_t g = 0; g < s.G; g++) {
          const T *key = k + (row.start + t) * k_stride + g * s.K, *value = v + (row.start + t) * v_stride + g * s.K;
          for (int64_t i = 0; i < s.K; i++) wide[i] = get(key[i]), wide[s.K + i] = get(value[i]);
          const int64_t position = row.position + t;
          store<Kind>(s, s.head(table[position / PAGE], g), position % PAGE, wide.data(), wide.data() + s.K);
        }
    });
  }
}

template <class Kind, class T>
void run(const Shape& s, std::vector<Row>& rows, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out) {
  write<Kind>(s, rows, data<T>(k), data<T>(v), k.stride(0), v.stride(0));
  std::vector<Unit> units;
  std::vector<std::pair<int64_t, int64_t>> joins;
  int64_t partials_size = 0, most = 0;  // most tokens of a unit
  const int64_t tokens = std::max<int64_t>(QUERIES / s.R, 1);
  for (int64_t r = 0; r < int64_t(rows.size()); r++) {
    Row& row = rows[r];
    row.partials = partials_size;
    most = std::max(most, std::min(row.n, tokens));
    if (row.shared()) {
      partials_size += row.n * s.H * row.splits() * (s.K + 2);
      for (int64_t head = 0; head < row.n * s.H; head++) joins.emplace_back(r, head);
    }
    for (int64_t end = row.n; end > 0; end -= tokens)  // the last tokens see the most keys: longest units first
      for (int64_t g = 0; g < s.G; g++)
        for (int64_t split = row.shared() ? row.splits() - 1 : -1; split >= (row.shared() ? 0 : -1); split--)
          units.push_back({r, g, std::max<int64_t>(end - tokens, 0), end, split});
  }
  std::vector<float> partials(partials_size);
  std::atomic<int64_t> next{0};
  const int64_t n_units = units.size();
  parallel(n_units, 1, [&](int64_t, int64_t) {  // the next free thread takes the next unit
    Scratch scratch(most * s.R, s.K);
    for (int64_t i; (i = next++) < n_units;)
      attend<Kind>(s, rows[units[i].row], units[i], scratch, data<T>(q), data<T>(out), partials.data());
  });
  parallel(joins.size(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) join(s, rows[joins[i].first], joins[i].second, partials.data(), data<T>(out));
  });
}

}  // namespace

Tensor paged_attention(Tensor q, Tensor k, Tensor v, Tensor pool, Tensor tables, Tensor rows_, int64_t layer) {
  Shape s;
  s.H = q.size(1), s.G = k.size(1), s.K = q.size(2), s.R = s.H / s.G;
  s.layer = layer, s.layers = pool.size(1), s.head_bytes = pool.size(3);
  s.pages = tables.size(1), s.pool = data<uint8_t>(pool), s.tables = data<int32_t>(tables);
  s.width = s.K % (2 * LANES) == 0 ? 2 * LANES : LANES;
  s.scale = float(1.0 / std::sqrt(double(s.K)));
  require(s.K % LANES == 0 && s.K <= 512 && s.H % s.G == 0 && s.R <= QUERIES, "paged attention: head dim or heads");
  require(pool.size(2) == s.G && v.size(1) == s.G && layer >= 0 && layer < s.layers, "paged attention: pool's shape");
  require(pool.is_contiguous() && tables.is_contiguous() && rows_.is_contiguous() && q.is_contiguous(),
          "paged attention: contiguous tensors");
  std::vector<Row> rows;
  const int64_t* from = data<int64_t>(rows_);
  for (int64_t i = 0; i < rows_.size(0); i++, from += 4) {
    rows.push_back({from[0], from[1], from[2], from[3], 0});
    const Row& row = rows.back();
    require(row.table >= 0 && row.table < tables.size(0) && row.start >= 0 && row.start + row.n <= q.size(0) &&
                row.position >= 0 && row.position + row.n <= s.pages * PAGE,
            "paged attention: a row outside its tensors");
  }
  Tensor out = fresh_like(q);
  by_type(q, [&]<class T>(T*) {
    const int64_t values = 2 * PAGE * s.K;
    if (s.head_bytes == values * 4) return run<Wide, T>(s, rows, q, k, v, out);
    if (s.head_bytes == values * 2) return run<Half, T>(s, rows, q, k, v, out);
    require(s.head_bytes == values + values / BLOCK * 2 && s.K % BLOCK == 0, "paged attention: bytes of a page");
    run<Bytes, T>(s, rows, q, k, v, out);
  });
  return out;
}

}  // namespace herd

STABLE_TORCH_LIBRARY_FRAGMENT(herd_native, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) pool, Tensor tables, Tensor rows, int layer) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(herd_native, CPU, m) { m.impl("paged_attention", TORCH_BOX(&herd::paged_attention)); }
