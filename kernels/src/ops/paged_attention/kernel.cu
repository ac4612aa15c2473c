// Causal attention of query rows over a paged KV cache: one arithmetic for prefill, decode and anything between.
//
// Columns. A column is one query row and one head. The columns of a sequence and a KV head are its rows times the
// heads that share the KV head, heads fastest; a block takes 8 * N * GROUPS of them, so that a decode step with 8
// heads to a KV head fills a block of 8 columns and a prompt fills blocks of 64.
//
// Arithmetic. Keys are taken in tiles of 64 and tiles in splits of 512, both fixed by position. Within a split:
// online softmax in f32 over its tiles (running maximum, sum, weighted values). The results of splits are merged in
// order of position, from an empty one. Nothing else decides what is added to what: not the batch, not the chunk a
// row came in, not the size of the block it shares, and not whether one block took all splits or each its own. Keys
// that a row does not see have weight zero and leave every bit as it was.
//
// A tile, by a group of 4 warps, 8 * N columns:
//   scores[64 keys, columns] = keys * query^T       warp w: keys 16 w to 16 w + 15; mma with keys as 16 rows and 8
//                                                   columns to a fragment: nothing is wasted on 8 heads
//   the tile's maxima through shared memory, weights 2^(score - maximum) to shared memory as 16-bit elements
//   sums[head_dim, columns] += values^T * weights   warp w: dimensions 16 (w + 4 i) on, values by ldmatrix.trans
// GROUPS groups share the keys and values in shared memory.
//
// Shared memory: ring of STAGES tiles of keys and as many of values, rows padded by 16 bytes (the stride is an odd
// number of 16-byte units: ldmatrix has no conflicts); queries, later the output; weights; maxima and sums.
// Pipeline: cp.async, a group to each tile of keys and of values; the ring is refilled as soon as its tile has been
// read, keys in the middle of a tile and values after it: about 3 of 4 buffers are always under way.
//
// Limit, decode with 8 heads of 128 (sm_80, counted in the machine code): 32 KB a tile take 3200 cycles of an A100's
// multiprocessor at 1555 GB/s; its 64 mma take 128, its ldmatrix 290, and its 4 warps of 330 instructions 330 issue
// slots of each scheduler: memory binds. Two blocks to a multiprocessor (118 registers, 71 KB) keep about 100 KB under way.
// Limit, prompts: 64 columns and a tile take 1024 tensor cycles and 1070 issue slots (8 warps of 534 instructions, one
// block to a multiprocessor): both bind, and barriers add to them.
#include "common.cuh"

constexpr u32 BLOCK_TOKENS = 16;
constexpr u32 TILE = 64;
constexpr u32 SPLIT = 512;
constexpr u32 TILES_PER_SPLIT = SPLIT / TILE;
constexpr u32 GROUP_WARPS = 4;

NIBBLE_DEVICE float negative_infinity() { return BF16::to_float(0xff80u); }

// What a block works on: `count` columns from `first` of one sequence.
struct Columns {
    u32 first;
    u32 count;           // none: the block has no work
    u32 shared;          // heads to a KV head
    u32 first_row;       // of the sequence
    u32 first_position;  // of the sequence
    u32 table;           // where the sequence's block numbers start
    u32 window;

    NIBBLE_DEVICE u32 row(u32 column) const { return first_row + (first + column) / shared; }
    NIBBLE_DEVICE u32 head(u32 column) const { return (first + column) % shared; }
    NIBBLE_DEVICE u32 position(u32 column) const { return first_position + (first + column) / shared; }
    // The first key that a query at `position` sees.
    NIBBLE_DEVICE u32 oldest(u32 position) const { return position >= window ? position - window + 1 : 0; }
};

