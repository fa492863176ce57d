// Newton's method for the fair shares of Nash-MTL and FairGrad. With cosines C it finds x > 0 in
//   C t = r / x^p,  t_i = r_i x_i,   that is   fit_i := (u_i^2 / t_i) (C t)_i = 1,  u_i = x_i^((1+p)/2),
// the minimiser of the strictly convex  1/2 t'Ct + sum_i r_i^2 psi(x_i),  psi' = -x^-p  (p = 1: -log x).
//
// With shares s = t / u, Newton's step relative to x is y = z / s with (p + U C U) z = s (1 - fit): whatever x and r, no
// eigenvalue of that matrix is below p. For p = 1 the objective is self-concordant; for other p it is not, and what makes
// the method converge from anywhere is a line search on the objective's slope, which is increasing along the step.
//
// If a nonnegative combination of gradients vanishes (Pareto stationary), x has no finite solution: a ridge on C decides.
#pragma once

#include <cstdint>

#include "gramian.h"

namespace igb {

// What a method brings to the equation: p, the r_i and its powers.
struct LogTerms {  // p = 1, r = 1
  static constexpr bool below_one = false;
  IGB_HD double exponent() const { return 1.0; }
  IGB_HD double scale(int) const { return 1.0; }
  IGB_HD double share(double, double) const { return 1.0; }               // s = t / u
  IGB_HD double fit(double t, double, double product) const { return t * product; }  // of (C t)_i
  IGB_HD double power(double x) const { return x; }                       // x^p
  IGB_HD double root(double x) const { return x; }                        // x^((1+p)/2)
  IGB_HD double common(double ratio) const { return sqrt(ratio); }        // ratio^(1/(1+p))
  IGB_HD double shrink(double step) const { return 1.0 / (1.0 - step); }  // (1 - p step)^(-1/p)
};

struct PowerTerms {
  double p;
  const double* scales;  // r
  bool below_one;        // p < 1

  IGB_HD PowerTerms(double exponent, const double* r) : p(exponent), scales(r), below_one(exponent < 1.0) {}
  IGB_HD double exponent() const { return p; }
  IGB_HD double scale(int i) const { return scales[i]; }
  IGB_HD double share(double t, double u) const { return t / u; }
  IGB_HD double fit(double t, double u, double product) const { return u * (u / t) * product; }
  IGB_HD double power(double x) const { return pow(x, p); }
  IGB_HD double root(double x) const { return pow(x, 0.5 + 0.5 * p); }
  IGB_HD double common(double ratio) const { return pow(ratio, 1.0 / (1.0 + p)); }
  IGB_HD double shrink(double step) const { return pow(1.0 - p * step, -1.0 / p); }
};

struct NewtonBuffers {
  double* matrix;    // cosines below the diagonal, Newton's matrix on and above it
  double* x;         // 0 for inactive tasks
  double* lengths;   // t; may be x where r = 1
  double* roots;     // u; may be x where p = 1
  double* fit;
  double* rounding;  // scale of fit's rounding error
  double* step;      // right-hand side, then y
  double* origin;    // x before a curved step; only for p < 1
};

template <class Terms, class Team>
class Newton {
 public:
  IGB_HD Newton(int tasks, const Norms& norms, const Terms& terms, const NewtonBuffers& buffers, const Team& team)
      : tasks_(tasks), norms_(norms), terms_(terms), buffers_(buffers), team_(team) {}

  // Leaves x and t; buffers.matrix holds the cosines. The ridge is on the cosines.
  IGB_HD std::int32_t solve() {
    Outcome outcome = iterate(0.0);
    std::int32_t status = 0;
    // A ridge above the number of tasks makes any cosines definite: the loop ends converged or capped.
    for (double ridge = stationary_ridge; outcome == Outcome::unbounded && ridge < 1e3 * tasks_; ridge *= 1e3) {
      status = pareto_stationary;
      outcome = iterate(ridge);
    }
    return outcome == Outcome::converged ? status : status | iteration_cap;
  }

 private:
  enum class Outcome { converged, iteration_cap, unbounded };

  static constexpr int max_iterations = 100;
  static constexpr double tolerance = 1e-13;
  static constexpr double stationary_ridge = 1e-10;
  static constexpr double smallest = 1e-150;  // x: the weight has vanished, and need not fit

  IGB_HD Outcome iterate(double ridge) {
    start();
    double previous = INFINITY;
    for (int iteration = 0; iteration < max_iterations; ++iteration) {
      evaluate(1.0 + ridge);
      const Fit fit = measure();
      if (!fit.finite) return Outcome::unbounded;
      if (fit.residual <= tolerance) return Outcome::converged;

      assemble(1.0 + ridge);
      if (!factorize(tasks_, buffers_.matrix, 0.5 * terms_.exponent(), team_)) return Outcome::unbounded;
      if (ridge == 0.0 && ridge_would_decide()) return Outcome::unbounded;
      if (fit.rounded && fit.residual >= 0.25 * previous) return Outcome::converged;
      previous = fit.residual;
      solve_factored(tasks_, buffers_.matrix, buffers_.step, team_);
      for (int i = team_.lane(); i < tasks_; i += team_.width()) buffers_.step[i] /= share(i);
      team_.sync();
      advance(1.0 + ridge);
    }
    return Outcome::iteration_cap;
  }

