// From a Gramian to what solvers work on: the tasks' gradient norms and the matrix of their cosines.
#pragma once

#include <cstdint>

#include "linalg.h"
#include "problem.h"
#include "status.h"

namespace igb {

struct Norms {
  const double* values;  // K gradient norms; 0 marks an inactive task
  int active;            // number of nonzero values
  double largest;
  std::int32_t status;   // non_finite, zero_gradient, all_inactive

  IGB_HD bool is_active(int task) const { return values[task] > 0.0; }
};

// Reads the whole Gramian if the method needs it, else its diagonal. A norm <= inactive_ratio * largest becomes 0.
template <class Team>
IGB_HD Norms measure_norms(const Problem& problem, bool read_all, double inactive_ratio, double* values, const Team& team) {
  const int tasks = problem.tasks;
  const int stride = problem.full ? tasks : 0;
  for (int i = team.lane(); i < tasks; i += team.width()) {
    const double square = problem.gram[i * stride + i];
    bool finite = is_finite(square);
    if (read_all)
      for (int j = 0; j < tasks; ++j) finite &= is_finite(problem.gram[i * stride + j]);
    values[i] = finite ? sqrt(fmax(square, 0.0)) : NAN;
  }
  team.sync();

  Norms norms{values, 0, 0.0, 0};
  for (int i = 0; i < tasks; ++i) {
    if (!is_finite(values[i])) norms.status = non_finite;  // fmax would hide a NaN
    norms.largest = fmax(norms.largest, values[i]);
  }
  const double threshold = inactive_ratio * norms.largest;
  for (int i = 0; i < tasks; ++i)
    if (values[i] > threshold) ++norms.active;
  team.sync();  // every lane has read the values
  if (norms.status != 0) return norms;

  if (norms.active < tasks) norms.status |= zero_gradient;
  if (norms.active == 0) norms.status |= all_inactive;
  for (int i = team.lane(); i < tasks; i += team.width())
    if (!(values[i] > threshold)) values[i] = 0.0;
  team.sync();
  return norms;
}

// Of two active tasks; only the symmetric part of the Gramian is used.
IGB_HD inline double cosine(const Problem& problem, const Norms& norms, int i, int j) {
  const double product = 0.5 * problem.gram[i * problem.tasks + j] + 0.5 * problem.gram[j * problem.tasks + i];
  return fmin(1.0, fmax(-1.0, product / norms.values[i] / norms.values[j]));
}

// One K x K buffer holds the cosines below the diagonal and leaves the upper triangle to a factorisation. The unit
// diagonal is implied; to an inactive task every cosine is 0.
template <class Team>
IGB_HD void store_cosines(const Problem& problem, const Norms& norms, double* matrix, const Team& team) {
  const int tasks = problem.tasks;
  for (int i = 0; i < tasks; ++i)
    for (int j = team.lane(); j < i; j += team.width())
      matrix[i * tasks + j] = norms.is_active(i) && norms.is_active(j) ? cosine(problem, norms, i, j) : 0.0;
  team.sync();
}

struct RowProduct {
  double value;      // (C x)_i
  double magnitude;  // (|C| |x|)_i, the scale of its rounding error
};

// Row i of C x, where C has the stored cosines and the given diagonal.
IGB_HD inline RowProduct multiply_row(int tasks, const double* matrix, double diagonal, const double* x, int i) {
  RowProduct product{0.0, 0.0};
  for (int j = 0; j < tasks; ++j) {
    const double cosine = j < i ? matrix[i * tasks + j] : j > i ? matrix[j * tasks + i] : diagonal;
    const double term = cosine * x[j];
    product.value += term;
    product.magnitude += fabs(term);
  }
  return product;
}

}  // namespace igb
