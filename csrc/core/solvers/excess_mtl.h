// ExcessMTL (He et al., ICML 2024): multiplicative weights on the tasks' excess risks, estimated as
// e_k = sum g_k^2 / sqrt(H_k + eps) with H_k the sum of squared gradients so far; they come in the place of squared norms:
//   w_k <- w_k exp(eta e_k / e_k(0)),  sum of weights as chosen,
// where e_k(0) is the task's first excess risk that is not 0, and leaves its weight. Logarithms of the weights are kept.
#pragma once

#include "../gramian.h"
#include "../simplex.h"

namespace igb {

struct ExcessMtl {
  enum Option { eta, as_torchjd, option_count };  // torchjd: the weights sum to 1, and the first e_k moves them itself
  // The state is e(0), then log w, initially all 0.
  static constexpr bool needs_gram = false;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 0.0;
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int tasks) { return 2 * tasks; }
  IGB_HD static constexpr int workspace_size(int) { return 0; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms&, double* weights, double*, const Team& team) {
    const int tasks = problem.tasks, stride = problem.full ? tasks + 1 : 1;
    const double* options = problem.options;
    double *baseline = problem.state, *log_weights = baseline + tasks;
    const bool torchjd = options[as_torchjd] != 0.0;
    for (int i = team.lane(); i < tasks; i += team.width()) {
      const double excess = problem.gram[i * stride];
      const bool is_first = baseline[i] == 0.0;
      if (is_first) baseline[i] = excess;
      const double relative = is_first ? (torchjd ? excess : 0.0) : excess / (baseline[i] + (torchjd ? 1e-7 : 0.0));
      weights[i] = log_weights[i] + options[eta] * relative;
    }
    team.sync();
    double largest = weights[0];
    for (int i = 1; i < tasks; ++i) largest = fmax(largest, weights[i]);
    team.sync();
    for (int i = team.lane(); i < tasks; i += team.width()) {
      log_weights[i] = weights[i] - largest;  // a common factor means nothing
      weights[i] = exp(log_weights[i]);
    }
    team.sync();
    double sum = 0.0;
    for (int i = 0; i < tasks; ++i) sum += weights[i];
    team.sync();
    for (int i = team.lane(); i < tasks; i += team.width()) weights[i] *= (torchjd ? 1.0 : tasks) / sum;
    team.sync();
    return 0;
  }
};

}  // namespace igb