// The columns of block x. Where the grid has a block for each sequence, each needs only one; otherwise blocks are
// dealt to the sequences in order, the last of a sequence first: it has the most keys.
NIBBLE_DEVICE Columns find_columns(const u32* sequences, u32 sequence_count, u32 shared, u32 window, u32 size) {
    u32 sequence = 0;
    u32 block = block_index_x();
    u32 blocks = 1;
    if (grid_size_x() == sequence_count) {
        sequence = block;
        block = 0;
    } else {
        for (; sequence < sequence_count; sequence++) {
            blocks = (sequences[4 * sequence + 1] * shared + size - 1) / size;
            if (block < blocks) break;
            block -= blocks;
        }
    }
    Columns columns = {};
    if (sequence == sequence_count) return columns;
    columns.first = (blocks - 1 - block) * size;
    u32 left = sequences[4 * sequence + 1] * shared - columns.first;
    columns.count = left < size ? left : size;
    columns.shared = shared;
    columns.first_row = sequences[4 * sequence];
    columns.first_position = sequences[4 * sequence + 2];
    columns.table = sequences[4 * sequence + 3];
    columns.window = window;
    return columns;
}

// Weights of two partial results when they are merged: 2^(maximum - larger maximum). `largest` becomes the larger.
struct MergeWeights {
    float before;
    float added;
};
NIBBLE_DEVICE MergeWeights merge(float& largest, float added) {
    float larger = maximum(largest, added);
    float safe = larger == negative_infinity() ? 0.0f : larger;
    MergeWeights weights = {exp2_fast(largest - safe), exp2_fast(added - safe)};
    largest = larger;
    return weights;
}

// Where the splits leave their results: `outputs [split][row][head][head_dim]`, `statistics [split][row][head][2]`
// (maximum, sum), both in f32, splits counted from the first one that the block of columns sees.
struct Partials {
    float* outputs;
    float* statistics;
    u32 rows;
    u32 heads;
    NIBBLE_DEVICE u64 index(u32 split, u32 row, u32 head) const {
        return (static_cast<u64>(split) * rows + row) * heads + head;
    }
};

template <class Element, u32 HEAD_DIM, u32 N, u32 GROUPS>
struct Attention {
    static constexpr u32 COLUMNS = 8 * N * GROUPS;
    static constexpr u32 WARPS = GROUP_WARPS * GROUPS;
    static constexpr u32 THREADS = 32 * WARPS;
    static constexpr u32 STAGES = HEAD_DIM >= 256 ? 1 : HEAD_DIM <= 64 ? 4 : 256 / HEAD_DIM;
    static constexpr u32 STEPS = HEAD_DIM / 16;
    static constexpr u32 DIMENSION_TILES = (STEPS + GROUP_WARPS - 1) / GROUP_WARPS;
    static constexpr u32 CHUNKS = HEAD_DIM / 8;
    static constexpr u32 ROW_BYTES = 2 * HEAD_DIM + 16;
    static constexpr u32 TILE_BYTES = TILE * ROW_BYTES;
    static constexpr u32 WEIGHT_ROW_BYTES = 16 * (N | 1);
    static constexpr u32 QUERY_START = 2 * STAGES * TILE_BYTES;
    static constexpr u32 WEIGHTS_START = QUERY_START + COLUMNS * ROW_BYTES;
    static constexpr u32 MAXIMA_START = WEIGHTS_START + GROUPS * TILE * WEIGHT_ROW_BYTES;
    static constexpr u32 SUMS_START = MAXIMA_START + 4 * GROUP_WARPS * COLUMNS;
    static constexpr bool QUERY_IN_REGISTERS = N * HEAD_DIM <= 256;

    // One split in the making, or all splits so far. Lane 4 * r + c holds columns 8 n + 2 c and 8 n + 2 c + 1 in
    // [n][0] and [n][1], of sums the dimensions r and r + 8 of its tiles in [..][n][0..2] and [..][n][2..4].
    struct State {
        float largest[N][2];
        float total[N][2];
        float sums[DIMENSION_TILES][N][4];

