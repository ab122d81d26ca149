// W += (W left) right for many weights in one call. Each block of rows is read once, converted to
// float32 (float64 for float64 weights), updated while it is in the cache, and rounded back once.

#include "dispatch.h"

namespace realera_fast {
namespace {

constexpr int64_t kRows = 128;  // rows of a block: 128 x 768 float32 is 384 kB, within an L2 cache

struct Block {
  std::size_t weight;
  int64_t start;
  int64_t rows;
};

// wide += update, both contiguous.
template <class T>
void add(const Tensor& wide, const Tensor& update) {
  T* out = wide.mutable_data_ptr<T>();
  const T* in = update.const_data_ptr<T>();
  const int64_t elements = wide.numel();
  for (int64_t i = 0; i < elements; ++i) out[i] += in[i];
}

// One thread's memory for blocks of one dtype.
struct Scratch {
  Tensor wide, thin, update;
  Scratch(ScalarType dtype, int64_t width, int64_t rank)
      : wide(torch::stable::empty({kRows, width}, dtype)),
        thin(torch::stable::empty({kRows, rank}, dtype)),
        update(torch::stable::empty({kRows, width}, dtype)) {}
};

template <class T>
void update_block(Tensor rows, ScalarType dtype, const Tensor& left, const Tensor& right,
                  Scratch& scratch) {
  const int64_t height = rows.size(0);
  const bool in_place = rows.scalar_type() == dtype && rows.is_contiguous();
  Tensor wide = in_place ? rows : torch::stable::narrow(scratch.wide, 0, 0, height);
  if (!in_place) torch::stable::copy_(wide, rows);
  Tensor thin = torch::stable::narrow(scratch.thin, 0, 0, height);
  Tensor update = torch::stable::narrow(scratch.update, 0, 0, height);
  mm_out(thin, wide, left);
  mm_out(update, thin, right);
  add<T>(wide, update);
  if (!in_place) torch::stable::copy_(rows, wide);
}

template <class T>
void update_all(std::vector<Tensor>& weights, ScalarType dtype, const Tensor& left,
                const Tensor& right) {
  std::vector<Block> blocks;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    for (int64_t start = 0; start < weights[i].size(0); start += kRows) {
      blocks.push_back({i, start, std::min(kRows, weights[i].size(0) - start)});
    }
  }
  if (blocks.empty()) return;
  const Tensor l = torch::stable::contiguous(torch::stable::to(left, dtype));
  const Tensor r = torch::stable::contiguous(torch::stable::to(right, dtype));
  const int64_t count = static_cast<int64_t>(blocks.size());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(dtype, l.size(0), l.size(1));
    for (int64_t i = begin; i < end; ++i) {
      const Block& block = blocks[i];
      Tensor weight = weights[block.weight];
      update_block<T>(torch::stable::narrow(weight, 0, block.start, block.rows), dtype, l, r,
                      scratch);
    }
  });
}

void low_rank_update_(std::vector<Tensor> weights, std::vector<Tensor> left,
                      std::vector<Tensor> right, std::vector<Tensor> offset) {
  STD_TORCH_CHECK(left.size() == 1 && right.size() == 1 && offset.empty(), "not yet");
  check_matrix(left[0], "left", -1, -1);
  const int64_t width = left[0].size(0);
  check_matrix(right[0], "right", left[0].size(1), width);
  if (width == 0 || left[0].size(1) == 0) return;
  std::vector<Tensor> single, twice;
  for (const Tensor& weight : weights) {
    check_matrix(weight, "weights", -1, width);
    // Worker threads don't inherit "no gradient": they must not see a parameter that asks for one.
    Tensor plain = call("aten::detach", "", weight);
    (weight.scalar_type() == ScalarType::Double ? twice : single).push_back(plain);
  }
  const Tensor l = call("aten::detach", "", left[0]);
  const Tensor r = call("aten::detach", "", right[0]);
  update_all<float>(single, ScalarType::Float, l, r);
  update_all<double>(twice, ScalarType::Double, l, r);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(realera_fast, CPU, m) {
  m.impl("low_rank_update_", TORCH_BOX(&low_rank_update_));
}

}  // namespace realera_fast
