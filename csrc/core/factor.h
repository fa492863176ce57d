// The cosines' Cholesky factor with pivoting, made square where they are singular: what is needed to take pseudo-inverses
// and square roots of a scaled Gramian D C D to the precision of C, however different the scales D are.
#pragma once

#include "gramian.h"

namespace igb {

// K vectors x_k, at k * K, with x_i . x_j = (D C D)_ij of the tasks order[i] and order[j]. The first `rank` are a basis:
// x_k has entries 0 .. k and a positive last one. The others depend on them and, folded, have become 0.
struct CosineFactor {
  double* vectors;  // K x K
  double* order;    // K task numbers
  double* left;     // K: what of the squared unit gradient the basis does not span
  int rank;

  IGB_HD int task(int position) const { return static_cast<int>(order[position]); }
};

IGB_HD constexpr int factor_size(int tasks) { return tasks * tasks + 2 * tasks; }  // in doubles

// scales are D's diagonal, nullptr for ones. The longest remaining vector comes first, as long as more than rounding is
// left of its unit gradient.
template <class Team>
IGB_HD CosineFactor factor_cosines(const Problem& problem, const Norms& norms, const double* scales, double* workspace,
                                   const Team& team) {
  const int tasks = problem.tasks;
  const double rounding = 16.0 * tasks * machine_epsilon;
  CosineFactor factor{workspace, workspace + tasks * tasks, workspace + tasks * tasks + tasks, 0};
  for (int i = team.lane(); i < tasks; i += team.width()) {
    factor.order[i] = i;
    factor.left[i] = norms.is_active(i) ? 1.0 : 0.0;
    for (int m = 0; m < tasks; ++m) factor.vectors[i * tasks + m] = 0.0;
  }
  team.sync();
  for (int k = 0; k < tasks; ++k) {
    int pivot = -1;
    double longest = 0.0;
    for (int i = k; i < tasks; ++i) {
      const double scale = scales == nullptr ? 1.0 : scales[factor.task(i)];
      const double length = scale * sqrt(factor.left[i]);
      if (factor.left[i] > rounding && length > longest) {
        longest = length;
        pivot = i;
      }
    }
    if (pivot < 0) break;
    const int chosen = factor.task(pivot), displaced = factor.task(k);
    const double last = sqrt(factor.left[pivot]), left_of_displaced = factor.left[k];
    team.sync();  // every lane has read what the next lines exchange
    if (team.lane() == 0) {
      factor.order[pivot] = displaced;
      factor.order[k] = chosen;
      factor.left[pivot] = left_of_displaced;
    }
    double* x = factor.vectors + k * tasks;
    for (int m = team.lane(); m < k; m += team.width()) {
      double* other = factor.vectors + pivot * tasks;
      const double kept = x[m];
      x[m] = other[m];
      other[m] = kept;
    }
    if (team.lane() == 0) x[k] = last;
    team.sync();
    for (int i = k + 1 + team.lane(); i < tasks; i += team.width()) {
      if (!norms.is_active(factor.task(i))) continue;
      double* row = factor.vectors + i * tasks;
      double entry = cosine(problem, norms, factor.task(i), chosen);
      for (int m = 0; m < k; ++m) entry -= row[m] * x[m];
      entry /= last;
      row[k] = entry;
      factor.left[i] = fmax(factor.left[i] - entry * entry, 0.0);
    }
    team.sync();
    factor.rank = k + 1;
  }
  if (scales != nullptr)
    for (int i = team.lane(); i < tasks; i += team.width())
      for (int m = 0; m < factor.rank; ++m) factor.vectors[i * tasks + m] *= scales[factor.task(i)];
  team.sync();
  return factor;
}

// Rotates each dependent vector into the basis until nothing is left of it, and the numbers p, by position, with them
// (nullptr: none). The rotations' tangents are kept in place of the entries.
template <class Team>
IGB_HD void fold(int tasks, const CosineFactor& factor, double* p, const Team& team) {
  for (int d = factor.rank; d < tasks; ++d) {
    double* dependent = factor.vectors + d * tasks;
    for (int k = factor.rank - 1; k >= 0; --k) {
      double* x = factor.vectors + k * tasks;
      const double tangent = dependent[k] / x[k];
      const Rotation rotation(tangent);
      team.sync();  // every lane has read the tangent
      for (int m = team.lane(); m <= k; m += team.width()) rotation.apply(x[m], dependent[m]);
      if (k % team.width() == team.lane()) dependent[k] = tangent;
      if (p != nullptr && team.lane() == 0) rotation.apply(p[k], p[d]);
      team.sync();
    }
  }
}

// Undoes fold()'s rotations on numbers w by position.
template <class Team>
IGB_HD void unfold(int tasks, const CosineFactor& factor, double* w, const Team& team) {
  if (team.lane() == 0)
    for (int d = tasks - 1; d >= factor.rank; --d)
      for (int k = 0; k < factor.rank; ++k) Rotation(-factor.vectors[d * tasks + k]).apply(w[k], w[d]);
  team.sync();
}

// From d to the y with sum_k y_k x_k = d over the basis, in place.
template <class Team>
IGB_HD void solve_basis(int tasks, const CosineFactor& factor, double* d, const Team& team) {
  for (int k = factor.rank - 1; k >= 0; --k) {
    const double* x = factor.vectors + k * tasks;
    const double y = d[k] / x[k];
    team.sync();
    for (int m = team.lane(); m < k; m += team.width()) d[m] -= y * x[m];
    if (k % team.width() == team.lane()) d[k] = y;
    team.sync();
  }
}

// From p to the z with x_k . z = p_k over the basis, in place.
template <class Team>
IGB_HD void solve_products(int tasks, const CosineFactor& factor, double* p, const Team& team) {
  for (int k = 0; k < factor.rank; ++k) {
    const double z = p[k] / factor.vectors[k * tasks + k];
    team.sync();
    for (int i = k + 1 + team.lane(); i < factor.rank; i += team.width()) p[i] -= z * factor.vectors[i * tasks + k];
    if (team.lane() == 0) p[k] = z;
    team.sync();
  }
}

}  // namespace igb
