// The chunk kernels' bodies. Each kernels_<isa>.cpp includes this once, compiled with its own flags.
#include <type_traits>
#include <utility>

#include "../core/philox.h"
#include "chunk_kernels.h"
#include "simd.h"

namespace {

using igb::DType;

template <class T> const T* cast(const void* p) { return static_cast<const T*>(p); }

// Calls f with a null pointer of the element type.
template <class F> auto with_type(DType t, F&& f) {
  switch (t) {
    case DType::f64: return f(static_cast<double*>(nullptr));
    case DType::bf16: return f(static_cast<bf16*>(nullptr));
    case DType::f16: return f(static_cast<f16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}
template <class P> using Element = std::remove_pointer_t<P>;

// ---- Gramian ---------------------------------------------------------------------------------------------

// The accumulators of a tile must fit in the registers: 32 of them with AVX-512, else 16.
constexpr int kTile = IGB_SIMD_BYTES == 64 ? 4 : 3;

// Few pairs are unrolled so that the additions of a lane do not wait for each other.
constexpr int unroll_for(int pairs) { return pairs >= 8 ? 1 : pairs >= 4 ? 2 : 4; }

// Vectors summed in registers before they join the chunk's total: short sums of short sums round less than a long one.
constexpr size_t kRun = 64;

// sums[i][j] = <a_i, b_j>; on the diagonal a and b are the same rows, and only j <= i is computed.
template <class T, int I, bool Diagonal>
void gram_tile(const T* const* a, const T* const* b, size_t n, double (*sums)[kTile]) {
  using A = Accumulator<T>;
  constexpr int J = Diagonal ? I : kTile;
  constexpr int U = unroll_for(Diagonal ? I * (I + 1) / 2 : I * J);
  constexpr size_t N = kLanes<A>, kStep = kParts<T> * N;
  Vec<A> total[I][J] = {};
  const auto add = [&](Vec<A> (&into)[I][J], auto&& vector_of) __attribute__((always_inline)) {
    decltype(vector_of(a[0])) x[I], y[J];
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i) x[i] = vector_of(a[i]);
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) y[j] = Diagonal ? x[j] : vector_of(b[j]);
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < (Diagonal ? i + 1 : J); ++j) into[i][j] = multiply_add(x[i], y[j], into[i][j]);
  };
  size_t e = 0;
  while (e + U * kStep <= n) {
    Vec<A> acc[U][I][J] = {};
    const size_t end = n - e < kRun * kStep ? n : e + kRun * kStep;
    for (; e + U * kStep <= end; e += U * kStep)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const size_t at = e + u * kStep;
        if constexpr (kMultipliesPairs<T>) {
          add(acc[u], [at](const T* p) { return load_pairs(p + at); });
        } else {
          add(acc[u], [at](const T* p) { return load_part<0>(p + at); });
          if constexpr (kParts<T> == 2) add(acc[u], [at](const T* p) { return load_part<1>(p + at); });
        }
      }
    for (int i = 0; i < I; ++i)
      for (int j = 0; j < (Diagonal ? i + 1 : J); ++j)
        for (int u = 0; u < U; ++u) total[i][j] += acc[u][i][j];
  }
  for (; e + N <= n; e += N) add(total, [&](const T* p) { return load(p + e); });
  if (e < n) add(total, [&](const T* p) { return load_first(p + e, n - e); });
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < (Diagonal ? i + 1 : J); ++j) sums[i][j] = sum_lanes<A>(total[i][j]);
}

template <class T> using TileKernel = void (*)(const T* const*, const T* const*, size_t, double (*)[kTile]);

// Only the last tile of rows can be narrower than kTile, so below the diagonal b is always full.
template <class T, bool Diagonal, size_t... I>
constexpr TileKernel<T> tile_kernel(int rows, std::index_sequence<I...>) {
  constexpr TileKernel<T> kernels[] = {&gram_tile<T, int(I) + 1, Diagonal>...};
  return kernels[rows - 1];
}

