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

}  // namespace igb
