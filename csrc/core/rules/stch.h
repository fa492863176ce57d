// Smooth Tchebycheff scalarization (Lin et al., ICML 2024, eq. 9), with preferences a:
//   m log sum_k exp(a_k (L_k - z_k) / m)           with an ideal point z,
//   K m log sum_k exp(a_k log(L_k / z_k) / m)      of_logs, with a nadir z; sum_k log L_k until it is known (is not NaN).
#pragma once

#include "common.h"

namespace igb {

struct Stch {
  enum Option { mu, of_logs, option_count };
  IGB_HD static constexpr int per_task_size(int tasks) { return 2 * tasks; }  // preferences a, points z
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static std::int32_t check(const LossProblem& problem) {
    const bool logs = problem.options[of_logs] != 0.0;
    if (!all_finite(logs ? problem.tasks : 2 * problem.tasks, problem.per_task)) return non_finite;
    return logs && any_below(problem.tasks, problem.losses, 0.0) ? non_positive_loss : 0;
  }

  template <class Team>
  IGB_HD static std::int32_t scale(const LossProblem& problem, double* scales, const Team& team) {
    const int tasks = problem.tasks;
    const double *losses = problem.losses, *preferences = problem.per_task, *points = problem.per_task + tasks;
    const bool logs = problem.options[of_logs] != 0.0;
    if (logs && any_nan(tasks, points)) {
      for (int i = team.lane(); i < tasks; i += team.width()) scales[i] = 1.0 / fmax(losses[i], tiny_loss);
      team.sync();
      return 0;
    }
    for (int i = team.lane(); i < tasks; i += team.width()) {
      const double distance = logs ? log_ratio(losses[i], points[i]) : losses[i] - points[i];
      scales[i] = bounded(preferences[i] * bounded(distance) / problem.options[mu]);
    }
    team.sync();
    softmax(tasks, scales, logs ? tasks : 1.0, team);
    for (int i = team.lane(); i < tasks; i += team.width())
      scales[i] *= preferences[i] / (logs ? fmax(losses[i], tiny_loss) : 1.0);
    team.sync();
    return 0;
  }
};

}  // namespace igb