  // The best common value of x, bounded for opposed gradients.
  IGB_HD void start() {
    team_.sync();  // every lane has left the previous attempt
    for (int i = team_.lane(); i < tasks_; i += team_.width()) buffers_.x[i] = norms_.is_active(i) ? 1.0 : 0.0;
    team_.sync();
    evaluate(1.0);
    double sum = 0.0, squares = 0.0;
    for (int i = 0; i < tasks_; ++i)
      if (norms_.is_active(i)) {
        const double square = share(i) * share(i);
        sum += square * buffers_.fit[i];
        squares += square;
      }
    const double common = terms_.common(squares / fmax(sum, 0.1 * squares));
    team_.sync();
    for (int i = team_.lane(); i < tasks_; i += team_.width()) buffers_.x[i] *= common;
    team_.sync();
  }

  // The square root of what the task adds to t'Ct at the solution.
  IGB_HD double share(int i) const {
    return norms_.is_active(i) ? terms_.share(buffers_.lengths[i], buffers_.roots[i]) : 1.0;
  }

  // From x to t, u and the fit, which is 1 for tasks that are inactive or have vanished.
  IGB_HD void evaluate(double diagonal) {
    for (int i = team_.lane(); i < tasks_; i += team_.width()) {
      const double x = buffers_.x[i];
      buffers_.lengths[i] = terms_.scale(i) * x;
      buffers_.roots[i] = terms_.root(x);
    }
    team_.sync();
    for (int i = team_.lane(); i < tasks_; i += team_.width()) {
      double fit = 1.0, rounding = 0.0;
      if (norms_.is_active(i)) {
        const RowProduct product = multiply_row(tasks_, buffers_.matrix, diagonal, buffers_.lengths, i);
        const double t = buffers_.lengths[i], u = buffers_.roots[i];
        fit = terms_.fit(t, u, product.value);
        rounding = terms_.fit(t, u, product.magnitude);
        if (buffers_.x[i] <= smallest && fit > 1.0) fit = 1.0;
      }
      buffers_.fit[i] = fit;
      buffers_.rounding[i] = rounding;
    }
    team_.sync();
  }

  struct Fit {
    double residual;  // max |1 - fit|
    bool rounded;     // every residual is within its rounding error
    bool finite;
  };

  IGB_HD Fit measure() const {
    const double unit = (tasks_ + 2) * machine_epsilon;
    Fit fit{0.0, true, true};
    double total = 0.0;  // carries a NaN
    for (int i = 0; i < tasks_; ++i) {
      const double misfit = fabs(1.0 - buffers_.fit[i]);
      total += misfit;
      if (misfit > fit.residual) fit.residual = misfit;
      fit.rounded &= misfit <= unit * buffers_.rounding[i] + tolerance;
    }
    fit.finite = is_finite(total);
    return fit;
  }

  IGB_HD void assemble(double diagonal) {
    for (int i = team_.lane(); i < tasks_; i += team_.width()) buffers_.step[i] = share(i) * (1.0 - buffers_.fit[i]);
    double* matrix = buffers_.matrix;
    const double* u = buffers_.roots;
    const int tasks = tasks_;
    for (int i = 0; i < tasks; ++i)
      for (int j = i + team_.lane(); j < tasks; j += team_.width())
        matrix[i * tasks + j] = i == j ? u[i] * diagonal * u[i] + terms_.exponent() : u[i] * matrix[j * tasks + i] * u[j];
    team_.sync();
  }

  // Divided by u^2 the pivots are those of C + p U^-2, the Hessian in t: where one is as small as the ridge, C has a null
  // vector that nothing but growing u holds, and t depends on rounding.
  IGB_HD bool ridge_would_decide() const {
    for (int i = 0; i < tasks_; ++i) {
      const double pivot = buffers_.matrix[i * tasks_ + i];
      if (!(pivot > 2.0 * stationary_ridge * buffers_.roots[i] * buffers_.roots[i])) return true;
    }
    return false;
  }

  IGB_HD void advance(double diagonal) {
    const double* y = buffers_.step;
    double highest = 0.0, lowest = 0.0;
    for (int i = 0; i < tasks_; ++i) {
      if (y[i] > highest) highest = y[i];
      if (y[i] < lowest) lowest = y[i];
    }
    // Where the Hessian changes little along the step it needs no search. Where p < 1 and a straight line would soon
    // leave x > 0, one task alone would shorten the step of all: a curve lets each go as far as its own equation says.
    double length = 1.0;
    if ((1.0 + terms_.exponent()) * fmax(highest, -lowest) > 0.5) {
      if (terms_.below_one && lowest < -0.5 && advance_along_curve(diagonal)) return;
      length = step_length(lowest);
    }
    for (int i = team_.lane(); i < tasks_; i += team_.width())
      if (norms_.is_active(i)) buffers_.x[i] = fmax(smallest, buffers_.x[i] * (1.0 + length * y[i]));
    team_.sync();
  }

