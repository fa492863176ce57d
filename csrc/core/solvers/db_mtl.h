// DB-MTL, the gradient half of dual balancing (Lin et al., 2023, arXiv:2308.12029, section 3.2): the rows of an
// exponential moving average are all rescaled to the largest row norm,
//   B <- (1 - b_t) g + b_t B,  b_t = beta / t^sigma,      d = sum_k  max_j |B_j| / (|B_k| + eps)  B_k.
// The Gramian is that of the rows B after their update; its diagonal is enough. With bias_correction the rows are
// understood as B / (1 - prod b), and the weights apply to the uncorrected rows.
#pragma once

#include "../gramian.h"

namespace igb {

struct DbMtl {
  enum Option { beta, sigma, eps, relative_eps, bias_correction, option_count };
  enum State { step, decay, decay_product, state_count };  // initially {0, beta, 1}; decay is the next update's b_t
  static constexpr bool needs_gram = false;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 0.0;  // the formula itself is sound for every nonzero norm
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int) { return state_count; }
  IGB_HD static constexpr int workspace_size(int) { return 0; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms& norms, double* weights, double*,
                                   const Team& team) {
    const double* options = problem.options;
    const double product = problem.state[decay_product] * problem.state[decay];
    const double correction = options[bias_correction] != 0.0 && product < 1.0 ? 1.0 / (1.0 - product) : 1.0;
    const double target = correction * norms.largest;
    const double guard = options[relative_eps] != 0.0 ? 1e-12 * target : options[eps];

    for (int i = team.lane(); i < problem.tasks; i += team.width()) {
      const double rescaled = correction * target / (correction * norms.values[i] + guard);
      weights[i] = norms.active == 0 ? 1.0 : norms.is_active(i) ? rescaled : 0.0;
    }
    team.sync();  // every lane has read the state

    if (team.lane() == 0) advance(options, product, problem.state);
    team.sync();
    return 0;
  }

 private:
  IGB_HD static void advance(const double* options, double product, double* state) {
    state[step] += 1.0;
    state[decay] = options[beta] / pow(state[step] + 1.0, options[sigma]);
    state[decay_product] = product;
  }
};

}  // namespace igb
