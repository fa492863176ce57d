// CAGrad, conflict-averse gradient descent (Liu et al., NeurIPS 2021, eq. 3): the update of the ball around the mean
// gradient g0 = J'1 / K that helps the worst task most,
//   max_d min_k g_k . d   subject to   |d - g0| <= c |g0|.
// For a level nu, the shortest d - g0 with J d >= nu is J'(z / n), where with norms n and cosines C
//   z >= 0,   C (n / K + z) - nu / n >= 0,   both complementary.
// nu is raised until the shortest has the length c |g0|. If the gradients are Pareto stationary nu may end before, at 0:
// every d of the ball with J d >= 0 is then a solution, and this is the one nearest to g0.
#pragma once

#include "../lcp.h"

namespace igb {

struct CaGrad {
  enum Option { c, rescale, option_count };
  enum Rescale { none = 0, by_square = 1, by_length = 2 };  // the update is divided by 1, 1 + c^2, 1 + c
  static constexpr bool needs_gram = true;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 0.0;  // sound for every nonzero norm
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static constexpr int workspace_size(int tasks) { return Lcp<SerialTeam>::workspace_size(tasks); }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms& norms, double* weights, double* workspace,
                                   const Team& team) {
    const int tasks = problem.tasks;
    fill(tasks, weights, 1.0 / tasks, team);
    if (norms.active == 0) return 0;

    Lcp<Team> lcp(problem, norms, workspace, team);
    lcp.demand_equally(norms);
    for (int i = team.lane(); i < tasks; i += team.width()) lcp.v[i] = norms.values[i] / norms.largest / tasks;
    lcp.reset();
    const double radius = problem.options[c];
    std::int32_t status = 0;
    if (lcp.vanishes(lcp.v)) {  // the mean gradient, and with it the ball
      status = pareto_stationary;
    } else if (radius > 0.0) {
      status = Lcp<Team>::status_of(lcp.raise_level(radius * radius * lcp.length_squared(lcp.v)));
    }
    const int choice = static_cast<int>(problem.options[rescale]);
    const double divisor = choice == by_square ? 1.0 + radius * radius : choice == by_length ? 1.0 + radius : 1.0;
    for (int i = team.lane(); i < tasks; i += team.width()) {
      if (norms.is_active(i)) weights[i] += lcp.z[i] * (norms.largest / norms.values[i]);
      weights[i] /= divisor;
    }
    team.sync();
    return status;
  }
};

}  // namespace igb
