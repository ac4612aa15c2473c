// The gated activation; the formula is in mod.rs.
//
// Plan. A thread for eight elements: two loads and one store of 16 bytes; the last thread takes the elements that do not
// fill a vector one by one. No shared memory. Small blocks, so that one row of a model spreads over the card.
// Bytes: 6 an element. Limit: memory bandwidth; 64 KB are under way on a multiprocessor with 2048 threads, which is more
// than its latency times its share of the bandwidth.
#include "common.cuh"

constexpr u32 THREADS = 128;
constexpr float LOG2_E = 1.4426950408889634f;

NIBBLE_DEVICE float gated(float gate, float up) { return gate * reciprocal_fast(1.0f + exp2_fast(-LOG2_E * gate)) * up; }

template <class Element>
NIBBLE_DEVICE u32 gated_word(u32 gate, u32 up) {
    return Element::pack(gated(low_float<Element>(gate), low_float<Element>(up)),
                         gated(high_float<Element>(gate), high_float<Element>(up)));
}

template <class Element>
NIBBLE_DEVICE void silu_mul(const u16* gate, const u16* up, u16* output, u32 elements) {
    start_after_previous_kernel();
    u32 first = (block_index_x() * THREADS + thread_index()) * 8;
    if (first >= elements) return;
    if (elements - first >= 8) {
        Words4 gates = load_16(gate + first), ups = load_16(up + first), words;
        words.x = gated_word<Element>(gates.x, ups.x);
        words.y = gated_word<Element>(gates.y, ups.y);
        words.z = gated_word<Element>(gates.z, ups.z);
        words.w = gated_word<Element>(gates.w, ups.w);
        store_16(output + first, words);
    } else {
        for (u32 index = first; index < elements; index++) {
            output[index] = Element::from_float(gated(Element::to_float(gate[index]), Element::to_float(up[index])));
        }
    }
}

NIBBLE_KERNEL(THREADS, 12) silu_mul_f16(const u16* gate, const u16* up, u16* output, u32 elements) {
    silu_mul<F16>(gate, up, output, elements);
}
NIBBLE_KERNEL(THREADS, 12) silu_mul_bf16(const u16* gate, const u16* up, u16* output, u32 elements) {
    silu_mul<BF16>(gate, up, output, elements);
}
