// The kernel itself, written once for every instruction set. An `Isa` defines how many rows fit into a
// vector and how four unsigned codes per row are multiplied by four signed activations: by one instruction
// (WHOLE_BYTES, dot), or in pairs (add_pairs, add_sums). The rest uses GCC's vector types, which every target has.
// qmatmul_x86.h and qmatmul_portable.cpp include this file within their own anonymous namespaces.

template <class Isa>
using Ints = typename Isa::Ints;
template <class Isa>
using Floats = typename Isa::Floats;

constexpr int NEVER = MOST_TOKENS + 1;  // more than a group has

template <class Isa>
inline Ints<Isa> load(const uint8_t* from) {
  return *(const Ints<Isa>*)from;
}

template <class Isa>
inline Ints<Isa> right(Ints<Isa> x, int bits) {
  return (Ints<Isa>)((typename Isa::Bits)x >> bits);
}

// Weights. A format has GGUF's number CODE, and a block of WORDS 32-bit words and a half-precision scale at byte
// HALF_AT (-1: among the words). The block has BLOCKS groups of 32 weights, of which TOGETHER share words. A
// format returns unsigned codes for quad j (four weights per row) of group k among the n-th that share words,
// and each group's scales. The activations' negated sum, shifted left by START, stands for a code of zero.
// PARTS: scales per 32 weights. MOST: the largest code. LOW: whether there is also a lowest weight. FETCH: the number
// of tokens from which weights are prefetched by hand. IN_MEMORY: whether they are not in a cache.
struct Format {
  static constexpr int HALF_AT = -1, BLOCKS = 8, TOGETHER = 1, PARTS = 1, START = 31, FETCH = 2, MOST = 15;
  static constexpr bool LOW = false, IN_MEMORY = true;
  const uint8_t* words;
  const uint16_t* halves;
};

// Step and lowest weight are the two halves of a word.
template <class Isa>
inline Floats<Isa> low_half(const uint8_t* word) {
  return Isa::from_halves(load<Isa>(word) & 0xffff);
}
template <class Isa>
inline Floats<Isa> high_half(const uint8_t* word) {
  return Isa::from_halves(right<Isa>(load<Isa>(word), 16));
}
template <class Isa>
inline Floats<Isa> scaled(Floats<Isa> unit, Ints<Isa> by) {
  return unit * __builtin_convertvector(by, Floats<Isa>);
}

// Nibbles of quad j in four words from `first` on: the first quads are in the low ones.
template <class Isa>
inline Ints<Isa> nibbles(const uint8_t* first, int j) {
  const Ints<Isa> w = load<Isa>(first + (j & 3) * WORD_BYTES);
  return (j < 4 ? w : right<Isa>(w, 4)) & 0x0f0f0f0f;
}

// Four bits of `high` from bit 4 j on, one at bit 4 of each byte: the fifth bits of the codes of quad j.
template <class Isa>
inline Ints<Isa> fifth_bits(Ints<Isa> high, int j) {
  const Ints<Isa> bits = right<Isa>(high, 4 * j) & 15;
  return ((bits << 4) | (bits << 11) | (bits << 18) | (bits << 25)) & 0x10101010;
}

// 32 codes of four or FIFTH bits with a step; AFFINE: and a lowest weight.
template <class Isa, int NUMBER, bool FIFTH, bool AFFINE>
struct Simple : Format {
  static constexpr int CODE = NUMBER, WORDS = 4 + FIFTH + AFFINE, BLOCKS = 1;
  static constexpr int HALF_AT = AFFINE ? -1 : 0, START = AFFINE ? 31 : 3 + FIFTH, MOST = FIFTH ? 31 : 15;
  static constexpr bool LOW = AFFINE;
  Ints<Isa> codes(int64_t, int, int j) const {
    const Ints<Isa> low = nibbles<Isa>(words + (FIFTH + AFFINE) * WORD_BYTES, j);
    if constexpr (FIFTH) return low | fifth_bits<Isa>(load<Isa>(words + AFFINE * WORD_BYTES), j);
    else return low;
  }
  Floats<Isa> step(int, int) const {
    if constexpr (AFFINE) return low_half<Isa>(words);
    else return Isa::from_halves(Isa::widen(halves));
  }
  Floats<Isa> low(int, int) const { return -high_half<Isa>(words); }
};

