// A whole decoder layer with a paged cache and quantized weights: its operators one after the other,
// without Python between them. A decode step fills the caches with weights, so every return to the
// interpreter would have to load its code and objects from memory again.
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

// norms: before attention and before the feed-forward; matrices: q, k, v, o, gate, up, down. x (N, D) is
// not changed.
Tensor block(Tensor x_ND, std::vector<Tensor> norms, std::vector<Tensor> matrices, std::vector<int64_t> formats,
             int64_t path, double eps, Tensor cos, Tensor sin, Tensor pool, Tensor tables, Tensor rows, int64_t layer) {
  require(norms.size() == 2 && matrices.size() == 7 && formats.size() == 7, "a block has two norms and seven matrices");
  require(x_ND.is_contiguous() && cos.is_contiguous() && sin.is_contiguous(), "a block takes contiguous tensors");
  const int64_t N = x_ND.size(0), K = cos.size(cos.dim() - 1);
  const auto norm = [&](const Tensor& x, int i) { return std::get<0>(rms_norm(x, norms[i], eps, false)); };
  const auto times = [&](const Tensor& x, int first, int end) {
    return qmatmul(x, {matrices.begin() + first, matrices.begin() + end}, {formats.begin() + first, formats.begin() + end},
                   path);
  };
  const auto heads = [&](const Tensor& x) { return reshaped(x, {1, N, x.size(1) / K, K}); };
  const auto flat = [&](const Tensor& x) { return reshaped(x, {N, x.numel() / (N * K), K}); };

  Tensor out_ND = fresh_like(x_ND);
  by_type(x_ND, [&]<class T>(T*) { std::memcpy(data<T>(out_ND), data<T>(x_ND), x_ND.numel() * sizeof(T)); });
  {
    const std::vector<Tensor> qkv = times(norm(out_ND, 0), 0, 3);
    const Tensor q = rotate(heads(qkv[0]), cos, sin, 1), k = rotate(heads(qkv[1]), cos, sin, 1);
    const Tensor seen = paged_attention(flat(q), flat(k), flat(qkv[2]), pool, tables, rows, layer);
    add(out_ND, times(reshaped(seen, {N, seen.size(1) * K}), 3, 4)[0]);
  }
  const std::vector<Tensor> wide = times(norm(out_ND, 1), 4, 6);
  add(out_ND, times(swiglu(wide[0], wide[1]), 6, 7)[0]);
  return out_ND;
}

}  // namespace
}  // namespace herd

STABLE_TORCH_LIBRARY_FRAGMENT(herd_native, m) {
  m.def(
      "block(Tensor x, Tensor[] norms, Tensor[] matrices, int[] formats, int path, float eps, Tensor cos, Tensor sin, "
      "Tensor(a!) pool, Tensor tables, Tensor rows, int layer) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(herd_native, CPU, m) { m.impl("block", TORCH_BOX(&herd::block)); }
