// W += (W left + offset) right for many weights in one call. Each block of rows is read once,
// converted to float32 (float64 for float64 weights), updated in the cache, and rounded back once.

#include "dispatch.h"
#include "tiles.h"

namespace realera_fast {
namespace {

// Up to this rank our loops beat the product with `left right`, even where it has less to do.
constexpr int64_t kDenseRank = 40;
// Rows of a block for torch's product. What that computes may still differ in the last bits between
// numbers of threads.
constexpr int64_t kProductRows = 640;

template <class S>
struct Type;
template <>
struct Type<float> {
  static constexpr ScalarType scalar = ScalarType::Float;
  static constexpr auto pack = &Kernels::pack_float;
  static constexpr auto update = &Kernels::update_float;
  static constexpr auto load = &Kernels::load_float;
  static constexpr auto store = &Kernels::store_float;
};
template <>
struct Type<double> {
  static constexpr ScalarType scalar = ScalarType::Double;
  static constexpr auto pack = &Kernels::pack_double;
  static constexpr auto update = &Kernels::update_double;
  static constexpr auto load = &Kernels::load_double;
  static constexpr auto store = &Kernels::store_double;
};

enum class Plan { kOwn, kProducts, kDense };

// What one or all weights are multiplied by, ready for its plan.
template <class S>
struct Layer {
  Plan plan;
  Tensor left, right;  // kOwn: packed; kDense: left right, and right only if there are offsets
  Factors<S> factors{};
};

struct Block {
  std::size_t weight;
  int64_t start;
  int64_t rows;
};

Tensor computed(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(tensor, dtype));
}

Plan plan_for(int64_t width, int64_t rank, bool has_offset) {
  // Multiplications for one row: 2 k d in turn; d^2 by their product, and k d for the offset.
  const bool fewer = has_offset ? rank > width : 2 * rank > width;
  if (fewer && rank > kDenseRank) return Plan::kDense;
  return rank <= kernels().own_rank ? Plan::kOwn : Plan::kProducts;
}

// Whether a contiguous square matrix is the identity: a dense map comes with that as its right factor.
template <class S>
bool is_identity(const Tensor& tensor) {
  const S* row = tensor.const_data_ptr<S>();
  const int64_t width = tensor.size(0);
  for (int64_t i = 0; i < width; ++i, row += width) {
    int64_t others = 0;
    for (int64_t j = 0; j < width; ++j) others += row[j] != 0;
    if (row[i] != 1 || others != 1) return false;
  }
  return true;
}

template <class S>
Layer<S> prepare(const Tensor& left, const Tensor& right, bool has_offset) {
  const int64_t width = left.size(0), rank = left.size(1);
  Layer<S> layer;
  layer.plan = plan_for(width, rank, has_offset);
  layer.factors.width = width;
  layer.factors.rank = rank;
  if (layer.plan == Plan::kDense) {
    // In the factors' own type if that is wider.
    const ScalarType dtype = sizeof(S) == 8 ? ScalarType::Double : left.scalar_type();
    const Tensor l = computed(left, dtype), r = computed(right, dtype);
    const bool dense = rank == width && (dtype == ScalarType::Double ? is_identity<double>(r)
                                                                     : is_identity<float>(r));
    layer.left = computed(dense ? l : call("aten::mm", "", l, r), Type<S>::scalar);
    if (has_offset) layer.right = computed(right, Type<S>::scalar);
    return layer;
  }
  const Tensor l = computed(left, Type<S>::scalar), r = computed(right, Type<S>::scalar);
  if (layer.plan == Plan::kProducts) {
    layer.left = l;
    layer.right = r;
    return layer;
  }
  layer.left = torch::stable::empty({round_up(rank, kLanes) * width}, Type<S>::scalar);
  layer.right = torch::stable::empty({rank * round_up(width, kLanes)}, Type<S>::scalar);
  layer.factors.left = layer.left.template mutable_data_ptr<S>();
  layer.factors.right = layer.right.template mutable_data_ptr<S>();
  (kernels().*Type<S>::pack)(l.template const_data_ptr<S>(), r.template const_data_ptr<S>(),
                             layer.factors);
  return layer;
}

Kind kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Kind::kFloat;
    case ScalarType::Double: return Kind::kDouble;
    case ScalarType::BFloat16: return Kind::kBFloat16;
    case ScalarType::Half: return Kind::kHalf;
    default: STD_TORCH_CHECK(false, "weights: expected float32, bfloat16, float16 or float64");
  }
}

Rows rows_of(const Tensor& weight, int64_t start, int64_t count) {
  char* data = static_cast<char*>(weight.mutable_data_ptr());
  return {data + start * weight.stride(0) * weight.element_size(), kind_of(weight.scalar_type()),
          count, weight.stride(0), weight.stride(1)};
}

// out += part, which is contiguous. A product that accumulated onto `out` itself would round at its
// magnitude with every term: far more than the product, often small beside it, deserves.
template <class S>
void add(S* out, int64_t stride, const Tensor& part) {
  const S* in = part.const_data_ptr<S>();
  const int64_t rows = part.size(0), columns = part.size(1);
  for (int64_t r = 0; r < rows; ++r, out += stride, in += columns) {
    for (int64_t c = 0; c < columns; ++c) out[c] += in[c];
  }
}

