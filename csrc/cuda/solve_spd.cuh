// X gram = rhs for small systems in float64, each block with a whole system in shared memory.
//
// A block factors its system, gram = L L^T, and inverts L in place, so that a solve is two products
// with a triangle. The factorisation is a chain of latencies: blocks that share a system do better
// to repeat it than to wait for one another. Block 0 of a system estimates the condition number;
// the others take the right-hand sides, some rows each.
//
// Systems are padded with an identity to a multiple of kPanel: no loop below has a remainder.

#pragma once

#include "platform.cuh"

namespace realera_fast {

constexpr int kSolveThreads = 256;
constexpr int kPanel = 16;           // columns factored at a time
constexpr int kSolveRows = 16;       // right-hand sides solved at a time
constexpr int kSolvePitch = 18;      // from one column of right-hand sides to the next
constexpr int kConditionSteps = 5;   // as in reference.py

// Rows of a lower triangle, one after another. Lanes that go down a column meet few bank conflicts:
// triangular numbers run through all residues modulo a power of two.
__host__ __device__ inline int packed(int row, int column) {
  return row * (row + 1) / 2 + column;
}

// Shared memory of a block, in bytes: the triangle, and two tiles of right-hand sides.
inline int64_t solve_bytes(int64_t width) {
  const int64_t padded = (width + kPanel - 1) / kPanel * kPanel;
  return (padded * (padded + 1) / 2 + 2 * padded * kSolvePitch + 1) *
         static_cast<int64_t>(sizeof(double));
}

// The greater one, or NaN if there is one.
__device__ inline double greater(double a, double b) { return a > b || a != a ? a : b; }

// Reductions that every warp does by itself: each thread then has the result, without a barrier.
__device__ inline double absolute_sum(const double* v, int width) {
  double sum = 0;
  for (int i = threadIdx.x % 32; i < width; i += 32) sum += fabs(v[i]);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  return sum;
}

__device__ inline double greatest(const double* v, int width) {
  double result = 0;
  for (int i = threadIdx.x % 32; i < width; i += 32) result = greater(result, v[i]);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    result = greater(result, __shfl_xor_sync(kAllLanes, result, lanes));
  }
  return result;
}

// Index of the greatest absolute value, the first one of equals.
__device__ inline int steepest(const double* v, int width) {
  double value = -1;
  int index = 0;
  for (int i = threadIdx.x % 32; i < width; i += 32) {
    if (fabs(v[i]) > value) {
      value = fabs(v[i]);
      index = i;
    }
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, value, lanes);
    const int place = __shfl_xor_sync(kAllLanes, index, lanes);
    if (other > value || (other == value && place < index)) {
      value = other;
      index = place;
    }
  }
  return index;
}

__device__ inline double alternating(int i, int width) {
  const double size = 1 + static_cast<double>(i) / static_cast<double>(width > 1 ? width - 1 : 1);
  return i % 2 ? -size : size;
}

// One warp factors a diagonal block and puts the inverse of the factor in its place. Lane r (and
// lane r + 16, which repeats it) holds row r; in the inversion, column r. Returns 0, or the order
// of the first leading minor that is not positive.
__device__ inline int factor_diagonal(double* triangle, int start) {
  const int lane = threadIdx.x % 32;
  const int r = lane % kPanel;
  double a[kPanel];
#pragma unroll
  for (int c = 0; c < kPanel; ++c) {
    a[c] = c <= r ? triangle[packed(start + r, start + c)] : 0.0;
  }
  int failed = 0;
#pragma unroll
  for (int j = 0; j < kPanel; ++j) {
    const double pivot = __shfl_sync(kAllLanes, a[j], j);
    // Written so that NaN fails too.
    if (!(pivot > 0) && failed == 0) failed = start + j + 1;
    const double root = sqrt(pivot);
    a[j] = r == j ? root : a[j] / root;
#pragma unroll
    for (int c = j + 1; c < kPanel; ++c) a[c] -= a[j] * __shfl_sync(kAllLanes, a[j], c);
  }
  double diagonal = 1;
#pragma unroll
  for (int c = 0; c < kPanel; ++c) {
    if (c == r) diagonal = a[c];
  }
  const double reciprocal = 1 / diagonal;
  double x[kPanel];
#pragma unroll
  for (int i = 0; i < kPanel; ++i) {
    double sum = i == r ? 1.0 : 0.0;
#pragma unroll
    for (int c = 0; c < i; ++c) sum -= __shfl_sync(kAllLanes, a[c], i) * x[c];
    x[i] = sum * __shfl_sync(kAllLanes, reciprocal, i);
  }
  if (lane < kPanel) {
#pragma unroll
    for (int i = 0; i < kPanel; ++i) {
      if (i >= r) triangle[packed(start + i, start + r)] = x[i];
    }
  }
  return failed;
}