template <class Isa>
struct Q8_0 : Format {
  static constexpr int CODE = 8, WORDS = 8, HALF_AT = 0, BLOCKS = 1, START = 7, FETCH = NEVER, MOST = 255;
  Ints<Isa> codes(int64_t, int, int j) const { return load<Isa>(words + j * WORD_BYTES) ^ int32_t(0x80808080); }
  Floats<Isa> step(int, int) const { return Isa::from_halves(Isa::widen(halves)); }
};

template <class Isa>
struct Q4_K : Format {
  static constexpr int CODE = 12, WORDS = 36, TOGETHER = 2;
  static constexpr bool LOW = true;
  // Odd groups have the high nibbles. Where a product takes whole bytes they stay there, and the step is a
  // 16th of the scale.
  Ints<Isa> codes(int64_t n, int k, int j) const {
    const Ints<Isa> w = load<Isa>(words + (4 + n * 8 + j) * WORD_BYTES);
    if constexpr (Isa::WHOLE_BYTES) return w & (k ? int32_t(0xf0f0f0f0) : 0x0f0f0f0f);
    else return right<Isa>(w, 4 * k) & 0x0f0f0f0f;
  }
  Floats<Isa> step(int g, int) const {
    Floats<Isa> d = low_half<Isa>(words);
    if (Isa::WHOLE_BYTES && g & 1) d *= 0.0625f;
    return scaled<Isa>(d, six_bits(g, 1, 0));
  }
  Floats<Isa> low(int g, int) const { return scaled<Isa>(high_half<Isa>(words), six_bits(g, 2, 4)); }
  // Scales are in word 1 and lows in word 2; of the last four of each, four bits are in word 3 and two
  // above the first ones.
  Ints<Isa> six_bits(int g, int word, int nibble) const {
    const Ints<Isa> whole = right<Isa>(load<Isa>(words + word * WORD_BYTES), 8 * (g & 3));
    if (g < 4) return whole & 63;
    const Ints<Isa> split = right<Isa>(load<Isa>(words + 3 * WORD_BYTES), 8 * (g & 3) + nibble);
    return (split & 15) | (right<Isa>(whole, 2) & 0x30);
  }
};

template <class Isa>
struct Q6_K : Format {
  static constexpr int CODE = 14, WORDS = 52, HALF_AT = 208, TOGETHER = 4, PARTS = 2, START = 5, FETCH = 1, MOST = 63;
  Ints<Isa> codes(int64_t n, int k, int j) const {
    const Ints<Isa> ql = load<Isa>(words + (n * 16 + (k & 1) * 8 + j) * WORD_BYTES);
    const Ints<Isa> qh = load<Isa>(words + (32 + n * 8 + j) * WORD_BYTES);
    return (right<Isa>(ql, 4 * (k >> 1)) & 0x0f0f0f0f) | ((right<Isa>(qh, 2 * k) & 0x03030303) << 4);
  }
  Floats<Isa> step(int g, int part) const {
    const Ints<Isa> scales = load<Isa>(words + (48 + (g >> 1)) * WORD_BYTES);
    const Ints<Isa> scale = (scales << (24 - 8 * ((g & 1) * 2 + part))) >> 24;  // sign extended
    return scaled<Isa>(Isa::from_halves(Isa::widen(halves)), scale);
  }
};

template <class Isa>
struct Q5_K : Q4_K<Isa> {
  static constexpr int CODE = 13, WORDS = 44, MOST = 31;
  Ints<Isa> codes(int64_t n, int k, int j) const {
    const Ints<Isa> w = load<Isa>(this->words + (12 + n * 8 + j) * WORD_BYTES);
    const Ints<Isa> high = right<Isa>(load<Isa>(this->words + (4 + j) * WORD_BYTES), int(n) * 2 + k);
    return (right<Isa>(w, 4 * k) & 0x0f0f0f0f) | ((high & 0x01010101) << 4);
  }
  Floats<Isa> step(int g, int) const { return scaled<Isa>(low_half<Isa>(this->words), this->six_bits(g, 1, 0)); }
};

