// Nash-MTL, the bargaining solution (Navon et al., ICML 2022, eq. 2 and claim 3.2): G alpha = 1 / alpha, alpha > 0, the
// minimiser of the strictly convex  1/2 a'Ga - sum log a.  With norms n and cosines C, x = n alpha solves
//   x_k (C x)_k = 1,
// which is newton.h's equation for p = 1 and r = 1.
#pragma once

#include "../newton.h"

namespace igb {

struct NashMtl {
  enum Option { max_norm, hold, option_count };  // max_norm 0: no clipping; hold: weights from the state, no solve
  // The state is alpha of the last solve, before clipping; initially ones.
  static constexpr bool needs_gram = true;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int tasks) { return tasks; }
  IGB_HD static constexpr int workspace_size(int tasks) { return tasks * tasks + 4 * tasks; }

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
    double* fit = x + tasks;
    double* rounding = fit + tasks;
    store_cosines(problem, norms, matrix, team);

    double* alpha = problem.state;
    std::int32_t status = 0;
    if (problem.options[hold] == 0.0) {
      const NewtonBuffers buffers{matrix, x, x, x, fit, rounding, rounding + tasks, nullptr};
      status = Newton<LogTerms, Team>(tasks, norms, LogTerms{}, buffers, team).solve();
      for (int i = team.lane(); i < tasks; i += team.width())
        alpha[i] = norms.is_active(i) ? x[i] / norms.values[i] : 0.0;
    } else {
      for (int i = team.lane(); i < tasks; i += team.width()) x[i] = norms.values[i] * alpha[i];
    }
    team.sync();
    const double factor = clip_factor(tasks, problem.options[max_norm], matrix, x, fit, team);
    for (int i = team.lane(); i < tasks; i += team.width()) weights[i] = norms.is_active(i) ? factor * alpha[i] : 0.0;
    team.sync();
    return status;
  }
};

}  // namespace igb
