// Attention over a paged KV cache: writes the new keys and values, then every new token attends to its
// sequence so far. FlashAttention-2's online softmax (arXiv 2307.08691) over pages (vLLM, arXiv 2309.06180),
// with keys split at fixed positions for parallel decoding (Flash-Decoding). Reference in plain torch:
// paged_attention.py; work on one page: paged_attention_kernel.h.
//
// Keys are split every SPLIT whether or not the parts run in parallel, so a token is the same to the bit decoded
// alone, in a batch, as part of a prompt, or with any number of threads.
#include "operators.h"
#include "paged_attention_kernel.h"

#include <atomic>

namespace herd {
namespace {

constexpr int64_t SPLIT = 8 * PAGE;    // keys of one part
constexpr int64_t SHARED = 8;          // up to this many new tokens, a row's parts run in parallel
constexpr int64_t QUERIES = 128;       // query vectors of a unit of work; with their sums they fit into L2

// The new tokens of one sequence: `start` is the index of the first among all new tokens, `position` that
// in its own sequence.
struct Row {
  int64_t table, start, n, position, partials;
  int64_t splits() const { return (position + n + SPLIT - 1) / SPLIT; }
  bool shared() const { return n <= SHARED && splits() > 1; }
};

// A unit of work: a block of a row's tokens for one KV head, against part `split` of its keys; < 0: all of
// them.
struct Unit {
  int64_t row, g, begin, end, split;
};

// Adds the softmax of one part to that of the parts before it.
__attribute__((noinline)) void merge(int64_t K, float top, float sum, const float* out, float* all_top, float* all_sum,
                                     float* all) {
  if (top == -INFINITY) return;
  const float best = std::max(*all_top, top), old = fast_exp(*all_top - best), fresh = fast_exp(top - best);
  *all_top = best;
  *all_sum = *all_sum * old + sum * fresh;
#pragma omp simd
  for (int64_t k = 0; k < K; k++) all[k] = all[k] * old + out[k] * fresh;
}

inline float add_lanes(const float* sum) {
  float halves[8];
  for (int i = 0; i < 8; i++) halves[i] = sum[i] + sum[i + 8];
  return ((halves[0] + halves[4]) + (halves[2] + halves[6])) + ((halves[1] + halves[5]) + (halves[3] + halves[7]));
}

// Computes a unit. Its result goes to `out` (N, H, K) or, where the row's parts run in parallel, to
// `partials`: for each (token, head, part) of a row K sums, the softmax's largest score and its sum.
template <class Kind, class T>
void attend(const Shape& s, const Row& row, const Unit& unit, Scratch& t, const T* q, T* out, float* partials) {
  const int64_t K = s.K, R = s.R, n = (unit.end - unit.begin) * R, parts = row.splits();
  const int32_t* table = s.tables + row.table * s.pages;
  int64_t visible[QUERIES];
  for (int64_t m = 0; m < n; m++) {
    const T* from = q + ((row.start + unit.begin + m / R) * s.H + unit.g * R + m % R) * K;
    for (int64_t k = 0; k < K; k++) t.query[m * K + k] = get(from[k]);
    prepare<Kind>(s, t.query + m * K);
  }
  const int64_t keys = row.position + unit.end;  // the last query sees them all
  std::fill(t.total, t.total + n * K, 0.0f);
  std::fill(t.total_sum, t.total_sum + n, 0.0f);
  std::fill(t.total_top, t.total_top + n, -INFINITY);
  const int64_t first = unit.split < 0 ? 0 : unit.split, last = unit.split < 0 ? parts : unit.split + 1;
  for (int64_t split = first; split < last && split * SPLIT < keys; split++) {
    std::fill(t.out, t.out + n * K, 0.0f);
    std::fill(t.sum, t.sum + n * TOKENS, 0.0f);
    std::fill(t.top, t.top + n, -INFINITY);
    const int64_t end = std::min(keys, (split + 1) * SPLIT);
    for (int64_t key = split * SPLIT; key < end; key += PAGE) {
      for (int64_t m = 0; m < n; m++) visible[m] = row.position + unit.begin + m / R + 1 - key;
      const int64_t at = key / PAGE;
      const uint8_t* next = key + PAGE < end ? s.head(table[at + 1], unit.g) : nullptr;
      page<Kind>(s, s.head(table[at], unit.g), next, t, n, visible);
    }
    for (int64_t m = 0; m < n; m++) {
      const float sum = add_lanes(t.sum + m * TOKENS);
      if (unit.split < 0) {
        merge(K, t.top[m], sum, t.out + m * K, t.total_top + m, t.total_sum + m, t.total + m * K);
      } else {
        const int64_t head = (unit.begin + m / R) * s.H + unit.g * R + m % R;
        float* to = partials + row.partials + (head * parts + split) * (K + 2);
        std::memcpy(to, t.out + m * K, K * sizeof(float));
        to[K] = t.top[m], to[K + 1] = sum;
      }
    }
  }
  if (unit.split >= 0) return;
  for (int64_t m = 0; m < n; m++) {
    T* to = out + ((row.start + unit.begin + m / R) * s.H + unit.g * R + m % R) * K;
    const float share = 1.0f / t.total_sum[m];
    for (int64_t k = 0; k < K; k++) put(to[k], t.total[m * K + k] * share);
  }
}

// Joins the parts of a row that ran in parallel, in their order.
template <class T>
void join(const Shape& s, const Row& row, int64_t head, const float* partials, T* out) {
  const int64_t K = s.K, parts = row.splits();
  std::vector<float> all(K);
  float top = -INFINITY, sum = 0;
  for (int64_t split = 0; split < parts; split++) {
    const float* from = partials + row.partials + (head * parts + split) * (K + 2);
    merge(K, from[K], from[K + 1], from, &top, &sum, all.data());
  }
  const float share = 1.0f / sum;
  T* to = out + (row.start * s.H + head) * K;
  for (int64_t k = 0; k < K; k++) put(to[k], all[k] * share);
}

template <class Kind, class T>
void write(const Shape& s, const std::vector<Row>& rows, const T* k, const T* v, int64_t k_stride, int64_t v_stride) {
  for (const Row& row : rows) {
    const int32_t* table = s.tables + row.table * s.pages;
    parallel(row.n, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> wide(2 * s.K);
      for (int64_t t = begin; t < end; t++)
        for (int64_t g = 0; g < s.G; g++) {
          const T *key = k + (row.start + t) * k_stride + g * s.K, *value = v + (row.start + t) * v_stride + g * s.K;
          for (int64_t i = 0; i < s.K; i++) wide[i] = get(key[i]), wide[s.K + i] = get(value[i]);
          const int64_t position = row.position + t;
          store<Kind>(s, s.head(table[position / PAGE], g), position % PAGE, wide.data(), wide.data() + s.K);
        }
    });
  }
}

template <class Kind, class T>
void run(const Shape& s, std::vector<Row>& rows, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out) {
  write<Kind>(s, rows, data<T>(k), data<T>(v), k.stride(0), v.stride(0));
  std::vector<Unit> units;
  std::vector<std::pair<int64_t, int64_t>> joins;
  int64_t partials_size = 0, most = 0;  // most tokens of a unit
  const int64_t tokens = std::max<int64_t>(QUERIES / s.R, 1);
  for (int64_t r = 0; r < int64_t(rows.size()); r++) {
    Row& row = rows[r];
    row.partials = partials_size;
    most = std::max(most, std::min(row.n, tokens));
    if (row.shared()) {
      partials_size += row.n * s.H * row.splits() * (s.K + 2);
      for (int64_t head = 0; head < row.n * s.H; head++) joins.emplace_back(r, head);
    }
    for (int64_t end = row.n; end > 0; end -= tokens)  // the last tokens see the most keys: longest units first
      for (int64_t g = 0; g < s.G; g++)
        for (int64_t split = row.shared() ? row.splits() - 1 : -1; split >= (row.shared() ? 0 : -1); split--)
          units.push_back({r, g, std::max<int64_t>(end - tokens, 0), end, split});
  }
  std::vector<float> partials(partials_size);
  std::atomic<int64_t> next{0};
  const int64_t n_units = units.size();
  parallel(n_units, 1, [&](int64_t, int64_t) {  // the next free thread takes the next unit
    Scratch scratch(most * s.R, s.K);
    for (int64_t i; (i = next++) < n_units;)
      attend<Kind>(s, rows[units[i].row], units[i], scratch, data<T>(q), data<T>(out), partials.data());
  });
  parallel(joins.size(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) join(s, rows[joins[i].first], joins[i].second, partials.data(), data<T>(out));
  });
}

}  // namespace

