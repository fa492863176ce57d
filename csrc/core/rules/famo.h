// Fast adaptive multitask optimization (Liu et al., NeurIPS 2023, algorithm 1): with z = softmax(x) and D = L + 1e-8, the
// scales z_k / D_k, normalised to sum 1, lower all log losses at an equal rate. After the optimizer's step the same
// batch's losses tell how far each log loss fell; Adam, with weight decay gamma, moves x towards what fell least.
//
// The fall is told between two steps, and x moves at the start of the second: so a step is one kernel. A fall counts only
// for the step that is waiting for it.
#pragma once

#include "common.h"

namespace igb {

struct Famo {
  enum Option { gamma, learning_rate, option_count };
  enum Phase { fresh, waiting, told };
  enum State { phase, steps, head };  // then x, Adam's two moments, the log losses before and after the optimizer's step
  IGB_HD static constexpr int per_task_size(int) { return 0; }
  IGB_HD static constexpr int state_size(int tasks) { return head + 5 * tasks; }
  IGB_HD static std::int32_t check(const LossProblem& problem) {
    for (int i = 0; i < problem.tasks; ++i)
      if (!(problem.losses[i] + eps > 0.0)) return non_positive_loss;
    return 0;
  }

  template <class Team>
  IGB_HD static std::int32_t scale(const LossProblem& problem, double* scales, const Team& team) {
    const int tasks = problem.tasks;
    double *logits = problem.state + head, *before = logits + 3 * tasks;
    if (problem.state[phase] == told) learn(problem, scales, team);
    for (int i = team.lane(); i < tasks; i += team.width()) {
      before[i] = log(problem.losses[i] + eps);
      scales[i] = logits[i] - before[i];
    }
    team.sync();  // every lane has read the phase
    if (team.lane() == 0) problem.state[phase] = waiting;
    softmax(tasks, scales, 1.0, team);
    return 0;
  }

 private:
  static constexpr double eps = 1e-8;
  static constexpr double decay = 0.9, square_decay = 0.999;  // Adam's

  template <class Team>
  IGB_HD static void learn(const LossProblem& problem, double* weights, const Team& team) {
    const int tasks = problem.tasks;
    double *logits = problem.state + head, *mean = logits + tasks, *square = mean + tasks;
    const double *before = square + tasks, *after = before + tasks;
    for (int i = team.lane(); i < tasks; i += team.width()) weights[i] = logits[i];
    team.sync();
    softmax(tasks, weights, 1.0, team);
    double fall = 0.0;
    for (int i = 0; i < tasks; ++i) fall += weights[i] * (before[i] - after[i]);

    const double count = problem.state[steps] + 1.0;
    const double rate = problem.options[learning_rate] / (1.0 - pow(decay, count));
    const double spread = sqrt(1.0 - pow(square_decay, count));
    for (int i = team.lane(); i < tasks; i += team.width()) {
      const double gradient = weights[i] * (before[i] - after[i] - fall) + problem.options[gamma] * logits[i];
      mean[i] = decay * mean[i] + (1.0 - decay) * gradient;
      square[i] = square_decay * square[i] + (1.0 - square_decay) * gradient * gradient;
      logits[i] -= rate * mean[i] / (sqrt(square[i]) / spread + eps);
    }
    team.sync();
    if (team.lane() == 0) problem.state[steps] = count;
    team.sync();
  }
};

}  // namespace igb
