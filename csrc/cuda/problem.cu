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

template <int Threads> __device__ auto make_team() {
  if constexpr (Threads == 32) return WarpTeam(threadIdx.x);
  else return BlockTeam(threadIdx.x, Threads);
}

template <class Solver, int Threads>
__global__ void __launch_bounds__(Threads, 1)
    solve_problem(Problem problem, const Options options, int size, double* weights, std::int32_t* status, double* workspace) {
  __shared__ double shared[kSharedDoubles];
  problem.options = options.values;
  const auto team = make_team<Threads>();
  // Two calls, so that the compiler knows which memory it is.
  const std::int32_t bits = size <= kSharedDoubles ? igb::detail::run<Solver>(problem, weights, shared, team)
                                                   : igb::detail::run<Solver>(problem, weights, workspace, team);
  if (threadIdx.x == 0) *status = bits;
}

constexpr int kMostLosses = 1024;

template <class T>
__global__ void __launch_bounds__(32) scale_losses(LossRule rule, LossProblem problem, const T* losses,
                                                   const Options options, T* scales, std::int32_t* status) {
  __shared__ double values[kMostLosses], results[kMostLosses];
  const int tasks = problem.tasks;
  const WarpTeam team(threadIdx.x);
  problem.losses = values;
  problem.options = options.values;
  for (int i = threadIdx.x; i < tasks; i += 32) values[i] = double(widen(losses[i]));
  team.sync();
  const std::int32_t bits = igb::loss_scales(rule, problem, results, team);
  for (int i = threadIdx.x; i < tasks; i += 32) scales[i] = narrow<T>(Accumulator<T>(results[i]));
  if (threadIdx.x == 0) *status = bits;
}

}  // namespace

void solve(Method method, const Problem& problem, double* weights, std::int32_t* status, double* workspace,
           Stream stream) {
  const Options options(problem.options, option_count(method));
  const int size = workspace_size(method, problem.tasks);
  igb::detail::select(method, [&](auto solver) {
    const auto run = [&](auto kernel, int threads) {
      IGB_LAUNCH(kernel, 1, threads, stream, problem, options, size, weights, status, workspace);
    };
    if (problem.tasks <= kMostForAWarp) run(solve_problem<decltype(solver), 32>, 32);
    else run(solve_problem<decltype(solver), kBlockThreads>, kBlockThreads);
    return 0;
  });
}

void loss_scales(LossRule rule, int tasks, DType dtype, const void* losses, const double* per_task,
                 const double* options, double* state, void* scales, std::int32_t* status, Stream stream) {
  if (tasks > kMostLosses)
    throw std::runtime_error("loss balancing on the GPU takes at most 1024 tasks, found " + std::to_string(tasks));
  const Options by_value(options, option_count(rule));
  const LossProblem problem{tasks, nullptr, per_task, nullptr, state};
  with_type(dtype, [&](auto tag) {
    using T = Element<decltype(tag)>;
    IGB_LAUNCH(scale_losses<T>, 1, 32, stream, rule, problem, static_cast<const T*>(losses), by_value,
               static_cast<T*>(scales), status);
  });
}

}  // namespace igb::cuda
