// A chunk of logits becomes its own gradient, a row at a time: one row of a large vocabulary stays in L2 through all
// passes. Reference in plain torch: softmax.py.
#include "common.h"

namespace herd {
namespace {

float largest(const float* x, int64_t n) {
  float best = -INFINITY;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < n; i++) best = x[i] > best ? x[i] : best;
  return best;
}

// logits_CV fp32, targets_C int64 -> losses_C; logits become softmax - onehot.
Tensor cross_entropy(Tensor logits_CV, Tensor targets_C, bool with_gradient) {
  const int64_t C = logits_CV.size(0), V = logits_CV.size(1);
  Tensor losses_C = torch::stable::new_empty(logits_CV, {C});
  float* logits = data<float>(logits_CV);
  float* losses = data<float>(losses_C);
  const int64_t* targets = data<int64_t>(targets_C);
  parallel(C, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      float* row = logits + c * V;
      const float top = largest(row, V), picked = row[targets[c]];
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t v = 0; v < V; v++) {
        row[v] = fast_exp(row[v] - top);
        sum += row[v];
      }
      losses[c] = std::log(sum) + top - picked;
      if (!with_gradient) continue;
      const float scale = 1.0f / sum;
#pragma omp simd
      for (int64_t v = 0; v < V; v++) row[v] *= scale;
      row[targets[c]] -= 1.0f;
    }
  });
  return losses_C;
}

// Cross-entropy and KL of every row; the student's logits become the gradient of their mixture.
std::tuple<Tensor, Tensor> distil(Tensor student_CV, Tensor teacher_CV, Tensor targets_C, double tau, double kl_weight) {
  const int64_t C = student_CV.size(0), V = student_CV.size(1);
  Tensor ce_C = torch::stable::new_empty(student_CV, {C}), kl_C = torch::stable::new_empty(student_CV, {C});
  const int64_t* targets = data<int64_t>(targets_C);
  float *ces = data<float>(ce_C), *kls = data<float>(kl_C);
  const float cool = float(1.0 / tau);
  parallel(C, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      float *s = data<float>(student_CV) + c * V, *t = data<float>(teacher_CV) + c * V;
      const float top_s = largest(s, V), top_t = largest(t, V), picked = s[targets[c]];
      float sum = 0, soft_s = 0, soft_t = 0, cross = 0;
#pragma omp simd reduction(+ : sum, soft_s, soft_t, cross)
      for (int64_t v = 0; v < V; v++) {
        const float ds = s[v] - top_s, dt = t[v] - top_t, p = fast_exp(dt * cool);
        sum += fast_exp(ds);
        soft_s += fast_exp(ds * cool);
        soft_t += p;
        cross += p * (dt - ds);
        t[v] = p;
      }
      ces[c] = std::log(sum) + top_s - picked;
      kls[c] = cross * cool / soft_t + std::log(soft_s) - std::log(soft_t);
      const float q_scale = float(kl_weight * tau) / soft_s, p_scale = float(kl_weight * tau) / soft_t;
      const float ce_scale = float(1 - kl_weight) / sum;
#pragma omp simd
      for (int64_t v = 0; v < V; v++) {
        const float ds = s[v] - top_s;
        s[v] = q_scale * fast_exp(ds * cool) - p_scale * t[v] + ce_scale * fast_exp(ds);
      }
      s[targets[c]] -= float(1 - kl_weight);
    }
  });
  return {ce_C, kl_C};
}

}  // namespace
}  // namespace herd

STABLE_TORCH_LIBRARY_FRAGMENT(herd_native, m) {
  m.def("cross_entropy_(Tensor(a!) logits, Tensor targets, bool with_gradient) -> Tensor");
  m.def("distil_(Tensor(a!) student, Tensor(b!) teacher, Tensor targets, float tau, float kl_weight) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(herd_native, CPU, m) {
  m.impl("cross_entropy_", TORCH_BOX(&herd::cross_entropy));
  m.impl("distil_", TORCH_BOX(&herd::distil));
}
