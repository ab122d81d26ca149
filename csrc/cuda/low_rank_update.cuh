// W += (W left + offset) right for a table of weights. A block stages some rows of one weight in
// shared memory, so the weights pass through DRAM once: read, changed, written.
//
// Floor on an H100: the cross-attention weights of SD 1.4 in bfloat16 are 77 MB read and written,
// at 2.8 TB/s 27 us. The 4 m d k FLOPs (m rows of width d) stay below that in float32 up to k of
// about 16; beyond, arithmetic takes over, and no path here uses tensor cores yet.

#pragma once

#include "platform.cuh"

namespace realera_fast {

constexpr int kUpdateThreads = 256;
constexpr int kUpdateWarps = kUpdateThreads / 32;
constexpr int kUpdateRanks = 16;    // columns of W left that a warp sums at a time
constexpr int kUpdateColumns = 64;  // widths are padded to this in shared memory

struct UpdateWeight {
  void* data;
  const void* left;
  const void* right;
  const void* offset;
  int64_t row_stride;
  int64_t column_stride;
  int32_t rows;
  int32_t first_block;
};

constexpr int kUpdateWeights = 72;  // all that 4 KB of kernel parameters hold

struct UpdateTable {
  UpdateWeight weights[kUpdateWeights];
  int32_t count;
  int32_t width;
  int32_t rank;
};
static_assert(sizeof(UpdateTable) <= 4096);

// Bytes from a staged row to the next. They are 16 modulo 128, so that eight rows read at the same
// column hit eight different groups of banks.
template <class W>
__host__ __device__ inline int update_pitch(int width) {
  return round_up(width, kUpdateColumns) * static_cast<int>(sizeof(W)) + 16;
}

// Shared memory of a block that stages 8 * Groups rows, in bytes.
template <class W, class Acc, int Groups>
inline int64_t update_bytes(int width, int rank) {
  const int64_t rows = 8 * Groups;
  const int64_t thin = static_cast<int64_t>(round_up(rank, kUpdateRanks)) * rows;
  const int64_t partial = static_cast<int64_t>(kUpdateWarps) * kUpdateRanks * rows;
  return rows * update_pitch<W>(width) + (thin + partial) * static_cast<int64_t>(sizeof(Acc));
}

template <class T, int Count>
struct alignas(sizeof(T) * Count < 16 ? sizeof(T) * Count : 16) Pack {
  T values[Count];
};

// Four neighbors of a row of `left` or `right`; zeros beyond the `valid` ones.
template <class Acc>
__device__ inline Pack<Acc, 4> load_four(const Acc* source, int valid, bool aligned) {
  if (aligned && valid >= 4) return *reinterpret_cast<const Pack<Acc, 4>*>(source);
  Pack<Acc, 4> result;
#pragma unroll
  for (int i = 0; i < 4; ++i) result.values[i] = i < valid ? source[i] : Acc(0);
  return result;
}

__device__ inline bool aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <class W>
__device__ inline bool rows_are_vectors(const UpdateWeight& weight) {
  return weight.column_stride == 1 && aligned16(weight.data) &&
         weight.row_stride * static_cast<int64_t>(sizeof(W)) % 16 == 0;
}

// Copies rows of a weight to shared memory, and zeros for those that do not exist.
template <class W, int Groups>
__device__ void stage_rows(const UpdateWeight& weight, int64_t start, int rows, int width,
                           W* staged, int pitch) {
  constexpr int kVector = 16 / sizeof(W);
  constexpr int kRows = 8 * Groups;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int padded = round_up(width, kUpdateColumns);
  const W zero{};
  const W* data = static_cast<const W*>(weight.data) + start * weight.row_stride;
  if (rows_are_vectors<W>(weight)) {
    for (int c = lane * kVector; c < padded; c += 32 * kVector) {
#pragma unroll
      for (int i = 0; i < Groups; ++i) {
        const int r = warp + kUpdateWarps * i;
        Pack<W, kVector> values;
        if (r < rows && c + kVector <= width) {
          values = *reinterpret_cast<const Pack<W, kVector>*>(data + r * weight.row_stride + c);
        } else {
#pragma unroll
          for (int e = 0; e < kVector; ++e) {
            values.values[e] =
                r < rows && c + e < width ? data[r * weight.row_stride + c + e] : zero;
          }
        }
        *reinterpret_cast<Pack<W, kVector>*>(staged + r * pitch + c) = values;
      }
    }
    return;
  }
  // The lanes of a warp go along whichever dimension is closer together in memory.
  const bool down = weight.row_stride < weight.column_stride;
  for (int index = threadIdx.x; index < kRows * padded; index += kUpdateThreads) {
    const int r = down ? index % kRows : index / padded;
    const int c = down ? index / kRows : index % padded;
    staged[r * pitch + c] = r < rows && c < width
                                ? data[r * weight.row_stride + c * weight.column_stride]
                                : zero;
  }
}

template <class W, int Groups>
__device__ void write_rows(const UpdateWeight& weight, int64_t start, int rows, int width,
                           const W* staged, int pitch) {
  constexpr int kVector = 16 / sizeof(W);
  constexpr int kRows = 8 * Groups;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  W* data = static_cast<W*>(weight.data) + start * weight.row_stride;
  if (rows_are_vectors<W>(weight)) {
    for (int c = lane * kVector; c < width; c += 32 * kVector) {
#pragma unroll
      for (int i = 0; i < Groups; ++i) {
        const int r = warp + kUpdateWarps * i;
        if (r >= rows) continue;
        const W* from = staged + r * pitch + c;
        W* to = data + r * weight.row_stride + c;
        if (c + kVector <= width) {
          *reinterpret_cast<Pack<W, kVector>*>(to) =
              *reinterpret_cast<const Pack<W, kVector>*>(from);
        } else {
          for (int e = 0; c + e < width; ++e) to[e] = from[e];
        }
      }
    }
    return;
  }
  const bool down = weight.row_stride < weight.column_stride;
  for (int index = threadIdx.x; index < kRows * width; index += kUpdateThreads) {
    const int r = down ? index % kRows : index / width;
    const int c = down ? index / kRows : index % width;
    if (r < rows) data[r * weight.row_stride + c * weight.column_stride] = staged[r * pitch + c];
  }
}

// thin = W left + offset, in shared memory: `thin[j * rows + slot]`, where the slots of the rows g,
// g + 8, g + 16... that one thread works on are neighbors.
template <class W, class Acc, int Groups>
__device__ void multiply_left(const W* staged, int pitch, int width, int rank, int rows,
                              const Acc* left, const Acc* offset, Acc* thin, Acc* partial) {
  constexpr int kVector = 16 / sizeof(W);
  constexpr int kRows = 8 * Groups;
  const int warp = threadIdx.x / 32;
  const int group = threadIdx.x % 32 / 4;
  const int quarter = threadIdx.x % 4;
  const bool aligned = rank % 4 == 0 && aligned16(left);
  for (int first = 0; first < rank; first += kUpdateRanks) {
    const int valid = rank - first - 4 * quarter;
    const Acc* factor = left + first + 4 * quarter;
    Acc sum[Groups][4] = {};
    for (int c = warp * kVector; c < width; c += kUpdateWarps * kVector) {
      Pack<W, kVector> row[Groups];
#pragma unroll
      for (int i = 0; i < Groups; ++i) {
        row[i] =
            *reinterpret_cast<const Pack<W, kVector>*>(staged + (group + 8 * i) * pitch + c);
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        if (c + e >= width) break;
        const Pack<Acc, 4> four =
            load_four(factor + static_cast<int64_t>(c + e) * rank, valid, aligned);
#pragma unroll
        for (int i = 0; i < Groups; ++i) {
          const Acc value = widen<Acc>(row[i].values[e]);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] += value * four.values[j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < Groups; ++i) {
        partial[(warp * kUpdateRanks + 4 * quarter + j) * kRows + group * Groups + i] = sum[i][j];
      }
    }
    __syncthreads();
    for (int index = threadIdx.x; index < kUpdateRanks * kRows; index += kUpdateThreads) {
      const int j = first + index / kRows;
      const int slot = index % kRows;
      const int r = slot / Groups + 8 * (slot % Groups);
      Acc total = 0;
#pragma unroll
      for (int w = 0; w < kUpdateWarps; ++w) total += partial[w * kUpdateRanks * kRows + index];
      if (offset != nullptr && j < rank && r < rows) {
        total += offset[static_cast<int64_t>(r) * rank + j];
      }
      thin[first * kRows + index] = total;
    }
    __syncthreads();
  }
}

// The staged rows += thin right, rounded once.
template <class W, class Acc, int Groups>
__device__ void multiply_right(W* staged, int pitch, int width, int rank, const Acc* right,
                               const Acc* thin) {
  constexpr int kRows = 8 * Groups;
  const int warp = threadIdx.x / 32;
  const int group = threadIdx.x % 32 / 4;
  const int quarter = threadIdx.x % 4;
  const bool aligned = width % 4 == 0 && aligned16(right);
  for (int first = warp * 32; first < width; first += kUpdateWarps * 32) {
    // Two runs of four columns, 16 apart: a warp then reads two whole segments of a row.
    const int columns[2] = {first + 4 * quarter, first + 16 + 4 * quarter};
    Acc sum[Groups][8] = {};
#pragma unroll 4
    for (int j = 0; j < rank; ++j) {
      const Acc* row = right + static_cast<int64_t>(j) * width;
      Pack<Acc, 4> four[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        four[half] = load_four(row + columns[half], width - columns[half], aligned);
      }
      const Pack<Acc, Groups> scale =
          *reinterpret_cast<const Pack<Acc, Groups>*>(thin + j * kRows + group * Groups);
#pragma unroll
      for (int i = 0; i < Groups; ++i) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          sum[i][c] += scale.values[i] * four[c / 4].values[c % 4];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Groups; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto* place = reinterpret_cast<Pack<W, 4>*>(staged + (group + 8 * i) * pitch +
                                                    columns[half]);
        Pack<W, 4> values = *place;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          values.values[c] =
              narrow<W>(widen<Acc>(values.values[c]) + sum[i][4 * half + c]);
        }
        *place = values;
      }
    }
  }
}

