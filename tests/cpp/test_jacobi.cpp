// The factor of a scaled Gramian and the one-sided Jacobi rotations, alone and in Aligned-MTL and ConFIG.
#include "check.h"
#include "factor.h"
#include "jacobi.h"

using namespace check;

namespace {

struct Factored {
  Vector workspace, norms_values;
  igb::CosineFactor factor;
};

Factored factor_of(const Vector& gram, int tasks, bool scaled) {
  Factored result{Vector(igb::factor_size(tasks), NAN), Vector(tasks), {}};
  const igb::Problem problem{tasks, gram.data(), true, nullptr, nullptr, nullptr, nullptr};
  const igb::SerialTeam team;
  const igb::Norms norms = igb::measure_norms(problem, true, 1e-12, result.norms_values.data(), team);
  result.factor = igb::factor_cosines(problem, norms, scaled ? result.norms_values.data() : nullptr,
                                      result.workspace.data(), team);
  return result;
}

double product(const Vector& workspace, int tasks, int length, int i, int j) {
  double sum = 0.0;
  for (int m = 0; m < length; ++m) sum += workspace[i * tasks + m] * workspace[j * tasks + m];
  return sum;
}

}  // namespace

TEST(the_factor_gives_the_gramian_back) {
  std::mt19937_64 engine(51);
  for (const int tasks : {1, 2, 3, 8, 17})
    for (const int columns : {2 * tasks, tasks / 2 + 1}) {
      const Vector gram =
          rescaled(gram_of(random_rows(tasks, columns, engine), tasks), random_scales(tasks, 3.0, engine));
      const Factored found = factor_of(gram, tasks, true);
      CHECK(found.factor.rank == std::min(tasks, columns));
      for (int i = 0; i < tasks; ++i)
        for (int j = 0; j < tasks; ++j) {
          const int a = found.factor.task(i), b = found.factor.task(j);
          const double scale = std::sqrt(gram[a * tasks + a] * gram[b * tasks + b]);
          CHECK_NEAR(product(found.workspace, tasks, tasks, i, j) / scale, gram[a * tasks + b] / scale, 1e-13);
        }
    }
}

TEST(folding_empties_the_dependent_vectors_and_can_be_undone) {
  std::mt19937_64 engine(52);
  const int tasks = 7, columns = 4;
  const Vector gram = gram_of(random_rows(tasks, columns, engine), tasks);
  Factored found = factor_of(gram, tasks, false);
  CHECK(found.factor.rank == columns);
  Vector sum(tasks, 0.0), numbers(tasks), folded(tasks);  // F'p, which orthogonal rotations of both sides keep
  for (int i = 0; i < tasks; ++i) {
    numbers[i] = folded[i] = 0.3 + i;
    for (int m = 0; m < columns; ++m) sum[m] += numbers[i] * found.workspace[i * tasks + m];
  }
  igb::fold(tasks, found.factor, folded.data(), igb::SerialTeam{});
  for (int m = 0; m < columns; ++m) {
    double kept = 0.0;
    for (int k = m; k < columns; ++k) kept += folded[k] * found.workspace[k * tasks + m];
    CHECK_NEAR(kept, sum[m], 1e-12);
  }
  igb::unfold(tasks, found.factor, folded.data(), igb::SerialTeam{});
  for (int i = 0; i < tasks; ++i) CHECK_NEAR(folded[i], numbers[i], 1e-13);
}

