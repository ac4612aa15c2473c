// Token embedding: rows of the table, copied.
//
// Plan. A thread for 16 bytes of one row of the output; blocks [rows, parts of a row]. Bits are copied, so both elements
// share a kernel. No shared memory. Bytes: 4 an element. Limit: latency of two dependent loads (a token's number, then
// its row) up to some hundred rows, then memory bandwidth.
#include "common.cuh"

constexpr u32 THREADS = 128;

NIBBLE_KERNEL(THREADS, 12) embedding(const u32* token_ids, const u16* table, u16* output, u32 hidden) {
    start_after_previous_kernel();
    u32 row = block_index_x();
    u32 first = (block_index_y() * THREADS + thread_index()) * 8;
    if (first >= hidden) return;
    u64 from = static_cast<u64>(token_ids[row]) * hidden + first;
    store_16(output + static_cast<u64>(row) * hidden + first, load_16_read_only(table + from));
}
