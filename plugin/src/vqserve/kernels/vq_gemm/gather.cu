// Routed experts for any number of tokens: pairs of token and expert grouped by expert, codewords gathered straight
// into the registers of tensor cores.
//
// A warp owns 32 rows of a matrix and up to TOKENS tokens; a block is WARPS warps, which share a codebook and the
// activations. Weights are the right factor of m16n8k16, so that what a thread holds for eight rows are four columns of
// one: one codeword of d = 4 weights, or half of one of d = 8. A code costs one read of shared memory, 8 or 16 bytes,
// and lies where the tensor core wants it. (As the left factor it would not: four registers from two codewords.) Which
// four columns a thread's share is, is free as long as weights and activations agree; it is chosen so that four codes
// of a row are one 32-bit word. So activations have an order of columns of their own, `column_at`, by d.
//
// Codebooks lie in shared memory 16 (d = 4) or 8 (d = 8) times, interleaved, so that the threads that are served at a
// time read from different banks whatever their codes are: 128 bytes per codeword.
//
// While a group of 128 columns is multiplied, activations, codes and scales of the next are copied into shared memory.
// Planes are in the order of kernels/repack/order.py: a row's codes are rotated by its number, so a word is put
// together from two neighbours' (one shuffle, one shift). Sums are fp32 and in units of the group's scales, to which
// they are brought before each group: a second set, of the group alone, would leave registers for half as many tokens.
// The order of summation depends on nothing but the sizes.
//
// Kernels: `group` (up to 1024 pairs), `to_half`, `gate_up`, `level`, `down`, `combine`. TOKENS and WARPS are defined
// per compilation.

#include "device.cuh"

#ifndef TOKENS
#define TOKENS 8
#endif
#ifndef WARPS
#define WARPS 4
#endif
#define TILES ((TOKENS + 15) / 16)    // of 16 tokens
#define EIGHTS (TOKENS == 8 ? 1 : 2)  // of tokens in a tile
#define THREADS (32 * WARPS)
#define ROWS (32 * WARPS)
#define STRIDE 272  // bytes from token to token in shared memory: eight neighbours read different banks
#define PASSES ((TOKENS * 16 + THREADS - 1) / THREADS)
#define MAX_PAIRS 1024
#define MAX_EXPERTS 512
// Per multiprocessor, as was fastest on an H200.
#define BLOCKS (WARPS == 8 ? 1 : TOKENS == 8 ? 4 : TOKENS == 64 ? 2 : 3)

__device__ __forceinline__ u16 float_to_half(float value) {
    u16 bits;
    asm("{.reg .f16 h; cvt.rn.f16.f32 h, %1; mov.b16 %0, h;}" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ u32 add_halves(u32 a, u32 b) {
    u32 sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}

__device__ __forceinline__ u32 multiply_halves(u32 a, u32 b) {
    u32 product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// c += a b: a 16 tokens x 16 columns, b 16 columns x 8 rows of weights.
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A tile's tokens times 16 columns; `from`: a thread's row of one of these matrices of 8 x 8 in shared memory.
__device__ __forceinline__ void load_matrices(u32 (&a)[4], u32 from) {
#if TOKENS == 8
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(a[0]), "=r"(a[2]) : "r"(from));
    a[1] = a[3] = 0;
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(from));
#endif
}

// Powers of two that bring numbers of at most `most` below 2^11, near it, and back.
__device__ __forceinline__ float up_factor(float most) {
    const u32 exponent = max(__float_as_uint(most) >> 23 & 255, 11);
    return __uint_as_float((264 - exponent) << 23);
}
__device__ __forceinline__ float down_factor(float most) {
    const u32 exponent = max(__float_as_uint(most) >> 23 & 255, 11);
    return __uint_as_float((exponent - 10) << 23);
}

// Where a column of a group of 128 lies in activations for matrices of codewords of D: what a warp multiplies at a time
// is 32 bytes, and in both halves of them each quarter's two columns are neighbours.
template <int D>
__device__ __forceinline__ int column_at(int c) {
    if (D == 4) return c & 64 | (c >> 2 & 3) << 4 | (c >> 1 & 1) << 3 | (c >> 4 & 3) << 1 | c & 1;
    return (c >> 3 & 3) << 5 | (c >> 2 & 1) << 4 | (c >> 1 & 1) << 3 | c >> 5 << 1 | c & 1;
}

// What a block multiplies at a time, 128 columns: its tokens' activations, and its warps' codes as they lie in planes.
struct Stage {
    u8 x[TOKENS * STRIDE];
    u8 codes[WARPS][1024], refinements[WARPS][512], scales[WARPS][64];
};

struct Memory {
    u8 base[256 * 128];
    u8 refinement[16 * 128];
    float most[WARPS][TOKENS];  // per warp: largest magnitude of h
    Stage stages[2];            // used in turn
};

__device__ __forceinline__ void copy(void* to, const u8* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from));
}

