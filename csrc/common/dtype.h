// SPDX-License-Identifier: Apache-2.0
// Element types as they lie in memory, their conversion to float, and the switch from a dtype's
// name (as torch spells it) to a C++ type.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "common/checks.h"

// Inlined for certain: a copy compiled for a newer processor must not be what the linker keeps.
#define DISCA_CONVERSION inline __attribute__((always_inline))

namespace disca {

DISCA_CONVERSION float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

DISCA_CONVERSION std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

// The conversions have selects and no branches, so that a loop over a row becomes vector code.

DISCA_CONVERSION float to_float(float value) { return value; }

DISCA_CONVERSION float to_float(BFloat16 value) {
  return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16);
}

DISCA_CONVERSION float to_float(Float16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal.
  const float scaled = bits_to_float(magnitude << 13) * 0x1p112f;
  const std::uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity, NaN
  return bits_to_float(float_to_bits(scaled) | special | sign);
}

template <typename T>
T from_float(float value);

template <>
DISCA_CONVERSION float from_float<float>(float value) {
  return value;
}

// Rounds to nearest, ties to even.
template <>
DISCA_CONVERSION BFloat16 from_float<BFloat16>(float value) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<std::uint16_t>(is_nan ? 0x7fc0u | (bits >> 16) : rounded >> 16)};
}

// Rounds to nearest, ties to even.
template <>
DISCA_CONVERSION Float16 from_float<Float16>(float value) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 lets the float adder do the rounding.
  const std::uint32_t subnormal =
      float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const std::uint32_t limited = magnitude >= 0x477ff000u ? 0x7c00u : finite;  // 65520 and above
  const std::uint32_t result = magnitude > 0x7f800000u ? 0x7e00u : limited;
  return {static_cast<std::uint16_t>(sign | result)};
}

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

inline Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBFloat16;
  check(name == "float16", "dtype must be float32, bfloat16 or float16, got ", name);
  return Dtype::kFloat16;
}

inline const char* name_of(Dtype dtype) {
  if (dtype == Dtype::kFloat32) return "float32";
  return dtype == Dtype::kBFloat16 ? "bfloat16" : "float16";
}

template <typename T>
struct TypeTag {
  using type = T;
};

// dispatch_dtype("bfloat16", [&](auto tag) { using T = typename decltype(tag)::type; ... });
template <typename Body>
void dispatch_dtype(const std::string& name, Body&& body) {
  if (name == "float32") return body(TypeTag<float>{});
  if (name == "bfloat16") return body(TypeTag<BFloat16>{});
  if (name == "float16") return body(TypeTag<Float16>{});
  check(false, "dtype must be float32, bfloat16 or float16, got ", name);
}

}  // namespace disca
