// Activations times quantized weights: the order of the weights' bytes, the rounding of activations, and
// the division of work. The products are in qmatmul_kernel.h, the layouts in qmatmul.h. Reference in plain
// torch: qmatmul.py.
//
// A decode step has few tokens and reads every weight once, so the kernel takes codes directly out of the
// blocks. A prompt has many tokens, so codes are unpacked once for many groups of tokens, in pieces that
// stay in L1. Matrices that multiply the same tokens (queries, keys and values; gate and up) are one job.
#include "qmatmul.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "operators.h"
#include "vectors.h"

namespace herd {
namespace {

using namespace quantized;

constexpr int64_t DIRECT_GROUPS = 4;  // up to this many groups of tokens, codes are taken directly from the blocks
constexpr int64_t FEW = 2;            // up to this many tokens, tiles are taken one at a time
constexpr int64_t GROUPS = 16, MOST_GROUPS = 96;  // fewest and most groups of tokens of a unit of work
constexpr int64_t UNITS = 8;          // units of work for each thread: fewer would leave threads idle at the end
constexpr int64_t TILES = 4;          // tiles of a unit of work with unpacked codes
constexpr int64_t STRETCH = 16;       // tiles of a unit of work otherwise: every break costs reading time
constexpr int64_t PIECE = 16;         // most blocks of a panel: two panels of 10 KiB stay in L1

// In the order of PATHS in qmatmul.py; null where this processor lacks the instructions.
constexpr int64_t PATHS = 5;

const Path* path_at(int64_t number) {
  const Path* const paths[PATHS] = {vnni_path(), avx512_path(), avx_vnni_path(), avx2_path(), portable_path()};
  return number >= 0 && number < PATHS ? paths[number] : nullptr;
}

const Path& path_of(int64_t number) {
  const Path* path = path_at(number);
  require(path != nullptr, "this processor lacks the instructions that were asked for");
  return *path;
}

// Layouts are the same in every path.
const Path& any_path() {
  for (int64_t i = 0; i < PATHS; i++)
    if (const Path* path = path_at(i)) return *path;
  throw std::invalid_argument("this processor has none of the instructions that this build uses");
}

int index_of(int64_t code) {
  for (int i = 0; i < FORMATS; i++)
    if (any_path().layout[i].code == code) return i;
  throw std::invalid_argument("no kernel multiplies by blocks of this format");
}

const Layout& layout_of(int64_t code) { return any_path().layout[index_of(code)]; }

// Each thread works through its own units, which are consecutive in memory, and then takes units that
// others have left: another program on one core delays one piece, not half of the work. A piece is `most`
// units, fewer near the end so that all threads end together; `body` gets its first unit and the one after
// its last.
template <class Body>
void share_out(int64_t units, int64_t most, const Body& body) {
  struct alignas(64) Counter {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = std::min<int64_t>(units, torch::stable::get_num_threads());
  std::vector<Counter> counters(threads);
  for (int64_t i = 0; i < threads; i++) counters[i].next = i * units / threads, counters[i].end = (i + 1) * units / threads;
  parallel(threads, 1, [&](int64_t begin, int64_t) {
    for (int64_t i = 0; i < threads; i++) {
      Counter& counter = counters[(begin + i) % threads];
      for (int64_t first = counter.next; first < counter.end;) {
        const int64_t behind = first + std::clamp<int64_t>((counter.end - first) / 2, 1, most);
        if (!counter.next.compare_exchange_weak(first, behind)) continue;
        body(first, behind);
        first = counter.next;
      }
    }
  });
}

// ---- weights ----

// Interleaves one tile or restores it; only the first n_rows of its rows are in the file.
template <bool BACK>
void reorder(const Layout& layout, uint8_t* file, uint8_t* tile, int64_t n_blocks, int64_t n_rows) {
  const auto move = [](uint8_t* in_file, uint8_t* in_tile, int64_t n) {
    if constexpr (BACK) std::memcpy(in_file, in_tile, n);
    else std::memcpy(in_tile, in_file, n);
  };
  for (int64_t b = 0; b < n_blocks; b++) {
    uint8_t *words = tile + b * layout.bytes * ROWS, *halves = words + layout.words * WORD_BYTES;
    for (int64_t row = 0; row < n_rows; row++) {
      uint8_t* block = file + (row * n_blocks + b) * layout.bytes;
      for (int64_t w = 0; w < layout.words; w++)
        move(block + layout.words_at() + 4 * w, words + w * WORD_BYTES + 4 * row, 4);
      if (layout.has_half()) move(block + layout.half_at, halves + row * 2, 2);
    }
  }
}

void check_blocks(const Tensor& blocks_RB, const Layout& layout) {
  require(blocks_RB.dim() == 2 && blocks_RB.scalar_type() == ScalarType::Byte && blocks_RB.is_contiguous(),
          "blocks are a contiguous (R, B) uint8 tensor");
  require(blocks_RB.size(1) % layout.bytes == 0, "rows of these blocks do not divide into blocks of the format");
}

template <bool BACK>
void reorder_all(const Tensor& from_RB, int64_t code, const Tensor& to_RB) {
  const Layout& layout = layout_of(code);
  check_blocks(from_RB, layout);
  check_blocks(to_RB, layout);
  const int64_t R = from_RB.size(0), B = from_RB.size(1), tiles = R / ROWS;
  require(to_RB.size(0) == R && to_RB.size(1) == B, "blocks are reordered into as many");
  uint8_t *from = data<uint8_t>(from_RB), *to = data<uint8_t>(to_RB);
  parallel(tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * ROWS * B; i < end * ROWS * B; i += ROWS * B)
      reorder<BACK>(layout, (BACK ? to : from) + i, (BACK ? from : to) + i, B / layout.bytes, ROWS);
  });
  std::memcpy(to + tiles * ROWS * B, from + tiles * ROWS * B, (R - tiles * ROWS) * B);
}

void interleave(Tensor blocks_RB, int64_t code, Tensor tiles_RB) { reorder_all<false>(blocks_RB, code, tiles_RB); }
void deinterleave(Tensor tiles_RB, int64_t code, Tensor blocks_RB) { reorder_all<true>(tiles_RB, code, blocks_RB); }

// ---- activations ----

// N tokens in groups of about the same size, none larger than `most`.
struct Groups {
  int64_t count, size, longer;  // the first `longer` groups have one more

