// Register-tiled products and conversions. CMake compiles this file once for each instruction set,
// with TILES_KERNELS naming the table. Everything else is in an anonymous namespace and no template
// of the standard library is used: the linker would merge copies of a shared inline function, and
// might keep one with instructions that the processor lacks.
//
// A row's result never depends on the rows computed beside it: each element is a sum in one fixed
// order. So neither the number of threads nor the layout of a weight changes a bit.

#include "convert.h"
#include "tiles.h"

namespace realera_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
constexpr int kHeight = 8;  // 8 x 3 sums, 3 loads and a broadcast in 32 registers
constexpr int kDots = 24;  // sums along the width at a time
constexpr int64_t kOwnRank = 160;  // measured at widths 768 and 2048
#elif defined(__AVX2__)
constexpr int kBytes = 32;
constexpr int kHeight = 4;  // 4 x 3 sums, 3 loads and a broadcast in 16 registers
constexpr int kDots = 8;
constexpr int64_t kOwnRank = 160;
#elif defined(__aarch64__)
constexpr int kBytes = 16;
constexpr int kHeight = 8;
constexpr int kDots = 16;
constexpr int64_t kOwnRank = 32;
#else
constexpr int kBytes = 16;
constexpr int kHeight = 4;
constexpr int kDots = 8;
constexpr int64_t kOwnRank = 8;  // torch's products use better instructions than these
#endif
constexpr int kVectors = 3;      // vectors in the widest panel
constexpr int64_t kThin = 32;    // up to this rank the rows of a tile are kept in the L1 cache
constexpr int64_t kASide = 192;  // rows of gram for which the packed rows stay in the L2 cache

template <class S>
struct Vector {
  typedef S type __attribute__((vector_size(kBytes)));
  typedef S loose __attribute__((vector_size(kBytes), aligned(sizeof(S)), may_alias));
};
template <class S>
using V = typename Vector<S>::type;
template <class S>
constexpr int kLength = kBytes / static_cast<int>(sizeof(S));

template <class S>
INLINE V<S> load(const S* from) {
  return *reinterpret_cast<const typename Vector<S>::loose*>(from);
}

template <class S>
INLINE void store(S* to, V<S> value) {
  *reinterpret_cast<typename Vector<S>::loose*>(to) = value;
}

template <class S>
INLINE S reduce(V<S> value) {
#if defined(__AVX512F__)
  // The compiler would add the elements one by one.
  if constexpr (sizeof(S) == 4) {
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(value));
  } else {
    return _mm512_reduce_add_pd(reinterpret_cast<__m512d>(value));
  }
#else
  S sum = 0;
  for (int i = 0; i < kLength<S>; ++i) sum += value[i];
  return sum;
#endif
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class From, class To>
void load_rows(const Rows& rows, int64_t width, To* out, int64_t out_stride) {
  const From* in = static_cast<const From*>(rows.data);
  if (rows.column_stride == 1) {
    for (int64_t r = 0; r < rows.count; ++r) {
      widen_row(in + r * rows.row_stride, width, out + r * out_stride);
    }
    return;
  }
  // Column by column, so that a transposed matrix is read in the order of its memory.
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t r = 0; r < rows.count; ++r) {
      out[r * out_stride + c] =
          static_cast<To>(widen(in[r * rows.row_stride + c * rows.column_stride]));
    }
  }
}

template <class From, class To>
void store_rows(const From* in, int64_t in_stride, int64_t width, const Rows& rows) {
  To* out = static_cast<To*>(rows.data);
  if (rows.column_stride == 1) {
    for (int64_t r = 0; r < rows.count; ++r) {
      narrow_row(in + r * in_stride, width, out + r * rows.row_stride);
    }
    return;
  }
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t r = 0; r < rows.count; ++r) {
      narrow_to(in[r * in_stride + c], out[r * rows.row_stride + c * rows.column_stride]);
    }
  }
}

void load_float(const Rows& rows, int64_t width, float* out, int64_t out_stride) {
  if (rows.kind == Kind::kFloat) load_rows<float>(rows, width, out, out_stride);
  if (rows.kind == Kind::kBFloat16) load_rows<BFloat16>(rows, width, out, out_stride);
  if (rows.kind == Kind::kHalf) load_rows<Half>(rows, width, out, out_stride);
}

