#include "chunk_kernels.inl"

const igb::cpu::ChunkKernels igb::cpu::avx512_kernels = {"avx512", gram, sq_norm, ema, add_squares, combine, sign_drop};
