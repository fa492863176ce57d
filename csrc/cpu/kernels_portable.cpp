#include "chunk_kernels.inl"

const igb::cpu::ChunkKernels igb::cpu::portable_kernels = {"portable", gram, sq_norm, ema, add_squares, combine, sign_drop};
