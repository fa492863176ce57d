#pragma once
#include <pybind11/pybind11.h>

namespace igb::bindings {

// Fills the submodule `_C.cuda`, in builds that have it.
void bind_cuda(pybind11::module_ module);

}  // namespace igb::bindings
