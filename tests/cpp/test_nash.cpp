// Nash-MTL: the defining equation on hard families, clipping, holding, the state, and Pareto-stationary points.
#include "check.h"

using namespace check;

namespace {

// The error that rounding alpha to double leaves in its equation: large where a nonnegative combination nearly vanishes.
double rounding_error(const Vector& gram, const Vector& alpha) {
  const std::size_t tasks = alpha.size();
  double worst = 0.0;
  for (std::size_t i = 0; i < tasks; ++i) {
    double magnitude = 0.0;
    for (std::size_t j = 0; j < tasks; ++j) magnitude += std::fabs(alpha[i] * gram[i * tasks + j] * alpha[j]);
    worst = std::fmax(worst, magnitude);
  }
  return igb::machine_epsilon * worst;
}

// max |a_i (G a)_i - 1|
double residual(const Vector& gram, const Vector& alpha) {
  long double worst = 0.0L;
  for (std::size_t i = 0; i < alpha.size(); ++i)
    worst = std::fmax(worst, std::fabs(alpha[i] * projection(gram, alpha, static_cast<int>(i)) - 1.0L));
  return static_cast<double>(worst);
}

Result solve(const Vector& gram, int tasks) { return run(igb::Method::nash_mtl, tasks, gram); }

// Q diag(1 .. 1/condition) Q' with a random rotation Q.
Vector conditioned_gram(int tasks, double condition, std::mt19937_64& engine) {
  Vector rows = random_rows(tasks, tasks, engine);
  for (int i = 0; i < tasks; ++i) {  // Gram-Schmidt, twice
    for (int pass = 0; pass < 2; ++pass)
      for (int j = 0; j < i; ++j) {
        double overlap = 0.0;
        for (int c = 0; c < tasks; ++c) overlap += rows[i * tasks + c] * rows[j * tasks + c];
        for (int c = 0; c < tasks; ++c) rows[i * tasks + c] -= overlap * rows[j * tasks + c];
      }
    double square = 0.0;
    for (int c = 0; c < tasks; ++c) square += rows[i * tasks + c] * rows[i * tasks + c];
    for (int c = 0; c < tasks; ++c) rows[i * tasks + c] /= std::sqrt(square);
  }
  for (int c = 0; c < tasks; ++c) {
    const double scale = tasks > 1 ? std::pow(condition, -0.5 * c / (tasks - 1)) : 1.0;
    for (int i = 0; i < tasks; ++i) rows[i * tasks + c] *= scale;
  }
  return gram_of(rows, tasks);
}

Vector duplicated_gram(int tasks, std::mt19937_64& engine) {
  Vector rows = random_rows(tasks, 2 * tasks, engine);
  for (int i = 1; i < tasks; i += 2)
    for (int c = 0; c < 2 * tasks; ++c) rows[i * 2 * tasks + c] = rows[(i - 1) * 2 * tasks + c];
  return gram_of(rows, tasks);
}

Vector near_parallel_gram(int tasks, std::mt19937_64& engine) {
  Vector rows = random_rows(tasks, 2 * tasks, engine);
  for (int i = 0; i < tasks; ++i)
    for (int c = 0; c < 2 * tasks; ++c) rows[i * 2 * tasks + c] = 1.0 + 1e-6 * rows[i * 2 * tasks + c];
  return gram_of(rows, tasks);
}

using Family = std::function<Vector(int tasks, std::mt19937_64& engine)>;

Family scaled_rows(double decades) {
  return [=](int tasks, std::mt19937_64& engine) {
    return rescaled(random_gram(tasks, engine), random_scales(tasks, decades, engine));
  };
}

Family all_rows(double scale) {
  return [=](int tasks, std::mt19937_64& engine) { return rescaled(random_gram(tasks, engine), Vector(tasks, scale)); };
}

}  // namespace