// Left alone, the compiler takes more registers than let three blocks share a multiprocessor.
template <class W, class Acc, int Groups>
__global__ void __launch_bounds__(kUpdateThreads, sizeof(Acc) == sizeof(float) ? 3 : 2)
    update_kernel(const __grid_constant__ UpdateTable table) {
  constexpr int kRows = 8 * Groups;
  SHARED_MEMORY(memory);
  const int block = static_cast<int>(blockIdx.x);
  int low = 0;
  int high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.weights[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const UpdateWeight& weight = table.weights[low];
  const int width = table.width;
  const int rank = table.rank;
  const int pitch = update_pitch<W>(width) / static_cast<int>(sizeof(W));
  const int64_t start = static_cast<int64_t>(block - weight.first_block) * kRows;
  const int rows = static_cast<int>(
      weight.rows - start < kRows ? weight.rows - start : static_cast<int64_t>(kRows));
  W* staged = reinterpret_cast<W*>(memory);
  Acc* thin = reinterpret_cast<Acc*>(memory + kRows * update_pitch<W>(width));
  Acc* partial = thin + round_up(rank, kUpdateRanks) * kRows;
  const Acc* offset = static_cast<const Acc*>(weight.offset);
  if (offset != nullptr) offset += start * rank;

  stage_rows<W, Groups>(weight, start, rows, width, staged, pitch);
  __syncthreads();
  multiply_left<W, Acc, Groups>(staged, pitch, width, rank, rows,
                                static_cast<const Acc*>(weight.left), offset, thin, partial);
  multiply_right<W, Acc, Groups>(staged, pitch, width, rank,
                                 static_cast<const Acc*>(weight.right), thin);
  __syncthreads();
  write_rows<W, Groups>(weight, start, rows, width, staged, pitch);
}

}  // namespace realera_fast