// Replaces the packed lower triangle of A by L, whose diagonal blocks are inverted already. Returns
// what factor_diagonal does, to all threads; `failed` is shared.
__device__ inline int factor(double* triangle, int padded, int* failed) {
  for (int start = 0; start < padded; start += kPanel) {
    if (threadIdx.x < 32) {
      const int order = factor_diagonal(triangle, start);
      if (threadIdx.x == 0) *failed = order;
    }
    __syncthreads();
    if (*failed != 0) return *failed;
    const int below = start + kPanel;
    for (int r = below + threadIdx.x; r < padded; r += kSolveThreads) {
      double* row = triangle + packed(r, start);
      double a[kPanel];
#pragma unroll
      for (int c = 0; c < kPanel; ++c) a[c] = row[c];
#pragma unroll
      for (int c = 0; c < kPanel; ++c) {
        const double* inverse = triangle + packed(start + c, start);
        double sum = 0;
#pragma unroll
        for (int j = 0; j <= c; ++j) sum += a[j] * inverse[j];
        row[c] = sum;
      }
    }
    __syncthreads();
    const int tiles = (padded - below) / 4;
    for (int index = threadIdx.x; index < tiles * (tiles + 1) / 2; index += kSolveThreads) {
      int down = static_cast<int>((sqrtf(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) / 2.0f);
      // The square root may be off by one either way.
      while (packed(down, 0) > index) --down;
      while (packed(down + 1, 0) <= index) ++down;
      const int across = index - packed(down, 0);
      const int r = below + 4 * down;
      const int c = below + 4 * across;
      double sum[4][4] = {};
#pragma unroll 4
      for (int t = start; t < below; ++t) {
        double p[4], q[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[i] = triangle[packed(r + i, t)];
          q[i] = triangle[packed(c + i, t)];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] += p[i] * q[j];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (r + i >= c + j) triangle[packed(r + i, c + j)] -= sum[i][j];
        }
      }
    }
    __syncthreads();
  }
  return 0;
}

// Replaces what `factor` left by the inverse of L. `scratch` holds kPanel * padded numbers.
__device__ inline void invert(double* triangle, int padded, double* scratch) {
  for (int start = padded - 2 * kPanel; start >= 0; start -= kPanel) {
    const int below = start + kPanel;
    const int height = padded - below;
    for (int index = threadIdx.x; index < height * kPanel; index += kSolveThreads) {
      const int r = below + index / kPanel;
      const int c = index % kPanel;
      double sum = 0;
      for (int j = c; j < kPanel; ++j) {
        sum += triangle[packed(r, start + j)] * triangle[packed(start + j, start + c)];
      }
      scratch[index] = sum;
    }
    __syncthreads();
    for (int index = threadIdx.x; index < height * kPanel / 4; index += kSolveThreads) {
      const int r = below + index / (kPanel / 4);
      const int c = index % (kPanel / 4) * 4;
      const double* row = triangle + packed(r, below);
      double sum[4] = {};
#pragma unroll 4
      for (int j = 0; j <= r - below; ++j) {
        const double2 a = *reinterpret_cast<const double2*>(scratch + j * kPanel + c);
        const double2 b = *reinterpret_cast<const double2*>(scratch + j * kPanel + c + 2);
        sum[0] += row[j] * a.x;
        sum[1] += row[j] * a.y;
        sum[2] += row[j] * b.x;
        sum[3] += row[j] * b.y;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) triangle[packed(r, start + c + j)] = -sum[j];
    }
    __syncthreads();
  }
}

// sum[r] += scale * v[r] for the eight right-hand sides at `v`.
__device__ inline void add_eight(double sum[8], double scale, const double* v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const double2 two = *reinterpret_cast<const double2*>(v + 2 * i);
    sum[2 * i] += scale * two.x;
    sum[2 * i + 1] += scale * two.y;
  }
}

__device__ inline void store_eight(double* v, const double sum[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    double2 two;
    two.x = sum[2 * i];
    two.y = sum[2 * i + 1];
    *reinterpret_cast<double2*>(v + 2 * i) = two;
  }
}

// to = L^-1 from, for a tile of right-hand sides.
__device__ inline void multiply_lower(const double* inverse, int padded, const double* from,
                                      double* to) {
  for (int index = threadIdx.x; index < 2 * padded; index += kSolveThreads) {
    const int i = index % padded;
    const int half = index / padded * 8;
    const double* row = inverse + packed(i, 0);
    double sum[8] = {};
#pragma unroll 2
    for (int j = 0; j <= i; ++j) add_eight(sum, row[j], from + j * kSolvePitch + half);
    store_eight(to + i * kSolvePitch + half, sum);
  }
}

