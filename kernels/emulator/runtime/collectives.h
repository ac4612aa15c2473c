// What the lanes of a warp do together: shuffles, loads of matrices, products of matrices. Each lane leaves its operands
// in its slot; the last one to arrive computes for all.
#pragma once

#if defined(__F16C__) && defined(__AVX2__)
#include <immintrin.h>
#endif

#include "memory.h"

namespace emulator {

static Slot& own_slot() {
    Machine& m = *machine();
    return m.current_warp().slots[m.current_lane()];
}

static void require_whole_warp(const Warp& warp, const char* what) {
    if (warp.lanes != WARP) fail("%s in a warp of %u lanes; it needs all 32", what, warp.lanes);
}

// Slots: [0] the value, [1] the lane wanted; the result in [2].
static void exchange(Warp& warp) {
    machine()->report->shuffles++;
    for (u32 lane = 0; lane < warp.lanes; lane++) {
        Slot& slot = warp.slots[lane];
        if (slot.words[1] >= warp.lanes) fail("a shuffle reads lane %u of a warp of %u", slot.words[1], warp.lanes);
        slot.words[2] = warp.slots[slot.words[1]].words[0];
    }
}

// Reads the rows that lanes point at, `matrices` of 8: checks them, counts bank conflicts, gives them in `rows`.
static void read_rows(Warp& warp, u32 matrices, u16 (&rows)[WARP][8]) {
    Machine& m = *machine();
    require_whole_warp(warp, "a load of matrices");
    u64 offsets[WARP];
    Accessor who = accessor();
    for (u32 lane = 0; lane < matrices * 8; lane++) {
        const u8* row = warp.slots[lane].row;
        u32 offset = shared_offset(row, 16, "loads a matrix's row of");
        if (offset % 16 != 0) fail("loads a matrix's row at offset %u of shared memory, not a multiple of 16", offset);
        who.thread = warp.first_thread + lane;
        if (const Access* other = m.shadow.read(offset, 16, who)) fail_race("loads a matrix's row of", offset, 16, *other);
        offsets[lane] = offset;
        memcpy(rows[lane], row, 16);
    }
    count_cycles(offsets, matrices * 8, 16, m.report->matrix_load_cycles, m.report->matrix_conflict_cycles);
}

// Results in words 0 to `matrices` - 1 of the slots.
static void give_fragments(Warp& warp, u32 matrices, const u16 (&rows)[WARP][8]) {
    for (u32 lane = 0; lane < WARP; lane++) {
        for (u32 i = 0; i < matrices; i++) memcpy(&warp.slots[lane].words[i], &rows[8 * i + lane / 4][lane % 4 * 2], 4);
    }
}

static void load_matrix_x4(Warp& warp) {
    u16 rows[WARP][8];
    read_rows(warp, 4, rows);
    give_fragments(warp, 4, rows);
}

static void load_matrix_x2(Warp& warp) {
    u16 rows[WARP][8];
    read_rows(warp, 2, rows);
    give_fragments(warp, 2, rows);
}

static void load_matrix_x4_transposed(Warp& warp) {
    u16 rows[WARP][8], transposed[WARP][8];
    read_rows(warp, 4, rows);
    for (u32 i = 0; i < WARP; i++) {
        for (u32 j = 0; j < 8; j++) transposed[i][j] = rows[i / 8 * 8 + j][i % 8];
    }
    give_fragments(warp, 4, transposed);
}

typedef float Floats8 __attribute__((vector_size(32)));

// Twelve words of 16-bit elements to 24 floats.
static void expand_f16(const u32* words, float* floats, u32 count) {
#if defined(__F16C__) && defined(__AVX2__)
    for (u32 i = 0; i < count; i += 4) {
        _mm256_storeu_ps(floats + 2 * i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words + i))));
    }
#else
    for (u32 i = 0; i < 2 * count; i++) {
        u16 element = static_cast<u16>(words[i / 2] >> (i % 2 * 16));
        floats[i] = static_cast<float>(__builtin_bit_cast(_Float16, element));
    }
#endif
}

static void expand_bf16(const u32* words, float* floats, u32 count) {
    for (u32 i = 0; i < count; i++) {
        floats[2 * i] = __builtin_bit_cast(float, words[i] << 16);
        floats[2 * i + 1] = __builtin_bit_cast(float, words[i] & 0xffff0000u);
    }
}

