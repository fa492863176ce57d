// The streaming operations over a whole table of tensors: chunks, threads, and sums in a fixed order.
//
// Sums are formed per chunk (in the accumulator's precision), per block of chunks and over blocks (in double).
// Chunks and blocks depend on the sizes alone, so the result has the same bits for every number of threads.
#pragma once
#include "../core/tensor_table.h"

namespace igb::cpu {

constexpr int kMaxTasks = 1024;

// gram: K×K, row-major, symmetric.
void gram(const TensorTable& grads, double* gram, int threads);

// norms: K sums of squares.
void sq_norms(const TensorTable& grads, double* norms, int threads);

// out = decay * state + (1 - decay) * scales[k] * grads, where out has an entry, and the K sums of squares of out, in one
// pass. out and state hold accumulators of the grads' dtypes; missing entries of state and grads count as zeros. Null
// scales are ones.
void ema(const TensorTable& out, const TensorTable& state, const TensorTable& grads, double decay, const double* scales,
         double* norms, int threads);

// out = state + grads^2, and excess[k] = the sum of grads^2 / sqrt(out + eps) over row k, in one pass. All else as for ema.
void accumulate_squares(const TensorTable& out, const TensorTable& state, const TensorTable& grads, double eps,
                        double* excess, int threads);

// out (+)= sum_k weights[k] * grads[k]. out has one row and no missing entries.
void combine(const TensorTable& out, const TensorTable& grads, const double* weights, bool accumulate, int threads);

// GradDrop: out = in each element the sum of the grads of one sign, drawn in proportion to the sums of either sign, plus
// leaks[k] (null: 0) times the others. Returns the sum of squares of out in *norm. The numbers drawn follow from seed,
// step, column and element alone. out as in combine; it is NaN where a gradient is not finite.
void sign_drop(const TensorTable& out, const TensorTable& grads, std::uint64_t seed, std::uint64_t step,
               const double* leaks, double* norm, int threads);

// "avx512", "avx2" or "portable": the best that this machine runs, unless chosen otherwise. Returns false, and
// changes nothing, where the machine or the build lacks the instruction set.
const char* instruction_set();
bool use_instruction_set(const char* name);

}  // namespace igb::cpu
