// Memory as Python names it.
#pragma once
#include <cstdint>

namespace igb::bindings {

using Address = std::uintptr_t;

template <class T> T* pointer(Address address) { return reinterpret_cast<T*>(address); }

}  // namespace igb::bindings
