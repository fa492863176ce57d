#include "multi_tensor.h"

#include <algorithm>
#include <vector>

#include "../core/philox.h"
#include "device.cuh"
#include "launch.h"

namespace igb::cuda {
namespace {

// A persistent grid: so many blocks share out the chunks, and leave as many partial sums.
int blocks_for(const Table& table, int per_multiprocessor = 4) {
  const std::int64_t most = std::int64_t(multiprocessors()) * per_multiprocessor;
  return int(std::clamp(table.chunks, std::int64_t(1), most));
}

// f(dtype, null pointer of its element type) for each dtype in the table: a launch each, in which blocks skip the chunks
// of other dtypes. Nearly always there is one.
template <class F> void for_each_dtype(const Table& table, F&& f) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    if (table.dtypes & (1u << int(dtype))) with_type(dtype, [&](auto tag) { f(dtype, tag); });
}

// ---- The table -------------------------------------------------------------------------------------------

struct Words {
  static constexpr int kMost = 480;  // kernel arguments end at 4 KiB
  std::uint64_t values[kMost];
};

__global__ void store_words(const Words words, int count, std::uint64_t* out) {
  for (int i = threadIdx.x; i < count; i += kThreads) out[i] = words.values[i];
}

}  // namespace

Table upload(const TensorTable& table, std::uint64_t* words, Stream stream) {
  const std::int64_t entries = table.tasks * table.params;
  std::vector<std::uint64_t> host(table.address, table.address + entries);
  host.reserve(std::size_t(word_count(table.tasks, table.params)));
  host.insert(host.end(), table.numel, table.numel + table.params);
  Table result{words, table.tasks, table.params, 0, 0};
  for (std::int64_t p = 0; p < table.params; ++p) {
    host.push_back(std::uint64_t(table.dtype[p]));
    if (table.numel[p] > 0) result.dtypes |= 1u << int(table.dtype[p]);
  }
  for (std::int64_t p = 0; p <= table.params; ++p) {
    host.push_back(std::uint64_t(result.chunks));
    if (p < table.params) {
      const std::int64_t size = kChunkBytes / element_size(table.dtype[p]);
      result.chunks += (table.numel[p] + size - 1) / size;
    }
  }
  for (std::size_t done = 0; done < host.size(); done += Words::kMost) {
    Words part;
    const int count = int(std::min<std::size_t>(Words::kMost, host.size() - done));
    std::copy_n(host.data() + done, count, part.values);
    IGB_LAUNCH(store_words, 1, kThreads, stream, part, count, words + done);
  }
  return result;
}

// ---- Gramian ---------------------------------------------------------------------------------------------

namespace {

// All pairs of at most kMostInRegisters rows are summed by one block; of more, those of two tiles of kTile rows.
template <class T> constexpr int kMostInRegisters = sizeof(T) == 8 ? 8 : 16;
constexpr int kTile = 8;

// Sums over pairs of R rows in registers. Triangle: pairs (i, j <= i) of all rows; else of the first with the second half.
template <class A, int R, bool Triangle> struct Pairs {
  static constexpr int kCount = Triangle ? R * (R + 1) / 2 : R / 2 * (R / 2);
  A sums[kCount] = {};

  __device__ void add(const A (&x)[R]) {
    if constexpr (Triangle) {
#pragma unroll
      for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j <= i; ++j) sums[i * (i + 1) / 2 + j] += x[i] * x[j];
    } else {
      constexpr int H = R / 2;
#pragma unroll
      for (int i = 0; i < H; ++i)
#pragma unroll
        for (int j = 0; j < H; ++j) sums[i * H + j] += x[i] * x[H + j];
    }
  }
};

// Tiles (i, j <= i) of kTile rows in the order of their number.
struct TilePair {
  int i, j;
};
__host__ __device__ inline TilePair tile_pair(int number) {
  int i = 0;
  while ((i + 1) * (i + 2) / 2 <= number) ++i;
  return {i, number - i * (i + 1) / 2};
}

