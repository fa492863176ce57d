// What PCGrad and GradVac share: every gradient visits the others, one after another in an order of its own, and takes a
// multiple of each; the update is the sum of what the gradients become. On unit gradients u_k = g_k / n_k, gradient i is
// n_i c_i with c_i = sum_k x_ik u_k and x_i = e_i before the visits, so that
//   w_k = sum_i x_ik n_i / n_k.
// A multiple of u_j adds a row of the cosines to the inner products c_i . u_k: K operations for each visit.
//
// The orders are drawn anew in each step; or gradient i visits task k at the time per_task[i K + k].
#pragma once

#include "gramian.h"
#include "philox.h"
#include "rules/common.h"

namespace igb {

struct Visits {
  enum State { seed, step, state_count };  // the state of a method begins with these
  IGB_HD static constexpr int per_task_size(int tasks) { return tasks * tasks; }
  IGB_HD static constexpr int workspace_size(int tasks) { return 4 * tasks * tasks; }

  // `visitor.start(i)` gives what gradient i becomes: its visit(j, c_i . u_j) returns the multiple of u_j that c_i takes.
  // False, with nothing done, if the times of the visits are not finite. Advances the step.
  template <class Visitor, class Team>
  IGB_HD static bool weigh(const Problem& problem, const Norms& norms, bool visits_itself, const Visitor& visitor,
                           double* weights, double* workspace, const Team& team) {
    const int tasks = problem.tasks, size = tasks * tasks;
    const double* times = problem.per_task;
    if (times != nullptr && !all_finite(size, times)) return false;
    double *cosines = workspace, *orders = cosines + size, *products = orders + size, *multiples = products + size;
    store_cosines(problem, norms, cosines, team);
    complete(norms, tasks, cosines, team);

    for (int i = team.lane(); i < tasks; i += team.width()) {
      double* order = orders + i * tasks;
      if (times != nullptr) order_by(tasks, times + i * tasks, order);
      else draw_order(tasks, std::uint64_t(problem.state[seed]), std::uint64_t(problem.state[step]), i, order);
      make_visits(tasks, i, visits_itself, order, cosines, products + i * tasks, multiples + i * tasks, visitor.start(i));
    }
    team.sync();
    for (int k = team.lane(); k < tasks; k += team.width()) {
      double weight = norms.active == 0 ? 1.0 : 0.0;
      if (norms.is_active(k))
        for (int i = 0; i < tasks; ++i) weight += multiples[i * tasks + k] * (norms.values[i] / norms.values[k]);
      weights[k] = weight;
    }
    if (team.lane() == 0) problem.state[step] += 1.0;
    team.sync();
    return true;
  }

 private:
  // Both triangles and the diagonal, so that every row is contiguous.
  template <class Team>
  IGB_HD static void complete(const Norms& norms, int tasks, double* cosines, const Team& team) {
    for (int i = 0; i < tasks; ++i)
      for (int j = i + team.lane(); j < tasks; j += team.width())
        cosines[i * tasks + j] = j > i ? cosines[j * tasks + i] : norms.is_active(i) ? 1.0 : 0.0;
    team.sync();
  }

  // By time; of equal times the lower number first.
  IGB_HD static void order_by(int tasks, const double* times, double* order) {
    for (int k = 0; k < tasks; ++k) {
      int rank = 0;
      for (int j = 0; j < tasks; ++j) rank += times[j] < times[k] || (times[j] == times[k] && j < k);
      order[rank] = k;
    }
  }

  // Fisher and Yates' shuffle. Gradient i draws the words of the streams i 2^32, i 2^32 + 1, ...; with at most 1024 tasks
  // a word of 32 bits favours none by more than 2^-22.
  IGB_HD static void draw_order(int tasks, std::uint64_t seed, std::uint64_t step, int i, double* order) {
    for (int k = 0; k < tasks; ++k) order[k] = k;
    Random4 random{};
    for (int t = 0; t + 1 < tasks; ++t) {
      if (t % 4 == 0) random = philox(seed, step, std::uint64_t(i) << 32 | std::uint64_t(t / 4));
      const int other = t + int(std::uint64_t(random.words[t % 4]) * std::uint64_t(tasks - t) >> 32);
      const double drawn = order[other];
      order[other] = order[t];
      order[t] = drawn;
    }
  }

  template <class Visit>
  IGB_HD static void make_visits(int tasks, int i, bool visits_itself, const double* order, const double* cosines,
                                 double* products, double* multiples, Visit gradient) {
    for (int k = 0; k < tasks; ++k) {
      products[k] = cosines[i * tasks + k];
      multiples[k] = 0.0;
    }
    for (int t = 0; t < tasks; ++t) {
      const int j = int(order[t]);
      if (j == i && !visits_itself) continue;
      const double multiple = gradient.visit(j, products[j]);
      if (multiple == 0.0) continue;
      multiples[j] = multiple;
      for (int k = 0; k < tasks; ++k) products[k] += multiple * cosines[j * tasks + k];
    }
    multiples[i] += 1.0;
  }
};

}  // namespace igb
