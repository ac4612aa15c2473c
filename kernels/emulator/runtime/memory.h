// Every access of a kernel to memory: whose memory is it, is it aligned, does it race.
#pragma once

#include "machine.h"

// The first byte of this shared object, and the end of it: a kernel may read its own constants.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[];
extern "C" __attribute__((visibility("hidden"))) const char _end[];

namespace emulator {

static u64 number(const void* pointer) { return reinterpret_cast<u64>(pointer); }

static bool in_shared(const void* pointer) { return number(pointer) - number(machine()->shared) < machine()->shared_bytes; }

static Accessor accessor() {
    Machine& m = *machine();
    return {m.current->index, m.shadow.block_barrier, m.current_warp().barrier_stamp};
}

[[noreturn]] __attribute__((noinline, cold)) static void fail_race(const char* what, u32 offset, u32 size,
                                                                    const Access& other) {
    const char* others = other.kind == Access::PENDING_COPY ? "has started an asynchronous copy to it and not waited"
                         : other.kind == Access::MANY_WARPS ? "(and others) accessed it with no barrier in between"
                                                            : "accessed it with no barrier in between";
    fail("race in shared memory: %s %u bytes at offset %u, thread %u %s", what, size, offset, other.thread, others);
}

// The part of `size` bytes that must lie in shared memory; gives their offset.
static u32 shared_offset(const void* pointer, u32 size, const char* what) {
    Machine& m = *machine();
    u64 offset = number(pointer) - number(m.shared);
    if (offset >= m.shared_bytes || offset + size > m.shared_bytes) {
        fail("%s %u bytes at offset %lld of shared memory, which has %u", what, size, static_cast<long long>(offset),
             m.shared_bytes);
    }
    return static_cast<u32>(offset);
}

enum class Global { LOAD, LOAD_READ_ONLY, LOAD_OF_OTHER_BLOCK, STORE, ATOMIC };

static bool is_store(Global kind) { return kind == Global::STORE || kind == Global::ATOMIC; }

// Makes the allocation that holds the access the last one.
static bool find_range(u64 start, u32 size) {
    Machine& m = *machine();
    if (start >= m.last_range.start && start + size <= m.last_range.end) return true;
    const NibbleRange* ranges = m.launch->ranges;
    // The last range that starts at or before the access.
    u64 low = 0, high = m.launch->range_count;
    while (high - low > 1) {
        u64 middle = (low + high) / 2;
        (ranges[middle].start <= start ? low : high) = middle;
    }
    if (high == 0 || start < ranges[low].start || start + size > ranges[low].end) return false;
    m.last_range = ranges[low];
    m.last_writes = m.global_shadow.records(ranges[low], low);
    return true;
}

[[noreturn]] __attribute__((noinline, cold)) static void fail_outside(const void* pointer, u32 size, const char* what) {
    Machine& m = *machine();
    u64 start = number(pointer);
    if (start - number(m.shared_storage.data()) < m.shared_storage.size()) shared_offset(pointer, size, what);
    const NibbleRange* nearest = nullptr;
    for (u64 i = 0; i < m.launch->range_count && m.launch->ranges[i].start <= start; i++) nearest = &m.launch->ranges[i];
    if (!nearest) fail("%s %u bytes at address %llx, outside of device memory", what, size, static_cast<unsigned long long>(start));
    fail("%s %u bytes at address %llx, outside of device memory: %llu bytes after the start of an allocation of %llu bytes",
         what, size, static_cast<unsigned long long>(start), static_cast<unsigned long long>(start - nearest->start),
         static_cast<unsigned long long>(nearest->end - nearest->start));
}

// What is wrong with an access to bytes of global memory that were written before in this launch, or null.
static const char* global_race(const GlobalWrite& write, Global kind) {
    Machine& m = *machine();
    if (kind == Global::LOAD_READ_ONLY) return "as memory that nobody writes";
    if (write.block == m.block_number + 1) {
        Accessor who = accessor();
        bool ordered = write.thread == who.thread || write.stamp < who.block_barrier ||
                       (write.thread / WARP == who.thread / WARP && write.stamp < who.warp_barrier);
        return ordered ? nullptr : "with no barrier in between";
    }
    if (write.stamp >= m.global_shadow.released(write.block - 1)) return "with no device_fence and atomic since";
    if (m.acquire_stamp == 0) return "and this block has not waited for it";
    if (kind == Global::LOAD && m.fence_stamp < m.acquire_stamp) {
        return "in a way that the first-level cache may serve: it needs a device_fence after the wait, or load_16_of_other_block";
    }
    return nullptr;
}

static void check_global(const void* pointer, u32 size, Global kind, const char* what) {
    Machine& m = *machine();
    u64 start = number(pointer);
    if (m.launch->range_count == 0) return;
    if (!find_range(start, size)) {
        if (!is_store(kind) && start >= number(__ehdr_start) && start + size <= number(_end)) return;
        fail_outside(pointer, size, what);
    }
    if (!m.current->waited_for_previous_kernel && (is_store(kind) || !m.last_range.is_weights)) {
        fail("%s %u bytes at address %llx before wait_for_previous_kernel", what, size, static_cast<unsigned long long>(start));
    }
    // Words that are counted in are the machine's to order.
    if (kind == Global::ATOMIC) return;
    u64 offset = start - m.last_range.start;
    for (u64 i = offset / GlobalShadow::GRANULE; i <= (offset + size - 1) / GlobalShadow::GRANULE; i++) {
        GlobalWrite& write = m.last_writes[i];
        if (write.block != 0) {
            if (const char* race = global_race(write, kind)) {
                u32 block = write.block - 1;
                fail("race in global memory: %s %u bytes at address %llx, which thread %u of block (%u, %u, %u) has written, %s",
                     what, size, static_cast<unsigned long long>(start), write.thread, block % m.launch->grid[0],
                     block / m.launch->grid[0] % m.launch->grid[1], block / m.launch->grid[0] / m.launch->grid[1], race);
            }
        }
        if (kind == Global::STORE) {
            if (write.read_only) {
                fail("race in global memory: %s %u bytes at address %llx, which were read as memory that nobody writes", what,
                     size, static_cast<unsigned long long>(start));
            }
            write.block = m.block_number + 1;
            write.stamp = m.shadow.stamp;
            write.thread = static_cast<u16>(m.current->index);
        } else if (kind == Global::LOAD_READ_ONLY) {
            write.read_only = true;
        }
    }
}

// A load or store of one thread, seen by the compiler's instrumentation or made by a wrapper.
template <bool store>
__attribute__((always_inline)) inline void access(const void* pointer, u32 size, bool aligned, const void* instruction,
                                                  Global kind = store ? Global::STORE : Global::LOAD) {
    Machine* m = machine();
    if (number(pointer) - number(m->current->stack) < STACK_BYTES) return;
    count_step();
    const char* what = store ? "stores" : "loads";
    if (aligned && number(pointer) % size != 0) {
        fail("%s %u bytes at address %llx, which is not a multiple of %u", what, size,
             static_cast<unsigned long long>(number(pointer)), size);
    }
    if (in_shared(pointer)) {
        u32 offset = shared_offset(pointer, size, what);
        const Access* other = store ? m->shadow.write(offset, size, accessor()) : m->shadow.read(offset, size, accessor());
        if (other) fail_race(what, offset, size, *other);
        if (size <= 16) m->current_warp().log.add(instruction, false, m->current_lane(), offset, size);
        return;
    }
    check_global(pointer, size, kind, what);
    if (size > 16) return;
    (store ? m->report->global_stores : m->report->global_loads)[__builtin_ctz(size)]++;
    m->current_warp().log.add(instruction, true, m->current_lane(), number(pointer), size);
}

static Words load_words(const void* from, const void* instruction, Global kind) {
    access<false>(from, 16, true, instruction, kind);
    Words words;
    memcpy(&words, from, 16);
    return words;
}

}  // namespace emulator