// Blocks of a kernel for so many rows that fit a multiprocessor together: their registers decide.
template <class T> constexpr int resident_blocks(int rows) {
  return rows <= 4 ? 4 : rows <= 8 && sizeof(T) < 8 ? 2 : 1;
}

// Grid: (pairs of tiles, blocks), so that the blocks that read the same rows run together. A row that is missing, or
// beyond the tasks, counts as zeros.
template <class T, int R, bool Triangle>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(R))
    gram_partial(const View table, DType dtype, double* partials) {
  using A = Accumulator<T>;
  constexpr int N = R > 12 && sizeof(T) == 2 ? kPack<T> / 2 : kPack<T>;  // more would not fit the registers
  struct Packs {
    Packed<T, N> row[R];
  };
  const TilePair tiles = tile_pair(blockIdx.x);
  Pairs<A, R, Triangle> pairs;
  for (std::int64_t c = blockIdx.y; c < table.chunks; c += gridDim.y) {
    const Chunk chunk = chunk_at<T>(table, dtype, c);
    const T* rows[R];
    bool aligned = true;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int task = Triangle ? r : r < R / 2 ? tiles.i * kTile + r : tiles.j * kTile + r - R / 2;
      rows[r] = task < table.tasks ? table.row<const T>(task, chunk.param, chunk.offset) : nullptr;
      aligned = aligned && is_aligned(rows[r]);
    }
    const int packs = aligned ? chunk.size / N : 0;
    for_each_pack<(R <= 2 ? 4 : R <= 4 ? 2 : 1)>(
        packs,
        [&](int i) {
          Packs packs;
#pragma unroll
          for (int r = 0; r < R; ++r)
            if (rows[r]) packs.row[r].load(rows[r] + i * N);
          return packs;
        },
        [&](int, const Packs& packs) {
#pragma unroll
          for (int e = 0; e < N; ++e) {
            A x[R];
#pragma unroll
            for (int r = 0; r < R; ++r) x[r] = packs.row[r].get(e);
            pairs.add(x);
          }
        });
    for (int i = packs * N + threadIdx.x; i < chunk.size; i += kThreads) {
      A x[R];
#pragma unroll
      for (int r = 0; r < R; ++r) x[r] = rows[r] ? widen(rows[r][i]) : A(0);
      pairs.add(x);
    }
  }
  block_sums(pairs.sums, partials + (std::int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * pairs.kCount);
}

// gram += the sums of all blocks, in their order. A warp for each pair i >= j; grid: warps enough.
__global__ void __launch_bounds__(kThreads)
    gram_total(const double* partials, int blocks, int tasks, int tile, int pairs_of_tiles, bool accumulate, double* gram) {
  const int pair = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (pair >= tasks * (tasks + 1) / 2) return;
  const TilePair at = tile_pair(pair);  // the row and the column
  int count, index, number = 0;
  if (pairs_of_tiles == 1) {
    count = tile * (tile + 1) / 2;
    index = pair;
  } else {
    const int i = at.i / tile, j = at.j / tile;
    count = tile * tile;
    index = at.i % tile * tile + at.j % tile;
    number = i * (i + 1) / 2 + j;
  }
  const double* sums = partials + std::int64_t(number) * blocks * count + index;
  double total = 0.0;
  for (int b = lane; b < blocks; b += 32) total += sums[std::int64_t(b) * count];
  total = warp_sum(total);
  if (lane == 0) {
    if (accumulate) total += gram[at.i * tasks + at.j];
    gram[at.i * tasks + at.j] = gram[at.j * tasks + at.i] = total;
  }
}

// How a Gramian of so many rows is cut up.
struct GramShape {
  int tile, pairs_of_tiles, blocks;
  std::int64_t scratch() const {
    const int count = pairs_of_tiles == 1 ? tile * (tile + 1) / 2 : tile * tile;
    return std::int64_t(pairs_of_tiles) * blocks * count;
  }
};

