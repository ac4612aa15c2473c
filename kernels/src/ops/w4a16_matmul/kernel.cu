// Activations times 4-bit weights. Compiled with ELEMENT (F16 or BF16), GROUP_SIZE (32, 64, or 128 for 128 and any
// multiple) and HAS_ZERO_POINTS (0 or 1) defined.
//
//   output[m, n] = sum over k of input[m, k] * (codes[n, k] - zero_points[n, g(k)]) * scales[n, g(k)] + bias[n]
//
// for one matrix or several with the same inputs (query, key and value), whose tiles are counted one matrix after the
// other.
//
// Plan. The weights are the 16-row operand of mma.m16n8k16 and the activations its 8-column operand, so that a batch
// of 8 wastes no tensor work. A block has 8 warps; a tile is 256 outputs, 32 a warp, times `rows` activation rows
// (8, 16, 32, 64 or 128), and walks along K in steps of 128 inputs. Every warp dequantizes its own weights, once.
//
//   Weights come packed by layout.rs in the order in which threads want them: of each 32 outputs and 128 inputs, lane
//   l reads four times 16 bytes, its fragments of 32 inputs. A thread copies to shared memory (cp.async) exactly what
//   it reads itself, so they need no barrier and no swizzle.
//   Activations of a step lie as [2][rows][64 elements], 16-byte chunk c of row r at c ^ (r & 7): ldmatrix reads
//   without conflicts. They are what the barrier of a step is for.
//   Dequantization: a word holds eight codes, code i of a register at bits 4i and 4i + 16, so that one LOP3 gives two
//   elements 1024 + q (or 1024 + 16 q, from the upper nibble; for bfloat16 128 + q). Subtracting the zero point is
//   exact; the product with the scale rounds once, to the element.
//   Accumulation in f32. On Hopper the products are a warpgroup's (wgmma): its four warps' tiles of sixteen outputs are
//   the 64 rows of an operand in registers, the activations are read from shared memory as they lie.
//
// The order of a row's terms depends on the weight's shape and the number of multiprocessors alone. All (tile, step)
// pairs lie on a line, tile after tile; worker w takes the pairs [w * share, (w + 1) * share), from the last to the
// first. So it first sums what belongs to a tile that the next worker finishes, and last what completes a tile that
// workers before it began: they have handed on their parts long ago. A tile's terms are added from the last step to
// the first within a part, and so are its parts. Two forms do this: `stream`, one block a worker, for batches that are
// bound by the weights' bytes; and `tiles`, one block an output tile, which adds the same parts one after the other,
// for large batches.
//
// The first stages' weights are copied before the kernel before has ended: the start of a launch costs less.
//
// Bytes of a step: 16 KiB of codes (+ 3 % scales) from memory, 256 * rows of activations from the L2 cache. Limit up
// to about 50 rows on an A100: memory. Beyond: tensor cores.

#include "common.cuh"
#include "warpgroup.cuh"

constexpr u32 threads = 256;
constexpr u32 warps = threads / 32;
constexpr u32 step_inputs = 128;
constexpr u32 strip_outputs = 32;
constexpr u32 tile_outputs = warps * strip_outputs;
constexpr u32 strip_step_bytes = strip_outputs * step_inputs / 2;
constexpr u32 groups_per_step = step_inputs / GROUP_SIZE;
constexpr u32 strip_scale_bytes = strip_outputs * 2;
constexpr u32 strip_zero_bytes = HAS_ZERO_POINTS ? strip_outputs : 0;

// Shared memory of a multiprocessor that blocks can use; cuda.rs counts with the same figures.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr u32 shared_limit = 99 * 1024;
#elif defined(NIBBLE_WARPGROUP)
constexpr u32 shared_limit = 227 * 1024;
#else
constexpr u32 shared_limit = 163 * 1024;
#endif

struct Matrix {
    const u8* codes;           // [strip][step][4][lane][16 bytes]
    const u16* scales;         // [strip][group][32]
    const u8* zero_points;     // [strip][group][32]
    const u16* bias;           // [n], or null
    u16* output;               // [m, n]
    u32 n;
    u32 first_tile;            // tiles of the matrices before it
};

struct Arguments {
    const u16* input;          // [m, k]
    float* partial_sums;       // [row block][worker][fragment][thread][4]; for `tiles` [block][fragment][thread][4]
    u32* arrivals;             // [row block][tile], zero before and after
    u32 m, k;
    u32 steps;                 // k / 128, rounded up
    u32 tiles;                 // n / 256, rounded up, of all matrices
    u32 groups;                // groups of a strip
    u32 steps_per_group;       // for groups above 128 inputs, else 1
    u32 share;                 // (tile, step) pairs of a worker
    Matrix first, second, third;  // where there are fewer, those missing begin behind the last tile

