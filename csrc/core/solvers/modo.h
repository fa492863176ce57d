// MoDo (Chen et al., NeurIPS 2023, arXiv:2305.20057): one projected step a batch, on the cross-Gramian A = J1 J2' of two
// batches, so that its expectation is the gradient of the min-norm objective:
//   w <- P(w - gamma (A w + rho w)),          d = J' w.
#pragma once

#include "../gramian.h"
#include "../simplex.h"

namespace igb {

struct MoDo {
  enum Option { gamma, rho, option_count };
  // The state is w, initially 1/K.
  static constexpr bool needs_gram = true;
  static constexpr bool needs_losses = false;
  static constexpr bool cross_gram = true;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int tasks) { return tasks; }
  IGB_HD static constexpr int workspace_size(int tasks) { return tasks; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms&, double* weights, double* workspace,
                                   const Team& team) {
    const int tasks = problem.tasks;
    double *w = problem.state, *moved = workspace;
    for (int i = team.lane(); i < tasks; i += team.width()) {
      double slope = problem.options[rho] * w[i];
      for (int j = 0; j < tasks; ++j) slope += problem.gram[i * tasks + j] * w[j];
      moved[i] = w[i] - problem.options[gamma] * slope;
    }
    team.sync();
    project_on_simplex(tasks, moved, team);
    for (int i = team.lane(); i < tasks; i += team.width()) weights[i] = w[i] = moved[i];
    team.sync();
    return 0;
  }
};

}  // namespace igb
