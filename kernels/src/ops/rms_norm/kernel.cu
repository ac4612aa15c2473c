// Residual addition and root-mean-square norm; the formula is in mod.rs.
//
// Plan. A row's vectors of 16 bytes stay in registers between its two passes, so each row is read and written once:
//   rms_norm_*_warp   a warp for a row of up to 256 elements (norms of heads), 4 rows a block, no shared memory
//   rms_norm_*_N      a block for a row of any other width, N vectors a thread, at most 512 threads; thread t takes
//                     vectors t, t + threads, ...; 16 partial sums in shared memory
// Weights are loaded before the sum is known, which hides their latency behind it.
// Order of the sum: a thread's elements in order, lanes by halving distance, warps in order. Width alone decides it.
// The sum is of the residual as it is stored, rounded to 16 bits.
// Bytes a row: 2 * width read for each of residual and addend, as many written for residual and output (weights are in
// the second-level cache). Limit: memory bandwidth from some hundred rows up, latency of one row below.
#include "common.cuh"

constexpr u32 WARP_ROWS = 4;
constexpr u32 MAX_WARPS = 16;

// What stays in registers of eight elements of a row.
struct Vector {
    Words4 residual, weight;
};

// residual + addend in each half, computed in float and rounded once.
template <class Element>
NIBBLE_DEVICE u32 add_rounded(u32 residual, u32 addend) {
    return Element::pack(low_float<Element>(residual) + low_float<Element>(addend),
                         high_float<Element>(residual) + high_float<Element>(addend));
}

template <class Element>
NIBBLE_DEVICE float add_squares(float sum, u32 word) {
    float low = low_float<Element>(word), high = high_float<Element>(word);
    return high * high + (low * low + sum);
}

template <class Element>
NIBBLE_DEVICE u32 normalize(u32 word, u32 weight, float factor) {
    return Element::pack(low_float<Element>(word) * factor * low_float<Element>(weight),
                         high_float<Element>(word) * factor * high_float<Element>(weight));
}

// Loads a vector, adds the addend where there is one and stores the sum; gives `sum` plus the squares.
template <class Element>
NIBBLE_DEVICE float load_vector(Vector& vector, float sum, u16* residual, const u16* addend, const u16* weight) {
    vector.residual = load_16(residual);
    vector.weight = load_16_read_only(weight);
    Words4& words = vector.residual;
    if (addend) {
        Words4 added = load_16(addend);
        words.x = add_rounded<Element>(words.x, added.x);
        words.y = add_rounded<Element>(words.y, added.y);
        words.z = add_rounded<Element>(words.z, added.z);
        words.w = add_rounded<Element>(words.w, added.w);
        store_16(residual, words);
    }
    sum = add_squares<Element>(sum, words.x);
    sum = add_squares<Element>(sum, words.y);
    sum = add_squares<Element>(sum, words.z);
    return add_squares<Element>(sum, words.w);
}

template <class Element>
NIBBLE_DEVICE void store_vector(const Vector& vector, float factor, u16* output) {
    Words4 words;
    words.x = normalize<Element>(vector.residual.x, vector.weight.x, factor);
    words.y = normalize<Element>(vector.residual.y, vector.weight.y, factor);
    words.z = normalize<Element>(vector.residual.z, vector.weight.z, factor);
    words.w = normalize<Element>(vector.residual.w, vector.weight.w, factor);
    store_16(output, words);
}

// The sum over the lanes of a warp, the same bits in each.
NIBBLE_DEVICE float warp_sum(float sum) {
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) sum += shuffle_xor(sum, distance);
    return sum;
}

NIBBLE_DEVICE float norm_factor(float sum, u32 width, float epsilon) {
    return rsqrt_fast(sum / static_cast<float>(width) + epsilon);
}

template <class Element>
NIBBLE_DEVICE void norm_by_warps(u16* residual, const u16* addend, const u16* weight, u16* output, u32 rows, u32 width,
                                 float epsilon) {
    start_after_previous_kernel();
    u32 row = block_index_x() * WARP_ROWS + thread_index() / 32;
    if (row >= rows) return;
    u32 first = thread_index() % 32 * 8;
    bool has_vector = first < width;
    u64 start = static_cast<u64>(row) * width + first;
    Vector vector;
    float sum = 0;
    if (has_vector) {
        sum = load_vector<Element>(vector, sum, residual + start, addend ? addend + start : addend, weight + first);
    }
    float factor = norm_factor(warp_sum(sum), width, epsilon);
    if (has_vector) store_vector<Element>(vector, factor, output + start);
}

template <class Element, u32 vectors>
NIBBLE_DEVICE void norm_by_block(u16* residual, const u16* addend, const u16* weight, u16* output, u32 threads,
                                 u32 width, float epsilon) {
    start_after_previous_kernel();
    float* partial_sums = reinterpret_cast<float*>(shared_memory());
    u64 start = static_cast<u64>(block_index_x()) * width;
    residual += start;
    output += start;
    if (addend) addend += start;
    Vector held[vectors];
    float sum = 0;
#pragma unroll
    for (u32 i = 0; i < vectors; i++) {
        u32 first = (i * threads + thread_index()) * 8;
        if (first < width) {
            sum = load_vector<Element>(held[i], sum, residual + first, addend ? addend + first : addend, weight + first);
        }
    }
    sum = warp_sum(sum);
    if (thread_index() % 32 == 0) partial_sums[thread_index() / 32] = sum;
    block_barrier();
    sum = 0;
    for (u32 warp = 0; warp < threads / 32; warp++) sum += partial_sums[warp];
    float factor = norm_factor(sum, width, epsilon);
#pragma unroll
    for (u32 i = 0; i < vectors; i++) {
        u32 first = (i * threads + thread_index()) * 8;
        if (first < width) store_vector<Element>(held[i], factor, output + first);
    }
}

#define RMS_NORM_WARP(name, Element)                                                                             \
    NIBBLE_KERNEL(WARP_ROWS * 32, 8)                                                                             \
    name(u16* residual, const u16* addend, const u16* weight, u16* output, u32 rows, u32 width, float epsilon) { \
        norm_by_warps<Element>(residual, addend, weight, output, rows, width, epsilon);                          \
    }
#define RMS_NORM_BLOCK(name, Element, vectors)                                                                      \
    NIBBLE_KERNEL(MAX_WARPS * 32, 2)                                                                                \
    name(u16* residual, const u16* addend, const u16* weight, u16* output, u32 threads, u32 width, float epsilon) { \
        norm_by_block<Element, vectors>(residual, addend, weight, output, threads, width, epsilon);                 \
    }

RMS_NORM_WARP(rms_norm_f16_warp, F16)
RMS_NORM_BLOCK(rms_norm_f16_1, F16, 1)
RMS_NORM_BLOCK(rms_norm_f16_2, F16, 2)
RMS_NORM_BLOCK(rms_norm_f16_4, F16, 4)
RMS_NORM_WARP(rms_norm_bf16_warp, BF16)
RMS_NORM_BLOCK(rms_norm_bf16_1, BF16, 1)
RMS_NORM_BLOCK(rms_norm_bf16_2, BF16, 2)
RMS_NORM_BLOCK(rms_norm_bf16_4, BF16, 4)
