// Turns a chunk of logits into its own gradient, a row at a time: one row of a large vocabulary stays in L2
// during all passes. Reference in plain torch: softmax.py.
#include "common.h"

namespace herd {
namespace {

template <class T>
float largest(const T* x, int64_t n) {
  float best = -INFINITY;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < n; i++) best = get(x[i]) > best ? get(x[i]) : best;
  return best;
}

// One row of numerators in fp32: in place of the logits if they are fp32, else in the thread's scratch
// memory.
float* numerators(float* row, std::vector<float>&, int64_t) { return row; }
float* numerators(bf16*, std::vector<float>& scratch, int64_t V) {
  scratch.resize(V);
  return scratch.data();
}

// logits_CV, targets_C int64 -> losses_C fp32; logits become softmax - onehot.
Tensor cross_entropy(Tensor logits_CV, Tensor targets_C, bool with_gradient) {
  const int64_t C = logits_CV.size(0), V = logits_CV.size(1);
  Tensor losses_C = fresh({C}, ScalarType::Float);
  float* losses = data<float>(losses_C);
  const int64_t* targets = data<int64_t>(targets_C);
  by_type(logits_CV, [&]<class T>(T*) {
    parallel(C, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch;
      for (int64_t c = begin; c < end; c++) {
        T* row = data<T>(logits_CV) + c * V;
        const float top = largest(row, V), picked = get(row[targets[c]]);
        float *e = numerators(row, scratch, V), sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t v = 0; v < V; v++) {
          e[v] = fast_exp(get(row[v]) - top);
          sum += e[v];
        }
        losses[c] = std::log(sum) + top - picked;
        if (!with_gradient) continue;
        const float scale = 1.0f / sum, at_target = e[targets[c]] * scale - 1.0f;
#pragma omp simd
        for (int64_t v = 0; v < V; v++) put(row[v], e[v] * scale);
        put(row[targets[c]], at_target);
      }
    });
  });
  return losses_C;
}

// Cross-entropy and KL of every row; the student's logits become the gradient of their mixture.
std::tuple<Tensor, Tensor> distil(Tensor student_CV, Tensor teacher_CV, Tensor targets_C, double tau, double kl_weight) {
  const int64_t C = student_CV.size(0), V = student_CV.size(1);
  Tensor ce_C = fresh({C}, ScalarType::Float);
  Tensor kl_C = fresh({C}, ScalarType::Float);
  require(student_CV.scalar_type() == teacher_CV.scalar_type(), "distil_: student and teacher differ in dtype");
  const int64_t* targets = data<int64_t>(targets_C);
  float *ces = data<float>(ce_C), *kls = data<float>(kl_C);
  const float cool = float(1.0 / tau);
  by_type(student_CV, [&]<class T>(T*) {
    parallel(C, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> teacher_scratch;
      for (int64_t c = begin; c < end; c++) {
        T *s = data<T>(student_CV) + c * V, *t = data<T>(teacher_CV) + c * V;
        const float top_s = largest(s, V), top_t = largest(t, V), picked = get(s[targets[c]]);
        float *p = numerators(t, teacher_scratch, V), sum = 0, soft_s = 0, soft_t = 0, cross = 0;
#pragma omp simd reduction(+ : sum, soft_s, soft_t, cross)
        for (int64_t v = 0; v < V; v++) {
          const float ds = get(s[v]) - top_s, dt = get(t[v]) - top_t, e = fast_exp(dt * cool);
          sum += fast_exp(ds);
          soft_s += fast_exp(ds * cool);
          soft_t += e;
          cross += e * (dt - ds);
          p[v] = e;
        }
        ces[c] = std::log(sum) + top_s - picked;
        kls[c] = cross * cool / soft_t + std::log(soft_s) - std::log(soft_t);
        const float q_scale = float(kl_weight * tau) / soft_s, p_scale = float(kl_weight * tau) / soft_t;
        const float ce_scale = float(1 - kl_weight) / sum;
        const auto gradient = [&](float ds, float numerator) {
          return q_scale * fast_exp(ds * cool) - p_scale * numerator + ce_scale * fast_exp(ds);
        };
        const float at_target = gradient(picked - top_s, p[targets[c]]) - float(1 - kl_weight);
#pragma omp simd
        for (int64_t v = 0; v < V; v++) put(s[v], gradient(get(s[v]) - top_s, p[v]));
        put(s[targets[c]], at_target);
      }
    });
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
