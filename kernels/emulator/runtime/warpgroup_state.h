// What a warp keeps of its products of a warpgroup; they are carried out in warpgroup.h.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

// A product that was started by all lanes of a warp.
struct WarpgroupProduct {
    float* sums[32];
    const uint32_t* a[32];
    uint64_t b;
    uint32_t columns;
    bool bfloat;
    uint32_t stamp;
};

// What a warp has started and not waited for.
struct WarpgroupState {
    std::vector<WarpgroupProduct> products;
    std::vector<uint32_t> group_ends;
    // The true sums of the products under way, by the address of lane 0's: [lane][columns / 8 * 4].
    struct Accumulator {
        float* key;
        std::vector<float> values;
        uint32_t under_way;
    };
    std::vector<Accumulator> accumulators;
    bool fenced = false;

    void clear() {
        products.clear();
        group_ends.clear();
        accumulators.clear();
        fenced = false;
    }
};

}  // namespace emulator