  Groups(int64_t N, int64_t most) : count((N + most - 1) / most), size(N / count), longer(N % count) {}
  int64_t start(int64_t g) const { return g * size + std::min(g, longer); }
  int64_t length(int64_t g) const { return size + (g < longer); }
  bool direct() const { return count <= DIRECT_GROUPS; }
};

// One token's block: codes, scale, sums. A block with a value that is not finite gets a scale that is not
// finite.
template <class T>
inline void round_block(const T* x, int8_t* codes, float& scale, float& minus, int32_t& minus_first, int32_t& minus_second) {
  constexpr int N = BLOCK / LANES;
  vec wide[N];
  ivec most{};  // of the bits, which are in the order of the values; NaN is largest
  for (int n = 0; n < N; n++) {
    wide[n] = load(x + n * LANES);
    const ivec bits = (ivec)wide[n] & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  const int32_t largest = highest(most);
  float top;
  std::memcpy(&top, &largest, 4);
  float inverse = 127.0f / top;
  scale = top / 127.0f;
  const bool finite = largest < 0x7f800000;
  if (!finite) scale = NAN;
  else if (std::isinf(inverse)) scale = inverse = 0;
  ivec sums[2]{};  // of both halves of the block
  for (int n = 0; n < N; n++) {
    const ivec whole = finite ? nearest(wide[n] * inverse) : ivec{};
    sums[2 * n / N] += whole;
    narrow(whole, codes + n * LANES);
  }
  const int32_t first = total(sums[0]), second = total(sums[1]);
  minus = float(-first - second), minus_first = -first, minus_second = -second;
}

void round_tokens(const Tensor& x_ND, const Groups& groups, uint8_t* out) {
  const int64_t N = x_ND.size(0), D = x_ND.size(1), n_blocks = D / BLOCK;
  by_type(x_ND, [&]<class T>(T*) {
    const T* x = data<T>(x_ND);
    parallel(groups.count, std::max<int64_t>(1, (1 << 15) / (D * groups.size)), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; g++) {
        const int64_t start = groups.start(g), m = groups.length(g);
        uint8_t* group = out + start * n_blocks * TOKEN_BYTES;
        for (int64_t i = 0; i < m; i++)
          for (int64_t b = 0; b < n_blocks; b++) {
            uint8_t* block = group + b * m * TOKEN_BYTES;
            float* scales = reinterpret_cast<float*>(block + m * BLOCK);
            int32_t* sums = reinterpret_cast<int32_t*>(scales + 2 * m);
            round_block(x + (start + i) * D + b * BLOCK, reinterpret_cast<int8_t*>(block + i * BLOCK), scales[i],
                        scales[m + i], sums[i], sums[m + i]);
          }
      }
    });
  });
}

