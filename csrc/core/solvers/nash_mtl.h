// Nash-MTL, the bargaining solution (Navon et al., ICML 2022, eq. 2 and claim 3.2): G alpha = 1 / alpha, alpha > 0, the
// minimiser of the strictly convex  1/2 a'Ga - sum log a.  With norms n and cosines C, x = n alpha solves
//   fit_k := x_k (C x)_k = 1.
// Newton's step, relative to x, solves (I + X C X) y = 1 - fit, whose matrix has no eigenvalue below 1. The objective is
// self-concordant, so an exact line search converges from anywhere.
//
// If a nonnegative combination of gradients vanishes (Pareto stationary), x has no finite solution: a ridge on C decides.
#pragma once

#include "../gramian.h"

namespace igb {

struct NashMtl {
  enum Option { max_norm, hold, option_count };  // max_norm 0: no clipping; hold: weights from the state, no solve
  // The state is alpha of the last solve, before clipping; initially ones.
  static constexpr bool needs_gram = true;
  static constexpr bool needs_losses = false;
  static constexpr double inactive_ratio = 1e-12;
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int tasks) { return tasks; }
  IGB_HD static constexpr int workspace_size(int tasks) { return tasks * tasks + 4 * tasks; }

  template <class Team>
  IGB_HD static std::int32_t solve(const Problem& problem, const Norms& norms, double* weights, double* workspace,
                                   const Team& team) {
    const int tasks = problem.tasks;
    if (norms.active == 0) {
      fill(tasks, weights, 1.0, team);
      return 0;
    }
    Buffers buffers(tasks, workspace);
    store_cosines(problem, norms, buffers.matrix, team);

    double* alpha = problem.state;
    std::int32_t status = 0;
    if (problem.options[hold] == 0.0) {
      status = bargain(tasks, norms, buffers, team);
      for (int i = team.lane(); i < tasks; i += team.width())
        alpha[i] = norms.is_active(i) ? buffers.x[i] / norms.values[i] : 0.0;
    } else {
      for (int i = team.lane(); i < tasks; i += team.width()) buffers.x[i] = norms.values[i] * alpha[i];
    }
    team.sync();
    const double factor = clip_factor(tasks, problem.options[max_norm], buffers, team);
    for (int i = team.lane(); i < tasks; i += team.width()) weights[i] = norms.is_active(i) ? factor * alpha[i] : 0.0;
    team.sync();
    return status;
  }

 private:
  enum class Outcome { converged, iteration_cap, unbounded };

  static constexpr int max_iterations = 60;
  static constexpr double tolerance = 1e-13;
  static constexpr double stationary_ridge = 1e-10;

  struct Buffers {
    double* matrix;    // cosines below the diagonal, Newton's matrix on and above it
    double* x;         // 0 for inactive tasks
    double* fit;
    double* rounding;  // scale of fit's rounding error
    double* step;      // right-hand side, then Newton's step relative to x

    IGB_HD Buffers(int tasks, double* workspace)
        : matrix(workspace), x(matrix + tasks * tasks), fit(x + tasks), rounding(fit + tasks), step(rounding + tasks) {}
  };

  template <class Team>
  IGB_HD static std::int32_t bargain(int tasks, const Norms& norms, const Buffers& buffers, const Team& team) {
    Outcome outcome = newton(tasks, norms, 0.0, buffers, team);
    std::int32_t status = 0;
    // A ridge above the number of tasks makes any cosines definite: the loop ends converged or capped.
    for (double ridge = stationary_ridge; outcome == Outcome::unbounded && ridge < 1e3 * tasks; ridge *= 1e3) {
      status = pareto_stationary;
      outcome = newton(tasks, norms, ridge, buffers, team);
    }
    return outcome == Outcome::converged ? status : status | iteration_cap;
  }

  template <class Team>
  IGB_HD static Outcome newton(int tasks, const Norms& norms, double ridge, const Buffers& buffers, const Team& team) {
    // With a ridge |x|^2 <= active / ridge at the solution; without, beyond this bound stationary_ridge would dominate.
    const double longest = ridge > 0.0 ? 100.0 * norms.active / ridge : 0.5 * norms.active / stationary_ridge;
    start(tasks, norms, buffers, team);
    double previous = INFINITY;
    for (int iteration = 0; iteration < max_iterations; ++iteration) {
      const Fit fit = evaluate(tasks, norms, 1.0 + ridge, buffers, team);
      if (!(fit.length_squared <= longest)) return Outcome::unbounded;
      if (fit.residual <= tolerance || (fit.residual <= fit.floor && fit.residual >= 0.25 * previous))
        return Outcome::converged;
      previous = fit.residual;

      assemble(tasks, 1.0 + ridge, buffers, team);
      if (!factorize(tasks, buffers.matrix, 0.5, team)) return Outcome::unbounded;
      solve_factored(tasks, buffers.matrix, buffers.step, team);
      const double length = step_length(tasks, buffers);
      for (int i = team.lane(); i < tasks; i += team.width()) buffers.x[i] *= 1.0 + length * buffers.step[i];
      team.sync();
    }
    return Outcome::iteration_cap;
  }

