/* What select.cu needs of CUDA, on one CPU thread: a grid of thread blocks, shared memory, barriers, shuffles, votes.
 *
 * Every CUDA thread is a coroutine that runs until it has to wait for others: at __syncthreads for its block, at a warp's
 * operation for all 32 lanes. Of the threads that can run, the first in the order asked for does (`emulation_order`);
 * several thread blocks are under way at once. Shared memory starts as garbage. A launch in which threads wait for ones
 * that never come fails.
 *
 * Not shown here: what needs two threads to run at the very same time, and memory that other threads see late:
 * __threadfence does nothing, and a warp's shuffles order its memory as well, which on a GPU only __syncwarp does.
 */
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <queue>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define DMOE_SHARED(type, name) type &name = *static_cast<type *>(emulation::shared(sizeof(type)))

struct dim3 {
    unsigned x;
    dim3(unsigned count = 1) : x(count) {}
};

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};

inline const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaSuccess ? "no error" : "threads wait at a barrier that others never reach";
}

static dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulation {

constexpr unsigned WARP = 32;
constexpr unsigned RESIDENT_BLOCKS = 3; /* at once */
constexpr size_t STACK = 64 * 1024;

enum Order : uint64_t { RISING = 0, FALLING = 1 /* any other number: drawn with that seed */ };

static uint64_t order = RISING;

struct Thread;

/* Where threads wait until `expected` of them have come. */
struct Barrier {
    unsigned expected;
    std::vector<Thread *> waiting;
};

/* What lanes show each other: in turns, for a lane may be one operation ahead of another. */
struct Warp {
    Barrier barrier{WARP, {}};
    uint64_t shown[2][WARP];
};

struct Block {
    unsigned index;
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<Thread> threads;
    std::unique_ptr<uint64_t[]> shared;
    unsigned running;
};

struct Thread {
    Block *block;
    unsigned index;
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    uint64_t turn;       /* lower runs first */
    unsigned operations; /* of its warp, so far */
};

struct Later {
    bool operator()(const Thread *a, const Thread *b) const { return a->turn > b->turn; }
};

static ucontext_t scheduler;
static Thread *current;
static const std::function<void()> *body;
static std::priority_queue<Thread *, std::vector<Thread *>, Later> ready;
static std::mt19937_64 drawn;

/* Drawn turns are new ones each time, and now and then late ones, that others get far ahead. */
inline void make_ready(Thread *thread)
{
    uint64_t place = static_cast<uint64_t>(thread->block->index) << 32 | thread->index;
    uint64_t turn = drawn() >> (drawn() % 64 ? 8 : 0);
    thread->turn = order == RISING ? place : order == FALLING ? ~place : turn;
    ready.push(thread);
}

inline void wait_at(Barrier &barrier)
{
    barrier.waiting.push_back(current);
    if (barrier.waiting.size() == barrier.expected) {
        for (Thread *thread : barrier.waiting)
            make_ready(thread);
        barrier.waiting.clear();
    }
    swapcontext(&current->context, &scheduler);
}

inline void *shared(size_t size)
{
    Block &block = *current->block;
    if (!block.shared) {
        block.shared.reset(new uint64_t[size / 8 + 1]);
        std::memset(block.shared.get(), 0xA5, size);
    }
    return block.shared.get();
}

/* Shows `value` to the other lanes; returns what each of them shows. */
inline const uint64_t *show(uint64_t value)
{
    Warp &warp = current->block->warps[current->index / WARP];
    uint64_t *shown = warp.shown[current->operations++ % 2];
    shown[current->index % WARP] = value;
    wait_at(warp.barrier);
    return shown;
}

inline void enter()
{
    (*body)();
    current->block->running--;
    swapcontext(&current->context, &scheduler);
}

inline void prepare(Thread &thread)
{
    thread.stack.reset(new char[STACK]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    makecontext(&thread.context, enter, 0);
}

inline std::unique_ptr<Block> start(unsigned index, unsigned threads)
{
    auto block = std::make_unique<Block>();
    block->index = index;
    block->barrier.expected = block->running = threads;
    block->warps.resize(threads / WARP);
    block->threads.resize(threads);
    for (unsigned i = 0; i < threads; i++) {
        Thread &thread = block->threads[i];
        thread.block = block.get();
        thread.index = i;
        thread.operations = 0;
        prepare(thread);
        make_ready(&thread);
    }
    return block;
}

inline void resume_first()
{
    Thread *thread = current = ready.top();
    ready.pop();
    threadIdx = dim3(thread->index);
    blockIdx = dim3(thread->block->index);
    swapcontext(&scheduler, &thread->context);
}

inline cudaError_t launch(const cudaLaunchConfig_t &config, const std::function<void()> &kernel)
{
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<unsigned> queue(config.gridDim.x);
    drawn.seed(order);
    for (unsigned i = 0; i < queue.size(); i++)
        queue[i] = order == FALLING ? i : static_cast<unsigned>(queue.size()) - 1 - i; /* taken from the back */
    if (order > FALLING)
        std::shuffle(queue.begin(), queue.end(), drawn);
    body = &kernel;
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    ready = {};
    while (!queue.empty() || !blocks.empty()) {
        for (; !queue.empty() && blocks.size() < RESIDENT_BLOCKS; queue.pop_back())
            blocks.push_back(start(queue.back(), config.blockDim.x));
        if (ready.empty())
            return cudaErrorLaunchFailure;
        resume_first();
        auto done = [](const std::unique_ptr<Block> &block) { return !block->running; };
        blocks.erase(std::remove_if(blocks.begin(), blocks.end(), done), blocks.end());
    }
    return cudaSuccess;
}

} // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...), Arguments... arguments)
{
    return emulation::launch(*config, [=] { kernel(arguments...); });
}

inline void __syncthreads()
{
    emulation::wait_at(emulation::current->block->barrier);
}

inline void __syncwarp()
{
    emulation::show(0);
}

inline uint64_t __shfl_xor_sync(unsigned, uint64_t value, int distance)
{
    return emulation::show(value)[emulation::current->index % emulation::WARP ^ static_cast<unsigned>(distance)];
}

inline int __any_sync(unsigned, int predicate)
{
    const uint64_t *shown = emulation::show(predicate != 0);
    return std::any_of(shown, shown + emulation::WARP, [](uint64_t one) { return one != 0; });
}

inline void __threadfence() {}

inline unsigned atomicAdd(unsigned *address, unsigned value)
{
    unsigned before = *address;
    *address = before + value;
    return before;
}

inline uint32_t __float_as_uint(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __uint_as_float(uint32_t bits)
{
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

/* Which of the threads that can run does: 0 the first, 1 the last, else as drawn for the launch with this seed. */
extern "C" __attribute__((visibility("default"))) void emulation_order(uint64_t asked)
{
    emulation::order = asked;
}
