// MoCo (Fernando et al., ICLR 2023): weights on moving averages Y of the gradients follow the min-norm objective,
//   lambda <- P(lambda - gamma_t (Y Y' + rho I) lambda),  gamma_t = gamma / t^gamma_sigma,      d = Y' lambda,
// with P the projection on the simplex (or LibMTL's softmax, which draws lambda to uniform weights in every step). The
// Gramian is that of Y after its update, Y <- Y - b_t (Y - g), b_t = min(1, beta / t^beta_sigma).
#pragma once

#include "../gramian.h"
#include "../simplex.h"

namespace igb {

struct MoCo {
  enum Option { beta, beta_sigma, gamma, gamma_sigma, rho, use_softmax, option_count };
  enum State { step, decay, first_weight };  // steps taken, 1 - b of the next one, lambda: initially 0, 1 - b_1, 1/K
  static constexpr bool needs_gram = true;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int tasks) { return first_weight + tasks; }
  IGB_HD static constexpr int workspace_size(int tasks) { return tasks; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms&, double* weights, double* workspace,
                                   const Team& team) {
    const int tasks = problem.tasks;
    const double* options = problem.options;
    double *lambda = problem.state + first_weight, *moved = workspace;
    const double now = problem.state[step] + 1.0, rate = options[gamma] / pow(now, options[gamma_sigma]);
    for (int i = team.lane(); i < tasks; i += team.width()) {
      double slope = options[rho] * lambda[i];
      for (int j = 0; j < tasks; ++j) slope += problem.gram[i * tasks + j] * lambda[j];
      moved[i] = lambda[i] - rate * slope;
    }
    team.sync();
    if (options[use_softmax] != 0.0) softmax(tasks, moved, 1.0, team);
    else project_on_simplex(tasks, moved, team);
    for (int i = team.lane(); i < tasks; i += team.width()) weights[i] = lambda[i] = moved[i];
    if (team.lane() == 0) {
      problem.state[step] = now;
      problem.state[decay] = 1.0 - fmin(1.0, options[beta] / pow(now + 1.0, options[beta_sigma]));
    }
    team.sync();
    return 0;
  }
};

}  // namespace igb
