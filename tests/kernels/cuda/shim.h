// Runs the CUDA kernels on one CPU thread: each CUDA thread is a fiber, blocks run one after another. A fiber runs the
// same thread of all blocks and launches: to make one takes longer than most threads of a kernel.
//
// Barriers and shuffles switch fibers. A barrier that a running thread of its group never reaches is reported as an
// error rather than waited for: on a GPU it would hang, or be undefined.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct Dim {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace shim {

constexpr int WARP = 32;
constexpr size_t STACK = 32 << 10;

struct Barrier {
  int arrived = 0, members = 0;
  uint64_t generation = 0;
};
struct Registers { // of mma.m16n8k16: four of a (16, 16), two of b (16, 8), two elements in each
  unsigned a[4], b[2];
};
struct Warp {
  Barrier barrier;
  uint64_t slot[WARP];
  Registers registers[WARP];
};
struct Fiber {
  jmp_buf here;
  bool started = false, done = false, progressed = false;
  Dim thread;
};

inline std::vector<Fiber> fibers; // as many as the largest block had threads
inline std::vector<std::unique_ptr<char[]>> stacks;
inline std::vector<Warp> warps;
inline Barrier block;
inline jmp_buf scheduler;
inline Fiber *current = nullptr;
inline Dim block_index, grid, threads;
inline ucontext_t first_switch, main_context;
inline void (*body)(void *) = nullptr;
inline void *arguments = nullptr;

inline void release(Barrier &b) {
  if (b.members && b.arrived == b.members) b.arrived = 0, b.generation++;
}

inline void yield() {
  if (!_setjmp(current->here)) _longjmp(scheduler, 1);
}

inline void wait(Barrier &b) {
  const uint64_t generation = b.generation;
  b.arrived++;
  current->progressed = true;
  release(b);
  while (b.generation == generation) yield();
  current->progressed = true;
}

inline Warp &own_warp() { return warps[(current - fibers.data()) / WARP]; }

template <class T> T exchange(T value, int source) {
  Warp &warp = own_warp();
  const int lane = static_cast<int>((current - fibers.data()) % WARP);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  warp.slot[lane] = bits;
  wait(warp.barrier);
  bits = warp.slot[source];
  wait(warp.barrier);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// c += a · b, element by element where PTX (ISA 8.5, 9.7.14.5.8) says that each lane has them.
template <class T> void multiply(float (&c)[4], Registers own) {
  Warp &warp = own_warp();
  const int lane = static_cast<int>((current - fibers.data()) % WARP);
  const auto element = [](unsigned word, int k) { return to_float(T{static_cast<unsigned short>(word >> k % 2 * 16)}); };
  warp.registers[lane] = own;
  wait(warp.barrier);
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const Registers &of_a = warp.registers[row % 8 * 4 + k % 8 / 2], &of_b = warp.registers[column * 4 + k % 8 / 2];
      c[i] += element(of_a.a[row / 8 + k / 8 * 2], k) * element(of_b.b[k / 8], k);
    }
  }
  wait(warp.barrier);
}

inline void enter() {
  for (;;) {
    body(arguments);
    current->done = current->progressed = true;
    Warp &warp = own_warp();
    block.members--, warp.barrier.members--; // threads that have returned are not waited for
    release(block), release(warp.barrier);
    yield(); // until the next block
  }
}

inline void resume(size_t i) {
  current = &fibers[i];
  if (_setjmp(scheduler)) return;
  if (current->started) _longjmp(current->here, 1);
  current->started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks[i].get();
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

inline bool run_block() {
  const size_t n = threads.x;
  block = Barrier{0, static_cast<int>(n), 0};
  for (size_t w = 0; w < warps.size(); w++)
    warps[w].barrier = Barrier{0, static_cast<int>(std::min<size_t>(WARP, n - w * WARP)), 0};
  for (size_t i = 0; i < n; i++) {
    fibers[i].done = false;
    fibers[i].thread = Dim{static_cast<unsigned>(i), 0, 0};
  }
  // A warp goes on until it waits for another, and every other block begins with the last thread: a barrier between
  // warps that is missing shows in one or the other.
  const bool backwards = (block_index.x + block_index.y + block_index.z) % 2;
  for (volatile bool all = false, any = true; !all;) {
    if (!any) return false;
    all = true, any = false;
    for (volatile size_t w = 0; w < warps.size(); w = w + 1) {
      const size_t first = (backwards ? warps.size() - 1 - w : w) * WARP, lanes = std::min<size_t>(WARP, n - first);
      volatile bool done, progressed;
      do {
        done = true, progressed = false;
        for (volatile size_t k = 0; k < lanes; k = k + 1) {
          const size_t i = first + (backwards ? lanes - 1 - k : k);
          if (fibers[i].done) continue;
          fibers[i].progressed = false;
          resume(i);
          done = done && fibers[i].done;
          progressed = progressed || fibers[i].progressed;
        }
        any = any || progressed;
      } while (progressed && !done);
      all = all && done;
    }
  }
  return true;
}

// 0, or 1 when a block's threads wait for one another.
template <class... A> int launch(void (*kernel)(A...), const unsigned *g, unsigned num_threads, void **args) {
  struct Call {
    void (*kernel)(A...);
    void **args;
  } call{kernel, args};
  body = [](void *p) {
    auto *c = static_cast<Call *>(p);
    [c]<size_t... I>(std::index_sequence<I...>) {
      c->kernel(*static_cast<A *>(c->args[I])...);
    }(std::index_sequence_for<A...>{});
  };
  arguments = &call;
  grid = {g[0], g[1], g[2]}, threads = {num_threads, 1, 1};
  warps.assign((num_threads + WARP - 1) / WARP, Warp{});
  while (fibers.size() < num_threads) fibers.emplace_back(), stacks.emplace_back(new char[STACK]);
  for (unsigned z = 0; z < g[2]; z++)
    for (unsigned y = 0; y < g[1]; y++)
      for (unsigned x = 0; x < g[0]; x++) {
        block_index = {x, y, z};
        if (!run_block()) {
          for (Fiber &fiber : fibers) fiber.started = false; // what stands in a barrier starts afresh
          return 1;
        }
      }
  return 0;
}

inline float half_to_float(unsigned short bits) {
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return static_cast<float>(h);
}
inline unsigned short float_to_half(float v) {
  const _Float16 h = static_cast<_Float16>(v);
  unsigned short bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

} // namespace shim

#define threadIdx (shim::current->thread)
#define blockIdx (shim::block_index)
#define gridDim (shim::grid)
#define blockDim (shim::threads)

inline void __syncthreads() { shim::wait(shim::block); }
inline void __syncwarp() { shim::wait(shim::own_warp().barrier); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = static_cast<int>((shim::current - shim::fibers.data()) % shim::WARP);
  return shim::exchange(value, lane ^ mask);
}
inline float __uint_as_float(unsigned u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline void __threadfence() {}
inline int atomicAdd(int *to, int value) { return std::exchange(*to, *to + value); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline unsigned __float_as_uint(float f) {
  unsigned u;
  std::memcpy(&u, &f, 4);
  return u;
}

#define LORAY_EXPORT(kernel)                                                                                           \
  extern "C" int launch_##kernel(const unsigned *grid, unsigned threads, void **args) {                                \
    return shim::launch(kernel, grid, threads, args);                                                                  \
  }
