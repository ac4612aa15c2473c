// Selection of rows, copied.
//
// Plan. A thread for 16 bytes of one row of the output; blocks [rows, parts of a row]. Bits are copied, so both elements
// share a kernel. No shared memory. Bytes: 4 an element. Limit: latency of two dependent loads (a row's number, then the
// row); there are as many rows as sequences in a step.
#include "common.cuh"

constexpr u32 THREADS = 128;

NIBBLE_KERNEL(THREADS, 12) gather_rows(const u16* input, const u32* rows, u16* output, u32 width) {
    start_after_previous_kernel();
    u32 row = block_index_x();
    u32 first = (block_index_y() * THREADS + thread_index()) * 8;
    if (first >= width) return;
    u64 from = static_cast<u64>(rows[row]) * width + first;
    store_16(output + static_cast<u64>(row) * width + first, load_16(input + from));
}
