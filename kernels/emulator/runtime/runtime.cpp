// The emulator's runtime, one translation unit: it is linked into the shared object of each kernel source.
#include "async_copy.h"
#include "collectives.h"
#include "interface.h"
#include "machine.h"
#include "memory.h"
#include "warpgroup.h"

#include <memory>
#include <numeric>

namespace emulator {

constexpr u32 MAX_SHARED_BYTES = 227 << 10;
// Around the block's shared memory, so that a wrong offset lands in memory of our own.
constexpr u32 SHARED_MARGIN = 64 << 10;
constexpr u32 SHARED_ALIGNMENT = 1024;
constexpr u32 MAX_ARGUMENTS = 32;

// Calls the kernel with any mix of arguments: this calling convention numbers integers and floats separately and puts
// what does not fit in registers on the stack in order, so one signature with all registers used serves all kernels.
static void call_kernel(const NibbleLaunch& launch) {
    constexpr u32 INTEGERS = 6, FLOATS = 8;
    u64 integers[INTEGERS] = {};
    float floats[FLOATS] = {};
    u64 rest[MAX_ARGUMENTS] = {};
    u32 integer_count = 0, float_count = 0, rest_count = 0;
    for (u32 i = 0; i < launch.argument_count; i++) {
        const NibbleArgument& argument = launch.arguments[i];
        if (argument.is_float && float_count < FLOATS) {
            u32 bits = static_cast<u32>(argument.bits);
            memcpy(&floats[float_count++], &bits, 4);
        } else if (!argument.is_float && integer_count < INTEGERS) {
            integers[integer_count++] = argument.bits;
        } else {
            rest[rest_count++] = argument.bits;
        }
    }
    using Kernel = void (*)(u64, u64, u64, u64, u64, u64, float, float, float, float, float, float, float, float, u64, u64,
                            u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64,
                            u64, u64, u64, u64, u64);
    static_assert(INTEGERS + 26 == MAX_ARGUMENTS);
    reinterpret_cast<Kernel>(launch.kernel)(
        integers[0], integers[1], integers[2], integers[3], integers[4], integers[5], floats[0], floats[1], floats[2],
        floats[3], floats[4], floats[5], floats[6], floats[7], rest[0], rest[1], rest[2], rest[3], rest[4], rest[5], rest[6],
        rest[7], rest[8], rest[9], rest[10], rest[11], rest[12], rest[13], rest[14], rest[15], rest[16], rest[17],
        rest[18], rest[19], rest[20], rest[21], rest[22], rest[23], rest[24], rest[25]);
}

// Where each fiber begins.
static void run_thread() {
    Machine& m = *machine();
    call_kernel(*m.launch);
    Warp& warp = m.current_warp();
    warp.runnable &= ~m.current_bit();
    warp.ended |= m.current_bit();
    m.ended++;
    run_another();
    __builtin_trap();
}

static void run_block(Machine& m, u32 block) {
    const NibbleLaunch& launch = *m.launch;
    m.block_index[0] = block % launch.grid[0];
    m.block_index[1] = block / launch.grid[0] % launch.grid[1];
    m.block_index[2] = block / launch.grid[0] / launch.grid[1];
    m.block_number = block;
    m.fence_stamp = m.acquire_stamp = 0;
    m.waiting = m.ended = m.steps = 0;
    memset(m.shared, 0xff, m.shared_bytes);
    m.shadow.start_block();
    for (u32 index = 0; index < launch.block; index++) {
        Thread& thread = m.threads[index];
        thread.index = index;
        thread.stack = m.stacks.low(index);
        thread.context = Stacks::start(thread.stack, run_thread);
        thread.waited_for_previous_kernel = false;
        thread.copies.clear();
        thread.group_ends.clear();
        thread.copies_done = thread.groups_done = thread.proxy_fence = 0;
    }
    for (u32 index = 0; index < m.warp_count(); index++) {
        Warp& warp = m.warps[index];
        warp.first_thread = index * WARP;
        warp.lanes = std::min(WARP, launch.block - index * WARP);
        warp.at_collective = warp.at_barrier = warp.ended = 0;
        warp.runnable = warp.all();
        warp.barrier_stamp = 0;
        warp.log.forget();
        warp.warpgroup.clear();
    }
    m.current = &next_lane(m, *random_warp(m), m.random(WARP));
    nibble_switch_fiber(&m.host_context, m.current->context);
}

static const char* refusal(const NibbleLaunch& launch) {
    u64 blocks = static_cast<u64>(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    if (launch.block == 0 || launch.block > MAX_THREADS) return "a block has 1 to 1024 threads";
    if (blocks == 0 || blocks > (1u << 30)) return "a grid has at least one block, and here at most 2^30";
    if (launch.grid[1] > 65535 || launch.grid[2] > 65535) return "a grid has at most 65535 blocks in y and z";
    if (launch.shared_bytes > MAX_SHARED_BYTES) return "a block has at most 227 KB of shared memory";
    if (launch.argument_count > MAX_ARGUMENTS) return "a kernel has at most 32 arguments";
    return nullptr;
}

}  // namespace emulator

extern "C" {

uint32_t nibble_thread_index() { return emulator::machine()->current->index; }
uint32_t nibble_block_index(uint32_t dimension) { return emulator::machine()->block_index[dimension]; }
uint32_t nibble_grid_size(uint32_t dimension) { return emulator::machine()->launch->grid[dimension]; }
uint8_t* nibble_shared_memory() { return emulator::machine()->shared; }

void nibble_block_barrier() {
    using namespace emulator;
    Machine& m = *machine();
    Warp& warp = m.current_warp();
    count_step();
    if (++m.waiting < m.launch->block) {
        warp.runnable &= ~m.current_bit();
        warp.at_barrier |= m.current_bit();
        return run_another();
    }
    m.waiting = 0;
    m.report->block_barriers++;
    m.shadow.pass_block_barrier();
    warp.log.flush(*m.report);
    for (u32 i = 0; i < m.warp_count(); i++) {
        m.warps[i].at_barrier = 0;
        m.warps[i].runnable = m.warps[i].all();
    }
    run_warp(*random_warp(m));
}

// Defined by NIBBLE_BLOCKS_START_IN_ORDER.
extern const uint32_t nibble_blocks_start_in_order __attribute__((weak));

int nibble_emulator_launch(const NibbleLaunch* launch, NibbleReport* report) {
    using namespace emulator;
    *report = {};
    if (const char* reason = refusal(*launch)) {
        snprintf(report->error, sizeof report->error, "%s: %s", launch->name, reason);
        return 1;
    }
    // Made anew for each launch: a process has dozens of kernels loaded, and each thread of a block costs mappings.
    auto own = std::make_unique<Machine>(launch, report);
    Machine& m = *own;
    m.random_state = launch->seed * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u;
    m.shared_bytes = launch->shared_bytes;
    m.shared_storage.resize(launch->shared_bytes + 2 * SHARED_MARGIN + SHARED_ALIGNMENT);
    u64 first = number(m.shared_storage.data()) + SHARED_MARGIN;
    m.shared = reinterpret_cast<u8*>((first + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT);
    m.shadow.resize(launch->shared_bytes);
    std::vector<u32> order(static_cast<size_t>(launch->grid[0]) * launch->grid[1] * launch->grid[2]);
    std::iota(order.begin(), order.end(), 0);
    const bool any_order = &nibble_blocks_start_in_order == nullptr;
    for (u32 i = static_cast<u32>(order.size()); any_order && i > 1; i--) std::swap(order[i - 1], order[m.random(i)]);
    m.global_shadow.start(static_cast<u32>(order.size()));
    for (u32 block : order) {
        run_block(m, block);
        if (m.failed) break;
    }
    return m.failed;
}
}