// ---- their product ----

struct Weights {
  int format;
  int64_t rows, blocks;  // R, and 32-weight blocks of a row
  int64_t tile_bytes;
  const uint8_t* tiles;
  std::vector<uint8_t> rest;  // the rows beyond the last whole tile, as a tile

  Weights(const Tensor& tiles_RB, int64_t code) : format(index_of(code)), rows(tiles_RB.size(0)) {
    check_blocks(tiles_RB, layout());
    const int64_t B = tiles_RB.size(1), n_blocks = B / layout().bytes;
    blocks = n_blocks * layout().blocks, tile_bytes = ROWS * B;
    tiles = data<uint8_t>(tiles_RB);
    if (rows % ROWS == 0) return;
    rest.resize(ROWS * B);
    reorder<false>(layout(), data<uint8_t>(tiles_RB) + rows / ROWS * ROWS * B, rest.data(), n_blocks, rows % ROWS);
  }
  const Layout& layout() const { return any_path().layout[format]; }
  int64_t n_tiles() const { return (rows + ROWS - 1) / ROWS; }
  const uint8_t* tile(int64_t i) const { return i < rows / ROWS ? tiles + i * tile_bytes : rest.data(); }
  // Blocks of a panel: all panels of a row have about the same length, because a short one costs as much time
  // between the products as a long one.
  int64_t piece() const {
    const int64_t whole = blocks / layout().blocks, panels = (blocks + PIECE - 1) / PIECE;
    return (whole + panels - 1) / panels * layout().blocks;
  }
  int64_t offset(int64_t block) const { return block / layout().blocks * layout().bytes * ROWS; }  // in each tile
};

