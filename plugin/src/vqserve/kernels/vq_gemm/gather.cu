// Routed experts for any number of tokens: pairs of token and expert grouped by expert, codewords gathered straight
// into the registers of tensor cores.
//
// A warp owns 32 rows of a matrix and TOKENS tokens; a block is four warps, 128 rows. With m16n8k16 a thread holds, for
// two rows, four columns: one codeword of d = 4 weights each, or half of one of d = 8. So a code costs one read of
// shared memory, 8 or 16 bytes, and nothing is moved afterwards. Which four columns a thread's share is, is free as
// long as weights and activations agree; it is chosen so that four codes of a row are one 32-bit word.
//
// Codebooks lie in shared memory 16 (d = 4) or 8 (d = 8) times, interleaved, so that the threads that are served at a
// time read from different banks whatever their codes are: 128 bytes per codeword.
//
// Activations are in an order of their own, `chunk_at`: what a warp reads at a time is whole sectors of L1, and two
// neighbouring rows, which are half a line apart, do not want the same banks.
//
// Planes are in the order of kernels/repack/order.py: a row's codes are rotated by its number, so a word is put
// together from two neighbours' (one shuffle, one shift). Sums are fp32; scales and the activations' factors multiply
// the sums of each group of 128 columns. The order of summation depends on nothing but the sizes.
//
// Kernels: `group` (up to 1024 pairs), `to_half`, `gate_up`, `down`, `combine`. TOKENS is defined per compilation.

#include "device.cuh"

#ifndef TOKENS
#define TOKENS 8
#endif
#define TILES (TOKENS / 8)
#define THREADS 128
#define ROWS 128
#define MAX_PAIRS 1024
#define MAX_EXPERTS 512
// As many blocks per multiprocessor as its shared memory holds, or as was fastest on an H100.
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
#define BLOCKS 2
#else
#define BLOCKS (TOKENS == 8 ? 4 : 3)
#endif

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

__device__ __forceinline__ u32 load_stream(const u8* from) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}

// c += a b: a 16 rows x 16 columns of weights, b 16 columns x 8 tokens.
__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
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

// Where chunk `chunk` of 8 columns of a group of 128 lies, in chunks. With d = 4 the four quarters of a half group are
// read at a time, chunks 2 q or 2 q + 1; with d = 8 of the group, 4 q + s. Either way they are two pairs of neighbours,
// and with d = 8 of different places in two lines.
__device__ __forceinline__ int chunk_at(int chunk) {
    return chunk & 8 | (chunk & 1) << 2 | (chunk >> 2 & 2 ^ chunk & 2) | chunk >> 2 & 1;
}

// Elements from row to row of activations in that order.
__device__ __forceinline__ int padded(int columns) { return columns + 32; }

// Blocks of pairs, as `group` or the host's sort makes them.
struct Groups {
    const int *order;         // [pairs] the pair at each position
    const int *expert;        // [blocks] -1: nothing to do
    const int *first, *last;  // [blocks] positions
};

struct Memory {
    u8 base[256 * 128];
    u8 refinement[16 * 128];
    float gate[4][TILES * 2][4][32];  // per warp: a thread's sums of gate
    float most[4][TOKENS];            // per warp: largest magnitude of h
};

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

// Where a thread's codes lie in a matrix: bytes from its beginning, for the first strip and phase, per row.
struct Place {
    const u8 *codes, *refinements;
    const u16* scales;
    u32 code[2], fine[2];
    bool upper;  // of a byte of two nibbles
};

// What a thread holds of a group of 128 columns: per half strip, tile of 16 rows, and row, four codes (and nibbles).
template <int D, bool REFINED>
struct Codes {
    static constexpr int HALVES = 8 / D;
    u32 word[HALVES][2][2], nibble[HALVES][2][2];
    u16 scale[2][2];

