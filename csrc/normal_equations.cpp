// gram += sum_i w_i x_i x_i^T and cross += sum_i w_i (y_i - x_i) x_i^T, in float64, in one pass
// over the rows. Two things a composition of PyTorch calls doesn't do: only one triangle of the
// symmetric sum is computed, and only rows that move enter the product of the cross term.
// `gram_` is the first sum alone.

#include "dispatch.h"
#include "tiles.h"

#include <memory>

namespace realera_fast {
namespace {

constexpr int64_t kMirror = 32;  // a square of the gram matrix whose transpose fits the L1 cache

Kind kind_of(const Tensor& rows) {
  switch (rows.scalar_type()) {
    case ScalarType::Float: return Kind::kFloat;
    case ScalarType::Double: return Kind::kDouble;
    case ScalarType::BFloat16: return Kind::kBFloat16;
    case ScalarType::Half: return Kind::kHalf;
    default: STD_TORCH_CHECK(false, "source: expected float32, bfloat16, float16 or float64");
  }
}

// Rows whose columns lie one behind the other.
Rows rows_of(const Tensor& tensor, int64_t start, int64_t count) {
  char* data = static_cast<char*>(tensor.mutable_data_ptr());
  return {data + start * tensor.stride(0) * tensor.element_size(), kind_of(tensor), count,
          tensor.stride(0), 1};
}

Tensor dense_columns(const Tensor& tensor) {
  return tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// The lower triangle becomes the upper one: the matrix was symmetric and stays so to the last bit.
void mirror(double* gram, int64_t width) {
  const int64_t bands = (width + kMirror - 1) / kMirror;
  torch::stable::parallel_for(0, bands, 4, [=](int64_t begin, int64_t end) {
    for (int64_t top = begin * kMirror; top < std::min(end * kMirror, width); top += kMirror) {
      const int64_t bottom = std::min(top + kMirror, width);
      for (int64_t left = 0; left <= top; left += kMirror) {
        for (int64_t i = top; i < bottom; ++i) {
          const int64_t right = std::min(left + kMirror, i);
          for (int64_t j = left; j < right; ++j) gram[i * width + j] = gram[j * width + i];
        }
      }
    }
  });
}

// Gives every row its place, those that move first. Returns how many do.
int64_t place_rows(const bool* moved, int64_t rows, int64_t* slots) {
  int64_t front = 0, back = rows;
  for (int64_t r = 0; r < rows; ++r) slots[r] = moved[r] ? front++ : --back;
  return front;
}

// A block of rows in the order of the products, and the memory for it.
class Packer {
 public:
  Packer(int64_t width, int64_t rows, bool moving)
      : moving_(moving), moved_(new bool[rows]()), slots_(rows) {
    sums_.width = width;
    sums_.x = allocate(memory_[0]);
    sums_.weighted = allocate(memory_[1]);
    if (moving) sums_.delta = allocate(memory_[2]);
  }

  // `y` is read only if rows move.
  const Sums& pack(const Rows& x, const Rows& y, const double* weight) {
    const Kernels& kernel = kernels();
    if (moving_) {
      torch::stable::parallel_for(0, x.count, kGrain, [&](int64_t begin, int64_t end) {
        kernel.find_moved(part(x, begin, end), part(y, begin, end), sums_.width,
                          moved_.get() + begin);
      });
    }
    sums_.depth = x.count;
    sums_.moved = place_rows(moved_.get(), x.count, slots_.data());
    torch::stable::parallel_for(0, x.count, kGrain, [&](int64_t begin, int64_t end) {
      kernel.pack_rows(x, y, weight, slots_.data(), begin, end, sums_);
    });
    return sums_;
  }

 private:
  static constexpr int64_t kGrain = 32;

  static Rows part(Rows rows, int64_t begin, int64_t end) {
    const int64_t bytes = rows.kind == Kind::kDouble ? 8 : rows.kind == Kind::kFloat ? 4 : 2;
    rows.data = static_cast<char*>(rows.data) + begin * rows.row_stride * bytes;
    rows.count = end - begin;
    return rows;
  }

  double* allocate(Tensor& memory) const {
    memory = torch::stable::empty({sums_elements(sums_.width)}, ScalarType::Double);
    return memory.mutable_data_ptr<double>();
  }

  const bool moving_;
  std::unique_ptr<bool[]> moved_;
  std::vector<int64_t> slots_;
  std::array<Tensor, 3> memory_;
  Sums sums_{};
};

void check(const Tensor& gram, const Tensor& source, const Tensor& weight) {
  check_matrix(source, "source", -1, -1);
  check_matrix(gram, "gram", source.size(1), source.size(1));
  check_double(gram, "gram");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == source.size(0), "weight: wrong shape");
  kind_of(source);
}

// Without `cross` no row moves, and `destination` is the source.
void add_rows(Tensor gram, double* cross, const Tensor& source, const Tensor& destination,
              const Tensor& weight) {
  const int64_t rows = source.size(0);
  const int64_t width = source.size(1);
  if (rows == 0 || width == 0) return;
  const Tensor x = dense_columns(source);
  const Tensor y = cross == nullptr ? x : dense_columns(destination);
  Tensor w = torch::stable::empty({rows}, ScalarType::Double);
  torch::stable::copy_(w, weight);
  double* gram_data = gram.mutable_data_ptr<double>();
  const Kernels& kernel = kernels();
  Packer packer(width, std::min(rows, kSumRows), cross != nullptr);
  for (int64_t start = 0; start < rows; start += kSumRows) {
    const int64_t count = std::min(kSumRows, rows - start);
    const Sums& sums = packer.pack(rows_of(x, start, count), rows_of(y, start, count),
                                   w.const_data_ptr<double>() + start);
    torch::stable::parallel_for(0, kernel.units(width), 1, [&](int64_t begin, int64_t end) {
      kernel.add_products(sums, gram_data, cross, begin, end);
    });
  }
  mirror(gram_data, width);
}

void normal_equations_(Tensor gram, Tensor cross, Tensor source, Tensor destination,
                       Tensor weight) {
  check(gram, source, weight);
  check_matrix(cross, "cross", source.size(1), source.size(1));
  check_double(cross, "cross");
  check_matrix(destination, "destination", source.size(0), source.size(1));
  STD_TORCH_CHECK(destination.scalar_type() == source.scalar_type(),
                  "destination: expected the dtype of source");
  add_rows(gram, cross.mutable_data_ptr<double>(), source, destination, weight);
}

void gram_(Tensor gram, Tensor source, Tensor weight) {
  check(gram, source, weight);
  add_rows(gram, nullptr, source, source, weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(realera_fast, CPU, m) {
  m.impl("normal_equations_", TORCH_BOX(&normal_equations_));
  m.impl("gram_", TORCH_BOX(&gram_));
}

}  // namespace realera_fast
