// EMTL, our formulation of equitable multi-task learning (idea: Yuan & Zhang, 2023, arXiv:2306.09373, which defines the
// relative contribution r_k = L_k / |g_k| and regularises its variance):
//   w_k = m (1 + lambda (r_k / mean(r) - 1)) / |g_k|,
// the gradient of mean(r) + lambda/2 Var(r)/mean(r) with norms and mean(r) held fixed, times K. Tasks without a gradient
// are left out of both means. For lambda <= 1 no weight is negative; beyond, negative ones are cut and the rest rescaled,
// so that sum_k w_k |g_k| stays (number of active tasks) * m.
#pragma once

#include "../gramian.h"

namespace igb {

struct Emtl {
  enum Option { lambda, scale, option_count };
  enum Scale { mean_norm = 0, largest_norm = 1, unit = 2 };  // what m is
  static constexpr bool needs_gram = false;
  static constexpr bool needs_losses = true;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static constexpr int workspace_size(int) { return 0; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms& norms, double* weights, double*,
                                   const Team& team) {
    const int tasks = problem.tasks;
    if (norms.active == 0) {
      fill(tasks, weights, 1.0, team);
      return 0;
    }
    double norm_sum = 0.0, contribution_sum = 0.0;
    for (int i = 0; i < tasks; ++i)
      if (norms.is_active(i)) {
        norm_sum += norms.values[i] / norms.largest;
        contribution_sum += contribution(problem, norms, i);
      }
    const double mean_contribution = contribution_sum / norms.active;

    // u_k = w_k |g_k| / m, first without the cut's rescaling.
    for (int i = team.lane(); i < tasks; i += team.width()) {
      const double rho = mean_contribution > 0.0 ? contribution(problem, norms, i) / mean_contribution : 1.0;
      weights[i] = norms.is_active(i) ? fmax(0.0, 1.0 + problem.options[lambda] * (rho - 1.0)) : 0.0;
    }
    team.sync();
    double total = 0.0;
    for (int i = 0; i < tasks; ++i) total += weights[i];
    team.sync();

    const int choice = static_cast<int>(problem.options[scale]);
    const double length = choice == mean_norm      ? norm_sum / norms.active  // m in units of the largest norm
                          : choice == largest_norm ? 1.0
                                                   : 1.0 / norms.largest;
    const double rescale = problem.options[lambda] > 1.0 ? norms.active / total : 1.0;
    for (int i = team.lane(); i < tasks; i += team.width())
      if (norms.is_active(i)) weights[i] *= rescale * length * (norms.largest / norms.values[i]);
    team.sync();
    return 0;
  }

 private:
  // r_i in units of 1 / largest norm, which keeps it in range; a loss below its lower bound contributes nothing.
  IGB_HD static double contribution(const Problem& problem, const Norms& norms, int i) {
    return norms.is_active(i) ? fmax(problem.losses[i], 0.0) * (norms.largest / norms.values[i]) : 0.0;
  }
};

}  // namespace igb
