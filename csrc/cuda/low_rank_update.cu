#include <optional>

#include "launch.h"

#include "low_rank_update.cuh"

namespace realera_fast {
namespace {

// Three blocks of a multiprocessor of an H100, so that one loads while others compute and store.
constexpr int64_t kPreferredBytes = 75 * 1024;

// Weights that one kernel can take together.
struct Group {
  ScalarType dtype;
  int64_t width;
  int64_t rank;
  std::vector<UpdateWeight> weights;
};

int64_t blocks(const Group& group, int64_t rows_per_block) {
  int64_t count = 0;
  for (const UpdateWeight& weight : group.weights) {
    count += (weight.rows + rows_per_block - 1) / rows_per_block;
  }
  return count;
}

template <class W, class Acc, int Groups>
void launch(const Group& group, const Device& device) {
  constexpr int kRows = 8 * Groups;
  const int64_t bytes = update_bytes<W, Acc, Groups>(group.width, group.rank);
  UpdateTable table;
  table.width = static_cast<int32_t>(group.width);
  table.rank = static_cast<int32_t>(group.rank);
  for (std::size_t first = 0; first < group.weights.size(); first += kUpdateWeights) {
    const std::size_t last = std::min(group.weights.size(), first + kUpdateWeights);
    int64_t count = 0;
    for (std::size_t i = first; i < last; ++i) {
      UpdateWeight& weight = table.weights[i - first];
      weight = group.weights[i];
      weight.first_block = static_cast<int32_t>(count);
      count += (weight.rows + kRows - 1) / kRows;
    }
    table.count = static_cast<int32_t>(last - first);
    STD_TORCH_CHECK(count <= std::numeric_limits<int32_t>::max(), "weights: too many rows");
    device.launch(update_kernel<W, Acc, Groups>, {static_cast<unsigned>(count), 1, 1},
                  kUpdateThreads, bytes, table);
  }
}

template <class W, class Acc>
void launch(const Group& group, const Device& device) {
  const int64_t preferred = std::min(kPreferredBytes, device.shared_memory());
  const int64_t wanted = device.multiprocessors();
  auto suits = [&](int64_t bytes, int64_t rows_per_block) {
    return bytes <= preferred && blocks(group, rows_per_block) >= wanted;
  };
  if constexpr (sizeof(Acc) == sizeof(float)) {
    if (suits(update_bytes<W, Acc, 4>(group.width, group.rank), 32)) {
      return launch<W, Acc, 4>(group, device);
    }
  }
  if (suits(update_bytes<W, Acc, 2>(group.width, group.rank), 16)) {
    return launch<W, Acc, 2>(group, device);
  }
  launch<W, Acc, 1>(group, device);
}

// The smallest block must fit, and at a large rank torch's products are faster.
bool suits_kernel(ScalarType dtype, int64_t width, int64_t rank, const Device& device) {
  if (2 * rank > width) return false;
  // Keeps the sizes below far from overflow.
  if (width > std::numeric_limits<int32_t>::max() / 1024) return false;
  const int64_t limit = device.shared_memory();
  if (dtype == ScalarType::Double) return update_bytes<double, double, 1>(width, rank) <= limit;
  if (dtype == ScalarType::Float) return update_bytes<float, float, 1>(width, rank) <= limit;
  return update_bytes<__half, float, 1>(width, rank) <= limit;
}

// The same in torch's operations. `right` is null where `left` is the product of both.
void compose(Tensor weight, ScalarType accumulate, const Tensor& left, const Tensor* right,
             const Tensor* offset) {
  const Tensor wide = torch::stable::to(weight, accumulate);
  Tensor update = call("aten::mm", "", wide, left);
  if (offset != nullptr) update = torch::stable::subtract(update, *offset, -1.0);
  if (right != nullptr) update = call("aten::mm", "", update, *right);
  torch::stable::copy_(weight, torch::stable::subtract(wide, update, -1.0));
}

// The factors of all weights in the type that is accumulated in. Tensors that were converted are
// kept until the kernels are launched; from then on, stream order protects their memory.
class Factors {
 public:
  explicit Factors(const std::vector<Tensor>& tensors) : tensors_(tensors) {
    for (auto& ready : ready_) ready.resize(tensors.size());
    for (auto& filled : filled_) filled.resize(tensors.size(), false);
  }

