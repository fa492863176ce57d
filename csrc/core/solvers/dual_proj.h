// DualProj (Lopez-Paz & Ranzato, NeurIPS 2017, eq. 11, as generalised in Quinton & Rey, 2024, arXiv:2406.16232): the
// projection of J'u on the cone {d : J d >= 0} of the updates that ascend no task. d = J'w with
//   min w'Gw,  w >= u,
// or, with lengths n, cosines C and w = u + z / n:  z >= 0,  C (n u + z) >= 0,  both complementary.
#pragma once

#include "../cone.h"

namespace igb {

struct DualProj : ConeProjection<DualProj> {
  template <class Team>
  IGB_HD static std::int32_t add_multipliers(const Problem& problem, const Norms& norms, const Norms& lengths,
                                             Lcp<Team>& lcp, double* weights, const Team& team) {
    const int tasks = problem.tasks;
    for (int i = team.lane(); i < tasks; i += team.width()) lcp.v[i] = lengths.values[i] / norms.largest * weights[i];
    team.sync();
    const std::int32_t status = lcp.solve();
    for (int i = team.lane(); i < tasks; i += team.width())
      if (norms.is_active(i)) weights[i] += lcp.z[i] * (norms.largest / lengths.values[i]);
    team.sync();
    return status;
  }
};

}  // namespace igb
