// Conversions between the types of rows, for the files that are compiled once for each instruction
// set (see tiles.cpp): so in an anonymous namespace, and without templates of the standard library.

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace realera_fast {
namespace {

#define INLINE inline __attribute__((always_inline))

typedef uint16_t Bits16;
typedef uint32_t __attribute__((may_alias)) Bits32;

INLINE float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

struct BFloat16 {
  Bits16 bits;
};
struct Half {
  Bits16 bits;
};

INLINE float widen(float value) { return value; }
INLINE double widen(double value) { return value; }
INLINE float widen(BFloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

// The two conversions of M. Dukhan's FP16 library, which PyTorch uses too: no branches, so loops
// over them are vectorized where the processor has no instruction of its own.
INLINE float widen(Half value) {
  const uint32_t shifted = static_cast<uint32_t>(value.bits) << 16;
  const uint32_t twice = shifted + shifted;
  const float normal = as_float((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = as_float((twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = twice < (1u << 27) ? as_bits(subnormal) : as_bits(normal);
  return as_float((shifted & 0x80000000u) | magnitude);
}

INLINE void narrow_to(float value, float& out) { out = value; }
INLINE void narrow_to(double value, double& out) { out = value; }

INLINE void narrow_to(float value, BFloat16& out) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding up could carry a NaN's payload into infinity.
  out.bits = static_cast<Bits16>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

INLINE void narrow_to(float value, Half& out) {
  const uint32_t bits = as_bits(value);
  const uint32_t twice = bits + bits;
  float base = (as_float(bits & 0x7fffffffu) * 0x1.0p+112f) * 0x1.0p-110f;
  const uint32_t exponent = twice & 0xff000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  base = as_float((bias >> 1) + 0x07800000u) + base;
  const uint32_t sum = as_bits(base);
  const uint32_t magnitude = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  out.bits = static_cast<Bits16>(((bits & 0x80000000u) >> 16) |
                                 (twice > 0xff000000u ? 0x7e00u : magnitude));
}

template <class From, class To>
INLINE void widen_row(const From* in, int64_t width, To* __restrict out) {
  for (int64_t c = 0; c < width; ++c) out[c] = static_cast<To>(widen(in[c]));
}

template <class From, class To>
INLINE void narrow_row(const From* in, int64_t width, To* __restrict out) {
  for (int64_t c = 0; c < width; ++c) narrow_to(in[c], out[c]);
}

#if defined(__F16C__)
INLINE void widen_row(const Half* in, int64_t width, float* __restrict out) {
  int64_t c = 0;
  for (; c + 8 <= width; c += 8) {
    _mm256_storeu_ps(out + c, _mm256_cvtph_ps(_mm_loadu_si128(
                                  reinterpret_cast<const __m128i*>(in + c))));
  }
  for (; c < width; ++c) out[c] = widen(in[c]);
}

INLINE void narrow_row(const float* in, int64_t width, Half* __restrict out) {
  int64_t c = 0;
  for (; c + 8 <= width; c += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + c), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; c < width; ++c) narrow_to(in[c], out[c]);
}
#endif

}  // namespace
}  // namespace realera_fast
