// The bits of every result are those of the serial team, for teams of 1, 4, 32 and 64 lanes in either order of execution.
#include "check.h"
#include "emulated_warp.h"

using namespace check;

namespace {

constexpr int widths[] = {1, 4, 32, 64};

template <class Outcome>
void compare_teams(const Outcome& serial, const std::function<Outcome(EmulatedWarp&, bool&)>& emulate,
                   const std::function<bool(const Outcome&, const Outcome&)>& equal, const std::string& what) {
  for (const int width : widths)
    for (const bool descending : {false, true}) {
      EmulatedWarp warp(width, descending);
      bool uniform = false;
      const Outcome outcome = emulate(warp, uniform);
      if (!uniform || !equal(serial, outcome))
        fail(__FILE__, __LINE__, what + (uniform ? ": other bits" : ": divergent sync") + " with " +
                                     std::to_string(width) + (descending ? " descending" : " ascending") + " lanes");
    }
}

void compare_solves(igb::Method method, const Input& input, const std::string& name) {
  const Result serial = run(method, input);
  const std::string what =
      "method " + std::to_string(static_cast<int>(method)) + ", K " + std::to_string(input.tasks) + ", " + name;
  compare_teams<Result>(
      serial,
      [&](EmulatedWarp& warp, bool& uniform) {
        Result result{serial.status, Vector(input.tasks, NAN), input.state};
        Vector workspace(igb::workspace_size(method, input.tasks), NAN);
        uniform = warp.run([&](const EmulatedWarp::Lane& lane) {
          const std::int32_t status = run_into(method, input, result, workspace, lane);
          if (status != serial.status) result.status = status;
          CHECK(same_bits(result.weights, serial.weights) && same_bits(result.state, serial.state));  // seen by every lane
        });
        return result;
      },
      [](const Result& a, const Result& b) {
        return a.status == b.status && same_bits(a.weights, b.weights) && same_bits(a.state, b.state);
      },
      what);
}

void compare_scales(igb::LossRule rule, const Vector& losses, const Vector& per_task) {
  const int tasks = static_cast<int>(losses.size());
  const Vector options(igb::option_count(rule), 1e-8);
  const Vector initial(igb::state_size(rule, tasks), 1.0);
  const auto scale = [&](Vector& state, Vector& scales, const auto& team) {
    const igb::LossProblem problem{tasks, losses.data(), per_task.data(), options.data(), state.data()};
    return igb::loss_scales(rule, problem, scales.data(), team);
  };
  Vector serial(tasks, NAN), serial_state = initial;
  const std::int32_t expected = scale(serial_state, serial, igb::SerialTeam{});
  compare_teams<Vector>(
      serial,
      [&](EmulatedWarp& warp, bool& uniform) {
        Vector scales(tasks, NAN), state = initial;
        uniform = warp.run([&](const EmulatedWarp::Lane& lane) {
          CHECK(scale(state, scales, lane) == expected);
          CHECK(same_bits(scales, serial));  // seen by every lane
        });
        CHECK(same_bits(state, serial_state));
        return scales;
      },
      same_bits, "loss rule " + std::to_string(static_cast<int>(rule)) + ", K " + std::to_string(tasks));
}

}  // namespace

TEST(solves_have_the_same_bits_in_every_team) {
  std::mt19937_64 engine(11);
  for (const int tasks : {1, 2, 3, 8, 11, 64, 128}) {
    const Vector gram = rescaled(random_gram(tasks, engine), random_scales(tasks, 1.0, engine));
    for (const igb::Method method : methods) compare_solves(method, make_input(method, tasks, gram), "random");
    if (tasks > 11) continue;

    Vector zero_row = gram, poisoned = gram, singular(tasks * tasks, 1.0), opposed(tasks * tasks, 1.0);
    Vector vanishing(tasks, 1.0);
    vanishing.front() = 1e-15;
    for (int j = 0; j < tasks; ++j) {
      zero_row[j] = zero_row[j * tasks] = 0.0;
      if (j > 0) opposed[j] = opposed[j * tasks] = -1.0;
    }
    poisoned.back() = NAN;
    for (const igb::Method method : methods) {
      compare_solves(method, make_input(method, tasks, zero_row), "zero row");
      compare_solves(method, make_input(method, tasks, rescaled(gram, vanishing)), "vanishing row");
      compare_solves(method, make_input(method, tasks, singular), "singular");
      compare_solves(method, make_input(method, tasks, opposed), "opposed");
      compare_solves(method, make_input(method, tasks, poisoned), "NaN");
    }
    Input corrected = make_input(igb::Method::db_mtl, tasks, gram);
    corrected.options[igb::DbMtl::bias_correction] = 1.0;
    compare_solves(igb::Method::db_mtl, corrected, "corrected");
    Input clipped = make_input(igb::Method::nash_mtl, tasks, gram);
    clipped.options = {1.0, 0.0};
    compare_solves(igb::Method::nash_mtl, clipped, "clipped");
    clipped.options = {1.0, 1.0};
    compare_solves(igb::Method::nash_mtl, clipped, "held");
    Input fair = make_input(igb::Method::fairgrad, tasks, gram);
    fair.options = {0.5, 1.0};
    compare_solves(igb::Method::fairgrad, fair, "alpha 0.5");
    fair.gram = rescaled(gram, random_scales(tasks, 3.0, engine));
    fair.options = {20.0, 0.0};
    compare_solves(igb::Method::fairgrad, fair, "alpha 20, scaled");
    Input cut = make_input(igb::Method::emtl, tasks, gram);
    cut.options = {4.0, 2.0};
    compare_solves(igb::Method::emtl, cut, "cut");
    for (const igb::Method method : {igb::Method::pcgrad, igb::Method::gradvac}) {
      Input drawn = make_input(method, tasks, opposed);
      drawn.per_task.clear();  // no times: orders are drawn
      compare_solves(method, drawn, "drawn orders");
    }
    Input learned = make_input(igb::Method::grad_norm, tasks, gram);
    learned.options = {1.5, 0.0, 0.0};
    compare_solves(igb::Method::grad_norm, learned, "softmax");
    for (int i = 0; i < tasks; ++i) learned.state[igb::GradNorm::known * tasks + i] = 0.0;
    compare_solves(igb::Method::grad_norm, learned, "first step");
  }
}

TEST(scales_have_the_same_bits_in_every_team) {
  for (const int tasks : {1, 2, 3, 8, 11, 64, 128}) {
    Vector losses(tasks), per_task(tasks);
    for (int i = 0; i < tasks; ++i) {
      losses[i] = 0.1 + 0.37 * i;
      per_task[i] = 0.5 + 0.2 * (i % 5);
    }
    for (const igb::LossRule rule : rules) {
      const int size = igb::per_task_size(rule, tasks);
      Vector own(size);
      for (int i = 0; i < size; ++i) own[i] = per_task[i % tasks];
      compare_scales(rule, losses, own);
      Vector negative = losses;
      negative.back() = -1.0;
      compare_scales(rule, negative, own);
    }
    Vector unknown = per_task;
    unknown.back() = NAN;
    compare_scales(igb::LossRule::igb_v1, losses, unknown);
  }
}
