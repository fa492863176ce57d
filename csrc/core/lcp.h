// The linear complementarity problem of the matrix C of cosines, positive semidefinite and possibly singular:
//   z >= 0,   y = C z + q >= 0,   z_i y_i = 0,     that is   min 1/2 z'Cz + q'z,  z >= 0,   with  q = C v + level h.
//
// An active-set method on a tableau: with F the tasks whose z is free to be positive, sweeping C on F gives
//   [ -C_FF^-1   C_FF^-1 C_FN               ]
//   [    .       C_NN - C_NF C_FF^-1 C_FN   ],
// so that column r is the way of z_F and y_N while z_r grows. The most violated r is driven until y_r = 0; what reaches
// z_j = 0 before leaves F. Every such move lowers the objective: no set F comes back. To change F by one task is one
// symmetric rank-1 update, K^2 / 2 independent multiplications, and no factorisation is ever needed. What the moves lose
// to rounding is regained at the end from C itself, which stays as it was below the tableau.
//
// If u_r is dependent on those of F, z_r grows along a null vector of C until some z_j blocks, and r takes its place. If
// none blocks, that null vector is nonnegative: a ray, and the objective has no minimum unless q is in the range of C.
#pragma once

#include "gramian.h"

namespace igb {

template <class Team>
class Lcp {
 public:
  enum class Outcome { solved, ray, iteration_cap };

  IGB_HD static std::int32_t status_of(Outcome outcome) {
    return outcome == Outcome::ray ? pareto_stationary : outcome == Outcome::iteration_cap ? iteration_cap : 0;
  }

  IGB_HD static constexpr int workspace_size(int tasks) { return tasks * tasks + 8 * tasks; }

  // z, v, h and the level are 0 until set; those of inactive tasks must stay 0.
  IGB_HD Lcp(const Problem& problem, const Norms& norms, double* workspace, const Team& team)
      : z(workspace),
        v(z + problem.tasks),
        h(v + problem.tasks),
        tasks_(problem.tasks),
        rounding_(16.0 * problem.tasks * machine_epsilon),
        y_(h + problem.tasks),
        scale_(y_ + problem.tasks),
        slope_(scale_ + problem.tasks),
        free_(slope_ + problem.tasks),
        column_(free_ + problem.tasks),
        matrix_(column_ + problem.tasks),
        team_(team) {
    for (int i = team.lane(); i < tasks_; i += team.width()) v[i] = h[i] = 0.0;
    store_cosines(problem, norms, matrix_, team);
  }

  double* z;
  double* v;
  double* h;
  double level = 0.0;

  IGB_HD double cosine(int i, int j) const {
    return j < i ? matrix_[i * tasks_ + j] : j > i ? matrix_[j * tasks_ + i] : 1.0;
  }

  // h = -min(n) / n: a level is then the g_k . d that every task is to have, in units of min(n).
  IGB_HD void demand_equally(const Norms& norms) {
    double smallest = norms.largest;
    for (int i = 0; i < tasks_; ++i)
      if (norms.is_active(i)) smallest = fmin(smallest, norms.values[i]);
    for (int i = team_.lane(); i < tasks_; i += team_.width())
      h[i] = norms.is_active(i) ? -(smallest / norms.values[i]) : 0.0;
    team_.sync();
  }

  // Forgets z and F; then y = C v + level h. With a ridge, C + ridge I stands for C, on z.
  IGB_HD void reset(double ridge = 0.0) {
    ridge_ = ridge;
    moves_left_ = most_moves();
    team_.sync();
    for (int i = team_.lane(); i < tasks_; i += team_.width()) z[i] = free_[i] = 0.0;
    team_.sync();
    rebuild();
    evaluate();
  }

  IGB_HD int moves() const { return most_moves() - moves_left_; }  // since then

  // Minimises from the current z and F on. After a ray, follow_ray() may be called.
  IGB_HD Outcome settle() {
    for (; moves_left_ > 0; --moves_left_) {
      const int entering = most_violated();
      if (entering < 0) {
        if (correct()) return Outcome::solved;
      } else if (!drive(entering)) {
        ray_ = entering;
        return Outcome::ray;
      }
    }
    return Outcome::iteration_cap;
  }

