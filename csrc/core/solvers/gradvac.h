// GradVac, gradient vaccine (Wang et al., ICLR 2021, eq. 2-3): PCGrad's visits with a goal phi_ij for each cosine instead
// of 0. Where rho, the cosine of c and u_j, is below phi, c takes the multiple of u_j that lifts it to phi,
//   |c| (phi sqrt(1 - rho^2) - rho sqrt(1 - phi^2)) / sqrt(1 - phi^2);
// then phi moves towards rho. A goal of 1 is out of reach for any multiple, and asks for none.
#pragma once

#include "../visits.h"

namespace igb {

struct Gradvac {
  enum Option { beta, eps, option_count };  // eps is added to the divisors of rho and of the multiple, in units of norms
  // The state is that of Visits and the goals phi, K x K.
  static constexpr bool needs_gram = true;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int tasks) { return Visits::per_task_size(tasks); }
  IGB_HD static constexpr int state_size(int tasks) { return Visits::state_count + tasks * tasks; }
  IGB_HD static constexpr int workspace_size(int tasks) { return Visits::workspace_size(tasks); }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms& norms, double* weights, double* workspace,
                                   const Team& team) {
    const Vaccine vaccine{problem, norms};
    if (Visits::weigh(problem, norms, false, vaccine, weights, workspace, team)) return 0;
    fill(problem.tasks, weights, NAN, team);
    return non_finite;
  }

 private:
  // What c has become, in units of n_i.
  struct Gradient {
    const Norms& norms;
    double norm;  // n_i; 0: the task is inactive
    double* goals;
    double beta, eps, vanishes;
    double length = 1.0;  // |c|

    IGB_HD double visit(int j, double product) {
      const double other = norms.values[j], goal = goals[j];
      const bool meet = norm > 0.0 && other > 0.0 && length > vanishes;
      const double cosine = meet ? fmin(1.0, fmax(-1.0, product / (length + eps / norm / other))) : 0.0;
      goals[j] = (1.0 - beta) * goal + beta * cosine;
      if (!meet || !(cosine < goal)) return 0.0;
      const double divisor = sine(goal) + eps / other;
      if (!(divisor > 0.0)) return 0.0;
      const double multiple = length * (goal * sine(cosine) - cosine * sine(goal)) / divisor;
      const double parallel = product + multiple;  // what is perpendicular to u_j stays
      length = sqrt(fmax(0.0, (length - product) * (length + product)) + parallel * parallel);
      return multiple;
    }

    IGB_HD static double sine(double cosine) { return sqrt(fmax(0.0, (1.0 - cosine) * (1.0 + cosine))); }
  };

  struct Vaccine {
    const Problem& problem;
    const Norms& norms;

    IGB_HD Gradient start(int i) const {
      // Products are differences of numbers around 1: beside a length below this they are rounding, and c has no direction.
      const double vanishes = 16.0 * problem.tasks * machine_epsilon;
      return {norms, norms.values[i], problem.state + Visits::state_count + i * problem.tasks, problem.options[beta],
              problem.options[eps], vanishes};
    }
  };
};

}  // namespace igb
