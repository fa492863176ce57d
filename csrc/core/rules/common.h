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

// Keeps what may overflow finite: of quotients that go into a softmax.
IGB_HD inline double bounded(double value) { return fmin(1e300, fmax(-1e300, value)); }

// log(loss / reference), where both count as at least tiny_loss.
IGB_HD inline double log_ratio(double loss, double reference) {
  return log(fmin(1e300, fmax(1e-300, fmax(loss, tiny_loss) / fmax(reference, tiny_loss))));
}

// The gradient of a parameter that counts as at most `bound` in magnitude: beyond, none that leads further out.
IGB_HD inline double inward(double parameter, double bound, double gradient) {
  const bool outward = (parameter >= bound && gradient < 0.0) || (parameter <= -bound && gradient > 0.0);
  return outward ? 0.0 : gradient;
}

}  // namespace igb
