// gram += sum_i w_i x_i x_i^T and cross += sum_i w_i (y_i - x_i) x_i^T, in float64, in one pass over
// the rows. Two things a composition of PyTorch calls doesn't do: only one triangle of the symmetric
// sum is computed, and only rows that move enter the product of the cross term.

#include "dispatch.h"

namespace realera_fast {
namespace {

constexpr int64_t kRows = 512;     // rows converted to float64 at a time
constexpr int64_t kColumns = 256;  // width of a tile of the triangle

// sum += tile products of a^T b, of shape [columns, columns]; only tiles on or above the diagonal if
// `triangle`. `tile` is scratch of at least kColumns x kColumns elements.
void accumulate(double* sum, int64_t width, Tensor a, Tensor b, bool triangle, Tensor tile) {
  for (int64_t i = 0; i < width; i += kColumns) {
    const int64_t height = std::min(kColumns, width - i);
    Tensor left = torch::stable::narrow(a, 1, i, height);
    left = torch::stable::transpose(left, 0, 1);
    for (int64_t j = triangle ? i : 0; j < width; j += kColumns) {
      const int64_t columns = std::min(kColumns, width - j);
      Tensor flat = torch::stable::narrow(tile, 0, 0, height * columns);
      Tensor product = torch::stable::view(flat, {height, columns});
      mm_out(product, left, torch::stable::narrow(b, 1, j, columns));
      const double* values = product.const_data_ptr<double>();
      for (int64_t r = 0; r < height; ++r) {
        double* row = sum + (i + r) * width + j;
        for (int64_t c = 0; c < columns; ++c) row[c] += values[r * columns + c];
      }
    }
  }
}

// From rows x, y and weights w: y becomes w (y - x) with the rows that move first, and `moved` the
// matching rows x. Returns how many move.
int64_t compact(const double* x, double* y, double* moved, const double* weight, int64_t rows,
                int64_t width) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const double* from = x + r * width;
    const double* to = y + r * width;
    if (std::equal(from, from + width, to)) continue;
    double* delta = y + count * width;  // never ahead of the row that is read
    for (int64_t c = 0; c < width; ++c) delta[c] = weight[r] * (to[c] - from[c]);
    std::copy(from, from + width, moved + count * width);
    ++count;
  }
  return count;
}

void normal_equations_(Tensor gram, Tensor cross, Tensor source, Tensor destination,
                       Tensor weight) {
  check_matrix(source, "source", -1, -1);
  const int64_t rows = source.size(0);
  const int64_t width = source.size(1);
  check_matrix(gram, "gram", width, width);
  check_matrix(cross, "cross", width, width);
  check_double(gram, "gram");
  check_double(cross, "cross");
  check_matrix(destination, "destination", rows, width);
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == rows, "weight: wrong shape");
  if (rows == 0 || width == 0) return;

  const int64_t block = std::min(kRows, rows);
  auto scratch = [](int64_t height, int64_t columns) {
    return torch::stable::empty({height, columns}, ScalarType::Double);
  };
  Tensor x_all = scratch(block, width);
  Tensor y_all = scratch(block, width);
  Tensor wx_all = scratch(block, width);
  Tensor tile = torch::stable::empty({kColumns * kColumns}, ScalarType::Double);
  Tensor w = torch::stable::empty({rows}, ScalarType::Double);
  torch::stable::copy_(w, weight);
  std::vector<double> triangle(width * width, 0.0);

  for (int64_t start = 0; start < rows; start += block) {
    const int64_t height = std::min(block, rows - start);
    Tensor x = torch::stable::narrow(x_all, 0, 0, height);
    Tensor y = torch::stable::narrow(y_all, 0, 0, height);
    Tensor wx = torch::stable::narrow(wx_all, 0, 0, height);
    torch::stable::copy_(x, torch::stable::narrow(source, 0, start, height));
    torch::stable::copy_(y, torch::stable::narrow(destination, 0, start, height));
    const double* x_data = x.const_data_ptr<double>();
    const double* w_data = w.const_data_ptr<double>() + start;
    double* wx_data = wx.mutable_data_ptr<double>();
    torch::stable::parallel_for(0, height, 64, [=](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t c = 0; c < width; ++c) {
          wx_data[r * width + c] = w_data[r] * x_data[r * width + c];
        }
      }
    });
    accumulate(triangle.data(), width, x, wx, true, tile);
    const int64_t moved =
        compact(x_data, y.mutable_data_ptr<double>(), wx_data, w_data, height, width);
    if (moved > 0) {
      accumulate(cross.mutable_data_ptr<double>(), width, torch::stable::narrow(y, 0, 0, moved),
                 torch::stable::narrow(wx, 0, 0, moved), false, tile);
    }
  }

  double* sum = gram.mutable_data_ptr<double>();
  for (int64_t i = 0; i < width; ++i) {
    sum[i * width + i] += triangle[i * width + i];
    for (int64_t j = i + 1; j < width; ++j) {
      sum[i * width + j] += triangle[i * width + j];
      sum[j * width + i] += triangle[i * width + j];
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(realera_fast, CPU, m) {
  m.impl("normal_equations_", TORCH_BOX(&normal_equations_));
}

}  // namespace realera_fast