    // The matrix that a tile belongs to. Picked field by field: the arguments lie in constant memory.
    NIBBLE_DEVICE Matrix matrix_of(u32 tile) const {
        const bool is_third = tile >= third.first_tile, is_second = tile >= second.first_tile;
        return Matrix{
            is_third ? third.codes : is_second ? second.codes : first.codes,
            is_third ? third.scales : is_second ? second.scales : first.scales,
            is_third ? third.zero_points : is_second ? second.zero_points : first.zero_points,
            is_third ? third.bias : is_second ? second.bias : first.bias,
            is_third ? third.output : is_second ? second.output : first.output,
            is_third ? third.n : is_second ? second.n : first.n,
            is_third ? third.first_tile : is_second ? second.first_tile : first.first_tile,
        };
    }
};

template <u32 rows>
struct Form {
    static constexpr u32 activation_bytes = rows * step_inputs * 2;
    static constexpr u32 weight_bytes = warps * strip_step_bytes;
    static constexpr u32 scale_bytes = warps * groups_per_step * strip_scale_bytes;
    static constexpr u32 zero_bytes = warps * groups_per_step * strip_zero_bytes;
    static constexpr u32 stage_bytes =
        (activation_bytes + weight_bytes + scale_bytes + zero_bytes + 1023) / 1024 * 1024;
    static constexpr u32 stages_that_fit = shared_limit / stage_bytes;
    static constexpr u32 stages = stages_that_fit < 2 ? 2 : stages_that_fit > 6 ? 6 : stages_that_fit;
#if defined(NIBBLE_WARPGROUP)
    // Products of a step may still be under way in the next one, so a stage is overwritten two steps after its use.
    static constexpr u32 ahead = stages - 2;
    // Groups of products under way, each with its own registers of weights.
    static constexpr u32 groups_under_way = rows <= 32 ? 4 : 2;
#else
    static constexpr u32 ahead = stages - 1;
#endif
};

// A thread's sums: its strip's two tiles of sixteen outputs, times tiles of eight rows.
template <u32 rows>
using Sums = float[2][rows / 8][4];

// Turns codes into weights.
template <class Element>
struct Dequantizer;

template <>
struct Dequantizer<F16> {
    NIBBLE_DEVICE static void zeros(u32 (&zero)[4], u32 zero_points) {
#if HAS_ZERO_POINTS
        zero[0] = permute_bytes(zero_points, 0xe4e4e4e4u, 0x4040);
        zero[1] = F16::add(permute_bytes(zero_points, 0xe4e4e4e4u, 0x4141), 0x63806380u);  // -(1024 + z) + 960
        zero[2] = permute_bytes(zero_points, 0xe4e4e4e4u, 0x4242);
        zero[3] = F16::add(permute_bytes(zero_points, 0xe4e4e4e4u, 0x4343), 0x63806380u);
#else
        zero[0] = zero[2] = 0xe408e408u;  // -(1024 + 8)
        zero[1] = zero[3] = 0xd480d480u;  // -(64 + 8)
#endif
    }
    // The four registers of a 16x16 fragment: codes 0 and 2 belong to one output, 1 and 3 to the next.
    NIBBLE_DEVICE static void fragment(u32 (&a)[4], u32 word, u32 zero_even, u32 zero_odd, u32 scale_even,
                                       u32 scale_odd) {
        const u32 upper = word >> 8;
        // (word & mask) | 0x6400'6400: 1024 + q where q is in the low nibble, 1024 + 16 q in the high one.
        a[0] = F16::add(logic<0xea>(word, 0x000f000fu, 0x64006400u), zero_even);
        a[1] = F16::multiply_add(logic<0xea>(word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, zero_odd);
        a[2] = F16::add(logic<0xea>(upper, 0x000f000fu, 0x64006400u), zero_even);
        a[3] = F16::multiply_add(logic<0xea>(upper, 0x00f000f0u, 0x64006400u), 0x2c002c00u, zero_odd);
        a[0] = F16::multiply(a[0], scale_even);
        a[1] = F16::multiply(a[1], scale_odd);
        a[2] = F16::multiply(a[2], scale_even);
        a[3] = F16::multiply(a[3], scale_odd);
    }
};

template <>
struct Dequantizer<BF16> {
    NIBBLE_DEVICE static void zeros(u32 (&zero)[4], u32 zero_points) {
#if HAS_ZERO_POINTS
        zero[0] = permute_bytes(zero_points, 0xc3c3c3c3u, 0x4040);  // -(128 + z)
        zero[1] = permute_bytes(zero_points, 0xc3c3c3c3u, 0x4141);
        zero[2] = permute_bytes(zero_points, 0xc3c3c3c3u, 0x4242);
        zero[3] = permute_bytes(zero_points, 0xc3c3c3c3u, 0x4343);
#else
        zero[0] = zero[1] = zero[2] = zero[3] = 0xc308c308u;  // -(128 + 8)
#endif
    }
    NIBBLE_DEVICE static void fragment(u32 (&a)[4], u32 word, u32 zero_even, u32 zero_odd, u32 scale_even,
                                       u32 scale_odd) {
        // Seven bits of mantissa have no room for a nibble at bit 4, so each code is shifted down.
        a[0] = BF16::add(logic<0xea>(word, 0x000f000fu, 0x43004300u), zero_even);
        a[1] = BF16::add(logic<0xea>(word >> 4, 0x000f000fu, 0x43004300u), zero_odd);
        a[2] = BF16::add(logic<0xea>(word >> 8, 0x000f000fu, 0x43004300u), zero_even);
        a[3] = BF16::add(logic<0xea>(word >> 12, 0x000f000fu, 0x43004300u), zero_odd);
        a[0] = BF16::multiply(a[0], scale_even);
        a[1] = BF16::multiply(a[1], scale_odd);
        a[2] = BF16::multiply(a[2], scale_even);
        a[3] = BF16::multiply(a[3], scale_odd);
    }
};

// Where the copies of a thread come from and go to. A tile lies in the order in which it is walked, so pointers only
// move on.
template <u32 rows>
struct Loader {
    using F = Form<rows>;
    static constexpr u32 rows_at_once = threads / 16;
    static constexpr u32 chunks = rows / rows_at_once > 0 ? rows / rows_at_once : 1;
    static constexpr u32 scale_lanes = groups_per_step * strip_scale_bytes / 16;
    static constexpr u32 zero_lanes = groups_per_step * strip_zero_bytes / 16;