template <class T>
void gram_of(const void* const* untyped, const int* index, int count, size_t n, double* sums, int stride) {
  constexpr auto heights = std::make_index_sequence<kTile>{};
  const T* const* const rows = reinterpret_cast<const T* const*>(untyped);
  for (int i0 = 0; i0 < count; i0 += kTile) {
    const int height = count - i0 < kTile ? count - i0 : kTile;
    for (int j0 = 0; j0 <= i0; j0 += kTile) {
      const bool diagonal = i0 == j0;
      double tile[kTile][kTile];
      (diagonal ? tile_kernel<T, true>(height, heights) : tile_kernel<T, false>(height, heights))(
          rows + i0, rows + j0, n, tile);
      for (int i = 0; i < height; ++i)
        for (int j = 0; j < (diagonal ? i + 1 : kTile); ++j)
          sums[index[i0 + i] * stride + index[j0 + j]] += tile[i][j];
    }
  }
}

void gram(DType dtype, const void* const* rows, const int* index, int count, size_t n, double* sums, int stride) {
  with_type(dtype, [&](auto tag) { gram_of<Element<decltype(tag)>>(rows, index, count, n, sums, stride); });
}

// ---- Norms, moving averages and sums of squares ----------------------------------------------------------

double sq_norm(DType dtype, const void* row, size_t n) {
  return with_type(dtype, [&](auto tag) {
    using T = Element<decltype(tag)>;
    const T* const rows[] = {cast<T>(row)};
    double sum[1][kTile];
    gram_tile<T, 1, true>(rows, rows, n, sum);
    return sum[0][0];
  });
}

// What a pass over a row writes, from its state and then with its gradient, and what it sums.
template <class A> struct Averaging {
  Vec<A> keep, take;
  Vec<A> from(Vec<A> state) const { return keep * state; }
  Vec<A> with(Vec<A> v, Vec<A> grad) const { return v + take * grad; }
  Vec<A> summand(Vec<A> next, Vec<A>) const { return next * next; }
};

template <class A> struct AddingSquares {
  Vec<A> eps;
  Vec<A> from(Vec<A> state) const { return state; }
  Vec<A> with(Vec<A> v, Vec<A> grad) const { return v + grad * grad; }
  Vec<A> summand(Vec<A> next, Vec<A> grad) const { return grad * grad / square_root(next + eps); }
};

