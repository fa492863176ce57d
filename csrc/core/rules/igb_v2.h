// Improvable gap balancing 2 (Dai et al., UAI 2023, arXiv:2307.15429): sum_k a_k log L_k with weights a that an agent
// chooses on the host.
#pragma once

#include "common.h"

namespace igb {

struct IgbV2 {
  enum Option { option_count };
  IGB_HD static constexpr int per_task_size(int tasks) { return tasks; }  // the weights a
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static std::int32_t check(const LossProblem& problem) {
    if (!all_finite(problem.tasks, problem.per_task)) return non_finite;
    return any_below(problem.tasks, problem.losses, 0.0) ? non_positive_loss : 0;
  }

  template <class Team>
  IGB_HD static std::int32_t scale(const LossProblem& problem, double* scales, const Team& team) {
    for (int i = team.lane(); i < problem.tasks; i += team.width())
      scales[i] = problem.per_task[i] / fmax(problem.losses[i], tiny_loss);
    team.sync();
    return 0;
  }
};

}  // namespace igb