        NIBBLE_DEVICE void clear() {
#pragma unroll
            for (u32 n = 0; n < N; n++) {
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    largest[n][i] = negative_infinity();
                    total[n][i] = 0.0f;
                }
#pragma unroll
                for (u32 m = 0; m < DIMENSION_TILES; m++) {
#pragma unroll
                    for (u32 i = 0; i < 4; i++) sums[m][n][i] = 0.0f;
                }
            }
        }
    };

    Columns columns;
    const u8* keys;    // of the block's KV head, in block 0
    const u8* values;  // the same
    const u32* table;  // the sequence's block numbers
    u32 block_bytes;   // from one block of the cache to the next
    u32 first_key;     // keys that any column sees: first_key to last_key
    u32 last_key;
    u32 seen_by_all_start;  // keys that every column sees, if any
    u32 seen_by_all_end;
    u32 first_tile;    // tiles that the block takes: first_tile to last_tile
    u32 last_tile;
    u32 numbers[2];    // lane i: number i of the 32 blocks of an even and an odd split
    u32 thread, lane, warp, group;
    u8* shared;
    State split, all;
    u32 query[QUERY_IN_REGISTERS ? STEPS : 1][N][2];

    NIBBLE_DEVICE void load_numbers(u32 split_index) {
        u32 entry = split_index * (SPLIT / BLOCK_TOKENS) + lane;
        u32 number = entry <= last_key / BLOCK_TOKENS && entry >= first_key / BLOCK_TOKENS ? table[entry] : 0;
        if (split_index % 2 == 0) {
            numbers[0] = number;
        } else {
            numbers[1] = number;
        }
    }

    // Starts the copy of a tile of keys or values. What no column sees is zero: weight zero times whatever lies there
    // might not be.
    NIBBLE_DEVICE void load_tile(const u8* cache, u8* to, u32 tile) {
        if (tile <= last_tile) {
            u32 number = tile / TILES_PER_SPLIT % 2 == 0 ? numbers[0] : numbers[1];
            u32 first_number = tile % TILES_PER_SPLIT * (TILE / BLOCK_TOKENS);
#pragma unroll
            for (u32 start = 0; start < TILE * CHUNKS; start += THREADS) {
                u32 index = start + thread;
                if (TILE * CHUNKS % THREADS == 0 || index < TILE * CHUNKS) {
                    // The same with less arithmetic where all threads step by whole keys.
                    constexpr bool WHOLE = THREADS % CHUNKS == 0;
                    u32 key = WHOLE ? start / CHUNKS + thread / CHUNKS : index / CHUNKS;
                    u32 chunk = WHOLE ? thread % CHUNKS : index % CHUNKS;
                    u64 block = shuffle(number, first_number + key / BLOCK_TOKENS);
                    u32 offset = key % BLOCK_TOKENS * (2 * HEAD_DIM) + 16 * chunk;
                    u32 position = tile * TILE + key;
                    bool valid = position >= first_key && position <= last_key;
                    async_copy_16(to + key * ROW_BYTES + 16 * chunk, cache + block * block_bytes + offset, valid);
                }
            }
        }
        async_commit();
    }
    NIBBLE_DEVICE void load_keys(u32 tile) { load_tile(keys, shared + tile % STAGES * TILE_BYTES, tile); }
    NIBBLE_DEVICE void load_values(u32 tile) {
        load_tile(values, shared + (STAGES + tile % STAGES) * TILE_BYTES, tile);
    }

    // scores[n]: keys r and r + 8 of the warp's 16, columns 2 c and 2 c + 1 of fragment n.
    NIBBLE_DEVICE void score(float (&scores)[N][4], u32 tile) {
        const u8* key_row = shared + tile % STAGES * TILE_BYTES + (warp * 16 + lane % 16) * ROW_BYTES + lane / 16 * 16;
#pragma unroll
        for (u32 n = 0; n < N; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) scores[n][i] = 0.0f;
        }
