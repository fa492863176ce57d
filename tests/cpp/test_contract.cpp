// What every method promises: non-finite inputs, tasks without gradient, K = 1, permutations, scale degrees, sizes.
#include <algorithm>
#include <limits>
#include <numeric>

#include "check.h"

using namespace check;

namespace {

const double infinity = std::numeric_limits<double>::infinity();

// Whose answers these tests know in closed form; of the others the Python tests know more.
constexpr igb::Method known[] = {igb::Method::equal, igb::Method::db_mtl, igb::Method::emtl, igb::Method::imtl_g,
                                 igb::Method::nash_mtl};

double neutral_weight(igb::Method method, int tasks) { return method == igb::Method::imtl_g ? 1.0 / tasks : 1.0; }

// Powers of a common factor c on all gradients (and losses) that the update gains.
double scale_degree(igb::Method method) { return method == igb::Method::nash_mtl ? 0.0 : 1.0; }

}  // namespace

TEST(sizes_are_known_at_compile_time) {
  static_assert(igb::workspace_size(igb::Method::nash_mtl, 8) >= 64, "room for the cosines");
  static_assert(igb::state_size(igb::Method::nash_mtl, 8) == 8, "alpha");
  static_assert(igb::state_size(igb::Method::db_mtl, 8) == 3, "step, decay, decay product");
  static_assert(igb::option_count(igb::Method::equal) == 0, "no options");
  static_assert(igb::option_count(igb::Method::db_mtl) == 5, "beta, sigma, eps, relative eps, bias correction");
  static_assert(igb::needs_gram(igb::Method::imtl_g) && !igb::needs_gram(igb::Method::emtl), "Gramian");
  static_assert(igb::needs_losses(igb::Method::emtl) && !igb::needs_losses(igb::Method::nash_mtl), "losses");
  for (const igb::Method method : methods)
    CHECK(static_cast<int>(default_options(method).size()) == igb::option_count(method));
}

TEST(equal_weights_are_ones) {
  CHECK(run(igb::Method::equal, 3, {1.0, 4.0, 9.0}).weights == Vector(3, 1.0));
  const Result finished = run(igb::Method::equal, 3, {1.0, 0.0, 9.0});
  CHECK(finished.weights == Vector(3, 1.0));
  CHECK(finished.status == igb::zero_gradient);
}

TEST(non_finite_inputs_give_nan_weights_and_leave_the_state) {
  std::mt19937_64 engine(31);
  for (const int tasks : {1, 2, 3, 8})
    for (const igb::Method method : methods)
      for (const double bad : {static_cast<double>(NAN), infinity, -infinity})
        for (int task = 0; task < tasks; ++task) {
          const Input good = make_input(method, tasks, random_gram(tasks, engine));
          std::vector<Input> poisoned(1, good);
          poisoned[0].gram[task * tasks + task] = bad;
          if (igb::needs_gram(method) && tasks > 1) {
            poisoned.push_back(good);
            poisoned.back().gram[task * tasks + (task + 1) % tasks] = bad;
          }
          if (igb::needs_losses(method)) {
            poisoned.push_back(good);
            poisoned.back().losses[task] = bad;
          }
          if (method == igb::Method::nash_mtl) {
            poisoned.push_back(poisoned.front());
            poisoned.back().options[igb::NashMtl::hold] = 1.0;
          }
          for (const Input& input : poisoned) {
            const Result result = run(method, input);
            CHECK(result.status == igb::non_finite);
            CHECK(all_nan(result.weights));
            CHECK(same_bits(result.state, input.state));
          }
        }
}

TEST(inputs_that_a_method_does_not_use_may_be_anything) {
  for (const igb::Method method : methods) {
    if (igb::needs_gram(method)) continue;
    const Result full = run(method, 2, {1.0, NAN, NAN, 4.0}), norms = run(method, 2, {1.0, 4.0});
    CHECK(full.status == 0);
    CHECK(same_bits(full.weights, norms.weights));
  }
  Input input = make_input(igb::Method::imtl_g, 2, {1.0, 0.2, 0.2, 4.0});
  input.losses = {NAN, NAN};
  CHECK(run(igb::Method::imtl_g, input).status == 0);
}

