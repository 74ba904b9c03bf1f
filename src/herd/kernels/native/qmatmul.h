// The layout of quantized weights and activations in memory while they are multiplied, and what each
// instruction set offers.
//
// Weights. Sixteen rows make a tile. A tile holds exactly the bytes of its sixteen rows' blocks in another
// order: block after block, first the 32-bit words (codes, and the packed scales of the K formats), word w
// of all sixteen rows side by side, so that one 64-byte load feeds sixteen outputs; then the half-precision
// scales, sixteen side by side. It is read from its first byte to its last, which hardware prefetchers
// recognize: with all scales after all words, or with two tiles at a time, one core reached two thirds of
// its bandwidth (Zen 4), and prefetching by hand made it slower. Rows beyond the last whole tile stay as
// the file has them.
//
// Activations. Each 32 values of a token become int8 codes with one fp32 scale. Tokens are divided into
// groups, as large as there are registers for sums, and a group is stored block by block: m x 32 codes, m
// scales, and negated sums of the codes, which correct for the weights' codes being unsigned (of all in fp32, and of
// each half in int32).
//
// Sums. A row's result is the fp32 sum over blocks in ascending order, where each block's part is an exact
// integer times scales. It does not depend on the number of tokens, on the threads, or on whether the
// kernel ran directly or over panels.
#pragma once

#include <cstdint>

#if defined(HERD_ALL_PATHS)
#define HERD_VNNI 1
#define HERD_AVX512 1
#define HERD_AVX_VNNI 1
#define HERD_AVX2 1
#define HERD_PORTABLE 1
#elif defined(__AVX512VNNI__)
#define HERD_VNNI 1
#elif defined(__AVX512BW__)
#define HERD_AVX512 1
#elif defined(__AVXVNNI__)
#define HERD_AVX_VNNI 1
#elif defined(__AVX2__)
#define HERD_AVX2 1
#else
#define HERD_PORTABLE 1
#endif

namespace herd::quantized {

constexpr int ROWS = 16, BLOCK = 32, WORD_BYTES = 4 * ROWS;
constexpr int TOKEN_BYTES = BLOCK + 4 * 4;           // of one token's block
constexpr int FORMATS = 12;

// A block of a file: GGUF's number of the format, the offset of its half-precision scale (none where scales are
// among the words), its words, the number of 32-weight groups in it, and the words of such a group once it is
// unpacked to a panel (eight of codes, then its fp32 scales).
struct Layout {
  int64_t code, bytes, half_at, words, blocks, panel_words;

  constexpr bool has_half() const { return half_at >= 0; }
  constexpr int64_t words_at() const { return half_at == 0 ? 2 : 0; }
  constexpr int64_t panel_bytes() const { return panel_words * WORD_BYTES; }
};

constexpr int MOST_PANEL_BYTES = 12 * WORD_BYTES;

// sums += the products of n_blocks blocks with a group of m tokens: 16 per token, with the next tile's
// `stride` after them
using Multiply = void (*)(const uint8_t* blocks, const uint8_t* tokens, int64_t n_blocks, float* sums, int64_t stride);
using Unpack = void (*)(const uint8_t* blocks, int64_t n_blocks, uint8_t* panel);

constexpr int MOST_TOKENS = 8;

struct Path {
  const char* name;
  int group;                                   // largest group of tokens
  int paired;                                  // up to this many tokens, two tiles at once are faster than one
  Multiply direct[2][FORMATS][MOST_TOKENS];    // by tiles - 1, format and m - 1
  Multiply unpacked[2][FORMATS][MOST_TOKENS];  // takes panels
  Unpack unpack[FORMATS];
  Layout layout[FORMATS];
};

// Null where the compiler or this processor does not have the instructions, and where a faster path exists: a
// library is built for one machine, so the others are compiled only if HERD_ALL_PATHS asks for them.
const Path* vnni_path();
const Path* avx512_path();
const Path* avx_vnni_path();
const Path* avx2_path();
const Path* portable_path();

}  // namespace herd::quantized
