// PCGrad, gradient surgery (Yu et al., NeurIPS 2020, algorithm 1): a gradient loses its component along each other
// gradient that it conflicts with when it comes to it, in random order. A conflict is c . u_j < 0, and c takes -(c . u_j).
#pragma once

#include "../visits.h"

namespace igb {

struct Pcgrad {
  enum Option { visit_self, eps, mean, option_count };  // eps is added to |g_j|^2; mean: of the gradients, not their sum
  static constexpr bool needs_gram = true;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int tasks) { return Visits::per_task_size(tasks); }
  IGB_HD static constexpr int state_size(int) { return Visits::state_count; }
  IGB_HD static constexpr int workspace_size(int tasks) { return Visits::workspace_size(tasks); }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms& norms, double* weights, double* workspace,
                                   const Team& team) {
    const int tasks = problem.tasks;
    const Surgery surgery{norms.values, problem.options[eps]};
    if (!Visits::weigh(problem, norms, problem.options[visit_self] != 0.0, surgery, weights, workspace, team)) {
      fill(tasks, weights, NAN, team);
      return non_finite;
    }
    if (problem.options[mean] != 0.0)
      for (int k = team.lane(); k < tasks; k += team.width()) weights[k] /= tasks;
    team.sync();
    return 0;
  }

 private:
  struct Surgery {
    const double* norms;
    double eps;

    IGB_HD Surgery start(int) const { return *this; }
    IGB_HD double visit(int j, double product) const {
      return product < 0.0 ? -product / (1.0 + eps / norms[j] / norms[j]) : 0.0;
    }
  };
};

}  // namespace igb
