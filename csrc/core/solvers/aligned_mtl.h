// Aligned-MTL (Senushkin et al., CVPR 2023, eq. 9-12): the gradients J = V S U' are replaced by s V U', of equal singular
// values s, and summed with preferences p. With the eigenvalues l_k = S_k^2 of the Gramian that is
//   w = B p,  B = s V L^(-1/2) V',  B G B = s^2 V V',
// where s^2 is the smallest, lower median or mean of the nonzero l_k. per_task is p, 1/K where there is none.
//
// The factor's vectors stand for the gradients. Rotated until they are orthogonal they are S_k U_k, and p, rotated with
// them, is V'p: that gives the update s sum_k U_k (V'p)_k, and the factor, made anew, its weights. V is never formed: its
// smallest entries matter where gradients have very different norms, and rounding would be larger than they are.
#pragma once

#include "../factor.h"
#include "../jacobi.h"

namespace igb {

struct AlignedMtl {
  enum Option { scale, option_count };
  enum Scale { smallest = 0, median = 1, rmse = 2 };  // which s
  static constexpr bool needs_gram = true;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int tasks) { return tasks; }
  IGB_HD static constexpr int state_size(int) { return 0; }
  IGB_HD static constexpr int workspace_size(int tasks) { return factor_size(tasks) + 4 * tasks; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms& norms, double* weights, double* workspace,
                                   const Team& team) {
    const int tasks = problem.tasks;
    if (norms.active == 0) {
      for (int i = team.lane(); i < tasks; i += team.width()) weights[i] = preference(problem, i);
      team.sync();
      return 0;
    }
    double* units = workspace + factor_size(tasks);  // norms in units of the largest
    double* parts = units + tasks;                   // by position: p, then V'p
    double* eigenvalues = parts + tasks;
    double* update = eigenvalues + tasks;            // and scratch

    for (int i = team.lane(); i < tasks; i += team.width()) units[i] = norms.values[i] / norms.largest;
    team.sync();
    CosineFactor factor = factor_cosines(problem, norms, units, workspace, team);
    const int rank = factor.rank;
    for (int k = team.lane(); k < tasks; k += team.width()) parts[k] = preference(problem, factor.task(k));
    team.sync();
    fold(tasks, factor, parts, team);
    const bool converged = orthogonalize(rank, rank, tasks, factor.vectors, parts, update, team);

    for (int k = team.lane(); k < rank; k += team.width()) {
      double square = 0.0;
      for (int m = 0; m < rank; ++m) square += factor.vectors[k * tasks + m] * factor.vectors[k * tasks + m];
      eigenvalues[k] = square;
      parts[k] /= sqrt(square);
    }
    team.sync();
    const double s = sqrt(square_scale(static_cast<int>(problem.options[scale]), rank, eigenvalues));
    for (int m = team.lane(); m < tasks; m += team.width()) {
      double sum = 0.0;
      if (m < rank)
        for (int k = 0; k < rank; ++k) sum += factor.vectors[k * tasks + m] * parts[k];
      update[m] = s * sum;
    }
    team.sync();

    factor = factor_cosines(problem, norms, units, workspace, team);
    fold(tasks, factor, nullptr, team);
    solve_basis(tasks, factor, update, team);
    unfold(tasks, factor, update, team);
    for (int k = team.lane(); k < tasks; k += team.width()) weights[factor.task(k)] = update[k];
    team.sync();
    return (rank < norms.active ? pareto_stationary : 0) | (converged ? 0 : iteration_cap);
  }

 private:
  IGB_HD static double preference(const Problem& problem, int i) {
    return problem.per_task == nullptr ? 1.0 / problem.tasks : problem.per_task[i];
  }

  IGB_HD static double square_scale(int choice, int rank, const double* eigenvalues) {
    const int wanted = choice == median ? (rank - 1) / 2 : 0;  // place in ascending order
    double sum = 0.0, found = 0.0;
    for (int k = 0; k < rank; ++k) {
      sum += eigenvalues[k];
      int below = 0;
      for (int j = 0; j < rank; ++j)
        below += eigenvalues[j] < eigenvalues[k] || (eigenvalues[j] == eigenvalues[k] && j < k) ? 1 : 0;
      if (below == wanted) found = eigenvalues[k];
    }
    return choice == rmse ? sum / rank : found;
  }
};

}  // namespace igb
