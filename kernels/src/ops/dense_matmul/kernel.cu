// Activations times a dense weight, both in 16 bits: output[m, n] = sum over k of input[m, k] * weight[n, k] + bias[n].
//
// Tile: OUTPUTS outputs x ROWS rows along all of k, in steps of STEP inputs. The weight is the first operand of mma
// m16n8k16 (16 outputs), activations are the second (8 rows): few rows waste little.
//   wide    128 outputs, steps of 64 inputs, 8, 16, 32, 64 or 128 rows, 8 warps
//   narrow   32 outputs, steps of 128 inputs, 8, 16, 32 or 64 rows, 2 to 8 warps: for weights with so few outputs that
//           wide tiles would leave multiprocessors without one
// Warps: OUTPUT_WARPS x ROW_WARPS; a warp has 16 * OUTPUT_FRAGMENTS outputs and 8 * ROW_FRAGMENTS rows.
//
// Arithmetic: every sum is one chain of mma along k from zero, then the bias, then one rounding. Neither the number of
// rows nor the tile changes it.
//
// Shared memory: a ring of STAGES stages of weights [OUTPUTS][STEP] and activations [ROWS][STEP], in rows of 128 or 256
// bytes, whose 16-byte chunks are swapped by chunk ^ (row % 8), so that neither cp.async nor ldmatrix has conflicts. At
// the end the ring holds the output tile, so that it is written in whole rows.
// Pipeline: cp.async, STAGES - 1 stages under way while one is read; one barrier to a stage. A copy of weights asks for
// 256 bytes to come to the second-level cache: the next step, or another chunk of the row, will need the rest.
//
// Limit, wide: a stage of weights is 16 KB, 1600 cycles of an A100's multiprocessor at 1555 GB/s; 64 rows need 512
// tensor cycles for it, and 8 warps of about 140 instructions 280 issue slots: memory binds up to about 200 rows, where
// one tile is not enough and the weight comes from the second-level cache: row tiles are the fastest index of the grid.
#include "common.cuh"

struct Arguments {
    const u16* input;
    const u16* weight;
    const u16* bias;  // or null
    u16* output;
    u32 rows;
    u32 out_features;
    u32 in_features;
};

template <class Element, u32 OUTPUT_WARPS, u32 ROW_WARPS, u32 OUTPUT_FRAGMENTS, u32 ROW_FRAGMENTS, u32 STEP, u32 STAGES>
struct Tile {
    static constexpr u32 THREADS = 32 * OUTPUT_WARPS * ROW_WARPS;
    static constexpr u32 OUTPUTS = 16 * OUTPUT_FRAGMENTS * OUTPUT_WARPS;
    static constexpr u32 ROWS = 8 * ROW_FRAGMENTS * ROW_WARPS;
    static constexpr u32 CHUNKS = STEP / 8;
    static constexpr u32 ROW_BYTES = 2 * STEP;
    static constexpr u32 WEIGHT_BYTES = OUTPUTS * ROW_BYTES;
    static constexpr u32 STAGE_BYTES = WEIGHT_BYTES + ROWS * ROW_BYTES;
    static constexpr u32 OUTPUT_ROW_BYTES = 2 * OUTPUTS + 16;
    static_assert(ROWS * OUTPUT_ROW_BYTES <= STAGES * STAGE_BYTES, "the ring holds the output");

    Arguments arguments;
    u8* shared;
    u32 thread, lane, first_output, first_row, warp_output, warp_row;
    float sums[OUTPUT_FRAGMENTS][ROW_FRAGMENTS][4];

    NIBBLE_DEVICE static u32 offset(u32 row, u32 chunk) { return row * ROW_BYTES + 16 * (chunk ^ row % 8); }

