// The second body of every wrapper of common.cuh: runs a kernel source on a CPU.
//
// Each CUDA thread of a block is a fiber (runtime/machine.h). What needs other threads or checked memory is a call into
// the runtime; the rest is plain C++. To run a kernel by hand:
//
//   flags="-std=c++20 -O2 -march=x86-64-v3 -fPIC -fvisibility=hidden -Wno-unknown-pragmas"
//   g++ $flags -c kernels/emulator/runtime/runtime.cpp -o runtime.o
//   seen="-fsanitize=thread --param tsan-instrument-func-entry-exit=0"
//   include="-DNIBBLE_EMULATOR -I kernels/src/cuda -I kernels/emulator"
//   g++ $flags $seen $include -c -x c++ kernels/src/ops/silu_mul/kernel.cu -o kernel.o
//   g++ -shared kernel.o runtime.o -o kernel.so        (without -fsanitize: the runtime has the hooks itself)
//
// then dlopen kernel.so, find `nibble_emulator_launch` (runtime/interface.h) and the kernel, and call the first with the
// second. -fsanitize=thread makes the compiler report every load and store to the runtime: with it, accesses outside of
// device memory, misaligned ones and races in shared memory are found by rule, not by luck. Without it only what the
// wrappers access is checked, and kernels run faster.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator switches fibers by hand: it runs on x86-64 Linux only"
#endif

// Seen by the runtime, which then runs blocks in order.
#define NIBBLE_BLOCKS_START_IN_ORDER \
    extern "C" __attribute__((visibility("default"))) const u32 nibble_blocks_start_in_order = 1;
#define NIBBLE_DEVICE inline __attribute__((always_inline))
#define NIBBLE_KERNEL(threads, blocks) extern "C" __attribute__((visibility("default"))) void

typedef float EmulatorFloats __attribute__((vector_size(16)));
typedef u32 EmulatorWords __attribute__((vector_size(16)));

// What the runtime offers. A fiber's own numbers never change, so calls of them may be merged ("const").
extern "C" {
__attribute__((const)) u32 nibble_thread_index();
__attribute__((const)) u32 nibble_block_index(u32 dimension);
__attribute__((const)) u32 nibble_grid_size(u32 dimension);
__attribute__((const)) u8* nibble_shared_memory();
void nibble_block_barrier();
void nibble_warp_barrier();
u32 nibble_shuffle_xor(u32 value, u32 mask);
u32 nibble_shuffle(u32 value, u32 lane);
void nibble_device_fence();
u32 nibble_atomic_add(u32* word, u32 value);
void nibble_wait_for_previous_kernel();
void nibble_wait_for_lower_blocks(const u32* word, u32 value);
void nibble_async_copy(void* shared, const void* global, u32 bytes, bool valid);
void nibble_async_commit();
void nibble_async_wait(u32 pending);
EmulatorWords nibble_load_matrix_x4(const void* row);
u64 nibble_load_matrix_x2(const void* row);
EmulatorWords nibble_load_matrix_x4_transposed(const void* row);
EmulatorFloats nibble_multiply_matrices_f16(EmulatorFloats sums, EmulatorWords a, u64 b);
EmulatorFloats nibble_multiply_matrices_bf16(EmulatorFloats sums, EmulatorWords a, u64 b);
EmulatorWords nibble_load_16(const void* from);
EmulatorWords nibble_load_16_read_only(const void* from);
EmulatorWords nibble_load_16_of_other_block(const void* from);
void nibble_store_16(void* to, EmulatorWords words);
u64 nibble_load_8(const void* from);
void nibble_store_8(void* to, u64 words);
}

NIBBLE_DEVICE u32 thread_index() { return nibble_thread_index(); }
NIBBLE_DEVICE u32 block_index_x() { return nibble_block_index(0); }
NIBBLE_DEVICE u32 block_index_y() { return nibble_block_index(1); }
NIBBLE_DEVICE u32 block_index_z() { return nibble_block_index(2); }
NIBBLE_DEVICE u32 grid_size_x() { return nibble_grid_size(0); }
NIBBLE_DEVICE u32 grid_size_y() { return nibble_grid_size(1); }
NIBBLE_DEVICE u32 grid_size_z() { return nibble_grid_size(2); }

NIBBLE_DEVICE u8* shared_memory() { return nibble_shared_memory(); }
NIBBLE_DEVICE u32 shared_address(const void* shared) {
    return static_cast<u32>(static_cast<const u8*>(shared) - nibble_shared_memory());
}

