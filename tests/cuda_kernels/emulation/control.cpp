#include "cuda_runtime.h"

namespace emulation_control {
void set_thread_order(int order) { emulation::order = order; }
}  // namespace emulation_control