    const Arguments& arguments;
    const u8* codes;           // of this lane, at the step to come
    const u8* factors;         // scales or zero points of this lane
    const u8* activations;     // this thread's first chunk
    u32 strip_factor_bytes;    // of one group
    u32 to_codes, to_factors, to_activations;  // offsets in a stage
    u32 valid_chunks;          // this thread's chunks whose row exists, one after the other from the first
    u32 first_input;           // of the step to come, of this thread's chunk
    u32 tile;
    u32 step;                  // steps of the tile that are to come
    u32 steps_of_group;        // that are still to come

    // Begins with the step before `steps` of `tile`.
    NIBBLE_DEVICE Loader(const Arguments& arguments, u32 row_start, u32 tile, u32 steps)
        : arguments(arguments), tile(tile), step(steps) {
        const u32 first = steps - 1;
        const u32 thread = thread_index();
        const u32 row = thread / 16, chunk = thread % 16;
        const u32 row_in_matrix = row_start + row;
        const bool has_rows = row_in_matrix < arguments.m && (rows >= rows_at_once || row < rows);
        valid_chunks = has_rows ? (arguments.m - row_in_matrix + rows_at_once - 1) / rows_at_once : 0;
        first_input = first * step_inputs + chunk * 8;
        activations = reinterpret_cast<const u8*>(arguments.input) +
                      (static_cast<u64>(row_in_matrix) * arguments.k + first_input) * 2;
        to_activations = (chunk / 8) * (rows * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;

        enter_weights();
    }

    // Goes to the weights of the last of the tile's steps that are to come.
    NIBBLE_DEVICE void enter_weights() {
        const u32 first = step - 1;
        const u32 lane = thread_index() % 32, warp = thread_index() / 32;
        const Matrix matrix = arguments.matrix_of(tile);
        const u64 strip = (tile - matrix.first_tile) * warps + warp;
        codes = matrix.codes + (strip * arguments.steps + first) * strip_step_bytes + lane * 16;
        to_codes = F::activation_bytes + warp * strip_step_bytes + lane * 16;

        const u32 group = first / arguments.steps_per_group * groups_per_step;
        steps_of_group = first % arguments.steps_per_group + 1;
        const u64 first_group = strip * arguments.groups + group;
        if (HAS_ZERO_POINTS && lane >= scale_lanes) {
            const u32 at = (lane - scale_lanes) * 16;
            strip_factor_bytes = strip_zero_bytes;
            factors = matrix.zero_points + first_group * strip_zero_bytes + at;
            to_factors = F::activation_bytes + F::weight_bytes + F::scale_bytes + warp * (zero_lanes * 16) + at;
        } else {
            strip_factor_bytes = strip_scale_bytes;
            factors = reinterpret_cast<const u8*>(matrix.scales) + first_group * strip_scale_bytes + lane * 16;
            to_factors = F::activation_bytes + F::weight_bytes + warp * (scale_lanes * 16) + lane * 16;
        }
    }

    // Starts a quarter of the copies of one step into `stage`.
    NIBBLE_DEVICE void load_part(u8* stage, u32 part) const {
        load_weights(stage, part);
        load_activations(stage, part);
    }

    NIBBLE_DEVICE void load_weights(u8* stage, u32 part) const {
        async_copy_16(stage + to_codes + part * 512, codes + part * 512);
        if (part == 0 && thread_index() % 32 < scale_lanes + zero_lanes) {
            async_copy_16(stage + to_factors, factors);
        }
    }

    NIBBLE_DEVICE void load_activations(u8* stage, u32 part) const {
        if (rows >= rows_at_once || thread_index() < rows * 16) {
            const u32 chunks_to_read = first_input < arguments.k ? valid_chunks : 0;
#pragma unroll
            for (u32 chunk = 0; chunk < chunks; ++chunk) {
                if (chunk * 4 / chunks == part) {
                    async_copy_16(stage + to_activations + chunk * (rows_at_once * 128),
                                  activations + static_cast<u64>(arguments.k) * (chunk * rows_at_once * 2), chunk < chunks_to_read);
                }
            }
        }
    }

    // Moves on to the step before, within the tile.
    NIBBLE_DEVICE void advance() {
        --step;
        codes -= strip_step_bytes;
        activations -= step_inputs * 2;
        first_input -= step_inputs;
        if (--steps_of_group == 0) {
            steps_of_group = arguments.steps_per_group;
            factors -= strip_factor_bytes * groups_per_step;
        }
    }

    // Moves on to the last step of the tile before, once all of this tile's are under way.
    NIBBLE_DEVICE void enter_tile_before() {
        --tile;
        step = arguments.steps;
        first_input += step * step_inputs;
        activations += static_cast<u64>(step) * (step_inputs * 2);
        enter_weights();
    }

    // Moves on to the step before, of any tile.
    NIBBLE_DEVICE void advance_over_tiles() {
        advance();
        if (step == 0) {
            enter_tile_before();
        }
    }
};

// Waits until the copies of the step to come are there, for all threads to see.
template <u32 ahead>
NIBBLE_DEVICE void stage_ready() {
    async_wait<ahead - 1>();
#if defined(NIBBLE_WARPGROUP)
    shared_proxy_fence();
#endif
    block_barrier();
}

// Waits until `sums` is complete.
NIBBLE_DEVICE void products_done() {
#if defined(NIBBLE_WARPGROUP)
    warpgroup_wait<0>();
#endif
}

// A warp's weights of a step, sixteen inputs at a time, in order.
template <class Element, u32 rows>
struct WeightReader {
    using F = Form<rows>;
#if defined(NIBBLE_WARPGROUP)
    static constexpr bool reads_ahead = true;
#else
    // The largest form has no registers for it.
    static constexpr bool reads_ahead = rows < 128;
#endif
    const u8* codes;
    const u8* scales;
    const u8* zero_points;
    Words4 words, next_words;
    u32 zero[4];   // -(magic + zero point) of this thread's four outputs, twice
    u32 scale[4];  // their scales, twice

