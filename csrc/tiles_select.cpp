#include "dispatch.h"
#include "noise.h"
#include "tiles.h"

#include <atomic>
#include <string>

namespace realera_fast {

extern const Kernels tiles_baseline;
extern const NoiseKernels noise_baseline;
#ifdef TILES_X86
extern const Kernels tiles_avx2, tiles_avx512;
extern const NoiseKernels noise_avx2, noise_avx512;
#endif

namespace {

// Loops compiled for one instruction set.
struct TileSet {
  const Kernels& tiles;
  const NoiseKernels& noise;
};

// The sets whose instructions this processor has, the best one last.
std::vector<TileSet> available() {
  std::vector<TileSet> sets{{tiles_baseline, noise_baseline}};
#ifdef TILES_X86
  __builtin_cpu_init();
  // No processor has AVX2 without F16C, which not every compiler can ask for.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return sets;
  sets.push_back({tiles_avx2, noise_avx2});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    sets.push_back({tiles_avx512, noise_avx512});
  }
#endif
  return sets;
}

const std::vector<TileSet>& sets() {
  static const std::vector<TileSet> found = available();
  return found;
}

// Which of them is used.
std::atomic<std::size_t>& chosen() {
  static std::atomic<std::size_t> index{sets().size() - 1};
  return index;
}

// For tests: which sets there are, and another one than the best. Not while an operation runs: what
// one set has packed no other reads.
std::vector<std::string> tile_sets() {
  std::vector<std::string> names;
  for (const TileSet& set : sets()) names.push_back(set.tiles.name);
  return names;
}

std::string use_tile_set(std::string name) {
  const std::string before = sets()[chosen()].tiles.name;
  const std::vector<std::string> names = tile_sets();
  const auto found = std::find(names.begin(), names.end(), name);
  std::string all;
  for (const std::string& each : names) all += (all.empty() ? "" : ", ") + each;
  STD_TORCH_CHECK(found != names.end(), "name: expected a tile set that was compiled and whose "
                  "instructions this processor has (", all, "), got '", name, "'");
  chosen() = static_cast<std::size_t>(found - names.begin());
  return before;
}

}  // namespace

const Kernels& kernels() { return sets()[chosen()].tiles; }

const NoiseKernels& noise_kernels() { return sets()[chosen()].noise; }

}  // namespace realera_fast

STABLE_TORCH_LIBRARY_FRAGMENT(realera_fast, m) {
  m.def("_tile_sets() -> str[]");
  m.def("_use_tile_set(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(realera_fast, CompositeExplicitAutograd, m) {
  m.impl("_tile_sets", TORCH_BOX(&realera_fast::tile_sets));
  m.impl("_use_tile_set", TORCH_BOX(&realera_fast::use_tile_set));
}
