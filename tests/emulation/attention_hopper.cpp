// SPDX-License-Identifier: Apache-2.0
// Runs the Hopper attention kernel on the emulated machine; tests load this as a library.
#include <cstring>
#include <type_traits>

#include "attention/attention_cuda_kernel.h"
#include "hopper_machine.h"

namespace {

using disca::BFloat16;
using disca::Float16;
using emulation::Block;
using emulation::running;
namespace hopper = disca::attention_hopper;

template <typename E>
float decode(std::uint16_t bits) {
  return disca::to_float(E{bits});
}

template <typename... Arrays>
std::vector<std::pair<const void*, std::size_t>> list(const Arrays&... arrays) {
  return {{&arrays, sizeof arrays}...};
}

struct Emulated {
  using TensorMap = emulation::TensorMap;

  static int thread() { return running->thread(); }
  static int warp_group() { return running->thread() / 128; }
  static int block() { return running->index(); }
  static std::uint32_t shared_base() { return Block::kSharedStart; }

  static float infinity() { return std::numeric_limits<float>::infinity(); }
  static float max(float a, float b) { return std::fmax(a, b); }
  static float exp2(float x) { return std::exp2(x); }
  static float log2(float x) { return std::log2(x); }
  static float divide(float a, float b) { return a / b; }
  static float shuffle_xor(float x, int mask) { return running->shuffle_xor(x, mask); }
  template <typename E>
  static std::uint32_t pack(float first, float second) {
    return disca::from_float<E>(first).bits |
           static_cast<std::uint32_t>(disca::from_float<E>(second).bits) << 16;
  }

  template <int kRegisters>
  static void give_registers() {
    running->set_registers(kRegisters, false);
  }
  template <int kRegisters>
  static void take_registers() {
    running->set_registers(kRegisters, true);
  }

  static void block_sync() { running->named_barrier(0, hopper::kThreads, true); }
  static void named_sync(int id, int threads) { running->named_barrier(id, threads, true); }
  static void named_arrive(int id, int threads) { running->named_barrier(id, threads, false); }
  static void barrier_init(std::uint32_t b, int arrivals) { running->barrier_init(b, arrivals); }
  static void fence_barrier_init() {}
  static void arrive_expect(std::uint32_t b, std::uint32_t bytes) {
    running->barrier_arrive(b, bytes);
  }
  static void release(std::uint32_t b, int lane) {
    if (lane == 0) running->barrier_arrive(b, 0);
  }
  static void wait(std::uint32_t b, std::uint32_t parity) { running->barrier_wait(b, parity); }
  static void tensor_load(std::uint32_t target, const TensorMap& map, std::uint32_t b, int column,
                          int row, int head, int i_b) {
    running->tensor_load(target, map, b, {column, row, head, i_b});
  }
  static void store_zeros(std::uint32_t address) { running->store_zeros(address); }
  static void fence_async_proxy() { running->fence_async_proxy(); }

  template <typename... Arrays>
  static void fence(Arrays&... arrays) {
    running->fence_registers(list(arrays...));
  }
  static void commit() { running->commit(); }
  template <int kPending, typename... Arrays>
  static void wait_groups(Arrays&...) {
    running->wait_groups(kPending);
  }
  template <typename E>
  static void multiply_ss(float (&d)[32], std::uint64_t a, std::uint64_t b, bool add) {
    running->multiply({a, b, false, false, add, 64, &decode<E>}, d, nullptr);
  }
  template <typename E>
  static void multiply_rs(float (&d)[64], const std::uint32_t (&a)[4], std::uint64_t b) {
    running->multiply({0, b, true, true, true, 128, &decode<E>}, d, a);
  }
};

}  // namespace

extern "C" {

// A tensor [B, heads, N, 128] with the strides of its first three dimensions in elements.
struct Tensor {
  const void* data;
  std::int64_t sizes[3], strides[3];
};

struct Call {
  Tensor operands[6];  // q, k, v, q_dot, k_dot, v_dot; absent: data is null
  void *o, *o_dot;
  float *lse, *lse_dot;
  const std::int64_t* lengths;
  float scale;
  int half;  // float16 instead of bfloat16
  int seed, lazy_products;
  double copy_probability, stall_probability;
};
}

namespace {

emulation::TensorMap tensor_map(const Tensor& t) {
  return {static_cast<const unsigned char*>(t.data),
          {hopper::kHeadDim, t.sizes[2], t.sizes[1], t.sizes[0]},
          {2, 2 * t.strides[2], 2 * t.strides[1], 2 * t.strides[0]}};
}

template <typename V>
void run_variant(const Call& call) {
  hopper::Operands<Emulated> x;
  x.q = tensor_map(call.operands[0]);
  x.k = tensor_map(call.operands[1]);
  x.v = tensor_map(call.operands[2]);
  x.q_dot = tensor_map(call.operands[3]);
  x.k_dot = tensor_map(call.operands[4]);
  x.v_dot = tensor_map(call.operands[5]);
  const Tensor &q = call.operands[0], &k = call.operands[1];
  hopper::Problem p;
  p.o = call.o;
  p.o_dot = call.o_dot;
  p.lse = call.lse;
  p.lse_dot = call.lse_dot;
  p.lengths = call.lengths;
  p.n_heads = static_cast<int>(q.sizes[1]);
  p.group = static_cast<int>(q.sizes[1] / k.sizes[1]);
  p.n_q = static_cast<int>(q.sizes[2]);
  p.n_k = static_cast<int>(k.sizes[2]);
  p.scale = call.scale;
  emulation::Timing timing{static_cast<std::uint32_t>(call.seed), call.lazy_products != 0,
                           call.copy_probability, call.stall_probability};
  const std::int64_t blocks = (p.n_q + hopper::kBlockM - 1) / hopper::kBlockM * p.n_heads;
  for (int i = 0; i < blocks * q.sizes[0]; ++i) {
    ++timing.seed;
    Block block(hopper::kThreads, hopper::Layout<V>::kBytes, 168, i, timing);
    block.run([&] { hopper::value_and_tangent<Emulated, V>(x, p); });
  }
}

#if defined(DISCA_ONE_VARIANT)
void run_call(const Call& call) { run_variant<hopper::Variant<BFloat16, true, true, true>>(call); }
#else
template <typename E>
void run_dtype(const Call& call) {
  const auto has = [&call](int i) { return call.operands[3 + i].data != nullptr; };
  const auto with = [&call](auto q, auto k, auto v) {
    run_variant<hopper::Variant<E, q(), k(), v()>>(call);
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (has(0) && has(1)) return has(2) ? with(yes, yes, yes) : with(yes, yes, no);
  if (has(0)) return has(2) ? with(yes, no, yes) : with(yes, no, no);
  if (has(1)) return has(2) ? with(no, yes, yes) : with(no, yes, no);
  with(no, no, yes);
}

void run_call(const Call& call) {
  if (call.half != 0) {
    run_dtype<Float16>(call);
  } else {
    run_dtype<BFloat16>(call);
  }
}
#endif

}  // namespace

// Returns 0, or 1 with the reason in `message`.
extern "C" int disca_emulate(const Call* call, char* message, std::size_t size) {
  try {
    run_call(*call);
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), size - 1);
    return 1;
  }
}
