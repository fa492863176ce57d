// Loss balancing by a transform phi of the losses: scales s_k = d phi / d L_k, the seeds of the backward passes. One entry
// point for host and device; a rule is one header in rules/ and one line in the list.
//
// Contract of every rule: check() says what keeps it from having scales; then every scale is NaN, and the state stays as
// it was. A loss that is not finite is such a reason for all. Results do not depend on the team's width.
#pragma once

#include <cstdint>

#include "platform.h"
#include "problem.h"
#include "rules/dwa.h"
#include "rules/famo.h"
#include "rules/gls.h"
#include "rules/igb_v1.h"
#include "rules/igb_v2.h"
#include "rules/imtl_l.h"
#include "rules/ldc_mtl.h"
#include "rules/log.h"
#include "rules/none.h"
#include "rules/rlw.h"
#include "rules/stch.h"
#include "rules/uw.h"

namespace igb {

// The name in Python, and the rule.
#define IGB_LOSS_RULES(rule) \
  rule(none, Unscaled) \
  rule(log, Log) \
  rule(igb_v1, IgbV1) \
  rule(igb_v2, IgbV2) \
  rule(imtl_l, ImtlL) \
  rule(uw, Uw) \
  rule(rlw, Rlw) \
  rule(dwa, Dwa) \
  rule(gls, Gls) \
  rule(stch, Stch) \
  rule(famo, Famo) \
  rule(ldc_mtl, LdcMtl)

enum class LossRule : int {
#define IGB_ENUMERATOR(name, Rule) name,
  IGB_LOSS_RULES(IGB_ENUMERATOR)
#undef IGB_ENUMERATOR
};

// In the order of the enumerators.
constexpr const char* loss_rule_names[] = {
#define IGB_NAME(name, Rule) #name,
    IGB_LOSS_RULES(IGB_NAME)
#undef IGB_NAME
};

namespace detail {

IGB_ANY_CALLABLE
template <class Visitor>
IGB_HD constexpr auto select(LossRule rule, const Visitor& visit) {
  switch (rule) {
#define IGB_CASE(name, Rule) \
  case LossRule::name: return visit(Rule{});
    IGB_LOSS_RULES(IGB_CASE)
#undef IGB_CASE
  }
  return visit(Unscaled{});
}

template <class Rule, class Team>
IGB_HD std::int32_t scale(const LossProblem& problem, double* scales, const Team& team) {
  std::int32_t status = non_finite;
  if (all_finite(problem.tasks, problem.losses)) status = Rule::check(problem);
  if (status == 0) return Rule::scale(problem, scales, team);
  fill(problem.tasks, scales, NAN, team);
  return status;
}

}  // namespace detail

IGB_HD constexpr int option_count(LossRule rule) {
  return detail::select(rule, [](auto chosen) { return static_cast<int>(decltype(chosen)::option_count); });
}

IGB_HD constexpr int state_size(LossRule rule, int tasks) {  // in doubles
  return detail::select(rule, [tasks](auto chosen) { return decltype(chosen)::state_size(tasks); });
}

IGB_HD constexpr int per_task_size(LossRule rule, int tasks) {  // in doubles
  return detail::select(rule, [tasks](auto chosen) { return decltype(chosen)::per_task_size(tasks); });
}

// Arrays must not overlap. Called by every lane; returns the same Status bits to each.
template <class Team>
IGB_HD std::int32_t loss_scales(LossRule rule, const LossProblem& problem, double* scales, const Team& team) {
  return detail::select(rule, [&](auto chosen) { return detail::scale<decltype(chosen)>(problem, scales, team); });
}

}  // namespace igb
