// The K x K mathematics of gradient balancing, one entry point for host and device. A method is one solver header and
// one line in the list.
//
// Contract of every method: a NaN or inf in its inputs makes every weight NaN and leaves the state alone. A task whose
// norm is at most inactive_ratio times the largest is inactive: weight 0, unless none is active; then the weights are the
// method's neutral ones. Arrays must not overlap. Results do not depend on the team's width.
#pragma once

#include "gramian.h"
#include "platform.h"
#include "problem.h"
#include "solvers/aligned_mtl.h"
#include "solvers/cagrad.h"
#include "solvers/config.h"
#include "solvers/db_mtl.h"
#include "solvers/dual_proj.h"
#include "solvers/emtl.h"
#include "solvers/equal.h"
#include "solvers/excess_mtl.h"
#include "solvers/fairgrad.h"
#include "solvers/grad_drop.h"
#include "solvers/grad_norm.h"
#include "solvers/gradvac.h"
#include "solvers/imtl_g.h"
#include "solvers/metabalance.h"
#include "solvers/mgda.h"
#include "solvers/moco.h"
#include "solvers/modo.h"
#include "solvers/nash_mtl.h"
#include "solvers/pcgrad.h"
#include "solvers/sdm_grad.h"
#include "solvers/upgrad.h"
#include "status.h"

namespace igb {

// The name in Python, and the solver.
#define IGB_METHODS(method) \
  method(equal, Equal) \
  method(aligned_mtl, AlignedMtl) \
  method(cagrad, CaGrad) \
  method(config, Config) \
  method(db_mtl, DbMtl) \
  method(dual_proj, DualProj) \
  method(emtl, Emtl) \
  method(excess_mtl, ExcessMtl) \
  method(fairgrad, FairGrad) \
  method(grad_drop, GradDrop) \
  method(grad_norm, GradNorm) \
  method(gradvac, Gradvac) \
  method(imtl_g, ImtlG) \
  method(metabalance, MetaBalance) \
  method(mgda, Mgda) \
  method(moco, MoCo) \
  method(modo, MoDo) \
  method(nash_mtl, NashMtl) \
  method(pcgrad, Pcgrad) \
  method(sdm_grad, SdmGrad) \
  method(upgrad, UpGrad)

enum class Method : int {
#define IGB_ENUMERATOR(name, Solver) name,
  IGB_METHODS(IGB_ENUMERATOR)
#undef IGB_ENUMERATOR
};

// In the order of the enumerators.
constexpr const char* method_names[] = {
#define IGB_NAME(name, Solver) #name,
    IGB_METHODS(IGB_NAME)
#undef IGB_NAME
};

namespace detail {

IGB_ANY_CALLABLE
template <class Visitor>
IGB_HD constexpr auto select(Method method, const Visitor& visit) {
  switch (method) {
#define IGB_CASE(name, Solver) \
  case Method::name: return visit(Solver{});
    IGB_METHODS(IGB_CASE)
#undef IGB_CASE
  }
  return visit(Equal{});
}

// Whether the Gramian is that of two batches: not symmetric, and its diagonal no squares of norms.
template <class Solver> IGB_HD constexpr auto is_cross_gram(int) -> decltype(Solver::cross_gram) { return Solver::cross_gram; }
template <class Solver> IGB_HD constexpr bool is_cross_gram(long) { return false; }

template <class Solver, class Team>
IGB_HD std::int32_t run(const Problem& problem, double* weights, double* workspace, const Team& team) {
  const int tasks = problem.tasks;
  Norms norms = measure_norms(problem, Solver::needs_gram, Solver::inactive_ratio, workspace, team);
  if (Solver::needs_losses)
    for (int i = 0; i < tasks; ++i)
      if (!is_finite(problem.losses[i])) norms.status = non_finite;
  if (norms.status & non_finite) {
    fill(tasks, weights, NAN, team);
    return non_finite;
  }
  if (is_cross_gram<Solver>(0)) norms.status = 0;
  return norms.status | Solver::solve(problem, norms, weights, workspace + tasks, team);
}

}  // namespace detail

IGB_HD constexpr int workspace_size(Method method, int tasks) {  // in doubles
  return detail::select(method, [tasks](auto solver) { return tasks + decltype(solver)::workspace_size(tasks); });
}

IGB_HD constexpr int state_size(Method method, int tasks) {  // in doubles
  return detail::select(method, [tasks](auto solver) { return decltype(solver)::state_size(tasks); });
}

IGB_HD constexpr int option_count(Method method) {
  return detail::select(method, [](auto solver) { return static_cast<int>(decltype(solver)::option_count); });
}

// How many numbers the method takes for its tasks, at most; 0: none.
IGB_HD constexpr int per_task_size(Method method, int tasks) {
  return detail::select(method, [tasks](auto solver) { return decltype(solver)::per_task_size(tasks); });
}

IGB_HD constexpr bool needs_gram(Method method) {
  return detail::select(method, [](auto solver) { return decltype(solver)::needs_gram; });
}

IGB_HD constexpr bool needs_losses(Method method) {
  return detail::select(method, [](auto solver) { return decltype(solver)::needs_losses; });
}

// Called by every lane; returns the same Status bits to each.
template <class Team>
IGB_HD std::int32_t solve(Method method, const Problem& problem, double* weights, double* workspace, const Team& team) {
  return detail::select(method, [&](auto solver) {
    return detail::run<decltype(solver)>(problem, weights, workspace, team);
  });
}

}  // namespace igb
