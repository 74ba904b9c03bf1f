// RMSNorm, rotary positions and SwiGLU, forward and backward, with one pass over memory each; statistics
// are in fp32. References in plain torch: pointwise.py. Rows are tokens.
#include "operators.h"

namespace herd {
namespace {

constexpr int64_t ROWS = 64;  // of a unit of work; sums are made per unit, so they do not depend on threads

int64_t blocks_of(int64_t n) { return (n + ROWS - 1) / ROWS; }

}  // namespace

// y = weight * cast(x * rstd), rstd = 1 / sqrt(mean(x^2) + eps); y in x's type, or in bf16 for a matmul that wants it
std::tuple<Tensor, Tensor> rms_norm(Tensor x_ND, Tensor weight_D, double eps, bool narrow) {
  const int64_t N = x_ND.size(0), D = x_ND.size(1);
  Tensor y_ND = fresh({N, D}, narrow ? ScalarType::BFloat16 : x_ND.scalar_type());
  Tensor rstd_N = fresh({N}, ScalarType::Float);
  by_types(x_ND, y_ND, [&]<class T, class Y>(T*, Y*) {
    const T *x = data<T>(x_ND), *weight = data<T>(weight_D);
    Y* y = data<Y>(y_ND);
    float* rstd = data<float>(rstd_N);
    parallel(N, ROWS, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const T* row = x + n * D;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < D; d++) sum += get(row[d]) * get(row[d]);
        const float r = rstd[n] = 1.0f / std::sqrt(sum / float(D) + float(eps));
#pragma omp simd
        for (int64_t d = 0; d < D; d++) {
          T normed;
          put(normed, get(row[d]) * r);
          put(y[n * D + d], get(weight[d]) * get(normed));
        }
      }
    });
  });
  return {y_ND, rstd_N};
}

// dx = rstd (w dy - x rstd^2 mean(w dy x)); dw = sum over tokens of dy x rstd, as a partial sum per unit of
// work
std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy_ND, Tensor x_ND, Tensor weight_D, Tensor rstd_N) {
  const int64_t N = x_ND.size(0), D = x_ND.size(1), units = blocks_of(N);
  Tensor dx_ND = fresh_like(x_ND);
  Tensor dw_UD = fresh({units, D}, ScalarType::Float);
  by_types(x_ND, dy_ND, [&]<class T, class Y>(T*, Y*) {
    const Y* dy = data<Y>(dy_ND);
    const T *x = data<T>(x_ND), *weight = data<T>(weight_D);
    const float* rstd = data<float>(rstd_N);
    parallel(units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; u++) {
        float* dw = data<float>(dw_UD) + u * D;
        std::memset(dw, 0, D * sizeof(float));
        for (int64_t n = u * ROWS; n < std::min(N, (u + 1) * ROWS); n++) {
          const Y* dy_row = dy + n * D;
          const T* x_row = x + n * D;
          T* dx_row = data<T>(dx_ND) + n * D;
          const float r = rstd[n];
          float dot = 0;
#pragma omp simd reduction(+ : dot)
          for (int64_t d = 0; d < D; d++) dot += get(dy_row[d]) * get(x_row[d]) * get(weight[d]);
          const float pull = dot * r * r * r / float(D);
#pragma omp simd
          for (int64_t d = 0; d < D; d++) {
            const float dy_r = r * get(dy_row[d]);
            dw[d] += dy_r * get(x_row[d]);
            put(dx_row[d], get(weight[d]) * dy_r - get(x_row[d]) * pull);
          }
        }
      }
    });
  });
  return {dx_ND, dw_UD};
}

// Rotates channel pairs (i, i + K/2) of x (B, T, H, K) by angles cos/sin (B or 1, T, K/2 of them used);
// sign -1 rotates back.
Tensor rotate(Tensor x_BTHK, Tensor cos_BTK, Tensor sin_BTK, double sign) {
  const int64_t B = x_BTHK.size(0), T_ = x_BTHK.size(1), H = x_BTHK.size(2), K = x_BTHK.size(3), half = K / 2;
  const bool shared = cos_BTK.size(0) == 1;
  Tensor out = fresh_like(x_BTHK);
  by_types(x_BTHK, cos_BTK, [&]<class T, class A>(T*, A*) {
    const T* x = data<T>(x_BTHK);
    const A *cos = data<A>(cos_BTK), *sin = data<A>(sin_BTK);
    T* y = data<T>(out);
    parallel(B * T_, ROWS, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const int64_t angle = (shared ? n % T_ : n) * K;
        for (int64_t h = 0; h < H; h++) {
          const T* from = x + (n * H + h) * K;
          T* to = y + (n * H + h) * K;
#pragma omp simd
          for (int64_t i = 0; i < half; i++) {
            const float a = get(from[i]), b = get(from[i + half]);
            const float c = get(cos[angle + i]), s = float(sign) * get(sin[angle + i]);
            put(to[i], a * c - b * s);
            put(to[i + half], b * c + a * s);
          }
        }
      }
    });
  });
  return out;
}

// silu(gate) * up
Tensor swiglu(Tensor gate, Tensor up) {
  Tensor out = fresh_like(gate);
  by_type(gate, [&]<class T>(T*) {
    const T *g = data<T>(gate), *u = data<T>(up);
    T* y = data<T>(out);
    parallel(gate.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; i++) {
        const float x = get(g[i]);
        put(y[i], x / (1.0f + fast_exp(-x)) * get(u[i]));
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor dy_, Tensor gate, Tensor up) {
  Tensor dgate = fresh_like(gate), dup = fresh_like(up);
  by_type(gate, [&]<class T>(T*) {
    const T *dy = data<T>(dy_), *g = data<T>(gate), *u = data<T>(up);
    T *dg = data<T>(dgate), *du = data<T>(dup);
    parallel(gate.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; i++) {
        const float x = get(g[i]), d = get(dy[i]), gate_share = 1.0f / (1.0f + fast_exp(-x)), silu = x * gate_share;
        put(dg[i], d * get(u[i]) * (gate_share + silu * (1.0f - gate_share)));
        put(du[i], d * silu);
      }
    });
  });
  return {dgate, dup};
}

}  // namespace herd

STABLE_TORCH_LIBRARY_FRAGMENT(herd_native, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool narrow) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)");
  m.def("rotate(Tensor x, Tensor cos, Tensor sin, float sign) -> Tensor");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(herd_native, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&herd::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&herd::rms_norm_backward));
  m.impl("rotate", TORCH_BOX(&herd::rotate));
  m.impl("swiglu", TORCH_BOX(&herd::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&herd::swiglu_backward));
}