// Some tiles times some groups of tokens. y points to the results of the first token.
template <class T>
void multiply_unit(const Path& path, const Weights& weights, int64_t first_tile, int64_t end_tile, const Groups& groups,
                   int64_t first_group, int64_t end_group, const uint8_t* tokens, T* y) {
  const int64_t start = groups.start(first_group), n_tokens = groups.start(end_group) - start;
  const bool direct = groups.direct();
  const int64_t piece = direct ? weights.blocks : weights.piece(), stride = n_tokens * ROWS;
  // with few tokens memory is the limit, and it is read fastest without a break; two tiles' long blocks do
  // not fit into a cache either
  const int64_t m = groups.length(first_group);
  const bool paired = m <= path.paired && !(direct && (m <= FEW || weights.layout().blocks > 1));
  std::vector<float> sums((end_tile - first_tile) * stride);
  alignas(64) uint8_t panel[2 * PIECE * MOST_PANEL_BYTES];
  for (int64_t block = 0; block < weights.blocks; block += piece) {
    const int64_t n = std::min(piece, weights.blocks - block), offset = weights.offset(block);
    for (int64_t tile = first_tile, tiles; tile < end_tile; tile += tiles) {
      tiles = paired && tile + 2 <= std::min(end_tile, weights.rows / ROWS) ? 2 : 1;
      for (int64_t i = 0; i < tiles && !direct; i++)
        path.unpack[weights.format](weights.tile(tile + i) + offset, n, panel + i * n * weights.layout().panel_bytes());
      for (int64_t g = first_group; g < end_group; g++) {
        const int64_t m = groups.length(g);
        const uint8_t* group = tokens + (groups.start(g) * weights.blocks + block * m) * TOKEN_BYTES;
        float* out = sums.data() + (tile - first_tile) * stride + (groups.start(g) - start) * ROWS;
        if (direct)
          path.direct[tiles - 1][weights.format][m - 1](weights.tile(tile) + offset, group, n, out, stride);
        else
          path.unpacked[tiles - 1][weights.format][m - 1](panel, group, n, out, stride);
      }
    }
  }
  // A token's results are far from the next one's, in another page of memory: all are written at once, and asked for
  // in time.
  constexpr int64_t AHEAD = 16, LINE = 64 / sizeof(T);
  const int64_t row = first_tile * ROWS, n_rows = std::min(end_tile * ROWS, weights.rows) - row;
  T* to = y + start * weights.rows + row;
  for (int64_t i = 0; i < n_tokens; i++, to += weights.rows) {
    for (int64_t r = 0; r < n_rows; r += LINE) __builtin_prefetch(to + AHEAD * weights.rows + r, 1);
    for (int64_t r = 0; r < n_rows; r += ROWS) {
      const float* from = sums.data() + r / ROWS * stride + i * ROWS;
      if (n_rows - r >= ROWS)
        for (int k = 0; k < ROWS; k += LANES) store(to + r + k, *(const vec*)(from + k));
      else
        for (int64_t k = 0; k < n_rows - r; k++) put(to[r + k], from[k]);
    }
  }
}

}  // namespace

// x (N, D) times each of the transposed weights (R, D); returns one (N, R) in x's type for each
std::vector<Tensor> qmatmul(Tensor x_ND, std::vector<Tensor> matrices, std::vector<int64_t> codes, int64_t path_number) {
  const Path& path = path_of(path_number);
  const int64_t N = x_ND.size(0), D = x_ND.size(1);
  require(x_ND.is_contiguous(), "activations must be contiguous");
  require(matrices.size() == codes.size(), "every matrix has a format");
  const Groups groups(std::max<int64_t>(N, 1), path.group);
  const int64_t tiles = groups.direct() ? 1 : TILES, most = groups.direct() ? STRETCH : 1;
  const auto n_units = [&](const Weights& w) { return (w.n_tiles() + tiles - 1) / tiles; };
  std::vector<Weights> weights;
  std::vector<Tensor> out;
  int64_t row_units = 0;
  for (size_t i = 0; i < matrices.size(); i++) {
    weights.emplace_back(matrices[i], codes[i]);
    require(D == weights[i].blocks * BLOCK, "activations are not as long as the weights' rows");
    out.push_back(fresh({N, weights[i].rows}, x_ND.scalar_type()));
    row_units += n_units(weights[i]);
  }
  // Codes are unpacked once for all tokens of a unit, which are therefore as many as leave work for all threads.
  const auto parts = [&](int64_t groups_each) { return (groups.count + groups_each - 1) / groups_each; };
  const int64_t wanted = UNITS * torch::stable::get_num_threads() / std::max<int64_t>(row_units, 1);
  const int64_t token_units = std::clamp(wanted, parts(MOST_GROUPS), parts(GROUPS));
  std::vector<int64_t> units{0};  // of all matrices before
  for (const Weights& w : weights) units.push_back(units.back() + token_units * n_units(w));
  if (N == 0) return out;
  std::unique_ptr<uint8_t[]> tokens(new uint8_t[N * (D / BLOCK) * TOKEN_BYTES]);
  round_tokens(x_ND, groups, tokens.get());
  by_type(x_ND, [&]<class T>(T*) {
    share_out(units.back(), most, [&](int64_t unit, int64_t end) {
      for (int64_t behind; unit < end; unit = behind) {
        const int64_t i = std::upper_bound(units.begin(), units.end(), unit) - units.begin() - 1;
        const int64_t n = n_units(weights[i]), t = (unit - units[i]) / n, row = units[i] + t * n;
        behind = std::min(end, row + n);
        multiply_unit(path, weights[i], (unit - row) * tiles, std::min(weights[i].n_tiles(), (behind - row) * tiles),
                      groups, t * groups.count / token_units, (t + 1) * groups.count / token_units, tokens.get(),
                      data<T>(out[i]));
      }
    });
  });
  return out;
}

