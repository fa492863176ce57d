// Loss balancing by a transform phi_k of each loss: scales s_k = d phi_k / d L_k, the seeds of the backward passes.
//   log       sum of logarithms (SI; Dai et al., UAI 2023, section 4.1; with eps also Lin et al., 2023, DB-MTL)
//   igb_v1    improvable gap balancing (Dai et al., UAI 2023, arXiv:2307.15429): sum_k W_k log L_k, W = K softmax(L / base)
//   imtl_l    impartial losses (Liu et al., ICLR 2021, eq. 8): sum_k exp(p_k) L_k - p_k with learned p
#pragma once

#include <cstdint>

#include "linalg.h"
#include "status.h"

namespace igb {

enum class LossRule : int { none = 0, log = 1, igb_v1 = 2, imtl_l = 3 };

struct LogRule {
  enum Option { eps, option_count };
};

IGB_HD constexpr int option_count(LossRule rule) { return rule == LossRule::log ? LogRule::option_count : 0; }

namespace detail {

constexpr double tiny_loss = 1e-20;       // a finished task's loss is clamped here
constexpr double largest_ratio = 1e300;   // of a loss to its base
constexpr double largest_log_scale = 20;

IGB_HD inline std::int32_t check_losses(LossRule rule, int tasks, const double* losses, const double* per_task,
                                        double eps) {
  std::int32_t status = 0;
  for (int i = 0; i < tasks; ++i) {
    if (!is_finite(losses[i])) return non_finite;
    if (rule == LossRule::imtl_l && !is_finite(per_task[i])) return non_finite;
    if ((rule == LossRule::log && losses[i] + eps < 0.0) || (rule == LossRule::igb_v1 && losses[i] < 0.0))
      status = non_positive_loss;
  }
  return status;
}

IGB_HD inline bool any_nan(int n, const double* values) {
  for (int i = 0; i < n; ++i)
    if (values[i] != values[i]) return true;
  return false;
}

// W of IGBv1 into weights: 1 until every base is known (is not NaN). A loss counts as 0 against an infinite base.
// On return a lane sees its own weights only.
template <class Team>
IGB_HD void gap_weights(int tasks, const double* losses, const double* bases, double* weights, const Team& team) {
  if (any_nan(tasks, bases)) return fill(tasks, weights, 1.0, team);

  for (int i = team.lane(); i < tasks; i += team.width())
    weights[i] = is_finite(bases[i]) ? fmin(losses[i] / fmax(bases[i], tiny_loss), largest_ratio) : 0.0;
  team.sync();
  double largest = weights[0];
  for (int i = 1; i < tasks; ++i) largest = fmax(largest, weights[i]);
  team.sync();
  for (int i = team.lane(); i < tasks; i += team.width()) weights[i] = exp(weights[i] - largest);
  team.sync();
  double sum = 0.0;
  for (int i = 0; i < tasks; ++i) sum += weights[i];
  team.sync();
  for (int i = team.lane(); i < tasks; i += team.width()) weights[i] *= tasks / sum;
}

}  // namespace detail

// per_task: IGBv1's base losses, IMTL-L's log scales p, else nullptr. Every scale is NaN if a loss is not finite, or is
// negative under a logarithm. Arrays must not overlap. Called by every lane; returns the same Status bits to each.
template <class Team>
IGB_HD std::int32_t loss_scales(LossRule rule, int tasks, const double* losses, const double* per_task,
                                const double* options, double* scales, const Team& team) {
  const double eps = rule == LossRule::log ? options[LogRule::eps] : 0.0;
  const std::int32_t status = detail::check_losses(rule, tasks, losses, per_task, eps);
  if (status != 0) {
    fill(tasks, scales, NAN, team);
    return status;
  }
  if (rule == LossRule::igb_v1) detail::gap_weights(tasks, losses, per_task, scales, team);
  for (int i = team.lane(); i < tasks; i += team.width()) {
    switch (rule) {
      case LossRule::none: scales[i] = 1.0; break;
      case LossRule::log: scales[i] = 1.0 / fmax(losses[i] + eps, detail::tiny_loss); break;
      case LossRule::igb_v1: scales[i] /= fmax(losses[i], detail::tiny_loss); break;
      case LossRule::imtl_l: {
        const double limit = detail::largest_log_scale;
        scales[i] = exp(fmin(limit, fmax(-limit, per_task[i])));
        break;
      }
    }
  }
  team.sync();
  return 0;
}

}  // namespace igb
