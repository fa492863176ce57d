// What rules share.
#pragma once

#include "../linalg.h"
#include "../problem.h"
#include "../simplex.h"
#include "../status.h"

namespace igb {

constexpr double tiny_loss = 1e-20;      // a finished task's loss is clamped here
constexpr double largest_log_scale = 20;

IGB_HD inline bool all_finite(int n, const double* values) {
  for (int i = 0; i < n; ++i)
    if (!is_finite(values[i])) return false;
  return true;
}

IGB_HD inline bool any_nan(int n, const double* values) {
  for (int i = 0; i < n; ++i)
    if (values[i] != values[i]) return true;
  return false;
}

IGB_HD inline bool any_below(int n, const double* values, double bound) {
  for (int i = 0; i < n; ++i)
    if (values[i] < bound) return true;
  return false;
}

}  // namespace igb