    NIBBLE_DEVICE explicit WeightReader(const u8* stage) {
        const u32 lane = thread_index() % 32, warp = thread_index() / 32;
        codes = stage + F::activation_bytes + warp * strip_step_bytes + lane * 16;
        scales = stage + F::activation_bytes + F::weight_bytes + warp * (groups_per_step * strip_scale_bytes) +
                 lane / 4 * 8;
        zero_points = stage + F::activation_bytes + F::weight_bytes + F::scale_bytes +
                      warp * (groups_per_step * strip_zero_bytes) + lane / 4 * 4;
        if (reads_ahead) {
            next_words = load_16(codes);
        }
    }

    // The two 16x16 operands of sixteen inputs; `sixteen` counts from 0 to 7.
    NIBBLE_DEVICE void read(u32 (&weights)[2][4], u32 sixteen) {
        const u32 part = sixteen / 2;
        if (sixteen % 2 == 0) {
            words = reads_ahead ? next_words : load_16(codes + part * 512);
            if (reads_ahead && part < 3) {
                next_words = load_16(codes + (part + 1) * 512);
            }
            if (part * groups_per_step % 4 == 0) {
                read_group(part * groups_per_step / 4);
            }
        }
        const u32 even = sixteen % 2 == 0 ? words.x : words.z, odd = sixteen % 2 == 0 ? words.y : words.w;
        Dequantizer<Element>::fragment(weights[0], even, zero[0], zero[1], scale[0], scale[1]);
        Dequantizer<Element>::fragment(weights[1], odd, zero[2], zero[3], scale[2], scale[3]);
    }

