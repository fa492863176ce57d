// Random loss weighting (Lin et al., TMLR 2022): the softmax of standard normals, which are drawn anew each step. They
// follow from seed and step alone, so that a step that is replayed in a CUDA graph draws as any other does.
#pragma once

#include "../philox.h"
#include "common.h"

namespace igb {

struct Rlw {
  enum Option { times_tasks, option_count };       // sum to K instead of 1
  enum State { seed, step, state_count };          // whole numbers below 2^53
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int) { return state_count; }
  IGB_HD static std::int32_t check(const LossProblem&) { return 0; }

  template <class Team>
  IGB_HD static std::int32_t scale(const LossProblem& problem, double* scales, const Team& team) {
    const double at = problem.state[step];
    for (int i = team.lane(); i < problem.tasks; i += team.width())
      scales[i] = normal(std::uint64_t(problem.state[seed]), std::uint64_t(at), i);
    team.sync();  // every lane has read the state
    softmax(problem.tasks, scales, problem.options[times_tasks] != 0.0 ? problem.tasks : 1.0, team);
    if (team.lane() == 0) problem.state[step] = at + 1.0;
    team.sync();
    return 0;
  }

 private:
  // Box and Muller's transform makes two normals of two words.
  IGB_HD static double normal(std::uint64_t seed, std::uint64_t step, int task) {
    const Random4 random = philox(seed, step, task / 4);
    const int first = task % 4 / 2 * 2;
    const double radius = sqrt(-2.0 * log(uniform(random.words[first])));
    const double angle = 6.283185307179586 * uniform(random.words[first + 1]);
    return radius * (task % 2 == 0 ? cos(angle) : sin(angle));
  }
};

}  // namespace igb
