// Equal weighting: d = sum_k g_k.
#pragma once

#include "../gramian.h"

namespace igb {

struct Equal {
  enum Option { option_count };
  static constexpr bool needs_gram = false;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static constexpr int workspace_size(int) { return 0; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms&, double* weights, double*, const Team& team) {
    fill(problem.tasks, weights, 1.0, team);
    return 0;
  }
};

}  // namespace igb