    NIBBLE_DEVICE void read_group(u32 group) {
        const Words2 pairs = load_8(scales + group * strip_scale_bytes);
        scale[0] = permute_bytes(pairs.x, 0, 0x1010);
        scale[1] = permute_bytes(pairs.x, 0, 0x3232);
        scale[2] = permute_bytes(pairs.y, 0, 0x1010);
        scale[3] = permute_bytes(pairs.y, 0, 0x3232);
        u32 zeros = 0;
        if (HAS_ZERO_POINTS) {
            zeros = *reinterpret_cast<const u32*>(zero_points + group * strip_zero_bytes);
        }
        Dequantizer<Element>::zeros(zero, zeros);
    }
};

#if defined(NIBBLE_WARPGROUP)

// Adds the products of one step to `sums`; meanwhile, if there are more, starts the copies of another.
template <class Element, u32 rows>
NIBBLE_DEVICE void multiply_step(Sums<rows>& sums, const u8* stage, const Loader<rows>& loader,
                                 u8* load_stage, bool more) {
    using F = Form<rows>;
    const u64 columns = swizzled_columns(stage);
    WeightReader<Element, rows> reader(stage);
    u32 weights[F::groups_under_way][2][4];
#pragma unroll
    for (u32 sixteen = 0; sixteen < 8; ++sixteen) {
        if (more && sixteen % 2 == 0) {
            loader.load_part(load_stage, sixteen / 2);
        }
        u32(&operand)[2][4] = weights[sixteen % F::groups_under_way];
        reader.read(operand, sixteen);
        warpgroup_fence();
        const u64 at = columns + chunk_step * (sixteen / 4 * (rows * 8) + sixteen % 4 * 2);
        WarpgroupProduct<Element, rows>::add(sums[0], operand[0], at);
        WarpgroupProduct<Element, rows>::add(sums[1], operand[1], at);
        warpgroup_commit();
        warpgroup_wait<F::groups_under_way - 1>();
    }
}

#else

// The activations of a step as operands: for each sixteen inputs, pairs of tiles of eight rows (with eight rows in all:
// for each pair of sixteen inputs, one tile).
template <u32 rows>
struct ActivationReader {
    static constexpr u32 per_sixteen = rows == 8 ? 1 : rows / 16;
    static constexpr u32 fragments = rows == 8 ? 4 : 8 * per_sixteen;
    const u8* activations;  // the row this lane addresses
    u32 row, chunk;

    NIBBLE_DEVICE explicit ActivationReader(const u8* stage) {
        const u32 lane = thread_index() % 32;
        // The four matrices of a load are (row half, input half) = 00, 01, 10, 11; with eight rows, four input chunks.
        row = lane % 8 + (rows == 8 ? 0 : lane / 16 * 8);
        chunk = rows == 8 ? lane / 8 : lane / 8 % 2;
        activations = stage + row * 128;
    }

