// The part of CUDA that csrc/cuda uses, on the CPU: blocks run one after another, each thread of a block on a stack of its
// own, switched at barriers. Divergent barriers, misaligned vector accesses and oversized arguments throw.
//
// Blocks are sequential, so static memory serves as their shared memory. Threads run in the chosen order until they wait;
// what depends on that order has a barrier missing.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Thread {
  ucontext_t start;
  jmp_buf context;
  bool started = false;
  State state = State::ready;
  std::vector<char> stack = std::vector<char>(96 << 10);
};

inline std::vector<Thread> threads;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline unsigned current;
inline int order = 0;  // 0 ascending, 1 descending, 2 scattered
inline std::vector<std::uint64_t> exchanged[2];
inline std::vector<int> parity;
inline bool all_agree = true, agreed = true;

inline void enter() {
  body();
  threads[current].state = State::done;
  _longjmp(scheduler, 1);
}

inline void wait(State state) {
  threads[current].state = state;
  if (_setjmp(threads[current].context) == 0) _longjmp(scheduler, 1);
}

inline void resume(unsigned i) {
  current = i;
  threadIdx = dim3(i, 0, 0);
  if (_setjmp(scheduler) != 0) return;
  Thread& thread = threads[i];
  if (thread.started) _longjmp(thread.context, 1);
  thread.started = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.data();
  thread.start.uc_stack.ss_size = thread.stack.size();
  makecontext(&thread.start, enter, 0);
  setcontext(&thread.start);
}

inline unsigned scheduled(unsigned position, unsigned count) {
  return order == 0 ? position : order == 1 ? count - 1 - position : (position * 97 + 31) % count;
}

inline void run_block() {
  const unsigned count = blockDim.x;
  if (threads.size() < count) threads.resize(count);
  for (unsigned i = 0; i < count; ++i) threads[i].started = false, threads[i].state = State::ready;
  for (auto& values : exchanged) values.assign(count, 0);
  parity.assign(count, 0);
  all_agree = true;
  const auto all_are = [](unsigned first, unsigned last, State state) {
    return std::all_of(threads.begin() + first, threads.begin() + last,
                       [state](const Thread& t) { return t.state == state; });
  };
  while (!all_are(0, count, State::done)) {
    bool moved = false;
    for (unsigned q = 0; q < count; ++q) {
      const unsigned i = scheduled(q, count);
      if (threads[i].state == State::ready) resume(i), moved = true;
    }
    for (unsigned first = 0; first < count; first += 32) {
      const unsigned last = std::min(count, first + 32);
      if (!all_are(first, last, State::at_warp_barrier)) continue;
      for (unsigned i = first; i < last; ++i) threads[i].state = State::ready;
      moved = true;
    }
    if (moved) continue;
    if (!all_are(0, count, State::at_block_barrier))
      throw std::runtime_error("emulation: threads of a block wait at different barriers, or left without waiting");
    for (unsigned i = 0; i < count; ++i) threads[i].state = State::ready;
    agreed = all_agree;
    all_agree = true;
  }
}

template <class T> T exchange(T value, unsigned partner) {
  static_assert(sizeof(T) <= 8);
  int& side = parity[current];
  std::memcpy(&exchanged[side][current], &value, sizeof value);
  wait(State::at_warp_barrier);
  T result;
  std::memcpy(&result, &exchanged[side][partner], sizeof result);
  side = 1 - side;  // the next exchange may begin before the others have read this one
  return result;
}

// A vector of 32-bit words that may be accessed at its own alignment only.
template <int N> struct Vector {
  static void check(const void* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % (4 * N))
      throw std::runtime_error("emulation: misaligned access of " + std::to_string(4 * N) + " bytes");
  }
};

}  // namespace emulation

struct uint2 {
  std::uint32_t x, y;
  uint2(std::uint32_t a, std::uint32_t b) : x(a), y(b) {}
  uint2(const uint2& other) { emulation::Vector<2>::check(&other); std::memcpy(this, &other, 8); }
  uint2& operator=(const uint2& other) { emulation::Vector<2>::check(this); std::memcpy(this, &other, 8); return *this; }
};
struct uint4 {
  std::uint32_t x, y, z, w;
  uint4(std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) : x(a), y(b), z(c), w(d) {}
  uint4(const uint4& other) { emulation::Vector<4>::check(&other); std::memcpy(this, &other, 16); }
  uint4& operator=(const uint4& other) { emulation::Vector<4>::check(this); std::memcpy(this, &other, 16); return *this; }
};
inline uint2 make_uint2(std::uint32_t a, std::uint32_t b) { return {a, b}; }
inline uint4 make_uint4(std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) { return {a, b, c, d}; }

inline void __syncthreads() { emulation::wait(emulation::State::at_block_barrier); }
inline int __syncthreads_and(int predicate) {
  emulation::all_agree = emulation::all_agree && predicate;
  __syncthreads();
  return emulation::agreed;
}
inline void __syncwarp() { emulation::wait(emulation::State::at_warp_barrier); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, (emulation::current & ~31u) | ((emulation::current & 31u) ^ unsigned(mask)));
}

template <class To, class From> To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float rsqrtf(float x) { return float(1 / std::sqrt(double(x))); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __uint_as_float(std::uint32_t u) { return emulated_bits<float>(u); }
inline std::uint32_t __float_as_uint(float f) { return emulated_bits<std::uint32_t>(f); }
inline double __hiloint2double(int hi, int lo) {
  return emulated_bits<double>(std::uint64_t(std::uint32_t(hi)) << 32 | std::uint32_t(lo));
}
inline int __double2loint(double d) { return int(std::uint32_t(emulated_bits<std::uint64_t>(d))); }
inline int __double2hiint(double d) { return int(std::uint32_t(emulated_bits<std::uint64_t>(d) >> 32)); }

// ---- Runtime ---------------------------------------------------------------------------------------------

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidConfiguration"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "kernel arguments end at 4 KiB");
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.z != 1 || grid.y > 65535 || block.x == 0 || block.x > 1024)
    return cudaErrorInvalidConfiguration;
  const std::tuple<std::remove_const_t<Parameters>...> arguments(given...);
  emulation::body = [&] { std::apply(kernel, arguments); };
  gridDim = grid, blockDim = block;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      emulation::run_block();
    }
  return cudaSuccess;
}
