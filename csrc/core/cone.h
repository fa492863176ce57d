// What the methods share that project on the cone {d : J d >= 0} of the updates that ascend no task.
#pragma once

#include "lcp.h"

namespace igb {

// u: the preference, by default 1 / K.
IGB_HD inline double preferred(const Problem& problem, int task) {
  return problem.per_task != nullptr ? problem.per_task[task] : 1.0 / problem.tasks;
}

// The lengths that the projection works with, in units of the largest norm; reg_eps adds reg_eps trace(G) to each square.
// In terms of them G + reg_eps trace(G) I again has a unit diagonal, and is solved like any other.
template <class Team>
IGB_HD Norms measure_lengths(const Problem& problem, const Norms& norms, double reg_eps, double* lengths,
                             const Team& team) {
  double trace = 0.0;
  for (int i = 0; i < problem.tasks; ++i) trace += norms.values[i] / norms.largest * (norms.values[i] / norms.largest);
  for (int i = team.lane(); i < problem.tasks; i += team.width()) {
    const double ratio = norms.values[i] / norms.largest;
    lengths[i] = norms.is_active(i) ? reg_eps > 0.0 ? norms.largest * sqrt(ratio * ratio + reg_eps * trace)
                                                    : norms.values[i]
                                    : 0.0;
  }
  team.sync();
  return {lengths, norms.active, norms.largest, norms.status};
}

// Called with the weights found: whether their update vanishes, so that no update helps every task.
template <class Team>
IGB_HD std::int32_t check_update(const Norms& norms, const Norms& lengths, const double* weights, Lcp<Team>& lcp,
                                 int tasks, const Team& team) {
  for (int i = team.lane(); i < tasks; i += team.width()) lcp.v[i] = lengths.values[i] / norms.largest * weights[i];
  team.sync();
  return lcp.vanishes(lcp.v) ? pareto_stationary : 0;
}

// A method whose weights are the preference plus the multipliers of one or several projections, which
// Method::add_multipliers adds; it returns a status.
template <class Method>
struct ConeProjection {
  enum Option { reg_eps, option_count };  // 0: the exact projection; else that for G + reg_eps trace(G) I
  static constexpr bool needs_gram = true;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 0.0;  // sound for every nonzero norm
  IGB_HD static constexpr int per_task_size(int tasks) { return tasks; }
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static constexpr int workspace_size(int tasks) { return Lcp<SerialTeam>::workspace_size(tasks) + tasks; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms& norms, double* weights, double* workspace,
                                   const Team& team) {
    const int tasks = problem.tasks;
    for (int i = team.lane(); i < tasks; i += team.width()) weights[i] = preferred(problem, i);
    team.sync();
    if (norms.active == 0) return 0;

    const Norms lengths = measure_lengths(problem, norms, problem.options[reg_eps], workspace, team);
    Lcp<Team> lcp(problem, lengths, workspace + tasks, team);
    const std::int32_t status = Method::add_multipliers(problem, norms, lengths, lcp, weights, team);
    return status | check_update(norms, lengths, weights, lcp, tasks, team);
  }
};

}  // namespace igb