    // Starts the copies of step `step`; what lies beyond a matrix is zero.
    NIBBLE_DEVICE void load(u32 step) {
        u8* stage = shared + step % STAGES * STAGE_BYTES;
        u32 k = step * STEP + thread % CHUNKS * 8;
        if (step * STEP < arguments.in_features) {
            copy_rows<OUTPUTS, true>(stage, arguments.weight, first_output, arguments.out_features, k);
            copy_rows<ROWS, false>(stage + WEIGHT_BYTES, arguments.input, first_row, arguments.rows, k);
        }
        async_commit();
    }
    template <u32 COUNT, bool STREAMED>
    NIBBLE_DEVICE void copy_rows(u8* to, const u16* from, u32 first, u32 end, u32 k) {
        constexpr u32 AT_ONCE = THREADS / CHUNKS;
#pragma unroll
        for (u32 start = 0; start < COUNT; start += AT_ONCE) {
            u32 row = start + thread / CHUNKS;
            if (COUNT % AT_ONCE == 0 || row < COUNT) {
                bool valid = first + row < end && k < arguments.in_features;
                u64 source = static_cast<u64>(first + row) * arguments.in_features + k;
                u8* target = to + offset(row, thread % CHUNKS);
                if constexpr (STREAMED) {
                    async_copy_16_ahead(target, from + (valid ? source : 0), valid);
                } else {
                    async_copy_16(target, from + (valid ? source : 0), valid);
                }
            }
        }
    }

    NIBBLE_DEVICE void multiply(u32 step) {
        const u8* weights = shared + step % STAGES * STAGE_BYTES;
        const u8* rows = weights + WEIGHT_BYTES;
#pragma unroll
        for (u32 part = 0; part < STEP / 16; part += 2) {
            u32 row[2][ROW_FRAGMENTS][2];
            load_rows(row, rows, part);
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
#pragma unroll
                for (u32 i = 0; i < OUTPUT_FRAGMENTS; i++) {
                    u32 weight[4];
                    load_matrix_x4(weight, weights + offset(warp_output + 16 * i + lane % 16,
                                                            2 * (part + half) + lane / 16));
#pragma unroll
                    for (u32 j = 0; j < ROW_FRAGMENTS; j++)
                        Element::multiply_matrices(sums[i][j], weight, row[half][j][0], row[half][j][1]);
                }
            }
        }
    }
    // Fragments of 32 inputs from part `part`: four 8 x 8 matrices at a time, of one fragment or of two.
    NIBBLE_DEVICE void load_rows(u32 (&row)[2][ROW_FRAGMENTS][2], const u8* rows, u32 part) {
        u32 fragment[4];
        if constexpr (ROW_FRAGMENTS == 1) {
            load_matrix_x4(fragment, rows + offset(warp_row + lane % 8, 2 * part + lane / 8));
            row[0][0][0] = fragment[0];
            row[0][0][1] = fragment[1];
            row[1][0][0] = fragment[2];
            row[1][0][1] = fragment[3];
        } else {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
#pragma unroll
                for (u32 j = 0; j < ROW_FRAGMENTS; j += 2) {
                    load_matrix_x4(fragment, rows + offset(warp_row + 8 * j + lane / 16 * 8 + lane % 8,
                                                           2 * (part + half) + lane / 8 % 2));
                    row[half][j][0] = fragment[0];
                    row[half][j][1] = fragment[1];
                    row[half][j + 1][0] = fragment[2];
                    row[half][j + 1][1] = fragment[3];
                }
            }
        }
    }

    NIBBLE_DEVICE void store() {
        block_barrier();  // nobody reads the ring any more
#pragma unroll
        for (u32 i = 0; i < OUTPUT_FRAGMENTS; i++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                u32 n = warp_output + 16 * i + lane / 4 + 8 * half;
                bool biased = arguments.bias && first_output + n < arguments.out_features;
                float bias = biased ? Element::to_float(arguments.bias[first_output + n]) : 0.0f;
#pragma unroll
                for (u32 j = 0; j < ROW_FRAGMENTS; j++) {
#pragma unroll
                    for (u32 e = 0; e < 2; e++) {
                        u32 row = warp_row + 8 * j + lane % 4 * 2 + e;
                        *reinterpret_cast<u16*>(shared + row * OUTPUT_ROW_BYTES + 2 * n) =
                            Element::from_float(sums[i][j][2 * half + e] + bias);
                    }
                }
            }
        }
        block_barrier();
        u32 rows = arguments.rows - first_row < ROWS ? arguments.rows - first_row : ROWS;
        u32 left = arguments.out_features - first_output;
        u32 outputs = left < OUTPUTS ? left : OUTPUTS;
        u16* output = arguments.output + static_cast<u64>(first_row) * arguments.out_features + first_output;
        if (arguments.out_features % 8 == 0) {
            constexpr u32 PARTS = OUTPUTS / 8;
            u32 part = thread % PARTS;
            for (u32 row = thread / PARTS; row < rows; row += THREADS / PARTS) {
                if (8 * part < outputs)
                    store_16(output + static_cast<u64>(row) * arguments.out_features + 8 * part,
                             load_16(shared + row * OUTPUT_ROW_BYTES + 16 * part));
            }
        } else {
            u32 n = thread % OUTPUTS;
            for (u32 row = thread / OUTPUTS; row < rows; row += THREADS / OUTPUTS) {
                if (n < outputs)
                    output[static_cast<u64>(row) * arguments.out_features + n] =
                        *reinterpret_cast<const u16*>(shared + row * OUTPUT_ROW_BYTES + 2 * n);
            }
        }
    }

    NIBBLE_DEVICE void run() {
#pragma unroll
        for (u32 i = 0; i < OUTPUT_FRAGMENTS; i++) {
#pragma unroll
            for (u32 j = 0; j < ROW_FRAGMENTS; j++) {
#pragma unroll
                for (u32 e = 0; e < 4; e++) sums[i][j][e] = 0.0f;
            }
        }
        u32 steps = (arguments.in_features + STEP - 1) / STEP;
#pragma unroll
        for (u32 step = 0; step < STAGES - 1; step++) load(step);
#pragma unroll 1
        for (u32 step = 0; step < steps; step++) {
            async_wait<STAGES - 2>();
            block_barrier();
            load(step + STAGES - 1);
            multiply(step);
        }
        store();
    }
};