template <class T> GramShape gram_shape(const Table& grads) {
  if (grads.tasks <= kMostInRegisters<T>) {
    for (const int rows : {1, 2, 3, 4, 6, 8, 12, 16})
      if (grads.tasks <= rows) return {rows, 1, blocks_for(grads, resident_blocks<T>(rows))};
  }
  const int tiles = (grads.tasks + kTile - 1) / kTile, pairs = tiles * (tiles + 1) / 2;
  return {kTile, pairs, std::max(1, blocks_for(grads, 4) / pairs)};
}

template <class T>
void launch_gram_partial(const GramShape& shape, const View& view, DType dtype, double* scratch, Stream stream) {
  const auto run = [&](auto kernel) {
    IGB_LAUNCH(kernel, dim3(shape.pairs_of_tiles, shape.blocks), kThreads, stream, view, dtype, scratch);
  };
  if (shape.pairs_of_tiles > 1) return run(gram_partial<T, 2 * kTile, false>);
  switch (shape.tile) {
    case 1: return run(gram_partial<T, 1, true>);
    case 2: return run(gram_partial<T, 2, true>);
    case 3: return run(gram_partial<T, 3, true>);
    case 4: return run(gram_partial<T, 4, true>);
    case 6: return run(gram_partial<T, 6, true>);
    case 8: return run(gram_partial<T, 8, true>);
  }
  if constexpr (sizeof(T) < 8) return shape.tile == 12 ? run(gram_partial<T, 12, true>) : run(gram_partial<T, 16, true>);
}

}  // namespace

std::int64_t gram_scratch(const Table& grads) {
  return std::max(gram_shape<float>(grads).scratch(), gram_shape<double>(grads).scratch());
}

void gram(const Table& grads, double* gram, double* scratch, Stream stream) {
  const std::size_t bytes = sizeof(double) * grads.tasks * grads.tasks;
  if (grads.dtypes == 0) return IGB_CUDA_CHECK(cudaMemsetAsync(gram, 0, bytes, stream));
  bool accumulate = false;
  for_each_dtype(grads, [&](DType dtype, auto tag) {
    using T = Element<decltype(tag)>;
    const GramShape shape = gram_shape<T>(grads);
    launch_gram_partial<T>(shape, View(grads), dtype, scratch, stream);
    const int pairs = grads.tasks * (grads.tasks + 1) / 2;
    IGB_LAUNCH(gram_total, (pairs + kWarps - 1) / kWarps, kThreads, stream, scratch, shape.blocks, grads.tasks,
               shape.tile, shape.pairs_of_tiles, accumulate, gram);
    accumulate = true;
  });
}

// ---- Norms, moving averages and sums of squares ----------------------------------------------------------

