// What every native kernel shares: a row-major GEMM, 2^x, scratch memory, and the choice of the best columns.
// kernels/native_build.py puts this text in front of native_attention.cpp or native_mlp.cpp.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace {

// Fortran SGEMM. Sizes are passed as the address of 64-bit integers: on a little-endian machine that reads
// right for BLAS libraries with 32-bit and with 64-bit integers.
using Sgemm = void (*)(const char*, const char*, const int64_t*, const int64_t*, const int64_t*, const float*,
                       const float*, const int64_t*, const float*, const int64_t*, const float*, float*,
                       const int64_t*);

struct Operand {
  const float* data;
  int64_t stride;  // elements between rows
  bool transposed;
};

// c[m, n] = alpha * a @ b + beta * c, row-major: column-major BLAS sees the transposes, so b goes first.
inline void multiply(Sgemm sgemm, int64_t m, int64_t n, int64_t k, float alpha, Operand a, Operand b,
                     float beta, float* c, int64_t c_stride) {
  const char* a_form = a.transposed ? "T" : "N";
  const char* b_form = b.transposed ? "T" : "N";
  sgemm(b_form, a_form, &n, &m, &k, &alpha, b.data, &b.stride, a.data, &a.stride, &beta, c, &c_stride);
}

constexpr int64_t kLanes = 16;  // floats that inner loops take at a time; rows of scratch are padded to them

inline int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMasked = -1e30f;  // the bias of a masked column
constexpr float kFloor = -1e20f;   // no row maximum lies below it, so masked columns weigh exactly 0

// 2^x to 2.4e-7 for x <= 127, and exactly 0 below -127. Inlined, so that loops vectorise without libmvec.
// The coefficients are the degree-5 minimax fit of 2^f on [-1/2, 1/2].
inline float exp2_fast(float x) {
  const float whole = std::rint(x);
  const float f = x - whole;
  float p = 1.3276471993e-3f;
  p = p * f + 9.6755413345e-3f;
  p = p * f + 5.5507132735e-2f;
  p = p * f + 2.4022119724e-1f;
  p = p * f + 6.9314696706e-1f;
  p = p * f + 1.0000000717f;
  const int32_t bits = (std::max(static_cast<int32_t>(whole), -127) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// What a printed region calls. They hide the C library's functions of the same names, which only some
// versions of it offer in vectors: absolute error 1.5e-7 at most, of expf relative to the result.
namespace fast {

inline float expf(float x) { return exp2_fast(std::min(kLog2E * x, 127.0f)); }

inline float tanhf(float x) { return 1.0f - 2.0f / (1.0f + expf(2.0f * x)); }

// 1 - erf(|x|) = 2^p(|x|), where p is the degree-8 minimax fit of log2(erfc) on [0, 4]; beyond it erf is 1.
inline float erff(float x) {
  const float a = std::min(std::fabs(x), 4.0f);
  float p = -4.535841015e-5f;
  p = p * a + 4.455061215e-4f;
  p = p * a - 1.489436785e-3f;
  p = p * a - 7.746373796e-4f;
  p = p * a + 2.825368762e-2f;
  p = p * a - 1.484816179e-1f;
  p = p * a - 9.184163927e-1f;
  p = p * a - 1.627908593f;
  return std::copysign(1.0f - exp2_fast(p * a), x);
}

}  // namespace fast

// Uninitialised floats that grow and stay with their thread: fresh pages cost more than the arithmetic on
// them. Each piece begins on a cache line: loads across two lines would take twice as long.
class Scratch {
 public:
  void reserve(int64_t floats) {
    used_ = 0;
    if (floats + kSlack > size_) {
      size_ = padded(floats + kSlack);
      data_.reset(static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float))));
      if (!data_) throw std::bad_alloc();
    }
  }
  float* take(int64_t floats) {
    float* start = data_.get() + used_;
    used_ += padded(floats);
    return start;
  }

 private:
  static constexpr int64_t kSlack = 1024;  // what padding a few dozen pieces can add
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0, used_ = 0;
};

