// Plain C++ for every processor: four rows per vector, which the compiler translates.
#include "qmatmul.h"

#include <utility>

#if defined(HERD_PORTABLE)

namespace herd::quantized {
namespace {

#include "qmatmul_kernel.h"

struct Portable {
  static constexpr int LANES = 4, GROUP = 4, PAIRED = 2;
  static constexpr bool WHOLE_BYTES = true;
  typedef int32_t Ints __attribute__((vector_size(16), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(16), aligned(4), may_alias));
  typedef float Floats __attribute__((vector_size(16), aligned(4), may_alias));

  static Ints all(int32_t x) { return Ints{x, x, x, x}; }
  static Floats all(float x) { return Floats{x, x, x, x}; }
  static Ints dot(Ints sum, Ints codes, Ints x) {
    for (int k = 0; k < 4; k++) sum += (right<Portable>(codes, 8 * k) & 255) * ((x << (24 - 8 * k)) >> 24);
    return sum;
  }
  static Ints look_up(const uint8_t* table, Ints places) {
    Ints out{};
    for (int i = 0; i < LANES; i++)
      for (int k = 0; k < 32; k += 8) out[i] |= int32_t(table[(places[i] >> k) & 15]) << k;
    return out;
  }
  static Ints widen(const uint16_t* from) { return Ints{from[0], from[1], from[2], from[3]}; }
  static Floats from_halves(Ints x) {
    const Floats size = (Floats)((x & 0x7fff) << 13) * 0x1p112f;  // subnormals included
    const Ints not_finite = ((x & 0x7c00) == 0x7c00) & 0x7f800000;
    return (Floats)((Ints)size | ((x & 0x8000) << 16) | not_finite);
  }
  static Floats fma(Floats a, Floats b, Floats c) {
#ifdef __FP_FAST_FMAF  // otherwise the compiler could fuse in one place and not in another
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
  }
};

constexpr Path PATH = make_path<Portable>("portable C++");

}  // namespace
}  // namespace herd::quantized

const herd::quantized::Path* herd::quantized::portable_path() { return &PATH; }
#else
const herd::quantized::Path* herd::quantized::portable_path() { return nullptr; }
#endif
