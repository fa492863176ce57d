#pragma once
#include "cuda_runtime.h"

struct __half {
  std::uint16_t bits;
};
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half x) { return float(emulated_bits<_Float16>(x.bits)); }
inline __half __float2half_rn(float x) { return {emulated_bits<std::uint16_t>(_Float16(x))}; }
