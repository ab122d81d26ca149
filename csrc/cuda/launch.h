// What the CUDA operations share on the host: torch's device and stream, launches, and errors.

#pragma once

// A torch without CUDA lacks these. Weak, they let it load the library all the same; nothing calls
// them there, as no tensor is on a GPU. Must come before the headers that declare them.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

#include "../dispatch.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

#include <limits>
#include <string>

namespace realera_fast {

// The device and the current stream of a tensor, until the end of the scope.
class Device {
 public:
  explicit Device(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(tensor.get_device_index()) {
    // The guard sets the device in torch's copy of the CUDA runtime; this library has its own.
    STD_CUDA_CHECK(cudaSetDevice(index_));
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index_));
    return value;
  }

  int64_t shared_memory() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  int64_t multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes,
              const Arguments&... arguments) const {
    const int bytes = static_cast<int>(shared_bytes);
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<grid, threads, bytes, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace realera_fast