// The two low bits of the codes of quad j, in word n * 8 + j after `first`, shifted by 2 k.
template <class Isa>
inline Ints<Isa> two_bits(const uint8_t* first, int64_t n, int k, int j) {
  return right<Isa>(load<Isa>(first + (n * 8 + j) * WORD_BYTES), 2 * k) & 0x03030303;
}

template <class Isa>
struct Q3_K : Format {
  static constexpr int CODE = 11, WORDS = 27, HALF_AT = 108, TOGETHER = 4, PARTS = 2, START = 2, FETCH = 1, MOST = 7;
  Ints<Isa> codes(int64_t n, int k, int j) const {
    const Ints<Isa> high = right<Isa>(load<Isa>(words + j * WORD_BYTES), int(n) * 4 + k);
    return two_bits<Isa>(words + 8 * WORD_BYTES, n, k, j) | ((high & 0x01010101) << 2);
  }
  // Four bits of a scale are in words 24 and 25, two in word 26; 32 stands for zero.
  Floats<Isa> step(int g, int part) const {
    const int s = 2 * g + part, word = s >> 2, shift = 8 * (s & 3);
    const Ints<Isa> low = right<Isa>(load<Isa>(words + (24 + (word & 1)) * WORD_BYTES), shift + 4 * (word >> 1));
    const Ints<Isa> high = right<Isa>(load<Isa>(words + 26 * WORD_BYTES), shift + 2 * word);
    const Ints<Isa> scale = ((low & 15) | ((high & 3) << 4)) - 32;
    return scaled<Isa>(Isa::from_halves(Isa::widen(halves)), scale);
  }
};

template <class Isa>
struct Q2_K : Format {
  static constexpr int CODE = 10, WORDS = 21, TOGETHER = 4, PARTS = 2, FETCH = 1, MOST = 3;
  static constexpr bool LOW = true;
  Ints<Isa> codes(int64_t n, int k, int j) const { return two_bits<Isa>(words + 4 * WORD_BYTES, n, k, j); }
  // Byte 2 g + part of words 0 to 3 has the scale in its low and the lowest weight in its high bits.
  Ints<Isa> four_bits(int g, int part, int shift) const {
    const int s = 2 * g + part;
    return right<Isa>(load<Isa>(words + (s >> 2) * WORD_BYTES), 8 * (s & 3) + shift) & 15;
  }
  Floats<Isa> step(int g, int part) const {
    return scaled<Isa>(low_half<Isa>(words + 20 * WORD_BYTES), four_bits(g, part, 0));
  }
  Floats<Isa> low(int g, int part) const {
    return scaled<Isa>(high_half<Isa>(words + 20 * WORD_BYTES), four_bits(g, part, 4));
  }
};

