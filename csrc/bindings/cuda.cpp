// Python's door to the GPU: device addresses and streams as integers. Callers own all memory.
#include "cuda.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "../cuda/multi_tensor.h"
#include "address.h"

namespace igb::bindings {

namespace py = pybind11;

namespace {

cuda::Stream stream_of(Address stream) { return pointer<CUstream_st>(stream); }

cuda::Table upload(Address addresses, Address numel, Address dtypes, int tasks, std::int64_t params, Address words,
                   Address stream) {
  const TensorTable table{pointer<std::uintptr_t>(addresses), pointer<std::int64_t>(numel),
                               pointer<DType>(dtypes), tasks, params};
  return cuda::upload(table, pointer<std::uint64_t>(words), stream_of(stream));
}

void solve(int method, int tasks, Address gram, bool full, Address losses, Address per_task,
           const std::vector<double>& options, Address state, Address weights, Address status, Address workspace,
           Address stream) {
  const Problem problem{tasks, pointer<double>(gram), full, pointer<double>(losses), pointer<double>(per_task),
                        options.data(), pointer<double>(state)};
  cuda::solve(Method(method), problem, pointer<double>(weights), pointer<std::int32_t>(status),
              pointer<double>(workspace), stream_of(stream));
}

void loss_scales(int rule, int tasks, int dtype, Address losses, Address per_task, const std::vector<double>& options,
                 Address state, Address scales, Address status, Address stream) {
  cuda::loss_scales(LossRule(rule), tasks, DType(dtype), pointer<void>(losses), pointer<double>(per_task),
                    options.data(), pointer<double>(state), pointer<void>(scales), pointer<std::int32_t>(status),
                    stream_of(stream));
}

}  // namespace

void bind_cuda(py::module_ m) {
  using cuda::Table;
  m.doc() = "CUDA kernels of igb_kernels; use igb_kernels.ops.";
  py::class_<Table>(m, "Table", py::module_local()).def(py::init(&upload));
  m.def("word_count", &cuda::word_count);
  m.def("gram_scratch", &cuda::gram_scratch);
  m.def("norm_scratch", &cuda::norm_scratch);
  m.def("gram", [](const Table& grads, Address gram, Address scratch, Address stream) {
    cuda::gram(grads, pointer<double>(gram), pointer<double>(scratch), stream_of(stream));
  });
  m.def("sq_norms", [](const Table& grads, Address norms, Address scratch, Address stream) {
    cuda::sq_norms(grads, pointer<double>(norms), pointer<double>(scratch), stream_of(stream));
  });
  m.def("ema", [](const Table& out, const Table& state, const Table& grads, Address decay, Address scales,
                  Address norms, Address scratch, Address stream) {
    cuda::ema(out, state, grads, pointer<double>(decay), pointer<double>(scales), pointer<double>(norms),
              pointer<double>(scratch), stream_of(stream));
  });
  m.def("accumulate_squares", [](const Table& out, const Table& state, const Table& grads, double eps, Address excess,
                                 Address scratch, Address stream) {
    cuda::accumulate_squares(out, state, grads, eps, pointer<double>(excess), pointer<double>(scratch),
                             stream_of(stream));
  });
  m.def("combine", [](const Table& out, const Table& grads, Address weights, bool accumulate, Address stream) {
    cuda::combine(out, grads, pointer<double>(weights), accumulate, stream_of(stream));
  });
  m.def("sign_drop", [](const Table& out, const Table& grads, Address counter, Address leaks, Address norm,
                        Address scratch, Address stream) {
    cuda::sign_drop(out, grads, pointer<double>(counter), pointer<double>(leaks), pointer<double>(norm),
                    pointer<double>(scratch), stream_of(stream));
  });
  m.def("rollback", [](const Table& out, const Table& kept, Address status, Address stream) {
    cuda::rollback(out, kept, pointer<std::int32_t>(status), stream_of(stream));
  });
  m.def("workspace_size", [](int method, int tasks) { return workspace_size(Method(method), tasks); });
  m.def("solve", &solve);
  m.def("loss_scales", &loss_scales);
  m.attr("max_tasks") = cuda::kMaxTasks;
  m.attr("architectures") = IGB_CUDA_ARCHITECTURES;  // as in CMAKE_CUDA_ARCHITECTURES, with commas
}

}  // namespace igb::bindings
