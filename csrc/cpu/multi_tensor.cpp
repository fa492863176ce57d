#include "multi_tensor.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../core/philox.h"
#include "chunk_kernels.h"

namespace igb::cpu {
namespace {

// ---- Instruction sets ------------------------------------------------------------------------------------

bool runs_here(const ChunkKernels& kernels) {
#ifdef IGB_X86_KERNELS
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (&kernels == &avx512bf16_kernels) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (&kernels == &avx512_kernels) return avx512;
  if (&kernels == &avx2_kernels)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return &kernels == &portable_kernels;
}

constexpr const ChunkKernels* kBestFirst[] = {
#ifdef IGB_X86_KERNELS
    &avx512bf16_kernels, &avx512_kernels, &avx2_kernels,
#endif
    &portable_kernels};

const ChunkKernels* chosen = *std::find_if(std::begin(kBestFirst), std::end(kBestFirst),
                                           [](const ChunkKernels* k) { return runs_here(*k); });

// ---- Chunks, blocks, threads -----------------------------------------------------------------------------

struct Chunk {
  std::int64_t param, offset, size;
};

// In bytes of one row: long enough that the hardware's prefetching and the sums at a chunk's end cost little, short
// enough that K rows of it stay in the second-level cache.
std::int64_t chunk_bytes(int tasks) {
  constexpr std::int64_t kCached = 512 << 10, kLongest = 32 << 10, kShortest = 4 << 10;
  return std::clamp(kCached / tasks / kShortest * kShortest, kShortest, kLongest);
}

// Enough blocks to share out evenly, few enough that their K×K sums stay small.
std::int64_t most_blocks(std::int64_t tasks) {
  constexpr std::int64_t kMost = 64, kMostSums = 1 << 22;
  return std::clamp(kMostSums / (tasks * tasks), std::int64_t(1), kMost);
}
constexpr std::int64_t kElementsWorthAThread = 262144;  // 1 MiB of float32: microseconds, like waking a thread

class Partition {
 public:
  explicit Partition(const TensorTable& table) {
    const std::int64_t bytes = chunk_bytes(table.tasks);
    chunks_.clear();
    for (std::int64_t p = 0; p < table.params; ++p) {
      const std::int64_t size = bytes / element_size(table.dtype[p]);
      for (std::int64_t at = 0; at < table.numel[p]; at += size)
        chunks_.push_back({p, at, std::min(size, table.numel[p] - at)});
      elements_ += table.numel[p] * table.tasks;
    }
    blocks_ = int(std::min(most_blocks(table.tasks), std::int64_t(chunks_.size())));
  }

  int blocks() const { return blocks_; }
  std::int64_t elements() const { return elements_; }
  // body(block, chunk) for every chunk of every block: blocks in any order, the chunks of one in sequence.
  template <class Body> void for_each(int threads, Body&& body) const {
    const auto useful = std::min<std::int64_t>(blocks_, 1 + elements_ / kElementsWorthAThread);
    const int team = int(std::min<std::int64_t>(threads, useful));
    const auto run = [this, &body, chunks = &chunks_](int block) {
      const std::size_t count = chunks->size();
      for (std::size_t c = count * block / blocks_; c < count * (block + 1) / blocks_; ++c) body(block, (*chunks)[c]);
    };
    if (team <= 1) {
      for (int b = 0; b < blocks_; ++b) run(b);
      return;
    }
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
    for (int b = 0; b < blocks_; ++b) run(b);
  }

 private:
  // Kept between calls, like the buffers below: a step on a small model should not allocate.
  static thread_local std::vector<Chunk> chunks_;
  std::int64_t elements_ = 0;
  int blocks_;
};
thread_local std::vector<Chunk> Partition::chunks_;

// `size` bytes of the calling thread's own, reused by its next call with the same Tag.
template <class Tag> void* thread_buffer(std::size_t size) {
  static thread_local std::vector<double> buffer;
  const std::size_t doubles = (size + 7) / 8;
  if (buffer.size() < doubles) buffer.resize(doubles);
  return buffer.data();
}
struct BlockSums;
struct Scratch;

// Zeroed sums, `width` for each block, and their total in the order of the blocks.
class Sums {
 public:
  Sums(int blocks, std::int64_t width)
      : data_(static_cast<double*>(thread_buffer<BlockSums>(sizeof(double) * blocks * width))),
        blocks_(blocks), width_(width) {
    std::fill_n(data_, blocks * width, 0.0);
  }
  double* of(int block) { return data_ + block * width_; }
  void total(double* out) const {
    std::fill_n(out, width_, 0.0);
    for (int b = 0; b < blocks_; ++b)
      for (std::int64_t i = 0; i < width_; ++i) out[i] += data_[b * width_ + i];
  }

 private:
  double* data_;
  int blocks_;
  std::int64_t width_;
};

void* at(const TensorTable& table, int row, const Chunk& chunk) {
  const std::uintptr_t base = table.address[row * table.params + chunk.param];
  return base ? reinterpret_cast<void*>(base + chunk.offset * element_size(table.dtype[chunk.param])) : nullptr;
}

// The rows that reach a chunk's parameter, by task number in ascending order.
struct PresentRows {
  const void* rows[kMaxTasks];
  int index[kMaxTasks];
  int count = 0;

