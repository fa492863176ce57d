// MetaBalance (He et al., WWW 2022, arXiv:2203.06801): auxiliary gradients are brought to the length of the target task's,
//   w_k = r m_target / m_k + (1 - r),     m <- beta m + (1 - beta) |g|,
// by moving averages m of the norms; w = 1 without a target (an index below 0). A task has none before its first gradient, with which its average starts.
#pragma once

#include "../gramian.h"

namespace igb {

struct MetaBalance {
  enum Option { r, beta, target, option_count };
  // The state is m, initially 0.
  static constexpr bool needs_gram = false;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 0.0;  // the formula is sound for every nonzero norm
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int tasks) { return tasks; }
  IGB_HD static constexpr int workspace_size(int) { return 0; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms& norms, double* weights, double*,
                                   const Team& team) {
    const double *options = problem.options, beta = options[Option::beta], mix = options[Option::r];
    double* average = problem.state;
    for (int i = team.lane(); i < problem.tasks; i += team.width())
      average[i] = average[i] > 0.0 ? beta * average[i] + (1.0 - beta) * norms.values[i] : norms.values[i];
    team.sync();
    const int index = static_cast<int>(options[target]);
    const double length = index < 0 ? 0.0 : average[index];
    for (int i = team.lane(); i < problem.tasks; i += team.width())
      weights[i] = index >= 0 && average[i] > 0.0 ? mix * (length / average[i]) + (1.0 - mix) : 1.0;
    team.sync();
    return 0;
  }
};

}  // namespace igb