TEST(nash_solves_its_equation_on_every_family) {
  const struct { const char* name; Family make; } families[] = {
      {"random", random_gram},          {"norms 1e-2..1e2", scaled_rows(2)}, {"rows 1e-3..1e3", scaled_rows(3)},
      {"rows 1e-5..1e5", scaled_rows(5)}, {"all rows 1e-8", all_rows(1e-8)},   {"all rows 1e8", all_rows(1e8)},
      {"duplicates", duplicated_gram},  {"near-parallel", near_parallel_gram},
      {"condition 1e8", [](int tasks, std::mt19937_64& engine) { return conditioned_gram(tasks, 1e8, engine); }}};
  for (const auto& family : families) {
    double worst = 0.0, worst_rounding = 0.0;
    for (const int tasks : {1, 2, 3, 4, 5, 8, 11, 16, 32, 64}) {
      std::mt19937_64 engine(100 + tasks);
      for (int repeat = 0; repeat < (tasks <= 16 ? 50 : 4); ++repeat) {
        const Vector gram = family.make(tasks, engine);
        const Result result = solve(gram, tasks);
        CHECK(result.status == 0);
        const double error = residual(gram, result.weights), rounding = rounding_error(gram, result.weights);
        CHECK(error <= std::fmax(1e-10, 4.0 * rounding));
        CHECK_NEAR(update_norm(gram, result.weights) / std::sqrt(tasks), 1.0, error + 1e-14);
        worst = std::fmax(worst, error);
        worst_rounding = std::fmax(worst_rounding, rounding);
        CHECK(same_bits(result.weights, result.state));
      }
    }
    std::printf("nash residual, %-16s %.1e, of which rounding alpha %.1e\n", family.name, worst, worst_rounding);
    if (worst_rounding < 1e-11) CHECK(worst <= 1e-10);
  }
}

TEST(nash_closed_forms) {
  CHECK_NEAR(solve({4.0}, 1).weights[0], 0.5, 1e-16);

  const double cosine = -0.3;  // K = 2: both x are 1 / sqrt(1 + cosine)
  const Vector gram = rescaled({1.0, cosine, cosine, 1.0}, {3.0, 0.2});
  const Result two = solve(gram, 2);
  CHECK_NEAR(two.weights[0] * 3.0, 1.0 / std::sqrt(1.0 + cosine), 1e-14);
  CHECK_NEAR(two.weights[1] * 0.2, 1.0 / std::sqrt(1.0 + cosine), 1e-14);

  const Result orthogonal = solve({4.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 16.0}, 3);
  for (int i = 0; i < 3; ++i) CHECK_NEAR(orthogonal.weights[i], 1.0 / (i + 2), 1e-15);
}

TEST(nash_update_is_invariant_to_the_scale_of_any_task) {
  std::mt19937_64 engine(5);
  for (const int tasks : {2, 3, 8, 11}) {
    const Vector gram = random_gram(tasks, engine), scales = random_scales(tasks, 3.0, engine);
    const Result plain = solve(gram, tasks), scaled = solve(rescaled(gram, scales), tasks);
    for (int i = 0; i < tasks; ++i) CHECK_NEAR(scaled.weights[i] * scales[i] / plain.weights[i], 1.0, 1e-11);
  }
}

TEST(nash_uses_the_symmetric_part) {
  const Vector symmetric = {2.0, 0.5, 0.5, 1.0}, skewed = {2.0, 0.9, 0.1, 1.0};
  CHECK_NEAR(solve(skewed, 2).weights[0], solve(symmetric, 2).weights[0], 1e-15);
}

TEST(nash_drops_tasks_without_gradient) {
  const Result pair = solve({2.0, 0.3, 0.3, 1.0}, 2);
  const Result padded = solve({2.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.3, 0.0, 1.0}, 3);
  CHECK(padded.status == igb::zero_gradient);
  CHECK_NEAR(padded.weights[0], pair.weights[0], 1e-15);
  CHECK(padded.weights[1] == 0.0);
  CHECK_NEAR(padded.weights[2], pair.weights[1], 1e-15);
}

