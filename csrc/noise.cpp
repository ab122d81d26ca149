// Philox, Box-Muller and what is done with each number. CMake compiles this file once for each
// instruction set, with NOISE_KERNELS naming the table; the rules of tiles.cpp hold here too.
//
// Every operation rounds by itself: this file is compiled without contraction to fused
// multiply-adds. All steps are in the order of philox.py and perturb_reference.py, except that a
// factor that is a power of two may move: that changes no bit.

#include "noise.h"

#include "convert.h"
#include "tiles.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace realera_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kGroups = kBytes / 4;  // groups of four columns that are drawn together
constexpr int kHalf = kGroups / 2;
constexpr int kColumns = 4 * kGroups;
constexpr int kRounds = 10;
constexpr int kSets = 3;  // vectors of groups at a time: one alone waits for its own results
constexpr int64_t kChunk = 1024;  // columns drawn before they are used: a quarter of the L1 cache
static_assert(kChunk % kColumns == 0, "a chunk must be whole vectors");

typedef float Floats __attribute__((vector_size(kBytes)));
typedef float LooseFloats __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef uint64_t Wides __attribute__((vector_size(kBytes)));

// For each of COUNT vectors k. This is the innermost loop everywhere, so that neighboring
// instructions don't wait for each other.
#define EACH _Pragma("GCC unroll 8") for (int k = 0; k < COUNT; ++k)

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Philox -----------------------------------------------------------------------------------

// Products of the low halves. The compiler does not see that the high ones take no part.
INLINE Wides multiply(Wides a, uint32_t b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Wides>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Wides>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Wides>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  Wides product;
  for (int i = 0; i < kHalf; ++i) product[i] = (a[i] & 0xffffffffu) * b;
  return product;
#endif
}

INLINE uint64_t high(uint64_t product) { return product >> 32; }
INLINE uint64_t low(uint64_t product) { return product & 0xffffffffu; }

// What is the same for all groups of a token: the keys, and where the first two rounds are without
// the group's counter.
struct Token {
  uint64_t key_a[kRounds], key_b[kRounds];
  uint64_t first_c2, second_c0, second_c2, second_c3;
};

INLINE void set_keys(const Stream& stream, Token& token) {
  uint32_t a = static_cast<uint32_t>(stream.seed);
  uint32_t b = static_cast<uint32_t>(stream.seed >> 32);
  for (int i = 0; i < kRounds; ++i, a += kKeyA, b += kKeyB) {
    token.key_a[i] = a;
    token.key_b[i] = b;
  }
}

INLINE void set_token(const Stream& stream, uint32_t number, Token& token) {
  const uint64_t product = static_cast<uint64_t>(stream.sample) * kRoundB;
  const uint64_t c0 = high(product) ^ number ^ token.key_a[0];
  const uint64_t next = c0 * kRoundA;
  token.first_c2 = stream.prompt ^ token.key_b[0];
  token.second_c0 = low(product) ^ token.key_a[1];
  token.second_c2 = high(next) ^ token.key_b[1];
  token.second_c3 = low(next);
}

// The words of counters in the low halves of `c0`, to the low halves; what is above them is left
// there and takes no part.
template <int COUNT>
INLINE void philox(const Token& token, Wides (&c0)[COUNT], Wides (&c1)[COUNT], Wides (&c2)[COUNT],
                   Wides (&c3)[COUNT]) {
  EACH {
    const Wides first = multiply(c0[k], kRoundA);
    const Wides second = multiply((first >> 32) ^ token.first_c2, kRoundB);
    c0[k] = (second >> 32) ^ token.second_c0;
    c1[k] = second;
    c2[k] = first ^ token.second_c2;
    c3[k] = Wides{} + token.second_c3;
  }
#pragma GCC unroll 10
  for (int i = 2; i < kRounds; ++i) {
    EACH {
      const Wides a = multiply(c0[k], kRoundA);
      const Wides b = multiply(c2[k], kRoundB);
      c0[k] = (b >> 32) ^ c1[k] ^ token.key_a[i];
      c2[k] = (a >> 32) ^ c3[k] ^ token.key_b[i];
      c1[k] = b;
      c3[k] = a;
    }
  }
}

