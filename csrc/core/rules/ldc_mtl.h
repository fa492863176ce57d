// Loss discrepancy control (Xiao et al., 2025, arXiv:2502.08585): with losses x_k in some common unit and a learned router
// s = s(p), the tasks' weighted losses are summed, and kept close to each other:
//   sum_k s_k x_k / S + lamb sum_(pairs i, j) |t_i x_i - t_j x_j|,      t = s or 1.
#pragma once

#include "common.h"

namespace igb {

struct LdcMtl {
  enum Option { form, router, all_pairs, lamb, option_count };
  // x is log(L / L0), L, L min(L0) / L0, or L. S is the sum of s, which is differentiated in `ratios` alone; in `plain` S
  // and t are 1.
  enum Form { logs, raw, ratios, plain };
  enum Router { sigmoid, sigmoid_relu, clamped_softmax };
  IGB_HD static constexpr int per_task_size(int tasks) { return 2 * tasks; }  // p, and L0: this step's L while it is NaN
  IGB_HD static constexpr int state_size(int tasks) { return 2 * tasks; }     // the gradient of p, and room
  IGB_HD static std::int32_t check(const LossProblem& problem) {
    if (!all_finite(problem.tasks, problem.per_task)) return non_finite;
    return is(problem, form, logs) && any_below(problem.tasks, problem.losses, 0.0) ? non_positive_loss : 0;
  }

  template <class Team>
  IGB_HD static std::int32_t scale(const LossProblem& problem, double* scales, const Team& team) {
    const int tasks = problem.tasks;
    const bool weighs = !is(problem, form, plain), differentiates = is(problem, form, ratios);
    const Units units(problem);
    double *gradient = problem.state, *compared = problem.state + tasks;

    route(problem, scales, team);
    double total = 0.0, sum = 0.0;
    for (int i = 0; i < tasks; ++i) {
      total += scales[i];
      sum += scales[i] * units.value(i);
    }
    if (!weighs) total = 1.0;
    for (int i = team.lane(); i < tasks; i += team.width()) compared[i] = (weighs ? scales[i] : 1.0) * units.value(i);
    team.sync();

    for (int i = team.lane(); i < tasks; i += team.width()) {
      const double x = units.value(i), pull = problem.options[lamb] * discrepancy(problem, compared, i);
      gradient[i] = x / total + (weighs ? pull * x : 0.0) - (differentiates ? sum / (total * total) : 0.0);  // of s
      scales[i] = (scales[i] / total + pull * (weighs ? scales[i] : 1.0)) * units.slope(i);
    }
    team.sync();
    route_back(problem, gradient, compared, team);
    return 0;
  }

 private:
  IGB_HD static bool is(const LossProblem& problem, Option option, int value) { return problem.options[option] == value; }

  // The losses x in their common unit.
  class Units {
   public:
    IGB_HD explicit Units(const LossProblem& problem)
        : problem_(problem), logs_(is(problem, form, logs)), ratios_(is(problem, form, ratios)), smallest_(initial(0)) {
      for (int i = 1; i < problem.tasks; ++i) smallest_ = fmin(smallest_, initial(i));
    }
    IGB_HD double value(int i) const {
      return logs_ ? log_ratio(problem_.losses[i], initial(i)) : problem_.losses[i] * slope(i);
    }
    IGB_HD double slope(int i) const {
      return logs_ ? 1.0 / fmax(problem_.losses[i], tiny_loss) : ratios_ ? smallest_ / initial(i) : 1.0;
    }

   private:
    IGB_HD double initial(int i) const {
      const double known = problem_.per_task[problem_.tasks + i];
      return fmax(known == known ? known : problem_.losses[i], tiny_loss);
    }
    const LossProblem& problem_;
    bool logs_, ratios_;
    double smallest_;
  };

  // d/dx_i of the sum over neighbours, or of the mean of that sum over all orders of the tasks.
  IGB_HD static double discrepancy(const LossProblem& problem, const double* x, int i) {
    const int tasks = problem.tasks;
    double sum = 0.0;
    if (problem.options[all_pairs] != 0.0) {
      for (int j = 0; j < tasks; ++j) sum += sign(x[i] - x[j]);
      return 2.0 * sum / tasks;
    }
    if (i > 0) sum += sign(x[i] - x[i - 1]);
    if (i + 1 < tasks) sum += sign(x[i] - x[i + 1]);
    return sum;
  }
  IGB_HD static double sign(double value) { return double(value > 0.0) - double(value < 0.0); }

  static constexpr double least = 0.2, most = 0.8;  // of a clamped softmax
  IGB_HD static bool inside(double share) { return least <= share && share <= most; }

  IGB_HD static double bound(const LossProblem& problem, double p) {  // so that no sigmoid vanishes
    return fmin(largest_log_scale, fmax(is(problem, router, sigmoid_relu) ? 0.0 : -largest_log_scale, p));
  }

  template <class Team>
  IGB_HD static void route(const LossProblem& problem, double* routed, const Team& team) {
    const bool shares = is(problem, router, clamped_softmax);
    for (int i = team.lane(); i < problem.tasks; i += team.width()) {
      const double p = problem.per_task[i];
      routed[i] = shares ? p : 1.0 / (1.0 + exp(-bound(problem, p)));
    }
    team.sync();
    if (!shares) return;
    softmax(problem.tasks, routed, 1.0, team);
    for (int i = team.lane(); i < problem.tasks; i += team.width()) routed[i] = fmin(most, fmax(least, routed[i]));
    team.sync();
  }

  // gradient := that of p, from that of s.
  template <class Team>
  IGB_HD static void route_back(const LossProblem& problem, double* gradient, double* room, const Team& team) {
    const int tasks = problem.tasks;
    const double* p = problem.per_task;
    if (!is(problem, router, clamped_softmax)) {
      for (int i = team.lane(); i < tasks; i += team.width()) {
        const double falling = exp(-fabs(bound(problem, p[i])));
        const double slope = falling / ((1.0 + falling) * (1.0 + falling));
        const bool cut = is(problem, router, sigmoid_relu) && p[i] <= 0.0;
        gradient[i] = cut ? 0.0 : inward(p[i], largest_log_scale, slope * gradient[i]);
      }
      team.sync();
      return;
    }
    for (int i = team.lane(); i < tasks; i += team.width()) room[i] = p[i];
    team.sync();
    softmax(tasks, room, 1.0, team);
    double mean = 0.0;
    for (int i = 0; i < tasks; ++i) mean += inside(room[i]) ? room[i] * gradient[i] : 0.0;
    team.sync();
    for (int i = team.lane(); i < tasks; i += team.width())
      gradient[i] = room[i] * ((inside(room[i]) ? gradient[i] : 0.0) - mean);
    team.sync();
  }
};

}  // namespace igb
