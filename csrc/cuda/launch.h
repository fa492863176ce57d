// Launching kernels, and errors that say where.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace igb::cuda {

inline void check(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ") at " + file +
                           ":" + std::to_string(line) + ": " + call);
}
#define IGB_CUDA_CHECK(...) ::igb::cuda::check((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

// IGB_LAUNCH(kernel, grid, threads, stream, arguments...)
#define IGB_LAUNCH(kernel, grid, threads, stream, ...)                                                            \
  ::igb::cuda::check(::igb::cuda::launch(grid, threads, stream, kernel, __VA_ARGS__), #kernel, __FILE__, __LINE__)

template <class... Parameters, class... Arguments>
cudaError_t launch(dim3 grid, unsigned threads, cudaStream_t stream, void (*kernel)(Parameters...),
                   Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

inline int multiprocessors() {
  int device = 0, count = 0;
  IGB_CUDA_CHECK(cudaGetDevice(&device));
  IGB_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace igb::cuda
