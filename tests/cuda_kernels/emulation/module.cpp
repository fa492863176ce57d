// The CUDA part of the compiled module, over the emulation.
#include "bindings/cuda.h"

namespace emulation_control {
void set_thread_order(int order);
}

PYBIND11_MODULE(emulated_cuda, m) {
  igb::bindings::bind_cuda(m);
  m.def("set_thread_order", &emulation_control::set_thread_order);
}