void load_double(const Rows& rows, int64_t width, double* out, int64_t out_stride) {
  load_rows<double>(rows, width, out, out_stride);
}

void store_float(const float* in, int64_t in_stride, int64_t width, const Rows& rows) {
  if (rows.kind == Kind::kFloat) store_rows<float, float>(in, in_stride, width, rows);
  if (rows.kind == Kind::kBFloat16) store_rows<float, BFloat16>(in, in_stride, width, rows);
  if (rows.kind == Kind::kHalf) store_rows<float, Half>(in, in_stride, width, rows);
}

void store_double(const double* in, int64_t in_stride, int64_t width, const Rows& rows) {
  store_rows<double, double>(in, in_stride, width, rows);
}

// ---- The register tile ------------------------------------------------------------------------

// sum = a b: `a` is HEIGHT x depth with any strides, `b` a panel: depth x COUNT vectors.
template <class S, int HEIGHT, int COUNT>
INLINE void multiply(const S* a, int64_t row_stride, int64_t column_stride, const S* b,
                     int64_t depth, V<S> (&sum)[HEIGHT][COUNT]) {
#pragma GCC unroll 8
  for (int r = 0; r < HEIGHT; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < COUNT; ++v) sum[r][v] = V<S>{};
  }
  for (int64_t p = 0; p < depth; ++p) {
    V<S> line[COUNT];
#pragma GCC unroll 3
    for (int v = 0; v < COUNT; ++v) line[v] = load(b + v * kLength<S>);
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; ++r) {
      const S value = a[r * row_stride];
#pragma GCC unroll 3
      for (int v = 0; v < COUNT; ++v) sum[r][v] += value * line[v];
    }
    a += column_stride;
    b += COUNT * kLength<S>;
  }
}

// out += sum, of which only `columns` columns exist.
template <class S, int HEIGHT, int COUNT>
INLINE void add_tile(const V<S> (&sum)[HEIGHT][COUNT], S* out, int64_t stride, int64_t columns) {
  if (columns >= COUNT * kLength<S>) {
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < COUNT; ++v) {
        S* to = out + r * stride + v * kLength<S>;
        store<S>(to, load(to) + sum[r][v]);
      }
    }
    return;
  }
  S buffer[COUNT * kLength<S>];
#pragma GCC unroll 8
  for (int r = 0; r < HEIGHT; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < COUNT; ++v) store<S>(buffer + v * kLength<S>, sum[r][v]);
    for (int64_t c = 0; c < columns; ++c) out[r * stride + c] += buffer[c];
  }
}

template <class S, int HEIGHT, int COUNT>
INLINE void set_tile(const V<S> (&sum)[HEIGHT][COUNT], S* out, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < HEIGHT; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < COUNT; ++v) store<S>(out + r * stride + v * kLength<S>, sum[r][v]);
  }
}

// Calls body<HEIGHT>(row) until all rows are done, in tiles as high as possible.
template <int HEIGHT, class Body>
INLINE void each_tile(int64_t first, int64_t rows, const Body& body) {
  for (; first + HEIGHT <= rows; first += HEIGHT) body.template run<HEIGHT>(first);
  if constexpr (HEIGHT > 1) each_tile<HEIGHT / 2>(first, rows, body);
}

// ---- Low-rank update --------------------------------------------------------------------------

// Columns of `left` that come in whole vectors. The rest, where it is short, is not padded to a
// vector of columns: those sums run along the width instead.
template <class S>
INLINE int64_t whole_columns(int64_t rank) {
  const int64_t rest = rank % kLength<S>;
  return rest * 8 <= kLength<S> * 5 ? rank - rest : rank + kLength<S> - rest;
}

// Panels of `columns` columns of a `depth` x `width` matrix, padded with zeros to whole vectors.
template <class S>
void pack_panels(const S* in, int64_t depth, int64_t width, int64_t columns, S* out) {
  constexpr int64_t kPanel = kVectors * kLength<S>;
  for (int64_t start = 0; start < columns; start += kPanel) {
    const int64_t panel = least(kPanel, round_up(columns - start, kLength<S>));
    const int64_t there = least(panel, width - start);
    for (int64_t p = 0; p < depth; ++p) {
      for (int64_t c = 0; c < there; ++c) out[c] = in[p * width + start + c];
      for (int64_t c = there; c < panel; ++c) out[c] = 0;
      out += panel;
    }
  }
}