// The sixteen values that a code of IQ4_NL and IQ4_XS stands for, plus 128.
alignas(16) constexpr uint8_t IQ4[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

template <class Isa>
struct IQ4_NL : Format {
  static constexpr int CODE = 20, WORDS = 4, HALF_AT = 0, BLOCKS = 1, START = 7, MOST = 255;
  Ints<Isa> codes(int64_t, int, int j) const { return Isa::look_up(IQ4, nibbles<Isa>(words, j)); }
  Floats<Isa> step(int, int) const { return Isa::from_halves(Isa::widen(halves)); }
};

template <class Isa>
struct IQ4_XS : Format {
  static constexpr int CODE = 23, WORDS = 34, START = 7, MOST = 255;
  Ints<Isa> codes(int64_t n, int, int j) const {
    return Isa::look_up(IQ4, nibbles<Isa>(words + (2 + n * 4) * WORD_BYTES, j));
  }
  // Word 0 has the half-precision scale and two bits of each group's scale, word 1 the four others.
  Floats<Isa> step(int g, int) const {
    const Ints<Isa> low = right<Isa>(load<Isa>(words + WORD_BYTES), 4 * g) & 15;
    const Ints<Isa> high = right<Isa>(load<Isa>(words), 16 + 2 * g) & 3;
    return scaled<Isa>(low_half<Isa>(words), (low | (high << 4)) - 32);
  }
};

// Words of an unpacked group: codes, then the steps and the lowest weights of its parts.
template <class Packed>
constexpr int panel_words = 8 + (Packed::LOW ? 2 * Packed::PARTS : 2);

// An unpacked group of 32 weights.
template <class Isa, class Packed>
struct Panel : Format {
  static constexpr int PARTS = Packed::PARTS, WORDS = panel_words<Packed>, BLOCKS = 1, START = Packed::START;
  static constexpr int FETCH = NEVER, MOST = Packed::MOST;
  static constexpr bool LOW = Packed::LOW, IN_MEMORY = false;
  Ints<Isa> codes(int64_t, int, int j) const { return load<Isa>(words + j * WORD_BYTES); }
  Floats<Isa> step(int, int part) const { return (Floats<Isa>)load<Isa>(words + (8 + part) * WORD_BYTES); }
  Floats<Isa> low(int, int part) const { return (Floats<Isa>)load<Isa>(words + (8 + PARTS + part) * WORD_BYTES); }
};

// The scales of a block, extracted all at once. The remaining loop is short, and its few loads are
// predictable for the processor (with eight groups and their scales in turn, one core was a tenth slower,
// Zen 4).
template <class Isa, class Weights>
struct Scales {
  Floats<Isa> steps[Weights::BLOCKS][Weights::PARTS], lows[Weights::BLOCKS][Weights::PARTS];
  void take(const Weights& weights) {
#pragma GCC unroll 8
    for (int g = 0; g < Weights::BLOCKS; g++) {
#pragma GCC unroll 2
      for (int part = 0; part < Weights::PARTS; part++) {
        steps[g][part] = weights.step(g, part);
        if constexpr (Weights::LOW) lows[g][part] = weights.low(g, part);
      }
    }
  }
};

// The offset, in a block of sixteen rows, of the part from `row` on.
template <class Weights>
constexpr int64_t bytes = Weights::WORDS * WORD_BYTES + (Weights::HALF_AT < 0 ? 0 : ROWS * 2);

template <class Weights>
inline Weights at(const uint8_t* block, int row) {
  Weights weights;
  weights.words = block + 4 * row, weights.halves = (const uint16_t*)(block + Weights::WORDS * WORD_BYTES) + row;
  return weights;
}

template <class Isa, class Vector>
inline void put(uint8_t* panel, int word, Vector value) {
  *(Ints<Isa>*)(panel + word * WORD_BYTES) = (Ints<Isa>)value;
}

template <class Isa, class Packed>
void unpack(const uint8_t* blocks, int64_t n_blocks, uint8_t* panel) {
  for (int64_t b = 0; b < n_blocks; b += Packed::BLOCKS, blocks += bytes<Packed>)
    for (int g = 0; g < Packed::BLOCKS; g++, panel += panel_words<Packed> * WORD_BYTES)
      for (int row = 0; row < ROWS; row += Isa::LANES) {
        const Packed weights = at<Packed>(blocks, row);
        uint8_t* to = panel + 4 * row;
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) put<Isa>(to, j, weights.codes(g / Packed::TOGETHER, g % Packed::TOGETHER, j));
#pragma GCC unroll 2
        for (int part = 0; part < Packed::PARTS; part++) {
          put<Isa>(to, 8 + part, weights.step(g, part));
          if constexpr (Packed::LOW) put<Isa>(to, 8 + Packed::PARTS + part, weights.low(g, part));
        }
      }
}

// Without an instruction that adds four products in 32 bits, pairs of them are added in 16 bits, over several quads: a
// pair is at most 2 * 127 * the largest code. Codes of eight bits are multiplied in two halves of four bits.
template <class Isa, class Weights>
constexpr bool in_halves = !Isa::WHOLE_BYTES && Weights::MOST > 127;

// The number of quads whose products are added in 16 bits.
template <class Isa, class Weights>
constexpr int quads_together() {
  if (Isa::WHOLE_BYTES) return 1;
  int quads = 8 / Weights::PARTS;
  while (quads * 2 * 127 * (in_halves<Isa, Weights> ? 15 : Weights::MOST) > 32767) quads /= 2;
  return quads;
}

