// What every CUDA kernel of Nibble is written in: element types, and one small wrapper for each machine instruction
// that C++ has no word for. NVRTC compiles this without any header of the toolkit; for the emulator
// (NIBBLE_EMULATOR) every wrapper has a second body, in cuda_emulator.h, so that the same kernel source runs on a CPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef NIBBLE_EMULATOR
#include "cuda_emulator.h"
#else

#define NIBBLE_DEVICE __device__ __forceinline__
// Says that the kernels of a source count on blocks starting in the order of their numbers, x first, as cards do.
#define NIBBLE_BLOCKS_START_IN_ORDER
// An entry point: `threads` is the largest block it is launched with, `blocks` how many must fit a multiprocessor.
#define NIBBLE_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)

NIBBLE_DEVICE u32 thread_index() { return threadIdx.x; }
NIBBLE_DEVICE u32 block_index_x() { return blockIdx.x; }
NIBBLE_DEVICE u32 block_index_y() { return blockIdx.y; }
NIBBLE_DEVICE u32 block_index_z() { return blockIdx.z; }
NIBBLE_DEVICE u32 grid_size_x() { return gridDim.x; }
NIBBLE_DEVICE u32 grid_size_y() { return gridDim.y; }
NIBBLE_DEVICE u32 grid_size_z() { return gridDim.z; }

// The block's dynamic shared memory, as many bytes as the launch says.
NIBBLE_DEVICE u8* shared_memory() {
    extern __shared__ __align__(1024) u8 nibble_shared_memory[];
    return nibble_shared_memory;
}

NIBBLE_DEVICE u32 shared_address(const void* shared) {
    return static_cast<u32>(__cvta_generic_to_shared(shared));
}

// Waits for all threads of the block.
NIBBLE_DEVICE void block_barrier() { __syncthreads(); }

// Waits for all lanes of the warp.
NIBBLE_DEVICE void warp_barrier() { __syncwarp(); }

// Orders this thread's writes to global memory before its later ones, for all of the device.
NIBBLE_DEVICE void device_fence() { __threadfence(); }

// Lets the next kernel of the stream start where there is room for its blocks, although this one has not ended; and
// waits until the kernel before this one has, and all that it wrote is there. Every kernel does both, since every launch
// lets it start early where the card can (sm_90 on). Before the wait it may touch weights only: memory that the launch
// names as such, and that no kernel writes.
NIBBLE_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}
NIBBLE_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Adds to a word of global memory and gives what it was before.
NIBBLE_DEVICE u32 atomic_add(u32* word, u32 value) { return atomicAdd(word, value); }

// Waits until `word` is `value`, which is up to blocks with lower numbers: those start first, so that the wait ends
// whatever else runs on the device. What they wrote before their device_fence is seen after the caller's own.
NIBBLE_DEVICE void wait_for_lower_blocks(const u32* word, u32 value) {
    u32 found;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(found) : "l"(word) : "memory");
    } while (found != value);
}

// The value of lane `lane ^ mask`.
NIBBLE_DEVICE u32 shuffle_xor(u32 value, u32 mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
NIBBLE_DEVICE float shuffle_xor(float value, u32 mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// The value of lane `lane`.
NIBBLE_DEVICE u32 shuffle(u32 value, u32 lane) { return __shfl_sync(0xffffffffu, value, lane); }
NIBBLE_DEVICE float shuffle(float value, u32 lane) { return __shfl_sync(0xffffffffu, value, lane); }

// Starts a copy of 16 bytes from global to shared memory, past the first-level cache; writes zeros where `valid` is
// false, and reads nothing then.
NIBBLE_DEVICE void async_copy_16(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// The same, for memory that is read once from begin to end: has the 256 bytes around it come to the second-level cache.
NIBBLE_DEVICE void async_copy_16_ahead(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// The same for 8 and 4 bytes (through the first-level cache: the machine has no other form).
NIBBLE_DEVICE void async_copy_8(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 8 : 0)
                 : "memory");
}
NIBBLE_DEVICE void async_copy_4(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 4 : 0)
                 : "memory");
}

