// The one place where a kernel's source tells nvcc from the host compiler, which runs the same
// kernels in the tests (tests/emulation), as the machines that build this have no GPU.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// One untyped array for every kernel: redeclaring it with another type is an error.
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "cuda_emulation.h"
#endif

namespace realera_fast {

constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <class Acc, class W>
__device__ inline Acc widen(W value) {
  return static_cast<Acc>(value);
}
template <>
__device__ inline float widen<float>(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <>
__device__ inline float widen<float>(__half value) {
  return __half2float(value);
}

// To nearest, ties to even, for every type.
template <class W, class Acc>
__device__ inline W narrow(Acc value) {
  return static_cast<W>(value);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half narrow<__half>(float value) {
  return __float2half_rn(value);
}

}  // namespace realera_fast
