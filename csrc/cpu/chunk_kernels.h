// Kernels over one chunk of one column, in one instruction set; multi_tensor.cpp cuts columns into chunks.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../core/tensor_table.h"

namespace igb::cpu {

struct ChunkKernels {
  const char* name;

  // sums[index[i] * stride + index[j]] += <rows[i], rows[j]> for j <= i < count.
  void (*gram)(DType, const void* const* rows, const int* index, int count, std::size_t n, double* sums, int stride);

  // Sum of squares.
  double (*sq_norm)(DType, const void* row, std::size_t n);

  // out = keep * state + take * grad; returns the sum of squares of out. state and out have the accumulator's dtype
  // and may be one; a null state or grad counts as zeros. `past_caches` is for an out that is too large to be found
  // there again.
  double (*ema)(DType grad_dtype, void* out, const void* state, const void* grad, std::size_t n, double keep,
                double take, bool past_caches);

  // out = state + grad^2; returns the sum of grad^2 / sqrt(out + eps). All else as for ema.
  double (*add_squares)(DType grad_dtype, void* out, const void* state, const void* grad, std::size_t n, double eps,
                        bool past_caches);

  // out (+)= sum_k weights[k] * rows[k]. out may be one of the rows. `scratch` holds n accumulators.
  void (*combine)(DType row_dtype, DType out_dtype, void* out, const void* const* rows, const double* weights,
                  int count, std::size_t n, bool accumulate, void* scratch);

  // In each element, the rows' entries of one sign are kept and those of the other are multiplied by their leaks (null:
  // zeros); out is the sum, and its sum of squares is returned. U decides, against the positive entries' share of all
  // entries' sizes; it comes from the words of philox(seed, step, stream), (…, stream + 1), … A NaN or inf among the
  // entries makes out NaN. out may be one of the rows.
  double (*sign_drop)(DType row_dtype, DType out_dtype, void* out, const void* const* rows, const double* leaks,
                      int count, std::size_t n, std::uint64_t seed, std::uint64_t step, std::uint64_t stream);
};

extern const ChunkKernels portable_kernels;
#ifdef IGB_X86_KERNELS
extern const ChunkKernels avx2_kernels;
extern const ChunkKernels avx512_kernels;
extern const ChunkKernels avx512bf16_kernels;
#endif

}  // namespace igb::cpu