template <class S>
void pack(const S* left, const S* right, const Factors<S>& packed) {
  const int64_t whole = whole_columns<S>(packed.rank);
  pack_panels(left, packed.width, packed.rank, whole, packed.left);
  S* rest = packed.left + whole * packed.width;
  for (int64_t c = whole; c < packed.rank; ++c) {
    for (int64_t p = 0; p < packed.width; ++p) *rest++ = left[p * packed.rank + c];
  }
  pack_panels(right, packed.rank, packed.width, packed.width, packed.right);
}

template <class S, int COUNT>
struct ThinPanel {
  const S* wide;
  int64_t wide_stride, width;
  const S* left;
  S* thin;
  int64_t thin_stride;

  template <int HEIGHT>
  INLINE void run(int64_t row) const {
    V<S> sum[HEIGHT][COUNT];
    multiply<S, HEIGHT, COUNT>(wide + row * wide_stride, wide_stride, 1, left, width, sum);
    set_tile<S, HEIGHT, COUNT>(sum, thin + row * thin_stride, thin_stride);
  }
};

// Sums along the width for COUNT columns of `left`, which lie one behind the other.
template <class S, int COUNT>
struct ThinDots {
  const S* wide;
  int64_t wide_stride, width;
  const S* left;
  S* thin;
  int64_t thin_stride;

  template <int HEIGHT>
  INLINE void run(int64_t row) const {
    const S* a = wide + row * wide_stride;
    V<S> sum[HEIGHT][COUNT];
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; ++r) {
#pragma GCC unroll 6
      for (int c = 0; c < COUNT; ++c) sum[r][c] = V<S>{};
    }
    int64_t p = 0;
    for (; p + kLength<S> <= width; p += kLength<S>) {
      V<S> values[HEIGHT];
#pragma GCC unroll 8
      for (int r = 0; r < HEIGHT; ++r) values[r] = load(a + r * wide_stride + p);
#pragma GCC unroll 6
      for (int c = 0; c < COUNT; ++c) {
        const V<S> line = load(left + c * width + p);
#pragma GCC unroll 8
        for (int r = 0; r < HEIGHT; ++r) sum[r][c] += values[r] * line;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; ++r) {
#pragma GCC unroll 6
      for (int c = 0; c < COUNT; ++c) {
        S total = reduce<S>(sum[r][c]);
        for (int64_t q = p; q < width; ++q) total += a[r * wide_stride + q] * left[c * width + q];
        thin[(row + r) * thin_stride + c] = total;
      }
    }
  }
};

template <class S, int COUNT>
struct AddPanel {
  const S* thin;
  int64_t thin_stride, rank;
  const S* right;
  S* wide;
  int64_t wide_stride, columns, ahead;

  template <int HEIGHT>
  INLINE void run(int64_t row) const {
    // What the next block needs first; the processor foresees a few streams only, not one a row.
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < COUNT; ++v) {
        __builtin_prefetch(wide + (row + r) * wide_stride + ahead + v * kLength<S>, 0, 2);
      }
    }
    V<S> sum[HEIGHT][COUNT];
    multiply<S, HEIGHT, COUNT>(thin + row * thin_stride, thin_stride, 1, right, rank, sum);
    add_tile<S, HEIGHT, COUNT>(sum, wide + row * wide_stride, wide_stride, columns);
  }
};

template <class S, int COUNT>
void thin_dots(const S* wide, int64_t wide_stride, int64_t rows, int64_t width, const S* left,
               S* thin, int64_t thin_stride) {
  constexpr int kTall = COUNT * 8 <= kDots ? 8 : COUNT * 4 <= kDots ? 4 : 2;
  each_tile<kTall>(0, rows,
                   ThinDots<S, COUNT>{wide, wide_stride, width, left, thin, thin_stride});
}

