// UPGrad (Quinton & Rey, 2024, arXiv:2406.16232, eq. 4): the sum of the projections of the u_k g_k on the cone
// {d : J d >= 0} of the updates that ascend no task. The projection of a unit gradient is, with lengths n and cosines C,
//   J'(e_k / n_k + z / n),   z >= 0,  C (e_k + z) >= 0,  both complementary.
#pragma once

#include "../cone.h"

namespace igb {

struct UpGrad : ConeProjection<UpGrad> {
  template <class Team>
  IGB_HD static std::int32_t add_multipliers(const Problem& problem, const Norms& norms, const Norms& lengths,
                                             Lcp<Team>& lcp, double* weights, const Team& team) {
    const int tasks = problem.tasks;
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
    return status;
  }
};

}  // namespace igb