  // x := x (1 + h y) where y >= 0, else x (1 - p h y)^(-1/p), which solves x^p (C t) = r for a C t that stays as it is.
  // False, with x as it was, if three lengths h all go beyond the objective's minimum.
  IGB_HD bool advance_along_curve(double diagonal) {
    const double* y = buffers_.step;
    const double limit = 0.1 * fabs(slope_at_origin());
    team_.sync();
    for (int i = team_.lane(); i < tasks_; i += team_.width()) buffers_.origin[i] = buffers_.x[i];
    for (double h = 1.0; h > 0.05; h *= 0.3) {
      for (int i = team_.lane(); i < tasks_; i += team_.width())
        if (norms_.is_active(i))
          buffers_.x[i] = fmax(smallest, buffers_.origin[i] * (y[i] < 0.0 ? terms_.shrink(h * y[i]) : 1.0 + h * y[i]));
      team_.sync();
      evaluate(diagonal);
      double slope = 0.0;
      for (int i = 0; i < tasks_; ++i)
        slope += share(i) * share(i) * (buffers_.fit[i] - 1.0) * y[i] /
                 (y[i] < 0.0 ? 1.0 - terms_.exponent() * h * y[i] : 1.0 + h * y[i]);
      team_.sync();
      if (slope <= limit) return true;
    }
    for (int i = team_.lane(); i < tasks_; i += team_.width()) buffers_.x[i] = buffers_.origin[i];
    team_.sync();
    evaluate(diagonal);
    return false;
  }

  IGB_HD double slope_at_origin() const {
    double slope = 0.0;
    for (int i = 0; i < tasks_; ++i) slope -= share(i) * share(i) * (1.0 - buffers_.fit[i]) * buffers_.step[i];
    return slope;
  }

  // Where the objective's slope along the straight step is a tenth of the first, by Newton's method inside a bracket,
  // O(K) an evaluation: with b = s^2 the slope at h is
  //   sum_i b_i fit_i y_i + h y'TCTy - sum_i b_i y_i / (1 + h y_i)^p,   y'TCTy = sum_i b_i (1 - fit_i) y_i - p b_i y_i^2.
  IGB_HD double step_length(double lowest) const {
    const double* y = buffers_.step;
    const double p = terms_.exponent();
    double fit_slope = 0.0, bend = 0.0;
    for (int i = 0; i < tasks_; ++i) {
      const double weighted = share(i) * share(i) * y[i];
      fit_slope += weighted * buffers_.fit[i];
      bend += weighted * (1.0 - buffers_.fit[i] - p * y[i]);
    }
    bend = fmax(bend, 0.0);
    const double enough = 0.1 * fabs(slope_at_origin());
    double low = 0.0, high = lowest < 0.0 ? -1.0 / lowest : INFINITY;  // where x reaches 0
    double h = high > 1.0 ? 1.0 : 0.5 * high;
    for (int evaluation = 0; evaluation < 24; ++evaluation) {
      double slope = fit_slope + h * bend, curvature = bend;
      for (int i = 0; i < tasks_; ++i) {
        const double grown = 1.0 + h * y[i];
        const double term = share(i) * share(i) * y[i] / terms_.power(grown);
        slope -= term;
        curvature += p * term * y[i] / grown;
      }
      if (fabs(slope) <= enough) break;
      (slope > 0.0 ? high : low) = h;
      const double newton = h - slope / curvature, farthest = 10.0 * h;
      const double middle = 0.5 * (low + high);
      h = newton > low && newton < high && newton < farthest ? newton : fmin(middle, farthest);
    }
    return h;
  }

  const int tasks_;
  const Norms& norms_;
  const Terms terms_;
  const NewtonBuffers buffers_;
  const Team& team_;
};

// The factor that shortens an update to max_norm (0: 1); lengths are w_k |g_k|, scratch takes K doubles.
template <class Team>
IGB_HD double clip_factor(int tasks, double max_norm, const double* cosines, const double* lengths, double* scratch,
                          const Team& team) {
  if (!(max_norm > 0.0)) return 1.0;
  for (int i = team.lane(); i < tasks; i += team.width())
    scratch[i] = lengths[i] * multiply_row(tasks, cosines, 1.0, lengths, i).value;
  team.sync();
  double square = 0.0;
  for (int i = 0; i < tasks; ++i) square += scratch[i];
  const double length = sqrt(fmax(square, 0.0));
  return length > max_norm ? max_norm / length : 1.0;
}

}  // namespace igb
