// The K×K problems on the device: one warp or block each, on the mathematics of csrc/core.
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

// A warp waits for itself at no cost, and is enough for few tasks; factorising a large matrix is worth a block.
constexpr int kMostForAWarp = 16;
constexpr int kBlockThreads = 256;

// One copy of each solver, for teams of any width and memory of either kind: with a copy for each, nvcc takes minutes.
template <class Solver>
__global__ void __launch_bounds__(kBlockThreads, 1)
    solve_problem(Problem problem, const Options options, int size, double* weights, std::int32_t* status, double* workspace) {
  __shared__ double shared[kSharedDoubles];
  problem.options = options.values;
  const BlockTeam team(threadIdx.x, blockDim.x);
  const std::int32_t bits = igb::detail::run<Solver>(problem, weights, size <= kSharedDoubles ? shared : workspace, team);
  if (threadIdx.x == 0) *status = bits;
}

constexpr int kMostLosses = 1024;

__device__ double read(DType dtype, const void* values, int i) {
  switch (dtype) {
    case DType::f32: return widen(static_cast<const float*>(values)[i]);
    case DType::f64: return static_cast<const double*>(values)[i];
    case DType::bf16: return widen(static_cast<const __nv_bfloat16*>(values)[i]);
    case DType::f16: break;
  }
  return widen(static_cast<const __half*>(values)[i]);
}

__device__ void write(DType dtype, void* values, int i, double value) {
  switch (dtype) {
    case DType::f32: static_cast<float*>(values)[i] = narrow<float>(float(value)); return;
    case DType::f64: static_cast<double*>(values)[i] = value; return;
    case DType::bf16: static_cast<__nv_bfloat16*>(values)[i] = narrow<__nv_bfloat16>(float(value)); return;
    case DType::f16: static_cast<__half*>(values)[i] = narrow<__half>(float(value)); return;
  }
}

__global__ void __launch_bounds__(32)
    scale_losses(LossRule rule, LossProblem problem, DType dtype, const void* losses, const Options options, void* scales,
                 std::int32_t* status) {
  __shared__ double values[kMostLosses], results[kMostLosses];
  const int tasks = problem.tasks;
  const WarpTeam team(threadIdx.x);
  problem.losses = values;
  problem.options = options.values;
  for (int i = threadIdx.x; i < tasks; i += 32) values[i] = read(dtype, losses, i);
  team.sync();
  const std::int32_t bits = igb::loss_scales(rule, problem, results, team);
  for (int i = threadIdx.x; i < tasks; i += 32) write(dtype, scales, i, results[i]);
  if (threadIdx.x == 0) *status = bits;
}

}  // namespace

void solve(Method method, const Problem& problem, double* weights, std::int32_t* status, double* workspace,
           Stream stream) {
  const Options options(problem.options, option_count(method));
  const int size = workspace_size(method, problem.tasks);
  igb::detail::select(method, [&](auto solver) {
    const int threads = problem.tasks <= kMostForAWarp ? 32 : kBlockThreads;
    IGB_LAUNCH(solve_problem<decltype(solver)>, 1, threads, stream, problem, options, size, weights, status, workspace);
    return 0;
  });
}

void loss_scales(LossRule rule, int tasks, DType dtype, const void* losses, const double* per_task,
                 const double* options, double* state, void* scales, std::int32_t* status, Stream stream) {
  if (tasks > kMostLosses)
    throw std::runtime_error("loss balancing on the GPU takes at most 1024 tasks, found " + std::to_string(tasks));
  const Options by_value(options, option_count(rule));
  const LossProblem problem{tasks, nullptr, per_task, nullptr, state};
  IGB_LAUNCH(scale_losses, 1, 32, stream, rule, problem, dtype, losses, by_value, scales, status);
}

}  // namespace igb::cuda