    NIBBLE_DEVICE void read(u32 (&fragment)[4], u32 index) const {
        const u32 first_chunk = rows == 8 ? index * 4 : index / per_sixteen * 2;
        const u32 pair = index % per_sixteen;
        load_matrix_x4(fragment, activations + first_chunk / 8 * (rows * 128) + pair * (16 * 128) +
                                     ((first_chunk % 8 + chunk) ^ (row % 8)) * 16);
    }
};

// Adds the products of one step to `sums`; meanwhile, if there are more, starts the copies of another. Operands are
// read ahead of their use.
template <class Element, u32 rows>
NIBBLE_DEVICE void multiply_step(Sums<rows>& sums, const u8* stage, const Loader<rows>& loader,
                                 u8* load_stage, bool more) {
    using Activations = ActivationReader<rows>;
    constexpr u32 ahead = rows >= 128 ? 1 : 2;
    constexpr u32 ring = ahead * 2;
    WeightReader<Element, rows> reader(stage);
    const Activations activations(stage);
    u32 columns[ring][4];
    u32 weights[2][2][4];
    for (u32 index = 0; index < ahead; ++index) {
        activations.read(columns[index], index);
    }
    reader.read(weights[0], 0);
#pragma unroll
    for (u32 sixteen = 0; sixteen < 8; ++sixteen) {
        if (more && sixteen % 2 == 0) {
            loader.load_part(load_stage, sixteen / 2);
        }
        if (sixteen < 7) {
            reader.read(weights[(sixteen + 1) % 2], sixteen + 1);
        }
        const u32(&operand)[2][4] = weights[sixteen % 2];
        if (rows == 8) {
            const u32 index = sixteen / 2;
            if (sixteen % 2 == 0 && index + ahead < Activations::fragments) {
                activations.read(columns[(index + ahead) % ring], index + ahead);
            }
            const u32(&fragment)[4] = columns[index % ring];
            const u32 first = sixteen % 2 * 2;
            Element::multiply_matrices(sums[0][0], operand[0], fragment[first], fragment[first + 1]);
            Element::multiply_matrices(sums[1][0], operand[1], fragment[first], fragment[first + 1]);
        } else {
#pragma unroll
            for (u32 pair = 0; pair < Activations::per_sixteen; ++pair) {
                const u32 index = sixteen * Activations::per_sixteen + pair;
                if (index + ahead < Activations::fragments) {
                    activations.read(columns[(index + ahead) % ring], index + ahead);
                }
                const u32(&fragment)[4] = columns[index % ring];
#pragma unroll
                for (u32 tile = 0; tile < 2; ++tile) {
                    Element::multiply_matrices(sums[tile][pair * 2], operand[tile], fragment[0], fragment[1]);
                    Element::multiply_matrices(sums[tile][pair * 2 + 1], operand[tile], fragment[2], fragment[3]);
                }
            }
        }
    }
}

#endif

// Writes a finished tile. A thread holds, for each of its rows, four outputs one after the other.
template <class Element, u32 rows>
NIBBLE_DEVICE void write_output(const Arguments& arguments, const Sums<rows>& sums, u32 row_start,
                                u32 tile) {
    const u32 lane = thread_index() % 32, warp = thread_index() / 32;
    const Matrix matrix = arguments.matrix_of(tile);
    const u32 output = (tile - matrix.first_tile) * tile_outputs + warp * strip_outputs + lane / 4 * 4;
    float bias[4] = {};
    if (matrix.bias != nullptr) {
        for (u32 i = 0; i < 4; ++i) {
            bias[i] = output + i < matrix.n ? Element::to_float(matrix.bias[output + i]) : 0.0f;
        }
    }
    for (u32 column = 0; column < rows / 8; ++column) {
        for (u32 side = 0; side < 2; ++side) {
            const u32 row = row_start + column * 8 + lane % 4 * 2 + side;
            if (row >= arguments.m) {
                continue;
            }
            const float values[4] = {sums[0][column][side] + bias[0], sums[0][column][side + 2] + bias[1],
                                     sums[1][column][side] + bias[2], sums[1][column][side + 2] + bias[3]};
            u16* to = matrix.output + static_cast<u64>(row) * matrix.n + output;
            if (output + 4 <= matrix.n && matrix.n % 4 == 0) {
                store_8(to, Words2{Element::pack(values[0], values[1]), Element::pack(values[2], values[3])});
            } else {
                for (u32 i = 0; i < 4; ++i) {
                    if (output + i < matrix.n) {
                        to[i] = Element::from_float(values[i]);
                    }
                }
            }
        }
    }
}

template <u32 rows>
NIBBLE_DEVICE void clear(Sums<rows>& sums) {
    for (u32 tile = 0; tile < 2; ++tile) {
        for (u32 column = 0; column < rows / 8; ++column) {
            for (u32 i = 0; i < 4; ++i) {
                sums[tile][column][i] = 0.0f;
            }
        }
    }
}

// A slot of partial sums: [fragment][thread][4 floats].
template <u32 rows>
NIBBLE_DEVICE void write_slot(float* slot, const Sums<rows>& sums) {
    for (u32 tile = 0; tile < 2; ++tile) {
        for (u32 column = 0; column < rows / 8; ++column) {
            const float(&four)[4] = sums[tile][column];
            store_16(slot + ((tile * (rows / 8) + column) * threads + thread_index()) * 4,
                     Words4{float_bits(four[0]), float_bits(four[1]), float_bits(four[2]), float_bits(four[3])});
        }
    }
}

template <u32 rows>
constexpr u32 slot_floats = rows * tile_outputs;

template <u32 rows>
NIBBLE_DEVICE void read_fragment(float (&four)[4], const float* slot, u32 fragment) {
    const Words4 words = load_16_of_other_block(slot + (fragment * threads + thread_index()) * 4);
    four[0] = bits_float(words.x);
    four[1] = bits_float(words.y);
    four[2] = bits_float(words.z);
    four[3] = bits_float(words.w);
}

// slot + sums, in place.
template <u32 rows>
NIBBLE_DEVICE void add_slot(Sums<rows>& sums, const float* slot) {
#pragma unroll
    for (u32 tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (u32 column = 0; column < rows / 8; ++column) {
            float before[4];
            read_fragment<rows>(before, slot, tile * (rows / 8) + column);
            for (u32 i = 0; i < 4; ++i) {
                sums[tile][column][i] = before[i] + sums[tile][column][i];
            }
        }
    }
}

// Stores a part of `tile` for the worker that finishes it.
template <u32 rows>
NIBBLE_DEVICE void hand_on(const Arguments& arguments, const Sums<rows>& sums, u32 tile) {
    const u32 slot = block_index_y() * grid_size_x() + block_index_x();
    write_slot<rows>(arguments.partial_sums + static_cast<u64>(slot) * slot_floats<rows>, sums);
    device_fence();
    block_barrier();
    if (thread_index() == 0) {
        atomic_add(arguments.arrivals + block_index_y() * arguments.tiles + tile, 1);
    }
}

// Adds to this worker's part of `tile`, the last along K, those of the workers before it, in their order.
template <u32 rows>
NIBBLE_DEVICE void take_over(const Arguments& arguments, Sums<rows>& sums, u32 tile) {
    const u32 first = tile * arguments.steps / arguments.share;
    u32* const arrivals = arguments.arrivals + block_index_y() * arguments.tiles + tile;
    if (thread_index() == 0) {
        wait_for_lower_blocks(arrivals, block_index_x() - first);
        *arrivals = 0;
    }
    block_barrier();
    device_fence();
    const float* slots = arguments.partial_sums + static_cast<u64>(block_index_y()) * grid_size_x() * slot_floats<rows>;
    for (u32 worker = block_index_x(); worker-- > first;) {
        add_slot<rows>(sums, slots + static_cast<u64>(worker) * slot_floats<rows>);
    }
}

// The steps of a block, one after the other: multiplies one while those ahead are being copied.
template <class Element, u32 rows>
struct Pipeline {
    using F = Form<rows>;
    Loader<rows> loader;
    u32 to_load;
    u8* const shared;
    u32 stage, load_stage;

