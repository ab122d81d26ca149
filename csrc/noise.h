// The inner loops of perturb.cpp, compiled once for each instruction set like those of tiles.h.
// What they compute is defined, to the last bit, by realera_fast/ops/philox.py and
// realera_fast/ops/perturb_reference.py.

#pragma once

#include "tiles.h"

#include <cstdint>

namespace realera_fast {

constexpr uint32_t kRoundA = 0xD2511F53, kRoundB = 0xCD9E8D57;
constexpr uint32_t kKeyA = 0x9E3779B9, kKeyB = 0xBB67AE85;
constexpr float kUniformScale = 4.6566127342e-10f;

// Fixed points of the sums, as in perturb_reference.py.
constexpr double kNormScale = 549755813888.0;  // 2^39
constexpr float kSquareScale = 33554432.0f;    // 2^25

// The counters and the key that all numbers of a sample share.
struct Stream {
  uint64_t seed;
  uint32_t sample;
  uint32_t prompt;
};

// Sums in fixed point of E.z / rms(E) and |z|^2, modulo 2^64.
struct Moments {
  uint64_t inner;
  uint64_t square;
};

// Rows of embeddings have their columns one behind the other; `token` is the counter of the first.
struct NoiseKernels {
  const char* name;

  // The magnitude that is greatest; NaN if there is one.
  double (*largest)(const Rows& e, int64_t width);
  // Sum of (inverse e)^2 in fixed point.
  uint64_t (*square_sum)(const Rows& e, int64_t width, double inverse);
  // out = (inverse e) in float32, times a power of two.
  void (*scaled)(const Rows& e, int64_t width, double inverse, float scale, float* out);

  // Sums over `count` tokens; `e` as `scaled` leaves it.
  Moments (*moments)(const Stream& stream, int64_t token, int64_t count, int64_t width,
                     const float* e);

  // out = alpha e + scale z, of the type of `e`.
  void (*rows)(const Stream& stream, int64_t token, int64_t width, const Rows& e, double alpha,
               double scale, void* out);
};

// Those of the set that `kernels()` returns.
const NoiseKernels& noise_kernels();

}  // namespace realera_fast
