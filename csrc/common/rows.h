// SPDX-License-Identifier: Apache-2.0
// What the operations on rows of channels share: where an operand's rows are and how Python says
// so, the switch on dtypes, and a loop over tasks on several threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>

#include "common/checks.h"
#include "common/dtype.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace disca {

// Where row (b, n) of an operand starts: data + b * stride_b + n * stride_n, in elements. One row
// per sample is stride_n = 0, one row for all is both 0; an absent operand is data = nullptr.
struct Rows {
  void* data = nullptr;
  std::int64_t stride_b = 0;
  std::int64_t stride_n = 0;

  explicit operator bool() const { return data != nullptr; }

  // nullptr for an absent operand.
  template <typename T>
  T* at(std::int64_t b, std::int64_t n) const {
    return data == nullptr ? nullptr : static_cast<T*>(data) + b * stride_b + n * stride_n;
  }
};

// As disca_kernels.operands.rows gives it: (address, stride_b, stride_n).
using PyRows = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;

// Strides are trusted; an address that is missing where there are rows to read is not.
inline Rows parse_rows(const char* name, const std::optional<PyRows>& given, bool required,
                       std::int64_t n_rows) {
  if (!given.has_value()) {
    check(!required, name, " must be (address, stride_b, stride_n), got None");
    return {};
  }
  const auto& [address, stride_b, stride_n] = *given;
  check(address != 0 || n_rows == 0, name, " has address 0 for ", n_rows, " rows");
  return {reinterpret_cast<void*>(address), stride_b, stride_n};
}

// An output is contiguous and given by its address alone; 0 is one that is not wanted.
inline void* parse_output(const char* name, std::uintptr_t address, bool required,
                          std::int64_t n_rows) {
  check(address != 0 || n_rows == 0 || !required, name, " has address 0 for ", n_rows, " rows");
  return reinterpret_cast<void*>(address);
}

// body(X{}, M{}) for the dtypes of an operand and of what goes with it, such as a modulation or a
// weight (`name` says which), whose dtype is the same or float32.
template <typename Body>
void dispatch_pair(const std::string& x, const char* name, const std::string& other,
                   const Body& body) {
  dispatch_dtype(x, [&](auto tag) {
    using X = typename decltype(tag)::type;
    if (other == x) return body(X{}, X{});
    check(other == "float32", name, " dtype must be ", x, " or float32, got ", other);
    body(X{}, float{});
  });
}

// Below this many elements a second thread costs more than it saves.
constexpr std::int64_t kSerialElements = 32768;

// Threads for `tasks` tasks over `elements` elements in all, at most the `threads` offered.
inline int team(std::int64_t elements, std::int64_t tasks, int threads) {
  if (elements <= kSerialElements) return 1;
  return static_cast<int>(std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(tasks, 1)));
}

// Floats that begin at a cache line.
class Scratch {
 public:
  explicit Scratch(std::int64_t floats)
      : floats_(static_cast<float*>(::operator new(bytes(floats), std::align_val_t(kLine)))) {
    std::memset(floats_.get(), 0, bytes(floats));
  }
  float* get() const { return floats_.get(); }

  // The least number of floats, not below `floats`, that keeps what follows on a cache line.
  static std::int64_t padded(std::int64_t floats) {
    constexpr std::int64_t kFloats = kLine / sizeof(float);
    return (floats + kFloats - 1) / kFloats * kFloats;
  }

 private:
  static constexpr std::size_t kLine = 64;
  static std::size_t bytes(std::int64_t floats) {
    return static_cast<std::size_t>(floats) * sizeof(float);
  }
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(kLine)); }
  };
  std::unique_ptr<float, Free> floats_;
};

// Runs body(task, scratch) for each task. A thread has `floats` floats of scratch, zero before its
// first task. Which thread runs a task depends on their number: what a task computes must not. The
// body must not throw.
template <typename Body>
void parallel_for(std::int64_t tasks, int threads, std::int64_t floats, const Body& body) {
  const std::int64_t stride = Scratch::padded(floats);
  const Scratch scratch(threads * stride);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t task = 0; task < tasks; ++task) {
    body(task, scratch.get() + omp_get_thread_num() * stride);
  }
#else
  for (std::int64_t task = 0; task < tasks; ++task) body(task, scratch.get());
#endif
}

}  // namespace disca
