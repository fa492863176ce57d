#include "chunk_kernels.inl"

const igb::cpu::ChunkKernels igb::cpu::avx2_kernels = {"avx2", gram, sq_norm, ema, add_squares, combine, sign_drop};
