// Python's door: integers in (addresses, counts, thread numbers), nothing else. Callers own all memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "../core/losses.h"
#include "../core/solve.h"
#include "../cpu/multi_tensor.h"
#include "address.h"
#ifdef IGB_CUDA
#include "cuda.h"
#endif

namespace py = pybind11;
using igb::DType;
using igb::TensorTable;
using igb::bindings::Address;
using igb::bindings::pointer;

namespace {

// A TensorTable with its metadata; the tensors themselves stay with the caller.
class Table {
 public:
  Table(Address addresses, Address numel, Address dtypes, int tasks, std::int64_t params)
      : addresses_(pointer<std::uintptr_t>(addresses), pointer<std::uintptr_t>(addresses) + tasks * params),
        numel_(pointer<std::int64_t>(numel), pointer<std::int64_t>(numel) + params),
        dtypes_(pointer<DType>(dtypes), pointer<DType>(dtypes) + params),
        table_{addresses_.data(), numel_.data(), dtypes_.data(), tasks, params} {}
  Table(const Table&) = delete;
  operator const TensorTable&() const { return table_; }

 private:
  std::vector<std::uintptr_t> addresses_;
  std::vector<std::int64_t> numel_;
  std::vector<DType> dtypes_;
  TensorTable table_;
};

template <std::size_t N> std::map<std::string, int> numbers(const char* const (&names)[N]) {
  std::map<std::string, int> result;
  for (std::size_t i = 0; i < N; ++i) result[names[i]] = int(i);
  return result;
}

std::int32_t solve(int method_number, int tasks, Address gram, bool full, Address losses, Address per_task,
                   const std::vector<double>& options, Address state, Address weights) {
  const auto method = igb::Method(method_number);
  const igb::Problem problem{tasks, pointer<double>(gram), full, pointer<double>(losses), pointer<double>(per_task),
                             options.data(), pointer<double>(state)};
  std::vector<double> workspace(igb::workspace_size(method, tasks));
  return igb::solve(method, problem, pointer<double>(weights), workspace.data(), igb::SerialTeam{});
}

std::int32_t loss_scales(int rule, int tasks, Address losses, Address per_task, const std::vector<double>& options,
                         Address state, Address scales) {
  const igb::LossProblem problem{tasks, pointer<double>(losses), pointer<double>(per_task), options.data(),
                                 pointer<double>(state)};
  return igb::loss_scales(igb::LossRule(rule), problem, pointer<double>(scales), igb::SerialTeam{});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of igb_kernels; use igb_kernels.ops.";
  using Unlocked = py::call_guard<py::gil_scoped_release>;

  py::class_<Table>(m, "Table").def(py::init<Address, Address, Address, int, std::int64_t>());
  m.def("gram", [](const Table& grads, Address gram, int threads) {
    igb::cpu::gram(grads, pointer<double>(gram), threads);
  }, Unlocked());
  m.def("sq_norms", [](const Table& grads, Address norms, int threads) {
    igb::cpu::sq_norms(grads, pointer<double>(norms), threads);
  }, Unlocked());
  m.def("ema", [](const Table& out, const Table& state, const Table& grads, double decay, Address scales, Address norms,
                  int threads) {
    igb::cpu::ema(out, state, grads, decay, pointer<double>(scales), pointer<double>(norms), threads);
  }, Unlocked());
  m.def("accumulate_squares", [](const Table& out, const Table& state, const Table& grads, double eps, Address excess,
                                 int threads) {
    igb::cpu::accumulate_squares(out, state, grads, eps, pointer<double>(excess), threads);
  }, Unlocked());
  m.def("combine", [](const Table& out, const Table& grads, Address weights, bool accumulate, int threads) {
    igb::cpu::combine(out, grads, pointer<double>(weights), accumulate, threads);
  }, Unlocked());
  m.def("sign_drop", [](const Table& out, const Table& grads, std::uint64_t seed, std::uint64_t step, Address leaks,
                        Address norm, int threads) {
    igb::cpu::sign_drop(out, grads, seed, step, pointer<double>(leaks), pointer<double>(norm), threads);
  }, Unlocked());
  m.def("solve", &solve, Unlocked());
  m.def("loss_scales", &loss_scales, Unlocked());
  m.attr("methods") = numbers(igb::method_names);
  m.attr("loss_rules") = numbers(igb::loss_rule_names);
  m.attr("max_tasks") = igb::cpu::kMaxTasks;
  m.def("option_count", [](int method) { return igb::option_count(igb::Method(method)); });
  m.def("rule_option_count", [](int rule) { return igb::option_count(igb::LossRule(rule)); });
  m.def("state_size", [](int method, int tasks) { return igb::state_size(igb::Method(method), tasks); });
  m.def("rule_state_size", [](int rule, int tasks) { return igb::state_size(igb::LossRule(rule), tasks); });
  m.def("per_task_size", [](int method, int tasks) { return igb::per_task_size(igb::Method(method), tasks); });
  m.def("rule_per_task_size", [](int rule, int tasks) { return igb::per_task_size(igb::LossRule(rule), tasks); });
  m.def("instruction_set", &igb::cpu::instruction_set);
  m.def("use_instruction_set", [](const std::string& name) { return igb::cpu::use_instruction_set(name.c_str()); });
#ifdef IGB_CUDA
  igb::bindings::bind_cuda(m.def_submodule("cuda"));
#endif
}