// Closes the group of copies this thread has started since the last call.
NIBBLE_DEVICE void async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `pending` of this thread's latest groups are still under way. Other threads see what was copied
// after a block_barrier.
template <int pending>
NIBBLE_DEVICE void async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements from shared memory. Lane 8 * i + r gives the address of row r of matrix i,
// 16 bytes; lane 4 * r + c receives elements 2 * c and 2 * c + 1 of row r of matrix i in fragment[i].
NIBBLE_DEVICE void load_matrix_x4(u32 (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Two matrices; lanes 16 to 31 give addresses that are not used.
NIBBLE_DEVICE void load_matrix_x2(u32 (&fragment)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// Four matrices, each transposed: lane 4 * r + c receives elements r of rows 2 * c and 2 * c + 1.
NIBBLE_DEVICE void load_matrix_x4_transposed(u32 (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// A bitwise function of three words; `table` is its truth table, 0xf0 for a, 0xcc for b and 0xaa for c.
template <u32 table>
NIBBLE_DEVICE u32 logic(u32 a, u32 b, u32 c) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, %4;\n" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(table));
    return result;
}

// Picks four of the eight bytes of low and high (numbered 0 to 3 and 4 to 7); digit i of `selector` says which is
// byte i of the result.
NIBBLE_DEVICE u32 permute_bytes(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }

// The upper half of a product.
NIBBLE_DEVICE u64 multiply_high(u64 a, u64 b) { return __umul64hi(a, b); }

// 2^x, log2(x), 1 / sqrt(x) and 1 / x to about 22 bits; 2^x below 2^-126 is zero.
NIBBLE_DEVICE float exp2_fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
    return result;
}
NIBBLE_DEVICE float log2_fast(float x) {
    float result;
    asm("lg2.approx.f32 %0, %1;\n" : "=f"(result) : "f"(x));
    return result;
}
NIBBLE_DEVICE float rsqrt_fast(float x) {
    float result;
    asm("rsqrt.approx.f32 %0, %1;\n" : "=f"(result) : "f"(x));
    return result;
}
NIBBLE_DEVICE float reciprocal_fast(float x) {
    float result;
    asm("rcp.approx.f32 %0, %1;\n" : "=f"(result) : "f"(x));
    return result;
}

// The larger of two numbers.
NIBBLE_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }

// a * b + c with one rounding: where two kernels must give the same bits, the compiler must not choose.
NIBBLE_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Sixteen bytes at once. `load_16_read_only` is for weights and tables: the compiler may move it before a wait.
struct alignas(16) Words4 {
    u32 x, y, z, w;
};
NIBBLE_DEVICE Words4 load_16(const void* from) { return *static_cast<const Words4*>(from); }
NIBBLE_DEVICE void store_16(void* to, Words4 words) { *static_cast<Words4*>(to) = words; }
NIBBLE_DEVICE Words4 load_16_read_only(const void* from) {
    Words4 words;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
        : "l"(from));
    return words;
}

// Sixteen bytes that another block may have written in this launch, before this thread's device_fence.
NIBBLE_DEVICE Words4 load_16_of_other_block(const void* from) {
    Words4 words;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(from)
                 : "memory");
    return words;
}
// Eight bytes.
struct alignas(8) Words2 {
    u32 x, y;
};
NIBBLE_DEVICE Words2 load_8(const void* from) { return *static_cast<const Words2*>(from); }
NIBBLE_DEVICE void store_8(void* to, Words2 words) { *static_cast<Words2*>(to) = words; }

// The bits of a float, and the float of bits.
NIBBLE_DEVICE u32 float_bits(float value) { return __float_as_uint(value); }
NIBBLE_DEVICE float bits_float(u32 bits) { return __uint_as_float(bits); }

// IEEE half precision. A word holds two elements, the first in its low half.
struct F16 {
    NIBBLE_DEVICE static float to_float(u16 element) {
        float value;
        asm("cvt.f32.f16 %0, %1;\n" : "=f"(value) : "h"(element));
        return value;
    }
    NIBBLE_DEVICE static u16 from_float(float value) {
        u16 element;
        asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(element) : "f"(value));
        return element;
    }
    NIBBLE_DEVICE static u32 pack(float low, float high) {
        u32 word;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
        return word;
    }
    // a + b, a * b and a * b + c on both halves.
    NIBBLE_DEVICE static u32 add(u32 a, u32 b) {
        u32 word;
        asm("add.rn.f16x2 %0, %1, %2;\n" : "=r"(word) : "r"(a), "r"(b));
        return word;
    }
    NIBBLE_DEVICE static u32 multiply(u32 a, u32 b) {
        u32 word;
        asm("mul.rn.f16x2 %0, %1, %2;\n" : "=r"(word) : "r"(a), "r"(b));
        return word;
    }
    NIBBLE_DEVICE static u32 multiply_add(u32 a, u32 b, u32 c) {
        u32 word;
        asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(word) : "r"(a), "r"(b), "r"(c));
        return word;
    }
    // sums[16, 8] += a[16, 16] * b[16, 8]; lane 4 * r + c holds
    //   a: words of rows r, r + 8, r, r + 8 at columns 2 * c (first two) and 2 * c + 8 (last two),
    //   b: words of column r at rows 2 * c and 2 * c + 8,
    //   sums: row r, columns 2 * c and 2 * c + 1, then row r + 8.
    NIBBLE_DEVICE static void multiply_matrices(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
            "%2, %3};\n"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

// bfloat16, with the same functions.
struct BF16 {
    NIBBLE_DEVICE static float to_float(u16 element) { return __uint_as_float(static_cast<u32>(element) << 16); }
    NIBBLE_DEVICE static u16 from_float(float value) {
        u16 element;
        asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(element) : "f"(value));
        return element;
    }
    NIBBLE_DEVICE static u32 pack(float low, float high) {
        u32 word;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
        return word;
    }
    // One rounding of the exact result, as fma with one operand 1 or -0: sm_80 has no other form.
    NIBBLE_DEVICE static u32 add(u32 a, u32 b) { return multiply_add(a, 0x3f803f80u, b); }
    NIBBLE_DEVICE static u32 multiply(u32 a, u32 b) { return multiply_add(a, b, 0x80008000u); }
    NIBBLE_DEVICE static u32 multiply_add(u32 a, u32 b, u32 c) {
        u32 word;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(word) : "r"(a), "r"(b), "r"(c));
        return word;
    }
    NIBBLE_DEVICE static void multiply_matrices(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
            "%1, %2, %3};\n"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

#endif

// How a kernel begins that reads nothing before its wait.
NIBBLE_DEVICE void start_after_previous_kernel() {
    let_next_kernel_start();
    wait_for_previous_kernel();
}

// The low and high element of a word, as floats.
template <class Element>
NIBBLE_DEVICE float low_float(u32 word) {
    return Element::to_float(static_cast<u16>(word & 0xffffu));
}
template <class Element>
NIBBLE_DEVICE float high_float(u32 word) {
    return Element::to_float(static_cast<u16>(word >> 16));
}