namespace {

// Grid: (blocks, tasks).
template <class T>
__global__ void __launch_bounds__(kThreads, 4) norm_partial(const View table, DType dtype, double* partials) {
  using A = Accumulator<T>;
  constexpr int N = kPack<T>;
  A sum[1] = {};
  for (std::int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at<T>(table, dtype, c);
    const T* row = table.row<const T>(blockIdx.y, chunk.param, chunk.offset);
    if (!row) continue;
    const int packs = is_aligned(row) ? chunk.size / N : 0;
    for_each_pack<4>(
        packs,
        [&](int i) {
          Packed<T, N> packed;
          packed.load(row + i * N);
          return packed;
        },
        [&](int, const Packed<T, N>& packed) {
#pragma unroll
          for (int e = 0; e < N; ++e) sum[0] += packed.get(e) * packed.get(e);
        });
    for (int i = packs * N + threadIdx.x; i < chunk.size; i += kThreads) sum[0] += widen(row[i]) * widen(row[i]);
  }
  block_sums(sum, partials + blockIdx.y * gridDim.x + blockIdx.x);
}

// What a pass over rows makes of an element of the state and one of the gradient: what it writes, and what it sums.
template <class A> struct Average {
  A keep, take;
  __device__ A next(A state, A grad) const { return keep * state + take * grad; }
  __device__ A summand(A next, A) const { return next * next; }
};
struct Averaging {
  const double* decay;
  const double* scales;
  template <class A> __device__ Average<A> of_row(int task) const {
    return {A(*decay), A((1 - *decay) * (scales ? scales[task] : 1.0))};
  }
};

__device__ inline float inverse_root(float x) { return rsqrtf(x); }
__device__ inline double inverse_root(double x) { return rsqrt(x); }

template <class A> struct AddSquare {
  A eps;
  __device__ A next(A state, A grad) const { return state + grad * grad; }
  __device__ A summand(A next, A grad) const { return grad * grad * inverse_root(next + eps); }
};
struct AddingSquares {
  double eps;
  template <class A> __device__ AddSquare<A> of_row(int) const { return {A(eps)}; }
};

// Grid: (blocks, tasks). A null state or grad counts as zeros.
template <class T, class Rule>
__global__ void __launch_bounds__(kThreads, 4)
    update_partial(const View out, const View state, const View grads, DType dtype, const Rule rules, double* partials) {
  using A = Accumulator<T>;
  constexpr int N = kPack<T>;
  struct Packs {
    Packed<A, N> old;
    Packed<T, N> grad;
  };
  const int task = blockIdx.y;
  const auto rule = rules.template of_row<A>(task);
  A sum[1] = {};
  for (std::int64_t c = blockIdx.x; c < grads.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at<T>(grads, dtype, c);
    A* const to = out.row<A>(task, chunk.param, chunk.offset);
    if (!to) continue;
    const A* const old = state.row<const A>(task, chunk.param, chunk.offset);
    const T* const grad = grads.row<const T>(task, chunk.param, chunk.offset);
    const int packs = is_aligned(to) && is_aligned(old) && is_aligned(grad) ? chunk.size / N : 0;
    for_each_pack<2>(
        packs,
        [&](int i) {
          Packs packs;
          if (old) packs.old.load(old + i * N);
          if (grad) packs.grad.load(grad + i * N);
          return packs;
        },
        [&](int i, const Packs& packs) {
          Packed<A, N> result;
#pragma unroll
          for (int e = 0; e < N; ++e) {
            const A given = packs.grad.get(e), v = rule.next(packs.old.get(e), given);
            result.set(e, v);
            sum[0] += rule.summand(v, given);
          }
          result.store(to + i * N);
        });
    for (int i = packs * N + threadIdx.x; i < chunk.size; i += kThreads) {
      const A given = grad ? widen(grad[i]) : A(0), v = rule.next(old ? old[i] : A(0), given);
      to[i] = v;
      sum[0] += rule.summand(v, given);
    }
  }
  block_sums(sum, partials + blockIdx.y * gridDim.x + blockIdx.x);
}

// A warp for each task.
__global__ void __launch_bounds__(kThreads)
    norm_total(const double* partials, int blocks, int tasks, bool accumulate, double* norms) {
  const int task = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (task >= tasks) return;
  double total = 0.0;
  for (int b = lane; b < blocks; b += 32) total += partials[task * blocks + b];
  total = warp_sum(total);
  if (lane == 0) norms[task] = accumulate ? norms[task] + total : total;
}

// Norms of `tasks` rows by partial(dtype, tag, grid), one launch for each dtype.
template <class F>
void norms_by(const Table& grads, double* norms, double* scratch, Stream stream, F&& partial) {
  if (grads.dtypes == 0) return IGB_CUDA_CHECK(cudaMemsetAsync(norms, 0, sizeof(double) * grads.tasks, stream));
  const int blocks = blocks_for(grads);
  bool accumulate = false;
  for_each_dtype(grads, [&](DType dtype, auto tag) {
    partial(dtype, tag, dim3(blocks, grads.tasks));
    IGB_LAUNCH(norm_total, (grads.tasks + kWarps - 1) / kWarps, kThreads, stream, scratch, blocks, grads.tasks, accumulate,
               norms);
    accumulate = true;
  });
}

}  // namespace