// One block by torch's matrix product.
template <class S>
void multiply_block(Tensor weight, const Block& block, const Layer<S>& layer, Tensor* offset) {
  Tensor rows = torch::stable::narrow(weight, 0, block.start, block.rows);
  const bool in_place = rows.scalar_type() == Type<S>::scalar && rows.stride(1) == 1;
  const int64_t width = layer.factors.width;
  Tensor wide = rows;
  if (!in_place) wide = torch::stable::empty({block.rows, width}, Type<S>::scalar);
  const Rows raw = rows_of(weight, block.start, block.rows);
  if (!in_place) {
    (kernels().*Type<S>::load)(raw, width, wide.template mutable_data_ptr<S>(), width);
  }
  S* out = wide.template mutable_data_ptr<S>();
  const int64_t stride = wide.stride(0);
  Tensor part;
  if (offset != nullptr) part = torch::stable::narrow(*offset, 0, block.start, block.rows);
  if (layer.plan == Plan::kDense) {
    const Tensor product = call("aten::mm", "", wide, layer.left);
    if (offset != nullptr) {
      add(product.template mutable_data_ptr<S>(), width, call("aten::mm", "", part, layer.right));
    }
    add(out, stride, product);
  } else {
    const Tensor thin = call("aten::mm", "", wide, layer.left);
    if (offset != nullptr) add(thin.template mutable_data_ptr<S>(), layer.factors.rank, part);
    add(out, stride, call("aten::mm", "", thin, layer.right));
  }
  if (!in_place) {
    (kernels().*Type<S>::store)(wide.template const_data_ptr<S>(), width, width, raw);
  }
}

template <class S>
void update_all(const std::vector<Tensor>& weights, const std::vector<std::size_t>& chosen,
                const std::vector<Tensor>& left, const std::vector<Tensor>& right,
                const std::vector<Tensor>& offset) {
  if (chosen.empty()) return;
  const bool shared = left.size() == 1;
  std::vector<Layer<S>> layers;
  std::vector<Tensor> moves;
  std::vector<Block> blocks;
  int64_t scratch = 0;
  for (std::size_t i : chosen) {
    if (layers.empty() || !shared) {
      const std::size_t k = shared ? 0 : i;
      layers.push_back(prepare<S>(left[k], right[k], !offset.empty()));
      const Factors<S>& factors = layers.back().factors;
      scratch = std::max(scratch, update_scratch<S>(factors.width, factors.rank));
    }
    if (!offset.empty()) moves.push_back(computed(offset[i], Type<S>::scalar));
    const Layer<S>& layer = layers.back();
    if (layer.factors.width == 0 || layer.factors.rank == 0) continue;
    const int64_t step = layer.plan == Plan::kOwn ? kUpdateRows : kProductRows;
    for (int64_t start = 0; start < weights[i].size(0); start += step) {
      blocks.push_back({i, start, std::min(step, weights[i].size(0) - start)});
    }
  }
  std::vector<std::size_t> place(weights.size());
  for (std::size_t i = 0; i < chosen.size(); ++i) place[chosen[i]] = i;

  const int64_t count = static_cast<int64_t>(blocks.size());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Tensor memory = torch::stable::empty({scratch}, Type<S>::scalar);
    for (int64_t i = begin; i < end; ++i) {
      const Block& block = blocks[i];
      const Layer<S>& layer = layers[shared ? 0 : place[block.weight]];
      Tensor* move = offset.empty() ? nullptr : &moves[place[block.weight]];
      if (layer.plan != Plan::kOwn) {
        multiply_block<S>(weights[block.weight], block, layer, move);
        continue;
      }
      const S* here = move == nullptr ? nullptr : move->template const_data_ptr<S>() +
                                                      block.start * layer.factors.rank;
      (kernels().*Type<S>::update)(rows_of(weights[block.weight], block.start, block.rows),
                                   layer.factors, here, memory.template mutable_data_ptr<S>());
    }
  });
}

// Worker threads don't inherit "no gradient": they must not see a parameter that asks for one.
std::vector<Tensor> detached(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> plain;
  for (const Tensor& tensor : tensors) plain.push_back(call("aten::detach", "", tensor));
  return plain;
}

bool factor_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double;
}

void check(const std::vector<Tensor>& weights, const std::vector<Tensor>& left,
           const std::vector<Tensor>& right, const std::vector<Tensor>& offset) {
  STD_TORCH_CHECK((left.size() == 1 || left.size() == weights.size()) &&
                      right.size() == left.size() &&
                      (offset.empty() || offset.size() == weights.size()),
                  "left, right, offset: wrong number; call it through realera_fast.ops");
  for (std::size_t i = 0; i < left.size(); ++i) {
    check_matrix(left[i], "left", -1, -1);
    check_matrix(right[i], "right", left[i].size(1), left[i].size(0));
    STD_TORCH_CHECK(factor_type(left[i]) && left[i].scalar_type() == right[i].scalar_type(),
                    "left, right: expected float32 or float64, both the same");
  }
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const Tensor& thin = left[left.size() == 1 ? 0 : i];
    check_matrix(weights[i], "weights", -1, thin.size(0));
    kind_of(weights[i].scalar_type());
    if (offset.empty()) continue;
    check_matrix(offset[i], "offset", weights[i].size(0), thin.size(1));
    STD_TORCH_CHECK(factor_type(offset[i]), "offset: expected float32 or float64");
  }
}

void low_rank_update_(std::vector<Tensor> weights, std::vector<Tensor> left,
                      std::vector<Tensor> right, std::vector<Tensor> offset) {
  if (weights.empty()) return;
  check(weights, left, right, offset);
  weights = detached(weights);
  left = detached(left);
  right = detached(right);
  offset = detached(offset);
  std::vector<std::size_t> single, twice;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    (weights[i].scalar_type() == ScalarType::Double ? twice : single).push_back(i);
  }
  update_all<float>(weights, single, left, right, offset);
  update_all<double>(weights, twice, left, right, offset);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(realera_fast, CPU, m) {
  m.impl("low_rank_update_", TORCH_BOX(&low_rank_update_));
}

}  // namespace realera_fast
