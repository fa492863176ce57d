// IMTL-G: equal projections, closed forms, singular Gramians, sums that are negative or vanish.
#include "check.h"

using namespace check;

namespace {

const Vector opposed_pair = {1.0, -1.0, -1.0, 1.0};
const Vector parallel_pair = gram_of({1.0, 1.0, 2.0, 2.0}, 2);

Result solve_imtl_g(const Vector& gram, int tasks, bool descent_safe = false) {
  return run(igb::Method::imtl_g, {tasks, gram, {}, {descent_safe ? 1.0 : 0.0}, {}});
}

// max_i |u_i . d - p| / |p| for the common projection p; d = J' w.
double projection_spread(const Vector& gram, const Vector& weights) {
  const int tasks = static_cast<int>(weights.size());
  long double least = INFINITY, most = -INFINITY;
  for (int i = 0; i < tasks; ++i) {
    const long double projected = projection(gram, weights, i) / std::sqrt(static_cast<long double>(gram[i * tasks + i]));
    least = std::fmin(least, projected);
    most = std::fmax(most, projected);
  }
  return static_cast<double>((most - least) / std::fabs(most));
}

double sum(const Vector& values) {
  double total = 0.0;
  for (const double value : values) total += value;
  return total;
}

}  // namespace

TEST(imtl_g_projections_are_equal) {
  std::mt19937_64 engine(21);
  for (const double decades : {0.0, 1.0, 3.0, 5.0}) {
    double worst = 0.0;
    for (const int tasks : {1, 2, 3, 5, 8, 11, 16, 64})
      for (int repeat = 0; repeat < (tasks <= 16 ? 30 : 3); ++repeat) {
        const Vector gram = rescaled(random_gram(tasks, engine), random_scales(tasks, decades, engine));
        const Result result = solve_imtl_g(gram, tasks);
        CHECK((result.status & ~igb::negative_sum) == 0);
        CHECK_NEAR(sum(result.weights), 1.0, 1e-10);
        worst = std::fmax(worst, projection_spread(gram, result.weights));
      }
    std::printf("imtl_g spread of projections, rows 1e-%g..1e%g %.1e\n", decades, decades, worst);
    CHECK(worst <= 1e-11);
  }
}

TEST(imtl_g_closed_forms) {
  CHECK_NEAR(solve_imtl_g({9.0}, 1).weights[0], 1.0, 0.0);
  const Result two = solve_imtl_g(rescaled({1.0, 0.4, 0.4, 1.0}, {3.0, 1.0}), 2);  // (n_2, n_1) / (n_1 + n_2)
  CHECK_NEAR(two.weights[0], 0.25, 1e-15);
  CHECK_NEAR(two.weights[1], 0.75, 1e-15);
}

TEST(imtl_g_singular_gramians_get_the_limit_of_nearly_parallel_gradients) {
  const Result parallel = solve_imtl_g(parallel_pair, 2);
  CHECK(parallel.status == igb::pareto_stationary);
  CHECK_NEAR(parallel.weights[0] + 2.0 * parallel.weights[1], 4.0 / 3.0, 1e-7);

  const Result opposed = solve_imtl_g(opposed_pair, 2);
  CHECK(opposed.status == igb::pareto_stationary);
  CHECK_NEAR(opposed.weights[0], 0.5, 1e-7);
  CHECK(update_norm(opposed_pair, opposed.weights) < 1e-7);

  std::mt19937_64 engine(22);  // every row twice: the update is that of the distinct rows
  Vector rows = random_rows(3, 7, engine);
  for (int c = 0; c < 7; ++c) rows[c] = rows[7 + c] + 0.05 * rows[c];  // and nearly parallel: a ridge's bias would show
  Vector doubled = rows;
  doubled.insert(doubled.end(), rows.begin(), rows.end());
  const Result once = solve_imtl_g(gram_of(rows, 3), 3), twice = solve_imtl_g(gram_of(doubled, 6), 6);
  CHECK((twice.status & igb::pareto_stationary) != 0);
  for (int i = 0; i < 3; ++i) CHECK_NEAR(twice.weights[i] + twice.weights[i + 3], once.weights[i], 1e-9);
}

TEST(imtl_g_indefinite_gramians_are_regularised) {
  const Result result = solve_imtl_g({1.0, 1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 1.0}, 3);
  CHECK((result.status & igb::pareto_stationary) != 0);
  CHECK(all_finite(result.weights));
}

TEST(imtl_g_negative_sums_are_reported_and_can_be_made_safe) {
  // With v = C^-1 1 > 0 on the long gradients and < 0 on the short one, D^-1 v has a negative sum.
  const Vector gram = rescaled({1.0, 0.2, 0.8, 0.2, 1.0, 0.7, 0.8, 0.7, 1.0}, {100.0, 100.0, 1.0});
  const Result paper = solve_imtl_g(gram, 3), safe = solve_imtl_g(gram, 3, true);
  CHECK(paper.status == igb::negative_sum);
  CHECK(safe.status == igb::negative_sum);
  CHECK_NEAR(sum(paper.weights), 1.0, 1e-12);
  CHECK_NEAR(sum(safe.weights), -1.0, 1e-12);
  for (int i = 0; i < 3; ++i) {
    CHECK(projection(gram, paper.weights, i) < 0.0L);
    CHECK(projection(gram, safe.weights, i) > 0.0L);
  }
}

TEST(imtl_g_vanishing_sums_give_no_update) {
  // C^-1 1 = (1, 1, -1/2), so that with norms (1, 1, 1/4) the sum of D^-1 C^-1 1 is 0.
  const Vector gram = rescaled({1.0, 0.375, 0.75, 0.375, 1.0, 0.75, 0.75, 0.75, 1.0}, {1.0, 1.0, 0.25});
  const Result result = solve_imtl_g(gram, 3);
  CHECK(result.status == igb::pareto_stationary);
  CHECK(result.weights == Vector(3, 0.0));
}

TEST(imtl_g_drops_zero_rows) {
  const Result pair = solve_imtl_g({4.0, 0.3, 0.3, 1.0}, 2);
  const Result padded = solve_imtl_g({4.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.3, 0.0, 1.0}, 3);
  CHECK(padded.status == igb::zero_gradient);
  CHECK(padded.weights == Vector({pair.weights[0], 0.0, pair.weights[1]}));
}

TEST(imtl_g_direction_ignores_the_scale_of_a_task) {
  std::mt19937_64 engine(23);
  for (const int tasks : {2, 3, 8}) {
    const Vector gram = random_gram(tasks, engine), scales = random_scales(tasks, 3.0, engine);
    const Result plain = solve_imtl_g(gram, tasks, true), scaled = solve_imtl_g(rescaled(gram, scales), tasks, true);
    const double length = scaled.weights[0] * scales[0] / plain.weights[0];
    CHECK(length > 0.0);
    for (int i = 0; i < tasks; ++i) CHECK_NEAR(scaled.weights[i] * scales[i] / plain.weights[i] / length, 1.0, 1e-10);
  }
}
