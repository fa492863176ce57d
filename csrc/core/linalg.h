// Small dense linear algebra for a team. Every function ends with its results visible to all lanes.
#pragma once

#include <math.h>

#include "platform.h"

namespace igb {

constexpr double machine_epsilon = 2.220446049250313e-16;

IGB_HD inline bool is_finite(double value) { return value - value == 0.0; }

template <class Team>
IGB_HD void fill(int n, double* out, double value, const Team& team) {
  for (int i = team.lane(); i < n; i += team.width()) out[i] = value;
  team.sync();
}

// M = L D L' in place, in the upper triangle of a row-major symmetric positive definite matrix: row k becomes D_k L(:,k)'.
// Square roots are not needed and a step costs one sync, because row k is final before step k reads it.
// False, with the triangle half done, if a pivot is not above smallest_pivot (or is NaN). Leaves the lower triangle alone.
template <class Team>
IGB_HD bool factorize(int n, double* matrix, double smallest_pivot, const Team& team) {
  // The lanes form a rectangle, so that several rows are under way at once.
  int columns = 1;
  while (columns * columns < team.width()) columns *= 2;
  const int rows = team.width() / columns;
  for (int k = 0; k < n; ++k) {
    const double* pivot_row = matrix + k * n;
    if (!(pivot_row[k] > smallest_pivot)) return false;
    const double inverse_pivot = 1.0 / pivot_row[k];
    for (int i = k + 1 + team.lane() / columns; i < n; i += rows) {
      const double factor = pivot_row[i] * inverse_pivot;
      double* row = matrix + i * n;
      for (int j = i + team.lane() % columns; j < n; j += columns) row[j] -= factor * pivot_row[j];
    }
    team.sync();
  }
  return true;
}

// x := M^-1 x for a matrix that factorize() accepted.
template <class Team>
IGB_HD void solve_factored(int n, const double* factor, double* x, const Team& team) {
  for (int k = 0; k < n; ++k) {
    const double pivot_value = x[k] / factor[k * n + k];
    for (int i = k + 1 + team.lane(); i < n; i += team.width()) x[i] -= factor[k * n + i] * pivot_value;
    team.sync();
  }
  for (int k = n - 1; k > 0; --k) {
    const double solved = x[k] / factor[k * n + k];
    for (int i = team.lane(); i < k; i += team.width()) x[i] -= factor[i * n + k] * solved;
    team.sync();
  }
  for (int i = team.lane(); i < n; i += team.width()) x[i] /= factor[i * n + i];
  team.sync();
}

// The rotation by the angle with this tangent; by the negative tangent it is undone.
struct Rotation {
  double c, s;

  IGB_HD explicit Rotation(double tangent) : c(1.0 / sqrt(1.0 + tangent * tangent)), s(c * tangent) {}
  IGB_HD void apply(double& a, double& b) const {
    const double kept = a;
    a = c * kept + s * b;
    b = c * b - s * kept;
  }
};

}  // namespace igb
