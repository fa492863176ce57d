// DB-MTL and EMTL: closed forms, options, state.
#include "check.h"

using namespace check;

namespace {

Result solve_db_mtl(const Vector& squared_norms, const Vector& options, const Vector& state) {
  return run(igb::Method::db_mtl, {static_cast<int>(squared_norms.size()), squared_norms, {}, options, state});
}

Result solve_emtl(const Vector& norms, const Vector& losses, double lambda, igb::Emtl::Scale scale) {
  Vector squares = norms;
  for (double& square : squares) square *= square;
  return run(igb::Method::emtl, {static_cast<int>(norms.size()), squares, losses, {lambda, static_cast<double>(scale)}, {}});
}

}  // namespace

// ---- DB-MTL -----------------------------------------------------------------------------------------------------------

TEST(db_mtl_rescales_every_row_to_the_largest) {
  const Vector norms = {0.5, 2.0, 1e-6};
  const Result result = solve_db_mtl({0.25, 4.0, 1e-12}, {0.9, 0.0, 1e-8, 0.0, 0.0}, {0.0, 0.9, 1.0});
  CHECK(result.status == 0);
  for (int i = 0; i < 3; ++i) CHECK_NEAR(result.weights[i] * (norms[i] + 1e-8) / 2.0, 1.0, 1e-14);
}

TEST(db_mtl_relative_eps_makes_the_weights_free_of_scale) {
  const Vector options = {0.9, 0.0, 1e-8, 1.0, 0.0};
  const Result large = solve_db_mtl({1.0, 9.0}, options, {0.0, 0.9, 1.0});
  const Result small = solve_db_mtl({1e-20, 9e-20}, options, {0.0, 0.9, 1.0});
  CHECK_NEAR(large.weights[0], 3.0, 1e-11);
  CHECK_NEAR(small.weights[0], large.weights[0], 1e-14);
}

TEST(db_mtl_bias_correction_and_decay_schedule) {
  const double beta = 0.9, sigma = 0.5;
  const Vector options = {beta, sigma, 0.0, 0.0, 1.0};
  Vector state = {0.0, beta, 1.0};
  double product = 1.0;
  for (int step = 1; step <= 5; ++step) {
    CHECK_NEAR(state[igb::DbMtl::decay], beta / std::pow(step, sigma), 1e-15);
    product *= beta / std::pow(step, sigma);
    const Result result = solve_db_mtl({1.0, 4.0}, options, state);
    const double correction = 1.0 / (1.0 - product);
    CHECK_NEAR(result.weights[0] / (2.0 * correction), 1.0, 1e-13);
    CHECK_NEAR(result.weights[1] / correction, 1.0, 1e-13);
    state = result.state;
    CHECK(state[igb::DbMtl::step] == step);
    CHECK_NEAR(state[igb::DbMtl::decay_product], product, 1e-15);
  }
}

TEST(db_mtl_without_decay_needs_no_correction) {
  const Result result = solve_db_mtl({1.0, 4.0}, {0.0, 0.0, 0.0, 0.0, 1.0}, {0.0, 0.0, 1.0});
  CHECK_NEAR(result.weights[0], 2.0, 1e-15);
  CHECK(result.state[igb::DbMtl::decay] == 0.0);
}

TEST(db_mtl_drops_only_rows_of_norm_zero) {
  const Result result = solve_db_mtl({1.0, 0.0, 1e-40}, {0.9, 0.0, 1e-8, 0.0, 0.0}, {0.0, 0.9, 1.0});
  CHECK(result.status == igb::zero_gradient);
  CHECK(result.weights[1] == 0.0);
  CHECK_NEAR(result.weights[2] / 1e8, 1.0, 1e-11);

  const Result none = solve_db_mtl({0.0, 0.0}, {0.9, 0.0, 1e-8, 1.0, 1.0}, {3.0, 0.9, 0.5});
  CHECK(none.weights == Vector({1.0, 1.0}));
  CHECK(none.state[igb::DbMtl::step] == 4.0);  // the moving average did advance
}

// ---- EMTL -------------------------------------------------------------------------------------------------------------

