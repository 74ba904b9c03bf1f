// Decoder layers with a paged cache and quantized weights: their operators one after the other, without
// Python between them. A decode step fills the caches with weights, so every return to the interpreter would
// have to load its code and objects from memory again.
#include "operators.h"

namespace herd {
namespace {

constexpr int64_t GRAIN = 1 << 14;

// x += y, added in fp32
void add(const Tensor& x, const Tensor& y) {
  by_type(x, [&]<class T>(T*) {
    T* to = data<T>(x);
    const T* from = data<T>(y);
    parallel(x.numel(), GRAIN, [&](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; i++) put(to[i], get(to[i]) + get(from[i]));
    });
  });
}

// One layer: x (N, D) becomes its output. norms: before attention and before the feed-forward; matrices: q, k,
// v, o, gate, up, down.
struct Layer {
  const Tensor* norms;
  const Tensor* matrices;
  const int64_t* formats;
  int64_t path;
  double eps;

  Tensor norm(const Tensor& x, int i) const { return std::get<0>(rms_norm(x, norms[i], eps, false)); }
  std::vector<Tensor> times(const Tensor& x, int first, int end) const {
    return qmatmul(x, {matrices + first, matrices + end}, {formats + first, formats + end}, path);
  }

  void apply(const Tensor& x_ND, const Tensor& cos, const Tensor& sin, const Tensor& pool, const Tensor& tables,
             const Tensor& rows, int64_t layer) const {
    const int64_t N = x_ND.size(0), K = cos.size(cos.dim() - 1);
    const auto heads = [&](const Tensor& x) { return reshaped(x, {1, N, x.size(1) / K, K}); };
    const auto flat = [&](const Tensor& x) { return reshaped(x, {N, x.numel() / (N * K), K}); };
    {
      const std::vector<Tensor> qkv = times(norm(x_ND, 0), 0, 3);
      const Tensor q = rotate(heads(qkv[0]), cos, sin, 1), k = rotate(heads(qkv[1]), cos, sin, 1);
      const Tensor seen = paged_attention(flat(q), flat(k), flat(qkv[2]), pool, tables, rows, layer);
      add(x_ND, times(reshaped(seen, {N, seen.size(1) * K}), 3, 4)[0]);
    }
    const std::vector<Tensor> wide = times(norm(x_ND, 1), 4, 6);
    add(x_ND, times(swiglu(wide[0], wide[1]), 6, 7)[0]);
  }
};

// The output of layers first, first + 1, … for x (N, D), which is not changed. Two norms and seven matrices each.
Tensor blocks(Tensor x_ND, std::vector<Tensor> norms, std::vector<Tensor> matrices, std::vector<int64_t> formats,
              int64_t path, double eps, Tensor cos, Tensor sin, Tensor pool, Tensor tables, Tensor rows, int64_t first) {
  const int64_t n = norms.size() / 2;
  require(norms.size() % 2 == 0 && int64_t(matrices.size()) == 7 * n && int64_t(formats.size()) == 7 * n,
          "a block has two norms and seven matrices");
  require(x_ND.is_contiguous() && cos.is_contiguous() && sin.is_contiguous(), "a block takes contiguous tensors");
  Tensor out_ND = fresh_like(x_ND);
  by_type(x_ND, [&]<class T>(T*) { std::memcpy(data<T>(out_ND), data<T>(x_ND), x_ND.numel() * sizeof(T)); });
  for (int64_t i = 0; i < n; i++)
    Layer{&norms[2 * i], &matrices[7 * i], &formats[7 * i], path, eps}.apply(out_ND, cos, sin, pool, tables, rows,
                                                                           first + i);
  return out_ND;
}

}  // namespace
}  // namespace herd

STABLE_TORCH_LIBRARY_FRAGMENT(herd_native, m) {
  m.def(
      "blocks(Tensor x, Tensor[] norms, Tensor[] matrices, int[] formats, int path, float eps, Tensor cos, Tensor sin, "
      "Tensor(a!) pool, Tensor tables, Tensor rows, int first) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(herd_native, CPU, m) { m.impl("blocks", TORCH_BOX(&herd::blocks)); }
