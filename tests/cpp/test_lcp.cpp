// The complementarity kernel: feasibility and complementarity on hard matrices, few moves, rays, levels, ridges.
#include <algorithm>

#include "check.h"

using namespace check;

namespace {

using Kernel = igb::Lcp<igb::SerialTeam>;
using Outcome = Kernel::Outcome;

// The kernel on the cosines of a Gramian without zero rows, with what it needs kept alive.
struct Setup {
  int tasks;
  Vector gram, norms, workspace;
  igb::SerialTeam team;
  igb::Norms measured;
  Kernel lcp;

  Setup(int tasks, const Vector& gram)
      : tasks(tasks),
        gram(gram),
        norms(tasks),
        workspace(Kernel::workspace_size(tasks), NAN),
        measured(igb::measure_norms(problem(), true, 0.0, norms.data(), team)),
        lcp(problem(), measured, workspace.data(), team) {}

  igb::Problem problem() const { return {tasks, gram.data(), true, nullptr, nullptr, nullptr, nullptr}; }
};

// The largest violation of z >= 0, y >= 0, z y = 0, relative to the terms of y, in extended precision.
double residual(const Setup& setup) {
  const Kernel& lcp = setup.lcp;
  long double worst = 0.0L;
  for (int i = 0; i < setup.tasks; ++i) {
    long double y = static_cast<long double>(lcp.level) * lcp.h[i], terms = std::fabs(y);
    for (int j = 0; j < setup.tasks; ++j) {
      const long double term = static_cast<long double>(lcp.cosine(i, j)) * (lcp.v[j] + lcp.z[j]);
      y += term;
      terms += std::fabs(term);
    }
    if (terms == 0.0L) continue;
    worst = std::fmax(worst, lcp.z[i] > 0.0 ? std::fabs(y) / terms : -y / terms);
    if (lcp.z[i] < 0.0) return INFINITY;
  }
  return static_cast<double>(worst);
}

struct Family {
  const char* name;
  std::function<Vector(int, std::mt19937_64&)> rows;
};

const Family families[] = {
    {"random", [](int tasks, std::mt19937_64& engine) { return random_rows(tasks, 2 * tasks, engine); }},
    {"conflicting",
     [](int tasks, std::mt19937_64& engine) {  // the mean is nearly 0
       const int columns = 2 * tasks;
       Vector rows = random_rows(tasks, columns, engine);
       for (int c = 0; c < columns; ++c) {
         double sum = 0.0;
         for (int i = 0; i < tasks; ++i) sum += rows[i * columns + c];
         for (int i = 0; i < tasks; ++i) rows[i * columns + c] -= 0.99 * sum / tasks;
       }
       return rows;
     }},
    {"near-parallel",
     [](int tasks, std::mt19937_64& engine) {
       Vector rows = random_rows(tasks, 2 * tasks, engine);
       for (double& entry : rows) entry = 1.0 + 1e-4 * entry;
       return rows;
     }},
    {"duplicates",
     [](int tasks, std::mt19937_64& engine) {
       Vector rows = random_rows(tasks, 2 * tasks, engine);
       for (int i = 1; i < tasks; i += 2) std::copy_n(&rows[(i - 1) * 2 * tasks], 2 * tasks, &rows[i * 2 * tasks]);
       return rows;
     }},
    {"opposed",
     [](int tasks, std::mt19937_64& engine) {
       Vector rows = random_rows(tasks, 2 * tasks, engine);
       for (int i = 1; i < tasks; i += 2)
         for (int c = 0; c < 2 * tasks; ++c) rows[i * 2 * tasks + c] = -rows[(i - 1) * 2 * tasks + c];
       return rows;
     }},
    {"half rank",
     [](int tasks, std::mt19937_64& engine) { return random_rows(tasks, (tasks + 1) / 2, engine); }},
    {"one dimension", [](int tasks, std::mt19937_64& engine) { return random_rows(tasks, 1, engine); }},
};

constexpr int sizes[] = {1, 2, 3, 5, 8, 16, 64};

}  // namespace