#pragma unroll
        for (u32 step = 0; step < STEPS; step++) {
            u32 key[4];
            load_matrix_x4(key, key_row + 32 * step);
            if constexpr (QUERY_IN_REGISTERS) {
#pragma unroll
                for (u32 n = 0; n < N; n++)
                    Element::multiply_matrices(scores[n], key, query[step][n][0], query[step][n][1]);
            } else {
#pragma unroll
                for (u32 n = 0; n < N; n += 2) {
                    u32 fragment[4];
                    load_query(fragment, n, step);
                    Element::multiply_matrices(scores[n], key, fragment[0], fragment[1]);
                    Element::multiply_matrices(scores[n + 1], key, fragment[2], fragment[3]);
                }
            }
        }
    }

    // Queries as the second operand: fragments n and n + 1 of a step.
    NIBBLE_DEVICE void load_query(u32 (&fragment)[4], u32 n, u32 step) {
        u32 column = group * (8 * N) + 8 * n + lane / 16 * 8 + lane % 8;
        load_matrix_x4(fragment, shared + QUERY_START + column * ROW_BYTES + 32 * step + lane / 8 % 2 * 16);
    }

    NIBBLE_DEVICE void keep_query() {
        if constexpr (QUERY_IN_REGISTERS) {
#pragma unroll
            for (u32 step = 0; step < STEPS; step++) {
                if constexpr (N == 1) {
                    u32 column = group * 8 + lane % 8;
                    load_matrix_x2(query[step][0], shared + QUERY_START + column * ROW_BYTES + 32 * step +
                                                       lane / 8 % 2 * 16);
                } else {
#pragma unroll
                    for (u32 n = 0; n < N; n += 2) {
                        u32 fragment[4];
                        load_query(fragment, n, step);
                        query[step][n][0] = fragment[0];
                        query[step][n][1] = fragment[1];
                        query[step][n + 1][0] = fragment[2];
                        query[step][n + 1][1] = fragment[3];
                    }
                }
            }
        }
    }

    // Takes out the scores of keys that a column does not see, in tiles where there are any.
    NIBBLE_DEVICE void mask(float (&scores)[N][4], u32 tile) {
        u32 start = tile * TILE;
        if (start + TILE - 1 <= seen_by_all_end && start >= seen_by_all_start) return;
#pragma unroll
        for (u32 n = 0; n < N; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 key = start + warp * 16 + lane / 4 + i / 2 * 8;
                u32 position = columns.position(group * (8 * N) + 8 * n + lane % 4 * 2 + i % 2);
                if (key > position || key < columns.oldest(position)) scores[n][i] = negative_infinity();
            }
        }
    }

    // Writes the largest score of the warp's 16 keys for each column.
    NIBBLE_DEVICE void put_maxima(const float (&scores)[N][4]) {
        float* maxima = reinterpret_cast<float*>(shared + MAXIMA_START) + (group * GROUP_WARPS + warp) * (8 * N);
#pragma unroll
        for (u32 n = 0; n < N; n++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float largest = maximum(scores[n][i], scores[n][i + 2]);
#pragma unroll
                for (u32 mask = 4; mask < 32; mask *= 2) largest = maximum(largest, shuffle_xor(largest, mask));
                if (lane < 4) maxima[8 * n + 2 * lane + i] = largest;
            }
        }
    }

    // Turns scores into weights against the running maximum, in shared memory; rescales what was summed before.
    NIBBLE_DEVICE void soften(const float (&scores)[N][4], float scale) {
        const float* maxima = reinterpret_cast<const float*>(shared + MAXIMA_START) + group * GROUP_WARPS * (8 * N);
        u8* weights = shared + WEIGHTS_START + (group * TILE + warp * 16 + lane / 4) * WEIGHT_ROW_BYTES + lane % 4 * 4;
#pragma unroll
        for (u32 n = 0; n < N; n++) {
            float weight[4];
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float largest = negative_infinity();
#pragma unroll
                for (u32 other = 0; other < GROUP_WARPS; other++)
                    largest = maximum(largest, maxima[other * (8 * N) + 8 * n + lane % 4 * 2 + i]);
                largest = maximum(split.largest[n][i], largest * scale);
                float safe = largest == negative_infinity() ? 0.0f : largest;
                float factor = exp2_fast(split.largest[n][i] - safe);
                split.largest[n][i] = largest;
                weight[i] = exp2_fast(multiply_add(scores[n][i], scale, -safe));
                weight[i + 2] = exp2_fast(multiply_add(scores[n][i + 2], scale, -safe));
                split.total[n][i] = multiply_add(split.total[n][i], factor, weight[i] + weight[i + 2]);
#pragma unroll
                for (u32 m = 0; m < DIMENSION_TILES; m++) {
                    split.sums[m][n][i] *= factor;
                    split.sums[m][n][i + 2] *= factor;
                }
            }
            *reinterpret_cast<u32*>(weights + 16 * n) = Element::pack(weight[0], weight[1]);
            *reinterpret_cast<u32*>(weights + 16 * n + 8 * WEIGHT_ROW_BYTES) = Element::pack(weight[2], weight[3]);
        }
    }

    NIBBLE_DEVICE void add_values(u32 tile) {
        const u8* value_row = shared + (STAGES + tile % STAGES) * TILE_BYTES +
                              (lane / 16 * 8 + lane % 8) * ROW_BYTES + lane / 8 % 2 * 16;
        const u8* weight_row = shared + WEIGHTS_START + (group * TILE + lane) * WEIGHT_ROW_BYTES;
#pragma unroll
        for (u32 half = 0; half < TILE / 32; half++) {
            u32 weights[N][4];
#pragma unroll
            for (u32 n = 0; n < N; n++)
                load_matrix_x4_transposed(weights[n], weight_row + half * 32 * WEIGHT_ROW_BYTES + 16 * n);
#pragma unroll
            for (u32 m = 0; m < DIMENSION_TILES; m++) {
                u32 dimension_tile = warp + GROUP_WARPS * m;
                if (STEPS % GROUP_WARPS != 0 && dimension_tile >= STEPS) continue;
#pragma unroll
                for (u32 step = 0; step < 2; step++) {
                    u32 value[4];
                    load_matrix_x4_transposed(value,
                                              value_row + (half * 32 + step * 16) * ROW_BYTES + 32 * dimension_tile);
#pragma unroll
                    for (u32 n = 0; n < N; n++)
                        Element::multiply_matrices(split.sums[m][n], value, weights[n][2 * step],
                                                   weights[n][2 * step + 1]);
                }
            }
        }
    }

    // Merges the finished split into `all` and starts the next one.
    NIBBLE_DEVICE void finish_split() {
        float* totals = reinterpret_cast<float*>(shared + SUMS_START) + group * GROUP_WARPS * (8 * N);
#pragma unroll
        for (u32 n = 0; n < N; n++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float total = split.total[n][i];
#pragma unroll
                for (u32 mask = 4; mask < 32; mask *= 2) total += shuffle_xor(total, mask);
                if (lane < 4) totals[warp * (8 * N) + 8 * n + 2 * lane + i] = total;
            }
        }
        block_barrier();