  const Tensor& get(std::size_t weight, ScalarType dtype) {
    const std::size_t i = tensors_.size() == 1 ? 0 : weight;
    const int kind = dtype == ScalarType::Double;
    if (!filled_[kind][i]) {
      ready_[kind][i] = torch::stable::contiguous(torch::stable::to(tensors_[i], dtype));
      filled_[kind][i] = true;
    }
    return ready_[kind][i];
  }

 private:
  const std::vector<Tensor>& tensors_;
  std::array<std::vector<Tensor>, 2> ready_;
  std::array<std::vector<bool>, 2> filled_;
};

void low_rank_update_(std::vector<Tensor> weights, std::vector<Tensor> left,
                      std::vector<Tensor> right, std::vector<Tensor> offset) {
  if (weights.empty()) return;
  const std::size_t count = weights.size();
  STD_TORCH_CHECK((left.size() == 1 || left.size() == count) && right.size() == left.size() &&
                      (offset.empty() || offset.size() == count),
                  "left, right, offset: wrong number; call it through realera_fast.ops");
  const Device device(weights[0]);
  Factors lefts(left), rights(right), offsets(offset);
  std::array<std::vector<std::optional<Tensor>>, 2> products;
  for (auto& kind : products) kind.resize(left.size());
  std::vector<Group> groups;
  for (std::size_t i = 0; i < count; ++i) {
    Tensor& weight = weights[i];
    const Tensor& thin = left[left.size() == 1 ? 0 : i];
    check_matrix(weight, "weights", -1, -1);
    const int64_t rows = weight.size(0);
    const int64_t width = weight.size(1);
    check_matrix(thin, "left", width, -1);
    const int64_t rank = thin.size(1);
    check_matrix(right[right.size() == 1 ? 0 : i], "right", rank, width);
    if (!offset.empty()) check_matrix(offset[i], "offset", rows, rank);
    if (rows == 0 || width == 0 || rank == 0) continue;
    STD_TORCH_CHECK(rows <= std::numeric_limits<int32_t>::max(), "weights: too many rows");
    const ScalarType dtype = weight.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                        dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                    "weights: wrong dtype; call it through realera_fast.ops");
    const ScalarType accumulate =
        dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    const Tensor& l = lefts.get(i, accumulate);
    const Tensor& r = rights.get(i, accumulate);
    const Tensor* o = offset.empty() ? nullptr : &offsets.get(i, accumulate);
    if (!suits_kernel(dtype, width, rank, device)) {
      if (2 * rank <= width || o != nullptr) {
        compose(weight, accumulate, l, &r, o);
        continue;
      }
      // One product of the factors costs less than a thin one for every weight.
      const std::size_t own = left.size() == 1 ? 0 : i;
      auto& product = products[accumulate == ScalarType::Double][own];
      if (!product) product = call("aten::mm", "", l, r);
      compose(weight, accumulate, *product, nullptr, nullptr);
      continue;
    }
    auto same = [&](const Group& group) {
      return group.dtype == dtype && group.width == width && group.rank == rank;
    };
    auto group = std::find_if(groups.begin(), groups.end(), same);
    if (group == groups.end()) group = groups.insert(group, Group{dtype, width, rank, {}});
    group->weights.push_back({weight.mutable_data_ptr(), l.const_data_ptr(), r.const_data_ptr(),
                              o == nullptr ? nullptr : o->const_data_ptr(), weight.stride(0),
                              weight.stride(1), static_cast<int32_t>(rows), 0});
  }
  for (const Group& group : groups) {
    switch (group.dtype) {
      case ScalarType::Float:
        launch<float, float>(group, device);
        break;
      case ScalarType::BFloat16:
        launch<__nv_bfloat16, float>(group, device);
        break;
      case ScalarType::Half:
        launch<__half, float>(group, device);
        break;
      default:
        launch<double, double>(group, device);
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(realera_fast, CUDA, m) {
  m.impl("low_rank_update_", TORCH_BOX(&low_rank_update_));
}

}  // namespace realera_fast
