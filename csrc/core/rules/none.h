// No loss balancing: s_k = 1.
#pragma once

#include "common.h"

namespace igb {

struct Unscaled {
  enum Option { option_count };
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static std::int32_t check(const LossProblem&) { return 0; }

  template <class Team>
  IGB_HD static std::int32_t scale(const LossProblem& problem, double* scales, const Team& team) {
    fill(problem.tasks, scales, 1.0, team);
    return 0;
  }
};

}  // namespace igb