INLINE Ints join(Wides even, Wides odd) {
  return reinterpret_cast<Ints>((even & 0xffffffffu) | (odd << 32));
}

// Group number of each place of a vector, such that `store_columns` leaves them in order.
struct Order {
  uint64_t even[kHalf], odd[kHalf];
};

constexpr int group_at(int place) { return place % 4 * (kGroups / 4) + place / 4; }

constexpr Order make_order() {
  Order order{};
  for (int i = 0; i < kHalf; ++i) {
    order.even[i] = group_at(2 * i);
    order.odd[i] = group_at(2 * i + 1);
  }
  return order;
}

constexpr Order kOrder = make_order();

// ---- Normals ----------------------------------------------------------------------------------

constexpr float kSmallestUniform = 1e-7f;
constexpr int32_t kRootHalfBits = 0x3F3504F3;
constexpr uint32_t kSign = 0x80000000u;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
constexpr float kLog[] = {0.3333333134651184f,   -0.250008225440979f,  0.20001226663589478f,
                          -0.16623356938362122f, 0.14201761782169342f, -0.131601944565773f,
                          0.12761549651622772f,  -0.07634429633617401f};
constexpr float kSine[] = {6.2831854820251465f, -41.3416633605957f, 81.59236145019531f,
                           -75.39373779296875f};
constexpr float kCosine[] = {-19.739208221435547f, 64.93932342529297f, -85.4432373046875f,
                             59.229248046875f};

template <int COUNT, int TERMS>
INLINE void polynomial(const Floats (&x)[COUNT], const float (&coefficients)[TERMS],
                       Floats (&total)[COUNT]) {
  EACH total[k] = x[k] * coefficients[TERMS - 1] + coefficients[TERMS - 2];
#pragma GCC unroll 8
  for (int i = TERMS - 3; i >= 0; --i) EACH total[k] = total[k] * x[k] + coefficients[i];
}