NIBBLE_DEVICE void block_barrier() { nibble_block_barrier(); }
NIBBLE_DEVICE void warp_barrier() { nibble_warp_barrier(); }
NIBBLE_DEVICE void let_next_kernel_start() {}
NIBBLE_DEVICE void wait_for_previous_kernel() { nibble_wait_for_previous_kernel(); }
NIBBLE_DEVICE void device_fence() { nibble_device_fence(); }
NIBBLE_DEVICE void wait_for_lower_blocks(const u32* word, u32 value) { nibble_wait_for_lower_blocks(word, value); }
NIBBLE_DEVICE u32 atomic_add(u32* word, u32 value) { return nibble_atomic_add(word, value); }

NIBBLE_DEVICE u32 emulator_bits(float value) { return __builtin_bit_cast(u32, value); }
NIBBLE_DEVICE float emulator_float(u32 bits) { return __builtin_bit_cast(float, bits); }

NIBBLE_DEVICE u32 shuffle_xor(u32 value, u32 mask) { return nibble_shuffle_xor(value, mask); }
NIBBLE_DEVICE float shuffle_xor(float value, u32 mask) {
    return emulator_float(nibble_shuffle_xor(emulator_bits(value), mask));
}
NIBBLE_DEVICE u32 shuffle(u32 value, u32 lane) { return nibble_shuffle(value, lane); }
NIBBLE_DEVICE float shuffle(float value, u32 lane) { return emulator_float(nibble_shuffle(emulator_bits(value), lane)); }

NIBBLE_DEVICE void async_copy_16(void* shared, const void* global, bool valid = true) {
    nibble_async_copy(shared, global, 16, valid);
}
NIBBLE_DEVICE void async_copy_16_ahead(void* shared, const void* global, bool valid = true) {
    nibble_async_copy(shared, global, 16, valid);
}
NIBBLE_DEVICE void async_copy_8(void* shared, const void* global, bool valid = true) {
    nibble_async_copy(shared, global, 8, valid);
}
NIBBLE_DEVICE void async_copy_4(void* shared, const void* global, bool valid = true) {
    nibble_async_copy(shared, global, 4, valid);
}
NIBBLE_DEVICE void async_commit() { nibble_async_commit(); }
template <int pending>
NIBBLE_DEVICE void async_wait() {
    nibble_async_wait(pending);
}

// Fragments go to the runtime by value, so that they stay in registers and their use is not reported as memory's.
NIBBLE_DEVICE void load_matrix_x4(u32 (&fragment)[4], const void* row) {
    EmulatorWords words = nibble_load_matrix_x4(row);
    for (int i = 0; i < 4; i++) fragment[i] = words[i];
}
NIBBLE_DEVICE void load_matrix_x2(u32 (&fragment)[2], const void* row) {
    u64 words = nibble_load_matrix_x2(row);
    fragment[0] = static_cast<u32>(words);
    fragment[1] = static_cast<u32>(words >> 32);
}
NIBBLE_DEVICE void load_matrix_x4_transposed(u32 (&fragment)[4], const void* row) {
    EmulatorWords words = nibble_load_matrix_x4_transposed(row);
    for (int i = 0; i < 4; i++) fragment[i] = words[i];
}

template <u32 table>
NIBBLE_DEVICE u32 logic(u32 a, u32 b, u32 c) {
    u32 result = 0;
    for (u32 i = 0; i < 8; i++) {
        if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    }
    return result;
}