// Grid: x tiles of rows, y tiles of outputs.
template <class Element, u32 OUTPUT_WARPS, u32 ROW_WARPS, u32 OUTPUT_FRAGMENTS, u32 ROW_FRAGMENTS, u32 STEP, u32 STAGES>
NIBBLE_DEVICE void dense_matmul(const Arguments& arguments) {
    start_after_previous_kernel();
    Tile<Element, OUTPUT_WARPS, ROW_WARPS, OUTPUT_FRAGMENTS, ROW_FRAGMENTS, STEP, STAGES> tile;
    tile.arguments = arguments;
    tile.shared = shared_memory();
    tile.thread = thread_index();
    tile.lane = tile.thread % 32;
    u32 warp = tile.thread / 32;
    tile.first_row = block_index_x() * tile.ROWS;
    tile.first_output = block_index_y() * tile.OUTPUTS;
    tile.warp_output = warp % OUTPUT_WARPS * (16 * OUTPUT_FRAGMENTS);
    tile.warp_row = warp / OUTPUT_WARPS * (8 * ROW_FRAGMENTS);
    tile.run();
}

#define DENSE_MATMUL(name, blocks, element, output_warps, row_warps, ...)                               \
    NIBBLE_KERNEL(32 * output_warps * row_warps, blocks)                                                \
    name(const u16* input, const u16* weight, const u16* bias, u16* output, u32 rows, u32 out_features, \
         u32 in_features) {                                                                             \
        dense_matmul<element, output_warps, row_warps, __VA_ARGS__>(                                    \
            {input, weight, bias, output, rows, out_features, in_features});                            \
    }

// dense_matmul_<element>_<outputs of a tile>_<rows of a tile>
#define DENSE_MATMUL_SIZES(element, name)                                       \
    DENSE_MATMUL(dense_matmul_##name##_128_8, 2, element, 8, 1, 1, 1, 64, 4)    \
    DENSE_MATMUL(dense_matmul_##name##_128_16, 2, element, 8, 1, 1, 2, 64, 4)   \
    DENSE_MATMUL(dense_matmul_##name##_128_32, 2, element, 8, 1, 1, 4, 64, 4)   \
    DENSE_MATMUL(dense_matmul_##name##_128_64, 1, element, 4, 2, 2, 4, 64, 4)   \
    DENSE_MATMUL(dense_matmul_##name##_128_128, 1, element, 4, 2, 2, 8, 64, 4)  \
    DENSE_MATMUL(dense_matmul_##name##_32_8, 2, element, 2, 1, 1, 1, 128, 6)    \
    DENSE_MATMUL(dense_matmul_##name##_32_16, 2, element, 2, 1, 1, 2, 128, 6)   \
    DENSE_MATMUL(dense_matmul_##name##_32_32, 2, element, 2, 2, 1, 2, 128, 4)   \
    DENSE_MATMUL(dense_matmul_##name##_32_64, 1, element, 2, 4, 1, 2, 128, 4)

DENSE_MATMUL_SIZES(F16, f16)
DENSE_MATMUL_SIZES(BF16, bf16)