  // Makes z the nonnegative null vector of C that a ray has found. For v = 0.
  IGB_HD void follow_ray() {
    team_.sync();
    level = 0.0;
    for (int i = team_.lane(); i < tasks_; i += team_.width())
      z[i] = i == ray_ ? 1.0 : is_free(i) ? fmax(-column_[i], 0.0) : 0.0;
    team_.sync();
    for (int round = 0; round < 3; ++round) correct();
  }

  // The minimum for q in the range of C, which exists. If rounding has made C indefinite, a ridge that is as large decides.
  IGB_HD std::int32_t solve() {
    reset();
    if (settle() == Outcome::solved) return 0;
    for (double ridge = 1e-12; ridge < 32.0 * tasks_; ridge *= 32.0) {
      reset(ridge);
      if (settle() == Outcome::solved) return pareto_stationary;
    }
    return pareto_stationary | iteration_cap;
  }

  // x'Cx
  IGB_HD double length_squared(const double* x) {
    for (int i = team_.lane(); i < tasks_; i += team_.width())
      column_[i] = x[i] * multiply_row(tasks_, matrix_, 1.0, x, i).value;
    team_.sync();
    double sum = 0.0;
    for (int i = 0; i < tasks_; ++i) sum += column_[i];
    team_.sync();
    return fmax(sum, 0.0);
  }

  // x'Cx for x >= 0 is 0 to rounding: the nonnegative combination vanishes.
  IGB_HD bool vanishes(const double* x) {
    double sum = 0.0;
    for (int i = 0; i < tasks_; ++i) sum += x[i];
    return !(length_squared(x) > rounding_ * sum * sum);
  }

  // Raises the level, for h <= 0, from the highest that z = 0 solves until z'Cz is the square of a radius, exactly: between
  // changes of F, z is linear in the level. Ray: no higher level has a solution. Call reset() before.
  IGB_HD Outcome raise_level(double radius_squared) {
    start_level();
    Outcome outcome = climb(radius_squared);
    for (int round = 0; round < 8; ++round) {  // the climb's rounding, and what it may have got wrong
      const Outcome settled = settle();
      if (settled != Outcome::solved) return settled;
      if (outcome == Outcome::ray) return outcome;
      const double length = length_squared(z);
      if (fabs(length - radius_squared) <= rounding_ * radius_squared) break;
      move_level(step_over(radius_squared - length, growth()));
    }
    return outcome;
  }

 private:
  IGB_HD int most_moves() const { return 8 * tasks_ + 32; }
  IGB_HD double* row(int i) const { return matrix_ + i * tasks_; }
  IGB_HD double& tableau(int i, int j) const { return i < j ? row(i)[j] : row(j)[i]; }
  IGB_HD bool is_free(int i) const { return free_[i] != 0.0; }

  // y and the size of its rounding errors, from the cosines.
  IGB_HD void evaluate() {
    for (int i = team_.lane(); i < tasks_; i += team_.width()) column_[i] = v[i] + z[i];
    team_.sync();
    for (int i = team_.lane(); i < tasks_; i += team_.width()) {
      const RowProduct product = multiply_row(tasks_, matrix_, 1.0, column_, i);
      y_[i] = product.value + ridge_ * z[i] + level * h[i];
      scale_[i] = product.magnitude + ridge_ * z[i] + fabs(level * h[i]);
    }
    team_.sync();
  }

  IGB_HD int most_violated() const {
    int worst = -1;
    for (int i = 0; i < tasks_; ++i)
      if (!is_free(i) && y_[i] < -rounding_ * scale_[i] && (worst < 0 || y_[i] < y_[worst])) worst = i;
    team_.sync();
    return worst;
  }

  // The free task that comes to z = 0 first while z moves by -t times the direction; -1: none.
  IGB_HD int first_blocking(const double* direction, double smallest) const {
    int first = -1;
    for (int i = 0; i < tasks_; ++i)
      if (is_free(i) && direction[i] > smallest &&
          (first < 0 || z[i] * direction[first] < z[first] * direction[i]))
        first = i;
    return first;
  }