#pragma unroll
        for (u32 n = 0; n < N; n++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float total = 0.0f;
#pragma unroll
                for (u32 other = 0; other < GROUP_WARPS; other++)
                    total += totals[other * (8 * N) + 8 * n + lane % 4 * 2 + i];
                MergeWeights weights = merge(all.largest[n][i], split.largest[n][i]);
                all.total[n][i] = multiply_add(all.total[n][i], weights.before, total * weights.added);
#pragma unroll
                for (u32 m = 0; m < DIMENSION_TILES; m++) {
#pragma unroll
                    for (u32 half = 0; half < 4; half += 2) {
                        float& sum = all.sums[m][n][i + half];
                        sum = multiply_add(sum, weights.before, split.sums[m][n][i + half] * weights.added);
                    }
                }
            }
        }
        split.clear();
    }

    NIBBLE_DEVICE void load_query_rows(const u16* query_rows, u32 heads, u32 kv_head) {
#pragma unroll 1
        for (u32 index = thread; index < COLUMNS * CHUNKS; index += THREADS) {
            u32 column = index / CHUNKS, chunk = index % CHUNKS;
            bool valid = column < columns.count;
            u32 existing = valid ? column : 0;
            u64 row = static_cast<u64>(columns.row(existing)) * heads + kv_head * columns.shared +
                      columns.head(existing);
            async_copy_16(shared + QUERY_START + column * ROW_BYTES + 16 * chunk,
                          query_rows + row * HEAD_DIM + 8 * chunk, valid);
        }
    }

    // Writes `all`, divided by the sums of weights, as rows of the output; by way of the queries' shared memory.
    NIBBLE_DEVICE void store_output(u16* output, u32 heads, u32 kv_head) {
#pragma unroll
        for (u32 n = 0; n < N; n++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float inverse = reciprocal_fast(all.total[n][i]);
                u32 column = group * (8 * N) + 8 * n + lane % 4 * 2 + i;
#pragma unroll
                for (u32 m = 0; m < DIMENSION_TILES; m++) {
                    u32 dimension_tile = warp + GROUP_WARPS * m;
                    if (STEPS % GROUP_WARPS != 0 && dimension_tile >= STEPS) continue;
#pragma unroll
                    for (u32 half = 0; half < 2; half++) {
                        u32 dimension = 16 * dimension_tile + lane / 4 + 8 * half;
                        u8* to = shared + QUERY_START + column * ROW_BYTES + 2 * dimension;
                        *reinterpret_cast<u16*>(to) = Element::from_float(all.sums[m][n][i + 2 * half] * inverse);
                    }
                }
            }
        }
        block_barrier();
        for (u32 index = thread; index < columns.count * CHUNKS; index += THREADS) {
            u32 column = index / CHUNKS, chunk = index % CHUNKS;
            u64 row = static_cast<u64>(columns.row(column)) * heads + kv_head * columns.shared + columns.head(column);
            store_16(output + row * HEAD_DIM + 8 * chunk,
                     load_16(shared + QUERY_START + column * ROW_BYTES + 16 * chunk));
        }
    }

    // Writes `all` as the result of one split.
    NIBBLE_DEVICE void store_partial(Partials partials, u32 split_index, u32 kv_head) {
#pragma unroll
        for (u32 n = 0; n < N; n++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 column = group * (8 * N) + 8 * n + lane % 4 * 2 + i;
                if (column >= columns.count) continue;
                u64 index = partials.index(split_index, columns.row(column),
                                           kv_head * columns.shared + columns.head(column));
                if (warp == 0 && lane < 4) {
                    partials.statistics[2 * index] = all.largest[n][i];
                    partials.statistics[2 * index + 1] = all.total[n][i];
                }
#pragma unroll
                for (u32 m = 0; m < DIMENSION_TILES; m++) {
                    u32 dimension_tile = warp + GROUP_WARPS * m;
                    if (STEPS % GROUP_WARPS != 0 && dimension_tile >= STEPS) continue;
                    float* to = partials.outputs + index * HEAD_DIM + 16 * dimension_tile + lane / 4;
                    to[0] = all.sums[m][n][i];
                    to[8] = all.sums[m][n][i + 2];
                }
            }
        }
    }

    // Everything but the last store.
    NIBBLE_DEVICE void attend(const u16* query_rows, u32 heads, u32 kv_head, float scale) {
        load_numbers(first_tile / TILES_PER_SPLIT);
        load_numbers(first_tile / TILES_PER_SPLIT + 1);
        load_query_rows(query_rows, heads, kv_head);
#pragma unroll
        for (u32 stage = 0; stage < STAGES; stage++) {
            load_keys(first_tile + stage);
            if (stage + 1 < STAGES) load_values(first_tile + stage);
        }
        split.clear();
        all.clear();
        async_wait<2 * (STAGES - 1)>();
        block_barrier();
        keep_query();
#pragma unroll 1
        for (u32 tile = first_tile; tile <= last_tile; tile++) {
            float scores[N][4];
            async_wait<2 * (STAGES - 1)>();
            block_barrier();  // everyone's keys are there, and nobody reads the values before any more
            load_values(tile + STAGES - 1);
            score(scores, tile);
            mask(scores, tile);
            put_maxima(scores);
            block_barrier();  // the maxima are there, and nobody reads these keys any more
            load_keys(tile + STAGES);
            if (tile % TILES_PER_SPLIT == 0) load_numbers(tile / TILES_PER_SPLIT + 1);
            soften(scores, scale);
            async_wait<2 * (STAGES - 1) + 1>();
            block_barrier();  // everyone's values and weights are there
            add_values(tile);
            if (tile == last_tile || tile % TILES_PER_SPLIT == TILES_PER_SPLIT - 1) finish_split();
        }
    }
};