std::int64_t norm_scratch(const Table& grads) { return std::int64_t(blocks_for(grads)) * grads.tasks; }

void sq_norms(const Table& grads, double* norms, double* scratch, Stream stream) {
  norms_by(grads, norms, scratch, stream, [&](DType dtype, auto tag, dim3 grid) {
    IGB_LAUNCH(norm_partial<Element<decltype(tag)>>, grid, kThreads, stream, View(grads), dtype, scratch);
  });
}

namespace {

template <class Rule>
void update_rows(const Table& out, const Table& state, const Table& grads, const Rule& rule, double* totals,
                 double* scratch, Stream stream) {
  norms_by(grads, totals, scratch, stream, [&](DType dtype, auto tag, dim3 grid) {
    IGB_LAUNCH((update_partial<Element<decltype(tag)>, Rule>), grid, kThreads, stream, View(out), View(state), View(grads),
               dtype, rule, scratch);
  });
}

}  // namespace

void ema(const Table& out, const Table& state, const Table& grads, const double* decay, const double* scales,
         double* norms, double* scratch, Stream stream) {
  update_rows(out, state, grads, Averaging{decay, scales}, norms, scratch, stream);
}

void accumulate_squares(const Table& out, const Table& state, const Table& grads, double eps, double* excess,
                        double* scratch, Stream stream) {
  update_rows(out, state, grads, AddingSquares{eps}, excess, scratch, stream);
}

// ---- Weighted sum ----------------------------------------------------------------------------------------

namespace {

// So many rows' loads are under way together.
constexpr int kRowsAtOnce = 4;

// Whether sums of T can be written as O: in the same precision, widened to the accumulator's, or rounded from it.
template <class T, class O>
constexpr bool kCombines = std::is_same_v<O, T> || std::is_same_v<O, Accumulator<T>> ||
                           (std::is_same_v<T, Accumulator<T>> && std::is_same_v<Accumulator<O>, T>);

// out (+)= sum_k weights[k] * rows[k] in the columns where rows are T and out is O.
template <class T, class O>
__global__ void __launch_bounds__(kThreads, 4)
    weighted_sum(const View out, const View grads, DType row_dtype, DType out_dtype, const double* weights, bool accumulate) {
  using A = Accumulator<T>;
  constexpr int N = kPack<T>;
  __shared__ const T* rows[kMaxTasks];
  __shared__ A factors[kMaxTasks];
  const int tasks = grads.tasks;
  for (int k = threadIdx.x; k < tasks; k += kThreads) factors[k] = A(weights[k]);
  for (std::int64_t c = blockIdx.x; c < grads.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at<T>(grads, row_dtype, c);
    if (chunk.size == 0 || out.dtype[chunk.param] != std::uint64_t(out_dtype)) continue;
    O* const to = out.row<O>(0, chunk.param, chunk.offset);
    bool aligned = is_aligned(to);
    __syncthreads();  // every thread has left the last chunk's rows
    for (int k = threadIdx.x; k < tasks; k += kThreads) {
      rows[k] = grads.row<const T>(k, chunk.param, chunk.offset);
      aligned = aligned && is_aligned(rows[k]);
    }
    const int packs = __syncthreads_and(aligned) ? chunk.size / N : 0;
    for (int i = threadIdx.x; i < packs; i += kThreads) {
      A sum[N] = {};
      Packed<O, N> result;
      if (accumulate) {
        result.load(to + i * N);
#pragma unroll
        for (int e = 0; e < N; ++e) sum[e] = A(result.get(e));
      }
      for (int first = 0; first < tasks; first += kRowsAtOnce) {
        Packed<T, N> packed[kRowsAtOnce];
#pragma unroll
        for (int k = 0; k < kRowsAtOnce; ++k)
          if (first + k < tasks && rows[first + k]) packed[k].load(rows[first + k] + i * N);
#pragma unroll
        for (int k = 0; k < kRowsAtOnce; ++k)
          if (first + k < tasks && rows[first + k]) {
#pragma unroll
            for (int e = 0; e < N; ++e) sum[e] += factors[first + k] * packed[k].get(e);
          }
      }
#pragma unroll
      for (int e = 0; e < N; ++e) result.set(e, sum[e]);
      result.store(to + i * N);
    }
    for (int i = packs * N + threadIdx.x; i < chunk.size; i += kThreads) {
      A sum = accumulate ? A(widen(to[i])) : A(0);
      for (int k = 0; k < tasks; ++k)
        if (rows[k]) sum += factors[k] * widen(rows[k][i]);
      to[i] = narrow<O>(sum);
    }
  }
}

}  // namespace

