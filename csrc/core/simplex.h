// Two ways onto the simplex.
#pragma once

#include "linalg.h"

namespace igb {

// values := argmin_{w >= 0, sum w = 1} |w - values|, by Michelot's algorithm: the shift for the entries that are still
// positive under the last one, until none drops out. Every lane goes through all entries, in order.
template <class Team>
IGB_HD void project_on_simplex(int n, double* values, const Team& team) {
  double shift = -INFINITY;
  for (int kept = 0;;) {
    double sum = 0.0;
    int count = 0;
    for (int i = 0; i < n; ++i)
      if (values[i] > shift) {
        sum += values[i];
        ++count;
      }
    if (count == kept || count == 0) break;
    kept = count;
    shift = (sum - 1.0) / count;
  }
  team.sync();  // every lane has read the values
  for (int i = team.lane(); i < n; i += team.width()) values[i] = fmax(values[i] - shift, 0.0);
  team.sync();
}

// values := total softmax(values), where exp cannot overflow.
template <class Team>
IGB_HD void softmax(int n, double* values, double total, const Team& team) {
  double largest = values[0];
  for (int i = 1; i < n; ++i) largest = fmax(largest, values[i]);
  team.sync();
  for (int i = team.lane(); i < n; i += team.width()) values[i] = exp(values[i] - largest);
  team.sync();
  double sum = 0.0;
  for (int i = 0; i < n; ++i) sum += values[i];
  team.sync();
  for (int i = team.lane(); i < n; i += team.width()) values[i] *= total / sum;
  team.sync();
}

}  // namespace igb
