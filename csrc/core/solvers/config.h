// ConFIG, conflict-free gradients (Liu et al., 2024, eq. 2-4): the direction x whose products with the unit gradients are
// the preferences p, x = pinv(U) p, as long as the projections of all gradients on it together. With cosines C and norms n
//   v = pinv(C) p,  x = U'v,  |x|^2 = v'Cv,  w_k = (n'Cv / v'Cv) v_k / n_k.
// Where C is singular and nothing of p is in its range, the gradients are opposed: weights 0. per_task is p, ones where
// there is none.
#pragma once

#include "../factor.h"

namespace igb {

struct Config {
  enum Option { option_count };
  static constexpr bool needs_gram = true;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int tasks) { return tasks; }
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static constexpr int workspace_size(int tasks) { return factor_size(tasks) + 2 * tasks; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms& norms, double* weights, double* workspace,
                                   const Team& team) {
    const int tasks = problem.tasks;
    if (norms.active == 0) {
      fill(tasks, weights, 1.0, team);
      return 0;
    }
    double* reached = workspace + factor_size(tasks);  // by position: Cv, the part of p in the range of C
    double* v = reached + tasks;

    const CosineFactor factor = factor_cosines(problem, norms, nullptr, workspace, team);
    const int rank = factor.rank;
    for (int k = team.lane(); k < tasks; k += team.width()) reached[k] = preference(problem, norms, factor.task(k));
    team.sync();
    fold(tasks, factor, reached, team);
    const bool opposed = leave_range(tasks, rank, reached, team);
    for (int k = team.lane(); k < tasks; k += team.width()) v[k] = reached[k];
    team.sync();
    solve_products(tasks, factor, v, team);
    solve_basis(tasks, factor, v, team);

    double square = 0.0;
    for (int k = 0; k < rank; ++k) square += v[k] * reached[k];
    team.sync();
    unfold(tasks, factor, reached, team);
    unfold(tasks, factor, v, team);
    double projections = 0.0;  // in units of the largest norm
    for (int k = 0; k < tasks; ++k) projections += norms.values[factor.task(k)] / norms.largest * reached[k];
    for (int k = team.lane(); k < tasks; k += team.width()) {
      const int task = factor.task(k);
      weights[task] =
          opposed || !norms.is_active(task) ? 0.0 : projections / square * v[k] * (norms.largest / norms.values[task]);
    }
    team.sync();
    return rank < norms.active ? pareto_stationary : 0;
  }

 private:
  IGB_HD static double preference(const Problem& problem, const Norms& norms, int task) {
    return !norms.is_active(task) ? 0.0 : problem.per_task == nullptr ? 1.0 : problem.per_task[task];
  }

  // Clears what of the folded p is outside of the range; true if what is inside is no more than rounding.
  template <class Team>
  IGB_HD static bool leave_range(int tasks, int rank, double* folded, const Team& team) {
    double inside = 0.0, outside = 0.0;
    for (int k = 0; k < tasks; ++k) (k < rank ? inside : outside) += folded[k] * folded[k];
    team.sync();
    for (int k = rank + team.lane(); k < tasks; k += team.width()) folded[k] = 0.0;
    team.sync();
    return !(sqrt(inside) > 16.0 * tasks * machine_epsilon * sqrt(inside + outside));
  }
};

}  // namespace igb
