// Fixed-width vectors over GCC vector extensions. Included once per instruction set: the width follows from
// the compile flags, and everything lives in an unnamed namespace so that no two of them are merged at link time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define IGB_SIMD_BYTES 64
#elif defined(__AVX2__)
#define IGB_SIMD_BYTES 32
#else
#define IGB_SIMD_BYTES 16
#endif

namespace {

using std::size_t;

struct bf16 { std::uint16_t bits; };
struct f16 { std::uint16_t bits; };

template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> using Accumulator = typename AccumulatorOf<T>::type;

template <class A> struct Lanes;
template <> struct Lanes<float> {
  typedef float vec __attribute__((vector_size(IGB_SIMD_BYTES)));
  typedef float unaligned __attribute__((vector_size(IGB_SIMD_BYTES), aligned(4), may_alias));
};
template <> struct Lanes<double> {
  typedef double vec __attribute__((vector_size(IGB_SIMD_BYTES)));
  typedef double unaligned __attribute__((vector_size(IGB_SIMD_BYTES), aligned(8), may_alias));
};
template <class A> using Vec = typename Lanes<A>::vec;
template <class A> constexpr int kLanes = IGB_SIMD_BYTES / sizeof(A);

// ---- one element -----------------------------------------------------------------------------------------

inline float bits_to_float(std::uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline std::uint32_t float_to_bits(float f) { std::uint32_t u; std::memcpy(&u, &f, 4); return u; }

inline float to_accumulator(float x) { return x; }
inline double to_accumulator(double x) { return x; }
inline float to_accumulator(bf16 x) { return bits_to_float(std::uint32_t(x.bits) << 16); }
inline float to_accumulator(f16 x) {
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // 2^112 moves the exponent from f16's bias to f32's, and normalises subnormals on the way.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

template <class T> T from_accumulator(Accumulator<T> x);
template <> inline float from_accumulator<float>(float x) { return x; }
template <> inline double from_accumulator<double>(double x) { return x; }
template <> inline bf16 from_accumulator<bf16>(float x) {
  const std::uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {std::uint16_t((u >> 16) | 0x40u)};  // a NaN stays one
  return {std::uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};                  // nearest, ties to even
}
template <> inline f16 from_accumulator<f16>(float x) {
  const std::uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {std::uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {std::uint16_t(sign | 0x7c00u)};            // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                                                   // f16 subnormal: 2^-24 steps
    const float aligned = bits_to_float(magnitude) + 0.5f;                         // the addition does the rounding
    return {std::uint16_t(sign | (float_to_bits(aligned) - 0x3f000000u))};
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {std::uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
}

// ---- one vector ------------------------------------------------------------------------------------------

inline Vec<float> load(const float* p) { return *reinterpret_cast<const Lanes<float>::unaligned*>(p); }
inline Vec<double> load(const double* p) { return *reinterpret_cast<const Lanes<double>::unaligned*>(p); }
// Past the caches, for results that are not read again soon: saves reading the line first. Aligned addresses only.
#if defined(__AVX512F__)
inline void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, v); }
inline void stream(double* p, Vec<double> v) { _mm512_stream_pd(p, v); }
#elif defined(__AVX2__)
inline void stream(float* p, Vec<float> v) { _mm256_stream_ps(p, v); }
inline void stream(double* p, Vec<double> v) { _mm256_stream_pd(p, v); }
#elif defined(__SSE2__)
inline void stream(float* p, Vec<float> v) { _mm_stream_ps(p, v); }
inline void stream(double* p, Vec<double> v) { _mm_stream_pd(p, v); }
#else
template <class A> void stream(A* p, Vec<A> v) { *reinterpret_cast<Vec<A>*>(p) = v; }
#endif
inline void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

#if defined(__AVX512F__)
inline Vec<float> square_root(Vec<float> v) { return _mm512_sqrt_ps(v); }
inline Vec<double> square_root(Vec<double> v) { return _mm512_sqrt_pd(v); }
#elif defined(__AVX2__)
inline Vec<float> square_root(Vec<float> v) { return _mm256_sqrt_ps(v); }
inline Vec<double> square_root(Vec<double> v) { return _mm256_sqrt_pd(v); }
#elif defined(__SSE2__)
inline Vec<float> square_root(Vec<float> v) { return _mm_sqrt_ps(v); }
inline Vec<double> square_root(Vec<double> v) { return _mm_sqrt_pd(v); }
#else
template <class V> V square_root(V v) {
  for (size_t i = 0; i < sizeof v / sizeof v[0]; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}
#endif

inline void store(float* p, Vec<float> v) { *reinterpret_cast<Lanes<float>::unaligned*>(p) = v; }
inline void store(double* p, Vec<double> v) { *reinterpret_cast<Lanes<double>::unaligned*>(p) = v; }

// Where the order of elements does not matter, 2·lanes of bf16 are read as one vector of their even and one of
// their odd elements: one instruction each, where widening in order takes two.
template <class T> constexpr int kParts = 1;
template <> constexpr int kParts<bf16> = 2;

typedef std::uint32_t Bits __attribute__((vector_size(IGB_SIMD_BYTES)));
typedef std::uint32_t UnalignedBits __attribute__((vector_size(IGB_SIMD_BYTES), aligned(2), may_alias));

template <int Part, class T> auto load_part(const T* p) { return load(p); }
template <int Part> Vec<float> load_part(const bf16* p) {
  const Bits pairs = *reinterpret_cast<const UnalignedBits*>(p);
  return Vec<float>(Part == 0 ? pairs << 16 : pairs & 0xffff0000u);
}

// Where the machine multiplies and adds bf16 itself, both parts at once. Its products are exact; bf16 subnormals count
// as zero, as their products with ordinary numbers nearly are.
#if defined(__AVX512BF16__)
template <class T> constexpr bool kMultipliesPairs = false;
template <> constexpr bool kMultipliesPairs<bf16> = true;
inline __m512bh load_pairs(const bf16* p) { return __m512bh(_mm512_loadu_si512(p)); }
inline Vec<float> multiply_add(__m512bh x, __m512bh y, Vec<float> sum) { return _mm512_dpbf16_ps(sum, x, y); }
#else
template <class T> constexpr bool kMultipliesPairs = false;
#endif
template <class V> V multiply_add(V x, V y, V sum) { return sum + x * y; }

#if defined(__AVX512F__)
inline Vec<float> load(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return Vec<float>(_mm512_slli_epi32(wide, 16));
}
#elif defined(__AVX2__)
inline Vec<float> load(const bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return Vec<float>(_mm256_slli_epi32(wide, 16));
}
#else
inline Vec<float> load(const bf16* p) {
  constexpr int n = kLanes<float>;
  typedef std::uint16_t half_bits __attribute__((vector_size(2 * n), aligned(2), may_alias));
  typedef std::uint32_t full_bits __attribute__((vector_size(4 * n)));
  return Vec<float>(__builtin_convertvector(*reinterpret_cast<const half_bits*>(p), full_bits) << 16);
}
#endif
// Rounded to bf16 (nearest, ties to even; a NaN stays one), which is the upper half of each element.
inline Bits rounded_to_bf16(Vec<float> v) {
  const Bits u = Bits(v), nearest = u + 0x7fffu + ((u >> 16) & 1u);
  return v != v ? u | 0x400000u : nearest;
}
inline void store(bf16* p, Vec<float> v) {
  typedef std::uint16_t half_bits __attribute__((vector_size(2 * kLanes<float>), aligned(2), may_alias));
  *reinterpret_cast<half_bits*>(p) = __builtin_convertvector(rounded_to_bf16(v) >> 16, half_bits);
}
inline void store_parts(bf16* p, Vec<float> even, Vec<float> odd) {
  const Bits pairs = (rounded_to_bf16(even) >> 16) | (rounded_to_bf16(odd) & 0xffff0000u);
  *reinterpret_cast<UnalignedBits*>(p) = pairs;
}

#if defined(__AVX512F__)
inline Vec<float> load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(f16* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline Vec<float> load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(f16* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Vec<float> load(const f16* p) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_accumulator(p[i]);
  return v;
}
inline void store(f16* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_accumulator<f16>(v[i]);
}
#endif

// Lanes of 64 bits, and the products of their lower halves.
typedef std::uint64_t Wide __attribute__((vector_size(IGB_SIMD_BYTES)));
typedef std::uint64_t UnalignedWide __attribute__((vector_size(IGB_SIMD_BYTES), aligned(4), may_alias));
constexpr int kWideLanes = IGB_SIMD_BYTES / 8;

#if defined(__AVX512F__)
inline Wide multiply_lower(Wide x, Wide y) { return Wide(_mm512_maskz_mul_epu32(0xff, __m512i(x), __m512i(y))); }
#elif defined(__AVX2__)
inline Wide multiply_lower(Wide x, Wide y) { return Wide(_mm256_mul_epu32(__m256i(x), __m256i(y))); }
#elif defined(__SSE2__)
inline Wide multiply_lower(Wide x, Wide y) { return Wide(_mm_mul_epu32(__m128i(x), __m128i(y))); }
#else
inline Wide multiply_lower(Wide x, Wide y) { return (x & 0xffffffffu) * (y & 0xffffffffu); }
#endif

// The first `count` < lanes elements, zeros behind them.
template <class T> Vec<Accumulator<T>> load_first(const T* p, size_t count) {
  Vec<Accumulator<T>> v = {};
  for (size_t i = 0; i < count; ++i) v[i] = to_accumulator(p[i]);
  return v;
}
template <class T> void store_first(T* p, Vec<Accumulator<T>> v, size_t count) {
  for (size_t i = 0; i < count; ++i) p[i] = from_accumulator<T>(v[i]);
}

template <class A> double sum_lanes(Vec<A> v) {
  double s = 0;
  for (int i = 0; i < kLanes<A>; ++i) s += double(v[i]);
  return s;
}

template <class A> Vec<A> broadcast(A x) { return x - Vec<A>{}; }

}  // namespace