// Slots: words 0 to 3 the sums, 4 to 7 of a, 8 and 9 of b; the sums in 0 to 3. Layouts in common.cuh. Products are exact
// and added in order of k; the machine adds in an order of its own, with other rounding.
template <void (*expand)(const u32*, float*, u32)>
static void multiply_matrices(Warp& warp) {
    require_whole_warp(warp, "a product of matrices");
    machine()->report->matrix_products++;
    alignas(32) float a[16][16], b[16][8], sums[16][8];
    for (u32 lane = 0; lane < WARP; lane++) {
        const Slot& slot = warp.slots[lane];
        u32 row = lane / 4, column = lane % 4 * 2;
        alignas(32) float elements[16];
        expand(slot.words + 4, elements, 8);
        for (u32 part = 0; part < 4; part++) {
            float* to = &a[row + part % 2 * 8][column + part / 2 * 8];
            to[0] = elements[2 * part];
            to[1] = elements[2 * part + 1];
        }
        for (u32 part = 0; part < 4; part++) b[column + part % 2 + part / 2 * 8][row] = elements[8 + part];
        memcpy(&sums[row][column], slot.floats, 8);
        memcpy(&sums[row + 8][column], slot.floats + 2, 8);
    }
    for (u32 row = 0; row < 16; row++) {
        Floats8 sum;
        memcpy(&sum, sums[row], 32);
        for (u32 k = 0; k < 16; k++) {
            Floats8 b_row;
            memcpy(&b_row, b[k], 32);
            sum += a[row][k] * b_row;
        }
        memcpy(sums[row], &sum, 32);
    }
    for (u32 lane = 0; lane < WARP; lane++) {
        u32 row = lane / 4, column = lane % 4 * 2;
        memcpy(warp.slots[lane].floats, &sums[row][column], 8);
        memcpy(warp.slots[lane].floats + 2, &sums[row + 8][column], 8);
    }
}

static void pass_warp_barrier(Warp& warp) { warp.barrier_stamp = machine()->shadow.pass_warp_barrier(); }

static Words result_words() {
    Words words;
    memcpy(&words, own_slot().words, 16);
    return words;
}

static Floats product(Collective multiply, Floats sums, Words a, u64 b) {
    Slot& slot = own_slot();
    memcpy(slot.words, &sums, 16);
    memcpy(slot.words + 4, &a, 16);
    memcpy(slot.words + 8, &b, 8);
    join(multiply);
    memcpy(&sums, slot.words, 16);
    return sums;
}

static u32 exchange_with(u32 value, u32 lane) {
    Slot& slot = own_slot();
    slot.words[0] = value;
    slot.words[1] = lane;
    join(exchange);
    return slot.words[2];
}

static void load_rows(Collective load, const void* row) {
    own_slot().row = static_cast<const u8*>(row);
    join(load);
}

}  // namespace emulator

extern "C" {

uint32_t nibble_shuffle_xor(uint32_t value, uint32_t mask) {
    return emulator::exchange_with(value, emulator::machine()->current_lane() ^ (mask & 31));
}
uint32_t nibble_shuffle(uint32_t value, uint32_t lane) { return emulator::exchange_with(value, lane & 31); }

void nibble_warp_barrier() { emulator::join(emulator::pass_warp_barrier); }

emulator::Words nibble_load_matrix_x4(const void* row) {
    emulator::load_rows(emulator::load_matrix_x4, row);
    return emulator::result_words();
}
uint64_t nibble_load_matrix_x2(const void* row) {
    emulator::load_rows(emulator::load_matrix_x2, row);
    const emulator::Slot& slot = emulator::own_slot();
    return static_cast<uint64_t>(slot.words[1]) << 32 | slot.words[0];
}
emulator::Words nibble_load_matrix_x4_transposed(const void* row) {
    emulator::load_rows(emulator::load_matrix_x4_transposed, row);
    return emulator::result_words();
}

emulator::Floats nibble_multiply_matrices_f16(emulator::Floats sums, emulator::Words a, uint64_t b) {
    return emulator::product(emulator::multiply_matrices<emulator::expand_f16>, sums, a, b);
}
emulator::Floats nibble_multiply_matrices_bf16(emulator::Floats sums, emulator::Words a, uint64_t b) {
    return emulator::product(emulator::multiply_matrices<emulator::expand_bf16>, sums, a, b);
}
}
