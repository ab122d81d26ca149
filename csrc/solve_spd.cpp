// X gram = rhs by Cholesky, one refinement step, and Higham's estimate of the condition number. The
// factorisation and the solves are LAPACK's; the estimate's ten solves with one right-hand side
// are written out, because PyTorch's would copy the factor each time.

#include "dispatch.h"

#include <cmath>

namespace realera_fast {
namespace {

constexpr int kSteps = 5;  // as in reference.py

// Solves L L^T v = v in place. `rows` is the transpose of L: row i holds column i of L.
void solve_vector(const double* rows, int64_t width, double* v) {
  for (int64_t i = 0; i < width; ++i) {
    const double* column = rows + i * width;
    v[i] /= column[i];
    const double scale = v[i];
    for (int64_t j = i + 1; j < width; ++j) v[j] -= scale * column[j];
  }
  for (int64_t i = width - 1; i >= 0; --i) {
    const double* column = rows + i * width;
    // Four partial sums, so that the loop isn't one long chain of dependent additions.
    double sum[4] = {0, 0, 0, 0};
    int64_t j = i + 1;
    for (; j + 4 <= width; j += 4) {
      for (int64_t k = 0; k < 4; ++k) sum[k] += column[j + k] * v[j + k];
    }
    for (; j < width; ++j) sum[0] += column[j] * v[j];
    v[i] = (v[i] - ((sum[0] + sum[1]) + (sum[2] + sum[3]))) / column[i];
  }
}

double absolute_sum(const std::vector<double>& v) {
  double sum = 0;
  for (double value : v) sum += std::abs(value);
  return sum;
}

// Greatest column sum; of a symmetric matrix, so row sums do.
double norm_one(const double* matrix, int64_t width) {
  double greatest = 0;
  for (int64_t i = 0; i < width; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < width; ++j) sum += std::abs(matrix[i * width + j]);
    greatest = std::max(greatest, sum);
  }
  return greatest;
}

double reciprocal_condition(const double* gram, const double* rows, int64_t width) {
  if (width == 0) return 1;
  std::vector<double> v(width);
  for (int64_t i = 0; i < width; ++i) {
    v[i] = (i % 2 ? -1.0 : 1.0) *
           (1 + static_cast<double>(i) / static_cast<double>(std::max<int64_t>(width - 1, 1)));
  }
  solve_vector(rows, width, v.data());
  double inverse = absolute_sum(v) * 2 / (3 * static_cast<double>(width));
  std::fill(v.begin(), v.end(), 1 / static_cast<double>(width));
  for (int step = 0; step < kSteps; ++step) {
    solve_vector(rows, width, v.data());
    inverse = std::max(inverse, absolute_sum(v));
    for (double& value : v) value = value < 0 ? -1 : 1;
    solve_vector(rows, width, v.data());
    const auto steepest = std::max_element(
        v.begin(), v.end(), [](double a, double b) { return std::abs(a) < std::abs(b); });
    const auto index = steepest - v.begin();
    std::fill(v.begin(), v.end(), 0.0);
    v[index] = 1;
  }
  const double reciprocal = 1 / (norm_one(gram, width) * inverse);
  return std::isfinite(reciprocal) ? reciprocal : 0;
}

std::tuple<Tensor, Tensor, Tensor> solve_spd(Tensor gram, Tensor rhs) {
  check_matrix(gram, "gram", -1, gram.size(0));
  check_matrix(rhs, "rhs", -1, gram.size(0));
  STD_TORCH_CHECK(
      gram.scalar_type() == ScalarType::Double && rhs.scalar_type() == ScalarType::Double,
      "gram, rhs: expected float64; call it through realera_fast.ops");
  const int64_t width = gram.size(0);
  gram = torch::stable::contiguous(gram);
  rhs = torch::stable::contiguous(rhs);

  auto [factor, info] = call_all<2>("aten::linalg_cholesky_ex", "", gram, false, false);
  auto solve = [&factor = factor](Tensor& b) {
    Tensor solved =
        call("aten::cholesky_solve", "", torch::stable::transpose(b, 0, 1), factor, false);
    return torch::stable::transpose(solved, 0, 1);
  };
  Tensor solution = torch::stable::contiguous(solve(rhs));
  Tensor residual = torch::stable::empty({rhs.size(0), width}, ScalarType::Double);
  mm_out(residual, solution, gram);
  double* r = residual.mutable_data_ptr<double>();
  const double* b = rhs.const_data_ptr<double>();
  const int64_t elements = rhs.size(0) * width;
  for (int64_t i = 0; i < elements; ++i) r[i] = b[i] - r[i];
  Tensor correction = torch::stable::contiguous(solve(residual));
  double* x = solution.mutable_data_ptr<double>();
  const double* step = correction.const_data_ptr<double>();
  for (int64_t i = 0; i < elements; ++i) x[i] += step[i];

  Tensor reciprocal = torch::stable::empty({}, ScalarType::Double);
  double* value = reciprocal.mutable_data_ptr<double>();
  *value = 0;
  if (*info.const_data_ptr<int32_t>() == 0) {
    const Tensor rows = torch::stable::contiguous(torch::stable::transpose(factor, 0, 1));
    *value = reciprocal_condition(gram.const_data_ptr<double>(), rows.const_data_ptr<double>(),
                                  width);
  }
  return {solution, info, reciprocal};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(realera_fast, CPU, m) {
  m.impl("solve_spd", TORCH_BOX(&solve_spd));
}

}  // namespace realera_fast