template <class T, bool HasState, bool HasGrad, bool PastCaches, class Rule>
double update_of(Accumulator<T>* out, const Accumulator<T>* state, const T* grad, size_t n, const Rule& rule) {
  using A = Accumulator<T>;
  constexpr int N = kLanes<A>;
  Vec<A> acc[4] = {};
  const auto update = [&](int u, auto&& load_one, auto&& store_one) {
    Vec<A> v = {}, given = {};
    if constexpr (HasState) v = rule.from(load_one(state));
    if constexpr (HasGrad) v = rule.with(v, given = load_one(grad));
    store_one(out, v);
    acc[u] += rule.summand(v, given);
  };
  size_t e = 0;
  const auto whole = [&](int u, size_t at) {
    update(u, [&](auto p) { return load(p + at); }, [&](A* p, Vec<A> v) {
      if constexpr (PastCaches) stream(p + at, v);
      else store(p + at, v);
    });
  };
  for (; e + 4 * N <= n; e += 4 * N)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) whole(u, e + u * N);
  for (; e + N <= n; e += N) whole(0, e);
  if (e < n)
    update(0, [&](auto p) { return load_first(p + e, n - e); },
           [&](A* p, Vec<A> v) { store_first(p + e, v, n - e); });
  return sum_lanes<A>((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// A row's update by rule_for(accumulator{}).
template <class F>
double update(DType grad_dtype, void* out, const void* state, const void* grad, size_t n, bool past_caches,
              F&& rule_for) {
  return with_type(grad_dtype, [&](auto tag) {
    using T = Element<decltype(tag)>;
    using A = Accumulator<T>;
    constexpr std::true_type yes{};
    constexpr std::false_type no{};
    const auto rule = rule_for(A());
    const auto run_with = [&](auto has_state, auto has_grad, auto past) {
      constexpr size_t kPiece = 4 * kRun * kLanes<A>;
      double sum = 0;
      for (size_t at = 0; at < n; at += kPiece) {
        const auto from = [at](auto* p) { return p ? p + at : p; };
        sum += update_of<T, has_state.value, has_grad.value, past.value>(
            from(static_cast<A*>(out)), from(cast<A>(state)), from(cast<T>(grad)), n - at < kPiece ? n - at : kPiece,
            rule);
      }
      if (past) end_streaming();
      return sum;
    };
    const bool aligned = reinterpret_cast<std::uintptr_t>(out) % IGB_SIMD_BYTES == 0;
    const auto run = [&](auto has_state, auto has_grad) {
      return past_caches && aligned && out != state ? run_with(has_state, has_grad, yes)
                                                    : run_with(has_state, has_grad, no);
    };
    return state ? (grad ? run(yes, yes) : run(yes, no)) : (grad ? run(no, yes) : run(no, no));
  });
}

double ema(DType grad_dtype, void* out, const void* state, const void* grad, size_t n, double keep, double take,
           bool past_caches) {
  return update(grad_dtype, out, state, grad, n, past_caches, [&](auto zero) {
    using A = decltype(zero);
    return Averaging<A>{broadcast(A(keep)), broadcast(A(take))};
  });
}

double add_squares(DType grad_dtype, void* out, const void* state, const void* grad, size_t n, double eps,
                   bool past_caches) {
  return update(grad_dtype, out, state, grad, n, past_caches, [&](auto zero) {
    using A = decltype(zero);
    return AddingSquares<A>{broadcast(A(eps))};
  });
}

// ---- Weighted sum ----------------------------------------------------------------------------------------

// More rows than this are summed in groups: the hardware follows about as many streams at once.
constexpr int kStreams = 8;

// out = init + sum_k weights[k] * rows[k] for at most kStreams rows; init may be null, out one of the rows. InParts: the
// bf16 among them are read and written in parts; the others' vectors then hold elements in that order.
template <bool InParts, class T, class I, class O>
void combine_group(O* out, const I* init, const T* const* rows, const double* weights, int count, size_t n) {
  using A = Accumulator<T>;
  constexpr int N = kLanes<A>, U = 4;
  const auto vector_at = [](auto* p, int u) __attribute__((always_inline)) {
    if constexpr (InParts && std::is_same_v<decltype(p), const bf16*>)
      return u % 2 ? load_part<1>(p + (u - 1) * N) : load_part<0>(p + u * N);
    else return load(p + u * N);
  };
  Vec<A> w[kStreams];
  for (int k = 0; k < count; ++k) w[k] = broadcast(A(weights[k]));
  size_t e = 0;
  for (; e + U * N <= n; e += U * N) {
    Vec<A> acc[U] = {};
    if (init)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) acc[u] = vector_at(init + e, u);
    for (int k = 0; k < count; ++k)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) acc[u] += w[k] * vector_at(rows[k] + e, u);
    if constexpr (InParts && std::is_same_v<O, bf16>)
#pragma GCC unroll 4
      for (int u = 0; u < U; u += 2) store_parts(out + e + u * N, acc[u], acc[u + 1]);
    else
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) store(out + e + u * N, acc[u]);
  }
  for (; e < n; e += N) {
    const size_t left = n - e;
    Vec<A> acc = {};
    if (init) acc = load_first(init + e, left < N ? left : N);
    for (int k = 0; k < count; ++k) acc += w[k] * load_first(rows[k] + e, left < N ? left : N);
    store_first(out + e, acc, left < N ? left : N);
  }
}

