// DualProj (Lopez-Paz & Ranzato, NeurIPS 2017, eq. 11, as generalised in Quinton & Rey, 2024, arXiv:2406.16232): the
// projection of J'u on the cone {d : J d >= 0} of the updates that ascend no task. d = J'w with
//   min w'Gw,  w >= u,
// or, with lengths n, cosines C and w = u + z / n:  z >= 0,  C (n u + z) >= 0,  both complementary.
#pragma once

#include "../cone.h"

namespace igb {

struct DualProj {
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
    for (int i = team.lane(); i < tasks; i += team.width()) lcp.v[i] = lengths.values[i] / norms.largest * weights[i];
    team.sync();
    const std::int32_t status = lcp.solve();
    for (int i = team.lane(); i < tasks; i += team.width())
      if (norms.is_active(i)) weights[i] += lcp.z[i] * (norms.largest / lengths.values[i]);
    team.sync();
    return status | check_update(norms, lengths, weights, lcp, tasks, team);
  }
};

}  // namespace igb
