// Microseconds per Nash-MTL solve by one thread: random Gramians, and the same with norms spread over 1e-2..1e2.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "solve.h"

int main() {
  std::printf("%4s %12s %12s\n", "K", "random us", "spread us");
  for (const int tasks : {2, 8, 16, 40}) {
    double microseconds[2];
    for (int spread = 0; spread < 2; ++spread) {
      std::mt19937_64 engine(7);
      std::normal_distribution<double> normal;
      std::uniform_real_distribution<double> exponent(-2.0, 2.0);
      const int problems = 64, columns = 2 * tasks;
      std::vector<std::vector<double>> grams;
      for (int p = 0; p < problems; ++p) {
        std::vector<double> rows(tasks * columns), gram(tasks * tasks, 0.0);
        for (int i = 0; i < tasks; ++i) {
          const double scale = spread ? std::pow(10.0, exponent(engine)) : 1.0;
          for (int c = 0; c < columns; ++c) rows[i * columns + c] = scale * normal(engine);
        }
        for (int i = 0; i < tasks; ++i)
          for (int j = 0; j < tasks; ++j)
            for (int c = 0; c < columns; ++c) gram[i * tasks + j] += rows[i * columns + c] * rows[j * columns + c];
        grams.push_back(gram);
      }
      const int repeats = 20000 / (tasks * tasks) + 1;
      const double options[] = {0.0, 0.0};
      std::vector<double> weights(tasks), state(tasks, 1.0);
      std::vector<double> workspace(igb::workspace_size(igb::Method::nash_mtl, tasks));
      double checksum = 0.0;
      const auto start = std::chrono::steady_clock::now();
      for (int r = 0; r < repeats; ++r)
        for (const std::vector<double>& gram : grams) {
          const igb::Problem problem{tasks, gram.data(), true, nullptr, nullptr, options, state.data()};
          igb::solve(igb::Method::nash_mtl, problem, weights.data(), workspace.data(), igb::SerialTeam{});
          checksum += weights[0];
        }
      const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
      microseconds[spread] = std::isfinite(checksum) ? elapsed.count() / (repeats * problems) : NAN;
    }
    std::printf("%4d %12.2f %12.2f\n", tasks, microseconds[0], microseconds[1]);
  }
  return 0;
}