template <class S>
void thin_rest(const S* wide, int64_t wide_stride, int64_t rows, int64_t width, const S* left,
               int64_t columns, S* thin, int64_t thin_stride) {
  while (columns > 0) {
    // Groups of about the same size: two of five cost less than one of six and one of four.
    const int64_t groups = round_up(columns, kDots / 4) / (kDots / 4);
    const int64_t count = round_up(columns, groups) / groups;
    switch (count) {
      case 1: thin_dots<S, 1>(wide, wide_stride, rows, width, left, thin, thin_stride); break;
      case 2: thin_dots<S, 2>(wide, wide_stride, rows, width, left, thin, thin_stride); break;
      case 3: thin_dots<S, 3>(wide, wide_stride, rows, width, left, thin, thin_stride); break;
      case 4: thin_dots<S, 4>(wide, wide_stride, rows, width, left, thin, thin_stride); break;
      case 5: thin_dots<S, 5>(wide, wide_stride, rows, width, left, thin, thin_stride); break;
      default: thin_dots<S, 6>(wide, wide_stride, rows, width, left, thin, thin_stride); break;
    }
    left += count * width;
    thin += count;
    columns -= count;
  }
}

// thin = wide left.
template <class S>
void multiply_left(const S* wide, int64_t wide_stride, int64_t rows, const Factors<S>& factors,
                   S* thin, int64_t thin_stride) {
  const int64_t whole = whole_columns<S>(factors.rank);
  const int64_t width = factors.width;
  for (int64_t start = 0; start < whole; start += kVectors * kLength<S>) {
    const S* left = factors.left + start * width;
    S* out = thin + start;
    const int64_t vectors = (whole - start) / kLength<S>;
    if (vectors >= 3) {
      each_tile<kHeight>(0, rows,
                         ThinPanel<S, 3>{wide, wide_stride, width, left, out, thin_stride});
    } else if (vectors == 2) {
      each_tile<kHeight>(0, rows,
                         ThinPanel<S, 2>{wide, wide_stride, width, left, out, thin_stride});
    } else {
      each_tile<kHeight>(0, rows,
                         ThinPanel<S, 1>{wide, wide_stride, width, left, out, thin_stride});
    }
  }
  thin_rest(wide, wide_stride, rows, width, factors.left + whole * width, factors.rank - whole,
            thin + whole, thin_stride);
}

// wide += thin right.
template <class S>
void add_right(const S* thin, int64_t thin_stride, int64_t rows, const Factors<S>& factors, S* wide,
               int64_t wide_stride, int64_t ahead) {
  const int64_t rank = factors.rank;
  for (int64_t start = 0; start < factors.width; start += kVectors * kLength<S>) {
    const S* right = factors.right + start * rank;
    S* out = wide + start;
    const int64_t columns = factors.width - start;
    if (columns > 2 * kLength<S>) {
      each_tile<kHeight>(0, rows,
                         AddPanel<S, 3>{thin, thin_stride, rank, right, out, wide_stride, columns,
                                        ahead});
    } else if (columns > kLength<S>) {
      each_tile<kHeight>(0, rows,
                         AddPanel<S, 2>{thin, thin_stride, rank, right, out, wide_stride, columns,
                                        ahead});
    } else {
      each_tile<kHeight>(0, rows,
                         AddPanel<S, 1>{thin, thin_stride, rank, right, out, wide_stride, columns,
                                        ahead});
    }
  }
}

template <class S>
void update_wide(S* wide, int64_t wide_stride, int64_t rows, const Factors<S>& factors,
                 const S* offset, S* thin, int64_t ahead) {
  const int64_t thin_stride = round_up(factors.rank, kLanes);
  multiply_left(wide, wide_stride, rows, factors, thin, thin_stride);
  if (offset != nullptr) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < factors.rank; ++c) {
        thin[r * thin_stride + c] += offset[r * factors.rank + c];
      }
    }
  }
  add_right(thin, thin_stride, rows, factors, wide, wide_stride, ahead);
}

INLINE int64_t bytes_of(Kind kind) {
  return kind == Kind::kDouble ? 8 : kind == Kind::kFloat ? 4 : 2;
}

