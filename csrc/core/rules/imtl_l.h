// Impartial losses (Liu et al., ICLR 2021, eq. 8): sum_k exp(p_k) L_k - p_k with learned p.
#pragma once

#include "common.h"

namespace igb {

struct ImtlL {
  enum Option { option_count };
  IGB_HD static constexpr int per_task_size(int tasks) { return tasks; }  // the log scales p
  IGB_HD static constexpr int state_size(int tasks) { return tasks; }     // the gradient of p
  IGB_HD static std::int32_t check(const LossProblem& problem) {
    return all_finite(problem.tasks, problem.per_task) ? 0 : non_finite;
  }

  template <class Team>
  IGB_HD static std::int32_t scale(const LossProblem& problem, double* scales, const Team& team) {
    for (int i = team.lane(); i < problem.tasks; i += team.width()) {
      const double p = problem.per_task[i];
      scales[i] = exp(fmin(largest_log_scale, fmax(-largest_log_scale, p)));
      problem.state[i] = inward(p, largest_log_scale, scales[i] * problem.losses[i] - 1.0);
    }
    team.sync();
    return 0;
  }
};

}  // namespace igb
