// Gramian, norms, moving averages and weighted sums over K×P device tensors by pointer table, and the K×K problems.
// Everything is put on the given stream of the current device; nothing waits for it. Errors are thrown as
// std::runtime_error. All pointers but the host table's are device addresses.
#pragma once
#include <cstdint>

#include "../core/losses.h"
#include "../core/solve.h"
#include "../core/tensor_table.h"

struct CUstream_st;

namespace igb::cuda {

using Stream = CUstream_st*;

// A TensorTable in device memory, cut into chunks of kChunkBytes of each row. The words are K×P addresses, then P element
// counts, P dtypes, and P + 1 numbers of the chunks before each column.
struct Table {
  const std::uint64_t* words;
  int tasks;
  std::int64_t params;
  std::int64_t chunks;
  unsigned dtypes;  // bit mask of the columns' DTypes
};

constexpr std::int64_t kChunkBytes = 16 << 10;
constexpr int kMaxTasks = 128;

inline std::int64_t word_count(int tasks, std::int64_t params) { return (tasks + 3) * params + 1; }

// Writes the table to `words` by kernels that carry it in their arguments: no copy engine, no pinned memory, and right in
// a captured graph.
Table upload(const TensorTable& table, std::uint64_t* words, Stream stream);

// Doubles of scratch memory that the operations below need. They depend on the device, not on the data.
std::int64_t gram_scratch(const Table& grads);
std::int64_t norm_scratch(const Table& grads);

// gram[K, K]
void gram(const Table& grads, double* gram, double* scratch, Stream stream);

// norms[K]: sums of squares.
void sq_norms(const Table& grads, double* norms, double* scratch, Stream stream);

// As igb::cpu::ema; decay is one double. out and state have the layout of grads.
void ema(const Table& out, const Table& state, const Table& grads, const double* decay, const double* scales,
         double* norms, double* scratch, Stream stream);

// As igb::cpu::accumulate_squares.
void accumulate_squares(const Table& out, const Table& state, const Table& grads, double eps, double* excess,
                        double* scratch, Stream stream);

// out (+)= sum_k weights[k] * grads[k]; out has one row and no missing entries, and may be one of the rows.
void combine(const Table& out, const Table& grads, const double* weights, bool accumulate, Stream stream);

// As igb::cpu::sign_drop, with seed and step in counter[2]; scratch as for norms of grads.
void sign_drop(const Table& out, const Table& grads, const double* counter, const double* leaks, double* norm,
               double* scratch, Stream stream);

// out = kept (zeros where kept has no entry) if status has non_finite; both hold rows of the same accumulators.
void rollback(const Table& out, const Table& kept, const std::int32_t* status, Stream stream);

// As igb::solve. problem.options is in host memory, everything else on the device; workspace has
// igb::workspace_size doubles.
void solve(Method method, const Problem& problem, double* weights, std::int32_t* status, double* workspace,
           Stream stream);

// As igb::loss_scales, from and to the dtype of the losses. options is in host memory.
void loss_scales(LossRule rule, int tasks, DType dtype, const void* losses, const double* per_task,
                 const double* options, double* state, void* scales, std::int32_t* status, Stream stream);

}  // namespace igb::cuda
