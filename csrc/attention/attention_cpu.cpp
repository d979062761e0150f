// SPDX-License-Identifier: Apache-2.0
// Runs the CPU kernels of attention: picks an instruction set, owns the scratch and the threads.

#include "attention/attention_cpu.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#include "attention/attention.h"
#include "common/checks.h"
#if defined(_OPENMP)
#include <omp.h>
#define DISCA_THREAD omp_get_thread_num()
#else
#define DISCA_THREAD 0
#endif

namespace disca {
namespace attention {
namespace {

// Below this many scores times channels a second thread costs more than it saves.
constexpr double kSerialWork = 1 << 20;
constexpr std::size_t kAlignment = 64;  // a cache line and the widest vector
constexpr std::int64_t kAlignmentFloats = kAlignment / sizeof(float);

struct Candidate {
  const Kernels* kernels;
  bool runs_here;
};

std::vector<Candidate> candidates() {
  std::vector<Candidate> found;
#if defined(DISCA_HAS_X86_LEVELS)
  __builtin_cpu_init();
  const bool v4 = __builtin_cpu_supports("x86-64-v4");
#if defined(DISCA_HAS_AVX512_BF16)
  found.push_back({&avx512_bf16::kernels, v4 && __builtin_cpu_supports("avx512bf16")});
#endif
  found.push_back({&avx512::kernels, v4});
  found.push_back({&avx2::kernels, static_cast<bool>(__builtin_cpu_supports("x86-64-v3"))});
#endif
  found.push_back({&baseline::kernels, true});
  return found;
}

// Those that run here, the widest first.
const std::vector<const Kernels*>& usable() {
  static const std::vector<const Kernels*> kernels = [] {
    std::vector<const Kernels*> found;
    for (const Candidate& candidate : candidates()) {
      if (candidate.runs_here) found.push_back(candidate.kernels);
    }
    return found;
  }();
  return kernels;
}

const Kernels& choose(const std::string& isa) {
  if (isa.empty()) return *usable().front();
  for (const Kernels* kernels : usable()) {
    if (isa == kernels->isa) return *kernels;
  }
  std::string names;
  for (const std::string& name : cpu_isas()) names += (names.empty() ? "" : ", ") + name;
  check(false, "this processor and build have the instruction sets ", names, "; got \"", isa, "\"");
  return *usable().front();
}

struct Free {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
};
using Scratch = std::unique_ptr<float, Free>;

std::int64_t aligned(std::int64_t floats) {
  return (floats + kAlignmentFloats - 1) / kAlignmentFloats * kAlignmentFloats;
}

Scratch allocate(std::int64_t floats) {
  const std::size_t bytes = static_cast<std::size_t>(floats) * sizeof(float);
  return Scratch(static_cast<float*>(::operator new(bytes, std::align_val_t(kAlignment))));
}

// Tasks a thread should have between two barriers, so that few wait for long at the second.
constexpr std::int64_t kTasksPerThread = 32;

// Heads go in waves, at most one a thread, so that scratch does not grow with their number.
void run(const Job& job, int threads) {
  std::int64_t most_tasks = 1;
  for (int i = 0; i < job.n_stages; ++i) most_tasks = std::max(most_tasks, job.stages[i].tasks);
  const std::int64_t tasks = std::max<std::int64_t>(job.tasks, 1);
  const std::int64_t wanted = (threads * kTasksPerThread + tasks - 1) / tasks;
  const std::int64_t wave = std::min<std::int64_t>({wanted, threads, job.n_heads});
  const std::int64_t team = std::min<std::int64_t>(threads, wave * most_tasks);
  const std::int64_t head_floats = aligned(job.head_floats);
  const std::int64_t thread_floats = aligned(job.thread_floats);
  const Scratch scratch = allocate(wave * head_floats + team * thread_floats);
  float* const heads = scratch.get();
  float* const own = heads + wave * head_floats;
#pragma omp parallel num_threads(static_cast<int>(team))
  for (std::int64_t first = 0; first < job.n_heads; first += wave) {
    const std::int64_t n_heads = std::min(wave, job.n_heads - first);
    for (int i = 0; i < job.n_stages; ++i) {
      const Stage& stage = job.stages[i];
#pragma omp for schedule(dynamic)
      for (std::int64_t task = 0; task < n_heads * stage.tasks; ++task) {
        const std::int64_t head = task / stage.tasks;
        stage.run(job.params, first + head, task % stage.tasks, heads + head * head_floats,
                  own + DISCA_THREAD * thread_floats);
      }
    }
  }
}

int team(const Problem& p, int threads) {
  const double work = static_cast<double>(p.n_batch) * static_cast<double>(p.n_heads) *
                      static_cast<double>(p.n_queries) * static_cast<double>(p.n_keys) *
                      static_cast<double>(p.head_dim);
  return work <= kSerialWork ? 1 : std::max(threads, 1);
}

}  // namespace

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : usable()) names.push_back(kernels->isa);
  return names;
}

void forward_cpu(const ForwardParams& p, const std::string& isa, int threads) {
  const Kernels& kernels = choose(isa);
  if (p.problem.n_batch * p.problem.n_heads * p.problem.n_queries == 0) return;
  run(kernels.forward(p), team(p.problem, threads));
}

void backward_cpu(const BackwardParams& p, const std::string& isa, int threads) {
  const Kernels& kernels = choose(isa);
  if (p.problem.n_batch * p.problem.n_heads * (p.problem.n_queries + p.problem.n_keys) == 0) return;
  run(kernels.backward(p), team(p.problem, threads));
}

}  // namespace attention
}  // namespace disca