struct Arguments {
    const u16* query;
    const u16* key_cache;
    const u16* value_cache;
    const u32* sequences;
    const u32* block_tables;
    u16* output;
    Partials partials;
    u32 sequence_count;
    u32 kv_heads;
    u32 window;
    float scale;  // of scores, times log2(e)
};

// Grid: x blocks of columns, so that those which read the same keys run side by side; y KV heads; z splits, or 1 for
// blocks that take all splits.
template <class Element, u32 HEAD_DIM, u32 N, u32 GROUPS>
NIBBLE_DEVICE void attention(const Arguments& arguments) {
    start_after_previous_kernel();
    Attention<Element, HEAD_DIM, N, GROUPS> block;
    u32 heads = arguments.partials.heads;
    u32 kv_head = block_index_y();
    block.columns = find_columns(arguments.sequences, arguments.sequence_count, heads / arguments.kv_heads,
                                 arguments.window, block.COLUMNS);
    if (block.columns.count == 0) return;
    block.first_key = block.columns.oldest(block.columns.position(0));
    block.last_key = block.columns.position(block.columns.count - 1);
    block.seen_by_all_start = block.columns.oldest(block.last_key);
    block.seen_by_all_end = block.columns.position(0);
    block.first_tile = block.first_key / TILE;
    block.last_tile = block.last_key / TILE;
    bool one_split = grid_size_z() > 1;
    if (one_split) {
        u32 tile = (block.first_key / SPLIT + block_index_z()) * TILES_PER_SPLIT;
        if (tile > block.last_tile) return;
        block.first_tile = tile > block.first_tile ? tile : block.first_tile;
        block.last_tile = tile + TILES_PER_SPLIT - 1 < block.last_tile ? tile + TILES_PER_SPLIT - 1 : block.last_tile;
    }
    u64 head_start = static_cast<u64>(kv_head) * (BLOCK_TOKENS * HEAD_DIM);
    block.keys = reinterpret_cast<const u8*>(arguments.key_cache + head_start);
    block.values = reinterpret_cast<const u8*>(arguments.value_cache + head_start);
    block.table = arguments.block_tables + block.columns.table;
    block.block_bytes = arguments.kv_heads * (2 * BLOCK_TOKENS * HEAD_DIM);
    block.thread = thread_index();
    block.lane = block.thread % 32;
    block.warp = block.thread / 32 % GROUP_WARPS;
    block.group = block.thread / 32 / GROUP_WARPS;
    block.shared = shared_memory();
    block.attend(arguments.query, heads, kv_head, arguments.scale);
    if (one_split) {
        block.store_partial(arguments.partials, block_index_z(), kv_head);
    } else {
        block.store_output(arguments.output, heads, kv_head);
    }
}