template <class S, class Load, class Store>
INLINE void update(const Rows& all, Kind computed, const Factors<S>& factors, const S* offset,
                   S* scratch, Load load_wide, Store store_wide) {
  // One vector more than needed: rows a multiple of 4 kB apart would share a few lines of the L1.
  const int64_t stride = round_up(factors.width, kLanes) + kLanes;
  S* thin = scratch + kUpdateRows * stride;
  const int64_t step = factors.rank <= kThin && all.column_stride == 1 ? kHeight : kUpdateRows;
  for (int64_t start = 0; start < all.count; start += step) {
    Rows rows = all;
    rows.count = least(step, all.count - start);
    rows.data = static_cast<char*>(all.data) + start * all.row_stride * bytes_of(all.kind);
    const S* here = offset == nullptr ? nullptr : offset + start * factors.rank;
    if (rows.kind == computed && rows.column_stride == 1) {
      update_wide(static_cast<S*>(rows.data), rows.row_stride, rows.count, factors, here, thin,
                  step * rows.row_stride);
      continue;
    }
    load_wide(rows, factors.width, scratch, stride);
    update_wide(scratch, stride, rows.count, factors, here, thin, 0);
    store_wide(scratch, stride, factors.width, rows);
  }
}

void update_float(const Rows& rows, const Factors<float>& factors, const float* offset,
                  float* scratch) {
  update(rows, Kind::kFloat, factors, offset, scratch, load_float, store_float);
}

void update_double(const Rows& rows, const Factors<double>& factors, const double* offset,
                   double* scratch) {
  update(rows, Kind::kDouble, factors, offset, scratch, load_double, store_double);
}

// ---- Normal equations -------------------------------------------------------------------------

constexpr int64_t kPanel = kVectors * kLength<double>;

template <class From>
void find_moved_rows(const Rows& x, const Rows& y, int64_t width, bool* moved) {
  constexpr int64_t kChunk = 64;
  for (int64_t r = 0; r < x.count; ++r) {
    const From* a = static_cast<const From*>(x.data) + r * x.row_stride;
    const From* b = static_cast<const From*>(y.data) + r * y.row_stride;
    bool differs = false;
    for (int64_t start = 0; start < width && !differs; start += kChunk) {
      const int64_t end = least(start + kChunk, width);
      int any = 0;
      for (int64_t c = start; c < end; ++c) any |= widen(a[c]) != widen(b[c]);
      differs = any != 0;
    }
    moved[r] = differs;
  }
}

void find_moved(const Rows& x, const Rows& y, int64_t width, bool* moved) {
  switch (x.kind) {
    case Kind::kFloat: return find_moved_rows<float>(x, y, width, moved);
    case Kind::kDouble: return find_moved_rows<double>(x, y, width, moved);
    case Kind::kBFloat16: return find_moved_rows<BFloat16>(x, y, width, moved);
    case Kind::kHalf: return find_moved_rows<Half>(x, y, width, moved);
  }
}

// One row into its place in every panel: `line` holds whole panels, zeros beyond the width.
INLINE void scatter(const double* line, int64_t width, int64_t panel, int64_t slot, double* out) {
  for (int64_t start = 0; start < width; start += panel) {
    double* to = out + start * kSumRows + slot * panel;
    for (int64_t c = 0; c < panel; ++c) to[c] = line[start + c];
  }
}

template <class From>
void pack_typed_rows(const Rows& x, const Rows& y, const double* weight, const int64_t* slots,
                     int64_t begin, int64_t end, const Sums& sums) {
  // Pieces of the row, so that they fit the stack whatever the width.
  constexpr int64_t kPiece = kPanel * 16;
  static_assert(kPiece % kHeight == 0, "panels of both widths must end where a piece does");
  double plain[kPiece], weighted[kPiece], delta[kPiece];
  for (int64_t r = begin; r < end; ++r) {
    const From* a = static_cast<const From*>(x.data) + r * x.row_stride;
    const From* b = static_cast<const From*>(y.data) + r * y.row_stride;
    const double w = weight[r];
    const int64_t slot = slots[r];
    for (int64_t start = 0; start < sums.width; start += kPiece) {
      const int64_t there = least(kPiece, sums.width - start);
      for (int64_t c = 0; c < there; ++c) {
        plain[c] = static_cast<double>(widen(a[start + c]));
        weighted[c] = w * plain[c];
      }
      const int64_t padded = round_up(there, kPanel);
      for (int64_t c = there; c < padded; ++c) plain[c] = weighted[c] = delta[c] = 0;
      scatter(plain, there, kPanel, slot, sums.x + start * kSumRows);
      scatter(weighted, there, kHeight, slot, sums.weighted + start * kSumRows);
      if (slot >= sums.moved) continue;
      for (int64_t c = 0; c < there; ++c) {
        delta[c] = w * (static_cast<double>(widen(b[start + c])) - plain[c]);
      }
      scatter(delta, there, kHeight, slot, sums.delta + start * kSumRows);
    }
  }
}