TEST(lcp_is_solved_on_every_family_in_few_moves) {
  for (const Family& family : families) {
    double worst = 0.0, most = 0.0;
    for (const int tasks : sizes) {
      std::mt19937_64 engine(500 + tasks);
      for (int repeat = 0; repeat < (tasks <= 16 ? 40 : 6); ++repeat) {
        Setup setup(tasks, gram_of(family.rows(tasks, engine), tasks));
        const Vector preference = random_scales(tasks, repeat % 4 * 2.0, engine);  // from equal to 1e-6..1e6
        std::copy(preference.begin(), preference.end(), setup.lcp.v);
        const std::int32_t status = setup.lcp.solve();
        CHECK((status & ~igb::pareto_stationary) == 0);
        worst = std::fmax(worst, residual(setup));
        most = std::fmax(most, static_cast<double>(setup.lcp.moves()) / (tasks + 2));
      }
    }
    std::printf("lcp %-14s residual %.1e, at most %.1f (K + 2) moves\n", family.name, worst, most);
    CHECK(worst <= 1e-9);
    CHECK(most <= 1.5);
  }
}

TEST(lcp_finds_least_distances_or_the_vanishing_combination) {
  for (const Family& family : families)
    for (const int tasks : sizes) {
      std::mt19937_64 engine(600 + tasks);
      for (int repeat = 0; repeat < (tasks <= 16 ? 40 : 6); ++repeat) {
        const Vector scales = random_scales(tasks, repeat % 3 * 4.0, engine);
        Setup setup(tasks, rescaled(gram_of(family.rows(tasks, engine), tasks), scales));
        setup.lcp.demand_equally(setup.measured);
        setup.lcp.level = 1.0;
        setup.lcp.reset();
        const Outcome outcome = setup.lcp.settle();
        CHECK(outcome != Outcome::iteration_cap);
        CHECK(setup.lcp.moves() <= 2 * (tasks + 2));
        if (outcome == Outcome::solved) {
          CHECK(residual(setup) <= 1e-9);
        } else {
          setup.lcp.follow_ray();
          for (int i = 0; i < tasks; ++i) CHECK(setup.lcp.z[i] >= 0.0);
          CHECK(setup.lcp.vanishes(setup.lcp.z));
        }
      }
    }
}

TEST(lcp_raises_the_level_to_the_radius) {
  for (const Family& family : families)
    for (const int tasks : sizes) {
      std::mt19937_64 engine(700 + tasks);
      for (int repeat = 0; repeat < (tasks <= 16 ? 40 : 6); ++repeat) {
        const Vector scales = random_scales(tasks, repeat % 3 * 2.0, engine);
        Setup setup(tasks, rescaled(gram_of(family.rows(tasks, engine), tasks), scales));
        setup.lcp.demand_equally(setup.measured);
        for (int i = 0; i < tasks; ++i) setup.lcp.v[i] = setup.norms[i] / setup.measured.largest / tasks;
        setup.lcp.reset();
        const double radius_squared = 0.25 * setup.lcp.length_squared(setup.lcp.v);
        if (setup.lcp.vanishes(setup.lcp.v)) continue;
        const Outcome outcome = setup.lcp.raise_level(radius_squared);
        CHECK(outcome != Outcome::iteration_cap);
        CHECK(residual(setup) <= 1e-9);
        CHECK(setup.lcp.moves() <= 2 * (tasks + 4));
        const double length_squared = setup.lcp.length_squared(setup.lcp.z);
        if (outcome == Outcome::solved) CHECK_NEAR(length_squared / radius_squared, 1.0, 1e-9);
        else CHECK(length_squared <= radius_squared * (1.0 + 1e-9));
      }
    }
}

TEST(lcp_closed_forms) {
  // The projection of u_1 on {x : u_1 . x >= 0, u_2 . x >= 0} for an obtuse angle: z_2 = -cos.
  Setup pair(2, {1.0, -0.6, -0.6, 1.0});
  pair.lcp.v[0] = 1.0;
  CHECK(pair.lcp.solve() == 0);
  CHECK(pair.lcp.z[0] == 0.0);
  CHECK_NEAR(pair.lcp.z[1], 0.6, 1e-16);

  Setup acute(2, {1.0, 0.6, 0.6, 1.0});
  acute.lcp.v[0] = 1.0;
  CHECK(acute.lcp.solve() == 0);
  CHECK(acute.lcp.z[0] == 0.0 && acute.lcp.z[1] == 0.0);
  CHECK(acute.lcp.moves() == 0);

  Setup opposed(2, {4.0, -2.0, -2.0, 1.0});
  opposed.lcp.demand_equally(opposed.measured);
  opposed.lcp.level = 1.0;
  opposed.lcp.reset();
  CHECK(opposed.lcp.settle() == Outcome::ray);
  opposed.lcp.follow_ray();
  CHECK(opposed.lcp.z[0] == opposed.lcp.z[1]);
}