  // False: z_r can grow forever, and the column of r is in column_.
  IGB_HD bool drive(int r) {
    for (;;) {
      const double curvature = load_column(r);
      const bool dependent = !(curvature > rounding_);
      const double full = dependent ? INFINITY : fmax(-y_[r], 0.0) / curvature;
      const int blocking = first_blocking(column_, dependent ? null_vector_rounding : 0.0);
      if (dependent && blocking < 0) return false;
      const double least = blocking < 0 ? INFINITY : z[blocking] / column_[blocking];
      const bool arrives = full <= least;
      const double step = arrives ? full : least;
      team_.sync();

      for (int i = team_.lane(); i < tasks_; i += team_.width()) {
        const double change = step * column_[i];
        if (i == r) {
          z[i] += step;
          y_[i] = arrives ? 0.0 : y_[i] + step * curvature;
        } else if (is_free(i)) {
          z[i] = fmax(z[i] - change, 0.0);
        } else {
          y_[i] += change;
          scale_[i] += fabs(change);
        }
      }
      team_.sync();
      if (arrives) {
        sweep(r, curvature, true);
        return true;
      }
      release(blocking);
    }
  }

  // Newton's step on F from the true residual; true if nothing is violated beyond rounding.
  IGB_HD bool correct() {
    evaluate();
    bool exact = true;
    for (int i = 0; i < tasks_; ++i) exact &= !is_free(i) || fabs(y_[i]) <= rounding_ * scale_[i];
    if (exact) return most_violated() < 0;
    for (int i = team_.lane(); i < tasks_; i += team_.width()) {
      double change = 0.0;
      for (int j = 0; j < tasks_; ++j)
        if (is_free(j)) change -= tableau(i, j) * y_[j];
      column_[i] = change;  // z_F - C_FF^-1 y_F, y_N - C_NF C_FF^-1 y_F
    }
    team_.sync();
    const int blocking = first_blocking(column_, 0.0);
    const bool blocked = blocking >= 0 && z[blocking] < column_[blocking];
    const double step = blocked ? z[blocking] / column_[blocking] : 1.0;
    team_.sync();
    for (int i = team_.lane(); i < tasks_; i += team_.width()) {
      if (is_free(i)) z[i] = fmax(z[i] - step * column_[i], 0.0);
      else y_[i] += step * column_[i];
    }
    team_.sync();
    if (blocked) release(blocking);
    return false;
  }

  // ---- the tableau ----------------------------------------------------------------------------------------------------

  // Column k with 0 in place of its pivot, which is returned. Ends with a sync.
  IGB_HD double load_column(int k) const {
    const double pivot = row(k)[k];
    for (int i = team_.lane(); i < tasks_; i += team_.width()) column_[i] = i == k ? 0.0 : tableau(i, k);
    team_.sync();
    return pivot;
  }

  // Takes k, whose column is loaded, into F or out of it.
  IGB_HD void sweep(int k, double pivot, bool enters) {
    const double inverse = 1.0 / pivot, slope = slope_[k];
    team_.sync();
    int columns = 1;  // the lanes form a rectangle, so that several rows are under way at once
    while (columns * columns < team_.width()) columns *= 2;
    const int rows = team_.width() / columns;
    for (int i = team_.lane() / columns; i < tasks_; i += rows) {
      const double factor = column_[i] * inverse;
      if (factor == 0.0) continue;
      for (int j = i + team_.lane() % columns; j < tasks_; j += columns) row(i)[j] -= factor * column_[j];
    }
    team_.sync();
    const double sign = enters ? inverse : -inverse;
    for (int i = team_.lane(); i < tasks_; i += team_.width()) {
      if (i == k) {
        row(k)[k] = -inverse;
        slope_[k] = slope * sign;
        free_[k] = enters ? 1.0 : 0.0;
      } else {
        tableau(i, k) = column_[i] * sign;
        slope_[i] -= column_[i] * inverse * slope;
      }
    }
    team_.sync();
  }

  // Takes k out of F. From an ill-conditioned C_FF that would leave errors behind; then the tableau is made anew.
  IGB_HD void release(int k) {
    bool ill_conditioned = false;
    for (int i = 0; i < tasks_; ++i) ill_conditioned |= is_free(i) && row(i)[i] < -largest_inverse;
    team_.sync();
    if (team_.lane() == 0) {
      z[k] = 0.0;  // which rounding may have missed
      if (ill_conditioned) free_[k] = 0.0;
    }
    team_.sync();
    if (ill_conditioned) {
      rebuild();
    } else {
      const double pivot = load_column(k);
      sweep(k, pivot, false);
    }
  }

