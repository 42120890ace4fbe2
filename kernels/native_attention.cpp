// Attention on the chosen columns of each chunk of queries, float32. kernels/reference.py says what it means.

struct Attention {  // kernels/native.py declares the same fields, in the same order
  Sgemm sgemm;
  const float *query, *key, *value;  // [batch, heads, tokens, head_dim], any strides but 1 along head_dim
  const float* bias;                 // [batch, kv_len], additive, kMasked where masked; null without a mask
  const int32_t *chunk_starts, *samples;
  float *o, *o_cache;         // [batch, heads, q_len, head_dim]; o in [batch, q_len, heads, head_dim] order
  int32_t *columns, *counts;  // [batch, heads, chunks, kept], [batch, heads, chunks]
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim;
  int64_t chunks, chunk, per_chunk, kept;
  int64_t query_batch, query_head, query_token, key_batch, key_head, key_token;
  int64_t value_batch, value_head, value_token, cache_batch, cache_head, cache_token, bias_batch;
  double scale;
};

namespace {

constexpr int64_t kBlock = 512;   // columns at a time: their keys, values and weights stay in L2
constexpr float kFaint = 1e-30f;  // a sum of weights below this has lost digits to underflow

struct Head {  // one head of one batch item
  const float *query, *key, *value, *bias;
  float *o, *o_cache;
  int32_t *columns, *counts;
};

Head head_of(const Attention& a, int64_t index) {
  const int64_t b = index / a.heads, h = index % a.heads, kv = h / (a.heads / a.kv_heads);
  return {a.query + b * a.query_batch + h * a.query_head,  a.key + b * a.key_batch + kv * a.key_head,
          a.value + b * a.value_batch + kv * a.value_head, a.bias ? a.bias + b * a.bias_batch : nullptr,
          a.o + (b * a.q_len * a.heads + h) * a.head_dim,  a.o_cache + b * a.cache_batch + h * a.cache_head,
          a.columns + index * a.chunks * a.kept,           a.counts + index * a.chunks};
}

// Rows of logits are padded to whole lanes with kMasked: a loop's scalar rest would cost as much as the loop.
void pad_row(float* row, int64_t size) { std::fill(row + size, row + padded(size), kMasked); }

// By hand: without -ffinite-math-only gcc does not vectorise a maximum.
float row_max(const float* row, int64_t size) {
  using Lanes = float __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
  const auto* lanes = reinterpret_cast<const Lanes*>(row);  // rows of scratch are aligned
  Lanes best = lanes[0];
  for (int64_t i = 1; i < padded(size) / kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  float top = kFloor;
  for (int64_t lane = 0; lane < kLanes; ++lane) top = std::max(top, best[lane]);
  return top;
}

// row = 2^(row - top); returns the sum.
float exponentiate(float* row, int64_t size, float top) {
  const int64_t stop = padded(size);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < stop; ++i) {
    row[i] = exp2_fast(row[i] - top);
    sum += row[i];
  }
  return sum;
}

struct Rows {
  float* data;
  int64_t stride;
};

Rows output_rows(const Attention& a, const Head& head) { return {head.o, a.heads * a.head_dim}; }

Rows cached_rows(const Attention& a, const Head& head) { return {head.o_cache, a.cache_token}; }

// out = base + factor * sum, one row; a null base is zero.
void add_row(const float* base, float factor, const float* sum, float* out, int64_t size) {
  if (base) {
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) out[d] = base[d] + factor * sum[d];
  } else {
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) out[d] = factor * sum[d];
  }
}

int64_t sparse_scratch(const Attention& a) {
  const int64_t block = padded(std::min(kBlock, a.kv_len));
  return block * (2 * a.head_dim + a.chunk + 1) + a.chunk * (a.head_dim + 2);
}

