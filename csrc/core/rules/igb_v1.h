// Improvable gap balancing (Dai et al., UAI 2023, arXiv:2307.15429): sum_k W_k log L_k with W = K softmax(L / base), or
// W = 1 until every base is known (is not NaN). A loss counts as 0 against an infinite base.
#pragma once

#include "common.h"

namespace igb {

struct IgbV1 {
  enum Option { option_count };
  IGB_HD static constexpr int per_task_size(int tasks) { return tasks; }  // the base losses
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static std::int32_t check(const LossProblem& problem) {
    return any_below(problem.tasks, problem.losses, 0.0) ? non_positive_loss : 0;
  }

  template <class Team>
  IGB_HD static std::int32_t scale(const LossProblem& problem, double* scales, const Team& team) {
    const int tasks = problem.tasks;
    const double *losses = problem.losses, *bases = problem.per_task;
    if (any_nan(tasks, bases)) {
      fill(tasks, scales, 1.0, team);
    } else {
      for (int i = team.lane(); i < tasks; i += team.width())
        scales[i] = is_finite(bases[i]) ? fmin(losses[i] / fmax(bases[i], tiny_loss), largest_ratio) : 0.0;
      team.sync();
      softmax(tasks, scales, tasks, team);
    }
    for (int i = team.lane(); i < tasks; i += team.width()) scales[i] /= fmax(losses[i], tiny_loss);
    team.sync();
    return 0;
  }

 private:
  static constexpr double largest_ratio = 1e300;  // of a loss to its base
};

}  // namespace igb