template <class T, class O>
void combine_of(O* out, const void* const* rows, const double* weights, int count, size_t n, bool accumulate,
                Accumulator<T>* partial) {
  using A = Accumulator<T>;
  constexpr bool kInParts = std::is_same_v<T, bf16> && std::is_same_v<O, bf16>;
  const T* group[kStreams];
  const O* const init = accumulate ? out : nullptr;
  for (int k0 = 0; k0 == 0 || k0 < count; k0 += kStreams) {
    const int width = count - k0 < kStreams ? count - k0 : kStreams;
    for (int k = 0; k < width; ++k) group[k] = cast<T>(rows[k0 + k]);
    const bool first = k0 == 0, last = k0 + width == count;
    // Between groups the sum stays in `partial`: out may be a row that is still to be read.
    if (first && last) combine_group<kInParts>(out, init, group, weights, width, n);
    else if (first) combine_group<kInParts>(partial, init, group, weights, width, n);
    else if (last) combine_group<kInParts>(out, static_cast<const A*>(partial), group, weights + k0, width, n);
    else combine_group<kInParts>(partial, static_cast<const A*>(partial), group, weights + k0, width, n);
  }
}

// Whether sums of T can be written as O: in the same precision, widened to the accumulator's, or rounded from it.
template <class T, class O>
constexpr bool kCombines = std::is_same_v<O, T> || std::is_same_v<O, Accumulator<T>> ||
                           (std::is_same_v<T, Accumulator<T>> && std::is_same_v<Accumulator<O>, T>);

void combine(DType row_dtype, DType out_dtype, void* out, const void* const* rows, const double* weights, int count,
             size_t n, bool accumulate, void* scratch) {
  with_type(row_dtype, [&](auto row_tag) {
    using T = Element<decltype(row_tag)>;
    with_type(out_dtype, [&](auto out_tag) {
      using O = Element<decltype(out_tag)>;
      using A = Accumulator<T>;
      if constexpr (kCombines<T, O>)
        combine_of<T, O>(static_cast<O*>(out), rows, weights, count, n, accumulate,
                         static_cast<A*>(scratch));
    });
  });
}

// ---- One sign in each element ------------------------------------------------------------------------------

// Elements whose random numbers and sums stay in the first-level cache.
constexpr size_t kPiece = 512;

// words[0 .. n) are those of igb::philox(seed, step, stream), igb::philox(seed, step, stream + 1), …; up to a whole
// number of vectors more are written. Of each lane of 64 bits the lower half counts, until the end.
void random_words(std::uint32_t* words, size_t n, std::uint64_t seed, std::uint64_t step, std::uint64_t stream) {
  constexpr int N = kWideLanes;
  Wide lane, first, second;
  for (int i = 0; i < N; ++i) {
    lane[i] = i;
    first[i] = i / 2 + (i % 2 ? N : 0);
    second[i] = first[i] + N / 2;
  }
  const Wide multiplier0 = Wide{} + igb::kPhiloxMultiplier0, multiplier1 = Wide{} + igb::kPhiloxMultiplier1;
  for (size_t at = 0; at < n; at += 4 * N, stream += N) {
    Wide x0 = lane + stream, x1 = x0 >> 32, x2 = Wide{} + step, x3 = x2 >> 32;
    std::uint32_t key0 = std::uint32_t(seed), key1 = std::uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < igb::kPhiloxRounds; ++round) {
      const Wide product0 = multiply_lower(x0, multiplier0), product1 = multiply_lower(x2, multiplier1);
      x0 = product1 >> 32 ^ x1 ^ key0;
      x1 = product1;
      x2 = product0 >> 32 ^ x3 ^ key1;
      x3 = product0;
      key0 += igb::kPhiloxKeyStep0;
      key1 += igb::kPhiloxKeyStep1;
    }
    const Wide low = (x0 & 0xffffffffu) | x1 << 32, high = (x2 & 0xffffffffu) | x3 << 32;
    *reinterpret_cast<UnalignedWide*>(words + at) = __builtin_shuffle(low, high, first);
    *reinterpret_cast<UnalignedWide*>(words + at + 2 * N) = __builtin_shuffle(low, high, second);
  }
}

