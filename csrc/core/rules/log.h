// Sum of logarithms: s_k = 1 / (L_k + eps) (SI; Dai et al., UAI 2023, section 4.1; with eps also Lin et al., 2023, DB-MTL).
#pragma once

#include "common.h"

namespace igb {

struct Log {
  enum Option { eps, option_count };
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static std::int32_t check(const LossProblem& problem) {
    for (int i = 0; i < problem.tasks; ++i)
      if (problem.losses[i] + problem.options[eps] < 0.0) return non_positive_loss;
    return 0;
  }

  template <class Team>
  IGB_HD static std::int32_t scale(const LossProblem& problem, double* scales, const Team& team) {
    for (int i = team.lane(); i < problem.tasks; i += team.width())
      scales[i] = 1.0 / fmax(problem.losses[i] + problem.options[eps], tiny_loss);
    team.sync();
    return 0;
  }
};

}  // namespace igb
