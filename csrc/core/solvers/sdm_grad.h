// SDMGrad (Xiao et al., NeurIPS 2023): direction-oriented weights from the cross-Gramian A = J1 J2' of two batches, whose
// noise is independent. On w, which is kept between steps, some steps of gradient descent with momentum,
//   v <- momentum v + A (w + lambda 1/K),   w <- P(w - lr v),          d = J' (w + lambda 1/K) / (1 + lambda),
// with A in units of the squared mean norm of the tasks' gradients.
#pragma once

#include "../gramian.h"
#include "../simplex.h"

namespace igb {

struct SdmGrad {
  enum Option { lambda, lr, momentum, iterations, eps, option_count };
  // The state is w, initially 1/K.
  static constexpr bool needs_gram = true;
  static constexpr bool needs_losses = false;
  static constexpr bool cross_gram = true;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int tasks) { return tasks; }
  IGB_HD static constexpr int workspace_size(int tasks) { return 2 * tasks; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms&, double* weights, double* workspace,
                                   const Team& team) {
    const int tasks = problem.tasks;
    const double* options = problem.options;
    double *w = problem.state, *velocity = workspace, *moved = workspace + tasks;
    double mean_norm = 0.0;
    for (int i = 0; i < tasks; ++i) mean_norm += sqrt(fmax(problem.gram[i * tasks + i], 0.0)) / tasks;
    const double square = mean_norm * mean_norm + options[eps], scale = square > 0.0 ? square : 1.0;
    const double pull = options[lambda] / tasks;

    fill(tasks, velocity, 0.0, team);
    for (int iteration = 0; iteration < options[iterations]; ++iteration) {
      for (int i = team.lane(); i < tasks; i += team.width()) {
        double slope = 0.0;
        for (int j = 0; j < tasks; ++j) slope += problem.gram[i * tasks + j] / scale * (w[j] + pull);
        velocity[i] = options[momentum] * velocity[i] + slope;
        moved[i] = w[i] - options[lr] * velocity[i];
      }
      team.sync();
      project_on_simplex(tasks, moved, team);
      for (int i = team.lane(); i < tasks; i += team.width()) w[i] = moved[i];
      team.sync();
    }
    for (int i = team.lane(); i < tasks; i += team.width()) weights[i] = (w[i] + pull) / (1.0 + options[lambda]);
    team.sync();
    return 0;
  }
};

}  // namespace igb
