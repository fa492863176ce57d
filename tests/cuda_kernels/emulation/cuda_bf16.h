#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  std::uint16_t bits;
};
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(std::uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const std::uint32_t u = __float_as_uint(x);
  return {std::uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
