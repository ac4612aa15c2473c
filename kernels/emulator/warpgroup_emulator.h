// The second body of every wrapper of warpgroup.cuh, for a device of compute capability 9.0 (NIBBLE_EMULATE_WARPGROUPS).
// What they do is in runtime/warpgroup.h.
#pragma once

#include "common.cuh"

#if defined(NIBBLE_EMULATE_WARPGROUPS)
#define NIBBLE_WARPGROUP 1

extern "C" {
void nibble_shared_proxy_fence();
void nibble_warpgroup_fence();
void nibble_warpgroup_commit();
void nibble_warpgroup_wait(u32 pending);
void nibble_warpgroup_add(float* sums, const u32* a, u64 b, u32 columns, bool bfloat);
}

NIBBLE_DEVICE u64 swizzled_columns(const void* shared) {
    return static_cast<u64>((shared_address(shared) & 0x3ffffu) >> 4) | static_cast<u64>(1) << 16 |
           static_cast<u64>(1024 >> 4) << 32 | static_cast<u64>(1) << 62;
}
constexpr u64 chunk_step = 1;

NIBBLE_DEVICE void shared_proxy_fence() { nibble_shared_proxy_fence(); }
NIBBLE_DEVICE void warpgroup_fence() { nibble_warpgroup_fence(); }
NIBBLE_DEVICE void warpgroup_commit() { nibble_warpgroup_commit(); }
template <int pending>
NIBBLE_DEVICE void warpgroup_wait() {
    nibble_warpgroup_wait(pending);
}

template <class Element>
constexpr bool emulator_is_bfloat = false;
template <>
inline constexpr bool emulator_is_bfloat<BF16> = true;

template <class Element, u32 columns>
struct WarpgroupProduct {
    NIBBLE_DEVICE static void add(float (&sums)[columns / 8][4], const u32 (&a)[4], u64 b) {
        nibble_warpgroup_add(&sums[0][0], a, b, columns, emulator_is_bfloat<Element>);
    }
};

#endif