  PresentRows(const TensorTable& table, const Chunk& chunk) {
    for (int k = 0; k < table.tasks; ++k)
      if (const void* row = at(table, k, chunk)) {
        rows[count] = row;
        index[count++] = k;
      }
  }
};

}  // namespace

// ---- Operations ------------------------------------------------------------------------------------------

void gram(const TensorTable& grads, double* gram, int threads) {
  const int K = grads.tasks;
  const Partition partition(grads);
  Sums sums(partition.blocks(), std::int64_t(K) * K);
  partition.for_each(threads, [&](int block, const Chunk& chunk) {
    const PresentRows present(grads, chunk);
    chosen->gram(grads.dtype[chunk.param], present.rows, present.index, present.count, std::size_t(chunk.size),
                 sums.of(block), K);
  });
  sums.total(gram);
  for (int i = 0; i < K; ++i)
    for (int j = 0; j < i; ++j) gram[j * K + i] = gram[i * K + j];
}

void sq_norms(const TensorTable& grads, double* norms, int threads) {
  const Partition partition(grads);
  Sums sums(partition.blocks(), grads.tasks);
  partition.for_each(threads, [&](int block, const Chunk& chunk) {
    for (int k = 0; k < grads.tasks; ++k)
      if (const void* row = at(grads, k, chunk))
        sums.of(block)[k] += chosen->sq_norm(grads.dtype[chunk.param], row, std::size_t(chunk.size));
  });
  sums.total(norms);
}

namespace {

// totals[k] = the sum over row k of update(dtype, out, state, grad, k, size, past_caches), where out has an entry.
template <class F>
void update_rows(const TensorTable& out, const TensorTable& state, const TensorTable& grads, double* totals, int threads,
                 F&& update) {
  const Partition partition(out);
  Sums sums(partition.blocks(), out.tasks);
  constexpr std::int64_t kElementsBeyondCaches = 2 << 20;
  const bool past_caches = partition.elements() > kElementsBeyondCaches;
  partition.for_each(threads, [&](int block, const Chunk& chunk) {
    for (int k = 0; k < out.tasks; ++k)
      if (void* to = at(out, k, chunk))
        sums.of(block)[k] += update(grads.dtype[chunk.param], to, at(state, k, chunk), at(grads, k, chunk), k,
                                    std::size_t(chunk.size), past_caches);
  });
  sums.total(totals);
}

}  // namespace

void ema(const TensorTable& out, const TensorTable& state, const TensorTable& grads, double decay, const double* scales,
         double* norms, int threads) {
  update_rows(out, state, grads, norms, threads,
              [&](DType dtype, void* to, const void* old, const void* grad, int k, std::size_t size, bool past_caches) {
                const double take = (1 - decay) * (scales ? scales[k] : 1.0);
                return chosen->ema(dtype, to, old, grad, size, decay, take, past_caches);
              });
}

void accumulate_squares(const TensorTable& out, const TensorTable& state, const TensorTable& grads, double eps,
                        double* excess, int threads) {
  update_rows(out, state, grads, excess, threads,
              [&](DType dtype, void* to, const void* old, const void* grad, int, std::size_t size, bool past_caches) {
                return chosen->add_squares(dtype, to, old, grad, size, eps, past_caches);
              });
}

void combine(const TensorTable& out, const TensorTable& grads, const double* weights, bool accumulate, int threads) {
  const Partition partition(grads);
  partition.for_each(threads, [&](int, const Chunk& chunk) {
    const PresentRows present(grads, chunk);
    double present_weights[kMaxTasks];
    for (int i = 0; i < present.count; ++i) present_weights[i] = weights[present.index[i]];
    void* const scratch = thread_buffer<Scratch>(sizeof(double) * chunk.size);
    chosen->combine(grads.dtype[chunk.param], out.dtype[chunk.param], at(out, 0, chunk), present.rows,
                    present_weights, present.count, std::size_t(chunk.size), accumulate, scratch);
  });
}

void sign_drop(const TensorTable& out, const TensorTable& grads, std::uint64_t seed, std::uint64_t step,
               const double* leaks, double* norm, int threads) {
  const Partition partition(grads);
  Sums sums(partition.blocks(), 1);
  partition.for_each(threads, [&](int block, const Chunk& chunk) {
    const PresentRows present(grads, chunk);
    double present_leaks[kMaxTasks];
    if (leaks)
      for (int i = 0; i < present.count; ++i) present_leaks[i] = leaks[present.index[i]];
    *sums.of(block) += chosen->sign_drop(
        grads.dtype[chunk.param], out.dtype[chunk.param], at(out, 0, chunk), present.rows, leaks ? present_leaks : nullptr,
        present.count, std::size_t(chunk.size), seed, step,
        element_stream(std::uint64_t(chunk.param), std::uint64_t(chunk.offset)));
  });
  sums.total(norm);
}

const char* instruction_set() { return chosen->name; }

bool use_instruction_set(const char* name) {
  for (const ChunkKernels* k : kBestFirst)
    if (!std::strcmp(k->name, name) && runs_here(*k)) {
      chosen = k;
      return true;
    }
  return false;
}

}  // namespace igb::cpu