NIBBLE_DEVICE u32 permute_bytes(u32 low, u32 high, u32 selector) {
    u64 bytes = static_cast<u64>(high) << 32 | low;
    u32 result = 0;
    for (u32 i = 0; i < 4; i++) {
        u32 digit = selector >> 4 * i & 15;
        u32 byte = static_cast<u32>(bytes >> 8 * (digit & 7)) & 255;
        // Bit 3 of a digit replicates the byte's sign.
        if (digit & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}

NIBBLE_DEVICE u64 multiply_high(u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); }
NIBBLE_DEVICE float exp2_fast(float x) { return __builtin_exp2f(x); }
NIBBLE_DEVICE float log2_fast(float x) { return __builtin_log2f(x); }
NIBBLE_DEVICE float rsqrt_fast(float x) { return 1.0f / __builtin_sqrtf(x); }
NIBBLE_DEVICE float reciprocal_fast(float x) { return 1.0f / x; }

NIBBLE_DEVICE float maximum(float a, float b) { return __builtin_fmaxf(a, b); }
NIBBLE_DEVICE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

struct alignas(16) Words4 {
    u32 x, y, z, w;
};
NIBBLE_DEVICE Words4 load_16(const void* from) {
    EmulatorWords words = nibble_load_16(from);
    return Words4{words[0], words[1], words[2], words[3]};
}
NIBBLE_DEVICE Words4 load_16_read_only(const void* from) {
    EmulatorWords words = nibble_load_16_read_only(from);
    return Words4{words[0], words[1], words[2], words[3]};
}
NIBBLE_DEVICE Words4 load_16_of_other_block(const void* from) {
    EmulatorWords words = nibble_load_16_of_other_block(from);
    return Words4{words[0], words[1], words[2], words[3]};
}
NIBBLE_DEVICE void store_16(void* to, Words4 words) {
    nibble_store_16(to, EmulatorWords{words.x, words.y, words.z, words.w});
}

struct alignas(8) Words2 {
    u32 x, y;
};
NIBBLE_DEVICE Words2 load_8(const void* from) {
    u64 words = nibble_load_8(from);
    return Words2{static_cast<u32>(words), static_cast<u32>(words >> 32)};
}
NIBBLE_DEVICE void store_8(void* to, Words2 words) { nibble_store_8(to, static_cast<u64>(words.y) << 32 | words.x); }

NIBBLE_DEVICE u32 float_bits(float value) { return emulator_bits(value); }
NIBBLE_DEVICE float bits_float(u32 bits) { return emulator_float(bits); }

// The nearest float of a sum that is exact in double, made odd where it is not exact: rounding it once more, to 16 bits,
// then gives what one rounding would.
NIBBLE_DEVICE float emulator_round_to_odd(double exact) {
    float nearest = static_cast<float>(exact);
    if (static_cast<double>(nearest) == exact || exact != exact) return nearest;
    u32 bits = emulator_bits(nearest);
    if (__builtin_fabs(static_cast<double>(nearest)) > __builtin_fabs(exact)) bits -= 1;
    return emulator_float(bits | 1);
}

// What both elements share, over their conversions.
template <class Element>
struct EmulatorPairs {
    NIBBLE_DEVICE static float low(u32 word) { return Element::to_float(static_cast<u16>(word)); }
    NIBBLE_DEVICE static float high(u32 word) { return Element::to_float(static_cast<u16>(word >> 16)); }
    NIBBLE_DEVICE static u32 pack(float low, float high) {
        return Element::from_float(low) | static_cast<u32>(Element::from_float(high)) << 16;
    }
    // A float holds the sum or product of two elements well enough that the second rounding changes nothing.
    NIBBLE_DEVICE static u32 add(u32 a, u32 b) { return pack(low(a) + low(b), high(a) + high(b)); }
    NIBBLE_DEVICE static u32 multiply(u32 a, u32 b) { return pack(low(a) * low(b), high(a) * high(b)); }
    NIBBLE_DEVICE static u32 multiply_add(u32 a, u32 b, u32 c) {
        double sum_low = static_cast<double>(low(a)) * low(b) + low(c);
        double sum_high = static_cast<double>(high(a)) * high(b) + high(c);
        return pack(emulator_round_to_odd(sum_low), emulator_round_to_odd(sum_high));
    }
};

struct F16 : EmulatorPairs<F16> {
    NIBBLE_DEVICE static float to_float(u16 element) {
        return static_cast<float>(__builtin_bit_cast(_Float16, element));
    }
    NIBBLE_DEVICE static u16 from_float(float value) {
        return __builtin_bit_cast(u16, static_cast<_Float16>(value));
    }
    NIBBLE_DEVICE static void multiply_matrices(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        EmulatorFloats result = nibble_multiply_matrices_f16(EmulatorFloats{sums[0], sums[1], sums[2], sums[3]},
                                                             EmulatorWords{a[0], a[1], a[2], a[3]},
                                                             static_cast<u64>(b1) << 32 | b0);
        for (int i = 0; i < 4; i++) sums[i] = result[i];
    }
};

struct BF16 : EmulatorPairs<BF16> {
    NIBBLE_DEVICE static float to_float(u16 element) { return emulator_float(static_cast<u32>(element) << 16); }
    NIBBLE_DEVICE static u16 from_float(float value) {
        u32 bits = emulator_bits(value);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
        return static_cast<u16>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
    }
    NIBBLE_DEVICE static void multiply_matrices(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        EmulatorFloats result = nibble_multiply_matrices_bf16(EmulatorFloats{sums[0], sums[1], sums[2], sums[3]},
                                                              EmulatorWords{a[0], a[1], a[2], a[3]},
                                                              static_cast<u64>(b1) << 32 | b0);
        for (int i = 0; i < 4; i++) sums[i] = result[i];
    }
};
