// GradDrop (Chen et al., NeurIPS 2020) chooses gradients element by element, in one pass over them. What is left to do here
// is to count the steps, from which the random numbers come; the squared norms are those of the update.
#pragma once

#include "../gramian.h"

namespace igb {

struct GradDrop {
  enum Option { option_count };
  enum State { seed, step, state_count };
  static constexpr bool needs_gram = false;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 0.0;
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int) { return state_count; }
  IGB_HD static constexpr int workspace_size(int) { return 0; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms&, double* weights, double*, const Team& team) {
    fill(problem.tasks, weights, 1.0, team);
    if (team.lane() == 0) problem.state[step] += 1.0;
    team.sync();
    return 0;
  }
};

}  // namespace igb