// Where stages come from.
struct Source {
    const u8 *x, *codes, *refinements, *scales;
    u32 row[PASSES];  // bytes to where this thread's part of each of its tokens begins

    __device__ __forceinline__ void set(const Planes& planes, int4 at) {
        codes = planes.codes + (i64)at.y * 64;
        refinements = planes.refinements + (i64)at.z * 64;
        scales = (const u8*)(planes.scales + (i64)at.w * 32);
    }

    // Begins to copy a group; `some`: this warp has rows, from 32 * block on; `alone`: the group is a last half strip.
    template <int D, bool REFINED>
    __device__ __forceinline__ void load(Stage& to, int group, int block, int blocks, bool some, bool alone) const {
        const u32 i = threadIdx.x, warp = i >> 5, lane = i & 31, tile = lane >> 4;
        #pragma unroll
        for (int pass = 0; pass < PASSES; pass++)
            if (TOKENS * 16 >= THREADS || i < TOKENS * 16)
                copy(to.x + (pass * (THREADS / 16) + (i >> 4)) * STRIDE + (i & 15) * 16, x + (row[pass] + group * 256));
        if (!some) return;
        const u32 strip = D == 4 ? group : group >> 1, at = lane * 16;
        if constexpr (D == 4) {
            const u8* from = codes + ((strip * blocks + block) * 1024 + at);
            copy(to.codes[warp] + at, from);
            copy(to.codes[warp] + at + 512, from + 512);
        } else {
            const u32 phase = group & 1 ^ tile;
            copy(to.codes[warp] + at, codes + (alone ? (strip * blocks * 2 + block) * 512 + at
                                                     : (strip * blocks + block) * 1024 + phase * 512 + at));
        }
        if constexpr (REFINED) {
            if (!alone) copy(to.refinements[warp] + at, refinements + ((strip * blocks + block) * 512 + at));
            else if (lane < 16) copy(to.refinements[warp] + at, refinements + ((strip * blocks * 2 + block) * 256 + at));
        }
        if (lane < 4) copy(to.scales[warp] + at, scales + ((group * blocks + block) * 64 + at));
    }
};

// What was asked for is there, for all threads, and nobody reads the other stage.
__device__ __forceinline__ void arrive() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
}

// The codebook of a tier into shared memory, every codeword 128 / (2 d) times.
template <int D>
__device__ void load_codebook(Memory& m, const u16* codebook, bool refined) {
    __syncthreads();
    for (int i = threadIdx.x; i < (refined ? 272 : 256) * 8; i += THREADS) {  // 16 bytes each
        const int word = i >> 3;
        uint4 v;
        if constexpr (D == 8) {
            v = *(const uint4*)(codebook + word * 8);
        } else {
            const uint2 half = *(const uint2*)(codebook + word * 4);
            v = make_uint4(half.x, half.y, half.x, half.y);
        }
        *(uint4*)(m.base + i * 16) = v;  // the refinement lies behind the base
    }
    __syncthreads();
}

// A thread's part of a stage: bytes to its codes and nibbles, for rows 0 to 7 and 8 to 15 of 16.
struct Place {
    u32 code[2], fine[2];
    u32 codeword;  // to its copy of codeword 0
    u32 shift;     // of words
    bool upper;    // of a byte of two nibbles
};

// Four bytes from byte `shift / 8` on of this thread's word and the next quarter's.
__device__ __forceinline__ u32 aligned(u32 word, int lane, u32 shift) {
    const u32 next = __shfl_sync(~0u, word, (lane & ~3) | (lane + 1 & 3));
    return __funnelshift_r(word, next, shift);
}

