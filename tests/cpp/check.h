// A test registry, and helpers shared by the tests of csrc/core.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "losses.h"
#include "solve.h"

namespace check {

using Vector = std::vector<double>;

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Registered {
  Registered(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline void fail(const char* file, int line, const std::string& what) {
  ++failures();
  std::printf("%s:%d: %s\n", file, line, what.c_str());
}

inline void near(double actual, double expected, double tolerance, const char* file, int line, const char* what) {
  if (std::fabs(actual - expected) <= tolerance) return;
  char text[256];
  std::snprintf(text, sizeof text, "%s: got %.17g, expected %.17g +- %.1e", what, actual, expected, tolerance);
  fail(file, line, text);
}

#define TEST(name)                                            \
  static void name();                                         \
  static const check::Registered registered_##name(#name, name); \
  static void name()
#define CHECK(condition) ((condition) ? void() : check::fail(__FILE__, __LINE__, #condition))
#define CHECK_NEAR(actual, expected, tolerance) check::near(actual, expected, tolerance, __FILE__, __LINE__, #actual)

constexpr igb::Method methods[] = {
#define IGB_METHOD(name, Solver) igb::Method::name,
    IGB_METHODS(IGB_METHOD)
#undef IGB_METHOD
};

constexpr igb::LossRule rules[] = {
#define IGB_RULE(name, Rule) igb::LossRule::name,
    IGB_LOSS_RULES(IGB_RULE)
#undef IGB_RULE
};

// ---- running a method -------------------------------------------------------------------------------------------------

struct Input {
  int tasks;
  Vector gram;  // K*K, or K squared norms
  Vector losses, options, state;
  Vector per_task = {};
};

struct Result {
  std::int32_t status;
  Vector weights, state;
};

inline Vector default_options(igb::Method method) {
  switch (method) {
    case igb::Method::db_mtl: return {0.9, 0.5, 1e-8, 0.0, 0.0};
    case igb::Method::emtl: return {0.5, 0.0};
    case igb::Method::imtl_g: return {0.0};
    case igb::Method::nash_mtl: return {0.0, 0.0};
    case igb::Method::fairgrad: return {5.0, 0.0};
    default: return Vector(igb::option_count(method), 0.5);  // not more than a solve that must end and be finite
  }
}

inline Vector initial_state(igb::Method method, int tasks) {
  if (method == igb::Method::db_mtl) return {0.0, default_options(method)[igb::DbMtl::beta], 1.0};
  return Vector(igb::state_size(method, tasks), 1.0);
}

inline Input make_input(igb::Method method, int tasks, const Vector& gram) {
  Vector losses(tasks);
  for (int i = 0; i < tasks; ++i) losses[i] = 0.5 + i;
  return {tasks, gram, losses, default_options(method), initial_state(method, tasks),
          Vector(igb::per_task_size(method, tasks), 0.5)};
}

// Outputs and workspace start as NaN: nothing may read them before it writes.
template <class Team>
std::int32_t run_into(igb::Method method, const Input& input, Result& result, Vector& workspace, const Team& team) {
  const bool full = input.gram.size() != static_cast<std::size_t>(input.tasks);
  const double* per_task = input.per_task.empty() ? nullptr : input.per_task.data();
  const igb::Problem problem{input.tasks, input.gram.data(),    full || input.tasks == 1, input.losses.data(),
                             per_task,    input.options.data(), result.state.data()};
  return igb::solve(method, problem, result.weights.data(), workspace.data(), team);
}

inline Result run(igb::Method method, const Input& input) {
  Result result{0, Vector(input.tasks, NAN), input.state};
  Vector workspace(igb::workspace_size(method, input.tasks), NAN);
  result.status = run_into(method, input, result, workspace, igb::SerialTeam{});
  return result;
}

inline Result run(igb::Method method, int tasks, const Vector& gram) { return run(method, make_input(method, tasks, gram)); }

// ---- matrices ---------------------------------------------------------------------------------------------------------

inline Vector random_rows(int rows, int columns, std::mt19937_64& engine) {
  std::normal_distribution<double> normal;
  Vector matrix(rows * columns);
  for (double& entry : matrix) entry = normal(engine);
  return matrix;
}

inline Vector gram_of(const Vector& rows, int tasks) {
  const int columns = static_cast<int>(rows.size()) / tasks;
  Vector gram(tasks * tasks, 0.0);
  for (int i = 0; i < tasks; ++i)
    for (int j = 0; j < tasks; ++j)
      for (int c = 0; c < columns; ++c) gram[i * tasks + j] += rows[i * columns + c] * rows[j * columns + c];
  return gram;
}

inline Vector random_gram(int tasks, std::mt19937_64& engine) { return gram_of(random_rows(tasks, 2 * tasks, engine), tasks); }

// diag(scales) G diag(scales)
inline Vector rescaled(Vector gram, const Vector& scales) {
  const int tasks = static_cast<int>(scales.size());
  for (int i = 0; i < tasks; ++i)
    for (int j = 0; j < tasks; ++j) gram[i * tasks + j] *= scales[i] * scales[j];
  return gram;
}

// 10^U(-decades, decades)
inline Vector random_scales(int tasks, double decades, std::mt19937_64& engine) {
  std::uniform_real_distribution<double> exponent(-decades, decades);
  Vector scales(tasks);
  for (double& scale : scales) scale = std::pow(10.0, exponent(engine));
  return scales;
}

inline Vector diagonal(const Vector& gram, int tasks) {
  Vector squares(tasks);
  for (int i = 0; i < tasks; ++i) squares[i] = gram[i * tasks + i];
  return squares;
}

// (G w)_i, accumulated in extended precision.
inline long double projection(const Vector& gram, const Vector& weights, int i) {
  const int tasks = static_cast<int>(weights.size());
  long double sum = 0.0L;
  for (int j = 0; j < tasks; ++j) sum += static_cast<long double>(gram[i * tasks + j]) * weights[j];
  return sum;
}

inline double update_norm(const Vector& gram, const Vector& weights) {
  long double square = 0.0L;
  for (std::size_t i = 0; i < weights.size(); ++i) square += weights[i] * projection(gram, weights, static_cast<int>(i));
  return static_cast<double>(std::sqrt(std::fmax(square, 0.0L)));
}

inline bool same_bits(const Vector& a, const Vector& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

inline bool all_nan(const Vector& values) {
  for (const double value : values)
    if (!std::isnan(value)) return false;
  return true;
}

inline bool all_finite(const Vector& values) {
  for (const double value : values)
    if (!std::isfinite(value)) return false;
  return true;
}

}  // namespace check
