// Loss rules: closed forms, edges, and what must never be NaN.
#include <limits>

#include "check.h"

using namespace check;

namespace {

const double infinity = std::numeric_limits<double>::infinity();

struct Scales {
  std::int32_t status;
  Vector values;
};

Scales scales_of(igb::LossRule rule, const Vector& losses, const Vector& per_task = {}, double eps = 0.0) {
  const int tasks = static_cast<int>(losses.size());
  Scales scales{0, Vector(tasks, NAN)};
  const Vector options(igb::option_count(rule), eps);
  Vector state(igb::state_size(rule, tasks), 1.0);
  const igb::LossProblem problem{tasks, losses.data(), per_task.data(), options.data(), state.data()};
  scales.status = igb::loss_scales(rule, problem, scales.values.data(), igb::SerialTeam{});
  return scales;
}

}  // namespace

TEST(loss_scales_closed_forms) {
  CHECK(scales_of(igb::LossRule::none, {3.0, -1.0}).values == Vector({1.0, 1.0}));
  CHECK(scales_of(igb::LossRule::log, {0.5, 4.0}).values == Vector({2.0, 0.25}));
  CHECK_NEAR(scales_of(igb::LossRule::log, {0.5}, {}, 0.5).values[0], 1.0, 1e-16);

  const Scales igb_v1 = scales_of(igb::LossRule::igb_v1, {1.0, 4.0}, {0.5, 4.0});  // ratios 2 and 1
  const double first = 2.0 / (1.0 + std::exp(-1.0)), second = 2.0 - first;
  CHECK_NEAR(igb_v1.values[0], first, 1e-15);
  CHECK_NEAR(igb_v1.values[1], second / 4.0, 1e-15);

  const Scales imtl_l = scales_of(igb::LossRule::imtl_l, {1.0, -2.0, 3.0}, {0.0, 30.0, -30.0});
  CHECK(imtl_l.status == 0);
  CHECK(imtl_l.values[0] == 1.0);
  CHECK_NEAR(imtl_l.values[1] / std::exp(20.0), 1.0, 1e-15);
  CHECK_NEAR(imtl_l.values[2] / std::exp(-20.0), 1.0, 1e-15);
}

TEST(geometric_means_neither_under_nor_overflow) {
  for (const double loss : {1e-19, 1e-2, 1e2, 1e300}) {
    const Scales scales = scales_of(igb::LossRule::gls, Vector(40, loss));
    CHECK(scales.status == 0);
    for (const double value : scales.values) CHECK_NEAR(value, 1.0 / 40, 1e-12);
  }
  CHECK(scales_of(igb::LossRule::gls, {1.0, 0.0, 3.0}).values == Vector(3, 0.0));
  CHECK(scales_of(igb::LossRule::gls, {1.0, 0.0, 3.0}).status == igb::non_positive_loss);
}

TEST(unknown_means_have_no_weights) {
  CHECK(scales_of(igb::LossRule::dwa, {1.0, 2.0}, {1.0, NAN, 1.0, 1.0}, 2.0).values == Vector(2, 1.0));
  CHECK(scales_of(igb::LossRule::dwa, {1.0, 2.0}, {1.0, 0.0, 1.0, 5.0}, 2.0).values == Vector(2, 1.0));  // from 0: as 1
}

TEST(log_scales_are_scale_free) {
  const Scales plain = scales_of(igb::LossRule::log, {0.3, 7.0}), scaled = scales_of(igb::LossRule::log, {0.3e6, 7.0e-6});
  CHECK_NEAR(scaled.values[0] * 1e6 / plain.values[0], 1.0, 1e-15);
  CHECK_NEAR(scaled.values[1] * 1e-6 / plain.values[1], 1.0, 1e-15);
}

TEST(igb_weights_sum_to_the_number_of_tasks) {
  const Vector losses = {0.1, 2.0, 30.0, 0.7}, bases = {1.0, 1.0, 20.0, 0.1};
  const Scales scales = scales_of(igb::LossRule::igb_v1, losses, bases);
  double sum = 0.0;
  for (int i = 0; i < 4; ++i) sum += scales.values[i] * losses[i];
  CHECK_NEAR(sum, 4.0, 1e-14);

  const Scales alone = scales_of(igb::LossRule::igb_v1, {5.0}, {0.1});
  CHECK_NEAR(alone.values[0], 0.2, 1e-16);
}

TEST(igb_is_plain_log_until_every_base_is_known) {
  CHECK(scales_of(igb::LossRule::igb_v1, {0.5, 4.0}, {NAN, NAN}).values == Vector({2.0, 0.25}));
  CHECK(scales_of(igb::LossRule::igb_v1, {0.5, 4.0}, {1.0, NAN}).values == Vector({2.0, 0.25}));
}

TEST(igb_bases_never_make_nan) {
  for (const double first : {0.0, -1.0, 1e-300, 1.0, infinity, -infinity})
    for (const double second : {0.0, 1e-320, infinity})
      for (const double loss : {0.0, 1e-300, 1.0, 1e308}) {
        const Scales scales = scales_of(igb::LossRule::igb_v1, {loss, 1.0}, {first, second});
        CHECK(scales.status == 0);
        CHECK(all_finite(scales.values));
      }
  const Scales infinite = scales_of(igb::LossRule::igb_v1, {2.0, 0.0}, {infinity, 1.0});  // both ratios count as 0
  CHECK_NEAR(infinite.values[0], 0.5, 1e-15);
}

TEST(finished_tasks_are_clamped_silently) {
  CHECK_NEAR(scales_of(igb::LossRule::log, {0.0}).values[0] / 1e20, 1.0, 1e-15);
  CHECK_NEAR(scales_of(igb::LossRule::log, {-0.0}, {}, 1e-8).values[0] / 1e8, 1.0, 1e-15);
  const Scales igb_v1 = scales_of(igb::LossRule::igb_v1, {0.0, 1.0}, {1.0, 1.0});
  CHECK(igb_v1.status == 0);
  CHECK(all_finite(igb_v1.values));
}

TEST(negative_losses_under_a_logarithm_are_reported) {
  for (const igb::LossRule rule :
       {igb::LossRule::log, igb::LossRule::igb_v1, igb::LossRule::gls, igb::LossRule::stch, igb::LossRule::famo}) {
    const Scales scales = scales_of(rule, {1.0, -1e-3}, Vector(4, 1.0), 1e-8);
    CHECK(scales.status == igb::non_positive_loss);
    CHECK(all_nan(scales.values));
  }
  CHECK(scales_of(igb::LossRule::log, {-1e-9}, {}, 1e-8).status == 0);  // still positive under the logarithm
}

TEST(non_finite_losses_are_reported_by_every_rule) {
  for (const igb::LossRule rule : rules)
    for (const double bad : {static_cast<double>(NAN), infinity, -infinity}) {
      const Scales scales = scales_of(rule, {-1.0, 1.0, bad}, Vector(igb::per_task_size(rule, 3), 1.0));
      CHECK(scales.status == igb::non_finite);
      CHECK(all_nan(scales.values));
    }
  CHECK(scales_of(igb::LossRule::imtl_l, {1.0, 1.0}, {0.0, NAN}).status == igb::non_finite);
}
