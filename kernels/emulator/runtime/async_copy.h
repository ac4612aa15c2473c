// Asynchronous copies: done as late as the waits allow, their destination full of NaN and not to be touched until then.
#pragma once

#include "memory.h"

extern "C" {

void nibble_async_copy(void* shared, const void* global, uint32_t bytes, bool valid) {
    using namespace emulator;
    Machine& m = *machine();
    u32 offset = shared_offset(shared, bytes, "copies");
    if (offset % bytes != 0 || (valid && number(global) % bytes != 0)) {
        fail("copies %u bytes from address %llx to offset %u of shared memory; both must be multiples of %u", bytes,
             static_cast<unsigned long long>(number(global)), offset, bytes);
    }
    if (valid) {
        check_global(global, bytes, Global::LOAD, "copies");
        m.report->async_bytes += bytes;
    }
    if (const Access* other = m.shadow.write(offset, bytes, accessor(), true)) {
        fail_race("copies", offset, bytes, *other);
    }
    AccessLog& log = m.current_warp().log;
    log.add(__builtin_return_address(0), false, m.current_lane(), offset, bytes);
    if (valid) log.add(__builtin_return_address(0), true, m.current_lane(), number(global), bytes);
    memset(shared, 0xff, bytes);
    m.report->async_copies++;
    m.current->copies.push_back({static_cast<u8*>(shared), static_cast<const u8*>(global), bytes, valid});
}

void nibble_async_commit() {
    emulator::Thread& thread = *emulator::machine()->current;
    thread.group_ends.push_back(static_cast<uint32_t>(thread.copies.size()));
}

void nibble_async_wait(uint32_t pending) {
    using namespace emulator;
    Machine& m = *machine();
    Thread& thread = *m.current;
    while (thread.group_ends.size() - thread.groups_done > pending) {
        u32 end = thread.group_ends[thread.groups_done++];
        for (; thread.copies_done < end; thread.copies_done++) {
            const AsyncCopy& copy = thread.copies[thread.copies_done];
            if (copy.valid) {
                memcpy(copy.shared, copy.global, copy.bytes);
            } else {
                memset(copy.shared, 0, copy.bytes);
            }
            m.shadow.finish_copy(static_cast<u32>(copy.shared - m.shared), copy.bytes, accessor());
        }
    }
    if (thread.groups_done == thread.group_ends.size() && thread.copies_done == thread.copies.size()) {
        thread.copies.clear();
        thread.group_ends.clear();
        thread.copies_done = thread.groups_done = 0;
    }
}
}