inline void gather_rows(const float* source, int64_t stride, const int32_t* rows, int64_t count,
                        int64_t width, float* out) {
  constexpr int64_t kAhead = 8;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) __builtin_prefetch(source + rows[i + kAhead] * stride);
    std::memcpy(out + i * width, source + rows[i] * stride, width * sizeof(float));
  }
}

constexpr int64_t kBins = 4096;  // exponent and 4 bits of mantissa of a non-negative float

// Floats of scratch that choose_best needs.
inline int64_t choose_scratch(int64_t size) { return kBins + size; }

// A float's bits: those of floats that are not negative sort as the floats do. NaN sorts above or is
// negative.
inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Writes the indices of the `keep` largest scores, ascending, to `chosen`; equal scores at the edge go to the
// lower index. A negative score is never chosen. Returns how many were written. Exact, for the price of a
// histogram: the edge lies in one bin, whose members alone are sorted.
inline int64_t choose_best(const float* scores, int64_t size, int64_t keep, int32_t* chosen, float* scratch) {
  auto* bins = reinterpret_cast<int32_t*>(scratch);
  auto* edge = bins + kBins;
  std::fill(bins, bins + kBins, 0);
  int64_t valid = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int32_t bits = bits_of(scores[i]);
    if (bits >= 0) {
      ++bins[bits >> 19];
      ++valid;
    }
  }
  int64_t written = 0;
  if (valid <= keep) {
    for (int64_t i = 0; i < size; ++i) {
      if (bits_of(scores[i]) >= 0) chosen[written++] = static_cast<int32_t>(i);
    }
    return written;
  }
  int64_t bin = kBins, above = 0;  // scores in bins above `bin`
  while (above + bins[bin - 1] < keep) above += bins[--bin];
  --bin;
  int64_t members = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int32_t bits = bits_of(scores[i]);
    edge[members] = bits;
    members += bits >> 19 == bin;
  }
  const int64_t wanted = keep - above;
  std::nth_element(edge, edge + (wanted - 1), edge + members, [](int32_t a, int32_t b) { return a > b; });
  const int32_t threshold = edge[wanted - 1];
  int64_t ties = wanted;
  for (int64_t i = 0; i < wanted; ++i) ties -= edge[i] > threshold;
  for (int64_t i = 0; i < size && written < keep; ++i) {
    const int32_t bits = bits_of(scores[i]);
    const bool tie = bits == threshold && ties > 0;
    ties -= tie;
    chosen[written] = static_cast<int32_t>(i);
    written += tie || bits > threshold;
  }
  return written;
}

// Whether chunks cover 0..tokens in lengths of 1..chunk, and samples lie in their chunks.
inline bool sound_tables(const int32_t* starts, const int32_t* samples, int64_t chunks, int64_t per_chunk,
                         int64_t tokens, int64_t chunk) {
  if (starts[0] != 0 || starts[chunks] != tokens) return false;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t length = starts[c + 1] - starts[c];
    if (length < 1 || length > chunk) return false;
    for (int64_t i = 0; i < per_chunk; ++i) {
      const int32_t token = samples[c * per_chunk + i];
      if (token < starts[c] || token >= starts[c + 1]) return false;
    }
  }
  return true;
}

}  // namespace

// Zero when `sgemm` multiplies as a Fortran SGEMM does.
extern "C" int check_sgemm(Sgemm sgemm) {
  const float a[] = {1, 2, 3, 4, 5, 6}, b[] = {1, 0, 2, 0, 1, 3};
  float c[] = {1, 1, 1, 1};
  multiply(sgemm, 2, 2, 3, 2.0f, {a, 3, false}, {b, 3, true}, 1.0f, c, 2);
  const float expected[] = {15, 23, 33, 47};
  return std::equal(c, c + 4, expected) ? 0 : 1;
}