TEST(emtl_matches_its_definition) {
  const Vector norms = {0.5, 2.0, 10.0}, losses = {1.0, 0.25, 3.0};
  const double contributions[] = {2.0, 0.125, 0.3}, mean = (2.0 + 0.125 + 0.3) / 3.0;
  for (const double lambda : {0.0, 0.5, 1.0}) {
    const Result result = solve_emtl(norms, losses, lambda, igb::Emtl::mean_norm);
    CHECK(result.status == 0);
    double weighted_sum = 0.0;
    for (int i = 0; i < 3; ++i) {
      CHECK_NEAR(result.weights[i], 12.5 / 3.0 * (1.0 + lambda * (contributions[i] / mean - 1.0)) / norms[i], 1e-13);
      CHECK(result.weights[i] >= (1.0 - lambda) * 12.5 / 3.0 / norms[i] - 1e-15);
      weighted_sum += result.weights[i] * norms[i];
    }
    CHECK_NEAR(weighted_sum, 12.5, 1e-13);
  }
}

TEST(emtl_scales_have_their_degree) {
  const Vector norms = {0.5, 2.0}, doubled = {1.0, 4.0}, losses = {1.0, 0.25}, doubled_losses = {2.0, 0.5};
  const Result mean = solve_emtl(norms, losses, 0.5, igb::Emtl::mean_norm);
  const Result largest = solve_emtl(norms, losses, 0.5, igb::Emtl::largest_norm);
  const Result unit = solve_emtl(norms, losses, 0.5, igb::Emtl::unit);
  for (int i = 0; i < 2; ++i) {
    CHECK_NEAR(largest.weights[i] / mean.weights[i], 2.0 / 1.25, 1e-14);
    CHECK_NEAR(unit.weights[i] / mean.weights[i], 1.0 / 1.25, 1e-14);
    CHECK_NEAR(solve_emtl(doubled, doubled_losses, 0.5, igb::Emtl::mean_norm).weights[i], mean.weights[i], 1e-14);
    CHECK_NEAR(solve_emtl(doubled, doubled_losses, 0.5, igb::Emtl::unit).weights[i], 0.5 * unit.weights[i], 1e-14);
  }
}

TEST(emtl_update_ignores_the_scale_of_a_task) {  // up to its length m
  const Result plain = solve_emtl({0.5, 2.0}, {1.0, 0.25}, 0.7, igb::Emtl::unit);
  const Result scaled = solve_emtl({500.0, 2.0}, {1000.0, 0.25}, 0.7, igb::Emtl::unit);
  CHECK_NEAR(scaled.weights[0] * 1000.0, plain.weights[0], 1e-13);
  CHECK_NEAR(scaled.weights[1], plain.weights[1], 1e-13);
}

TEST(emtl_cuts_negative_weights_and_keeps_their_sum) {
  const Result result = solve_emtl({1.0, 1.0, 4.0}, {10.0, 0.1, 4.0}, 3.0, igb::Emtl::mean_norm);
  CHECK(result.weights[1] == 0.0);
  CHECK_NEAR(result.weights[0] + 4.0 * result.weights[2], 6.0, 1e-13);
  for (const double weight : result.weights) CHECK(weight >= 0.0);
}

TEST(emtl_edges) {
  const Result alone = solve_emtl({7.0}, {3.0}, 0.5, igb::Emtl::mean_norm);
  CHECK_NEAR(alone.weights[0], 1.0, 1e-15);

  const Result finished = solve_emtl({1.0, 3.0}, {0.0, 0.0}, 0.5, igb::Emtl::mean_norm);
  CHECK_NEAR(finished.weights[0], 2.0, 1e-15);
  CHECK_NEAR(finished.weights[1], 2.0 / 3.0, 1e-15);

  const Result pair = solve_emtl({1.0, 3.0}, {1.0, 2.0}, 0.5, igb::Emtl::mean_norm);
  const Result padded = solve_emtl({1.0, 1e-13, 3.0}, {1.0, 5.0, 2.0}, 0.5, igb::Emtl::mean_norm);
  CHECK(padded.status == igb::zero_gradient);
  CHECK(padded.weights == Vector({pair.weights[0], 0.0, pair.weights[1]}));

  const Result overflowing = solve_emtl({1e-100, 1e-101}, {1e300, 1e300}, 0.5, igb::Emtl::mean_norm);
  CHECK(all_finite(overflowing.weights));
}