Tensor paged_attention(Tensor q, Tensor k, Tensor v, Tensor pool, Tensor tables, Tensor rows_, int64_t layer) {
  Shape s;
  s.H = q.size(1), s.G = k.size(1), s.K = q.size(2), s.R = s.H / s.G;
  s.layer = layer, s.layers = pool.size(1), s.head_bytes = pool.size(3);
  s.pages = tables.size(1), s.pool = data<uint8_t>(pool), s.tables = data<int32_t>(tables);
  s.width = s.K % (2 * TOKENS) == 0 ? 2 * TOKENS : TOKENS;
  s.scale = float(1.0 / std::sqrt(double(s.K)));
  require(s.K % TOKENS == 0 && s.K <= 512 && s.H % s.G == 0 && s.R <= QUERIES, "paged attention: head dim or heads");
  require(pool.size(2) == s.G && v.size(1) == s.G && layer >= 0 && layer < s.layers, "paged attention: pool's shape");
  require(pool.is_contiguous() && tables.is_contiguous() && rows_.is_contiguous() && q.is_contiguous(),
          "paged attention: contiguous tensors");
  std::vector<Row> rows;
  const int64_t* from = data<int64_t>(rows_);
  for (int64_t i = 0; i < rows_.size(0); i++, from += 4) {
    rows.push_back({from[0], from[1], from[2], from[3], 0});
    const Row& row = rows.back();
    require(row.table >= 0 && row.table < tables.size(0) && row.start >= 0 && row.start + row.n <= q.size(0) &&
                row.position >= 0 && row.position + row.n <= s.pages * PAGE,
            "paged attention: a row outside its tensors");
  }
  Tensor out = fresh_like(q);
  by_type(q, [&]<class T>(T*) {
    const int64_t values = 2 * PAGE * s.K;
    if (s.head_bytes == values * 4) return run<Wide, T>(s, rows, q, k, v, out);
    if (s.head_bytes == values * 2) return run<Half, T>(s, rows, q, k, v, out);
    require(s.head_bytes == values + values / BLOCK * 2 && s.K % BLOCK == 0, "paged attention: bytes of a page");
    run<Bytes, T>(s, rows, q, k, v, out);
  });
  return out;
}

}  // namespace herd

STABLE_TORCH_LIBRARY_FRAGMENT(herd_native, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) pool, Tensor tables, Tensor rows, int layer) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(herd_native, CPU, m) { m.impl("paged_attention", TORCH_BOX(&herd::paged_attention)); }