// Merges what the splits left. Grid: x blocks of columns as above, y KV heads; a warp to a column.
template <class Element, u32 HEAD_DIM>
NIBBLE_DEVICE void combine(Partials partials, const u32* sequences, u16* output, u32 sequence_count, u32 kv_heads,
                           u32 window, u32 block_columns) {
    start_after_previous_kernel();
    constexpr u32 WARPS = 8;
    constexpr u32 PARTS = (HEAD_DIM + 31) / 32;
    u32 shared = partials.heads / kv_heads;
    Columns columns = find_columns(sequences, sequence_count, shared, window, block_columns);
    if (columns.count == 0) return;
    u32 lane = thread_index() % 32;
    u32 first_split = columns.oldest(columns.position(0)) / SPLIT;
    for (u32 column = thread_index() / 32; column < columns.count; column += WARPS) {
        u32 head = block_index_y() * shared + columns.head(column);
        u32 splits = columns.position(column) / SPLIT - first_split + 1;
        float largest = negative_infinity();
        float total = 0.0f;
        float sums[PARTS] = {};
#pragma unroll 4
        for (u32 split = 0; split < splits; split++) {
            u64 index = partials.index(split, columns.row(column), head);
            const float* from = partials.outputs + index * HEAD_DIM + lane;
            MergeWeights weights = merge(largest, partials.statistics[2 * index]);
            total = multiply_add(total, weights.before, partials.statistics[2 * index + 1] * weights.added);
#pragma unroll
            for (u32 part = 0; part < PARTS; part++) {
                if (HEAD_DIM % 32 == 0 || 32 * part + lane < HEAD_DIM)
                    sums[part] = multiply_add(sums[part], weights.before, from[32 * part] * weights.added);
            }
        }
        float inverse = reciprocal_fast(total);
        u64 row = static_cast<u64>(columns.row(column)) * partials.heads + head;
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
            if (HEAD_DIM % 32 == 0 || 32 * part + lane < HEAD_DIM)
                output[row * HEAD_DIM + 32 * part + lane] = Element::from_float(sums[part] * inverse);
        }
    }
}

