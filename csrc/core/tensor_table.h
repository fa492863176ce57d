// The shape in which gradients reach the kernels: K rows (tasks) of P tensors (parameters), by address.
#pragma once
#include <cstdint>

namespace igb {

enum class DType : std::uint8_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

constexpr std::int64_t element_size(DType t) {
  return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2;
}

// Sums over half and single precision run in float, over double in double.
constexpr DType accumulator_of(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

// Row k, column p is at address[k * params + p]; 0 means that task k does not reach parameter p.
// A column has one element count and one dtype, and its tensors are dense with equal strides.
struct TensorTable {
  const std::uintptr_t* address;
  const std::int64_t* numel;
  const DType* dtype;
  int tasks;
  std::int64_t params;
};

}  // namespace igb
