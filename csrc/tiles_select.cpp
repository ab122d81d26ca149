#include "noise.h"
#include "tiles.h"

namespace realera_fast {

extern const Kernels tiles_baseline;
extern const NoiseKernels noise_baseline;
#ifdef TILES_X86
extern const Kernels tiles_avx2, tiles_avx512;
extern const NoiseKernels noise_avx2, noise_avx512;
#endif

namespace {

#ifdef TILES_X86
template <class Table>
const Table& choose(const Table& baseline, const Table& avx2, const Table& avx512) {
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (wide && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return avx512;
  }
  // No processor has AVX2 without F16C, which not every compiler can ask for.
  return wide ? avx2 : baseline;
}
#define CHOOSE(name) choose(name##_baseline, name##_avx2, name##_avx512)
#else
#define CHOOSE(name) name##_baseline
#endif

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = CHOOSE(tiles);
  return chosen;
}

const NoiseKernels& noise_kernels() {
  static const NoiseKernels& chosen = CHOOSE(noise);
  return chosen;
}

}  // namespace realera_fast