  IGB_HD void rebuild() {
    for (int i = 0; i < tasks_; ++i)
      for (int j = i + team_.lane(); j < tasks_; j += team_.width())
        row(i)[j] = i == j ? 1.0 + ridge_ : row(j)[i];
    for (int i = team_.lane(); i < tasks_; i += team_.width()) slope_[i] = h[i];
    team_.sync();
    for (int k = 0; k < tasks_; ++k)
      if (is_free(k)) {
        const double pivot = load_column(k);
        if (pivot > rounding_) sweep(k, pivot, true);
        else if (k % team_.width() == team_.lane()) z[k] = free_[k] = 0.0;
      }
    team_.sync();
  }

  // ---- the level ------------------------------------------------------------------------------------------------------

  IGB_HD void start_level() {
    double highest = INFINITY;
    for (int i = 0; i < tasks_; ++i)
      if (h[i] < 0.0) highest = fmin(highest, y_[i] / -h[i]);
    team_.sync();
    level = highest;
    for (int i = team_.lane(); i < tasks_; i += team_.width()) {
      y_[i] = fmax(y_[i] + level * h[i], 0.0);
      scale_[i] += fabs(level * h[i]);
    }
    team_.sync();
  }

  // z'Cz while the level goes by t on the current F: with z_F - t slope_F it grows by 2 t linear + t^2 quadratic.
  struct Growth {
    double linear, quadratic;
  };

  IGB_HD Growth growth() const {
    Growth growth{0.0, 0.0};
    for (int i = 0; i < tasks_; ++i)
      if (is_free(i)) {
        growth.linear -= z[i] * h[i];
        growth.quadratic += h[i] * slope_[i];
      }
    return growth;
  }

  // The t of the least size for which it grows by the gap.
  IGB_HD static double step_over(double gap, const Growth& growth) {
    const double discriminant = growth.linear * growth.linear + growth.quadratic * gap;
    return gap / (growth.linear + sqrt(fmax(discriminant, 0.0)));
  }

  IGB_HD void move_level(double step) {
    team_.sync();
    level += step;
    for (int i = team_.lane(); i < tasks_; i += team_.width()) {
      if (is_free(i)) {
        z[i] = fmax(z[i] - step * slope_[i], 0.0);
      } else {
        y_[i] += step * slope_[i];
        scale_[i] += fabs(step * slope_[i]);
      }
    }
    team_.sync();
  }

  IGB_HD Outcome climb(double radius_squared) {
    double length = 0.0;
    for (; moves_left_ > 0; --moves_left_) {
      const Growth along = growth();
      const double to_ball = step_over(radius_squared - length, along);
      // The first task whose y comes to 0, beyond rounding of its slope (which starts as h).
      int entering = -1;
      for (int i = 0; i < tasks_; ++i)
        if (!is_free(i) && slope_[i] < -rounding_ * (fabs(h[i]) + fabs(slope_[i] - h[i])) &&
            (entering < 0 || fmax(y_[i], 0.0) * slope_[entering] > fmax(y_[entering], 0.0) * slope_[i]))
          entering = i;
      const int blocking = first_blocking(slope_, 0.0);
      const double to_entering = entering < 0 ? INFINITY : fmax(y_[entering], 0.0) / -slope_[entering];
      const double to_blocking = blocking < 0 ? INFINITY : z[blocking] / slope_[blocking];
      const double step = fmin(to_ball, fmin(to_entering, to_blocking));
      length += step * (2.0 * along.linear + step * along.quadratic);
      move_level(step);
      if (step == to_ball) return Outcome::solved;
      if (step == to_blocking) release(blocking);
      else if (!drive(entering)) return Outcome::ray;
    }
    return Outcome::iteration_cap;
  }

  static constexpr double null_vector_rounding = 1e-10;
  static constexpr double largest_inverse = 64.0;

  int tasks_, moves_left_ = 0, ray_ = -1;
  double rounding_, ridge_ = 0.0;
  double *y_, *scale_, *slope_, *free_, *column_, *matrix_;
  const Team& team_;
};

}  // namespace igb