// The codeword of byte S of `codes`.
template <int D, int S>
__device__ __forceinline__ void gather(u32* w, const u8* table, u32 codes, u32 codeword) {
    const u8* at = table + (((S ? codes >> (8 * S - 7) : codes << 7) & 0x7f80) | codeword);
    if constexpr (D == 4) {
        const uint2 v = *(const uint2*)at;
        w[0] = v.x, w[1] = v.y;
    } else {
        const uint4 v = *(const uint4*)at;
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    }
}

// The weights of byte S of `codes`, refined by byte S of `fine`.
template <int D, bool REFINED, int S>
__device__ __forceinline__ void weights(u32* w, u32 codes, u32 fine, const Memory& m, u32 codeword) {
    gather<D, S>(w, m.base, codes, codeword);
    if constexpr (REFINED) {
        u32 v[D / 2];
        gather<D, S>(v, m.refinement, fine, codeword);
        #pragma unroll
        for (int i = 0; i < D / 2; i++) w[i] = add_halves(w[i], v[i]);
    }
}

// Codes S of a thread's four rows times the activations of all tokens, or of all but the last tile's (`few`); x: where
// the 32 bytes of these columns, with D = 8 the first of two such, lie for the thread's token.
template <int D, bool REFINED, int S>
__device__ __forceinline__ void step(float (&sums)[TILES][4][4], const u32 (&codes)[4], const u32 (&fine)[4],
                                     const Memory& m, u32 codeword, u32 x, bool few) {
    u32 w[4][D / 2];
    #pragma unroll
    for (int n = 0; n < 4; n++) weights<D, REFINED, S>(w[n], codes[n], fine[n], m, codeword);
    #pragma unroll
    for (int half = 0; half < D / 4; half++)
        #pragma unroll
        for (int t = 0; t < TILES; t++) {
            if (TILES > 1 && t == TILES - 1 && few) break;
            u32 a[4];
            load_matrices(a, x + t * 16 * STRIDE + half * 32);
            #pragma unroll
            for (int n = 0; n < 4; n++) multiply(sums[t][n], a, w[n][2 * half], w[n][2 * half + 1]);
        }
}

// One group of 128 columns: sums += 32 rows times tokens, in units of the group's scales. `odd`: the second of a strip.
template <int D, bool REFINED, bool ALONE>
__device__ __forceinline__ void add_group(float (&sums)[TILES][4][4], const Stage& stage, const Place& p, u32 odd,
                                          const Memory& m, bool few) {
    const u32 lane = threadIdx.x & 31;
    // This thread's row of the matrices that `load_matrices` loads.
    const u32 token = TOKENS == 8 ? lane & 7 : lane & 15, half = (TOKENS == 8 ? lane >> 3 : lane >> 4) & 1;
    const u32 x = (u32)__cvta_generic_to_shared(stage.x) + token * STRIDE + half * 16;
    #pragma unroll
    for (int h = 0; h < 8 / D; h++) {
        u32 codes[4], fine[4] = {};
        #pragma unroll
        for (int n = 0; n < 4; n++) {
            const u32 tile = n >> 1, phase = (D == 4 ? h : odd) ^ tile;
            const u32 code = p.code[n & 1] + tile * 256 + (D == 4 ? phase * 512 : 0);
            codes[n] = aligned(*(const u32*)(stage.codes[0] + code), lane, p.shift);
            if constexpr (REFINED) {
                const u32 at = p.fine[n & 1] + (ALONE ? tile * 128 : tile * 256 + phase * 8);
                const u32 both = *(const u32*)(stage.refinements[0] + at);
                fine[n] = aligned((p.upper ? both >> 4 : both) & 0x0f0f0f0f, lane, p.shift);
            }
        }
        const u32 at = x + h * 128;
        step<D, REFINED, 0>(sums, codes, fine, m, p.codeword, at, few);
        step<D, REFINED, 1>(sums, codes, fine, m, p.codeword, at + 8 * D, few);
        step<D, REFINED, 2>(sums, codes, fine, m, p.codeword, at + 16 * D, few);
        step<D, REFINED, 3>(sums, codes, fine, m, p.codeword, at + 24 * D, few);
    }
}

__device__ __forceinline__ float reciprocal(float x) {
    float found;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
    return found;
}

