// The block that is running: its threads, their states, and who runs next.
//
// Lanes of a warp run in turn, each up to its next collective or barrier; the last lane to arrive at a collective does
// it for all. The order of blocks (of those whose source says that they start in order, not), of warps, and of the lanes
// that start, is drawn from the launch's seed, and now and then a warp is left in favour of another in the middle.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <vector>

#include "conflicts.h"
#include "fiber.h"
#include "global_shadow.h"
#include "interface.h"
#include "shadow.h"
#include "warpgroup_state.h"

namespace emulator {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
typedef u32 Words __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

constexpr u32 WARP = 32;
constexpr u32 MAX_THREADS = 1024;
// Accesses, collectives and barriers after which a block is taken for one that never ends: seconds of emulation.
constexpr u32 MAX_STEPS = 1u << 26;

// A copy from global to shared memory that was started and not yet waited for.
struct AsyncCopy {
    u8* shared;
    const u8* global;
    u32 bytes;
    bool valid;
};

struct Thread {
    void* context = nullptr;
    char* stack = nullptr;
    u32 index = 0;
    // Copies in the order they were started; groups end where `group_ends` says; those before the heads are done.
    std::vector<AsyncCopy> copies;
    std::vector<u32> group_ends;
    u32 copies_done = 0;
    u32 groups_done = 0;
    bool waited_for_previous_kernel = false;
    // The stamp of its latest shared_proxy_fence.
    u32 proxy_fence = 0;
};

// What a lane gives to a collective and gets from it.
struct alignas(16) Slot {
    union {
        u32 words[12];
        float floats[12];
        const u8* row;
    };
};

struct Warp;
using Collective = void (*)(Warp& warp);

struct Warp {
    u32 first_thread = 0;
    u32 lanes = 0;
    // Sets of lanes, a bit each: may run, wait at a collective, wait at a block barrier, have ended.
    u32 runnable = 0;
    u32 at_collective = 0;
    u32 at_barrier = 0;
    u32 ended = 0;
    u32 barrier_stamp = 0;
    Collective collective = nullptr;
    Slot slots[WARP];
    AccessLog log;
    WarpgroupState warpgroup;

    u32 all() const { return lanes == WARP ? ~0u : (1u << lanes) - 1; }
};

struct Machine {
    Machine(const NibbleLaunch* launch, NibbleReport* report)
        : launch(launch), report(report), stacks(launch->block, this), threads(launch->block), warps(warp_count()) {}

    const NibbleLaunch* launch;
    NibbleReport* report;
    u32 block_index[3] = {};
    Thread* current = nullptr;
    u32 waiting = 0;
    u32 ended = 0;
    bool failed = false;
    void* host_context = nullptr;
    u64 random_state = 0;
    u32 steps = 0;

    u8* shared = nullptr;
    u32 shared_bytes = 0;
    Shadow shadow;
    // The allocation that was accessed last, and its writes.
    NibbleRange last_range = {};
    GlobalWrite* last_writes = nullptr;
    GlobalShadow global_shadow;
    u32 block_number = 0;
    // Of the block's latest fence, and of its latest atomic or wait, which let it see what other blocks have released.
    u32 fence_stamp = 0;
    u32 acquire_stamp = 0;

    std::vector<u8> shared_storage;
    Stacks stacks;
    std::vector<Thread> threads;
    std::vector<Warp> warps;

    u32 random(u32 below) {
        random_state = random_state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<u32>((random_state >> 33) * below >> 31);
    }
    u32 warp_count() const { return (launch->block + WARP - 1) / WARP; }
    Warp& current_warp() { return warps[current->index / WARP]; }
    u32 current_lane() const { return current->index % WARP; }
    u32 current_bit() const { return 1u << current_lane(); }
};

// The machine whose fiber calls. Of the stack, not a variable of the host's thread: dozens of kernels are loaded at once,
// and quick thread-local variables of loaded objects are few. Not to be called by the host's own thread.
__attribute__((always_inline)) static inline Machine* machine() { return static_cast<Machine*>(stack_owner()); }


// Ends the launch with an error. Called in a fiber; never comes back.
[[noreturn]] __attribute__((format(printf, 1, 2), noinline, cold)) static void fail(const char* format, ...) {
    Machine& m = *machine();
    char* text = m.report->error;
    size_t size = sizeof m.report->error;
    int length = snprintf(text, size, "%s, block (%u, %u, %u), thread %u: ", m.launch->name, m.block_index[0],
                          m.block_index[1], m.block_index[2], m.current->index);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text + length, size - length, format, arguments);
    va_end(arguments);
    m.failed = true;
    nibble_switch_fiber(&m.current->context, m.host_context);
    __builtin_unreachable();
}

static inline void count_step() {
    if (++machine()->steps > MAX_STEPS) fail("the block does not end: %u accesses, collectives and barriers", MAX_STEPS);
}

static void switch_to(Thread& next) {
    Thread& before = *machine()->current;
    if (&next == &before) return;
    machine()->current = &next;
    nibble_switch_fiber(&before.context, next.context);
}

// A lane of the warp that may run, the next one in cyclic order from `lane`.
static Thread& next_lane(Machine& m, Warp& warp, u32 lane) {
    u32 later = lane + 1 < WARP ? warp.runnable & ~0u << (lane + 1) : 0;
    return m.threads[warp.first_thread + __builtin_ctz(later ? later : warp.runnable)];
}

// Any warp that may run, or none.
static Warp* random_warp(Machine& m) {
    u32 count = m.warp_count(), start = m.random(count);
    for (u32 i = 0; i < count; i++) {
        Warp& warp = m.warps[(start + i) % count];
        if (warp.runnable) return &warp;
    }
    return nullptr;
}

static void run_warp(Warp& warp) { switch_to(next_lane(*machine(), warp, machine()->random(WARP))); }

// Runs another thread, after the current one was taken out of its warp's runnable lanes. Comes back when the current
// one may run again.
static void run_another() {
    Machine& m = *machine();
    Warp& warp = m.current_warp();
    if (warp.runnable) return switch_to(next_lane(m, warp, m.current_lane()));
    if (warp.at_collective) {
        fail("the warp has diverged: lanes %08x are at a warp's collective, %08x at a block barrier, %08x have ended",
             warp.at_collective, warp.at_barrier, warp.ended);
    }
    warp.log.flush(*m.report);
    if (Warp* other = random_warp(m)) return run_warp(*other);
    if (m.waiting) {
        fail("%u threads wait at a block barrier, %u threads of the block have ended", m.waiting, m.ended);
    }
    nibble_switch_fiber(&m.current->context, m.host_context);
}

// Waits until all lanes of the warp have called this with the same collective; the last one carries it out.
static void join(Collective collective) {
    Machine& m = *machine();
    Warp& warp = m.current_warp();
    count_step();
    if (warp.at_collective == 0) {
        warp.collective = collective;
    } else if (warp.collective != collective) {
        fail("the warp has diverged: its lanes are at different collectives");
    }
    warp.at_collective |= m.current_bit();
    if (warp.at_collective != warp.all()) {
        warp.runnable &= ~m.current_bit();
        return run_another();
    }
    warp.at_collective = 0;
    warp.log.flush(*m.report);
    collective(warp);
    warp.runnable = warp.all();
    if (m.random(16) == 0) run_warp(*random_warp(m));
}

}  // namespace emulator