extern "C" {

// What -fsanitize=thread calls before each access.
#define NIBBLE_ACCESS(size)                                                                                    \
    void __tsan_read##size(void* at) { emulator::access<false>(at, size, true, __builtin_return_address(0)); } \
    void __tsan_write##size(void* at) { emulator::access<true>(at, size, true, __builtin_return_address(0)); }
#define NIBBLE_UNALIGNED_ACCESS(size)                                      \
    void __tsan_unaligned_read##size(void* at) {                           \
        emulator::access<false>(at, size, false, __builtin_return_address(0)); \
    }                                                                      \
    void __tsan_unaligned_write##size(void* at) {                          \
        emulator::access<true>(at, size, false, __builtin_return_address(0));  \
    }
NIBBLE_ACCESS(1)
NIBBLE_ACCESS(2)
NIBBLE_ACCESS(4)
NIBBLE_ACCESS(8)
NIBBLE_ACCESS(16)
NIBBLE_UNALIGNED_ACCESS(2)
NIBBLE_UNALIGNED_ACCESS(4)
NIBBLE_UNALIGNED_ACCESS(8)
NIBBLE_UNALIGNED_ACCESS(16)
#undef NIBBLE_ACCESS
#undef NIBBLE_UNALIGNED_ACCESS
void __tsan_read_range(void* at, unsigned long size) {
    if (size) emulator::access<false>(at, static_cast<uint32_t>(size), false, __builtin_return_address(0));
}
void __tsan_write_range(void* at, unsigned long size) {
    if (size) emulator::access<true>(at, static_cast<uint32_t>(size), false, __builtin_return_address(0));
}
void __tsan_init() {}