// Sums in units of `from` to sums in units of `scales`, which `from` then is.
__device__ __forceinline__ void change_units(float (&sums)[TILES][4][4], float (&from)[4][2], const u8* scales) {
    #pragma unroll
    for (int n = 0; n < 4; n++)
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            const float scale = half_to_float(*(const u32*)(scales + 16 * n) >> 16 * i);
            // Not 0, by which sums cannot be divided, but what leaves nothing of a product.
            const float to = scale == 0.0f ? 0x1p-60f : scale, ratio = from[n][i] * reciprocal(to);
            from[n][i] = to;
            #pragma unroll
            for (int t = 0; t < TILES; t++)
                #pragma unroll
                for (int r = 0; r < EIGHTS; r++) sums[t][n][2 * r + i] *= ratio;
        }
}

// What a block computes: rows from 32 * block on, 32 for each warp, of those before 32 * end, of a matrix of 32 * blocks
// rows; `few`: its last tile of tokens is empty; `again`: the ROWS behind are next, `fresh`: these were not.
struct Job {
    int block, end, blocks, columns;
    bool few, fresh, again;
};

// 32 rows of a matrix of one tier times tokens: total [of 16 tokens][of 8 rows] as the tensor core has it.
template <int TIER>
__device__ __forceinline__ void product(float (&total)[TILES][4][4], Memory& m, int& stage, const Source& source,
                                        const Job& job) {
    constexpr int D = TIER < 2 ? 8 : 4;
    constexpr bool REFINED = TIER & 1;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, block = job.block + warp, groups = job.columns / 128;
    const int whole = D == 8 ? groups & ~1 : groups;  // a last half strip has one phase
    if (job.fresh) source.load<D, REFINED>(m.stages[stage], 0, block, job.blocks, block < job.end, whole == 0);
    const int l = lane >> 2, quarter = (4 * (lane & 3) - l & 15) >> 2;
    Place p;
    p.codeword = D == 4 ? (lane & 15) * 8 : (lane & 7) * 16;
    p.shift = 8 * (-l & 3);
    p.upper = quarter & 1;
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        const int word = quarter ^ 2 * r;
        p.code[r] = warp * 1024 + (l + 8 * r) * 16 + 4 * word;
        p.fine[r] = warp * 512 + (l + 8 * r) * 16 + 2 * (word & 2);
    }
    float unit[4][2];
    #pragma unroll
    for (int n = 0; n < 4; n++) unit[n][0] = unit[n][1] = 1.0f;
    #pragma unroll 1
    for (int group = 0; group < groups; group++) {
        arrive();
        const Stage& now = m.stages[stage];
        stage ^= 1;
        const bool last = group + 1 == groups;
        if (!last || job.again) {
            const int then = last ? 0 : group + 1, rows = last ? block + WARPS : block;
            source.load<D, REFINED>(m.stages[stage], then, rows, job.blocks, rows < job.end, then == whole);
        }
        change_units(total, unit, now.scales[warp] + 4 * (lane & 3));
        if (D == 8 && group == whole) {
            #pragma unroll
            for (int r = 0; r < 2; r++) p.fine[r] = warp * 512 + (l + 8 * r) * 8 + 2 * ((quarter ^ 2 * r) & 2);
            add_group<D, REFINED, true>(total, now, p, 0, m, job.few);
        } else {
            add_group<D, REFINED, false>(total, now, p, group & 1, m, job.few);
        }
    }
    #pragma unroll
    for (int t = 0; t < TILES; t++)
        #pragma unroll
        for (int n = 0; n < 4; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) total[t][n][i] *= unit[n][i & 1];
}

__device__ __forceinline__ void project(float (&total)[TILES][4][4], Memory& m, int& stage, const Source& source,
                                        int tier, const Job& job) {
    switch (tier) {
        case 0: product<0>(total, m, stage, source, job); break;
        case 1: product<1>(total, m, stage, source, job); break;
        case 2: product<2>(total, m, stage, source, job); break;
        default: product<3>(total, m, stage, source, job);
    }
}

__device__ __forceinline__ void load_codebook_of(Memory& m, const u16* codebooks, int tier) {
    if (tier < 2) load_codebook<8>(m, codebooks + CODEBOOK[tier], tier & 1);
    else load_codebook<4>(m, codebooks + CODEBOOK[tier], tier & 1);
}

