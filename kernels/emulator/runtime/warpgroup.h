// Hopper's products of a warpgroup (wgmma), warp by warp: each warp's rows need only its own registers and what all share
// in shared memory.
//
// A product is asynchronous: it is done as late as the waits allow. Until then its sums are NaN, its registers of a may
// not change (they are read at the end), and nobody may overwrite the columns it reads. The tensor cores read shared
// memory past the ordinary way, so who wrote it must have passed a shared_proxy_fence.
#pragma once

#include "collectives.h"

namespace emulator {

constexpr u32 MAX_COLUMNS = 256;

static WarpgroupState& warpgroup_state() { return machine()->current_warp().warpgroup; }

// Slot: what a lane gives to a product.
struct WarpgroupSlot {
    float* sums;
    const u32* a;
    u64 b;
    u32 columns;
    bool bfloat;
};
static_assert(sizeof(WarpgroupSlot) <= sizeof(Slot));

static WarpgroupSlot warpgroup_slot(const Warp& warp, u32 lane) {
    WarpgroupSlot slot;
    memcpy(&slot, &warp.slots[lane], sizeof slot);
    return slot;
}

// Where element k, k + 1, ... of a column start in shared memory: 64 elements of a column lie in 128 bytes, their chunks
// of 16 bytes swizzled by the number of the 128 bytes.
static u32 column_offset(u64 b, u32 column, u32 chunk) {
    u32 linear = static_cast<u32>(b & 0x3fff) * 16 + column * 128 + chunk * 16;
    return linear ^ (linear >> 7 & 7) << 4;
}

// Each 16 bytes of the columns must have been written, ordered and fenced before; if `since` is a stamp, not after it.
static void check_columns(const WarpgroupProduct& product, u32 since) {
    Machine& m = *machine();
    for (u32 column = 0; column < product.columns; column++) {
        for (u32 chunk = 0; chunk < 2; chunk++) {
            u32 offset = shared_offset(m.shared + column_offset(product.b, column, chunk), 16, "multiplies by");
            Access write = m.shadow.latest_write(offset, 16);
            if (write.stamp >= since) {
                fail("race in shared memory: thread %u wrote 16 bytes at offset %u while a product read them", write.thread,
                     offset);
            }
            if (const Access* other = m.shadow.read(offset, 16, accessor())) fail_race("multiplies by", offset, 16, *other);
            if (write.stamp >= m.shadow.block_start && m.threads[write.thread].proxy_fence <= write.stamp) {
                fail("multiplies by 16 bytes at offset %u of shared memory, which thread %u wrote with no shared_proxy_fence after",
                     offset, write.thread);
            }
        }
    }
}

static void start_product(Warp& warp) {
    require_whole_warp(warp, "a product of a warpgroup");
    Machine& m = *machine();
    WarpgroupState& state = warpgroup_state();
    WarpgroupSlot first = warpgroup_slot(warp, 0);
    if (!state.fenced) fail("a product of a warpgroup with no warpgroup_fence since the last commit");
    if (first.b >> 62 != 1 || (first.b >> 32 & 0x3fff) != 64 || (first.b >> 16 & 0x3fff) != 1) {
        fail("a product's columns are described by %llx, not as 128 swizzled bytes each", static_cast<unsigned long long>(first.b));
    }
    if (first.columns % 8 != 0 || first.columns > MAX_COLUMNS) fail("a product of %u columns", first.columns);
    WarpgroupProduct product{{}, {}, first.b, first.columns, first.bfloat, ++m.shadow.stamp};
    for (u32 lane = 0; lane < WARP; lane++) {
        WarpgroupSlot slot = warpgroup_slot(warp, lane);
        if (slot.b != first.b || slot.columns != first.columns) fail("lanes of a warp start different products");
        product.sums[lane] = slot.sums;
        product.a[lane] = slot.a;
    }
    check_columns(product, ~0u);
    m.report->matrix_products += product.columns / 8;
    u32 values = product.columns / 2;
    auto known = [&](const WarpgroupState::Accumulator& entry) { return entry.key == product.sums[0]; };
    auto entry = std::find_if(state.accumulators.begin(), state.accumulators.end(), known);
    if (entry == state.accumulators.end()) {
        state.accumulators.push_back({product.sums[0], std::vector<float>(WARP * values), 0});
        entry = state.accumulators.end() - 1;
        for (u32 lane = 0; lane < WARP; lane++) {
            memcpy(&entry->values[lane * values], product.sums[lane], values * sizeof(float));
            memset(product.sums[lane], 0xff, values * sizeof(float));
        }
    }
    entry->under_way++;
    state.products.push_back(product);
}

static void finish_product(WarpgroupState& state, const WarpgroupProduct& product) {
    check_columns(product, product.stamp);
    u32 values = product.columns / 2;
    auto known = [&](const WarpgroupState::Accumulator& entry) { return entry.key == product.sums[0]; };
    auto entry = std::find_if(state.accumulators.begin(), state.accumulators.end(), known);
    float a[16][16];
    for (u32 lane = 0; lane < WARP; lane++) {
        float elements[8];
        (product.bfloat ? expand_bf16 : expand_f16)(product.a[lane], elements, 4);
        for (u32 i = 0; i < 8; i++) a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] = elements[i];
    }
    for (u32 column = 0; column < product.columns; column++) {
        u32 words[8];
        float b[16];
        for (u32 chunk = 0; chunk < 2; chunk++) {
            memcpy(words + 4 * chunk, machine()->shared + column_offset(product.b, column, chunk), 16);
        }
        (product.bfloat ? expand_bf16 : expand_f16)(words, b, 8);
        for (u32 row = 0; row < 16; row++) {
            u32 lane = row % 8 * 4 + column % 8 / 2;
            float& sum = entry->values[lane * values + column / 8 * 4 + row / 8 * 2 + column % 2];
            for (u32 k = 0; k < 16; k++) sum += a[row][k] * b[k];
        }
    }
    if (--entry->under_way > 0) return;
    for (u32 lane = 0; lane < WARP; lane++) {
        memcpy(product.sums[lane], &entry->values[lane * values], values * sizeof(float));
    }
    state.accumulators.erase(entry);
}

