// What a solve reports instead of throwing: bits that may be combined; 0 is an unremarkable solve.
#pragma once

#include <cstdint>

namespace igb {

enum Status : std::int32_t {
  non_finite = 1 << 0,         // NaN or inf in the inputs: every weight is NaN, the state is untouched
  zero_gradient = 1 << 1,      // a task has no gradient
  pareto_stationary = 1 << 2,  // the Gramian is singular: a ridge decided, or no update helps every task
  iteration_cap = 1 << 3,      // not converged; the weights are finite
  negative_sum = 1 << 4,       // IMTL-G: equal projections need weights of negative sum
  non_positive_loss = 1 << 5,  // a negative loss under a logarithm
  all_inactive = 1 << 6,       // no task has a gradient: neutral weights
};

}  // namespace igb