    __device__ __forceinline__ void load(const Place& p, int group, int blocks) {
        const u32 strip = D == 4 ? group : group >> 1, odd = D == 4 ? 0 : group & 1;
        #pragma unroll
        for (int h = 0; h < HALVES; h++)
            #pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                const u32 phase = (D == 4 ? h : odd) ^ tile;
                #pragma unroll
                for (int r = 0; r < 2; r++) {
                    const u32 code = strip * blocks * 1024 + phase * 512 + p.code[r] + tile * 256;
                    word[h][tile][r] = load_stream(p.codes + code);
                    if constexpr (REFINED) {
                        const u32 fine = strip * blocks * 512 + phase * 8 + p.fine[r] + tile * 256;
                        nibble[h][tile][r] = load_stream(p.refinements + fine);
                    }
                }
            }
        load_scales(p, group, blocks);
    }

    // A half strip: one phase.
    __device__ __forceinline__ void load_alone(const Place& p, int group, int blocks) {
        const u32 strip = group >> 1;
        #pragma unroll
        for (int tile = 0; tile < 2; tile++)
            #pragma unroll
            for (int r = 0; r < 2; r++) {
                word[0][tile][r] = load_stream(p.codes + (strip * blocks * 1024 + p.code[r] + tile * 256));
                if constexpr (REFINED)
                    nibble[0][tile][r] = load_stream(p.refinements + (strip * blocks * 512 + p.fine[r] + tile * 128));
            }
        load_scales(p, group, blocks);
    }

    __device__ __forceinline__ void load_scales(const Place& p, int group, int blocks) {
        #pragma unroll
        for (int tile = 0; tile < 2; tile++)
            #pragma unroll
            for (int r = 0; r < 2; r++)
                scale[tile][r] = load_scale(p.scales + (group * blocks * 32 + 16 * tile + 8 * r));
    }
};

// Four bytes from byte `shift / 8` on of this thread's word and the next quarter's.
__device__ __forceinline__ u32 aligned(u32 word, int lane, u32 shift) {
    const u32 next = __shfl_sync(~0u, word, (lane & ~3) | (lane + 1 & 3));
    return __funnelshift_r(word, next, shift);
}

// The codeword of byte S of `codes`: `place` is where this thread's copy of codeword 0 lies in `table`.
template <int D, int S>
__device__ __forceinline__ void gather(u32* w, const u8* table, u32 codes, u32 place) {
    const u8* at = table + (((S ? codes >> (8 * S - 7) : codes << 7) & 0x7f80) | place);
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
__device__ __forceinline__ void weights(u32* w, u32 codes, u32 fine, const Memory& m, u32 place) {
    gather<D, S>(w, m.base, codes, place);
    if constexpr (REFINED) {
        u32 v[D / 2];
        gather<D, S>(v, m.refinement, fine, place);
        #pragma unroll
        for (int i = 0; i < D / 2; i++) w[i] = add_halves(w[i], v[i]);
    }
}

// Codes from S on, two of d = 4 or one of d = 8, of each of a thread's four rows times the activations of all tokens;
// x [row + at]: the 8 columns of these codes.
template <int D, bool REFINED, int S>
__device__ __forceinline__ void step(float (&sums)[2][TILES][4], const u32 (&codes)[2][2], const u32 (&fine)[2][2],
                                     const Memory& m, u32 place, const u16* x, const u32 (&row)[TILES], u32 at) {
    uint4 in[TILES];
    #pragma unroll
    for (int t = 0; t < TILES; t++) in[t] = *(const uint4*)(x + (i64)(row[t] + at));
    #pragma unroll
    for (int tile = 0; tile < 2; tile++) {
        u32 w[2][4];
        #pragma unroll
        for (int r = 0; r < 2; r++) {
            weights<D, REFINED, S>(w[r], codes[tile][r], fine[tile][r], m, place);
            if constexpr (D == 4) weights<D, REFINED, S + 1>(w[r] + 2, codes[tile][r], fine[tile][r], m, place);
        }
        #pragma unroll
        for (int t = 0; t < TILES; t++) multiply(sums[tile][t], w[0][0], w[1][0], w[0][1], w[1][1], in[t].x, in[t].y);
        #pragma unroll
        for (int t = 0; t < TILES; t++) multiply(sums[tile][t], w[0][2], w[1][2], w[0][3], w[1][3], in[t].z, in[t].w);
    }
}

// One group of 128 columns: 32 rows times TOKENS tokens. x [row + element]: a thread's tokens' activations, fp16.
template <int D, bool REFINED, bool FACTORED>
__device__ __forceinline__ void add_group(float (&total)[2][TILES][4], const Codes<D, REFINED>& c, int group,
                                          const Memory& m, u32 place, u32 shift, bool upper, const u16* x,
                                          const u32 (&row)[TILES], const float* factors, int stride, int lane) {
    constexpr int HALVES = 8 / D;
    // Where this thread's part of the first codes lies in a group: `chunk_at`.
    const u32 first = D == 4 ? 8 * (lane >> 1 & 1) + 16 * (lane & 1) : 80 * (lane >> 1 & 1) + 8 * (lane & 1);
    float sums[2][TILES][4] = {};
    #pragma unroll
    for (int h = 0; h < HALVES; h++) {
        u32 codes[2][2], fine[2][2] = {};
        #pragma unroll
        for (int tile = 0; tile < 2; tile++)
            #pragma unroll
            for (int r = 0; r < 2; r++) {
                codes[tile][r] = aligned(c.word[h][tile][r], lane, shift);
                if constexpr (REFINED) {
                    const u32 both = c.nibble[h][tile][r];
                    fine[tile][r] = aligned((upper ? both >> 4 : both) & 0x0f0f0f0f, lane, shift);
                }
            }
        if constexpr (D == 4) {
            const u32 at = group * 128 + h * 64 + (first ^ h * 16);
            step<D, REFINED, 0>(sums, codes, fine, m, place, x, row, at);
            step<D, REFINED, 2>(sums, codes, fine, m, place, x, row, at + 32);
        } else {
            const u32 at = group * 128 + first, then = group * 128 + (first ^ 16);
            step<D, REFINED, 0>(sums, codes, fine, m, place, x, row, at);
            step<D, REFINED, 1>(sums, codes, fine, m, place, x, row, at + 32);
            step<D, REFINED, 2>(sums, codes, fine, m, place, x, row, then);
            step<D, REFINED, 3>(sums, codes, fine, m, place, x, row, then + 32);
        }
    }
    #pragma unroll
    for (int t = 0; t < TILES; t++)
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            const float factor = FACTORED ? __ldg(factors + (i64)group * stride + 8 * t + i) : 1.0f;
            #pragma unroll
            for (int tile = 0; tile < 2; tile++)
                #pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float scale = half_to_float(c.scale[tile][r]);
                    total[tile][t][2 * r + i] += sums[tile][t][2 * r + i] * (FACTORED ? scale * factor : scale);
                }
        }
}