TEST(rotations_make_vectors_orthogonal_and_keep_what_they_are_orthogonal_to) {
  std::mt19937_64 engine(53);
  for (const int count : {1, 2, 3, 8, 15, 32}) {
    const int stride = count + 3;
    Vector vectors = random_rows(count, stride, engine), numbers(count, 1.0), sum(count, 0.0);
    const Vector scales = random_scales(count, 4.0, engine);
    for (int k = 0; k < count; ++k)
      for (int m = 0; m < count; ++m) sum[m] += vectors[k * stride + m] *= scales[k];
    double volume = 0.0;  // of the Gramian's trace
    for (int k = 0; k < count; ++k)
      for (int m = 0; m < count; ++m) volume += vectors[k * stride + m] * vectors[k * stride + m];
    Vector worst((count + 1) / 2);
    CHECK(igb::orthogonalize(count, count, stride, vectors.data(), numbers.data(), worst.data(), igb::SerialTeam{}));
    double lengths = 0.0;
    for (int i = 0; i < count; ++i) {
      lengths += product(vectors, stride, count, i, i);
      for (int j = 0; j < i; ++j) {
        const double length = std::sqrt(product(vectors, stride, count, i, i) * product(vectors, stride, count, j, j));
        CHECK(std::fabs(product(vectors, stride, count, i, j)) <= 4e-16 * stride * length);
      }
    }
    CHECK_NEAR(lengths / volume, 1.0, 1e-13);
    for (int m = 0; m < count; ++m) {
      double kept = 0.0;
      for (int k = 0; k < count; ++k) kept += numbers[k] * vectors[k * stride + m];
      CHECK_NEAR(kept, sum[m], 1e-12 * std::sqrt(volume));
    }
  }
}

TEST(parallel_vectors_of_equal_length_converge) {
  Vector vectors = {1.0, 1e-9, 1.0, -1e-9}, numbers = {1.0, 0.0}, worst(1);
  CHECK(igb::orthogonalize(2, 2, 2, vectors.data(), numbers.data(), worst.data(), igb::SerialTeam{}));
  CHECK_NEAR(vectors[0] * vectors[2] + vectors[1] * vectors[3], 0.0, 1e-24);
}

// G = [[1, c], [c, e^2]] has small eigenvalue e^2 (1 - c'^2) / ..., far below what its entries' rounding allows.
TEST(aligned_mtl_keeps_small_tasks) {
  const double cosine = 0.6;
  for (const double small : {1.0, 1e-3, 1e-6, 1e-9}) {
    Input input = make_input(igb::Method::aligned_mtl, 2, {1.0, cosine * small, cosine * small, small * small});
    input.options = {0.0};
    input.per_task = {0.0, 1.0};
    const Result first = run(igb::Method::aligned_mtl, input);
    input.per_task = {1.0, 0.0};
    const Result second = run(igb::Method::aligned_mtl, input);
    // G^(-1/2) = adj(G)^(1/2) / sqrt(det): (G + sqrt(det)) / (sqrt(det) sqrt(trace + 2 sqrt(det))), adjugate.
    const double root = small * std::sqrt(1.0 - cosine * cosine), trace = 1.0 + small * small;
    const double largest = 0.5 * (trace + std::sqrt((1.0 - small * small) * (1.0 - small * small) +
                                                    4.0 * cosine * cosine * small * small));
    const double factor = root / std::sqrt(largest) / (root * std::sqrt(trace + 2.0 * root));
    CHECK_NEAR(first.weights[1] / (factor * (1.0 + root)), 1.0, 1e-13);
    CHECK_NEAR(first.weights[0] / (-factor * cosine * small), 1.0, 1e-13);
    CHECK_NEAR(second.weights[0] / (factor * (small * small + root)), 1.0, 1e-13);
    CHECK_NEAR(second.weights[1] / first.weights[0], 1.0, 1e-13);
    CHECK(first.status == 0);
  }
}

TEST(config_in_closed_form) {
  // K = 2: equal cosines, v = 1 / (1 + c), length (n1 + n2) sqrt((1 + c) / 2).
  const double cosine = -0.8;
  const Vector gram = rescaled({1.0, cosine, cosine, 1.0}, {3.0, 1e-5});
  const Result result = run(igb::Method::config, 2, gram);
  CHECK_NEAR(update_norm(gram, result.weights), (3.0 + 1e-5) * std::sqrt(0.5 * (1.0 + cosine)), 1e-13);
  CHECK_NEAR(result.weights[0] * 3.0 / (result.weights[1] * 1e-5), 1.0, 1e-13);
  const Result opposed = run(igb::Method::config, 2, {1.0, -3.0, -3.0, 9.0});
  CHECK(opposed.weights == Vector(2, 0.0));
  CHECK(opposed.status == igb::pareto_stationary);
}