// The rows of one column of L^-T from, for eight right-hand sides.
__device__ inline void multiply_upper(const double* inverse, int padded, const double* from, int j,
                                      double sum[8]) {
#pragma unroll 2
  for (int i = j; i < padded; ++i) add_eight(sum, inverse[packed(i, j)], from + i * kSolvePitch);
}

// Solves for `rows` right-hand sides, at most kSolveRows, and refines the result once.
__device__ inline void solve_tile(const double* gram, const double* inverse, int width, int padded,
                                  const double* rhs, double* solution, int rows, double* u,
                                  double* v) {
  for (int index = threadIdx.x; index < kSolveRows * padded; index += kSolveThreads) {
    const int r = index / padded;
    const int j = index % padded;
    u[j * kSolvePitch + r] =
        r < rows && j < width ? rhs[static_cast<int64_t>(r) * width + j] : 0.0;
  }
  __syncthreads();
  multiply_lower(inverse, padded, u, v);
  __syncthreads();
  for (int index = threadIdx.x; index < 2 * padded; index += kSolveThreads) {
    const int j = index % padded;
    const int half = index / padded * 8;
    double sum[8] = {};
    multiply_upper(inverse, padded, v + half, j, sum);
    store_eight(u + j * kSolvePitch + half, sum);
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      if (half + r < rows && j < width) {
        solution[static_cast<int64_t>(half + r) * width + j] = sum[r];
      }
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < 2 * padded; index += kSolveThreads) {
    const int j = index % padded;
    const int half = index / padded * 8;
    double residual[8] = {};
    if (j < width) {
      // In parts, for accuracy: what the refinement gains is limited by the rounding of this sum.
      double product[8] = {};
      for (int first = 0; first < width; first += kPanel) {
        const int last = first + kPanel < width ? first + kPanel : width;
        double part[8] = {};
#pragma unroll 4
        for (int i = first; i < last; ++i) {
          add_eight(part, __ldg(gram + static_cast<int64_t>(i) * width + j),
                    u + i * kSolvePitch + half);
        }
#pragma unroll
        for (int r = 0; r < 8; ++r) product[r] += part[r];
      }
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        if (half + r < rows) {
          residual[r] = rhs[static_cast<int64_t>(half + r) * width + j] - product[r];
        }
      }
    }
    store_eight(v + j * kSolvePitch + half, residual);
  }
  __syncthreads();
  multiply_lower(inverse, padded, v, u);
  __syncthreads();
  for (int index = threadIdx.x; index < 2 * padded; index += kSolveThreads) {
    const int j = index % padded;
    const int half = index / padded * 8;
    double sum[8] = {};
    multiply_upper(inverse, padded, u + half, j, sum);
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      // Each thread adds to what it wrote itself above.
      if (half + r < rows && j < width) {
        solution[static_cast<int64_t>(half + r) * width + j] += sum[r];
      }
    }
  }
  __syncthreads();
}

// v = A^-1 v, with `w` as scratch. Ends with a barrier.
__device__ inline void solve_vector(const double* inverse, int padded, double* v, double* w) {
  for (int i = threadIdx.x; i < padded; i += kSolveThreads) {
    const double* row = inverse + packed(i, 0);
    double even = 0;
    double odd = 0;
    int j = 0;
    for (; j < i; j += 2) {
      even += row[j] * v[j];
      odd += row[j + 1] * v[j + 1];
    }
    if (j == i) even += row[i] * v[i];
    w[i] = even + odd;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < padded; j += kSolveThreads) {
    double even = 0;
    double odd = 0;
    int i = j;
    for (; i + 1 < padded; i += 2) {
      even += inverse[packed(i, j)] * w[i];
      odd += inverse[packed(i + 1, j)] * w[i + 1];
    }
    if (i < padded) even += inverse[packed(i, j)] * w[i];
    v[j] = even + odd;
  }
  __syncthreads();
}

