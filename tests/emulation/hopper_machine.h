// SPDX-License-Identifier: Apache-2.0
// A machine for csrc/attention/attention_cuda_kernel.h that runs on the host: one block of threads
// in lockstep warps, shared memory, the tensor copy engine, transaction barriers, named barriers
// and warpgroup products, as the PTX ISA describes them. What the device leaves undefined is an
// error here or shows as NaN: shared memory is poisoned when a copy into it starts, accumulators
// while products own them, and operands in shared memory are read as late, or as early, as allowed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace emulation {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// A tensor of two-byte elements as a tensor map describes it: sizes and strides from the innermost
// dimension out, strides in bytes, the innermost contiguous; the box is 64 rows of 64 elements.
struct TensorMap {
  const unsigned char* data = nullptr;
  std::array<std::int64_t, 4> sizes{}, strides{};
};

// How asynchronous work is ordered, within what is allowed.
struct Timing {
  std::uint32_t seed = 0;
  bool lazy_products = true;       // read shared memory when the group is waited for, not at once
  double copy_probability = 0.5;   // that a pending copy is done in a round
  double stall_probability = 0.3;  // that a warp does nothing in a round
};

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class Block {
 public:
  static constexpr int kRegisterFile = 65536;
  static constexpr std::uint32_t kSharedStart = 1040;  // a multiple of 16, as little as is promised

  Block(int threads, std::uint32_t shared_bytes, int start_registers, int index,
        const Timing& timing)
      : index_(index),
        timing_(timing),
        random_(timing.seed),
        shared_(kSharedStart + shared_bytes, 0xff),
        dirty_(shared_.size() / 16 + 1, -1),
        free_registers_(kRegisterFile - threads * start_registers),
        threads_(threads),
        warps_(threads / 32) {
    if (free_registers_ < 0) fail("the block needs more registers than there are");
    for (auto& warp : warps_) warp.registers = start_registers;
  }

  // Runs one thread's code in every thread; throws what a thread throws, or if none can go on.
  void run(const std::function<void()>& body);

  int thread() const { return current_; }
  int index() const { return index_; }

  // All lanes of a warp reach `operation` before any goes on; the last one runs `action`.
  void converge(const std::string& operation, const std::function<void()>& action = {});
  float shuffle_xor(float value, int mask);
  void set_registers(int count, bool more);

  void named_barrier(int barrier, int threads, bool wait);
  void barrier_init(std::uint32_t address, int arrivals);
  void barrier_arrive(std::uint32_t address, std::int64_t bytes);
  void barrier_wait(std::uint32_t address, std::uint32_t parity);
  void tensor_load(std::uint32_t target, const TensorMap& map, std::uint32_t barrier,
                   std::array<int, 4> at);
  void store_zeros(std::uint32_t address);
  void fence_async_proxy();

  // Products: D [64, n] of a warpgroup, n / 2 floats of each thread.
  struct Product {
    std::uint64_t a_descriptor = 0, b_descriptor = 0;
    bool a_in_registers = false, b_rows_along_n = false, add = true;
    int n = 0;
    float (*decode)(std::uint16_t) = nullptr;
  };
  void fence_registers(std::vector<std::pair<const void*, std::size_t>> arrays);
  void multiply(const Product& product, float* d, const std::uint32_t* a);
  void commit();
  void wait_groups(std::size_t pending);

 private:
  struct Thread {
    ucontext_t context{};
    std::unique_ptr<char[]> stack;
    bool done = false;
    std::map<const void*, std::vector<unsigned char>> fenced;  // registers as of the last fence
    std::array<std::uint32_t, 4> a{};
    float* d = nullptr;
  };
  struct WarpProduct {
    Product product;
    std::array<std::array<std::uint32_t, 4>, 32> a;
    std::array<float*, 32> d;
  };
  struct Warp {
    std::string operation;
    int arrived = 0, generation = 0, registers = 0;
    std::array<std::array<float, 32>, 2> lanes{};
    std::deque<std::vector<WarpProduct>> groups{1};           // the last one is still open
    std::map<float*, std::vector<float>> accumulators;        // what products in flight own
    std::vector<std::string> history;                         // for comparison within a warpgroup
  };
  struct Barrier {
    int arrivals = 0, pending = 0;
    std::int64_t bytes = 0;
    std::uint32_t phase = 0;
  };
  struct Named {
    int arrived = 0, threads = 0, generation = 0;
  };
  struct Copy {
    std::uint32_t target, barrier;
    TensorMap map;
    std::array<int, 4> at;
  };

  Thread& self() { return threads_[current_]; }
  Warp& warp() { return warps_[current_ / 32]; }
  int lane() const { return current_ % 32; }
  void block_until(const std::function<bool()>& ready);
  static void enter();
  Barrier& barrier(std::uint32_t address);
  void complete(Barrier& b);
  void perform(const Copy& copy);
  void perform(const WarpProduct& work, int first_row);
  void touch(std::uint32_t address, std::uint32_t size) const;
  float read(std::uint32_t address, const Product& product) const;
  void check_end() const;

  int index_;
  Timing timing_;
  std::mt19937 random_;
  std::vector<unsigned char> shared_;
  std::vector<int> dirty_;  // per 16 bytes: the thread whose ordinary store awaits a fence, or -1
  int free_registers_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::map<std::uint32_t, Barrier> barriers_;
  std::map<int, Named> named_;
  std::vector<Copy> copies_;
  std::function<void()> body_;
  std::exception_ptr error_;
  ucontext_t main_{};
  int current_ = 0;
  bool progress_ = false;
};

inline Block* running = nullptr;

}  // namespace emulation