void combine(const Table& out, const Table& grads, const double* weights, bool accumulate, Stream stream) {
  for_each_dtype(grads, [&](DType row_dtype, auto row_tag) {
    using T = Element<decltype(row_tag)>;
    for_each_dtype(out, [&](DType out_dtype, auto out_tag) {
      using O = Element<decltype(out_tag)>;
      if constexpr (kCombines<T, O>)
        IGB_LAUNCH((weighted_sum<T, O>), blocks_for(grads), kThreads, stream, View(out), View(grads), row_dtype, out_dtype,
                   weights, accumulate);
    });
  });
}

// ---- One sign in each element ------------------------------------------------------------------------------

namespace {

// Elements that one stream of random words is for.
constexpr int kDrawn = 4;

template <class T> constexpr int kSignRowsAtOnce = sizeof(T) == 8 ? 1 : 4;  // more would not fit the registers

// As igb::cpu::sign_drop in the columns where rows are T and out is O, with the same sums in the same order.
template <class T, class O>
__global__ void __launch_bounds__(kThreads, 4)
    sign_drop_partial(const View out, const View grads, DType row_dtype, DType out_dtype, const double* counter,
                      const double* leaks, double* partials) {
  using A = Accumulator<T>;
  constexpr int N = kDrawn, kAtOnce = kSignRowsAtOnce<T>;
  __shared__ const T* rows[kMaxTasks];
  __shared__ A shares[kMaxTasks];
  const int tasks = grads.tasks;
  const std::uint64_t seed = std::uint64_t(std::int64_t(counter[0])), step = std::uint64_t(std::int64_t(counter[1]));
  for (int k = threadIdx.x; k < tasks; k += kThreads) shares[k] = leaks ? A(leaks[k]) : A(0);
  A squares[1] = {};
  for (std::int64_t c = blockIdx.x; c < grads.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at<T>(grads, row_dtype, c);
    if (chunk.size == 0 || out.dtype[chunk.param] != std::uint64_t(out_dtype)) continue;
    O* const to = out.row<O>(0, chunk.param, chunk.offset);
    bool aligned = is_aligned(to);
    __syncthreads();  // every thread has left the last chunk's rows
    for (int k = threadIdx.x; k < tasks; k += kThreads) {
      rows[k] = grads.row<const T>(k, chunk.param, chunk.offset);
      aligned = aligned && is_aligned(rows[k]);
    }
    aligned = __syncthreads_and(aligned);
    for (int i = threadIdx.x * N; i < chunk.size; i += kThreads * N) {
      const int count = chunk.size - i < N ? chunk.size - i : N;
      const bool whole = aligned && count == N;
      A positive[N] = {}, negative[N] = {}, leaked_positive[N] = {}, leaked_negative[N] = {};
      for (int first = 0; first < tasks; first += kAtOnce) {
        Packed<T, N> packed[kAtOnce];
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          const T* const row = first + r < tasks ? rows[first + r] : nullptr;
          if (!row) continue;
          if (whole) {
            packed[r].load(row + i);
          } else {
#pragma unroll
            for (int e = 0; e < N; ++e)
              if (e < count) packed[r].set(e, widen(row[i + e]));
          }
        }
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          if (first + r >= tasks || !rows[first + r]) continue;
          const A leak = shares[first + r];
#pragma unroll
          for (int e = 0; e < N; ++e) {
            const A g = packed[r].get(e), above = g > A(0) ? g : A(0), below = above - g;
            positive[e] += above;
            negative[e] += below;
            leaked_positive[e] += leak * above;
            leaked_negative[e] += leak * below;
          }
        }
      }
      const Random4 random = philox(seed, step, element_stream(chunk.param, chunk.offset + i));
      Packed<O, N> result;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const A all = positive[e] + negative[e], difference = positive[e] - negative[e];
        const bool up = difference > A(signed_uniform(random.words[e])) * all;
        const A v = up ? positive[e] - leaked_negative[e] : leaked_positive[e] - negative[e];
        result.set(e, v + (all - all));  // NaN where not finite
        const A written = A(result.get(e));
        squares[0] += written * written;  // beyond the end, zeros
      }
      if (whole) {
        result.store(to + i);
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e)
          if (e < count) to[i + e] = narrow<O>(result.get(e));
      }
    }
  }
  block_sums(squares, partials + blockIdx.x);
}

}  // namespace