TEST(nash_reports_pareto_stationary_points) {
  const Vector hexagon = gram_of({1.0, 0.0, -0.5, std::sqrt(0.75), -0.5, -std::sqrt(0.75)}, 3);
  const Result opposed = solve({1.0, -1.0, -1.0, 1.0}, 2), balanced = solve(hexagon, 3);
  for (const Result& result : {opposed, balanced}) {
    CHECK(result.status == igb::pareto_stationary);
    CHECK(all_finite(result.weights));
    for (const double weight : result.weights) CHECK_NEAR(weight / result.weights[0], 1.0, 1e-3);
  }
  CHECK(update_norm({1.0, -1.0, -1.0, 1.0}, opposed.weights) < 1e-3);

  // Opposed but for 1e-3: there is a direction that helps both tasks, and it is found.
  const double cosine = -1.0 + 5e-7;
  const Result nearly = solve({1.0, cosine, cosine, 1.0}, 2);
  CHECK(nearly.status == 0);
  CHECK_NEAR(nearly.weights[0], 1.0 / std::sqrt(5e-7), 1e-5);
}

// Fewer dimensions than tasks: half of these problems are Pareto stationary, the others have finite solutions.
TEST(nash_survives_rank_deficient_gramians) {
  for (const int tasks : {3, 4, 8, 11, 16, 32, 64}) {
    std::mt19937_64 engine(300 + tasks);
    for (int repeat = 0; repeat < (tasks <= 16 ? 40 : 4); ++repeat) {
      const Vector gram = gram_of(random_rows(tasks, (tasks + 1) / 2, engine), tasks);
      const Result result = solve(gram, tasks);
      CHECK((result.status & ~igb::pareto_stationary) == 0);
      CHECK(all_finite(result.weights));
      for (const double weight : result.weights) CHECK(weight > 0.0);
      if (result.status == 0) CHECK(residual(gram, result.weights) <= 1e-5);
    }
  }
}

TEST(nash_survives_gramians_of_low_precision) {  // rounding to float makes some of them indefinite
  for (const int tasks : {2, 3, 8, 16}) {
    std::mt19937_64 engine(400 + tasks);
    for (int repeat = 0; repeat < 40; ++repeat) {
      Vector gram = gram_of(random_rows(tasks, std::max(1, tasks / 2), engine), tasks);
      for (double& entry : gram) entry = static_cast<float>(entry);
      const Result result = solve(gram, tasks);
      CHECK((result.status & ~igb::pareto_stationary) == 0);
      CHECK(all_finite(result.weights));
    }
  }
}

TEST(nash_clips_the_update_and_keeps_the_unclipped_state) {
  std::mt19937_64 engine(6);
  for (const int tasks : {1, 2, 8}) {
    Input input = make_input(igb::Method::nash_mtl, tasks, random_gram(tasks, engine));
    const Result free = run(igb::Method::nash_mtl, input);
    input.options[igb::NashMtl::max_norm] = 0.5;
    const Result clipped = run(igb::Method::nash_mtl, input);
    CHECK_NEAR(update_norm(input.gram, clipped.weights), 0.5, 1e-12);
    CHECK(same_bits(clipped.state, free.weights));
    input.options[igb::NashMtl::max_norm] = 100.0;  // longer than sqrt(K)
    CHECK(same_bits(run(igb::Method::nash_mtl, input).weights, free.weights));
  }
}

TEST(nash_holds_the_weights_of_the_last_solve) {
  std::mt19937_64 engine(7);
  const int tasks = 4;
  Input input = make_input(igb::Method::nash_mtl, tasks, random_gram(tasks, engine));
  input.state = run(igb::Method::nash_mtl, input).state;
  const Vector alpha = input.state;

  input.gram = random_gram(tasks, engine);
  input.options[igb::NashMtl::hold] = 1.0;
  const Result held = run(igb::Method::nash_mtl, input);
  CHECK(held.status == 0);
  CHECK(same_bits(held.weights, alpha));
  CHECK(same_bits(held.state, alpha));

  input.options[igb::NashMtl::max_norm] = 0.25;
  const Result clipped = run(igb::Method::nash_mtl, input);
  CHECK_NEAR(update_norm(input.gram, clipped.weights), 0.25, 1e-12);
  CHECK(same_bits(clipped.state, alpha));
  for (int i = 0; i < tasks; ++i) CHECK_NEAR(clipped.weights[i] / alpha[i], clipped.weights[0] / alpha[0], 1e-14);
}