    // Walks over `count` steps, from step `steps - 1` of `tile` on. The first weights are under way before the kernel
    // before has ended, whose output the activations are.
    NIBBLE_DEVICE Pipeline(const Arguments& arguments, u32 row_start, u32 tile, u32 steps, u32 count)
        : loader(arguments, row_start, tile, steps), to_load(count), shared(shared_memory()), stage(0),
          load_stage(F::ahead) {
        const u32 first = count < F::ahead ? count : F::ahead;
        Loader<rows> weights = loader;
        for (u32 ahead = 0; ahead < first; ++ahead) {
            for (u32 part = 0; part < 4; ++part) {
                weights.load_weights(shared + ahead * F::stage_bytes, part);
            }
            if (ahead + 1 < first) {
                weights.advance_over_tiles();
            }
        }
        wait_for_previous_kernel();
        for (u32 ahead = 0; ahead < F::ahead; ++ahead) {
            if (ahead < first) {
                for (u32 part = 0; part < 4; ++part) {
                    loader.load_activations(shared + ahead * F::stage_bytes, part);
                }
                if (--to_load > 0) {
                    loader.advance_over_tiles();
                }
            }
            async_commit();
        }
    }

    // Adds the products of `count` steps to `sums`.
    NIBBLE_DEVICE void multiply(Sums<rows>& sums, u32 count) {
        do {
            if (loader.step == 0 && to_load > 0) {
                loader.enter_tile_before();
            }
            const u32 loads = loader.step < to_load ? loader.step : to_load;
            const bool more = loads > 0;
            const u32 run = more && loads < count ? loads : count;
            u32 rest = run;
            do {
                stage_ready<F::ahead>();
                multiply_step<Element, rows>(sums, shared + stage * F::stage_bytes, loader,
                                             shared + load_stage * F::stage_bytes, more);
                loader.advance();
                async_commit();
                stage = stage + 1 == F::stages ? 0 : stage + 1;
                load_stage = load_stage + 1 == F::stages ? 0 : load_stage + 1;
            } while (--rest > 0);
            products_done();
            to_load -= more ? run : 0;
            count -= run;
        } while (count > 0);
    }
};

// One block a worker and row block: grid (workers, row blocks).
template <class Element, u32 rows>
NIBBLE_DEVICE void stream(const Arguments& arguments) {
    let_next_kernel_start();
    const u32 units = arguments.tiles * arguments.steps;
    const u32 start = block_index_x() * arguments.share;
    const u32 row_start = block_index_y() * rows;
    const u32 end = start + arguments.share < units ? start + arguments.share : units;
    u32 tile = (end - 1) / arguments.steps;
    u32 step_end = end - tile * arguments.steps;
    u32 left = end - start;

    Pipeline<Element, rows> pipeline(arguments, row_start, tile, step_end, left);
    Sums<rows> sums;
    while (left > 0) {
        const u32 part = step_end < left ? step_end : left;
        clear<rows>(sums);
        pipeline.multiply(sums, part);
        if (step_end < arguments.steps) {
            hand_on<rows>(arguments, sums, tile);
        } else {
            if (part < arguments.steps) {
                take_over<rows>(arguments, sums, tile);
            }
            write_output<Element, rows>(arguments, sums, row_start, tile);
        }
        left -= part;
        --tile;
        step_end = arguments.steps;
    }
}

// One block walks over output tiles: grid (blocks). Row blocks of one tile of outputs come one after the other, so
// that blocks that run at the same time share its weights in the L2 cache.
template <class Element, u32 rows>
NIBBLE_DEVICE void tiles(const Arguments& arguments) {
    let_next_kernel_start();
    const u32 row_blocks = (arguments.m + rows - 1) / rows;
    float* const totals = arguments.partial_sums + static_cast<u64>(block_index_x()) * slot_floats<rows>;
    for (u32 job = block_index_x(); job < row_blocks * arguments.tiles; job += grid_size_x()) {
        const u32 tile = job / row_blocks, row_start = job % row_blocks * rows;
        block_barrier();
        Pipeline<Element, rows> pipeline(arguments, row_start, tile, arguments.steps, arguments.steps);
        Sums<rows> sums;
        u32 part = ((tile + 1) * arguments.steps - 1) % arguments.share + 1;
        for (u32 step_end = arguments.steps; step_end > 0;) {
            part = part < step_end ? part : step_end;
            clear<rows>(sums);
            pipeline.multiply(sums, part);
            if (step_end < arguments.steps) {
                add_slot<rows>(sums, totals);
            }
            step_end -= part;
            if (step_end > 0) {
                write_slot<rows>(totals, sums);
            }
            part = arguments.share;
        }
        write_output<Element, rows>(arguments, sums, row_start, tile);
    }
}

NIBBLE_BLOCKS_START_IN_ORDER

#define W4A16_MATRIX_PARAMETERS(i)                                                                                  \
    const u8 *codes_##i, const u16 *scales_##i, const u8 *zero_points_##i, const u16 *bias_##i, u16 *output_##i,    \
        u32 n_##i, u32 first_tile_##i
#define W4A16_MATRIX(i) \
    Matrix { codes_##i, scales_##i, zero_points_##i, bias_##i, output_##i, n_##i, first_tile_##i }
#define W4A16_PARAMETERS                                                                                           \
    const u16 *input, float *partial_sums, u32 *arrivals, u32 m, u32 k, u32 steps, u32 output_tiles, u32 groups,   \
        u32 steps_per_group, u32 share, W4A16_MATRIX_PARAMETERS(1), W4A16_MATRIX_PARAMETERS(2),                    \
        W4A16_MATRIX_PARAMETERS(3)
#define W4A16_ARGUMENTS                                                                                            \
    Arguments{input,  partial_sums,    arrivals, m,               k,               steps,          output_tiles,   \
              groups, steps_per_group, share,    W4A16_MATRIX(1), W4A16_MATRIX(2), W4A16_MATRIX(3)}

NIBBLE_KERNEL(threads, 1) w4a16_stream_8(W4A16_PARAMETERS) { stream<ELEMENT, 8>(W4A16_ARGUMENTS); }
NIBBLE_KERNEL(threads, 1) w4a16_stream_16(W4A16_PARAMETERS) { stream<ELEMENT, 16>(W4A16_ARGUMENTS); }
NIBBLE_KERNEL(threads, 1) w4a16_stream_32(W4A16_PARAMETERS) { stream<ELEMENT, 32>(W4A16_ARGUMENTS); }
NIBBLE_KERNEL(threads, 1) w4a16_stream_64(W4A16_PARAMETERS) { stream<ELEMENT, 64>(W4A16_ARGUMENTS); }
NIBBLE_KERNEL(threads, 1) w4a16_stream_128(W4A16_PARAMETERS) { stream<ELEMENT, 128>(W4A16_ARGUMENTS); }
NIBBLE_KERNEL(threads, 1) w4a16_tiles_128(W4A16_PARAMETERS) { tiles<ELEMENT, 128>(W4A16_ARGUMENTS); }

// permuted[m, p] = input[m, permutation[p]]: grid (inputs / threads, rows).
NIBBLE_KERNEL(threads, 1) w4a16_permute_inputs(const u16* input, const u32* permutation, u16* permuted, u32 k) {
    start_after_previous_kernel();
    const u32 position = block_index_x() * threads + thread_index();
    if (position < k) {
        const u64 row = static_cast<u64>(block_index_y()) * k;
        permuted[row + position] = input[row + permutation[position]];
    }
}
