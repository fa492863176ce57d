// FairGrad, alpha-fair weights (Ban & Ji, ICML 2024, eq. 4-5): G w = w^(-1/alpha), w > 0, the minimiser of
// 1/2 w'Gw + sum psi(w), psi' = -w^-p, p = 1/alpha. alpha = 1 is Nash-MTL; as alpha goes to 0 the weights go to 1, and
// without end to those of equal products g_k . d = 1. With norms n and w_k = n_k^(-2 alpha / (1 + alpha)) x_k it is
// newton.h's equation for t = n w and r = n^((1 - alpha) / (1 + alpha)): orthogonal gradients have x = 1.
#pragma once

#include "../newton.h"

namespace igb {

struct FairGrad {
  enum Option { alpha, max_norm, option_count };  // max_norm 0: no clipping
  static constexpr bool needs_gram = true;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static constexpr int workspace_size(int tasks) { return tasks * tasks + 8 * tasks; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms& norms, double* weights, double* workspace,
                                   const Team& team) {
    const int tasks = problem.tasks;
    if (norms.active == 0) {
      fill(tasks, weights, 1.0, team);
      return 0;
    }
    double* matrix = workspace;
    double* x = matrix + tasks * tasks;
    double* lengths = x + tasks;
    double* fit = lengths + 2 * tasks;
    double* scales = fit + 4 * tasks;
    store_cosines(problem, norms, matrix, team);

    const double fairness = problem.options[alpha];
    std::int32_t status = 0;
    if (fairness > 0.0) {
      const double degree = (1.0 - fairness) / (1.0 + fairness);
      for (int i = team.lane(); i < tasks; i += team.width())  // x is the same for multiples of r
        scales[i] = norms.is_active(i) ? pow(norms.values[i] / norms.largest, degree) : 1.0;
      team.sync();
      const NewtonBuffers buffers{matrix, x,           lengths,         lengths + tasks,
                                  fit,    fit + tasks, fit + 2 * tasks, fit + 3 * tasks};
      status = Newton<PowerTerms, Team>(tasks, norms, PowerTerms(1.0 / fairness, scales), buffers, team).solve();
      const double common = pow(norms.largest, degree);
      for (int i = team.lane(); i < tasks; i += team.width()) lengths[i] = common * scales[i] * x[i];
    } else {
      for (int i = team.lane(); i < tasks; i += team.width()) lengths[i] = norms.values[i];
    }
    team.sync();
    const double factor = clip_factor(tasks, problem.options[max_norm], matrix, lengths, fit, team);
    for (int i = team.lane(); i < tasks; i += team.width())
      weights[i] = norms.is_active(i) ? factor * (lengths[i] / norms.values[i]) : 0.0;
    team.sync();
    return status;
  }
};

}  // namespace igb
