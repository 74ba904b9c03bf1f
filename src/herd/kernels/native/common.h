// What all kernels share: element types, a vectorizable exp, torch's thread pool, checks.
//
// Kernels are plain loops that the compiler vectorizes (-O3 -march=native, `omp simd` for sums), so that
// one source serves AVX2, AVX-512 and NEON. They use PyTorch's stable ABI: one binary works with many
// versions of torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace herd {

// Floats in one of the machine's registers. Vectors that are longer than a register are split by compilers into pieces
// that go through memory, which is ten times as slow.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct bf16 {
  uint16_t bits;
};

inline float get(float x) { return x; }
inline float get(bf16 x) {
  const uint32_t wide = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}
inline void put(float& to, float x) { to = x; }
inline void put(bf16& to, float x) {  // round to nearest even; NaN stays NaN
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  to.bits = x == x ? uint16_t(rounded) : uint16_t(0x7fc0);
}

// e^x to 2 ulp for x <= 0 and moderate x > 0; below -87 it is 0. Branch-free, so that loops over it vectorize.
inline float fast_exp(float x) {
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98756911e-4f;
  p = p * r + 1.39819994e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 5.00000001e-1f;
  p = p * r * r + r + 1.0f;
  const float safe = n < -126.0f ? -126.0f : (n > 127.0f ? 127.0f : n);
  const int32_t exponent = (int32_t(safe) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, 4);
  return x < -87.0f ? 0.0f : p * scale;
}

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// Runs `body(begin, end)` on torch's own threads.
template <class Body>
void parallel(int64_t n, int64_t grain, const Body& body) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, body);
}

// Calls `body` with a null pointer of the tensor's element type: fp32 or bf16.
template <class Body>
auto by_type(const Tensor& x, const Body& body) {
  if (x.scalar_type() == ScalarType::Float) return body(static_cast<float*>(nullptr));
  require(x.scalar_type() == ScalarType::BFloat16, "herd kernels take float32 or bfloat16");
  return body(static_cast<bf16*>(nullptr));
}

template <class Body>
void by_types(const Tensor& x, const Tensor& y, const Body& body) {
  by_type(x, [&]<class X>(X* a) { by_type(y, [&]<class Y>(Y* b) { body(a, b); }); });
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// Allocates memory, and views memory in another shape. Torch's own functions go through its dispatcher and
// cost ten times as much; a decode step calls these some hundred times.
inline std::vector<int64_t> strides_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return strides;
}

inline Tensor fresh(const std::vector<int64_t>& sizes, ScalarType type) {
  require(type == ScalarType::Float || type == ScalarType::BFloat16, "herd kernels make float32 or bfloat16");
  const int32_t dtype = type == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides_of(sizes).data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor fresh_like(const Tensor& x) {
  std::vector<int64_t> sizes(x.dim());
  for (size_t i = 0; i < sizes.size(); i++) sizes[i] = x.size(i);
  return fresh(sizes, x.scalar_type());
}

inline Tensor reshaped(const Tensor& x, const std::vector<int64_t>& sizes) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), sizes.size(), sizes.data(),
                                                               strides_of(sizes).data(), x.storage_offset(), &made));
  return Tensor(made);
}

}  // namespace herd
