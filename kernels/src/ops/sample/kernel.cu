// From a row of logits to a token; what is computed is in mod.rs.
//
// Plan. A block of 512 threads for each row; a few passes over the row, which stays in the second-level cache. Each warp
// owns a contiguous part of the vocabulary and reads 32 vectors of eight logits at once, so that whatever goes by the
// order of the tokens is found by its warp alone once the warps' sums are known.
// Weights exp((value - maximum) / temperature) are integers, in units of 2^-31: sums are exact in any order.
// Cuts (top_k, top_p) are found by a search over the bits of the values, four at a time, in an order of unsigned
// integers: a pass adds up what has each of the sixteen next digits.
// Values that masks, bias and penalties change are marked in a bitmap in shared memory, a byte a vector, and looked up
// in the row's sorted list when a marked vector is read.
// Shared memory: sums of warps, sixteen digits each, 2 KB; the bitmap, a byte for eight tokens.
// Bytes: 2 a logit and pass. Passes: one for the largest, two more for a draw; some twenty with both cuts. Limit: what
// one multiprocessor reads of the second-level cache; rows of a step run side by side.
#include "common.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 DIGITS = 16;
constexpr u32 NONE = 0xffffffffu;
constexpr u32 MOST_TOP = 32;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr u32 POSITIVE_INFINITY = 0xff800000u;  // as ordered bits
constexpr u32 NEGATIVE_INFINITY = 0x007fffffu;

// What is wanted of a row; sample/cuda.rs writes it.
struct Request {
    u32 known_token;        // whose log probability is wanted; NONE: a token is to be chosen
    float temperature;      // 0: the most likely token
    u32 top_k;              // 0: all
    float min_p_distance;   // temperature * ln(min_p); negative infinity: all
    u32 top_p_low, top_p_high;    // as a fraction of 2^64; all ones: all
    u32 uniform_low, uniform_high;  // likewise
    u32 first_adjustment, adjustments;
    u32 allowed;            // where the row's bits begin, in words; NONE: every token is allowed
    u32 top;                // tokens whose log probabilities are wanted, plus one; 0: none at all
};

struct Adjustment {
    u32 token;
    float bias;
    float penalty;          // divides values above 0, multiplies the others
    float subtrahend;
};

struct Result {
    u32 status;
    u32 token;
    float logprob;
    u32 rank;
    u32 top_tokens[MOST_TOP];
    float top_logprobs[MOST_TOP];
};
enum Status : u32 { CHOSEN, NOT_FINITE, NOTHING_LEFT };