// 32 rows of a matrix of one tier times TOKENS tokens.
template <int TIER, bool FACTORED>
__device__ __forceinline__ void product(float (&total)[2][TILES][4], const Planes& planes, int4 at, const Memory& m,
                                        int block, int blocks, int columns, const u16* x, const u32 (&row)[TILES],
                                        const float* factors, int stride, int lane) {
    constexpr int D = TIER < 2 ? 8 : 4;
    constexpr bool REFINED = TIER & 1;
    const int groups = columns / 128, l = lane >> 2, quarter = (4 * (lane & 3) - l & 15) >> 2;
    const u32 shift = 8 * (-l & 3), place = (D == 4 ? (lane & 15) * 8 : (lane & 7) * 16);
    Place p;
    p.codes = planes.codes + (i64)at.y * 64;
    p.refinements = planes.refinements + (i64)at.z * 64;
    p.scales = planes.scales + (i64)at.w * 32 + block * 32 + l;
    p.upper = quarter & 1;
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        const int word = quarter ^ 2 * r;
        p.code[r] = block * 1024 + (l + 8 * r) * 16 + 4 * word;
        p.fine[r] = block * 512 + (l + 8 * r) * 16 + 2 * (word & 2);
    }
    const int whole = D == 8 ? groups & ~1 : groups;  // a last half strip has one phase
    Codes<D, REFINED> now, next;
    if (0 < whole) now.load(p, 0, blocks);
    if (1 < whole) next.load(p, 1, blocks);
    #pragma unroll 1
    for (int group = 0; group < whole; group++) {
        add_group<D, REFINED, FACTORED>(total, now, group, m, place, shift, p.upper, x, row, factors, stride, lane);
        now = next;
        if (group + 2 < whole) next.load(p, group + 2, blocks);
    }
    if (whole < groups) {
        #pragma unroll
        for (int r = 0; r < 2; r++) {
            const int word = quarter ^ 2 * r;
            p.code[r] = block * 512 + (l + 8 * r) * 16 + 4 * word;
            p.fine[r] = block * 256 + (l + 8 * r) * 8 + 2 * (word & 2);
        }
        now.load_alone(p, whole, blocks);
        add_group<D, REFINED, FACTORED>(total, now, whole, m, place, shift, p.upper, x, row, factors, stride, lane);
    }
}

