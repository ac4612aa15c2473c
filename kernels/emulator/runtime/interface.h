// What a host calls: one launch of a kernel that was compiled for the emulator. Plain C, mirrored in src/library.rs.
#pragma once

#include <cstdint>

extern "C" {

// One argument of a kernel. The bits of an address, of a u32, or of a float in the low half.
struct NibbleArgument {
    uint32_t is_float;
    uint32_t padding;
    uint64_t bits;
};

// Device memory that a kernel may access: bytes from `start` up to, not including, `end`.
struct NibbleRange {
    uint64_t start;
    uint64_t end;
    // Whether the launch names it as weights, which may be read before the kernel before has ended.
    uint64_t is_weights;
};

struct NibbleLaunch {
    // The entry point, as dlsym gives it, and its name for messages.
    void* kernel;
    const char* name;
    uint32_t grid[3];
    uint32_t block;
    uint32_t shared_bytes;
    uint32_t argument_count;
    const NibbleArgument* arguments;
    // Sorted by start. With none, accesses to global memory are not checked.
    const NibbleRange* ranges;
    uint64_t range_count;
    // Decides the order of blocks, warps and lanes.
    uint64_t seed;
};

// What happened. Counts are of the whole launch; [i] counts accesses of 2^i bytes by one thread each.
struct NibbleReport {
    uint64_t global_loads[5];
    uint64_t global_stores[5];
    uint64_t async_copies;
    uint64_t async_bytes;
    // Sectors of 32 bytes that the requests of warps move, and as many as would hold the bytes they ask for.
    uint64_t global_sectors;
    uint64_t global_full_sectors;
    uint64_t block_barriers;
    uint64_t shuffles;
    uint64_t matrix_products;
    // Shared memory: cycles of requests of whole warps without bank conflicts, and cycles conflicts add. `matrix_` are
    // load_matrix's, `shared_` all other accesses'.
    uint64_t matrix_load_cycles;
    uint64_t matrix_conflict_cycles;
    uint64_t shared_cycles;
    uint64_t shared_conflict_cycles;
    // Empty, or what the kernel did wrong, where.
    char error[1024];
};

// Runs all blocks. Gives 0, or 1 and `report->error`.
__attribute__((visibility("default"))) int nibble_emulator_launch(const NibbleLaunch* launch, NibbleReport* report);
}
