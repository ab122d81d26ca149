// The CUDA kernels, run by cuda_emulation.h: a shared library for tests/ops/test_cuda_sources.py,
// and a program for the sanitizers.

#include "low_rank_update.cuh"
#include "solve_spd.cuh"

#include <algorithm>
#include <cstdio>

using namespace realera_fast;

namespace {

template <class W, class Acc, int Groups>
void update(const UpdateWeight* weights, int count, int width, int rank) {
  UpdateTable table{};
  int blocks = 0;
  for (int i = 0; i < count; ++i) {
    table.weights[i] = weights[i];
    table.weights[i].first_block = blocks;
    blocks += (weights[i].rows + 8 * Groups - 1) / (8 * Groups);
  }
  table.count = count;
  table.width = width;
  table.rank = rank;
  emulation::launch(update_kernel<W, Acc, Groups>, {static_cast<unsigned>(blocks), 1, 1},
                    kUpdateThreads, update_bytes<W, Acc, Groups>(width, rank), table);
}

template <class W, class Acc>
void update(const UpdateWeight* weights, int count, int width, int rank, int groups) {
  if (groups == 1) return update<W, Acc, 1>(weights, count, width, rank);
  if (groups == 2) return update<W, Acc, 2>(weights, count, width, rank);
  if constexpr (sizeof(Acc) == 4) return update<W, Acc, 4>(weights, count, width, rank);
}

}  // namespace

extern "C" {

// `dtype`: 0 float32, 1 bfloat16, 2 float16, 3 float64.
void low_rank_update(int dtype, int groups, const UpdateWeight* weights, int count, int width,
                     int rank) {
  switch (dtype) {
    case 0:
      return update<float, float>(weights, count, width, rank, groups);
    case 1:
      return update<__nv_bfloat16, float>(weights, count, width, rank, groups);
    case 2:
      return update<__half, float>(weights, count, width, rank, groups);
    default:
      return update<double, double>(weights, count, width, rank, groups);
  }
}

void solve_spd(const double* gram, const double* rhs, double* solution, int32_t* info,
               double* reciprocal, int systems, int width, int64_t rows, int64_t rows_per_block) {
  const int64_t chunks = (rows + rows_per_block - 1) / rows_per_block;
  emulation::launch(solve_kernel,
                    {static_cast<unsigned>(chunks + 1), static_cast<unsigned>(systems), 1},
                    kSolveThreads, solve_bytes(width), gram, rhs, solution, info, reciprocal, width,
                    rows, rows_per_block);
}

void condition(int stage, double* v, double* norm, int width, const int32_t* info,
               double* reciprocal) {
  emulation::launch(condition_kernel, {1, 1, 1}, kSolveThreads, 0, stage, v, norm, width, info,
                    reciprocal);
}

}  // extern "C"

namespace {

// Every kind of load and store: rows that are vectors, rows with a remainder, strided rows.
template <class W, class Acc>
void sanitize_update(int dtype, int groups) {
  const int width = 37, rank = 18, rows = 11;
  for (const int stride : {width, 48, 2 * width}) {
    const int step = stride == 2 * width ? 2 : 1;
    std::vector<W> data(rows * stride, narrow<W>(Acc(1)));
    std::vector<Acc> left(width * rank, Acc(0.01)), right(rank * width, Acc(0.5));
    std::vector<Acc> offset(rows * rank, Acc(0.1));
    UpdateWeight weight{data.data(), left.data(), right.data(), offset.data(), stride, step, rows,
                        0};
    low_rank_update(dtype, groups, &weight, 1, width, rank);
  }
}

void sanitize_solve() {
  for (const int width : {1, 37}) {
    const int rows = 19;
    std::vector<double> gram(width * width, 0.5), rhs(rows * width, 1.0), solution(rows * width);
    for (int i = 0; i < width; ++i) gram[i * width + i] = 2;
    int32_t info = -1;
    double reciprocal = -1;
    solve_spd(gram.data(), rhs.data(), solution.data(), &info, &reciprocal, 1, width, rows, 16);
    gram[width * width - 1] = -1;
    solve_spd(gram.data(), rhs.data(), solution.data(), &info, &reciprocal, 1, width, rows, 32);
    std::printf("order of the first minor that is not positive: %d\n", info);
  }
  std::vector<double> v(300);
  int32_t info = 0;
  double norm = 0, reciprocal = -1;
  for (const int stage : {kStart, kFirst, kImage, kSlope, kEnd}) {
    condition(stage, v.data(), &norm, 300, &info, &reciprocal);
  }
}

}  // namespace

int main() {
  sanitize_update<__nv_bfloat16, float>(1, 4);
  sanitize_update<float, float>(0, 2);
  sanitize_update<double, double>(3, 1);
  sanitize_solve();
  std::puts("done");
}
