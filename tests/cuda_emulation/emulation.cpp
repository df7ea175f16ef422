#include "cuda_runtime.h"

#include <ucontext.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {

Position position;
char* shared = nullptr;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 << 10;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Position position;
  bool done;
  std::vector<std::vector<Copy>> copies;  // by group, the last one open
};

// A warp's shuffle: two buffers, since a lane may reach the next one while others still read this one.
struct Warp {
  uint32_t values[2][kWarp];
  unsigned arrived = 0, generation = 0;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
ucontext_t scheduler;
unsigned current, threads, arrived, generation;
bool progress;
std::string error, launches;
const std::function<void()>* kernel;
int order = 0;

void yield() {
  swapcontext(&fibers[current].context, &scheduler);
}

void enter() {
  (*kernel)();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

// Waits until `count` fibers have come; the last one moves the generation on.
void meet(unsigned& arrived, unsigned& generation, unsigned count) {
  const unsigned mine = generation;
  progress = true;
  if (++arrived == count) {
    arrived = 0;
    ++generation;
  }
  while (generation == mine) {
    yield();
  }
}

void run_block() {
  arrived = generation = 0;
  warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.copies.assign(1, {});
    fiber.stack.resize(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned left = threads; left > 0;) {
    progress = false;
    for (unsigned i = 0; i < threads && error.empty(); ++i) {
      current = order == 0 ? i : order == 1 ? threads - 1 - i : (i * 1021 + 3) % threads;
      Fiber& fiber = fibers[current];
      if (fiber.done) {
        continue;
      }
      position = fiber.position;
      swapcontext(&scheduler, &fiber.context);
      if (fiber.done) {
        --left;
        progress = true;
      }
    }
    if (error.empty() && !progress) {
      error = "deadlock: not every thread of the block or warp reached a barrier or shuffle";
    }
    if (!error.empty()) {
      return;
    }
  }
}

}  // namespace

void barrier() {
  meet(arrived, generation, threads);
}

uint32_t shuffle_xor(unsigned mask, uint32_t value, int lane_mask) {
  if (mask != 0xffffffffu || threads % kWarp != 0) {
    error = "a shuffle must take whole warps";
    yield();
  }
  Warp& warp = warps[current / kWarp];
  const unsigned lane = current % kWarp, buffer = warp.generation % 2;
  warp.values[buffer][lane] = value;
  meet(warp.arrived, warp.generation, kWarp);
  return warp.values[buffer][lane ^ lane_mask];
}

void assume(bool condition) {
  if (!condition) {
    error = "what the compiler was told does not hold";
    yield();
  }
}

void copy_later(void* to, const void* from, size_t bytes) {
  memset(to, 0xff, bytes);
  fibers[current].copies.back().push_back({to, from, bytes});
}

void end_group_of_copies() {
  fibers[current].copies.emplace_back();
}

void wait_for_copies(size_t groups) {
  auto& copies = fibers[current].copies;
  while (copies.size() - 1 > groups) {
    for (const Copy& copy : copies.front()) {
      memcpy(copy.to, copy.from, copy.bytes);
    }
    copies.erase(copies.begin());
  }
}

void run(dim3 grid, dim3 block, int bytes, const std::function<void()>& body) {
  threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.y > 65535 || block.z != 1 || grid.z != 1) {
    throw std::runtime_error("a launch that CUDA would refuse");
  }
  // Filled anew for each block: a kernel must not read what another block, or none, wrote.
  std::vector<char> given(bytes + 16);
  shared = given.data() + (16 - reinterpret_cast<uintptr_t>(given.data()) % 16);
  fibers.resize(1024);
  kernel = &body;
  error.clear();
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      for (unsigned i = 0; i < threads; ++i) {
        fibers[i].position = {dim3(i % block.x, i / block.x, 0), dim3(x, y, 0), block, grid};
      }
      std::fill(given.begin(), given.end(), '\xff');
      run_block();
      if (!error.empty()) {
        throw std::runtime_error(error);
      }
    }
  }
}

void note(const char* launcher, dim3 grid, dim3 block) {
  const std::string text = launcher;  // "... [with Params = {NormFwd}; Args = {NormFwd}]"
  const size_t first = text.find("Params = ") + 9;
  launches += text.substr(first, text.find("Args = ", first) - 2 - first);
  for (unsigned number : {grid.x, grid.y, block.x, block.y}) {
    launches += " " + std::to_string(number);
  }
  launches += "\n";
}

}  // namespace emulation

// The launches since the last call, a line each: the types of the kernel's arguments, grid.x, grid.y, block.x, block.y.
extern "C" __attribute__((visibility("default"))) const char* emulation_launches() {
  static std::string told;
  told.swap(emulation::launches);
  emulation::launches.clear();
  return told.c_str();
}

// 0: threads in order; 1: in reverse; 2: scattered (1021 is prime, so every thread has its turn).
extern "C" __attribute__((visibility("default"))) void emulation_set_order(int value) {
  emulation::order = value;
}

// What csrc/cuda asks of a torch that has CUDA.
extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) {
  return 0;
}
void torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char**) {}
void torch_c10_cuda_free_error_msg(char*) {}
}
