// What all streaming kernels share: elements in registers, the chunks of a table, sums over a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "multi_tensor.h"

namespace igb::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// ---- Elements --------------------------------------------------------------------------------------------

template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> using Accumulator = typename AccumulatorOf<T>::type;

// Calls f with a null pointer of the element type.
template <class F> void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<float*>(nullptr));
    case DType::f64: return f(static_cast<double*>(nullptr));
    case DType::bf16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::f16: return f(static_cast<__half*>(nullptr));
  }
}
template <class P> using Element = std::remove_pointer_t<P>;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T> __device__ T narrow(Accumulator<T> x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline double narrow<double>(double x) { return x; }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }

// N consecutive elements as the 32-bit words that the memory moves, in loads and stores of up to 16 bytes. Elements are
// indexed by constants only, so that all of it stays in registers.
template <class T, int N> struct Packed {
  static constexpr int kWords = N * sizeof(T) / 4;
  static_assert(kWords == 2 || kWords % 4 == 0);
  std::uint32_t words[kWords] = {};

  __device__ void load(const T* p) {
    if constexpr (kWords == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(p);
      words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = reinterpret_cast<const uint4*>(p)[i / 4];
        words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
      }
    }
  }
  __device__ void store(T* p) const {
    if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4)
        reinterpret_cast<uint4*>(p)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  }
  __device__ Accumulator<T> get(int e) const {
    if constexpr (sizeof(T) == 8) return __hiloint2double(int(words[2 * e + 1]), int(words[2 * e]));
    else if constexpr (sizeof(T) == 4) return __uint_as_float(words[e]);
    else if constexpr (std::is_same_v<T, __nv_bfloat16>)
      return __uint_as_float(e % 2 ? words[e / 2] & 0xffff0000u : words[e / 2] << 16);
    else return __half2float(__ushort_as_half(static_cast<unsigned short>(words[e / 2] >> (e % 2 ? 16 : 0))));
  }
  __device__ void set(int e, Accumulator<T> x) {
    if constexpr (sizeof(T) == 8) {
      words[2 * e] = std::uint32_t(__double2loint(x));
      words[2 * e + 1] = std::uint32_t(__double2hiint(x));
    } else if constexpr (sizeof(T) == 4) {
      words[e] = __float_as_uint(x);
    } else {
      std::uint32_t bits;
      if constexpr (std::is_same_v<T, __nv_bfloat16>) bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
      else bits = __half_as_ushort(__float2half_rn(x));
      words[e / 2] = e % 2 ? (words[e / 2] & 0xffffu) | bits << 16 : (words[e / 2] & 0xffff0000u) | bits;
    }
  }
};

// So many elements of T are 16 bytes.
template <class T> constexpr int kPack = 16 / sizeof(T);

template <class T> __device__ bool is_aligned(const T* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// ---- Tables and chunks -----------------------------------------------------------------------------------

struct View {
  const std::uint64_t* address;
  const std::uint64_t* numel;
  const std::uint64_t* dtype;
  const std::uint64_t* first_chunk;
  int tasks;
  std::int64_t params;
  std::int64_t chunks;

  explicit View(const Table& table)
      : address(table.words), numel(address + table.tasks * table.params), dtype(numel + table.params),
        first_chunk(dtype + table.params), tasks(table.tasks), params(table.params), chunks(table.chunks) {}

  template <class T> __device__ T* row(int task, std::int64_t param, std::int64_t offset) const {
    const std::uint64_t base = address[task * params + param];
    return base ? reinterpret_cast<T*>(base) + offset : nullptr;
  }
};

struct Chunk {
  std::int64_t param;
  std::int64_t offset;
  int size;
};

// The c-th chunk; its param is the last whose first chunk is at most c. A size of 0: its elements are no T.
template <class T> __device__ Chunk chunk_at(const View& table, DType dtype, std::int64_t c) {
  std::int64_t low = 0, high = table.params;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    if (static_cast<std::int64_t>(table.first_chunk[middle]) <= c) low = middle;
    else high = middle;
  }
  constexpr std::int64_t size = kChunkBytes / sizeof(T);
  const std::int64_t offset = (c - static_cast<std::int64_t>(table.first_chunk[low])) * size;
  const std::int64_t left = static_cast<std::int64_t>(table.numel[low]) - offset;
  const bool ours = table.dtype[low] == static_cast<std::uint64_t>(dtype);
  return {low, offset, ours ? static_cast<int>(left < size ? left : size) : 0};
}

// use(i, load(i)) for the packs 0 .. packs - 1 of a chunk, shared out to the block's threads. A thread has the loads of
// `AtOnce` packs under way before it uses the first.
template <int AtOnce, class Load, class Use> __device__ void for_each_pack(int packs, Load&& load, Use&& use) {
  int i = threadIdx.x;
  for (; i + (AtOnce - 1) * kThreads < packs; i += AtOnce * kThreads) {
    decltype(load(0)) loaded[AtOnce];
#pragma unroll
    for (int u = 0; u < AtOnce; ++u) loaded[u] = load(i + u * kThreads);
#pragma unroll
    for (int u = 0; u < AtOnce; ++u) use(i + u * kThreads, loaded[u]);
  }
  for (; i < packs; i += kThreads) use(i, load(i));
}

// ---- Sums ------------------------------------------------------------------------------------------------

template <class A> __device__ A warp_sum(A x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// totals[i] = the block's sum of every thread's values[i]: within a warp in A, from there in double. Called by all
// threads of the block, at the kernel's end.
template <int N, class A> __device__ void block_sums(const A (&values)[N], double* totals) {
  __shared__ double warps[kWarps][N];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A sum = warp_sum(values[i]);
    if (lane == 0) warps[warp][i] = double(sum);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < N; i += kThreads) {
    double total = 0.0;
    for (int w = 0; w < kWarps; ++w) total += warps[w][i];
    totals[i] = total;
  }
}

}  // namespace igb::cuda