emulator::Words nibble_load_16(const void* from) {
    return emulator::load_words(from, __builtin_return_address(0), emulator::Global::LOAD);
}
emulator::Words nibble_load_16_read_only(const void* from) {
    if (emulator::in_shared(from)) emulator::fail("loads from shared memory as if it were global");
    return emulator::load_words(from, __builtin_return_address(0), emulator::Global::LOAD_READ_ONLY);
}
emulator::Words nibble_load_16_of_other_block(const void* from) {
    if (emulator::in_shared(from)) emulator::fail("loads from shared memory as if it were global");
    return emulator::load_words(from, __builtin_return_address(0), emulator::Global::LOAD_OF_OTHER_BLOCK);
}

void nibble_store_16(void* to, emulator::Words words) {
    emulator::access<true>(to, 16, true, __builtin_return_address(0));
    memcpy(to, &words, 16);
}

uint64_t nibble_load_8(const void* from) {
    emulator::access<false>(from, 8, true, __builtin_return_address(0));
    uint64_t words;
    memcpy(&words, from, 8);
    return words;
}

void nibble_store_8(void* to, uint64_t words) {
    emulator::access<true>(to, 8, true, __builtin_return_address(0));
    memcpy(to, &words, 8);
}

void nibble_device_fence() {
    emulator::count_step();
    emulator::machine()->fence_stamp = ++emulator::machine()->shadow.stamp;
}

uint32_t nibble_atomic_add(uint32_t* word, uint32_t value) {
    emulator::Machine& m = *emulator::machine();
    emulator::count_step();
    if (emulator::number(word) % 4 != 0) emulator::fail("adds to a word at a misaligned address");
    emulator::check_global(word, 4, emulator::Global::ATOMIC, "adds to");
    m.global_shadow.released(m.block_number) = m.fence_stamp;
    m.acquire_stamp = ++m.shadow.stamp;
    uint32_t before = *word;
    *word = before + value;
    return before;
}

void nibble_wait_for_previous_kernel() {
    emulator::count_step();
    emulator::machine()->current->waited_for_previous_kernel = true;
}

void nibble_wait_for_lower_blocks(const uint32_t* word, uint32_t value) {
    emulator::Machine& m = *emulator::machine();
    emulator::count_step();
    if (emulator::number(word) % 4 != 0) emulator::fail("waits for a word at a misaligned address");
    emulator::check_global(word, 4, emulator::Global::ATOMIC, "waits for");
    // Blocks run one after another in order, so lower ones have done all they will do.
    if (*word != value) emulator::fail("waits for lower blocks to make %u of a word that they have left at %u", value, *word);
    m.acquire_stamp = ++m.shadow.stamp;
}
}