  // The best common value of x, bounded for opposed gradients.
  template <class Team>
  IGB_HD static void start(int tasks, const Norms& norms, const Buffers& buffers, const Team& team) {
    team.sync();  // every lane has left the previous attempt
    for (int i = team.lane(); i < tasks; i += team.width()) buffers.x[i] = norms.is_active(i) ? 1.0 : 0.0;
    team.sync();
    for (int i = team.lane(); i < tasks; i += team.width())
      buffers.fit[i] = norms.is_active(i) ? multiply_row(tasks, buffers.matrix, 1.0, buffers.x, i).value : 0.0;
    team.sync();
    double sum = 0.0;
    for (int i = 0; i < tasks; ++i) sum += buffers.fit[i];
    const double common = sqrt(norms.active / fmax(sum, 0.1));
    for (int i = team.lane(); i < tasks; i += team.width()) buffers.x[i] *= common;
    team.sync();
  }

  struct Fit {
    double residual;        // max |1 - fit|
    double floor;           // the residual's rounding error
    double length_squared;  // |x|^2
  };

  // Leaves 1 - fit, the right-hand side, in buffers.step.
  template <class Team>
  IGB_HD static Fit evaluate(int tasks, const Norms& norms, double diagonal, const Buffers& buffers, const Team& team) {
    for (int i = team.lane(); i < tasks; i += team.width()) {
      const RowProduct product = multiply_row(tasks, buffers.matrix, diagonal, buffers.x, i);
      buffers.fit[i] = buffers.x[i] * product.value;
      buffers.rounding[i] = buffers.x[i] * product.magnitude;
      buffers.step[i] = norms.is_active(i) ? 1.0 - buffers.fit[i] : 0.0;
    }
    team.sync();
    Fit fit{0.0, 0.0, 0.0};
    for (int i = 0; i < tasks; ++i) {
      fit.residual = fmax(fit.residual, fabs(buffers.step[i]));
      fit.floor = fmax(fit.floor, buffers.rounding[i]);
      fit.length_squared += buffers.x[i] * buffers.x[i];  // carries a NaN, which fmax would hide
    }
    fit.floor *= (tasks + 2) * machine_epsilon;
    return fit;
  }

  template <class Team>
  IGB_HD static void assemble(int tasks, double diagonal, const Buffers& buffers, const Team& team) {
    for (int i = 0; i < tasks; ++i)
      for (int j = i + team.lane(); j < tasks; j += team.width()) {
        const double cosine = i == j ? diagonal : buffers.matrix[j * tasks + i];
        buffers.matrix[i * tasks + j] = buffers.x[i] * cosine * buffers.x[j] + (i == j ? 1.0 : 0.0);
      }
    team.sync();
  }

  // Minimises the objective along the step y, O(K) an evaluation: its slope at t is
  //   sum_i fit_i y_i + t y'XCXy - sum_i y_i / (1 + t y_i),   y'XCXy = y'(I + XCX)y - y'y = sum_i (1 - fit_i) y_i - y'y.
  // Damped Newton in t: by self-concordance it cannot leave the domain 1 + t y > 0.
  IGB_HD static double step_length(int tasks, const Buffers& buffers) {
    const double* y = buffers.step;
    double fit_slope = 0.0, decrement_squared = 0.0, length_squared = 0.0;
    for (int i = 0; i < tasks; ++i) {
      fit_slope += buffers.fit[i] * y[i];
      decrement_squared += (1.0 - buffers.fit[i]) * y[i];
      length_squared += y[i] * y[i];
    }
    if (decrement_squared <= 0.0625) return 1.0;  // Newton's region of quadratic convergence

    const double bend = fmax(decrement_squared - length_squared, 0.0);
    double t = 0.0;
    for (int evaluation = 0; evaluation < 24; ++evaluation) {
      double slope = fit_slope + t * bend, curvature = bend;
      for (int i = 0; i < tasks; ++i) {
        const double relative = y[i] / (1.0 + t * y[i]);
        slope -= relative;
        curvature += relative * relative;
      }
      const double decrement = fabs(slope) / sqrt(curvature);
      t -= slope / curvature / (1.0 + decrement);
      if (decrement < 0.05) break;
    }
    return t;
  }

  // The factor that shortens d = J' alpha to max_norm; |d|^2 = x'Cx.
  template <class Team>
  IGB_HD static double clip_factor(int tasks, double max_norm, const Buffers& buffers, const Team& team) {
    if (!(max_norm > 0.0)) return 1.0;
    for (int i = team.lane(); i < tasks; i += team.width())
      buffers.fit[i] = buffers.x[i] * multiply_row(tasks, buffers.matrix, 1.0, buffers.x, i).value;
    team.sync();
    double square = 0.0;
    for (int i = 0; i < tasks; ++i) square += buffers.fit[i];
    const double length = sqrt(fmax(square, 0.0));
    return length > max_norm ? max_norm / length : 1.0;
  }
};

}  // namespace igb