// The estimate of reference.py, to all threads.
__device__ inline double reciprocal_condition(const double* gram, const double* inverse, int width,
                                              int padded, double* v, double* w) {
  for (int i = threadIdx.x; i < padded; i += kSolveThreads) {
    v[i] = i < width ? alternating(i, width) : 0.0;
  }
  __syncthreads();
  solve_vector(inverse, padded, v, w);
  double norm = absolute_sum(v, width) * (2.0 / (3.0 * width));
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += kSolveThreads) v[i] = 1.0 / width;
  __syncthreads();
  for (int step = 0; step < kConditionSteps; ++step) {
    solve_vector(inverse, padded, v, w);
    norm = greater(norm, absolute_sum(v, width));
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += kSolveThreads) v[i] = v[i] < 0 ? -1.0 : 1.0;
    __syncthreads();
    solve_vector(inverse, padded, v, w);
    const int index = steepest(v, width);
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += kSolveThreads) v[i] = i == index ? 1.0 : 0.0;
    __syncthreads();
  }
  for (int j = threadIdx.x; j < width; j += kSolveThreads) {
    double sum = 0;
    for (int i = 0; i < width; ++i) sum += fabs(gram[static_cast<int64_t>(i) * width + j]);
    v[j] = sum;
  }
  __syncthreads();
  const double reciprocal = 1 / (greatest(v, width) * norm);
  return isfinite(reciprocal) ? reciprocal : 0.0;
}

// `grid.y` systems; block 0 of each estimates the condition number, each other one solves for
// `rows_per_block` right-hand sides.
__global__ void __launch_bounds__(kSolveThreads)
    solve_kernel(const double* grams, const double* all_rhs, double* solutions, int32_t* info,
                 double* reciprocal, int width, int64_t rows, int64_t rows_per_block) {
  SHARED_MEMORY(memory);
  const int padded = round_up(width, kPanel);
  double* triangle = reinterpret_cast<double*>(memory);
  double* u = triangle + packed(padded, 0);
  double* v = u + padded * kSolvePitch;
  int* failed = reinterpret_cast<int*>(v + padded * kSolvePitch);
  const int64_t system = blockIdx.y;
  const double* gram = grams + system * width * width;

  for (int i = threadIdx.x / 32; i < padded; i += kSolveThreads / 32) {
    for (int j = threadIdx.x % 32; j <= i; j += 32) {
      triangle[packed(i, j)] = i < width ? gram[static_cast<int64_t>(i) * width + j]
                                         : (i == j ? 1.0 : 0.0);
    }
  }
  __syncthreads();
  const int order = factor(triangle, padded, failed);
  if (order == 0) invert(triangle, padded, u);

  if (blockIdx.x == 0) {
    const double result =
        order == 0 ? reciprocal_condition(gram, triangle, width, padded, u, v) : 0.0;
    if (threadIdx.x == 0) {
      info[system] = order;
      reciprocal[system] = result;
    }
    return;
  }
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - 1) * rows_per_block;
  const int64_t end = begin + rows_per_block < rows ? begin + rows_per_block : rows;
  const double* rhs = all_rhs + system * rows * width;
  double* solution = solutions + system * rows * width;
  if (order != 0) {
    for (int64_t i = begin * width + threadIdx.x; i < end * width; i += kSolveThreads) {
      solution[i] = nan("");
    }
    return;
  }
  for (int64_t row = begin; row < end; row += kSolveRows) {
    const int count = static_cast<int>(end - row < kSolveRows ? end - row : kSolveRows);
    solve_tile(gram, triangle, width, padded, rhs + row * width, solution + row * width, count, u,
               v);
  }
}

enum ConditionStage { kStart, kFirst, kImage, kSlope, kEnd };

// The same estimate for systems that shared memory can't hold, one block per call: between the
// stages v becomes A^-1 v elsewhere. `norm` is the estimate of |A^-1| so far.
__global__ void __launch_bounds__(kSolveThreads)
    condition_kernel(int stage, double* v, double* norm, int width, const int32_t* info,
                     double* reciprocal) {
  int index = 0;
  double sum = 0;
  if (stage == kFirst || stage == kImage) sum = absolute_sum(v, width);
  if (stage == kSlope) index = steepest(v, width);
  if (stage == kEnd) sum = greatest(v, width);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (stage == kFirst) *norm = sum * (2.0 / (3.0 * width));
    if (stage == kImage) *norm = greater(*norm, sum);
    if (stage == kEnd) {
      const double result = 1 / (sum * *norm);
      *reciprocal = *info == 0 && isfinite(result) ? result : 0.0;
    }
  }
  if (stage == kEnd) return;
  for (int i = threadIdx.x; i < width; i += kSolveThreads) {
    if (stage == kStart) v[i] = alternating(i, width);
    if (stage == kFirst) v[i] = 1.0 / width;
    if (stage == kImage) v[i] = v[i] < 0 ? -1.0 : 1.0;
    if (stage == kSlope) v[i] = i == index ? 1.0 : 0.0;
  }
}

}  // namespace realera_fast
