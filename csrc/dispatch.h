// What the native operations share: calls back into torch's dispatcher, and checks.
//
// Only the stable ABI is used (torch 2.10 and later), so one library serves every later torch.
// BLAS and LAPACK are reached through the dispatcher: the same library, the same speed and the same
// thread pool as in PyTorch, without headers or a link line of our own.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <vector>

namespace realera_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls an aten operator that returns `Returns` tensors. All arguments of its schema must be given.
template <std::size_t Returns = 1, class... Args>
std::array<Tensor, Returns> call_all(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, std::max(sizeof...(Args), Returns)> stack{
      torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, Returns> results;
  for (std::size_t i = 0; i < Returns; ++i) {
    results[i] = torch::stable::detail::to<Tensor>(stack[i]);
  }
  return results;
}

template <class... Args>
Tensor call(const char* name, const char* overload, const Args&... args) {
  return call_all<1>(name, overload, args...)[0];
}

// The dispatcher reports an error below it without its text: whatever could fail is checked first.
inline void check_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && (rows < 0 || tensor.size(0) == rows) &&
                      (columns < 0 || tensor.size(1) == columns),
                  name, ": wrong shape; call it through realera_fast.ops");
}

inline void check_double(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous(), name,
                  ": expected a contiguous float64 tensor; call it through realera_fast.ops");
}

}  // namespace realera_fast
