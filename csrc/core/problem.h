// The input of every solver.
#pragma once

namespace igb {

struct Problem {
  int tasks;              // K >= 1
  const double* gram;     // K x K, row-major, if full; else the K squared norms, its diagonal
  bool full;
  const double* losses;   // K, or nullptr where the method needs none
  const double* options;  // indexed by the solver's Option enum
  double* state;          // the solver's state; updated only when the step is finite
};

}  // namespace igb
