// The input of every solver and of every loss-balancing rule.
#pragma once

namespace igb {

struct Problem {
  int tasks;               // K >= 1
  const double* gram;      // K x K, row-major, if full; else the K squared norms, its diagonal
  bool full;
  const double* losses;    // K, or nullptr where the method needs none
  const double* per_task;  // the method's own numbers for each task (per_task_size() of them), or nullptr
  const double* options;   // indexed by the solver's Option enum
  double* state;           // the solver's state; updated only when the step is finite
};

struct LossProblem {
  int tasks;               // K >= 1
  const double* losses;    // K
  const double* per_task;  // the rule's own numbers for each task (per_task_size() of them), or nullptr
  const double* options;   // indexed by the rule's Option enum
  double* state;           // the rule's state; updated only when there are scales
};

}  // namespace igb