__device__ __forceinline__ void project(float (&total)[2][TILES][4], const Planes& planes, int4 at, const Memory& m,
                                        int block, int blocks, int columns, const u16* x, const u32 (&row)[TILES],
                                        int lane) {
    switch (at.x) {
        case 0: product<0, false>(total, planes, at, m, block, blocks, columns, x, row, nullptr, 0, lane); break;
        case 1: product<1, false>(total, planes, at, m, block, blocks, columns, x, row, nullptr, 0, lane); break;
        case 2: product<2, false>(total, planes, at, m, block, blocks, columns, x, row, nullptr, 0, lane); break;
        default: product<3, false>(total, planes, at, m, block, blocks, columns, x, row, nullptr, 0, lane);
    }
}

__device__ __forceinline__ void load_codebook_of(Memory& m, const u16* codebooks, int tier) {
    if (tier < 2) load_codebook<8>(m, codebooks + CODEBOOK[tier], tier & 1);
    else load_codebook<4>(m, codebooks + CODEBOOK[tier], tier & 1);
}

// h [position, padded width] * h_factors [width / 128, position] = silu(gate x) * up x, with x [token, padded hidden] *
// x_factors [token].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gate_up(const u8* codes, const u8* refinements, const u16* scales, const int4* where, const u16* codebooks,
        const u16* x, const float* x_factors, const int* order, const int* experts, const int* firsts, const int* lasts,
        u16* h, float* h_factors, int stride, int top_k, int hidden, int width) {
    extern __shared__ __align__(1024) u8 dynamic[];
    Memory& m = *(Memory*)dynamic;
    const Planes planes = {codes, refinements, scales};
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, tiles = width / ROWS;
    const int tile = blockIdx.x % tiles, of = blockIdx.x / tiles;
    wait_for_inputs();
    const int expert = experts[of];
    if (expert < 0) return;
    const int first = firsts[of], last = lasts[of], block = tile * 4 + warp;
    u32 row[TILES];
    #pragma unroll
    for (int t = 0; t < TILES; t++)
        row[t] = order[min(first + 8 * t + (lane >> 2), last - 1)] / top_k * padded(hidden);
    float total[2][TILES][4] = {};
    int4 at = where[expert * 3];
    load_codebook_of(m, codebooks, at.x);
    project(total, planes, at, m, block, width / 32, hidden, x, row, lane);
    #pragma unroll
    for (int i = 0; i < 2; i++)
        #pragma unroll
        for (int t = 0; t < TILES; t++)
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                m.gate[warp][2 * t + i][j][lane] = total[i][t][j];
                total[i][t][j] = 0.0f;
            }
    at = where[expert * 3 + 1];
    load_codebook_of(m, codebooks, at.x);
    project(total, planes, at, m, block, width / 32, hidden, x, row, lane);
    let_next_start();
    #pragma unroll
    for (int t = 0; t < TILES; t++)
        #pragma unroll
        for (int c = 0; c < 2; c++) {
            const int position = first + 8 * t + 2 * (lane & 3) + c;
            const float factor = x_factors[order[min(position, last - 1)] / top_k];
            float most = 0.0f;
            #pragma unroll
            for (int i = 0; i < 2; i++)
                #pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float gate = factor * m.gate[warp][2 * t + i][2 * r + c][lane];
                    const float value = __fdividef(gate, 1.0f + __expf(-gate)) * (factor * total[i][t][2 * r + c]);
                    total[i][t][2 * r + c] = value;
                    most = isnan(value) ? value : fmaxf(most, fabsf(value));
                }
            #pragma unroll
            for (int d = 4; d < 32; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
            if (lane < 4) m.most[warp][8 * t + 2 * lane + c] = most;
        }
    __syncthreads();
    #pragma unroll
    for (int t = 0; t < TILES; t++)
        #pragma unroll
        for (int c = 0; c < 2; c++) {
            const int token = 8 * t + 2 * (lane & 3) + c, position = first + token;
            float most = 0.0f;
            #pragma unroll
            for (int w = 0; w < 4; w++) most = fmaxf(most, m.most[w][token]);
            const float up = up_factor(most);
            if (position >= last) continue;
            if (warp == 0 && lane < 4) h_factors[(i64)tile * stride + position] = down_factor(most);
            u16* to = h + (i64)position * padded(width) + tile * ROWS + (lane >> 2);
            #pragma unroll
            for (int i = 0; i < 2; i++)
                #pragma unroll
                for (int r = 0; r < 2; r++)
                    to[8 * chunk_at(warp * 4 + 2 * i + r)] = float_to_half(total[i][t][2 * r + c] * up);
        }
}

