// Where the tensors of Python lists lie, read through the C interface that torch has for that (DLPack 1.3), which costs
// a small part of asking each for it in Python.
#pragma once

// DLPack's own header, plain C. torch guards it like its C++ ones, as if it changed with torch; its version is checked.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastllm {

inline const DLPackExchangeAPI& tensor_api() {
  static const auto* api = [] {
    const auto capsule = pybind11::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
    const auto* found =
        static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found == nullptr) {
      throw pybind11::error_already_set();
    }
    if (found->header.version.major != DLPACK_MAJOR_VERSION) {
      throw std::runtime_error("fastllm: this torch speaks another DLPack than fastllm was built for");
    }
    return found;
  }();
  return *api;
}

// (layout, addresses): of all tensors device, dtype, sizes, strides and, except for those of the second list, the
// address; and the addresses of the second list. Equal bytes mean that nothing has moved.
inline pybind11::tuple layout(const pybind11::args& lists) {
  const auto read = tensor_api().dltensor_from_py_object_no_sync;
  std::vector<int64_t> all, second;
  for (size_t l = 0; l < lists.size(); ++l) {
    const auto list = pybind11::reinterpret_borrow<pybind11::list>(lists[l]);
    const auto count = static_cast<Py_ssize_t>(list.size());
    all.push_back(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      // They are seldom in a cache. The tensor itself is where torch's Python object points to first; were that to
      // change, this would fetch in vain.
      __builtin_prefetch(PyList_GET_ITEM(list.ptr(), std::min(i + 24, count - 1)));
      const auto* tensor = reinterpret_cast<char* const*>(PyList_GET_ITEM(list.ptr(), std::min(i + 12, count - 1)))[2];
      for (int line = 0; line < 3; ++line) {
        __builtin_prefetch(tensor + 64 * line);
      }
      DLTensor t;
      if (read(PyList_GET_ITEM(list.ptr(), i), &t) != 0) {
        throw pybind11::error_already_set();
      }
      const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data) + t.byte_offset);
      const uint64_t what = t.dtype.code | uint64_t{t.dtype.bits} << 8 | static_cast<uint64_t>(t.ndim) << 16 |
                            static_cast<uint64_t>(t.device.device_type) << 32 |
                            static_cast<uint64_t>(t.device.device_id) << 48;
      (l == 1 ? second : all).push_back(address);
      all.push_back(static_cast<int64_t>(what));
      all.insert(all.end(), t.shape, t.shape + t.ndim);
      all.insert(all.end(), t.strides, t.strides + t.ndim);
    }
  }
  const auto bytes = [](const std::vector<int64_t>& words) {
    return pybind11::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t));
  };
  return pybind11::make_tuple(bytes(all), bytes(second));
}

}  // namespace fastllm