// f += group k of each tile's n-th that share words, times its activations at t; one load of those codes
// serves all tiles.
template <class Isa, class Weights, int M, int TILES>
inline __attribute__((always_inline)) void add_group(const Weights* weights, const Scales<Isa, Weights>* scales,
                                                     int64_t n, int k, const uint8_t* t, Floats<Isa> (*f)[M]) {
  const float *token_scales = (const float*)(t + M * BLOCK), *minus = token_scales + M;
  const int32_t *minus_first = (const int32_t*)(minus + M), *minus_second = minus_first + M;
#pragma GCC unroll 2
  for (int part = 0; part < Weights::PARTS; part++) {
    Ints<Isa> a[TILES][M];
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      Ints<Isa> start{};
      if constexpr (!Weights::LOW) {
        const int32_t all = Weights::PARTS == 1 ? minus_first[i] + minus_second[i] : part ? minus_second[i] : minus_first[i];
        start = Isa::all(all << Weights::START);
      }
#pragma GCC unroll 2
      for (int tile = 0; tile < TILES; tile++) a[tile][i] = start;
    }
    constexpr int QUADS = quads_together<Isa, Weights>();
    constexpr bool HALVES = in_halves<Isa, Weights>;
#pragma GCC unroll 8
    for (int first = part * (8 / Weights::PARTS); first < (part + 1) * (8 / Weights::PARTS); first += QUADS) {
      Ints<Isa> pairs[TILES][M] = {}, high_pairs[TILES][M] = {};
#pragma GCC unroll 8
      for (int j = first; j < first + QUADS; j++) {
        Ints<Isa> codes[TILES], high[TILES];
#pragma GCC unroll 2
        for (int tile = 0; tile < TILES; tile++) {
          codes[tile] = weights[tile].codes(n, k, j);
          if constexpr (HALVES) high[tile] = right<Isa>(codes[tile], 4) & 0x0f0f0f0f, codes[tile] &= 0x0f0f0f0f;
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
          const Ints<Isa> x = Isa::all(*(const int32_t*)(t + i * BLOCK + 4 * j));
#pragma GCC unroll 2
          for (int tile = 0; tile < TILES; tile++) {
            if constexpr (Isa::WHOLE_BYTES) a[tile][i] = Isa::dot(a[tile][i], codes[tile], x);
            else pairs[tile][i] = Isa::add_pairs(pairs[tile][i], codes[tile], x);
            if constexpr (HALVES) high_pairs[tile][i] = Isa::add_pairs(high_pairs[tile][i], high[tile], x);
          }
        }
      }
      if constexpr (!Isa::WHOLE_BYTES) {
#pragma GCC unroll 2
        for (int tile = 0; tile < TILES; tile++)
#pragma GCC unroll 16
          for (int i = 0; i < M; i++) {
            if constexpr (HALVES) a[tile][i] += Isa::add_sums(Ints<Isa>{}, high_pairs[tile][i]) << 4;
            a[tile][i] = Isa::add_sums(a[tile][i], pairs[tile][i]);
          }
      }
    }
#pragma GCC unroll 2
    for (int tile = 0; tile < TILES; tile++) {
      const int64_t g = n * Weights::TOGETHER + k;
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) {
        Floats<Isa> sum = __builtin_convertvector(a[tile][i], Floats<Isa>) * scales[tile].steps[g][part];
        if constexpr (Weights::LOW && Weights::PARTS == 1) {
          sum = Isa::fma(scales[tile].lows[g][0], Isa::all(minus[i]), sum);
        } else if constexpr (Weights::LOW) {
          const Ints<Isa> of_part = Isa::all(part ? minus_second[i] : minus_first[i]);
          sum = Isa::fma(scales[tile].lows[g][part], __builtin_convertvector(of_part, Floats<Isa>), sum);
        }
        f[tile][i] = Isa::fma(sum, Isa::all(token_scales[i]), f[tile][i]);
      }
    }
  }
}

// With much arithmetic between two loads a processor does not request the next weights in time. Zen 4 needs help from
// FETCH tokens on; Cascade Lake always does, even with one token, which prefetching made up to a fourth faster.
#if defined(__znver4__) || defined(__znver5__)
constexpr bool FETCH_ALWAYS = false;
#else
constexpr bool FETCH_ALWAYS = true;
#endif

template <class Weights>
inline __attribute__((always_inline)) void fetch(const uint8_t* block, int64_t g) {
  constexpr int64_t AHEAD = 8192, PART = bytes<Weights> / Weights::BLOCKS;
#pragma GCC unroll 16
  for (int64_t i = 0; i < PART; i += WORD_BYTES) __builtin_prefetch(block + AHEAD + g * PART + i, 0, 2);
}