// h [position, width] * h_factors [width / ROWS, position] = silu(gate x) * up x, with x [token, hidden] *
// x_factors [token]; x and h in the order that codewords of 4, or of 8 want.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gate_up(const u8* codes, const u8* refinements, const u16* scales, const int4* where, const u16* codebooks,
        const u16* x4, const u16* x8, const float* x_factors, const int* order, const int* experts, const int* firsts,
        const int* lasts, u16* h, float* h_factors, int stride, int top_k, int hidden, int width) {
    extern __shared__ __align__(1024) u8 dynamic[];
    Memory& m = *(Memory*)dynamic;
    const Planes planes = {codes, refinements, scales};
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, tiles = (width + ROWS - 1) / ROWS;
    const int tile = blockIdx.x % tiles, of = blockIdx.x / tiles;
    wait_for_inputs();
    const int expert = experts[of];
    if (expert < 0) return;
    const int first = firsts[of], last = lasts[of];
    const int4 gate_at = where[expert * 3], up_at = where[expert * 3 + 1];
    const int stride_x = 2 * hidden, blocks = width / 32;
    Source source;
    #pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int position = first + pass * (THREADS / 16) + (int)(threadIdx.x >> 4);
        source.row[pass] = (u32)(order[min(position, last - 1)] / top_k) * stride_x + (threadIdx.x & 15) * 16;
    }
    const Job job = {tile * WARPS, blocks, blocks, hidden, last - first <= TOKENS - 16, true, false};
    float total[TILES][4][4] = {}, gates[TILES][4][4];
    int stage = 0;
    load_codebook_of(m, codebooks, gate_at.x);
    source.x = (const u8*)(gate_at.x < 2 ? x8 : x4), source.set(planes, gate_at);
    project(total, m, stage, source, gate_at.x, job);
    #pragma unroll
    for (int t = 0; t < TILES; t++)
        #pragma unroll
        for (int n = 0; n < 4; n++)
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                gates[t][n][j] = total[t][n][j];
                total[t][n][j] = 0.0f;
            }
    load_codebook_of(m, codebooks, up_at.x);
    source.x = (const u8*)(up_at.x < 2 ? x8 : x4), source.set(planes, up_at);
    project(total, m, stage, source, up_at.x, job);
    const bool some = job.block + warp < blocks;
    let_next_start();
    #pragma unroll
    for (int t = 0; t < TILES; t++)
        #pragma unroll
        for (int r = 0; r < EIGHTS; r++) {
            const int token = 16 * t + 8 * r + (lane >> 2);
            const float factor = x_factors[order[min(first + token, last - 1)] / top_k];
            float most = 0.0f;
            #pragma unroll
            for (int n = 0; n < 4; n++)
                #pragma unroll
                for (int j = 2 * r; j < 2 * r + 2; j++) {
                    const float gate = factor * gates[t][n][j];
                    const float value = __fdividef(gate, 1.0f + __expf(-gate)) * (factor * total[t][n][j]);
                    total[t][n][j] = value;
                    most = isnan(value) ? value : fmaxf(most, fabsf(value));
                }
            #pragma unroll
            for (int d = 1; d < 4; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
            if ((lane & 3) == 0) m.most[warp][token] = some ? most : 0.0f;
        }
    __syncthreads();
    const bool wide = where[expert * 3 + 2].x < 2;
    #pragma unroll
    for (int t = 0; t < TILES; t++)
        #pragma unroll
        for (int r = 0; r < EIGHTS; r++) {
            const int token = 16 * t + 8 * r + (lane >> 2), position = first + token;
            float most = 0.0f;
            #pragma unroll
            for (int w = 0; w < WARPS; w++) most = fmaxf(most, m.most[w][token]);
            const float up = up_factor(most);
            if (position >= last || !some) continue;
            if (warp == 0 && (lane & 3) == 0) h_factors[(i64)tile * stride + position] = down_factor(most);
            u16* to = h + (i64)position * width;
            #pragma unroll
            for (int n = 0; n < 4; n++) {
                const int row = tile * ROWS + warp * 32 + 8 * n + 2 * (lane & 3), column = row & 127;
                const u32 low = float_to_half(total[t][n][2 * r] * up), high = float_to_half(total[t][n][2 * r + 1] * up);
                *(u32*)(to + (row - column) + (wide ? column_at<8>(column) : column_at<4>(column))) = low | high << 16;
            }
        }
}

