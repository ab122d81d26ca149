// Runs CUDA kernels on the host: enough of the language for csrc/cuda/*.cuh, and no more.
//
// Every CUDA thread of a block is a thread of the operating system, so that the sanitizers for
// addresses, undefined behavior and data races see a kernel as they see any program. Blocks run one
// after another. Dynamic shared memory is allocated to the byte and filled with NaN for each block.
// What this can't show: races between blocks, alignment faults that the host forgives (the
// undefined-behavior sanitizer reports those), and anything about speed.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include <pthread.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
};
inline float __half2float(__half value) {
  return static_cast<float>(std::bit_cast<_Float16>(value.bits));
}
inline __half __float2half_rn(float value) {
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(value))};
}

using std::isfinite;

namespace emulation {

constexpr int kWarp = 32;

// Two barriers by turns. With one, a thread that is slow to leave it would, in the eyes of the
// thread sanitizer, come after everything that quicker threads did up to their next arrival: on one
// core that hides most races. Not std::barrier either: libstdc++'s yields before it sleeps, which
// is slow on a busy machine.
class Barrier {
 public:
  explicit Barrier(int threads) {
    for (auto& turn : turns_) pthread_barrier_init(&turn, nullptr, threads);
  }
  ~Barrier() {
    for (auto& turn : turns_) pthread_barrier_destroy(&turn);
  }
  Barrier(const Barrier&) = delete;
  // `count` is the calling thread's own: how often it has waited here.
  void wait(unsigned& count) { pthread_barrier_wait(&turns_[count++ % 2]); }

 private:
  pthread_barrier_t turns_[2];
};

struct Warp {
  explicit Warp(int lanes) : barrier(lanes) {}
  Barrier barrier;
  uint64_t exchange[kWarp][4] = {};
};

struct Block {
  explicit Block(int threads) : barrier(threads) {
    for (int first = 0; first < threads; first += kWarp) {
      warps.push_back(std::make_unique<Warp>(std::min(kWarp, threads - first)));
    }
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  unsigned char* shared = nullptr;
};

inline thread_local Block* block = nullptr;
inline thread_local unsigned block_waits = 0;
inline thread_local unsigned warp_waits = 0;

inline Warp& warp();
inline int lane();

}  // namespace emulation

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline emulation::Warp& emulation::warp() { return *block->warps[threadIdx.x / kWarp]; }
inline int emulation::lane() { return threadIdx.x % kWarp; }

#define SHARED_MEMORY(name) unsigned char* const name = emulation::block->shared

inline void __syncthreads() { emulation::block->barrier.wait(emulation::block_waits); }
inline void __syncwarp(unsigned = ~0u) { emulation::warp().barrier.wait(emulation::warp_waits); }

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  emulation::Warp& warp = emulation::warp();
  std::memcpy(warp.exchange[emulation::lane()], &value, sizeof value);
  warp.barrier.wait(emulation::warp_waits);
  T result;
  std::memcpy(&result, warp.exchange[source % emulation::kWarp], sizeof result);
  warp.barrier.wait(emulation::warp_waits);
  return result;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, emulation::lane() ^ lanes);
}

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

namespace emulation {

// kernel<<<grid, threads, shared_bytes>>>(arguments...).
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes,
            const Arguments&... arguments) {
  Block state(threads);
  // A vector per block, not one for all: a read past the end must hit the sanitizer's red zone.
  std::unique_ptr<unsigned char, decltype(&std::free)> shared(nullptr, &std::free);
  auto run = [&](int thread) {
    block = &state;
    threadIdx = {static_cast<unsigned>(thread), 0, 0};
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    gridDim = grid;
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        if (thread == 0) {
          void* fresh = nullptr;
          if (posix_memalign(&fresh, 16, shared_bytes) != 0) std::abort();
          std::memset(fresh, 0xff, shared_bytes);  // a NaN in every floating-point type
          shared.reset(static_cast<unsigned char*>(fresh));
          state.shared = shared.get();
        }
        state.barrier.wait(block_waits);
        blockIdx = {x, y, 0};
        kernel(arguments...);
        state.barrier.wait(block_waits);
      }
    }
  };
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) pool.emplace_back(run, thread);
  for (std::thread& thread : pool) thread.join();
}

}  // namespace emulation
