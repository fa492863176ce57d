// Geometric loss strategy (Chennupati et al., CVPR workshops 2019): the geometric mean M of the losses, whose gradient is
// M / (K L_k). In logarithms, because products of many losses under- and overflow. At a loss of 0 the mean is 0 and no
// other task can move it: scales 0, and reported.
#pragma once

#include "common.h"

namespace igb {

struct Gls {
  enum Option { option_count };
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static std::int32_t check(const LossProblem& problem) {
    return any_below(problem.tasks, problem.losses, 0.0) ? non_positive_loss : 0;
  }

  template <class Team>
  IGB_HD static std::int32_t scale(const LossProblem& problem, double* scales, const Team& team) {
    const int tasks = problem.tasks;
    for (int i = 0; i < tasks; ++i)
      if (problem.losses[i] == 0.0) {
        fill(tasks, scales, 0.0, team);
        return non_positive_loss;
      }
    for (int i = team.lane(); i < tasks; i += team.width()) scales[i] = log(fmax(problem.losses[i], tiny_loss));
    team.sync();
    double mean = 0.0;
    for (int i = 0; i < tasks; ++i) mean += scales[i] / tasks;
    team.sync();
    for (int i = team.lane(); i < tasks; i += team.width()) scales[i] = exp(mean - scales[i]) / tasks;
    team.sync();
    return 0;
  }
};

}  // namespace igb