// paged_attention_<element>_<head_dim>_<columns of a block>, and the combine kernel. The host defines the element, its
// name and the head size: a model has one of each, and all of them would take a while to compile.
#ifndef NIBBLE_HEAD_DIM
#define NIBBLE_ELEMENT F16
#define NIBBLE_ELEMENT_NAME f16
#define NIBBLE_HEAD_DIM 128
#endif

#define ATTENTION(name, element, head_dim, n, groups, blocks)                                                        \
    NIBBLE_KERNEL(128 * groups, blocks)                                                                              \
    name(const u16* query, const u16* key_cache, const u16* value_cache, const u32* sequences,                       \
         const u32* block_tables, u16* output, float* partial_outputs, float* partial_statistics, u32 rows,          \
         u32 sequence_count, u32 heads, u32 kv_heads, u32 window, float scale) {                                     \
        attention<element, head_dim, n, groups>({query, key_cache, value_cache, sequences, block_tables, output,     \
                                                 {partial_outputs, partial_statistics, rows, heads}, sequence_count, \
                                                 kv_heads, window, scale});                                          \
    }

#define COMBINE(name, element, head_dim)                                                                             \
    NIBBLE_KERNEL(256, 4)                                                                                            \
    name(const float* partial_outputs, const float* partial_statistics, const u32* sequences, u16* output, u32 rows, \
         u32 sequence_count, u32 heads, u32 kv_heads, u32 window, u32 block_columns) {                               \
        combine<element, head_dim>(                                                                                  \
            {const_cast<float*>(partial_outputs), const_cast<float*>(partial_statistics), rows, heads}, sequences,   \
            output, sequence_count, kv_heads, window, block_columns);                                                \
    }

#define KERNELS_NAMED(name, element, head_dim)                                    \
    ATTENTION(paged_attention_##name##_##head_dim##_8, element, head_dim, 1, 1, 2)  \
    ATTENTION(paged_attention_##name##_##head_dim##_32, element, head_dim, 4, 1, 2) \
    ATTENTION(paged_attention_##name##_##head_dim##_64, element, head_dim, 4, 2, 1) \
    COMBINE(paged_attention_combine_##name##_##head_dim, element, head_dim)
// Once more, so that the arguments are replaced by what they stand for before they become parts of names.
#define KERNELS(name, element, head_dim) KERNELS_NAMED(name, element, head_dim)
KERNELS(NIBBLE_ELEMENT_NAME, NIBBLE_ELEMENT, NIBBLE_HEAD_DIM)
