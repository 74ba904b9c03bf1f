// Causal attention with shared KV heads and packed documents, forward and backward, without the (T x T)
// matrix: FlashAttention-2 (arXiv 2307.08691) for a CPU's caches. One unit of work is one KV head of one
// row with all the query heads that share it. Its blocks stay in L1/L2, keys of later tokens and of other
// documents are never read, and no two units write the same gradient. Every product is a tile of registers
// whose right-hand side has contiguous rows. Reference in plain torch: attention.py.
//
// Query i sees keys start[i]..i, where start does not decrease along the row (null: 0 everywhere). All
// arithmetic is in fp32, whatever the inputs are.
#include "common.h"

#include <algorithm>

namespace herd {
namespace {

// 6 x WIDE sums, WIDE values and 1 broadcast, of 16 registers with AVX2, else of 32
constexpr int WIDE = LANES == 8 ? 2 : 4;
constexpr int TALL = 6;
constexpr int64_t BLOCK = 64;  // queries and keys of a block

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

// C (M x N columns of vectors) (+)= A B; A[m, k] = a[m * a_m + k * a_k], rows of B and C contiguous.
template <int M, int N, bool ADD>
inline void tile(const float* a, int64_t a_m, int64_t a_k, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t K) {
  vec sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[m][n] = ADD ? *(const vec*)(c + m * ldc + n * LANES) : vec{};
  for (int64_t k = 0; k < K; k++) {
    vec right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) right[n] = *(const vec*)(b + k * ldb + n * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const float left = a[m * a_m + k * a_k];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) *(vec*)(c + m * ldc + n * LANES) = sum[m][n];
}

template <int N, bool ADD>
void column(int64_t M, const float* a, int64_t a_m, int64_t a_k, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t K) {
  int64_t m = 0;
  for (; m + TALL <= M; m += TALL) tile<TALL, N, ADD>(a + m * a_m, a_m, a_k, b, ldb, c + m * ldc, ldc, K);
  a += m * a_m, c += m * ldc;
  switch (M - m) {
    case 5: return tile<5, N, ADD>(a, a_m, a_k, b, ldb, c, ldc, K);
    case 4: return tile<4, N, ADD>(a, a_m, a_k, b, ldb, c, ldc, K);
    case 3: return tile<3, N, ADD>(a, a_m, a_k, b, ldb, c, ldc, K);
    case 2: return tile<2, N, ADD>(a, a_m, a_k, b, ldb, c, ldc, K);
    case 1: return tile<1, N, ADD>(a, a_m, a_k, b, ldb, c, ldc, K);
  }
}

// C (M x N) (+)= A (M x K) B (K x N); N is a multiple of LANES.
template <bool ADD>
void multiply(int64_t M, int64_t N, int64_t K, const float* a, int64_t a_m, int64_t a_k, const float* b, int64_t ldb,
              float* c, int64_t ldc) {
  int64_t n = 0;
  for (; n + WIDE * LANES <= N; n += WIDE * LANES) column<WIDE, ADD>(M, a, a_m, a_k, b + n, ldb, c + n, ldc, K);
  for (; n < N; n += LANES) column<1, ADD>(M, a, a_m, a_k, b + n, ldb, c + n, ldc, K);
}

// Rows of one head, gathered into contiguous fp32 and scaled; rows beyond T are zero.
template <class T>
void gather(const T* from, int64_t stride, int64_t T_, int64_t padded, int64_t K, float scale, float* to) {
  for (int64_t t = 0; t < T_; t++)
#pragma omp simd
    for (int64_t k = 0; k < K; k++) to[t * K + k] = get(from[t * stride + k]) * scale;
  std::memset(to + T_ * K, 0, (padded - T_) * K * sizeof(float));
}

template <class T>
void scatter(const float* from, int64_t stride, int64_t T_, int64_t K, float scale, T* to) {
  for (int64_t t = 0; t < T_; t++)
#pragma omp simd
    for (int64_t k = 0; k < K; k++) put(to[t * stride + k], from[t * K + k] * scale);
}

// Blocks of keys, each transposed to (K x BLOCK).
void transpose_blocks(const float* from, int64_t padded, int64_t K, float* to) {
  for (int64_t j = 0; j < padded; j += BLOCK)
    for (int64_t k = 0; k < K; k++)
      for (int64_t i = 0; i < BLOCK; i++) to[j * K + k * BLOCK + i] = from[(j + i) * K + k];
}

// Sets scores of query `t` to -inf for keys that it does not see: those before its document and after
// itself.
inline void hide(float* row, const int64_t* starts, int64_t t, int64_t key) {
  const int64_t first = std::clamp<int64_t>(starts ? starts[t] - key : 0, 0, BLOCK);
  const int64_t last = std::min(BLOCK, t + 1 - key);
  for (int64_t j = 0; j < first; j++) row[j] = -INFINITY;
  for (int64_t j = last; j < BLOCK; j++) row[j] = -INFINITY;
}

struct Shape {
  int64_t B, T, H, G, K, padded;
  Shape(const Tensor& q, const Tensor& k)
      : B(q.size(0)), T(q.size(1)), H(q.size(2)), G(k.size(2)), K(q.size(3)), padded((T + BLOCK - 1) / BLOCK * BLOCK) {
    require(K % LANES == 0 && H % G == 0, "attention: head dim must be a multiple of the vector, heads of KV heads");
  }
  int64_t first_block(const int64_t* starts, int64_t query) const { return starts ? starts[query] / BLOCK * BLOCK : 0; }
};

// One block of queries against all keys that it sees, with an online softmax.
void forward_block(const Shape& s, const float* q, const float* kt, const float* v, const int64_t* starts, int64_t query,
                   float* out, float* lse) {
  const int64_t rows = std::min(BLOCK, s.T - query), K = s.K;
  alignas(64) float scores[BLOCK * BLOCK];
  float top[BLOCK], sum[BLOCK];
  std::fill(top, top + BLOCK, -INFINITY);
  std::fill(sum, sum + BLOCK, 0.0f);
  std::memset(out, 0, BLOCK * K * sizeof(float));
  for (int64_t key = s.first_block(starts, query); key <= query; key += BLOCK) {
    multiply<false>(rows, BLOCK, K, q + query * K, K, 1, kt + key * K, BLOCK, scores, BLOCK);
    for (int64_t i = 0; i < rows; i++) {
      float* row = scores + i * BLOCK;
      hide(row, starts, query + i, key);
      float best = top[i];
#pragma omp simd reduction(max : best)
      for (int64_t j = 0; j < BLOCK; j++) best = row[j] > best ? row[j] : best;
      const float anchor = best == -INFINITY ? 0.0f : best, shrink = fast_exp(top[i] - anchor);
      float total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t j = 0; j < BLOCK; j++) {
        row[j] = fast_exp(row[j] - anchor);
        total += row[j];
      }
      sum[i] = sum[i] * shrink + total;
      top[i] = best;
      if (shrink != 1.0f)
#pragma omp simd
        for (int64_t k = 0; k < K; k++) out[i * K + k] *= shrink;
    }
    multiply<true>(rows, K, BLOCK, scores, BLOCK, 1, v + key * K, K, out, K);
  }
  for (int64_t i = 0; i < rows; i++) {
    const float scale = 1.0f / sum[i];
#pragma omp simd
    for (int64_t k = 0; k < K; k++) out[i * K + k] *= scale;
    lse[query + i] = std::log(sum[i]) + top[i];
  }
}

std::tuple<Tensor, Tensor> forward(Tensor q_, Tensor k_, Tensor v_, std::optional<Tensor> starts_, double scale) {
  const Shape s(q_, k_);
  const int64_t R = s.H / s.G, K = s.K, T_ = s.T;
  Tensor out_ = fresh_like(q_);
  Tensor lse_ = fresh({s.B, s.H, T_}, ScalarType::Float);
  by_type(q_, [&]<class T>(T*) {
    parallel(s.B * s.G, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(4 * s.padded * K + BLOCK * K);
      float *q = scratch.data(), *k = q + s.padded * K, *v = k + s.padded * K, *kt = v + s.padded * K;
      float* out = kt + s.padded * K;
      for (int64_t unit = begin; unit < end; unit++) {
        const int64_t b = unit / s.G, g = unit % s.G;
        const int64_t* starts = starts_ ? data<int64_t>(*starts_) + b * T_ : nullptr;
        gather(data<T>(k_) + (b * T_ * s.G + g) * K, s.G * K, T_, s.padded, K, 1.0f, k);
        gather(data<T>(v_) + (b * T_ * s.G + g) * K, s.G * K, T_, s.padded, K, 1.0f, v);
        transpose_blocks(k, s.padded, K, kt);
        for (int64_t h = g * R; h < (g + 1) * R; h++) {
          const int64_t head = (b * T_ * s.H + h) * K;
          gather(data<T>(q_) + head, s.H * K, T_, s.padded, K, float(scale), q);
          for (int64_t query = 0; query < T_; query += BLOCK) {
            forward_block(s, q, kt, v, starts, query, out, data<float>(lse_) + (b * s.H + h) * T_);
            scatter(out, s.H * K, std::min(BLOCK, T_ - query), K, 1.0f, data<T>(out_) + head + query * s.H * K);
          }
        }
      }
    });
  });
  return {out_, lse_};
}

