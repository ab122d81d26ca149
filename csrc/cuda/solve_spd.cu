#include "launch.h"

#include "solve_spd.cuh"

namespace realera_fast {
namespace {

constexpr int64_t kMostSystems = 65535;  // blocks along y

// One system too large for shared memory, in torch's operations. The inverse of the factor makes
// all solves products: those are fast, and unlike triangular solves never need the host.
void compose(const Tensor& gram, const Tensor& rhs, Tensor solution, Tensor info,
             Tensor reciprocal, const Device& device) {
  const int64_t width = gram.size(0);
  // Not a structured binding: C++17 lets no lambda capture one.
  const auto factored = call_all<2>("aten::linalg_cholesky_ex", "", gram, false, false);
  const Tensor& lower = factored[0];
  const Tensor& status = factored[1];
  const Tensor ones = torch::stable::full({width}, 1.0, ScalarType::Double, std::nullopt,
                                          gram.device());
  const Tensor identity =
      call("aten::diag_embed", "", ones, int64_t{0}, int64_t{-2}, int64_t{-1});
  const Tensor inverse =
      call("aten::linalg_solve_triangular", "", lower, identity, false, true, false);
  Tensor base = inverse;
  const Tensor inverse_transposed = torch::stable::transpose(base, 0, 1);
  auto solve = [&](const Tensor& b) {
    return call("aten::mm", "", call("aten::mm", "", b, inverse_transposed), inverse);
  };
  const Tensor first = solve(rhs);
  const Tensor residual =
      torch::stable::subtract(rhs, call("aten::mm", "", first, gram), 1.0);
  torch::stable::copy_(solution, torch::stable::subtract(first, solve(residual), -1.0));
  torch::stable::copy_(info, status);

  const Tensor v = torch::stable::new_empty(gram, {width});
  const Tensor w = torch::stable::new_empty(gram, {width});
  const Tensor norm = torch::stable::new_empty(gram, {1});
  auto stage = [&](ConditionStage which, const Tensor& vector) {
    device.launch(condition_kernel, {1, 1, 1}, kSolveThreads, 0, static_cast<int>(which),
                  vector.mutable_data_ptr<double>(), norm.mutable_data_ptr<double>(),
                  static_cast<int>(width), status.const_data_ptr<int32_t>(),
                  reciprocal.mutable_data_ptr<double>());
  };
  auto solve_vector = [&] {
    call("aten::mv", "out", inverse, v, w);
    call("aten::mv", "out", inverse_transposed, w, v);
  };
  stage(kStart, v);
  solve_vector();
  stage(kFirst, v);
  for (int step = 0; step < kConditionSteps; ++step) {
    solve_vector();
    stage(kImage, v);
    solve_vector();
    stage(kSlope, v);
  }
  const std::array<int64_t, 1> rows{0};
  stage(kEnd, torch::stable::sum(call("aten::abs", "", gram),
                                 torch::headeronly::IntHeaderOnlyArrayRef(rows.data(), 1)));
}

std::tuple<Tensor, Tensor, Tensor> solve_spd(Tensor gram, Tensor rhs) {
  STD_TORCH_CHECK((gram.dim() == 2 || gram.dim() == 3) && rhs.dim() == gram.dim(),
                  "gram, rhs: wrong shape; call it through realera_fast.ops");
  const bool batched = gram.dim() == 3;
  const int64_t systems = batched ? gram.size(0) : 1;
  const int64_t width = gram.size(-1);
  const int64_t rows = rhs.size(-2);
  STD_TORCH_CHECK(gram.size(-2) == width && rhs.size(-1) == width &&
                      (!batched || rhs.size(0) == systems),
                  "gram, rhs: wrong shape; call it through realera_fast.ops");
  STD_TORCH_CHECK(
      gram.scalar_type() == ScalarType::Double && rhs.scalar_type() == ScalarType::Double,
      "gram, rhs: expected float64; call it through realera_fast.ops");
  const Device device(gram);
  gram = torch::stable::contiguous(gram);
  rhs = torch::stable::contiguous(rhs);
  std::vector<int64_t> batch;
  if (batched) batch.push_back(systems);
  if (systems == 0 || width == 0) {
    return {torch::stable::clone(rhs), torch::stable::new_zeros(gram, batch, ScalarType::Int),
            torch::stable::full(batch, 1.0, ScalarType::Double, std::nullopt, gram.device())};
  }
  Tensor solution = torch::stable::empty_like(rhs);
  Tensor info = torch::stable::new_empty(gram, batch, ScalarType::Int);
  Tensor reciprocal = torch::stable::new_empty(gram, batch, ScalarType::Double);

  if (width > std::numeric_limits<int16_t>::max() || solve_bytes(width) > device.shared_memory()) {
    auto part = [batched](const Tensor& tensor, int64_t i) {
      return batched ? torch::stable::select(tensor, 0, i) : tensor;
    };
    for (int64_t i = 0; i < systems; ++i) {
      compose(part(gram, i), part(rhs, i), part(solution, i), part(info, i), part(reciprocal, i),
              device);
    }
    return {solution, info, reciprocal};
  }

  // As many blocks as the GPU holds at once: one more wave would repeat the factorisations.
  const int64_t tiles = (rows + kSolveRows - 1) / kSolveRows;
  const int64_t share = std::max<int64_t>(1, device.multiprocessors() / systems - 1);
  const int64_t rows_per_block =
      kSolveRows * std::max<int64_t>(1, (tiles + share - 1) / share);
  const int64_t chunks = (rows + rows_per_block - 1) / rows_per_block;
  for (int64_t first = 0; first < systems; first += kMostSystems) {
    const int64_t count = std::min(kMostSystems, systems - first);
    const dim3 grid{static_cast<unsigned>(chunks + 1), static_cast<unsigned>(count), 1};
    device.launch(solve_kernel, grid, kSolveThreads, solve_bytes(width),
                  gram.const_data_ptr<double>() + first * width * width,
                  rhs.const_data_ptr<double>() + first * rows * width,
                  solution.mutable_data_ptr<double>() + first * rows * width,
                  info.mutable_data_ptr<int32_t>() + first,
                  reciprocal.mutable_data_ptr<double>() + first, static_cast<int>(width), rows,
                  rows_per_block);
  }
  return {solution, info, reciprocal};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(realera_fast, CUDA, m) {
  m.impl("solve_spd", TORCH_BOX(&solve_spd));
}

}  // namespace realera_fast
