// SPDX-License-Identifier: Apache-2.0
#include "hopper_machine.h"

namespace emulation {

// Scheduling: threads are coroutines; a blocked one is resumed in every round to look again.

void Block::enter() {
  Block& block = *running;
  try {
    block.body_();
  } catch (...) {
    if (!block.error_) block.error_ = std::current_exception();
  }
  block.self().done = true;
  block.progress_ = true;
  swapcontext(&block.self().context, &block.main_);
}

void Block::run(const std::function<void()>& body) {
  constexpr std::size_t kStack = 128 * 1024;
  body_ = body;
  running = this;
  for (auto& thread : threads_) {
    thread.stack.reset(new char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, &Block::enter, 0);
  }
  std::vector<int> order(warps_.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::uniform_real_distribution<double> chance;
  int idle_rounds = 0;
  while (true) {
    progress_ = false;
    bool all_done = true, stalled = false;
    std::shuffle(order.begin(), order.end(), random_);
    for (const int i : order) {
      const auto first = threads_.begin() + 32 * i;
      if (std::all_of(first, first + 32, [](const Thread& t) { return t.done; })) continue;
      all_done = false;
      if (chance(random_) < timing_.stall_probability) {
        stalled = true;
        continue;
      }
      for (current_ = 32 * i; current_ < 32 * i + 32; ++current_) {
        if (self().done) continue;
        swapcontext(&main_, &self().context);
        if (error_) std::rethrow_exception(error_);
      }
    }
    for (std::size_t i = 0; i < copies_.size();) {
      if (chance(random_) >= timing_.copy_probability) {
        ++i;
        continue;
      }
      const Copy copy = copies_[i];
      copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(i));
      perform(copy);
      progress_ = true;
    }
    if (all_done) break;
    idle_rounds = progress_ || stalled || !copies_.empty() ? 0 : idle_rounds + 1;
    if (idle_rounds > 1) {
      std::ostringstream where;
      for (const auto& w : warps_) where << ' ' << (w.history.empty() ? "-" : w.history.back());
      fail("deadlock; last products of each warp:", where.str());
    }
  }
  check_end();
  running = nullptr;
}

void Block::block_until(const std::function<bool()>& ready) {
  const int me = current_;
  while (!ready()) {
    swapcontext(&threads_[me].context, &main_);
    current_ = me;
  }
  progress_ = true;
}

void Block::check_end() const {
  if (!copies_.empty()) fail("the block ended before its copies arrived");
  for (const auto& [id, b] : named_) {
    if (b.arrived != 0) fail("named barrier ", id, " was left with ", b.arrived, " arrivals");
  }
  for (std::size_t i = 0; i < warps_.size(); ++i) {
    if (warps_[i].groups.size() > 1 || !warps_[i].groups.back().empty()) {
      fail("warp ", i, " ended with products in flight");
    }
    if (warps_[i].history != warps_[i / 4 * 4].history) {
      fail("the warps of a warpgroup did not start the same products");
    }
  }
}

// Warps

void Block::converge(const std::string& operation, const std::function<void()>& action) {
  Warp& w = warp();
  if (w.arrived == 0) w.operation = operation;
  if (w.operation != operation) {
    fail("a warp diverged: ", w.operation, " and ", operation, " at once");
  }
  const int generation = w.generation;
  if (++w.arrived == 32) {
    if (action) action();
    w.arrived = 0;
    ++w.generation;
    progress_ = true;
    return;
  }
  block_until([&w, generation] { return w.generation != generation; });
}

float Block::shuffle_xor(float value, int mask) {
  Warp& w = warp();
  const int slot = w.generation % 2, partner = lane() ^ mask;
  w.lanes[slot][lane()] = value;
  converge("shuffle " + std::to_string(mask));
  return w.lanes[slot][partner];
}

void Block::set_registers(int count, bool more) {
  if (count % 8 != 0 || count < 24 || count > 256) fail("setmaxnreg ", count, " is not allowed");
  converge("setmaxnreg " + std::to_string(count));
  Warp& w = warp();
  if (lane() == 0) {
    const int change = (count - w.registers) * 32;
    if (more != (change >= 0)) fail("setmaxnreg in the wrong direction");
    block_until([this, change] { return free_registers_ >= change; });
    free_registers_ -= change;
    w.registers = count;
  }
  converge("setmaxnreg done");
}

// Barriers

void Block::named_barrier(int id, int threads, bool wait) {
  if (id < 0 || id > 15 || threads % 32 != 0) fail("no such named barrier: ", id, ", ", threads);
  Named& b = named_[id];
  if (b.arrived == 0) b.threads = threads;
  if (b.threads != threads) fail("named barrier ", id, " is used with different thread counts");
  const int generation = b.generation;
  if (++b.arrived == threads) {
    b.arrived = 0;
    ++b.generation;
    progress_ = true;
  } else if (wait) {
    block_until([&b, generation] { return b.generation != generation; });
  }
}

void Block::barrier_init(std::uint32_t address, int arrivals) {
  touch(address, 8);
  if (address % 8 != 0) fail("a transaction barrier must be aligned to 8 bytes");
  barriers_[address] = {arrivals, arrivals, 0, 0};
}

Block::Barrier& Block::barrier(std::uint32_t address) {
  const auto found = barriers_.find(address);
  if (found == barriers_.end()) fail("no transaction barrier at ", address);
  return found->second;
}

// A phase ends when no arrival is pending and no byte outstanding.
void Block::complete(Barrier& b) {
  if (b.pending < 0) fail("a transaction barrier got more arrivals than it expects");
  if (b.pending > 0 || b.bytes != 0) return;
  b.pending = b.arrivals;
  ++b.phase;
  progress_ = true;
}

void Block::barrier_arrive(std::uint32_t address, std::int64_t bytes) {
  Barrier& b = barrier(address);
  b.bytes += bytes;
  --b.pending;
  complete(b);
}

void Block::barrier_wait(std::uint32_t address, std::uint32_t parity) {
  Barrier& b = barrier(address);
  // The phase of this parity is over if the present one has the other.
  block_until([&b, parity] { return b.phase % 2 != parity; });
}

// Memory

void Block::touch(std::uint32_t address, std::uint32_t size) const {
  if (address < kSharedStart || address + size > shared_.size()) {
    fail("access outside shared memory: ", address, " + ", size);
  }
}

constexpr std::uint32_t kBoxRows = 64, kBoxRowBytes = 128;

void Block::tensor_load(std::uint32_t target, const TensorMap& map, std::uint32_t barrier_address,
                        std::array<int, 4> at) {
  touch(target, kBoxRows * kBoxRowBytes);
  if (target % 128 != 0) fail("a copy's target must be aligned to 128 bytes");
  barrier(barrier_address);
  std::memset(&shared_[target], 0xff, kBoxRows * kBoxRowBytes);
  copies_.push_back({target, barrier_address, map, at});
}

// Element (row, column) of the box comes from the tensor at `at` plus (column, row, 0, 0), or is 0
// outside it. The 128-byte swizzle permutes the 16-byte chunks of a row: of 128 bytes that start at
// a multiple of 128, chunk i lies where chunk i ^ (start / 128 % 8) would.
void Block::perform(const Copy& copy) {
  const auto outside = [&](int dimension, std::int64_t i) {
    return i < 0 || i >= copy.map.sizes[dimension];
  };
  for (std::uint32_t row = 0; row < kBoxRows; ++row) {
    for (std::uint32_t column = 0; column < kBoxRowBytes / 2; ++column) {
      const std::int64_t x = copy.at[0] + std::int64_t{column}, y = copy.at[1] + std::int64_t{row};
      std::uint16_t value = 0;
      if (!outside(0, x) && !outside(1, y) && !outside(2, copy.at[2]) && !outside(3, copy.at[3])) {
        const unsigned char* from = copy.map.data + x * 2 + y * copy.map.strides[1] +
                                    copy.at[2] * copy.map.strides[2] +
                                    copy.at[3] * copy.map.strides[3];
        std::memcpy(&value, from, 2);
      }
      const std::uint32_t start = copy.target + row * kBoxRowBytes;
      const std::uint32_t chunk = (column / 8) ^ (start / 128 % 8);
      std::memcpy(&shared_[start + chunk * 16 + column % 8 * 2], &value, 2);
    }
  }
  Barrier& b = barrier(copy.barrier);
  b.bytes -= kBoxRows * kBoxRowBytes;
  complete(b);
}

void Block::store_zeros(std::uint32_t address) {
  touch(address, 16);
  if (address % 16 != 0) fail("a 16-byte store must be aligned");
  std::memset(&shared_[address], 0, 16);
  dirty_[address / 16] = current_;
}

void Block::fence_async_proxy() {
  std::replace(dirty_.begin(), dirty_.end(), current_, -1);
}

// Products

void Block::fence_registers(std::vector<std::pair<const void*, std::size_t>> arrays) {
  for (const auto& [array, size] : arrays) {
    const auto* bytes = static_cast<const unsigned char*>(array);
    self().fenced[array].assign(bytes, bytes + size);
  }
  converge("wgmma.fence");
}

void Block::multiply(const Product& product, float* d, const std::uint32_t* a) {
  Warp& w = warp();
  const std::size_t d_size = static_cast<std::size_t>(product.n) / 2;
  const auto check_fence = [this](const void* array, std::size_t size) {
    const auto found = self().fenced.find(array);
    if (found == self().fenced.end() || std::memcmp(found->second.data(), array, size) != 0) {
      fail("registers of a product changed without a wgmma.fence after it");
    }
  };
  if (a != nullptr) {
    check_fence(a, 16);
    std::copy(a, a + 4, self().a.begin());
  }
  auto owned = w.accumulators.find(d);
  if (owned == w.accumulators.end()) {
    check_fence(d, 4 * d_size);
    w.accumulators[d].assign(d, d + d_size);
    self().fenced.erase(d);
  } else if (owned->second.size() != d_size) {
    fail("products of different shapes share an accumulator");
  }
  std::fill(d, d + d_size, kNaN);
  self().d = d;
  std::ostringstream name;
  name << "n" << product.n << (product.b_rows_along_n ? "t" : "") << " b" << product.b_descriptor
       << (product.a_in_registers ? " rs" : " ss");
  converge(name.str(), [&] {
    WarpProduct work{product, {}, {}};
    for (int i = 0; i < 32; ++i) {
      work.a[i] = threads_[current_ / 32 * 32 + i].a;
      work.d[i] = threads_[current_ / 32 * 32 + i].d;
    }
    w.history.push_back(name.str());
    if (timing_.lazy_products) {
      w.groups.back().push_back(work);
    } else {
      perform(work, current_ / 32 % 4 * 16);
      // Still in flight for whoever reads the accumulators.
      work.product.n = 0;
      w.groups.back().push_back(work);
    }
  });
}

void Block::commit() {
  converge("wgmma.commit_group", [this] { warp().groups.emplace_back(); });
}

void Block::wait_groups(std::size_t pending) {
  converge("wgmma.wait_group " + std::to_string(pending), [&] {
    Warp& w = warp();
    while (w.groups.size() - 1 > pending) {
      for (const auto& work : w.groups.front()) {
        if (work.product.n > 0) perform(work, current_ / 32 % 4 * 16);
      }
      const auto done = w.groups.front();
      w.groups.pop_front();
      std::set<float*> busy;
      for (const auto& group : w.groups) {
        for (const auto& work : group) busy.insert(work.d.begin(), work.d.end());
      }
      for (const auto& work : done) {
        for (float* d : work.d) {
          const auto owned = w.accumulators.find(d);
          if (owned == w.accumulators.end() || busy.count(d) != 0) continue;
          std::copy(owned->second.begin(), owned->second.end(), d);
          w.accumulators.erase(owned);
        }
      }
    }
  });
}

float Block::read(std::uint32_t address, const Product& product) const {
  touch(address, 2);
  if (dirty_[address / 16] >= 0) fail("a product read what was stored without a proxy fence");
  std::uint16_t bits;
  std::memcpy(&bits, &shared_[address], 2);
  return product.decode(bits);
}

// The matrix descriptor: bits 0-13 address, 16-29 leading and 32-45 stride byte offset, each of 18
// bits without the lowest four; bits 49-51 base offset; bits 62-63 swizzling mode, of which 1 is
// 128 bytes. For that mode and T = 8 two-byte elements in 16 bytes, the canonical layouts are, as
// functions of (m or n, k):
//   rows along K:      ((8, m), (T, 2 k)) : ((8 T, stride), (1, T))
//   rows along M or N: ((T, 8, m), (8, k)) : ((1, T, leading), (8 T, stride))
// and the byte address is then swizzled: bits 4-6 are combined with bits 7-9 by exclusive or.
std::uint32_t operand_address(std::uint64_t descriptor, bool rows_along_mn, int mn, int k) {
  const auto field = [descriptor](int first) {
    return static_cast<std::uint32_t>(descriptor >> first & 0x3fff) << 4;
  };
  if (descriptor >> 62 != 1) fail("only 128-byte swizzling is emulated");
  if ((descriptor >> 49 & 7) != 0) fail("only a base offset of 0 is emulated");
  const std::uint32_t leading = field(16), stride = field(32), T = 8, size = 2;
  const auto i = static_cast<std::uint32_t>(mn), j = static_cast<std::uint32_t>(k);
  std::uint32_t offset;
  if (rows_along_mn) {
    offset = (i % T + i / T % 8 * T) * size + i / (8 * T) * leading + j % 8 * 8 * T * size +
             j / 8 * stride;
  } else {
    offset = i % 8 * 8 * T * size + i / 8 * stride + (j % T + j / T * T) * size;
  }
  const std::uint32_t linear = field(0) + offset;
  return linear ^ (linear >> 7 & 7) << 4;
}

// Rows first_row .. first_row + 15 of D = A B + D are those of one warp. Element i of a lane,
// in D as in A in registers, is row lane / 4 + 8 (i / 2 % 2) and
// column 8 (i / 4) + 2 (lane % 4) + i % 2.
void Block::perform(const WarpProduct& work, int first_row) {
  const Product& p = work.product;
  float a[16][16];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      if (p.a_in_registers) {
        const int from = row % 8 * 4 + k % 8 / 2, element = k / 8 * 4 + row / 8 * 2 + k % 2;
        a[row][k] = p.decode(
            static_cast<std::uint16_t>(work.a[from][element / 2] >> (element % 2 * 16) & 0xffff));
      } else {
        a[row][k] = read(operand_address(p.a_descriptor, false, first_row + row, k), p);
      }
    }
  }
  for (int column = 0; column < p.n; ++column) {
    float b[16];
    for (int k = 0; k < 16; ++k) {
      b[k] = read(operand_address(p.b_descriptor, p.b_rows_along_n, column, k), p);
    }
    for (int row = 0; row < 16; ++row) {
      const int lane = row % 8 * 4 + column % 8 / 2;
      const int element = column / 8 * 4 + row / 8 * 2 + column % 2;
      float& d = warp().accumulators.at(work.d[lane])[element];
      double sum = p.add ? d : 0.0;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k];
      d = static_cast<float>(sum);
    }
  }
}

}  // namespace emulation