void pack_rows(const Rows& x, const Rows& y, const double* weight, const int64_t* slots,
               int64_t begin, int64_t end, const Sums& sums) {
  switch (x.kind) {
    case Kind::kFloat: return pack_typed_rows<float>(x, y, weight, slots, begin, end, sums);
    case Kind::kDouble: return pack_typed_rows<double>(x, y, weight, slots, begin, end, sums);
    case Kind::kBFloat16: return pack_typed_rows<BFloat16>(x, y, weight, slots, begin, end, sums);
    case Kind::kHalf: return pack_typed_rows<Half>(x, y, weight, slots, begin, end, sums);
  }
}

// out[i : i + HEIGHT, j : j + panel] += a^T b, of which `rows` rows and `columns` columns exist.
INLINE void add_product(const double* a, const double* b, int64_t depth, double* out,
                        int64_t stride, int64_t rows, int64_t columns) {
  // The tile is far away, and its rows are too short for the processor to see a stream.
  for (int64_t r = 0; r < least(rows, kHeight); ++r) {
    for (int64_t c = 0; c < kPanel * 8; c += 64) {
      __builtin_prefetch(reinterpret_cast<char*>(out + r * stride) + c, 1);
    }
  }
  V<double> sum[kHeight][kVectors];
  multiply<double, kHeight, kVectors>(a, 1, kHeight, b, depth, sum);
  if (rows >= kHeight) {
    add_tile<double, kHeight, kVectors>(sum, out, stride, columns);
    return;
  }
  double buffer[kHeight * kPanel];
  set_tile<double, kHeight, kVectors>(sum, buffer, kPanel);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < least(columns, kPanel); ++c) {
      out[r * stride + c] += buffer[r * kPanel + c];
    }
  }
}

int64_t units(int64_t width) { return (round_up(width, kPanel) / kPanel + 1) / 2; }

// Rows [top, bottom) of one panel of columns.
void add_panel(const Sums& sums, double* gram, double* cross, int64_t panel, int64_t top,
               int64_t bottom) {
  const int64_t width = sums.width;
  const int64_t left = panel * kPanel;
  const int64_t columns = width - left;
  const double* b = sums.x + left * kSumRows;
  const int64_t diagonal = least(bottom, left + kPanel);
  for (int64_t i = top; i < diagonal; i += kHeight) {
    add_product(sums.weighted + i * kSumRows, b, sums.depth, gram + i * width + left, width,
                width - i, columns);
  }
  if (sums.moved == 0) return;
  for (int64_t i = top; i < bottom; i += kHeight) {
    add_product(sums.delta + i * kSumRows, b, sums.moved, cross + i * width + left, width,
                width - i, columns);
  }
}

// A unit is a panel from the front and one from the back: of the triangle, all have the same size.
void add_products(const Sums& sums, double* gram, double* cross, int64_t begin, int64_t end) {
  const int64_t panels = round_up(sums.width, kPanel) / kPanel;
  for (int64_t top = 0; top < sums.width; top += kASide) {
    const int64_t bottom = least(top + kASide, sums.width);
    for (int64_t unit = begin; unit < end; ++unit) {
      add_panel(sums, gram, cross, unit, top, bottom);
      const int64_t back = panels - 1 - unit;
      if (back != unit) add_panel(sums, gram, cross, back, top, bottom);
    }
  }
}

// ---- Triangular solves ------------------------------------------------------------------------

constexpr int kTogether = 4;  // columns of L taken at once: v is read and written less often

// v[k][from:] -= the part of `together` columns of L that starts at row i.
template <int COUNT>
INLINE void eliminate(const double* rows, int64_t width, int64_t i, double* v) {
  const double* a[kTogether];
  double scale[COUNT][kTogether];
  for (int t = 0; t < kTogether; ++t) {
    a[t] = rows + (i + t) * width;
    for (int k = 0; k < COUNT; ++k) scale[k][t] = v[k * width + i + t];
  }
  int64_t j = i + kTogether;
  for (; j + kLength<double> <= width; j += kLength<double>) {
    V<double> line[kTogether];
    for (int t = 0; t < kTogether; ++t) line[t] = load(a[t] + j);
    for (int k = 0; k < COUNT; ++k) {
      V<double> value = load(v + k * width + j);
      for (int t = 0; t < kTogether; ++t) value -= scale[k][t] * line[t];
      store<double>(v + k * width + j, value);
    }
  }
  for (; j < width; ++j) {
    for (int k = 0; k < COUNT; ++k) {
      for (int t = 0; t < kTogether; ++t) v[k * width + j] -= scale[k][t] * a[t][j];
    }
  }
}