// TILES consecutive tiles at once, so that each code of a token serves them all. Where a register holds half of a tile's
// rows, its two halves count as two: they share the tile's cache lines, too.
template <class Isa, class Weights, int M, int TILES>
void multiply(const uint8_t* blocks, const uint8_t* tokens, int64_t n_blocks, float* sums, int64_t stride) {
  constexpr int PARTS = 2 * Isa::LANES == ROWS ? 2 : 1, N = TILES * PARTS;
  const int64_t tile_bytes = n_blocks / Weights::BLOCKS * bytes<Weights>;
  for (int row = 0; row < ROWS; row += Isa::LANES * PARTS) {
    const auto sum = [&](int n, int i) {
      return sums + n / PARTS * stride + i * ROWS + row + n % PARTS * Isa::LANES;
    };
    Floats<Isa> f[N][M];
#pragma GCC unroll 2
    for (int n = 0; n < N; n++)
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) f[n][i] = *(const Floats<Isa>*)sum(n, i);
    const uint8_t *block = blocks, *t = tokens;
    for (int64_t b = 0; b < n_blocks; b += Weights::BLOCKS, block += bytes<Weights>) {
      constexpr int TOGETHER = Weights::TOGETHER;
      Weights weights[N];
      Scales<Isa, Weights> scales[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) {
        weights[n] = at<Weights>(block + n / PARTS * tile_bytes, row + n % PARTS * Isa::LANES);
        scales[n].take(weights[n]);
      }
#pragma GCC unroll 1
      for (int64_t n = 0; n < Weights::BLOCKS / TOGETHER; n++)
#pragma GCC unroll 4
        for (int k = 0; k < TOGETHER; k++, t += M * TOKEN_BYTES) {
          if constexpr (Weights::IN_MEMORY && (FETCH_ALWAYS || M >= Weights::FETCH))
#pragma GCC unroll 2
            for (int tile = 0; tile < TILES; tile++) fetch<Weights>(block + tile * tile_bytes, n * TOGETHER + k);
          add_group<Isa, Weights, M, N>(weights, scales, n, k, t, f);
        }
    }
#pragma GCC unroll 2
    for (int n = 0; n < N; n++)
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) *(Floats<Isa>*)sum(n, i) = f[n][i];
  }
}

template <class... Packed>
struct Formats {};

template <class Isa, class Packed, int TILES, int... M>
constexpr void fill(Path& path, int format, std::integer_sequence<int, M...>) {
  if constexpr (TILES == 1 || Packed::BLOCKS == 1)
    ((path.direct[TILES - 1][format][M] = multiply<Isa, Packed, M + 1, TILES>), ...);
  ((path.unpacked[TILES - 1][format][M] = multiply<Isa, Panel<Isa, Packed>, M + 1, TILES>), ...);
}

template <class Isa, class... Packed>
constexpr Path make_path(const char* name, Formats<Packed...>) {
  static_assert(sizeof...(Packed) == FORMATS);
  Path path{name, Isa::GROUP, Isa::PAIRED, {}, {}, {}, {}};
  int format = 0;
  ((path.layout[format] = {Packed::CODE, bytes<Packed> / ROWS, Packed::HALF_AT, Packed::WORDS, Packed::BLOCKS,
                           panel_words<Packed>},
    fill<Isa, Packed, 1>(path, format, std::make_integer_sequence<int, Isa::GROUP>()),
    fill<Isa, Packed, 2>(path, format, std::make_integer_sequence<int, Isa::PAIRED>()),
    path.unpack[format++] = unpack<Isa, Packed>),
   ...);
  return path;
}

template <class Isa>
constexpr Path make_path(const char* name) {
  using All = Formats<Simple<Isa, 2, false, false>,  // Q4_0
                      Simple<Isa, 3, false, true>,   // Q4_1
                      Simple<Isa, 6, true, false>,   // Q5_0
                      Simple<Isa, 7, true, true>,    // Q5_1
                      Q8_0<Isa>, Q2_K<Isa>, Q3_K<Isa>, Q4_K<Isa>, Q5_K<Isa>, Q6_K<Isa>, IQ4_NL<Isa>, IQ4_XS<Isa>>;
  return make_path<Isa>(name, All());
}
