// The MLP's chosen neurons of each chunk of tokens, float32. kernels/reference.py says what it means.
// In front of this text kernels/native_build.py puts `kInputs` and the activation, `fast::region(h, i)`.

struct Mlp {  // kernels/native.py declares the same fields, in the same order
  Sgemm sgemm;
  const float* x;                   // [batch, tokens, in_width]
  const float* weights[kInputs];    // each [hidden, in_width]
  const float* biases[kInputs];     // each [hidden], or null
  int64_t weight_strides[kInputs];  // elements between a weight's rows
  const float *down, *down_norm;    // [hidden, out_width], [hidden]
  const int32_t *chunk_starts, *samples;
  float* act_cache;        // [batch, hidden, tokens], any strides but 1 along tokens
  float* sample_cache;     // [batch, chunks, per_chunk, hidden]
  float *out_cache, *out;  // [batch, tokens, out_width]
  int64_t batch, tokens, in_width, hidden, out_width;
  int64_t chunks, chunk, per_chunk, kept;
  int64_t x_batch, x_token, act_batch, act_neuron;
};

namespace {

constexpr int64_t kScoreRows = 64;
constexpr int64_t kBlockFloats = 1 << 18;  // gathered rows of one weight at a time: 1 MB
constexpr int64_t kBlockLeast = 128;

int64_t block_size(const Mlp& m) {
  const int64_t fits = kBlockFloats / std::max(m.in_width, m.out_width);
  return std::min(m.kept, std::max(kBlockLeast, fits));
}

// How much the sampled tokens' activations changed in chunks [begin, end) of one batch item: scores[chunk,
// f].
void score_group(const Mlp& m, int64_t b, int64_t begin, int64_t end, float* scores, Scratch& scratch) {
  const int64_t rows = (end - begin) * m.per_chunk, hidden = m.hidden;
  scratch.reserve(rows * (m.in_width + kInputs * hidden));
  float* x = scratch.take(rows * m.in_width);
  float* h[kInputs];
  gather_rows(m.x + b * m.x_batch, m.x_token, m.samples + begin * m.per_chunk, rows, m.in_width, x);
  for (int j = 0; j < kInputs; ++j) {
    h[j] = scratch.take(rows * hidden);
    if (m.biases[j]) {
      for (int64_t r = 0; r < rows; ++r) std::memcpy(h[j] + r * hidden, m.biases[j], hidden * sizeof(float));
    }
    multiply(m.sgemm, rows, hidden, m.in_width, 1.0f, {x, m.in_width, false},
             {m.weights[j], m.weight_strides[j], true}, m.biases[j] ? 1.0f : 0.0f, h[j], hidden);
  }
  for (int64_t c = begin; c < end; ++c) {
    float* score = scores + (b * m.chunks + c) * hidden;
    std::fill(score, score + hidden, 0.0f);
    for (int64_t i = 0; i < m.per_chunk; ++i) {
      const int64_t row = ((c - begin) * m.per_chunk + i) * hidden;
      const float* old = m.sample_cache + ((b * m.chunks + c) * m.per_chunk + i) * hidden;
#pragma omp simd
      for (int64_t f = 0; f < hidden; ++f) score[f] += std::fabs(fast::region(h, row + f) - old[f]);
    }
#pragma omp simd
    for (int64_t f = 0; f < hidden; ++f) score[f] *= m.down_norm[f];
  }
}

int64_t update_scratch(const Mlp& m) {
  const int64_t block = block_size(m);
  return block * (std::max(m.in_width, m.out_width) + (kInputs + 1) * m.chunk) + m.kept +
         choose_scratch(m.hidden);
}

// Recomputes one chunk's chosen neurons: the caches take the new activations, the output their change.
void update_chunk(const Mlp& m, int64_t b, int64_t c, const float* scores, Scratch& scratch) {
  const int64_t first = m.chunk_starts[c], length = m.chunk_starts[c + 1] - first, block = block_size(m);
  scratch.reserve(update_scratch(m));
  float* rows = scratch.take(block * std::max(m.in_width, m.out_width));
  float* change = scratch.take(block * m.chunk);
  float* h[kInputs];
  for (int j = 0; j < kInputs; ++j) h[j] = scratch.take(block * m.chunk);
  int32_t* chosen = nullptr;
  int64_t count = m.hidden;
  if (m.kept < m.hidden) {
    chosen = reinterpret_cast<int32_t*>(scratch.take(m.kept));
    count = choose_best(scores + (b * m.chunks + c) * m.hidden, m.hidden, m.kept, chosen,
                        scratch.take(choose_scratch(m.hidden)));
  }
  const Operand x = {m.x + b * m.x_batch + first * m.x_token, m.x_token, true};
  float* act = m.act_cache + b * m.act_batch + first;
  float* sampled = m.sample_cache + (b * m.chunks + c) * m.per_chunk * m.hidden;
  float* out_cache = m.out_cache + (b * m.tokens + first) * m.out_width;
  for (int64_t start = 0; start < count; start += block) {
    const int64_t size = std::min(block, count - start);
    const int32_t* neurons = chosen ? chosen + start : nullptr;
    for (int j = 0; j < kInputs; ++j) {
      Operand up = {m.weights[j] + start * m.weight_strides[j], m.weight_strides[j], false};
      if (neurons) {
        gather_rows(m.weights[j], m.weight_strides[j], neurons, size, m.in_width, rows);
        up = {rows, m.in_width, false};
      }
      if (m.biases[j]) {
        for (int64_t i = 0; i < size; ++i) {
          const float bias = m.biases[j][neurons ? neurons[i] : start + i];
          std::fill(h[j] + i * length, h[j] + (i + 1) * length, bias);
        }
      }
      multiply(m.sgemm, size, length, m.in_width, 1.0f, up, x, m.biases[j] ? 1.0f : 0.0f, h[j], length);
    }
    for (int64_t i = 0; i < size; ++i) {
      const int64_t neuron = neurons ? neurons[i] : start + i;
      float* old = act + neuron * m.act_neuron;
      float* changed = change + i * length;
#pragma omp simd
      for (int64_t t = 0; t < length; ++t) {
        const float fresh = fast::region(h, i * length + t);
        changed[t] = fresh - old[t];
        old[t] = fresh;
      }
      for (int64_t s = 0; s < m.per_chunk; ++s) {
        sampled[s * m.hidden + neuron] = old[m.samples[c * m.per_chunk + s] - first];
      }
    }
    Operand down = {m.down + start * m.out_width, m.out_width, false};
    if (neurons) {
      gather_rows(m.down, m.out_width, neurons, size, m.out_width, rows);
      down.data = rows;
    }
    multiply(m.sgemm, length, m.out_width, size, 1.0f, {change, length, true}, down, 1.0f, out_cache,
             m.out_width);
  }
  std::memcpy(m.out + (b * m.tokens + first) * m.out_width, out_cache, length * m.out_width * sizeof(float));
}

}  // namespace

// out = out_cache, after the chosen neurons' change. 1: the tables are unsound.
extern "C" int mlp_delta(const Mlp* arguments, int64_t threads) {
  const Mlp& m = *arguments;
  if (!sound_tables(m.chunk_starts, m.samples, m.chunks, m.per_chunk, m.tokens, m.chunk)) return 1;
  static thread_local Scratch table;
  float* scores = nullptr;
  if (m.kept < m.hidden) {
    table.reserve(m.batch * m.chunks * m.hidden);
    scores = table.take(m.batch * m.chunks * m.hidden);
  }
  // Chunks scored by one GEMM: enough rows to fill it, in a number of groups that the threads share evenly.
  int64_t groups = (m.chunks * m.per_chunk + kScoreRows - 1) / kScoreRows;
  while (groups < m.chunks && m.batch * groups % threads) ++groups;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch scratch;
    if (scores) {
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < m.batch * groups; ++task) {
        const int64_t index = task % groups;
        score_group(m, task / groups, m.chunks * index / groups, m.chunks * (index + 1) / groups, scores,
                    scratch);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < m.batch * m.chunks; ++task) {
      update_chunk(m, task / m.chunks, task % m.chunks, scores, scratch);
    }
  }
  return 0;
}