// Inputs and sums of the backward of one query head; all are (padded x K), fp32, contiguous.
struct Head {
  const float *q, *d_out, *lse, *delta;
  float* d_q;
};

// All queries of one head against one block of keys: the probabilities again, then the three gradients.
void backward_block(const Shape& s, const Head& head, const float* k, const float* kt, const float* vt,
                    const int64_t* starts, int64_t key, float* d_k, float* d_v) {
  alignas(64) float p[BLOCK * BLOCK], d_p[BLOCK * BLOCK];
  const int64_t K = s.K;
  for (int64_t query = key; query < s.T; query += BLOCK) {
    if (s.first_block(starts, query) > key) break;  // this and all later queries are in later documents
    const int64_t rows = std::min(BLOCK, s.T - query);
    multiply<false>(rows, BLOCK, K, head.q + query * K, K, 1, kt + key * K, BLOCK, p, BLOCK);
    multiply<false>(rows, BLOCK, K, head.d_out + query * K, K, 1, vt + key * K, BLOCK, d_p, BLOCK);
    for (int64_t i = 0; i < rows; i++) {
      float *p_row = p + i * BLOCK, *d_row = d_p + i * BLOCK;
      const float lse = head.lse[query + i], delta = head.delta[query + i];
      hide(p_row, starts, query + i, key);
#pragma omp simd
      for (int64_t j = 0; j < BLOCK; j++) {
        p_row[j] = fast_exp(p_row[j] - lse);
        d_row[j] = p_row[j] * (d_row[j] - delta);
      }
    }
    multiply<true>(BLOCK, K, rows, p, 1, BLOCK, head.d_out + query * K, K, d_v + key * K, K);
    multiply<true>(BLOCK, K, rows, d_p, 1, BLOCK, head.q + query * K, K, d_k + key * K, K);
    multiply<true>(rows, K, BLOCK, d_p, BLOCK, 1, k + key * K, K, head.d_q + query * K, K);
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor d_out_, Tensor q_, Tensor k_, Tensor v_, Tensor out_, Tensor lse_,
                                            std::optional<Tensor> starts_, double scale) {
  const Shape s(q_, k_);
  const int64_t R = s.H / s.G, K = s.K, T_ = s.T, size = s.padded * K;
  Tensor d_q_ = fresh_like(q_), d_k_ = fresh_like(k_), d_v_ = fresh_like(v_);
  by_type(q_, [&]<class T>(T*) {
    parallel(s.B * s.G, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(9 * size + s.padded);
      float *q = scratch.data(), *k = q + size, *v = k + size, *kt = v + size, *vt = kt + size;
      float *d_out = vt + size, *d_q = d_out + size, *d_k = d_q + size, *d_v = d_k + size, *delta = d_v + size;
      for (int64_t unit = begin; unit < end; unit++) {
        const int64_t b = unit / s.G, g = unit % s.G, shared = (b * T_ * s.G + g) * K;
        const int64_t* starts = starts_ ? data<int64_t>(*starts_) + b * T_ : nullptr;
        gather(data<T>(k_) + shared, s.G * K, T_, s.padded, K, 1.0f, k);
        gather(data<T>(v_) + shared, s.G * K, T_, s.padded, K, 1.0f, v);
        transpose_blocks(k, s.padded, K, kt);
        transpose_blocks(v, s.padded, K, vt);
        std::memset(d_k, 0, 2 * size * sizeof(float));
        for (int64_t h = g * R; h < (g + 1) * R; h++) {
          const int64_t at = (b * T_ * s.H + h) * K;
          gather(data<T>(q_) + at, s.H * K, T_, s.padded, K, float(scale), q);
          gather(data<T>(d_out_) + at, s.H * K, T_, s.padded, K, 1.0f, d_out);
          for (int64_t t = 0; t < T_; t++) {  // delta = sum of out * d_out, which softmax's gradient subtracts
            const T* out = data<T>(out_) + at + t * s.H * K;
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < K; i++) dot += get(out[i]) * d_out[t * K + i];
            delta[t] = dot;
          }
          std::memset(d_q, 0, size * sizeof(float));
          const Head head{q, d_out, data<float>(lse_) + (b * s.H + h) * T_, delta, d_q};
          for (int64_t key = 0; key < T_; key += BLOCK) backward_block(s, head, k, kt, vt, starts, key, d_k, d_v);
          scatter(d_q, s.H * K, T_, K, float(scale), data<T>(d_q_) + at);
        }
        scatter(d_k, s.G * K, T_, K, 1.0f, data<T>(d_k_) + shared);  // q was scaled before
        scatter(d_v, s.G * K, T_, K, 1.0f, data<T>(d_v_) + shared);
      }
    });
  });
  return {d_q_, d_k_, d_v_};
}

}  // namespace
}  // namespace herd

STABLE_TORCH_LIBRARY_FRAGMENT(herd_native, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? starts, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? starts, float scale)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(herd_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&herd::forward));
  m.impl("attention_backward", TORCH_BOX(&herd::backward));
}