// A block per position: h of all tiles of ROWS columns with one factor, factors [position].
extern "C" __global__ void __launch_bounds__(128)
level(u16* h, const float* h_factors, float* factors, int stride, int width) {
    const i64 position = blockIdx.x;
    const int tiles = (width + ROWS - 1) / ROWS;
    wait_for_inputs();
    float most = 0.0f;
    for (int tile = 0; tile < tiles; tile++) most = fmaxf(most, h_factors[(i64)tile * stride + position]);
    for (int i = threadIdx.x; i < width / 8; i += 128) {
        // Of powers of two, so exact but for what is below the smallest half.
        const u16 half = float_to_half(h_factors[(i64)(i * 8 / ROWS) * stride + position] / most);
        const u32 ratio = half * 0x10001u;
        uint4 v = ((const uint4*)(h + position * width))[i];
        v = make_uint4(multiply_halves(v.x, ratio), multiply_halves(v.y, ratio), multiply_halves(v.z, ratio),
                       multiply_halves(v.w, ratio));
        ((uint4*)(h + position * width))[i] = v;
    }
    if (threadIdx.x == 0) factors[position] = most;
    let_next_start();
}

// products [pair, rows of the slice] = down h * factors [position]; a block takes `repeat` tiles of ROWS rows.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
down(const u8* codes, const u8* refinements, const u16* scales, const int4* where, const u16* codebooks, const u16* h,
     const float* factors, const int* order, const int* experts, const int* firsts, const int* lasts, float* products,
     int first_row, int slice_rows, int repeat, int hidden, int width) {
    extern __shared__ __align__(1024) u8 dynamic[];
    Memory& m = *(Memory*)dynamic;
    const Planes planes = {codes, refinements, scales};
    const int tiles = (slice_rows + ROWS - 1) / ROWS;
    const int parts = (tiles + repeat - 1) / repeat, part = blockIdx.x % parts, of = blockIdx.x / parts;
    wait_for_inputs();
    const int expert = experts[of];
    if (expert < 0) return;
    const int first = firsts[of], last = lasts[of], end = min((part + 1) * repeat, tiles);
    const int4 at = where[expert * 3 + 2];
    load_codebook_of(m, codebooks, at.x);
    Source source;
    source.x = (const u8*)h, source.set(planes, at);
    // Of positions from `last` on there is something to read too, and nothing is made of it.
    #pragma unroll
    for (int pass = 0; pass < PASSES; pass++)
        source.row[pass] = (u32)(first + pass * (THREADS / 16) + (threadIdx.x >> 4)) * (2 * width) +
                           (threadIdx.x & 15) * 16;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int stage = 0;
    #pragma unroll 1
    for (int tile = part * repeat; tile < end; tile++) {
        float total[TILES][4][4] = {};
        const Job job = {first_row / 32 + tile * WARPS, (first_row + slice_rows) / 32, hidden / 32, width,
                         last - first <= TOKENS - 16, tile == part * repeat, tile + 1 < end};
        project(total, m, stage, source, at.x, job);
        if ((tile * WARPS + warp) * 32 >= slice_rows) continue;
        #pragma unroll
        for (int t = 0; t < TILES; t++)
            #pragma unroll
            for (int r = 0; r < EIGHTS; r++) {
                const int position = first + 16 * t + 8 * r + (lane >> 2);
                if (position >= last) continue;
                const float factor = factors[position];
                float* to = products + (i64)order[position] * slice_rows + (tile * WARPS + warp) * 32 + 2 * (lane & 3);
                #pragma unroll
                for (int n = 0; n < 4; n++)
                    *(float2*)(to + 8 * n) = make_float2(factor * total[t][n][2 * r], factor * total[t][n][2 * r + 1]);
            }
    }
    let_next_start();
}

