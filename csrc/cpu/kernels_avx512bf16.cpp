#include "chunk_kernels.inl"

const igb::cpu::ChunkKernels igb::cpu::avx512bf16_kernels = {"avx512bf16", gram, sq_norm, ema, add_squares, combine, sign_drop};
