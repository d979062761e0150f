// SPDX-License-Identifier: Apache-2.0
// Errors that carry the values that caused them. Python sees ValueError (bad argument) or
// RuntimeError (the device failed).
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace disca {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// check(n > 0, "n must be positive, got ", n)
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument(concat(parts...));
}

}  // namespace disca