void sign_drop(const Table& out, const Table& grads, const double* counter, const double* leaks, double* norm,
               double* scratch, Stream stream) {
  if (grads.dtypes == 0) return IGB_CUDA_CHECK(cudaMemsetAsync(norm, 0, sizeof(double), stream));
  const int blocks = blocks_for(grads);
  bool accumulate = false;
  for_each_dtype(grads, [&](DType row_dtype, auto row_tag) {
    using T = Element<decltype(row_tag)>;
    for_each_dtype(out, [&](DType out_dtype, auto out_tag) {
      using O = Element<decltype(out_tag)>;
      if constexpr (kCombines<T, O>) {
        IGB_LAUNCH((sign_drop_partial<T, O>), blocks, kThreads, stream, View(out), View(grads), row_dtype, out_dtype,
                   counter, leaks, scratch);
        IGB_LAUNCH(norm_total, 1, kThreads, stream, scratch, blocks, 1, accumulate, norm);
        accumulate = true;
      }
    });
  });
}

// ---- Rollback --------------------------------------------------------------------------------------------

namespace {

// Grid: (blocks, tasks).
template <class A>
__global__ void __launch_bounds__(kThreads)
    restore(const View out, const View kept, DType dtype, const std::int32_t* status) {
  if (!(*status & non_finite)) return;
  for (std::int64_t c = blockIdx.x; c < out.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at<A>(out, dtype, c);
    A* const to = out.row<A>(blockIdx.y, chunk.param, chunk.offset);
    const A* const from = kept.row<const A>(blockIdx.y, chunk.param, chunk.offset);
    if (!to) continue;
    for (int i = threadIdx.x; i < chunk.size; i += kThreads) to[i] = from ? from[i] : A(0);
  }
}

}  // namespace

void rollback(const Table& out, const Table& kept, const std::int32_t* status, Stream stream) {
  const dim3 grid(blocks_for(out), out.tasks);
  for_each_dtype(out, [&](DType dtype, auto tag) {
    using A = Element<decltype(tag)>;
    if constexpr (std::is_same_v<A, Accumulator<A>>)
      IGB_LAUNCH(restore<A>, grid, kThreads, stream, View(out), View(kept), dtype, status);
  });
}

}  // namespace igb::cuda