// Tiles `tile` to `end` of 128 rows of one matrix of `down`; h, factors: of the thread's first token.
template <int TIER>
__device__ __forceinline__ void down_tiles(Memory& m, const Planes& planes, int4 at, const u16* h, const float* factors,
                                           int stride, const int* order, int first, int last, float* products, int tile,
                                           int end, int first_row, int slice_rows, int hidden, int width) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 row[TILES];
    #pragma unroll
    for (int t = 0; t < TILES; t++) row[t] = 8 * t * padded(width);
    #pragma unroll 1
    for (; tile < end; tile++) {
        float total[2][TILES][4] = {};
        const int block = tile * 4 + warp;
        product<TIER, true>(total, planes, at, m, first_row / 32 + block, hidden / 32,
                            width, h, row, factors, stride, lane);
        #pragma unroll
        for (int t = 0; t < TILES; t++)
            #pragma unroll
            for (int c = 0; c < 2; c++) {
                const int position = first + 8 * t + 2 * (lane & 3) + c;
                if (position >= last) continue;
                float* to = products + (i64)order[position] * slice_rows + block * 32 + (lane >> 2);
                #pragma unroll
                for (int i = 0; i < 2; i++)
                    #pragma unroll
                    for (int r = 0; r < 2; r++) to[16 * i + 8 * r] = total[i][t][2 * r + c];
            }
    }
}

// products [pair, rows of the slice] = down h; a block takes `repeat` tiles of 128 rows.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
down(const u8* codes, const u8* refinements, const u16* scales, const int4* where, const u16* codebooks, const u16* h,
     const float* h_factors, const int* order, const int* experts, const int* firsts, const int* lasts, float* products,
     int stride, int first_row, int slice_rows, int repeat, int hidden, int width) {
    extern __shared__ __align__(1024) u8 dynamic[];
    Memory& m = *(Memory*)dynamic;
    const Planes planes = {codes, refinements, scales};
    const int lane = threadIdx.x & 31, tiles = slice_rows / ROWS;
    const int parts = (tiles + repeat - 1) / repeat, part = blockIdx.x % parts, of = blockIdx.x / parts;
    wait_for_inputs();
    const int expert = experts[of];
    if (expert < 0) return;
    const int first = firsts[of], last = lasts[of], tile = part * repeat, end = min(tile + repeat, tiles);
    const int4 at = where[expert * 3 + 2];
    load_codebook_of(m, codebooks, at.x);
    // Of positions from `last` on there is something to read too, and nothing is made of it.
    const u16* x = h + (i64)(first + (lane >> 2)) * padded(width);
    const float* factors = h_factors + first + 2 * (lane & 3);
#define TILES_OF(TIER) \
    down_tiles<TIER>(m, planes, at, x, factors, stride, order, first, last, products, tile, end, first_row, \
                     slice_rows, hidden, width)
    switch (at.x) {
        case 0: TILES_OF(0); break;
        case 1: TILES_OF(1); break;
        case 2: TILES_OF(2); break;
        default: TILES_OF(3);
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
        for (int b = 0; b < own; b++) {
            experts[from + b] = i;
            firsts[from + b] = begin + b * TOKENS;
            lasts[from + b] = min(begin + (b + 1) * TOKENS, sums[0][i]);
        }
    }
    let_next_start();
}

// A block per token: y [token, padded columns] * factors[token] = x, y in fp16.
extern "C" __global__ void __launch_bounds__(256)
to_half(const void* x, i64 x_stride, int bf16, u16* y, float* factors, int columns) {
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
    for (int i = threadIdx.x; i < columns; i += 256)
        y[token * padded(columns) + (i & ~127) + 8 * chunk_at(i >> 3 & 15) + (i & 7)] =
            float_to_half(input(x, token * x_stride + i, bf16) * up);
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
