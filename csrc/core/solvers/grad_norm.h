// GradNorm (Chen et al., ICML 2018, eq. 1-2): learned weights under which the norms w_k n_k follow the tasks' rates of
// training. They minimise
//   sum_k |w_k n_k - T_k|,  T_k = mean(w n) r_k^alpha held fixed,  r_k = (L_k / L_k(0)) / mean(L / L(0)),
// over p with w = K softmax(p), or over w = p itself (direct). The gradient of p is left in the state; where a norm is at
// its target to rounding, the subgradient 0. A task with L(0) <= 0 has no rate: r = 1, left out of the mean.
// L(0) is each task's loss in its first step, or, with wait, the mean over its steps until the caller sets `known`; a
// task before that has no rate, and while no task has one w = 1 and p rests.
#pragma once

#include "../gramian.h"
#include "../rules/common.h"

namespace igb {

struct GradNorm {
  enum Option { alpha, direct, wait, option_count };
  enum Row { known, steps, sums, gradients, row_count };  // of the state, K each: L(0) = sums / steps; gradients of p
  static constexpr bool needs_gram = false;
  static constexpr bool needs_losses = true;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int tasks) { return tasks; }  // p
  IGB_HD static constexpr int state_size(int tasks) { return row_count * tasks; }
  IGB_HD static constexpr int workspace_size(int tasks) { return 2 * tasks; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms& norms, double* weights, double* workspace,
                                   const Team& team) {
    const int tasks = problem.tasks;
    if (!all_finite(tasks, problem.per_task)) {
      fill(tasks, weights, NAN, team);
      return non_finite;
    }
    double* gradient = problem.state + gradients * tasks;
    const bool has_initial = record_initial(problem, team);
    if (norms.active == 0 || !has_initial) {
      for (int i = team.lane(); i < tasks; i += team.width()) {
        weights[i] = norms.active == 0 || norms.is_active(i) ? 1.0 : 0.0;
        gradient[i] = 0.0;
      }
      team.sync();
      return 0;
    }

    for (int i = team.lane(); i < tasks; i += team.width()) weights[i] = problem.per_task[i];
    team.sync();
    const bool is_softmax = problem.options[direct] == 0.0;
    if (is_softmax) softmax(tasks, weights, tasks, team);
    const double* pulls = workspace + tasks;
    measure_pulls(problem, norms, weights, workspace, workspace + tasks, team);
    double common = 0.0;  // the softmax's normalisation
    if (is_softmax)
      for (int i = 0; i < tasks; ++i) common += weights[i] * pulls[i] / tasks;
    team.sync();
    for (int i = team.lane(); i < tasks; i += team.width()) {
      gradient[i] = is_softmax ? weights[i] * (pulls[i] - common) : pulls[i];
      if (!norms.is_active(i)) weights[i] = 0.0;
    }
    team.sync();
    return 0;
  }

 private:
  static constexpr double largest_ratio = 1e300;  // of a loss to L(0)

  // Whether L(0) is known of some task.
  template <class Team>
  IGB_HD static bool record_initial(const Problem& problem, const Team& team) {
    const int tasks = problem.tasks;
    double *is_known = problem.state + known * tasks, *counts = problem.state + steps * tasks;
    double* losses = problem.state + sums * tasks;
    for (int i = team.lane(); i < tasks; i += team.width()) {
      if (is_known[i] != 0.0) continue;
      losses[i] += problem.losses[i];
      counts[i] += 1.0;
      if (problem.options[wait] == 0.0) is_known[i] = 1.0;
    }
    team.sync();
    bool any = false;
    for (int i = 0; i < tasks; ++i) any = any || is_known[i] != 0.0;
    return any;
  }

  // The derivative of the objective in each w_k: n_k, 0 or -n_k. Tasks without gradient take no part.
  template <class Team>
  IGB_HD static void measure_pulls(const Problem& problem, const Norms& norms, const double* weights, double* ratios,
                                   double* pulls, const Team& team) {
    const int tasks = problem.tasks;
    const double* state = problem.state;
    for (int i = team.lane(); i < tasks; i += team.width()) {
      const double initial = state[sums * tasks + i] / state[steps * tasks + i];
      const bool has_rate = norms.is_active(i) && state[known * tasks + i] != 0.0 && initial > 0.0;
      ratios[i] = has_rate ? fmin(fmax(problem.losses[i], 0.0) / initial, largest_ratio) : -1.0;
    }
    team.sync();
    double ratio_sum = 0.0, norm_sum = 0.0;
    int rates = 0;
    for (int i = 0; i < tasks; ++i) {
      norm_sum += weights[i] * norms.values[i];
      if (ratios[i] < 0.0) continue;
      ratio_sum += ratios[i];
      ++rates;
    }
    const double mean_norm = norm_sum / norms.active, rounding = 4.0 * (tasks + 2) * machine_epsilon;
    for (int i = team.lane(); i < tasks; i += team.width()) {
      const double rate = ratios[i] >= 0.0 && ratio_sum > 0.0 ? ratios[i] / ratio_sum * rates : 1.0;
      const double norm = weights[i] * norms.values[i], target = mean_norm * pow(rate, problem.options[alpha]);
      const bool apart = fabs(norm - target) > rounding * fmax(fabs(norm), fabs(target));
      pulls[i] = !apart ? 0.0 : norm > target ? norms.values[i] : -norms.values[i];
    }
    team.sync();
  }
};

}  // namespace igb
