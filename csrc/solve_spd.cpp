// X gram = rhs by Cholesky, and Higham's estimate of the condition number. The factorisation and
// the solves are LAPACK's; the estimate's solves with one right-hand side are written out, because
// PyTorch's would copy the factor each time. Systems of a batch run in parallel.

#include "dispatch.h"
#include "tiles.h"

#include <cmath>

namespace realera_fast {
namespace {

constexpr int kSteps = 5;          // as in reference.py
constexpr int64_t kSmall = 40000;  // multiplications that take less than calls through torch

double absolute_sum(const double* v, int64_t width) {
  double sum = 0;
  for (int64_t i = 0; i < width; ++i) sum += std::abs(v[i]);
  return sum;
}

// v becomes the signs of its elements. Returns whether `signs`, the previous ones, were the same.
bool take_signs(double* v, std::vector<double>& signs) {
  bool same = true;
  for (std::size_t i = 0; i < signs.size(); ++i) {
    v[i] = v[i] < 0 ? -1 : 1;
    same = same && v[i] == signs[i];
    signs[i] = v[i];
  }
  return same;
}

int64_t steepest(const double* v, int64_t width) {
  return std::max_element(v, v + width,
                          [](double a, double b) { return std::abs(a) < std::abs(b); }) - v;
}

double reciprocal_condition(const double* gram, const double* rows, int64_t width) {
  if (width == 0) return 1;
  const Kernels& kernel = kernels();
  const double size = static_cast<double>(width);
  std::vector<double> both(2 * width), signs(width, 0.0);
  double* v = both.data();
  double* alternating = v + width;
  std::fill(v, v + width, 1 / size);
  for (int64_t i = 0; i < width; ++i) {
    alternating[i] = (i % 2 ? -1 : 1) * (1 + static_cast<double>(i) / std::max(size - 1, 1.0));
  }
  // One pass over the factor serves both start vectors.
  kernel.solve_vectors(rows, width, v, 2);
  double inverse = absolute_sum(alternating, width) * 2 / (3 * size);
  int64_t last = -1;
  for (int step = 0; step < kSteps; ++step) {
    if (step > 0) kernel.solve_vectors(rows, width, v, 1);
    inverse = std::max(inverse, absolute_sum(v, width));
    // What was solved before would only be solved again, so the maximum stands.
    if (step + 1 == kSteps || take_signs(v, signs)) break;
    kernel.solve_vectors(rows, width, v, 1);
    const int64_t index = steepest(v, width);
    if (index == last) break;
    last = index;
    std::fill(v, v + width, 0.0);
    v[index] = 1;
  }
  const double reciprocal = 1 / (kernel.norm_one(gram, width) * inverse);
  return std::isfinite(reciprocal) ? reciprocal : 0;
}

// The columns of L into the rows of `rows`, which hold the upper triangle of the matrix before.
// Returns 0, or the order of the first minor that is not positive.
int32_t factor_small(double* rows, int64_t width) {
  for (int64_t j = 0; j < width; ++j) {
    double* pivot = rows + j * width;
    if (!(pivot[j] > 0)) return static_cast<int32_t>(j + 1);
    const double root = std::sqrt(pivot[j]);
    for (int64_t i = j; i < width; ++i) pivot[i] /= root;
    for (int64_t i = j + 1; i < width; ++i) {
      double* row = rows + i * width;
      for (int64_t c = i; c < width; ++c) row[c] -= pivot[i] * pivot[c];
    }
  }
  return 0;
}

// As `solve_one`, for a system so small that calling LAPACK through torch costs more than solving.
void solve_small(const double* gram, const double* rhs, int64_t width, int64_t count,
                 double* solution, int32_t* info, double* reciprocal) {
  std::vector<double> rows(width * width);
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t j = i; j < width; ++j) rows[i * width + j] = gram[j * width + i];
  }
  std::copy(rhs, rhs + count * width, solution);
  *info = factor_small(rows.data(), width);
  *reciprocal = *info == 0 ? reciprocal_condition(gram, rows.data(), width) : 0;
  if (*info != 0) return;
  for (int64_t r = 0; r < count; ++r) {
    kernels().solve_vectors(rows.data(), width, solution + r * width, 1);
  }
}

// One system; `gram` and `rhs` are contiguous, `solution` is too.
void solve_one(const Tensor& gram, const Tensor& rhs, const Tensor& solution, int32_t* info,
               double* reciprocal) {
  const int64_t width = gram.size(0);
  const int64_t count = rhs.size(0);
  if (width * width * (width / 3 + 2 * count) <= kSmall) {
    solve_small(gram.const_data_ptr<double>(), rhs.const_data_ptr<double>(), width, count,
                solution.mutable_data_ptr<double>(), info, reciprocal);
    return;
  }
  auto [factor, status] = call_all<2>("aten::linalg_cholesky_ex", "", gram, false, false);
  *info = *status.const_data_ptr<int32_t>();
  const Tensor transposed = torch::stable::transpose(factor, 0, 1);
  const Tensor rows = torch::stable::contiguous(transposed);
  *reciprocal = *info == 0 ? reciprocal_condition(gram.const_data_ptr<double>(),
                                                  rows.const_data_ptr<double>(), width)
                           : 0;
  if (count == 0) return;
  // X L L^T = rhs. Unlike `cholesky_solve` this copies neither the factor nor its argument.
  const char* solve = "aten::linalg_solve_triangular";
  const Tensor half = call(solve, "", transposed, rhs, true, false, false);
  call(solve, "out", factor, half, false, false, false, solution);
}

std::tuple<Tensor, Tensor, Tensor> solve_spd(Tensor gram, Tensor rhs) {
  const int64_t dim = gram.dim();
  STD_TORCH_CHECK((dim == 2 || dim == 3) && rhs.dim() == dim &&
                      gram.size(dim - 1) == gram.size(dim - 2) &&
                      rhs.size(dim - 1) == gram.size(dim - 1) &&
                      (dim == 2 || rhs.size(0) == gram.size(0)),
                  "gram, rhs: wrong shape; call it through realera_fast.ops");
  STD_TORCH_CHECK(
      gram.scalar_type() == ScalarType::Double && rhs.scalar_type() == ScalarType::Double,
      "gram, rhs: expected float64; call it through realera_fast.ops");
  // Worker threads don't inherit "no gradient".
  gram = torch::stable::contiguous(call("aten::detach", "", gram));
  rhs = torch::stable::contiguous(call("aten::detach", "", rhs));
  std::vector<int64_t> batch;
  if (dim == 3) batch.push_back(gram.size(0));
  Tensor solution = torch::stable::empty_like(rhs);
  Tensor info = torch::stable::empty(batch, ScalarType::Int);
  Tensor reciprocal = torch::stable::empty(batch, ScalarType::Double);
  int32_t* info_data = info.mutable_data_ptr<int32_t>();
  double* reciprocal_data = reciprocal.mutable_data_ptr<double>();
  if (dim == 2) {
    solve_one(gram, rhs, solution, info_data, reciprocal_data);
    return {solution, info, reciprocal};
  }
  auto solve_range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      solve_one(torch::stable::select(gram, 0, i), torch::stable::select(rhs, 0, i),
                torch::stable::select(solution, 0, i), info_data + i, reciprocal_data + i);
    }
  };
  torch::stable::parallel_for(0, gram.size(0), 1, solve_range);
  return {solution, info, reciprocal};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(realera_fast, CPU, m) {
  m.impl("solve_spd", TORCH_BOX(&solve_spd));
}

}  // namespace realera_fast
