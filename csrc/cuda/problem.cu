// The K×K problems on the device: one warp each, on the mathematics of csrc/core.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "device.cuh"
#include "launch.h"
#include "multi_tensor.h"

namespace igb::cuda {
namespace {

struct Options {
  static constexpr int kMost = 8;
  double values[kMost] = {};
  Options(const double* given, int count) {
    for (int i = 0; i < count; ++i) values[i] = given[i];
  }
};

constexpr int kSharedDoubles = 5888;  // 46 KiB: Nash-MTL to 74 tasks, most methods further

template <class Solver>
__global__ void __launch_bounds__(32)
    solve_problem(Problem problem, const Options options, int size, double* weights, std::int32_t* status, double* workspace) {
  __shared__ double shared[kSharedDoubles];
  problem.options = options.values;
  const WarpTeam team(threadIdx.x);
  const std::int32_t bits =
      igb::detail::run<Solver>(problem, weights, size <= kSharedDoubles ? shared : workspace, team);
  if (threadIdx.x == 0) *status = bits;
}

constexpr int kMostLosses = 1024;

template <class T>
__global__ void __launch_bounds__(32) scale_losses(LossRule rule, int tasks, const T* losses, const double* per_task,
                                                   const Options options, T* scales, std::int32_t* status) {
  __shared__ double values[kMostLosses], results[kMostLosses];
  const WarpTeam team(threadIdx.x);
  for (int i = threadIdx.x; i < tasks; i += 32) values[i] = double(widen(losses[i]));
  team.sync();
  const std::int32_t bits = igb::loss_scales(rule, tasks, values, per_task, options.values, results, team);
  for (int i = threadIdx.x; i < tasks; i += 32) scales[i] = narrow<T>(Accumulator<T>(results[i]));
  if (threadIdx.x == 0) *status = bits;
}

}  // namespace

void solve(Method method, const Problem& problem, double* weights, std::int32_t* status, double* workspace,
           Stream stream) {
  const Options options(problem.options, option_count(method));
  const int size = workspace_size(method, problem.tasks);
  igb::detail::select(method, [&](auto solver) {
    IGB_LAUNCH(solve_problem<decltype(solver)>, 1, 32, stream, problem, options, size, weights, status, workspace);
    return 0;
  });
}

void loss_scales(LossRule rule, int tasks, DType dtype, const void* losses, const double* per_task,
                 const double* options, void* scales, std::int32_t* status, Stream stream) {
  if (tasks > kMostLosses)
    throw std::runtime_error("loss balancing on the GPU takes at most 1024 tasks, found " + std::to_string(tasks));
  const Options by_value(options, option_count(rule));
  with_type(dtype, [&](auto tag) {
    using T = Element<decltype(tag)>;
    IGB_LAUNCH(scale_losses<T>, 1, 32, stream, rule, tasks, static_cast<const T*>(losses), per_task, by_value,
               static_cast<T*>(scales), status);
  });
}

}  // namespace igb::cuda