// v[k][i + t] -= sum over j >= i + together of L[j][i + t] v[k][j].
template <int COUNT>
INLINE void gather(const double* rows, int64_t width, int64_t i, double* v) {
  V<double> sum[COUNT][kTogether];
  for (int k = 0; k < COUNT; ++k) {
    for (int t = 0; t < kTogether; ++t) sum[k][t] = V<double>{};
  }
  int64_t j = i + kTogether;
  for (; j + kLength<double> <= width; j += kLength<double>) {
    V<double> value[COUNT];
    for (int k = 0; k < COUNT; ++k) value[k] = load(v + k * width + j);
    for (int t = 0; t < kTogether; ++t) {
      const V<double> line = load(rows + (i + t) * width + j);
      for (int k = 0; k < COUNT; ++k) sum[k][t] += line * value[k];
    }
  }
  for (int k = 0; k < COUNT; ++k) {
    for (int t = 0; t < kTogether; ++t) {
      double total = reduce<double>(sum[k][t]);
      for (int64_t q = j; q < width; ++q) total += rows[(i + t) * width + q] * v[k * width + q];
      v[k * width + i + t] -= total;
    }
  }
}

template <int COUNT>
void solve(const double* rows, int64_t width, double* v) {
  const int64_t whole = width / kTogether * kTogether;
  for (int64_t i = 0; i < width; ++i) {
    // Within a group of columns only the group's own rows; `eliminate` does the others.
    const int64_t end = i < whole ? i / kTogether * kTogether + kTogether : width;
    const double* column = rows + i * width;
    for (int k = 0; k < COUNT; ++k) {
      double* u = v + k * width;
      u[i] /= column[i];
      for (int64_t j = i + 1; j < end; ++j) u[j] -= u[i] * column[j];
    }
    if (i + 1 == end && i < whole) eliminate<COUNT>(rows, width, end - kTogether, v);
  }
  for (int64_t i = width - 1; i >= 0; --i) {
    const int64_t end = i < whole ? i / kTogether * kTogether + kTogether : width;
    if (i + 1 == end && i < whole) gather<COUNT>(rows, width, end - kTogether, v);
    const double* column = rows + i * width;
    for (int k = 0; k < COUNT; ++k) {
      double* u = v + k * width;
      double value = u[i];
      for (int64_t j = i + 1; j < end; ++j) value -= column[j] * u[j];
      u[i] = value / column[i];
    }
  }
}

void solve_vectors(const double* rows, int64_t width, double* v, int count) {
  if (count == 2) {
    solve<2>(rows, width, v);
  } else {
    solve<1>(rows, width, v);
  }
}

// Greatest column sum; of a symmetric matrix, so row sums do.
double norm_one(const double* matrix, int64_t width) {
  double greatest = 0;
  for (int64_t i = 0; i < width; ++i) {
    const double* row = matrix + i * width;
    V<double> sum[4] = {};
    int64_t j = 0;
    for (; j + 4 * kLength<double> <= width; j += 4 * kLength<double>) {
      for (int t = 0; t < 4; ++t) {
        const V<double> value = load(row + j + t * kLength<double>);
        sum[t] += value < 0 ? -value : value;
      }
    }
    double total = reduce<double>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; j < width; ++j) total += __builtin_fabs(row[j]);
    // Not a comparison that a NaN would lose.
    if (!(total <= greatest)) greatest = total;
  }
  return greatest;
}

}  // namespace

extern const Kernels TILES_KERNELS;
const Kernels TILES_KERNELS = {
    TILES_NAME,    kOwnRank,      pack<float>, pack<double>, update_float, update_double,
    load_float,    load_double,   store_float, store_double, find_moved,   pack_rows,
    units,         add_products,  solve_vectors, norm_one,
};

}  // namespace realera_fast
