// Rotary embedding of queries and keys, and the write of keys and values to the cache; the formula is in mod.rs.
//
// Plan. A thread for eight elements of the lower half of a head and the eight of the upper half that turn with them (or,
// of a value, are copied with them); blocks [rows, parts of a row]. A row's heads lie in the order queries, keys, values.
// Cache, keys and values both: [block][kv_head][16 tokens][head_dim], so that a token's head is contiguous.
// No shared memory. Bytes: 4 an element of queries, 6 of keys, 4 of values; cosines and sines are shared by a row's heads
// and come from the first-level cache. Limit: latency of two dependent loads (a position, then its cosines) up to some
// hundred rows, then memory bandwidth.
#include "common.cuh"

constexpr u32 THREADS = 128;
constexpr u32 TOKENS = 16;

template <class Element>
NIBBLE_DEVICE void rotate_word(u32& lower, u32& upper, u32 cosines, u32 sines) {
    float cos_low = low_float<Element>(cosines), cos_high = high_float<Element>(cosines);
    float sin_low = low_float<Element>(sines), sin_high = high_float<Element>(sines);
    float lower_low = low_float<Element>(lower), lower_high = high_float<Element>(lower);
    float upper_low = low_float<Element>(upper), upper_high = high_float<Element>(upper);
    lower = Element::pack(lower_low * cos_low - upper_low * sin_low, lower_high * cos_high - upper_high * sin_high);
    upper = Element::pack(upper_low * cos_low + lower_low * sin_low, upper_high * cos_high + lower_high * sin_high);
}

template <class Element>
NIBBLE_DEVICE void rotary_embedding(u16* query, u16* key, const u16* value, const u16* cosines, const u16* sines,
                                    const u32* positions, const u32* slots, u16* key_cache, u16* value_cache, u32 heads,
                                    u32 kv_heads, u32 head_dim) {
    start_after_previous_kernel();
    u32 half = head_dim / 2, vectors = half / 8;
    u32 row = block_index_x();
    u32 index = block_index_y() * THREADS + thread_index();
    u32 head = index / vectors, element = index % vectors * 8;
    if (head >= heads + 2 * kv_heads) return;
    bool is_query = head < heads, is_value = head >= heads + kv_heads;
    u32 kv_head = is_value ? head - heads - kv_heads : head - heads;

    u64 kv_start = (static_cast<u64>(row) * kv_heads + kv_head) * head_dim + element;
    const u16* from = is_value ? value + kv_start
                      : is_query ? query + (static_cast<u64>(row) * heads + head) * head_dim + element
                                 : key + kv_start;
    Words4 lower = load_16(from), upper = load_16(from + half);
    if (!is_value) {
        u64 angle = static_cast<u64>(positions[row]) * half + element;
        Words4 cos = load_16_read_only(cosines + angle), sin = load_16_read_only(sines + angle);
        rotate_word<Element>(lower.x, upper.x, cos.x, sin.x);
        rotate_word<Element>(lower.y, upper.y, cos.y, sin.y);
        rotate_word<Element>(lower.z, upper.z, cos.z, sin.z);
        rotate_word<Element>(lower.w, upper.w, cos.w, sin.w);
        u16* to = const_cast<u16*>(from);
        store_16(to, lower);
        store_16(to + half, upper);
    }
    if (!is_query) {
        u32 slot = slots[row];
        u64 token = (static_cast<u64>(slot / TOKENS) * kv_heads + kv_head) * TOKENS + slot % TOKENS;
        u16* cached = (is_value ? value_cache : key_cache) + token * head_dim + element;
        store_16(cached, lower);
        store_16(cached + half, upper);
    }
}

#define ROTARY_EMBEDDING(name, Element)                                                                               \
    NIBBLE_KERNEL(THREADS, 8)                                                                                         \
    name(u16* query, u16* key, const u16* value, const u16* cosines, const u16* sines, const u32* positions,          \
         const u32* slots, u16* key_cache, u16* value_cache, u32 heads, u32 kv_heads, u32 head_dim) {                 \
        rotary_embedding<Element>(query, key, value, cosines, sines, positions, slots, key_cache, value_cache, heads, \
                                  kv_heads, head_dim);                                                                \
    }

ROTARY_EMBEDDING(rotary_embedding_f16, F16)
ROTARY_EMBEDDING(rotary_embedding_bf16, BF16)
