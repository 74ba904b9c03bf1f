// How quantized weights and activations lie in memory while they are multiplied, and what each instruction set offers.
//
// Weights. Sixteen rows make a tile. A tile holds the very bytes of its sixteen rows' blocks in another order, so
// nothing is lost and nothing is added: block after block, first the 32-bit words (codes, and the packed scales of the
// K formats), word w of all sixteen rows side by side, so that one 64-byte load feeds sixteen outputs; then the
// half-precision scales, sixteen side by side. It is read from its first byte to its last, which is what processors
// foresee: with all scales behind all words, or two tiles at a time, one core drew two thirds of what it could (Zen 4),
// and fetching ahead by hand took more away. Rows beyond the last whole tile stay as a file has them.
//
// Activations. Each 32 of a token become int8 codes with one fp32 scale. Tokens go in groups, as many as the registers
// hold sums for, and a group lies block by block: m x 32 codes, m scales, and three sums of the codes, negated, that
// make good for codes of weights being stored without sign (fp32, int32, int32 of the second half).
//
// Sums. A row's result is the fp32 sum over blocks in rising order, each block's part an exact integer times scales. It
// depends on neither the number of tokens nor the threads nor on which kernel ran, direct or over panels.
#pragma once

#include <cstdint>

namespace herd::quantized {

constexpr int ROWS = 16, BLOCK = 32, WORD_BYTES = 4 * ROWS;
constexpr int TOKEN_BYTES = BLOCK + 4 * 4;           // of one token's block
constexpr int PANEL_BYTES = (BLOCK + 4 * 2) * ROWS;  // of one unpacked block of a tile: codes, two scales a row
constexpr int FORMATS = 4;

// A block of a file: where its half-precision scale stands (none where scales are among the words), its words, and how
// many times 32 weights it holds.
struct Layout {
  int64_t code, bytes, half_at, words, blocks;

  constexpr bool has_half() const { return half_at >= 0; }
  constexpr int64_t words_at() const { return half_at == 0 ? 2 : 0; }
};

constexpr Layout LAYOUTS[FORMATS] = {
    {2, 18, 0, 4, 1},       // Q4_0
    {8, 34, 0, 8, 1},       // Q8_0
    {12, 144, -1, 36, 8},   // Q4_K
    {14, 210, 208, 52, 8},  // Q6_K
};

// sums += the products of n_blocks blocks with a group of m tokens: 16 a token, and the next tile's `stride` behind them
using Multiply = void (*)(const uint8_t* blocks, const uint8_t* tokens, int64_t n_blocks, float* sums, int64_t stride);
using Unpack = void (*)(const uint8_t* blocks, int64_t n_blocks, uint8_t* panel);

constexpr int MOST_TOKENS = 8;

struct Path {
  const char* name;
  int group;                                   // most tokens of a group
  int paired;                                  // up to so many, two tiles at once are faster than one
  Multiply direct[2][FORMATS][MOST_TOKENS];    // by tiles - 1, format and m - 1
  Multiply unpacked[2][FORMATS][MOST_TOKENS];  // takes panels
  Unpack unpack[FORMATS];
};

// Null where the compiler or this processor has no such instructions.
const Path* vnni_path();
const Path* avx2_path();
const Path* portable_path();

}  // namespace herd::quantized
