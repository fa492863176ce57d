// Dynamic weight average (Liu et al., CVPR 2019, eq. 7): K softmax((mean / earlier mean) / temperature), or 1 until both
// means of every task are known (are not NaN). What rises from 0 counts as unchanged.
#pragma once

#include "common.h"

namespace igb {

struct Dwa {
  enum Option { temperature, option_count };
  IGB_HD static constexpr int per_task_size(int tasks) { return 2 * tasks; }  // earlier mean losses, later ones
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static std::int32_t check(const LossProblem&) { return 0; }

  template <class Team>
  IGB_HD static std::int32_t scale(const LossProblem& problem, double* scales, const Team& team) {
    const int tasks = problem.tasks;
    const double *earlier = problem.per_task, *later = problem.per_task + tasks;
    if (any_nan(2 * tasks, problem.per_task)) {
      fill(tasks, scales, 1.0, team);
      return 0;
    }
    for (int i = team.lane(); i < tasks; i += team.width()) {
      const double ratio = later[i] / earlier[i];
      scales[i] = bounded((earlier[i] == 0.0 || ratio != ratio ? 1.0 : ratio) / problem.options[temperature]);
    }
    team.sync();
    softmax(tasks, scales, tasks, team);
    return 0;
  }
};

}  // namespace igb