// to = from + sign * softmax over the chunk's columns of (scale * query @ key^T + bias) @ value.
void add_sparse(const Attention& a, const Head& head, int64_t c, Rows from, float sign, Rows to,
                Scratch& scratch) {
  const int64_t dim = a.head_dim, first = a.chunk_starts[c], rows = a.chunk_starts[c + 1] - first;
  const int64_t count = head.counts[c], block = padded(std::min(kBlock, a.kv_len));
  const int32_t* columns = count == a.kv_len ? nullptr : head.columns + c * a.kept;
  float* keys = scratch.take(block * dim);
  float* values = scratch.take(block * dim);
  float* weights = scratch.take(block * a.chunk);
  float* bias = scratch.take(block);
  float* sums = scratch.take(a.chunk * dim);
  float* top = scratch.take(a.chunk);
  float* total = scratch.take(a.chunk);
  std::fill(sums, sums + rows * dim, 0.0f);
  std::fill(top, top + rows, kFloor);
  std::fill(total, total + rows, 0.0f);
  const Operand queries = {head.query + first * a.query_token, a.query_token, false};
  for (int64_t start = 0; start < count; start += block) {
    const int64_t size = std::min(block, count - start), stride = padded(size);
    Operand key = {head.key + start * a.key_token, a.key_token, true};
    Operand value = {head.value + start * a.value_token, a.value_token, false};
    if (columns) {
      gather_rows(head.key, a.key_token, columns + start, size, dim, keys);
      gather_rows(head.value, a.value_token, columns + start, size, dim, values);
      key = {keys, dim, true};
      value = {values, dim, false};
    }
    multiply(a.sgemm, rows, size, dim, static_cast<float>(a.scale) * kLog2E, queries, key, 0.0f, weights,
             stride);
    if (head.bias) {
      for (int64_t i = 0; i < size; ++i) {
        bias[i] = kLog2E * head.bias[columns ? columns[start + i] : start + i];
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      float* w = weights + row * stride;
      if (head.bias) {
        for (int64_t i = 0; i < size; ++i) w[i] += bias[i];
      }
      pad_row(w, size);
      const float higher = std::max(top[row], row_max(w, size));
      const float rescale = exp2_fast(top[row] - higher);
      total[row] = total[row] * rescale + exponentiate(w, size, higher);
      top[row] = higher;
      if (start > 0) {
        float* sum = sums + row * dim;
        for (int64_t d = 0; d < dim; ++d) sum[d] *= rescale;
      }
    }
    multiply(a.sgemm, rows, dim, size, 1.0f, {weights, stride, false}, value, start > 0 ? 1.0f : 0.0f, sums,
             dim);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float factor = total[row] > 0 ? sign / total[row] : 0.0f;
    const float* base = from.data + (first + row) * from.stride;
    add_row(base, factor, sums + row * dim, to.data + (first + row) * to.stride, dim);
  }
}

// Chooses a chunk's columns by its sampled rows' probabilities: weights [rows, padded(kv_len)] over total
// [rows].
void choose_columns(const Attention& a, const Head& head, int64_t c, const float* weights, const float* total,
                    float* scores, float* scratch) {
  const int64_t size = a.kv_len, stride = padded(size);
  int32_t* columns = head.columns + c * a.kept;
  int64_t count = a.kept;
  if (a.kept == size && !head.bias) {
    for (int64_t m = 0; m < size; ++m) columns[m] = static_cast<int32_t>(m);
  } else {
    std::fill(scores, scores + stride, 0.0f);
    for (int64_t i = 0; i < a.per_chunk; ++i) {
      const int64_t row = a.samples[c * a.per_chunk + i] - a.chunk_starts[c];
      add_row(scores, total[row] > 0 ? 1.0f / total[row] : 0.0f, weights + row * stride, scores, stride);
    }
    if (head.bias) {
      for (int64_t m = 0; m < size; ++m) scores[m] = head.bias[m] > 0.5f * kMasked ? scores[m] : -1.0f;
    }
    count = choose_best(scores, size, a.kept, columns, scratch);
    std::fill(columns + count, columns + a.kept, 0);
  }
  head.counts[c] = static_cast<int32_t>(count);
}

int64_t refresh_scratch(const Attention& a) {
  const int64_t size = padded(a.kv_len), kept = padded(a.kept);
  const int64_t choice = size + choose_scratch(a.kv_len), sparse = kept * (a.chunk + a.head_dim);
  return a.chunk * (size + a.head_dim + 1) + size + choice + sparse;
}

// One chunk's dense output, its columns, and o_cache. The dense weights serve all three: they score the
// columns, and those of the chosen columns, over their own sum, are the sparse part's. So query @ key^T is
// done once.
void refresh_chunk(const Attention& a, const Head& head, int64_t c, Scratch& scratch) {
  const int64_t dim = a.head_dim, first = a.chunk_starts[c], rows = a.chunk_starts[c + 1] - first;
  const int64_t size = a.kv_len, stride = padded(size);
  const Rows o = output_rows(a, head), o_cache = cached_rows(a, head);
  float* weights = scratch.take(a.chunk * stride);
  float* sums = scratch.take(a.chunk * dim);
  float* total = scratch.take(a.chunk);
  float* bias = scratch.take(stride);
  if (head.bias) {
    for (int64_t m = 0; m < size; ++m) bias[m] = kLog2E * head.bias[m];
  }
  multiply(a.sgemm, rows, size, dim, static_cast<float>(a.scale) * kLog2E,
           {head.query + first * a.query_token, a.query_token, false}, {head.key, a.key_token, true}, 0.0f,
           weights, stride);
  for (int64_t row = 0; row < rows; ++row) {
    float* w = weights + row * stride;
    if (head.bias) {
      for (int64_t m = 0; m < size; ++m) w[m] += bias[m];
    }
    pad_row(w, size);
    total[row] = exponentiate(w, size, row_max(w, size));
  }
  multiply(a.sgemm, rows, dim, size, 1.0f, {weights, stride, false}, {head.value, a.value_token, false}, 0.0f,
           sums, dim);
  for (int64_t row = 0; row < rows; ++row) {
    const float factor = total[row] > 0 ? 1.0f / total[row] : 0.0f;
    add_row(nullptr, factor, sums + row * dim, o.data + (first + row) * o.stride, dim);
  }
  float* scores = scratch.take(stride);
  choose_columns(a, head, c, weights, total, scores, scratch.take(choose_scratch(size)));

  const int64_t count = head.counts[c], chosen_stride = padded(count);
  const int32_t* columns = head.columns + c * a.kept;
  float* chosen = scratch.take(a.chunk * padded(a.kept));
  float least = INFINITY;
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = weights + row * stride;
    float* to = chosen + row * chosen_stride;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      to[i] = from[columns[i]];
      sum += to[i];
    }
    total[row] = sum;
    least = std::min(least, sum);
  }
  if (!(least > kFaint)) {  // some row's mass lies far from the chosen columns: take their softmax by itself
    scratch.reserve(sparse_scratch(a));
    add_sparse(a, head, c, o, -1.0f, o_cache, scratch);
    return;
  }
  float* values = scratch.take(padded(a.kept) * dim);
  gather_rows(head.value, a.value_token, columns, count, dim, values);
  multiply(a.sgemm, rows, dim, count, 1.0f, {chosen, chosen_stride, false}, {values, dim, false}, 0.0f, sums,
           dim);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = first + row;
    const float* dense = o.data + token * o.stride;
    add_row(dense, -1.0f / total[row], sums + row * dim, o_cache.data + token * o_cache.stride, dim);
  }
}

