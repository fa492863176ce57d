// MGDA, the multiple-gradient descent algorithm (Desideri, 2012; Sener & Koltun, NeurIPS 2018, eq. 3): the shortest vector
// of the convex hull of the gradients,  min w'Gw,  w >= 0,  sum w = 1. Its update d has g_k . d >= |d|^2 for every task.
// With norms n and cosines C, w is proportional to z / n for the solution of the complementarity problem
//   z >= 0,  C z - min(n) / n >= 0,  both complementary.
// It has none if a nonnegative combination of gradients vanishes (Pareto stationary): that combination is the answer.
#pragma once

#include "../lcp.h"

namespace igb {

struct Mgda {
  enum Option { drop_zero, option_count };  // drop_zero 0: a task without gradient takes all the weight, as the hull says
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
    if (norms.active == 0 || (norms.active < tasks && problem.options[drop_zero] == 0.0)) {
      for (int i = team.lane(); i < tasks; i += team.width())
        weights[i] = norms.is_active(i) ? 0.0 : 1.0 / (tasks - norms.active);
      team.sync();
      return 0;
    }
    Lcp<Team> lcp(problem, norms, workspace, team);
    lcp.demand_equally(norms);
    lcp.level = 1.0;
    lcp.reset();
    const auto outcome = lcp.settle();
    if (outcome == Lcp<Team>::Outcome::ray) lcp.follow_ray();

    double sum = 0.0;
    for (int i = 0; i < tasks; ++i) sum += lcp.z[i] * fabs(lcp.h[i]);
    for (int i = team.lane(); i < tasks; i += team.width()) weights[i] = lcp.z[i] * fabs(lcp.h[i]) / sum;
    team.sync();
    return Lcp<Team>::status_of(outcome);
  }
};

}  // namespace igb