TEST(tasks_without_gradient_get_no_weight) {
  std::mt19937_64 engine(32);
  for (const igb::Method method : known) {
    if (method == igb::Method::equal) continue;
    for (const double square : {0.0, -1e-3}) {
      Vector gram = random_gram(4, engine);
      for (int j = 0; j < 4; ++j) gram[4 + j] = gram[j * 4 + 1] = 0.0;
      gram[5] = square;
      const Result result = run(method, 4, gram);
      CHECK((result.status & igb::zero_gradient) != 0);
      CHECK((result.status & (igb::all_inactive | igb::non_finite)) == 0);
      CHECK(result.weights[1] == 0.0);
      CHECK(all_finite(result.weights));
    }
    if (method == igb::Method::db_mtl) continue;
    Vector tiny = {1.0, 0.0, 0.0, 1e-24};  // the norms' ratio is the threshold
    CHECK(run(method, 2, tiny).weights[1] == 0.0);
    tiny[3] = 1e-22;
    CHECK(run(method, 2, tiny).weights[1] != 0.0);
  }
}

TEST(without_any_gradient_weights_are_neutral) {
  for (const int tasks : {1, 2, 5})
    for (const igb::Method method : known) {
      const Input input = make_input(method, tasks, Vector(tasks * tasks, 0.0));
      const Result result = run(method, input);
      CHECK(result.status == (igb::all_inactive | igb::zero_gradient));
      CHECK(result.weights == Vector(tasks, neutral_weight(method, tasks)));
      if (method == igb::Method::nash_mtl) CHECK(same_bits(result.state, input.state));
    }
}

TEST(one_task_is_enough) {
  for (const double square : {1e-16, 1.0, 9.0, 1e16})
    for (const igb::Method method : known) {
      const Result result = run(method, 1, {square});
      CHECK(result.status == 0);
      const double expected = method == igb::Method::nash_mtl ? 1.0 / std::sqrt(square)
                              : method == igb::Method::db_mtl ? 1.0 / (1.0 + 1e-8 / std::sqrt(square)) : 1.0;
      CHECK_NEAR(result.weights[0] / expected, 1.0, 1e-14);
    }
}

TEST(permuted_tasks_get_permuted_weights) {
  std::mt19937_64 engine(33);
  for (const int tasks : {2, 3, 8, 11})
    for (const igb::Method method : known)
      for (int repeat = 0; repeat < 5; ++repeat) {
        const Vector gram = rescaled(random_gram(tasks, engine), random_scales(tasks, 1.0, engine));
        std::vector<int> order(tasks);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), engine);

        Input plain = make_input(method, tasks, gram), permuted = plain;
        for (int i = 0; i < tasks; ++i) {
          permuted.losses[i] = plain.losses[order[i]];
          for (int j = 0; j < tasks; ++j) permuted.gram[i * tasks + j] = gram[order[i] * tasks + order[j]];
        }
        const Result expected = run(method, plain), result = run(method, permuted);
        CHECK(result.status == expected.status);
        double largest = 0.0;
        for (const double weight : expected.weights) largest = std::fmax(largest, std::fabs(weight));
        for (int i = 0; i < tasks; ++i) CHECK_NEAR(result.weights[i], expected.weights[order[i]], 1e-10 * largest);
      }
}

TEST(updates_have_their_scale_degree) {
  std::mt19937_64 engine(34);
  for (const double factor : {1e-8, 1e8})
    for (const igb::Method method : known) {
      const int tasks = 5;
      Input plain = make_input(method, tasks, random_gram(tasks, engine));
      if (method == igb::Method::db_mtl) plain.options[igb::DbMtl::relative_eps] = 1.0;
      Input scaled = plain;
      scaled.gram = rescaled(plain.gram, Vector(tasks, factor));
      for (double& loss : scaled.losses) loss *= factor;
      const Result expected = run(method, plain), result = run(method, scaled);
      const double gain = std::pow(factor, scale_degree(method) - 1.0);  // on weights
      for (int i = 0; i < tasks; ++i) CHECK_NEAR(result.weights[i] / (gain * expected.weights[i]), 1.0, 1e-10);
    }
}