// Sums over rows: of the positive entries and of the negative ones' sizes, and of both times the rows' leaks. A NaN or
// inf among the entries makes `negative` non-finite, or `positive`.
template <class A> struct SignSums {
  Vec<A> positive, negative, leaked_positive, leaked_negative;
  template <bool Leaks> void add(Vec<A> g, Vec<A> leak) {
    const Vec<A> above = g > 0 ? g : Vec<A>{}, below = above - g;
    positive += above;
    negative += below;
    if constexpr (Leaks) {
      leaked_positive += leak * above;
      leaked_negative += leak * below;
    }
  }
  // t = 2U - 1; U is below the positive share if t is below the difference's. Rounds only sums and one product, so that
  // every backend decides alike.
  Vec<A> chosen(Vec<A> t) const {
    const Vec<A> all = positive + negative, difference = positive - negative;
    const Vec<A> v = difference > t * all ? positive - leaked_negative : leaked_positive - negative;
    return v + (all - all);  // NaN where not finite
  }
};

// At most kPiece elements.
template <bool Leaks, class T, class O>
double sign_drop_piece(O* out, const void* const* rows, size_t offset, const double* leaks, int count, size_t n,
                       const std::uint32_t* words) {
  using A = Accumulator<T>;
  constexpr size_t N = kLanes<A>;
  A t[kPiece];
  for (size_t i = 0; i < n; ++i) t[i] = A(std::int32_t(words[i] >> 7 | 1u) - (1 << 24)) * A(1.0 / (1 << 24));
  SignSums<A> sums[kPiece / N];  // between groups of rows
  Vec<A> squares = {};
  for (int k0 = 0; k0 == 0 || k0 < count; k0 += kStreams) {
    const int end = count - k0 < kStreams ? count : k0 + kStreams;
    for (size_t e = 0; e < n; e += N) {
      const size_t left = n - e;
      SignSums<A> s = {};
      if (k0 > 0) s = sums[e / N];
      for (int k = k0; k < end; ++k) {
        const T* const row = cast<T>(rows[k]) + offset + e;
        s.template add<Leaks>(left < N ? load_first(row, left) : load(row), broadcast(A(Leaks ? leaks[k] : 0)));
      }
      if (end < count) {
        sums[e / N] = s;
      } else if (left < N) {
        store_first(out + e, s.chosen(load_first(t + e, left)), left);
        const Vec<A> written = load_first(out + e, left);
        squares += written * written;
      } else {
        store(out + e, s.chosen(load(t + e)));
        const Vec<A> written = load(out + e);
        squares += written * written;
      }
    }
  }
  return sum_lanes<A>(squares);
}

double sign_drop(DType row_dtype, DType out_dtype, void* out, const void* const* rows, const double* leaks, int count,
                 size_t n, std::uint64_t seed, std::uint64_t step, std::uint64_t stream) {
  double sum = 0;
  with_type(row_dtype, [&](auto row_tag) {
    using T = Element<decltype(row_tag)>;
    with_type(out_dtype, [&](auto out_tag) {
      using O = Element<decltype(out_tag)>;
      if constexpr (kCombines<T, O>)
        for (size_t at = 0; at < n; at += kPiece) {
          const size_t size = n - at < kPiece ? n - at : kPiece;
          std::uint32_t words[kPiece];
          random_words(words, size, seed, step, stream + at / 4);
          const auto piece = leaks ? sign_drop_piece<true, T, O> : sign_drop_piece<false, T, O>;
          sum += piece(static_cast<O*>(out) + at, rows, at, leaks, count, size, words);
        }
    });
  });
  return sum;
}

}  // namespace