static void commit_products(Warp&) {
    WarpgroupState& state = warpgroup_state();
    state.group_ends.push_back(static_cast<u32>(state.products.size()));
    state.fenced = false;
}

// Slot: how many groups may stay under way.
static void wait_for_products(Warp& warp) {
    WarpgroupState& state = warpgroup_state();
    u32 pending = warp.slots[0].words[0];
    if (state.group_ends.size() <= pending) return;
    u32 groups = static_cast<u32>(state.group_ends.size()) - pending;
    u32 end = state.group_ends[groups - 1];
    for (u32 i = 0; i < end; i++) finish_product(state, state.products[i]);
    state.products.erase(state.products.begin(), state.products.begin() + end);
    state.group_ends.erase(state.group_ends.begin(), state.group_ends.begin() + groups);
    for (u32& group_end : state.group_ends) group_end -= end;
}

static void fence_registers(Warp&) { warpgroup_state().fenced = true; }

}  // namespace emulator

extern "C" {

void nibble_shared_proxy_fence() {
    emulator::count_step();
    emulator::machine()->current->proxy_fence = ++emulator::machine()->shadow.stamp;
}

void nibble_warpgroup_fence() { emulator::join(emulator::fence_registers); }
void nibble_warpgroup_commit() { emulator::join(emulator::commit_products); }

void nibble_warpgroup_wait(uint32_t pending) {
    emulator::own_slot().words[0] = pending;
    emulator::join(emulator::wait_for_products);
}

void nibble_warpgroup_add(float* sums, const uint32_t* a, uint64_t b, uint32_t columns, bool bfloat) {
    emulator::WarpgroupSlot slot{sums, a, b, columns, bfloat};
    memcpy(&emulator::own_slot(), &slot, sizeof slot);
    emulator::join(emulator::start_product);
}
}