// x (N, D) times the transposed weights (R, D), with activations rounded in two steps: to int8, and what that
// step lost to int8 as well. The second step is computed as N more tokens, for which the weights are not read
// again. Returns (N, R) fp32.
Tensor qmatmul_twice(Tensor x_ND, Tensor tiles_RB, int64_t code, int64_t path) {
  const int64_t N = x_ND.size(0), D = x_ND.size(1);
  require(x_ND.is_contiguous() && D % BLOCK == 0, "activations must be contiguous, in blocks of 32");
  Tensor both = fresh({2 * N, D}, ScalarType::Float);
  float *first = data<float>(both), *rest = first + N * D;
  by_type(x_ND, [&]<class T>(T*) {
    const T* x = data<T>(x_ND);
    parallel(N, 16, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin * D; at < end * D; at += BLOCK) {
        int8_t codes[BLOCK];
        float scale, minus;
        int32_t minus_first, minus_second;
        for (int i = 0; i < BLOCK; i++) first[at + i] = get(x[at + i]);
        round_block(first + at, codes, scale, minus, minus_first, minus_second);
        for (int i = 0; i < BLOCK; i++) rest[at + i] = first[at + i] - float(codes[i]) * scale;
      }
    });
  });
  const Tensor y = qmatmul(both, {tiles_RB}, {code}, path)[0];
  const int64_t R = y.size(1);
  float *out = data<float>(y), *more = out + N * R;
  parallel(N * R, 1 << 14, [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; i++) out[i] += more[i];
  });
  return reshaped(y, {N, R});
}

namespace {

// The paths that this processor and this build support, as numbers for `qmatmul`, fastest first.
std::vector<int64_t> qmatmul_paths() {
  std::vector<int64_t> numbers;
  for (int64_t i = 0; i < PATHS; i++)
    if (path_at(i) != nullptr) numbers.push_back(i);
  return numbers;
}

std::vector<int64_t> qmatmul_formats() {
  std::vector<int64_t> codes;
  for (const Layout& layout : any_path().layout) codes.push_back(layout.code);
  return codes;
}

}  // namespace
}  // namespace herd

STABLE_TORCH_LIBRARY_FRAGMENT(herd_native, m) {
  m.def("qmatmul_interleave(Tensor blocks, int format, Tensor(a!) tiles) -> ()");
  m.def("qmatmul_deinterleave(Tensor tiles, int format, Tensor(a!) blocks) -> ()");
  m.def("qmatmul(Tensor x, Tensor[] tiles, int[] formats, int path) -> Tensor[]");
  m.def("qmatmul_twice(Tensor x, Tensor tiles, int format, int path) -> Tensor");
  m.def("qmatmul_paths() -> int[]");
  m.def("qmatmul_formats() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(herd_native, CPU, m) {
  m.impl("qmatmul_interleave", TORCH_BOX(&herd::interleave));
  m.impl("qmatmul_deinterleave", TORCH_BOX(&herd::deinterleave));
  m.impl("qmatmul", TORCH_BOX(&herd::qmatmul));
  m.impl("qmatmul_twice", TORCH_BOX(&herd::qmatmul_twice));
}

STABLE_TORCH_LIBRARY_IMPL(herd_native, CompositeExplicitAutograd, m) {
  m.impl("qmatmul_paths", TORCH_BOX(&herd::qmatmul_paths));
  m.impl("qmatmul_formats", TORCH_BOX(&herd::qmatmul_formats));
}
