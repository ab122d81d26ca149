// The loops that are ours, compiled once for each instruction set and chosen when first asked for.

#pragma once

#include <cstdint>

namespace realera_fast {

enum class Kind { kFloat, kDouble, kBFloat16, kHalf };

// Rows of a matrix in memory; strides count elements.
struct Rows {
  void* data;
  Kind kind;
  int64_t count;
  int64_t row_stride;
  int64_t column_stride;
};

// `left` and `right` as `pack` leaves them.
template <class S>
struct Factors {
  int64_t width;
  int64_t rank;
  S* left;
  S* right;
};

// No instruction set has longer vectors, so buffers sized in multiples of it serve every one.
constexpr int64_t kLanes = 16;
constexpr int64_t kUpdateRows = 64;   // most rows for one call of `update`
constexpr int64_t kSumRows = 512;     // most rows for one call of `pack_rows`
constexpr int64_t kPanelBytes = 192;  // widest panel: three vectors of 64 bytes

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

template <class S>
constexpr int64_t update_scratch(int64_t width, int64_t rank) {
  return kUpdateRows * (round_up(width, kLanes) + kLanes + round_up(rank, kLanes));
}

// Rows x, w x and w (y - x) in float64, in the order of `add_products`. Rows that move come first.
struct Sums {
  int64_t width;
  int64_t depth;  // rows
  int64_t moved;  // rows that move
  double* x;
  double* weighted;
  double* delta;
};

// Elements of each array of `Sums`: whole panels, whatever their width.
constexpr int64_t sums_elements(int64_t width) { return kSumRows * round_up(width, 24); }

struct Kernels {
  const char* name;
  // The greatest rank for which `update` is not slower than torch's matrix products.
  int64_t own_rank;

  // Brings contiguous `left` and `right` into the order `update` reads.
  void (*pack_float)(const float* left, const float* right, const Factors<float>& packed);
  void (*pack_double)(const double* left, const double* right, const Factors<double>& packed);

  // rows += (rows left + offset) right; `offset` is contiguous or null.
  void (*update_float)(const Rows& rows, const Factors<float>& factors, const float* offset,
                       float* scratch);
  void (*update_double)(const Rows& rows, const Factors<double>& factors, const double* offset,
                        double* scratch);

  // Rows to and from contiguous float32 or float64.
  void (*load_float)(const Rows& rows, int64_t width, float* out, int64_t out_stride);
  void (*load_double)(const Rows& rows, int64_t width, double* out, int64_t out_stride);
  void (*store_float)(const float* in, int64_t in_stride, int64_t width, const Rows& rows);
  void (*store_double)(const double* in, int64_t in_stride, int64_t width, const Rows& rows);

  // Which rows of x and y differ.
  void (*find_moved)(const Rows& x, const Rows& y, int64_t width, bool* moved);
  // Converts rows [begin, end) of x and y; row r goes to place slots[r] of `sums`.
  void (*pack_rows)(const Rows& x, const Rows& y, const double* weight, const int64_t* slots,
                    int64_t begin, int64_t end, const Sums& sums);
  // Adds to columns of the upper triangle of gram, and of cross. Columns come in `units` that cost
  // the same; this does units [begin, end).
  int64_t (*units)(int64_t width);
  void (*add_products)(const Sums& sums, double* gram, double* cross, int64_t begin, int64_t end);

  // Solves L L^T v = v in place for `count` (1 or 2) vectors, one behind the other. Row i of `rows`
  // holds column i of L.
  void (*solve_vectors)(const double* rows, int64_t width, double* v, int count);
  double (*norm_one)(const double* matrix, int64_t width);
};

// The best kernels that this processor has, or those that a test asked for.
const Kernels& kernels();

}  // namespace realera_fast
