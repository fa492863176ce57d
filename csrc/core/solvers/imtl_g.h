// IMTL-G, impartial gradients (Liu et al., ICLR 2021, eq. 5-6): weights of sum 1 whose update has the same projection on
// every unit gradient u_k = g_k / n_k. With C the matrix of cosines and D = diag(n) that is
//   v = D^-1 C^-1 1,  w = v / sum(v),  u_k . d = 1 / sum(v).
// sum(v) may be negative for K >= 3, and then d ascends every task; descent_safe divides by |sum(v)| instead.
// A singular C gets a ridge: the limit of nearly parallel gradients.
#pragma once

#include "../gramian.h"

namespace igb {

struct ImtlG {
  enum Option { descent_safe, option_count };
  static constexpr bool needs_gram = true;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static constexpr int workspace_size(int tasks) { return tasks * tasks + 2 * tasks; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms& norms, double* weights, double* workspace,
                                   const Team& team) {
    const int tasks = problem.tasks;
    if (norms.active == 0) {
      fill(tasks, weights, 1.0 / tasks, team);
      return 0;
    }
    double* matrix = workspace;
    double* solution = matrix + tasks * tasks;
    double* residual = solution + tasks;

    store_cosines(problem, norms, matrix, team);
    const double ridge = factorize_with_ridge(tasks, matrix, team);
    for (int i = team.lane(); i < tasks; i += team.width()) solution[i] = 0.0;
    for (int round = 0; round < 3; ++round) {  // the solve and two refinements, which also remove a ridge's bias
      team.sync();
      for (int i = team.lane(); i < tasks; i += team.width())
        residual[i] = norms.is_active(i) ? 1.0 - multiply_row(tasks, matrix, 1.0, solution, i).value : 0.0;
      team.sync();
      solve_factored(tasks, matrix, residual, team);
      for (int i = team.lane(); i < tasks; i += team.width()) solution[i] += residual[i];
    }
    for (int i = team.lane(); i < tasks; i += team.width())
      weights[i] = norms.is_active(i) ? solution[i] * (norms.largest / norms.values[i]) : 0.0;
    team.sync();
    const std::int32_t status = normalize(tasks, problem.options[descent_safe] != 0.0, weights, team);
    return ridge > 0.0 ? status | pareto_stationary : status;
  }

 private:
  // The ridge that was needed: 0 unless the cosines are singular to rounding; above its first value only if they have a
  // negative eigenvalue, which a Gramian accumulated in low precision can have. The null space amplifies rounding by
  // 1 / ridge, while refinement removes most of a ridge's bias: hence a ridge near the root of the machine epsilon.
  template <class Team>
  IGB_HD static double factorize_with_ridge(int tasks, double* matrix, const Team& team) {
    const double rounding = 16.0 * tasks * machine_epsilon;
    double ridge = 0.0;
    for (;;) {
      for (int i = 0; i < tasks; ++i)
        for (int j = i + team.lane(); j < tasks; j += team.width())
          matrix[i * tasks + j] = i == j ? 1.0 + ridge : matrix[j * tasks + i];
      team.sync();
      if (factorize(tasks, matrix, rounding, team)) return ridge;
      team.sync();  // every lane has seen the failing pivot
      ridge = ridge == 0.0 ? fmax(1e-8, rounding) : 1e3 * ridge;
    }
  }

  template <class Team>
  IGB_HD static std::int32_t normalize(int tasks, bool safe, double* weights, const Team& team) {
    double sum = 0.0, magnitude = 0.0;
    for (int i = 0; i < tasks; ++i) {
      sum += weights[i];
      magnitude += fabs(weights[i]);
    }
    team.sync();
    const bool vanishes = fabs(sum) < 1e-12 * magnitude;
    const double divisor = safe ? fabs(sum) : sum;
    for (int i = team.lane(); i < tasks; i += team.width()) weights[i] = vanishes ? 0.0 : weights[i] / divisor;
    team.sync();
    if (vanishes) return pareto_stationary;
    return sum < 0.0 ? negative_sum : 0;
  }
};

}  // namespace igb
