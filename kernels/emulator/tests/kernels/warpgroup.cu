// products[64, 32] = a[64, 64] * b[32, 64]^T by four warps of Hopper, right or with one thing forgotten.
#include "warpgroup_emulator.h"

constexpr u32 COLUMNS = 32;
enum Fault : u32 { NONE, NO_PROXY_FENCE, NO_WAIT, OVERWRITTEN, REGISTERS_CHANGED, NO_REGISTER_FENCE, NO_BARRIER };

template <class Element>
NIBBLE_DEVICE void product(const u32* a, const u16* b, float* products, u32 fault) {
    start_after_previous_kernel();
    u8* tile = shared_memory();
    u32 thread = thread_index(), lane = thread % 32, row = thread / 32 * 16 + lane / 4;
    for (u32 i = thread; i < COLUMNS * 8; i += 128) {
        async_copy_16(tile + i / 8 * 128 + (i % 8 ^ i / 8 % 8) * 16, b + i * 8);
    }
    async_commit();
    async_wait<0>();
    if (fault != NO_PROXY_FENCE) shared_proxy_fence();
    if (fault != NO_BARRIER) block_barrier();
    float sums[COLUMNS / 8][4] = {};
    u32 operands[4][4];
    for (u32 sixteen = 0; sixteen < 4; sixteen++) {
        for (u32 i = 0; i < 4; i++) {
            operands[sixteen][i] = a[(row + i % 2 * 8) * 32 + sixteen * 8 + lane % 4 + i / 2 * 4];
        }
        if (fault != NO_REGISTER_FENCE) warpgroup_fence();
        WarpgroupProduct<Element, COLUMNS>::add(sums, operands[sixteen], swizzled_columns(tile) + chunk_step * sixteen * 2);
        warpgroup_commit();
        warpgroup_wait<2>();
    }
    if (fault == REGISTERS_CHANGED) operands[3][0] = 0;
    if (fault == OVERWRITTEN) {
        block_barrier();
        store_16(tile + thread * 16, Words4{0, 0, 0, 0});
    }
    if (fault != NO_WAIT) warpgroup_wait<0>();
    for (u32 column = 0; column < COLUMNS / 8; column++) {
        for (u32 i = 0; i < 4; i++) {
            products[(row + i / 2 * 8) * COLUMNS + column * 8 + lane % 4 * 2 + i % 2] = sums[column][i];
        }
    }
}

NIBBLE_KERNEL(128, 1) warpgroup_f16(const u32* a, const u16* b, float* products, u32 fault) {
    product<F16>(a, b, products, fault);
}
NIBBLE_KERNEL(128, 1) warpgroup_bf16(const u32* a, const u16* b, float* products, u32 fault) {
    product<BF16>(a, b, products, fault);
}