// Bits of a float in the order of its values; a zero of either sign is one value.
NIBBLE_DEVICE u32 ordered(float value) {
    const u32 bits = float_bits(value + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
NIBBLE_DEVICE float value_of(u32 ordered) { return bits_float(ordered >> 31 ? ordered ^ 0x80000000u : ~ordered); }

// A value and its token as one integer: larger values first, of equal values lower tokens. A NaN comes before all.
NIBBLE_DEVICE u64 ranked(float value, u32 token) {
    const u32 bits = value == value ? ordered(value) : 0xffffffffu;
    return static_cast<u64>(bits) << 32 | static_cast<u32>(~token);
}
NIBBLE_DEVICE u32 token_of(u64 ranked) { return ~static_cast<u32>(ranked); }
NIBBLE_DEVICE u32 ordered_of(u64 ranked) { return static_cast<u32>(ranked >> 32); }

NIBBLE_DEVICE u64 shuffle_xor(u64 value, u32 mask) {
    const u32 low = shuffle_xor(static_cast<u32>(value), mask);
    return static_cast<u64>(shuffle_xor(static_cast<u32>(value >> 32), mask)) << 32 | low;
}
NIBBLE_DEVICE u64 shuffle(u64 value, u32 lane) {
    const u32 low = shuffle(static_cast<u32>(value), lane);
    return static_cast<u64>(shuffle(static_cast<u32>(value >> 32), lane)) << 32 | low;
}

// The last token that is kept, in the order of `ranked`.
struct Cut {
    u64 last;
    NIBBLE_DEVICE bool keeps(float value, u32 token) const { return ranked(value, token) >= last; }
};

template <class Element>
struct Sampler {
    const u16* logits;
    u32 vocabulary;
    const Adjustment* adjustments;
    u32 adjustment_count;
    const u8* allowed;     // a bit a token, or null
    u8* adjusted;          // in shared memory: a bit a token
    u64* sums;             // in shared memory: [DIGITS][WARPS]
    u32 lane, warp;
    u32 first_vector, end_vector;  // of this warp
    float scale;           // log2(e) / temperature
    float maximum;

    NIBBLE_DEVICE float adjust(u32 token, float value) const {
        u32 low = 0, high = adjustment_count;
        while (high - low > 1) {
            const u32 middle = (low + high) / 2;
            if (adjustments[middle].token <= token) {
                low = middle;
            } else {
                high = middle;
            }
        }
        const Adjustment found = adjustments[low];
        value += found.bias;
        value = value > 0.0f ? value / found.penalty : value * found.penalty;
        return value - found.subtrahend;
    }

    // Eight values: the model's own, or with masks, bias and penalties. Those past the end are negative infinity.
    template <bool own>
    NIBBLE_DEVICE void read(float (&values)[8], u32 vector) const {
        const u32 first = vector * 8;
        if (vocabulary % 8 == 0) {
            const Words4 words = load_16(logits + first);
            const u32 pairs[4] = {words.x, words.y, words.z, words.w};
            for (u32 i = 0; i < 4; ++i) {
                values[2 * i] = low_float<Element>(pairs[i]);
                values[2 * i + 1] = high_float<Element>(pairs[i]);
            }
        } else {
            for (u32 i = 0; i < 8; ++i) {
                values[i] = first + i < vocabulary ? Element::to_float(logits[first + i])
                                                   : value_of(NEGATIVE_INFINITY);
            }
        }
        if (own) {
            return;
        }
        if (adjustment_count > 0 && adjusted[vector] != 0) {
            for (u32 i = 0; i < 8; ++i) {
                if (adjusted[vector] >> i & 1) {
                    values[i] = adjust(first + i, values[i]);
                }
            }
        }
        if (allowed != nullptr && allowed[vector] != 0xff) {
            for (u32 i = 0; i < 8; ++i) {
                if ((allowed[vector] >> i & 1) == 0) {
                    values[i] = value_of(NEGATIVE_INFINITY);
                }
            }
        }
    }

    // Calls `visit(token, value)` for every token of this warp, and those past the end: a lane visits its own in their
    // order.
    template <bool own, class Visit>
    NIBBLE_DEVICE void each(Visit visit) const {
        for (u32 vector = first_vector + lane; vector < end_vector; vector += 32) {
            float values[8];
            read<own>(values, vector);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
                visit(vector * 8 + i, values[i]);
            }
        }
    }

    // Combines what each thread brings: all threads get the result.
    template <class T, class Combine>
    NIBBLE_DEVICE T reduce(T value, Combine combine) const {
#pragma unroll
        for (u32 distance = 16; distance > 0; distance /= 2) {
            value = combine(value, shuffle_xor(value, distance));
        }
        T* const parts = reinterpret_cast<T*>(sums);
        if (lane == 0) {
            parts[warp] = value;
        }
        block_barrier();
        value = parts[0];
        for (u32 other = 1; other < WARPS; ++other) {
            value = combine(value, parts[other]);
        }
        block_barrier();
        return value;
    }
    NIBBLE_DEVICE u64 largest(u64 value) const {
        return reduce(value, [](u64 a, u64 b) { return a > b ? a : b; });
    }
    NIBBLE_DEVICE u64 sum(u64 value) const {
        return reduce(value, [](u64 a, u64 b) { return a + b; });
    }

    // Says which values the row's list changes. Lists are sorted: the first of each word writes it.
    NIBBLE_DEVICE void mark_adjusted() const {
        u32* const words = reinterpret_cast<u32*>(adjusted);
        for (u32 i = thread_index(); i < (vocabulary + 31) / 32; i += THREADS) {
            words[i] = 0;
        }
        block_barrier();
        for (u32 i = thread_index(); i < adjustment_count; i += THREADS) {
            const u32 word = adjustments[i].token / 32;
            if (i > 0 && adjustments[i - 1].token / 32 == word) {
                continue;
            }
            u32 bits = 0;
            for (u32 j = i; j < adjustment_count && adjustments[j].token / 32 == word; ++j) {
                bits |= 1u << adjustments[j].token % 32;
            }
            words[word] = bits;
        }
        block_barrier();
    }

    // The first token, of those behind `before`.
    template <bool own>
    NIBBLE_DEVICE u64 first_token(u64 before = ~0ull) const {
        u64 best = 0;
        each<own>([&](u32 token, float value) {
            const u64 candidate = ranked(value, token);
            if (candidate > best && candidate < before) {
                best = candidate;
            }
        });
        return largest(best);
    }

    NIBBLE_DEVICE u64 weight(float value) const {
        return static_cast<u32>(exp2_fast((value - maximum) * scale) * 2147483648.0f);
    }

    // The token at which `amount(token, value)`, added up in the order of tokens, exceeds `target`.
    template <class Amount>
    NIBBLE_DEVICE u32 walk(u64 target, Amount amount) const {
        u64 own_sum = 0;
        each<false>([&](u32 token, float value) { own_sum += amount(token, value); });
#pragma unroll
        for (u32 distance = 16; distance > 0; distance /= 2) {
            own_sum += shuffle_xor(own_sum, distance);
        }
        if (lane == 0) {
            sums[warp] = own_sum;
        }
        block_barrier();
        u32 owner = 0;
        while (owner + 1 < WARPS && sums[owner] <= target) {
            target -= sums[owner];
            ++owner;
        }
        if (warp == owner) {
            u32 found = NONE;
            for (u32 start = first_vector; start < end_vector; start += 32) {
                const u32 vector = start + lane;
                u64 amounts[8] = {};
                u64 before = 0;
                if (vector < end_vector) {
                    float values[8];
                    read<false>(values, vector);
                    for (u32 i = 0; i < 8; ++i) {
                        amounts[i] = amount(vector * 8 + i, values[i]);
                        before += amounts[i];
                    }
                }
                const u64 own = before;
                for (u32 distance = 1; distance < 32; distance *= 2) {
                    const u64 lower = shuffle(before, lane >= distance ? lane - distance : lane);
                    before += lane >= distance ? lower : 0;
                }
                const u64 of_all = shuffle(before, 31);
                if (of_all <= target) {
                    target -= of_all;
                    continue;
                }
                before -= own;
                if (before <= target && before + own > target) {
                    for (u32 i = 0; i < 8; ++i) {
                        before += amounts[i];
                        if (before > target && found == NONE) {
                            found = vector * 8 + i;
                        }
                    }
                    sums[WARPS] = found;
                }
                break;
            }
        }
        block_barrier();
        const u32 found = static_cast<u32>(sums[WARPS]);
        block_barrier();
        return found;
    }

    // The cut of the shortest prefix whose amounts reach `target`, above 0 and at most the sum of all.
    template <class Amount>
    NIBBLE_DEVICE Cut shortest_prefix(u64 target, Amount amount) const {
        u32 found = 0;   // the bits of the last value that are known
        u64 above = 0;   // what values with larger bits amount to
        u64 equal = 0;
        for (u32 shift = 32; shift > 0;) {
            shift -= 4;
            u64 digits[DIGITS] = {};
            each<false>([&](u32, float value) {
                const u32 bits = ordered(value);
                // A shift by 32 has no effect of its own.
                if ((bits >> shift >> 4) == (found >> shift >> 4)) {
                    const u64 more = amount(value);
#pragma unroll
                    for (u32 digit = 0; digit < DIGITS; ++digit) {
                        digits[digit] += (bits >> shift & 15) == digit ? more : 0;
                    }
                }
            });
#pragma unroll
            for (u32 digit = 0; digit < DIGITS; ++digit) {
#pragma unroll
                for (u32 distance = 16; distance > 0; distance /= 2) {
                    digits[digit] += shuffle_xor(digits[digit], distance);
                }
                if (lane == 0) {
                    sums[digit * WARPS + warp] = digits[digit];
                }
            }
            block_barrier();
            u32 digit = DIGITS;
            do {
                --digit;
                equal = 0;
                for (u32 other = 0; other < WARPS; ++other) {
                    equal += sums[digit * WARPS + other];
                }
                if (above + equal >= target) {
                    break;
                }
                above += equal;
            } while (digit > 0);
            found |= digit << shift;
            block_barrier();
        }
        // Of tokens with equal values the first ones are kept, as many as it takes.
        const float last = value_of(found);
        const u64 of_one = amount(last);
        u32 token = NONE;
        if (target - above + of_one <= equal) {
            token = walk(target - above - 1, [&](u32, float value) {
                return ordered(value) == found ? of_one : 0;
            });
        }
        return Cut{ranked(last, token)};
    }

    // What the request asks for, in the order of the sampler on the host; `maximum` is set and finite.
    NIBBLE_DEVICE u32 draw(const Request& request) const {
        Cut cut{0};
        if (request.min_p_distance > value_of(NEGATIVE_INFINITY)) {
            cut.last = ranked(maximum + request.min_p_distance, NONE);
        }
        if (request.top_k > 0 && request.top_k < vocabulary) {
            const Cut by_count = shortest_prefix(request.top_k, [](float) { return 1ull; });
            cut.last = by_count.last > cut.last ? by_count.last : cut.last;
        }
        const auto kept_weight = [&](Cut by) {
            u64 own = 0;
            each<false>([&](u32 token, float value) { own += by.keeps(value, token) ? weight(value) : 0; });
            return sum(own);
        };
        u64 total = kept_weight(cut);
        const u64 top_p = static_cast<u64>(request.top_p_high) << 32 | request.top_p_low;
        if (top_p != ~0ull) {
            const u64 target = multiply_high(total, top_p);
            cut = shortest_prefix(target > 0 ? target : 1, [&](float value) { return weight(value); });
            total = kept_weight(cut);
        }
        const u64 uniform = static_cast<u64>(request.uniform_high) << 32 | request.uniform_low;
        return walk(multiply_high(total, uniform), [&](u32 token, float value) {
            return cut.keeps(value, token) ? weight(value) : 0;
        });
    }

    // Log probabilities of `token` and of the most likely tokens under the model's own distribution.
    NIBBLE_DEVICE u32 score(Result& result, u32 token, u32 top) const {
        u64 best = first_token<true>();
        const u32 largest_bits = ordered_of(best);
        if (largest_bits >= POSITIVE_INFINITY || largest_bits <= NEGATIVE_INFINITY) {
            return NOT_FINITE;
        }
        const float largest_value = value_of(largest_bits);
        const u64 place = ranked(Element::to_float(logits[token]), token);
        float own_sum = 0.0f;
        u64 before = 0;
        each<true>([&](u32 other, float value) {
            own_sum += exp2_fast((value - largest_value) * LOG2_E);
            before += ranked(value, other) > place ? 1 : 0;
        });
        const float total = reduce(own_sum, [](float a, float b) { return a + b; });
        const float log_total = log2_fast(total) * LN_2;
        const auto logprob = [&](float value) { return value - largest_value - log_total; };
        const u32 rank = static_cast<u32>(sum(before)) + 1;
        if (thread_index() == 0) {
            result.logprob = logprob(value_of(ordered_of(place)));
            result.rank = rank;
        }
        for (u32 i = 0; i < top; ++i) {
            if (i > 0) {
                best = first_token<true>(best);
            }
            if (thread_index() == 0) {
                result.top_tokens[i] = token_of(best);
                result.top_logprobs[i] = logprob(value_of(ordered_of(best)));
            }
        }
        return CHOSEN;
    }

    NIBBLE_DEVICE u32 choose(const Request& request, u32& token) {
        if (adjustment_count > 0) {
            mark_adjusted();
        }
        const u64 best = first_token<false>();
        const u32 bits = ordered_of(best);
        if (bits >= POSITIVE_INFINITY) {
            return NOT_FINITE;
        }
        if (bits <= NEGATIVE_INFINITY) {
            return NOTHING_LEFT;
        }
        token = token_of(best);
        if (request.temperature > 0.0f) {
            maximum = value_of(bits);
            scale = LOG2_E / request.temperature;
            token = draw(request);
        }
        return CHOSEN;
    }
};

template <class Element>
NIBBLE_DEVICE void sample(const u16* logits, const Request* requests, const Adjustment* adjustments, const u32* masks,
                          Result* results, u32 vocabulary) {
    start_after_previous_kernel();
    const u32 row = block_index_x();
    const Request request = requests[row];
    Sampler<Element> sampler;
    sampler.logits = logits + static_cast<u64>(row) * vocabulary;
    sampler.vocabulary = vocabulary;
    sampler.adjustments = adjustments + request.first_adjustment;
    sampler.adjustment_count = request.adjustments;
    sampler.allowed = request.allowed == NONE ? nullptr : reinterpret_cast<const u8*>(masks + request.allowed);
    sampler.sums = reinterpret_cast<u64*>(shared_memory());
    sampler.adjusted = shared_memory() + DIGITS * WARPS * sizeof(u64);
    sampler.lane = thread_index() % 32;
    sampler.warp = thread_index() / 32;
    const u32 vectors = (vocabulary + 7) / 8;
    const u32 of_a_warp = (vectors + WARPS - 1) / WARPS;
    sampler.first_vector = sampler.warp * of_a_warp;
    const u32 end = sampler.first_vector + of_a_warp;
    sampler.end_vector = end < vectors ? end : vectors;

    u32 token = request.known_token;
    u32 status = CHOSEN;
    if (token == NONE) {
        status = sampler.choose(request, token);
    }
    if (status == CHOSEN && request.top > 0) {
        status = sampler.score(results[row], token, request.top - 1);
    }
    if (thread_index() == 0) {
        results[row].status = status;
        results[row].token = token;
    }
}

#define SAMPLE(name, element)                                                                                     \
    NIBBLE_KERNEL(THREADS, 1)                                                                                     \
    name(const u16* logits, const Request* requests, const Adjustment* adjustments, const u32* masks,             \
         Result* results, u32 vocabulary) {                                                                       \
        sample<element>(logits, requests, adjustments, masks, results, vocabulary);                               \
    }

SAMPLE(sample_f16, F16)
SAMPLE(sample_bf16, BF16)
