// Kernels that use the machine right and wrong, for the tests of the emulator itself.
#include "common.cuh"

// products[16, 8] = a[16, 16] * b[8, 16]^T, through shared memory. b as x2 and, as a check, as half of x4.
template <class Element>
NIBBLE_DEVICE void product(const u16* a, const u16* b, float* products) {
    start_after_previous_kernel();
    u16* a_tile = reinterpret_cast<u16*>(shared_memory());
    u16* b_tile = a_tile + 256;
    u32 lane = thread_index();
    async_copy_16(a_tile + lane * 8, a + lane * 8);
    if (lane < 16) async_copy_16(b_tile + lane * 8, b + lane * 8);
    async_commit();
    async_wait<0>();
    block_barrier();
    u32 a_fragment[4], b_fragment[2], b_twice[4];
    load_matrix_x4(a_fragment, a_tile + lane % 16 * 16 + lane / 16 * 8);
    load_matrix_x2(b_fragment, b_tile + lane % 8 * 16 + lane / 8 % 2 * 8);
    load_matrix_x4(b_twice, b_tile + lane % 8 * 16 + lane / 8 % 2 * 8);
    float sums[4] = {}, sums_twice[4] = {};
    Element::multiply_matrices(sums, a_fragment, b_fragment[0], b_fragment[1]);
    Element::multiply_matrices(sums_twice, a_fragment, b_twice[2], b_twice[3]);
    for (u32 i = 0; i < 4; i++) {
        u32 index = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
        products[index] = sums[i] == sums_twice[i] ? sums[i] : -1.0f;
    }
}
NIBBLE_KERNEL(32, 1) product_f16(const u16* a, const u16* b, float* products) { product<F16>(a, b, products); }
NIBBLE_KERNEL(32, 1) product_bf16(const u16* a, const u16* b, float* products) { product<BF16>(a, b, products); }

// output[m, i, j] = input[m, j, i] for four matrices of 8 x 8.
NIBBLE_KERNEL(32, 1) transpose(const u16* input, u32* output) {
    start_after_previous_kernel();
    u16* tile = reinterpret_cast<u16*>(shared_memory());
    u32 lane = thread_index(), fragment[4];
    store_16(tile + lane * 8, load_16(input + lane * 8));
    warp_barrier();
    load_matrix_x4_transposed(fragment, tile + lane * 8);
    for (u32 i = 0; i < 4; i++) output[i * 32 + lane] = fragment[i];
}

// For each thread: what lane ^ 5 and lane 3 hold; its own index is what it holds.
NIBBLE_KERNEL(64, 1) shuffles(u32* output) {
    start_after_previous_kernel();
    u32 index = thread_index();
    output[index] = shuffle_xor(index, 5);
    output[64 + index] = shuffle(index, 3);
}

NIBBLE_KERNEL(32, 1) bits(const u32* input, u32* output) {
    start_after_previous_kernel();
    u32 a = input[0], b = input[1], c = input[2];
    output[0] = logic<(0xf0 & 0xcc) ^ 0xaa>(a, b, c);
    output[1] = logic<0xf0 | (0xcc & 0xaa)>(a, b, c);
    output[2] = permute_bytes(a, b, 0x7531);
    output[3] = permute_bytes(a, b, 0x0246);
}

// output[i] = the 16-bit form of input[i].
template <class Element>
NIBBLE_DEVICE void rounded(const float* input, u16* output) {
    start_after_previous_kernel();
    u32 index = block_index_x() * 32 + thread_index();
    output[index] = Element::from_float(input[index]);
}
NIBBLE_KERNEL(32, 1) rounded_f16(const float* input, u16* output) { rounded<F16>(input, output); }
NIBBLE_KERNEL(32, 1) rounded_bf16(const float* input, u16* output) { rounded<BF16>(input, output); }

// Pairs: a + b, a * b and a * b + c.
template <class Element>
NIBBLE_DEVICE void arithmetic(const u32* input, u32* output, u32 count) {
    start_after_previous_kernel();
    u32 index = thread_index();
    u32 a = input[index], b = input[count + index], c = input[2 * count + index];
    output[index] = Element::add(a, b);
    output[count + index] = Element::multiply(a, b);
    output[2 * count + index] = Element::multiply_add(a, b, c);
}
NIBBLE_KERNEL(1024, 1) arithmetic_f16(const u32* input, u32* output, u32 count) { arithmetic<F16>(input, output, count); }
NIBBLE_KERNEL(1024, 1) arithmetic_bf16(const u32* input, u32* output, u32 count) {
    arithmetic<BF16>(input, output, count);
}