template <typename Work>
void for_each_chunk(const Attention& a, int64_t threads, int64_t floats, Work work) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < a.batch * a.heads * a.chunks; ++task) {
    static thread_local Scratch scratch;
    scratch.reserve(floats);
    work(head_of(a, task / a.chunks), task % a.chunks, scratch);
  }
}

// Whether a refresh has filled columns and counts: what they hold is used as an address.
bool sound_columns(const Attention& a) {
  int32_t least = 0, most = 0;
  for (int64_t list = 0; list < a.batch * a.heads * a.chunks; ++list) {
    const int64_t count = a.counts[list];
    if (count == a.kv_len) continue;
    if (count < 0 || count > a.kept) return false;
    const int32_t* columns = a.columns + list * a.kept;
    for (int64_t i = 0; i < count; ++i) {
      least = std::min(least, columns[i]);
      most = std::max(most, columns[i]);
    }
  }
  return least >= 0 && most < a.kv_len;
}

}  // namespace

// o = dense attention; columns and counts chosen anew; o_cache = o - sparse part. 1: the tables are unsound.
extern "C" int attention_refresh(const Attention* arguments, int64_t threads) {
  const Attention& a = *arguments;
  if (!sound_tables(a.chunk_starts, a.samples, a.chunks, a.per_chunk, a.q_len, a.chunk)) return 1;
  const int64_t floats = std::max(refresh_scratch(a), sparse_scratch(a));
  for_each_chunk(a, threads, floats,
                 [&](const Head& head, int64_t c, Scratch& scratch) { refresh_chunk(a, head, c, scratch); });
  return 0;
}

// o = o_cache + sparse part. Returns 1 if the tables are unsound, 2 if columns or counts are.
extern "C" int attention_delta(const Attention* arguments, int64_t threads) {
  const Attention& a = *arguments;
  if (!sound_tables(a.chunk_starts, nullptr, a.chunks, 0, a.q_len, a.chunk)) return 1;
  if (!sound_columns(a)) return 2;
  for_each_chunk(a, threads, sparse_scratch(a), [&](const Head& head, int64_t c, Scratch& scratch) {
    add_sparse(a, head, c, cached_rows(a, head), 1.0f, output_rows(a, head), scratch);
  });
  return 0;
}