// One block: sorts up to 1024 pairs by expert, those of an expert in their order, and cuts them into blocks.
extern "C" __global__ void __launch_bounds__(1024)
group(const void* ids, int ids64, const int* map, int pairs, int number, int blocks, int* order, int* experts,
      int* firsts, int* lasts) {
    __shared__ __align__(16) int chosen[MAX_PAIRS];
    __shared__ int count[MAX_EXPERTS], sums[2][MAX_EXPERTS];
    const int i = threadIdx.x;
    wait_for_inputs();
    const int mine = i < pairs ? local_expert(ids, ids64, map, i) : -1;
    chosen[i] = mine;
    if (i < MAX_EXPERTS) count[i] = 0;
    for (int b = i; b < blocks; b += 1024) experts[b] = -1;
    __syncthreads();
    if (mine >= 0) atomicAdd(&count[mine], 1);
    int rank = 0;
    for (int j = 0; j < (i + 3) / 4; j++) {
        const int4 four = ((const int4*)chosen)[j];
        rank += (four.x == mine && 4 * j < i) + (four.y == mine && 4 * j + 1 < i) + (four.z == mine && 4 * j + 2 < i) +
                (four.w == mine && 4 * j + 3 < i);
    }
    __syncthreads();
    if (i < MAX_EXPERTS) {
        sums[0][i] = count[i];
        sums[1][i] = (count[i] + TOKENS - 1) / TOKENS;
    }
    __syncthreads();
    for (int d = 1; d < MAX_EXPERTS; d *= 2) {
        int before[2] = {};
        if (i < MAX_EXPERTS && i >= d) before[0] = sums[0][i - d], before[1] = sums[1][i - d];
        __syncthreads();
        if (i < MAX_EXPERTS) sums[0][i] += before[0], sums[1][i] += before[1];
        __syncthreads();
    }
    if (mine >= 0) order[sums[0][mine] - count[mine] + rank] = i;
    if (i < number) {
        const int begin = sums[0][i] - count[i], own = (count[i] + TOKENS - 1) / TOKENS, from = sums[1][i] - own;
        const int share = own ? (count[i] + own - 1) / own : 0;
        for (int b = 0; b < own; b++) {
            experts[from + b] = i;
            firsts[from + b] = begin + b * share;
            lasts[from + b] = min(begin + (b + 1) * share, sums[0][i]);
        }
    }
    let_next_start();
}

// A block per token: y [token, columns] * factors[token] = x, y in fp16 and in both orders.
extern "C" __global__ void __launch_bounds__(256)
to_half(const void* x, i64 x_stride, int bf16, u16* y4, u16* y8, float* factors, int columns) {
    __shared__ float most[8];
    const i64 token = blockIdx.x;
    float largest = 0.0f;
    wait_for_inputs();
    for (int i = threadIdx.x; i < columns; i += 256)
        largest = fmaxf(largest, fabsf(input(x, token * x_stride + i, bf16)));
    for (int d = 1; d < 32; d *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
    if ((threadIdx.x & 31) == 0) most[threadIdx.x >> 5] = largest;
    __syncthreads();
    for (int i = 0; i < 8; i++) largest = fmaxf(largest, most[i]);
    const float up = up_factor(largest);
    for (int i = threadIdx.x; i < columns; i += 256) {
        const u16 half = float_to_half(input(x, token * x_stride + i, bf16) * up);
        const i64 to = token * columns + (i & ~127);
        y4[to + column_at<4>(i & 127)] = half;
        y8[to + column_at<8>(i & 127)] = half;
    }
    if (threadIdx.x == 0) factors[token] = down_factor(largest);
    let_next_start();
}

// out [token, rows of the slice] = sum over the token's choices of weight * product, in the order of the choices.
extern "C" __global__ void __launch_bounds__(256)
combine(const float* products, const void* ids, int ids64, const int* map, const float* weights, void* out, int bf16,
        int tokens, int top_k, int first_row, int slice_rows, int hidden) {
    const i64 i = (i64)blockIdx.x * 256 + threadIdx.x, quads = slice_rows / 4;
    wait_for_inputs();
    if (i >= tokens * quads) return;
    const int token = (int)(i / quads), quad = (int)(i % quads);
    float4 sum = {0, 0, 0, 0};
    for (int choice = 0; choice < top_k; choice++) {
        const int pair = token * top_k + choice;
        if (local_expert(ids, ids64, map, pair) < 0) continue;
        const float weight = weights[pair];
        const float4 v = __ldcg((const float4*)(products + (i64)pair * slice_rows) + quad);
        sum.x += weight * v.x, sum.y += weight * v.y, sum.z += weight * v.z, sum.w += weight * v.w;
    }
    uint2 both;
    if (bf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both.x) : "f"(sum.y), "f"(sum.x));
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both.y) : "f"(sum.w), "f"(sum.z));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both.x) : "f"(sum.y), "f"(sum.x));
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both.y) : "f"(sum.w), "f"(sum.z));
    }
    ((uint2*)out)[((i64)token * hidden + first_row) / 4 + quad] = both;
}