INLINE Floats square_root(Floats x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<Floats>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#else
  for (int i = 0; i < kGroups; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

INLINE Floats uniform(Ints word) {
  return __builtin_convertvector(word ^ (word >> 31), Floats) * kUniformScale;
}

// Two words to two normals.
template <int COUNT>
INLINE void box_muller(const Ints (&first)[COUNT], const Ints (&second)[COUNT],
                       Floats (&cosine)[COUNT], Floats (&sine)[COUNT]) {
  Floats exponent[COUNT], f[COUNT], radius[COUNT];
  EACH {
    const Floats u = uniform(first[k]);
    const Floats clamped = u > kSmallestUniform ? u : Floats{} + kSmallestUniform;
    const Ints bits = reinterpret_cast<Ints>(clamped) - kRootHalfBits;
    exponent[k] = __builtin_convertvector(bits >> 23, Floats);
    f[k] = reinterpret_cast<Floats>((bits & 0x7FFFFF) + kRootHalfBits) - 1.0f;
  }
  Floats p[COUNT];
  polynomial(f, kLog, p);
  EACH {
    const Floats y = f[k] * f[k] * (f[k] * p[k] - 0.5f);
    const Floats logarithm = exponent[k] * kLn2High + (f[k] + (y + exponent[k] * kLn2Low));
    radius[k] = square_root(logarithm * -2.0f);
  }
  Ints quadrant[COUNT];
  Floats r[COUNT], r2[COUNT], s[COUNT], c[COUNT];
  EACH {
    const Floats u = uniform(second[k]);
    // Truncation is the floor: nothing is negative.
    quadrant[k] = __builtin_convertvector(u * 4.0f + 0.5f, Ints);
    r[k] = u - __builtin_convertvector(quadrant[k], Floats) * 0.25f;
    r2[k] = r[k] * r[k];
  }
  polynomial(r2, kSine, s);
  polynomial(r2, kCosine, c);
  EACH {
    s[k] = r[k] * s[k];
    c[k] = r2[k] * c[k] + 1.0f;
  }
  EACH {
    const Ints odd = (quadrant[k] & 1) != 0;
    const Words x = odd ? reinterpret_cast<Words>(s[k]) : reinterpret_cast<Words>(c[k]);
    const Words y = odd ? reinterpret_cast<Words>(c[k]) : reinterpret_cast<Words>(s[k]);
    // The sign bits: of the cosine where (quadrant + 1) & 2, of the sine where quadrant & 2.
    const Words turn = reinterpret_cast<Words>(quadrant[k]) << 30;
    cosine[k] = radius[k] * reinterpret_cast<Floats>(x ^ ((turn + (1u << 30)) & kSign));
    sine[k] = radius[k] * reinterpret_cast<Floats>(y ^ (turn & kSign));
  }
}

INLINE void store(float* to, Floats value) { *reinterpret_cast<LooseFloats*>(to) = value; }

// Interleaves the four numbers of each group.
INLINE void store_columns(Floats n0, Floats n1, Floats n2, Floats n3, float* out) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
#define UNPACK(half, type, a, b) _mm512_unpack##half##_##type(a, b)
#define DOUBLES(a) _mm512_castps_pd(a)
  typedef __m512 Native;
#elif defined(__AVX2__)
#define UNPACK(half, type, a, b) _mm256_unpack##half##_##type(a, b)
#define DOUBLES(a) _mm256_castps_pd(a)
  typedef __m256 Native;
#else
#define UNPACK(half, type, a, b) _mm_unpack##half##_##type(a, b)
#define DOUBLES(a) _mm_castps_pd(a)
  typedef __m128 Native;
#endif
  const Native a = reinterpret_cast<Native>(n0), b = reinterpret_cast<Native>(n1);
  const Native c = reinterpret_cast<Native>(n2), d = reinterpret_cast<Native>(n3);
  const auto ab = DOUBLES(UNPACK(lo, ps, a, b)), cd = DOUBLES(UNPACK(lo, ps, c, d));
  const auto ab_high = DOUBLES(UNPACK(hi, ps, a, b)), cd_high = DOUBLES(UNPACK(hi, ps, c, d));
  store(out, reinterpret_cast<Floats>(UNPACK(lo, pd, ab, cd)));
  store(out + kGroups, reinterpret_cast<Floats>(UNPACK(hi, pd, ab, cd)));
  store(out + 2 * kGroups, reinterpret_cast<Floats>(UNPACK(lo, pd, ab_high, cd_high)));
  store(out + 3 * kGroups, reinterpret_cast<Floats>(UNPACK(hi, pd, ab_high, cd_high)));
#undef UNPACK
#undef DOUBLES
#else
  for (int i = 0; i < kGroups; ++i) {
    float* four = out + 4 * group_at(i);
    four[0] = n0[i];
    four[1] = n1[i];
    four[2] = n2[i];
    four[3] = n3[i];
  }
#endif
}

// SETS vectors of groups, one behind the other.
template <int SETS>
INLINE void draw_sets(const Token& token, uint64_t group, float* out) {
  Wides c0[2 * SETS], c1[2 * SETS], c2[2 * SETS], c3[2 * SETS];
  for (int k = 0; k < SETS; ++k) {
    __builtin_memcpy(&c0[2 * k], kOrder.even, kBytes);
    __builtin_memcpy(&c0[2 * k + 1], kOrder.odd, kBytes);
    c0[2 * k] += group + k * kGroups;
    c0[2 * k + 1] += group + k * kGroups;
  }
  philox(token, c0, c1, c2, c3);
  Ints first[2 * SETS], second[2 * SETS];
  for (int k = 0; k < SETS; ++k) {
    first[2 * k] = join(c0[2 * k], c0[2 * k + 1]);
    second[2 * k] = join(c1[2 * k], c1[2 * k + 1]);
    first[2 * k + 1] = join(c2[2 * k], c2[2 * k + 1]);
    second[2 * k + 1] = join(c3[2 * k], c3[2 * k + 1]);
  }
  Floats cosine[2 * SETS], sine[2 * SETS];
  box_muller(first, second, cosine, sine);
  for (int k = 0; k < SETS; ++k) {
    store_columns(cosine[2 * k], sine[2 * k], cosine[2 * k + 1], sine[2 * k + 1],
                  out + k * kColumns);
  }
}

// Columns of a token from `first` on, a multiple of four; writes whole vectors.
void draw_columns(const Token& token, int64_t first, int64_t columns, float* out) {
  const uint64_t group = static_cast<uint64_t>(first / 4);
  int64_t start = 0;
  for (; start + (kSets - 1) * kColumns < columns; start += kSets * kColumns) {
    draw_sets<kSets>(token, group + start / 4, out + start);
  }
  for (; start < columns; start += kColumns) draw_sets<1>(token, group + start / 4, out + start);
}

// Calls `use(token, first column, columns, noise)` for pieces of `count` tokens.
template <class Use>
INLINE void each_chunk(const Stream& stream, int64_t token, int64_t count, int64_t width, Use use) {
  alignas(kBytes) float z[kChunk];
  Token now;
  set_keys(stream, now);
  for (int64_t t = 0; t < count; ++t) {
    set_token(stream, static_cast<uint32_t>(token + t), now);
    for (int64_t start = 0; start < width; start += kChunk) {
      const int64_t columns = least(kChunk, width - start);
      draw_columns(now, start, columns, z);
      use(t, start, columns, z);
    }
  }
}

// ---- Scalars ----------------------------------------------------------------------------------

template <class S>
struct Bits;
template <>
struct Bits<float> {
  typedef int32_t type;
};
template <>
struct Bits<double> {
  typedef int64_t type;
};

// Calls `use(row, first column, columns, values)` for pieces of rows, in S.
template <class From, class S, class Use>
INLINE void each_piece(const Rows& e, int64_t width, Use use) {
  S wide[kChunk];
  for (int64_t r = 0; r < e.count; ++r) {
    const From* in = static_cast<const From*>(e.data) + r * e.row_stride;
    for (int64_t start = 0; start < width; start += kChunk) {
      const int64_t columns = least(kChunk, width - start);
      widen_row(in + start, columns, wide);
      use(r, start, columns, wide);
    }
  }
}

// Their bits as integers order magnitudes, and put NaN above all.
template <class From, class S>
double largest_of(const Rows& e, int64_t width) {
  typedef typename Bits<S>::type Word;
  Word most = 0;
  each_piece<From, S>(e, width, [&](int64_t, int64_t, int64_t columns, const S* values) {
    for (int64_t c = 0; c < columns; ++c) {
      const S magnitude = values[c] < 0 ? -values[c] : values[c];
      Word bits;
      __builtin_memcpy(&bits, &magnitude, sizeof bits);
      // Of a NaN the comparison above keeps the sign.
      bits &= sizeof(S) == 4 ? Word{0x7fffffff} : static_cast<Word>(INT64_MAX);
      most = bits > most ? bits : most;
    }
  });
  S value;
  __builtin_memcpy(&value, &most, sizeof value);
  return static_cast<double>(value);
}

template <class From, class S>
uint64_t square_sum_of(const Rows& e, int64_t width, double inverse) {
  int64_t total = 0;
  each_piece<From, S>(e, width, [&](int64_t, int64_t, int64_t columns, const S* values) {
    for (int64_t c = 0; c < columns; ++c) {
      const double value = static_cast<double>(values[c]) * inverse;
      total += static_cast<int64_t>(value * value * kNormScale + 0.5);
    }
  });
  return static_cast<uint64_t>(total);
}

template <class From, class S>
void scaled_of(const Rows& e, int64_t width, double inverse, float scale, float* out) {
  const S factor = static_cast<S>(inverse);
  each_piece<From, S>(e, width,
                      [=](int64_t r, int64_t start, int64_t columns, const S* values) {
                        float* __restrict to = out + r * width + start;
                        for (int64_t c = 0; c < columns; ++c) {
                          to[c] = static_cast<float>(values[c] * factor) * scale;
                        }
                      });
}

double largest(const Rows& e, int64_t width) {
  switch (e.kind) {
    case Kind::kFloat: return largest_of<float, float>(e, width);
    case Kind::kDouble: return largest_of<double, double>(e, width);
    case Kind::kBFloat16: return largest_of<BFloat16, float>(e, width);
    case Kind::kHalf: return largest_of<Half, float>(e, width);
  }
  __builtin_unreachable();
}

uint64_t square_sum(const Rows& e, int64_t width, double inverse) {
  switch (e.kind) {
    case Kind::kFloat: return square_sum_of<float, float>(e, width, inverse);
    case Kind::kDouble: return square_sum_of<double, double>(e, width, inverse);
    case Kind::kBFloat16: return square_sum_of<BFloat16, float>(e, width, inverse);
    case Kind::kHalf: return square_sum_of<Half, float>(e, width, inverse);
  }
  __builtin_unreachable();
}

void scaled(const Rows& e, int64_t width, double inverse, float scale, float* out) {
  switch (e.kind) {
    case Kind::kFloat: return scaled_of<float, float>(e, width, inverse, scale, out);
    case Kind::kDouble: return scaled_of<double, double>(e, width, inverse, scale, out);
    case Kind::kBFloat16: return scaled_of<BFloat16, float>(e, width, inverse, scale, out);
    case Kind::kHalf: return scaled_of<Half, float>(e, width, inverse, scale, out);
  }
}

Moments moments(const Stream& stream, int64_t token, int64_t count, int64_t width,
                const float* e) {
  int64_t inner = 0, square = 0;
  each_chunk(stream, token, count, width,
             [&](int64_t t, int64_t start, int64_t columns, const float* z) {
               const float* other = e + t * width + start;
               int64_t a = 0, b = 0;
               for (int64_t c = 0; c < columns; ++c) {
                 a += static_cast<int32_t>(z[c] * other[c]);
                 b += static_cast<int32_t>(z[c] * z[c] * kSquareScale);
               }
               inner += a;
               square += b;
             });
  return {static_cast<uint64_t>(inner), static_cast<uint64_t>(square)};
}

// ---- Rows -------------------------------------------------------------------------------------

template <class S>
INLINE void combine(const S* e, const float* z, int64_t columns, S alpha, S scale, S* __restrict out) {
  for (int64_t c = 0; c < columns; ++c) out[c] = alpha * e[c] + scale * static_cast<S>(z[c]);
}

template <class T, class S>
INLINE void write(const T* e, const float* z, int64_t columns, S alpha, S scale, T* out) {
  if constexpr (sizeof(T) == sizeof(S)) {
    combine(e, z, columns, alpha, scale, out);
  } else {
    S wide[kChunk], sum[kChunk];
    widen_row(e, columns, wide);
    combine(wide, z, columns, alpha, scale, sum);
    narrow_row(sum, columns, out);
  }
}

template <class T, class S>
void rows_of(const Stream& stream, int64_t token, int64_t width, const Rows& e, S alpha, S scale,
             T* out) {
  const T* in = static_cast<const T*>(e.data);
  const int64_t stride = e.row_stride;
  each_chunk(stream, token, e.count, width,
             [=](int64_t t, int64_t start, int64_t columns, const float* z) {
               write(in + t * stride + start, z, columns, alpha, scale, out + t * width + start);
             });
}

void rows(const Stream& stream, int64_t token, int64_t width, const Rows& e, double alpha,
          double scale, void* out) {
  const float a = static_cast<float>(alpha), s = static_cast<float>(scale);
  switch (e.kind) {
    case Kind::kFloat:
      return rows_of(stream, token, width, e, a, s, static_cast<float*>(out));
    case Kind::kBFloat16:
      return rows_of(stream, token, width, e, a, s, static_cast<BFloat16*>(out));
    case Kind::kHalf:
      return rows_of(stream, token, width, e, a, s, static_cast<Half*>(out));
    case Kind::kDouble:
      return rows_of(stream, token, width, e, alpha, scale, static_cast<double*>(out));
  }
}

}  // namespace

extern const NoiseKernels NOISE_KERNELS;
const NoiseKernels NOISE_KERNELS = {
    NOISE_NAME, largest, square_sum, scaled, moments, rows,
};

}  // namespace realera_fast
