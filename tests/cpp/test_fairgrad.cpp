// FairGrad, and with it the Newton kernel for p = 1 / alpha other than 1: the defining equation on hard families.
#include "check.h"

using namespace check;

namespace {

Result solve(const Vector& gram, int tasks, double alpha, double max_norm = 0.0) {
  Input input = make_input(igb::Method::fairgrad, tasks, gram);
  input.options = {alpha, max_norm};
  return run(igb::Method::fairgrad, input);
}

struct Misfit {
  double residual;  // max |w^p (G w) - 1|
  double rounding;  // what rounding w to double leaves of it
};

Misfit misfit(const Vector& gram, const Vector& weights, double alpha) {
  const int tasks = static_cast<int>(weights.size());
  long double worst = 0.0L, magnitude = 0.0L;
  for (int i = 0; i < tasks; ++i) {
    const long double factor = std::pow(static_cast<long double>(weights[i]), 1.0L / alpha);
    worst = std::fmax(worst, std::fabs(factor * projection(gram, weights, i) - 1.0L));
    long double sum = 0.0L;
    for (int j = 0; j < tasks; ++j) sum += std::fabs(static_cast<long double>(gram[i * tasks + j]) * weights[j]);
    magnitude = std::fmax(magnitude, factor * sum);
  }
  return {static_cast<double>(worst), static_cast<double>(igb::machine_epsilon * magnitude)};
}

}  // namespace

TEST(fairgrad_solves_its_equation_for_every_alpha) {
  for (const double alpha : {0.1, 0.5, 1.0, 2.0, 5.0, 10.0})
    for (const double decades : {0.0, 1.0, 3.0}) {
      double worst = 0.0;
      for (const int tasks : {1, 2, 3, 4, 5, 8, 11, 16, 32, 64}) {
        std::mt19937_64 engine(500 + tasks);
        for (int repeat = 0; repeat < (tasks <= 16 ? 20 : 2); ++repeat) {
          const Vector gram = rescaled(random_gram(tasks, engine), random_scales(tasks, decades, engine));
          const Result result = solve(gram, tasks, alpha);
          CHECK(result.status == 0);
          const Misfit found = misfit(gram, result.weights, alpha);
          CHECK(found.residual <= std::fmax(1e-10, 16.0 * found.rounding));
          worst = std::fmax(worst, found.residual);
        }
      }
      std::printf("fairgrad alpha %-4g residual, rows 1e-%g..1e%g %.1e\n", alpha, decades, decades, worst);
      if (alpha >= 0.5) CHECK(worst <= 1e-9);
    }
}

TEST(fairgrad_closed_forms) {
  for (const double alpha : {0.25, 1.0, 3.0}) {
    CHECK_NEAR(solve({9.0}, 1, alpha).weights[0] / std::pow(9.0, -alpha / (1.0 + alpha)), 1.0, 1e-14);
    const double cosine = -0.3;  // w^(1 + 1/alpha) (1 + cosine) = 1
    const Result two = solve({1.0, cosine, cosine, 1.0}, 2, alpha);
    for (const double weight : two.weights)
      CHECK_NEAR(weight / std::pow(1.0 + cosine, -alpha / (1.0 + alpha)), 1.0, 1e-13);
  }
}

TEST(fairgrad_1_is_nash) {
  std::mt19937_64 engine(41);
  for (const int tasks : {1, 2, 5, 11, 40}) {
    const Vector gram = rescaled(random_gram(tasks, engine), random_scales(tasks, 2.0, engine));
    const Result nash = run(igb::Method::nash_mtl, tasks, gram), fair = solve(gram, tasks, 1.0);
    for (int i = 0; i < tasks; ++i) CHECK_NEAR(fair.weights[i] / nash.weights[i], 1.0, 1e-12);
  }
}

TEST(fairgrad_0_is_uniform) {
  CHECK(solve({2.0, 0.3, 0.3, 1.0}, 2, 0.0).weights == Vector(2, 1.0));
  CHECK_NEAR(update_norm({2.0, 0.3, 0.3, 1.0}, solve({2.0, 0.3, 0.3, 1.0}, 2, 0.0, 0.5).weights), 0.5, 1e-15);
}

TEST(fairgrad_reports_pareto_stationary_points) {
  for (const double alpha : {0.5, 1.0, 2.0, 5.0, 20.0}) {
    const Result opposed = solve({1.0, -1.0, -1.0, 1.0}, 2, alpha);
    CHECK(opposed.status == igb::pareto_stationary);
    CHECK(all_finite(opposed.weights));
    CHECK_NEAR(opposed.weights[0] / opposed.weights[1], 1.0, 1e-9);
    CHECK(opposed.weights[0] > 10.0);

    std::mt19937_64 engine(43);
    for (const int tasks : {3, 8, 16}) {  // of low rank and low precision: half are stationary, some are indefinite
      for (int repeat = 0; repeat < 20; ++repeat) {
        Vector gram = gram_of(random_rows(tasks, tasks / 2, engine), tasks);
        for (double& entry : gram) entry = static_cast<float>(entry);
        const Result result = solve(gram, tasks, alpha);
        CHECK((result.status & ~igb::pareto_stationary) == 0);
        CHECK(all_finite(result.weights));
      }
    }
  }
}