// u_3 is dependent on u_1 and u_2, which are both in use when it is needed: one of them must give way.
TEST(lcp_exchanges_dependent_tasks) {
  std::mt19937_64 engine(800);
  std::uniform_real_distribution<double> angle(0.0, 3.0);
  for (int repeat = 0; repeat < 200; ++repeat) {
    Vector rows;
    for (int i = 0; i < 6; ++i) {
      const double phi = angle(engine);  // within a half plane: no combination vanishes
      rows.push_back(std::cos(phi));
      rows.push_back(std::sin(phi));
    }
    Setup setup(6, rescaled(gram_of(rows, 6), random_scales(6, 2.0, engine)));
    setup.lcp.demand_equally(setup.measured);
    setup.lcp.level = 1.0;
    setup.lcp.reset();
    CHECK(setup.lcp.settle() == Outcome::solved);
    CHECK(residual(setup) <= 1e-12);
    int used = 0;
    for (int i = 0; i < 6; ++i) used += setup.lcp.z[i] > 0.0;
    CHECK(used <= 2);
  }
}

// After many changes in and out of ill-conditioned sets, nothing of their rounding may stay behind.
TEST(lcp_survives_ill_conditioned_detours) {
  for (const int tasks : {4, 8, 16}) {
    std::mt19937_64 engine(900 + tasks);
    for (int repeat = 0; repeat < 60; ++repeat) {
      Vector rows = random_rows(tasks, 2 * tasks, engine);
      for (int i = 1; i < tasks; i += 2)  // nearly opposed or nearly parallel pairs
        for (int c = 0; c < 2 * tasks; ++c) {
          double& entry = rows[i * 2 * tasks + c];
          entry = (i % 4 == 1 ? -1.0 : 1.0) * rows[(i - 1) * 2 * tasks + c] + 1e-5 * entry;
        }
      Setup setup(tasks, gram_of(rows, tasks));
      const Vector preference = random_scales(tasks, 1.0, engine);
      std::copy(preference.begin(), preference.end(), setup.lcp.v);
      CHECK(setup.lcp.solve() == 0);
      CHECK(residual(setup) <= 1e-12);
    }
  }
}

TEST(lcp_survives_gramians_of_low_precision) {  // rounding to float makes some of them indefinite
  double worst = 0.0;
  for (const int tasks : {2, 3, 8, 16, 64}) {
    std::mt19937_64 engine(1000 + tasks);
    for (int repeat = 0; repeat < (tasks <= 16 ? 60 : 6); ++repeat) {
      Vector gram = gram_of(random_rows(tasks, std::max(1, tasks / 2), engine), tasks);
      for (double& entry : gram) entry = static_cast<float>(entry);
      Setup setup(tasks, gram);
      for (int i = 0; i < tasks; ++i) setup.lcp.v[i] = 1.0;
      CHECK((setup.lcp.solve() & ~igb::pareto_stationary) == 0);
      for (int i = 0; i < tasks; ++i) CHECK(setup.lcp.z[i] >= 0.0);
      worst = std::fmax(worst, residual(setup));
    }
  }
  std::printf("lcp residual on rank-deficient Gramians rounded to float %.1e\n", worst);
  CHECK(worst <= 1e-5);
}

TEST(lcp_ends_on_matrices_that_are_no_gramian) {
  std::mt19937_64 engine(1100);
  std::uniform_real_distribution<double> uniform(-1.0, 1.0);
  for (const int tasks : {2, 3, 5, 8, 16})
    for (int repeat = 0; repeat < 60; ++repeat) {
      Vector gram(tasks * tasks);
      for (int i = 0; i < tasks; ++i) {
        for (int j = 0; j < i; ++j) gram[i * tasks + j] = gram[j * tasks + i] = uniform(engine);
        gram[i * tasks + i] = 1.0;
      }
      for (const igb::Method method :
           {igb::Method::mgda, igb::Method::dual_proj, igb::Method::upgrad, igb::Method::cagrad}) {
        Input input = make_input(method, tasks, gram);
        input.options.assign(input.options.size(), 0.0);
        if (method == igb::Method::cagrad) input.options[igb::CaGrad::c] = 0.5;
        CHECK(all_finite(run(method, input).weights));
      }
    }
}
