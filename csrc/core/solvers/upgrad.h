// UPGrad (Quinton & Rey, 2024, arXiv:2406.16232, eq. 4): the sum of the projections of the u_k g_k on the cone
// {d : J d >= 0} of the updates that ascend no task. The projection of a unit gradient is, with lengths n and cosines C,
//   J'(e_k / n_k + z / n),   z >= 0,  C (e_k + z) >= 0,  both complementary.
#pragma once

#include "../cone.h"

namespace igb {

struct UpGrad {
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
    std::int32_t status = 0;
    for (int k = 0; k < tasks; ++k) {
      const double length = preferred(problem, k) * lengths.values[k];
      bool conflicts = false;
      for (int i = 0; i < tasks; ++i) conflicts |= lcp.cosine(i, k) < 0.0;
      if (length == 0.0 || !conflicts) continue;
      for (int i = team.lane(); i < tasks; i += team.width()) lcp.v[i] = i == k ? 1.0 : 0.0;
      status |= lcp.solve();
      for (int i = team.lane(); i < tasks; i += team.width())
        if (norms.is_active(i)) weights[i] += lcp.z[i] * (length / lengths.values[i]);
      team.sync();
    }
    return status | check_update(norms, lengths, weights, lcp, tasks, team);
  }
};

}  // namespace igb