// The last block to come adds up what the others left.
NIBBLE_KERNEL(32, 1) last_block(u32* partial, u32* counter, u32* total) {
    start_after_previous_kernel();
    if (thread_index() == 0) {
        partial[block_index_x()] = block_index_x();
        device_fence();
        if (atomic_add(counter, 1) == grid_size_x() - 1) {
            device_fence();
            u32 sum = 0;
            for (u32 block = 0; block < grid_size_x(); block++) sum += partial[block];
            *total = sum;
        }
    }
}

// The same with one step forgotten: 0 the fence before the atomic, 1 the atomic, 2 the fence after it, 3 none.
NIBBLE_KERNEL(32, 1) last_block_without(u32* partial, u32* counter, u32* total, u32 forgotten) {
    start_after_previous_kernel();
    if (thread_index() == 0) {
        partial[block_index_x()] = block_index_x();
        if (forgotten != 0) device_fence();
        if (forgotten == 1 || atomic_add(counter, 1) == grid_size_x() - 1) {
            if (forgotten != 2) device_fence();
            *total = partial[0] + partial[1];
        }
    }
}

// All kinds of arguments, more than registers hold.
NIBBLE_KERNEL(32, 1)
many_arguments(float* output, u32 a, float b, u32 c, u32 d, u32 e, u32 f, u32 g, float h, float i, float j, float k, float l,
               float m, float n, float o, u32 p) {
    start_after_previous_kernel();
    if (thread_index() == 0) {
        float values[16] = {float(a), b, float(c), float(d), float(e), float(f), float(g), h, i, j, k, l, m, n, o, float(p)};
        for (u32 index = 0; index < 16; index++) output[index] = values[index];
    }
}

// Threads read 16 bytes each, `stride` vectors apart.
NIBBLE_KERNEL(32, 1) strided(u32* output, u32 stride) {
    start_after_previous_kernel();
    Words4* words = reinterpret_cast<Words4*>(shared_memory());
    for (u32 i = thread_index(); i < 32 * stride; i += 32) store_16(words + i, Words4{i, i, i, i});
    warp_barrier();
    output[thread_index()] = load_16(words + thread_index() * stride).x;
}

NIBBLE_KERNEL(32, 1) scattered(const u32* input, u32* output, u32 stride) {
    start_after_previous_kernel();
    output[thread_index()] = input[thread_index() * stride];
}

// Each way to go wrong.
NIBBLE_KERNEL(64, 1) faulty(u32* memory, u32 fault) {
    if (fault == 17) shared_memory()[0] = memory[0];                                   // reads before the wait
    if (fault == 18) memory[thread_index()] = 0;                                       // writes before the wait
    start_after_previous_kernel();
    u32* shared = reinterpret_cast<u32*>(shared_memory());
    u32 index = thread_index();
    shared[index] = index;
    switch (fault) {
        case 1: memory[index] = shared[index ^ 1]; break;                              // no barrier
        case 2: warp_barrier(); memory[index] = shared[index ^ 32]; break;             // not a warp's to order
        case 3: block_barrier(); memory[index] = shared[index + 1]; break;             // past the end
        case 4: memory[index + 1] = 0; break;                                          // past the end
        case 5: *reinterpret_cast<u64*>(memory + 1) = 0; break;                        // misaligned
        case 6: if (index < 7) shuffle_xor(index, 1u); else block_barrier(); break;    // diverged
        case 7: if (index < 40) block_barrier(); break;                                // threads have ended
        case 8: block_barrier(); async_copy_16(shared + index / 16 * 4, memory); break;  // two copies to one place
        case 9: if (index < 16) {                                                      // not waited for
                    async_copy_4(shared + index, memory + index);
                    async_commit();
                    memory[index] = shared[index];
                }
                break;
        case 10: memory[index] = memory[index - 64]; break;                            // before the start
        case 11: while (memory[0] != 1) block_barrier(); break;                        // never ends
        case 12: if (index < 32) { block_barrier(); memory[index] = shared[index ^ 1]; shared[index] = 1; } else block_barrier(); break;
        case 13: memory[index] = 1; shared[0] = memory[index ^ 1]; break;              // another thread's word
        case 14: memory[index % 32] = 1; break;                                        // two threads write one word
        case 15: load_16_read_only(memory); memory[index] = 1; break;                  // not only read
        case 16: memory[index] = 1; block_barrier(); memory[index ^ 1] = 2; break;     // two blocks write one word
        default: warp_barrier(); memory[index] = shared[index ^ 1];
    }
}
