// Routed experts for 1 to 8 tokens by look-up table: the product turned round.
//
// For a block of d columns of x, the dot products with all 256 codewords are computed once, into a table in shared
// memory; from then on a code costs one 4-byte look-up and one addition instead of a gather and d multiply-adds. A
// table covers 64 codes' columns (64 KiB), a second one the 16 codewords of a refinement (4 KiB). One lane is one row;
// lane l starts at column l, so that the 32 lanes of a warp always hit 32 banks. Codes are stored in that order
// (kernels/repack/order.py), and the address of a look-up is one PRMT of code byte and column byte.
//
// Three kernels: `gate_up` adds into gu [pairs][gate, up][width], `down` reads silu(gate) * up * router weight and adds
// into out [tokens][hidden], `finish` rounds to the output and leaves both accumulators zero for the next call.
//
// Sums are 64-bit integers (units of 2^-36): integer addition is associative, so atomics in any order give the same
// bits. A partial sum that is not below 2^20 in magnitude, NaN included, makes its token NaN: loud, never wrapped.
//
// Which block does what follows from the expert ids, read on the device: work is split into groups of one (token, tier),
// a group into columns (one table each), a column into rows. `plan` picks the rows per block that make the longest
// block shortest. Nothing is read back by the host.

#include "device.cuh"

#define THREADS 512
#define WARPS 16
#define MAX_TOKENS 8
#define MAX_EXPERTS 512
#define LIMIT 1048576.0f          // 2^20
#define TO_FIXED 68719476736.0f   // 2^36
#define FROM_FIXED 1.4551915228366852e-11f
// Two blocks fit on a Hopper multiprocessor; elsewhere shared memory has room for one, which may use more registers.
#define BLOCKS (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200 ? 2 : 1)

// Cost of 32 rows of a table: bytes / 128, scales included.
#define COST(tier) ((0x19111a12 >> 8 * (tier)) & 255)

struct Shape {
    int tokens, top_k, hidden, width, experts;
};

struct Job {
    int group;               // token * 4 + tier, or -1: nothing to do
    int table;               // of the matrix's columns
    int choice;              // down: which pair of the token
    int begin, end;          // row blocks of 32; gate_up: of the group's matrices, one after the other
    int matrices;
    int4 at[32];             // place of a matrix
    int row[32];             // accumulator row of its first row
};

__device__ __forceinline__ uint4 load_stream(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

__device__ __forceinline__ uint2 load_stream_8(const uint2* from) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}

// Address within a table whose rows are 256 bytes: byte 0 is byte K of `column`, byte 1 byte K of `code`, bytes 2 and 3
// the sign of the column's byte, which is below 128. (__byte_perm ignores the bit that asks for the sign.)
template <int K>
__device__ __forceinline__ u32 entry(u32 code, u32 column) {
    u32 address;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(address) : "r"(code), "r"(column), "n"(0xcc04 + K * 0x1111));
    return address;
}

__device__ __forceinline__ float look_up(u32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
    return v;
}

__device__ __forceinline__ float look_up_refinement(u32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1 + 65536];" : "=f"(v) : "r"(address));
    return v;
}

// Shared memory: dot products with the base's codewords and, from row 256 on, with the refinement's; a slice of inputs;
// where the experts' matrices lie; the job.
struct Memory {
    float table[272][64];
    float x[512];
    int4 where[2 * MAX_EXPERTS];
    Job job;
};
static_assert(sizeof(Memory) == 88736, "SHARED of cuda.py");

// Rows a group's columns are split into so that no block's share costs more than `limit`.
__device__ __forceinline__ int parts(int cost, float limit) { return (int)ceilf(__fdividef((float)cost, limit)); }

// Warp 0 only. Lane g stands for group g: `columns` tables of `height` row blocks each.
__device__ void plan(Job& job, const Shape& s, int columns, int height, int lane) {
    const int cost = height * COST(lane & 3);
    const u32 total = __reduce_add_sync(~0u, columns * cost), most = __reduce_max_sync(~0u, columns ? cost : 0);
    float low = fmaxf(__fdividef((float)total, (float)gridDim.x), 1.0f), step = fmaxf((float)most - low, 0.0f) * (1.0f / 31.0f);
    const int groups = 4 * s.tokens;
    float limit = low;
    // Every lane tries a limit; the smallest that fits wins, then again between it and the one below.
    for (int round = 0; round < 3; round++) {
        const float mine = fminf(low + step * lane, fmaxf((float)most, 1.0f));
        int jobs = 0;
        for (int g = 0; g < groups; g++) {
            const int c = __shfl_sync(~0u, columns, g), k = __shfl_sync(~0u, cost, g);
            jobs += c * parts(k, mine);
        }
        const u32 fits = __ballot_sync(~0u, jobs <= (int)gridDim.x);
        const int first = fits ? __ffs(fits) - 1 : 31;  // the last lane tries one part each, which the grid has room for
        limit = __shfl_sync(~0u, mine, first);
        low += step * max(first - 1, 0);
        step *= 1.0f / 31.0f;
    }
    const int rows = columns ? max(min(parts(cost, limit), height), 1) : 0;
    int end = columns * rows;
    for (int d = 1; d < 32; d *= 2) {
        const int before = __shfl_up_sync(~0u, end, d);
        if (lane >= d) end += before;
    }
    const int begin = end - columns * rows, block = blockIdx.x;
    const bool mine = begin <= block && block < end;
    if (!__any_sync(~0u, mine) && lane == 0) job.group = -1;
    if (mine) {
        const int column = (block - begin) / rows, part = (block - begin) - column * rows;
        job.group = lane;
        job.table = column;
        job.begin = (int)((u32)height * part / rows);
        job.end = (int)((u32)height * (part + 1) / rows);
    }
}

// Fills `job` for this block. DOWN: a column is a table of one pair's matrix; else the tier's matrices share a table.
template <bool DOWN>
__device__ void find_job(Memory& m, const Shape& s, const void* ids, int ids64, const int* map, int lane) {
    constexpr int PER = DOWN ? 1 : 2;  // matrices per pair
    const int inner = DOWN ? s.width : s.hidden, rows = (DOWN ? s.hidden : s.width) / 32;
    int4 entry[MAX_TOKENS];
    int expert[MAX_TOKENS];
    #pragma unroll
    for (int t = 0; t < MAX_TOKENS; t++) {
        expert[t] = -1;
        if (t < s.tokens && lane < PER * s.top_k) {
            const int at = t * s.top_k + lane / PER;
            expert[t] = ids64 ? (int)((const i64*)ids)[at] : ((const int*)ids)[at];
        }
    }
    u32 mask = 0;
    #pragma unroll
    for (int t = 0; t < MAX_TOKENS; t++) {
        if (t >= s.tokens) break;
        int local = expert[t];
        if (map != nullptr && local >= 0) local = map[local];
        expert[t] = local;
        entry[t] = local >= 0 ? m.where[local * PER + lane % PER] : make_int4(-1, 0, 0, 0);
        const int tier = entry[t].x;
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            const u32 of_tier = __ballot_sync(~0u, tier == k);
            if (lane == 4 * t + k) mask = of_tier;
        }
    }
    const int count = __popc(mask), span = (lane & 2) ? 256 : 512, tables = (inner + span - 1) / span;
    const int columns = DOWN ? count * tables : (count ? tables : 0), height = DOWN ? rows : count * rows;
    plan(m.job, s, columns, height, lane);
    __syncwarp();
    const int group = m.job.group;
    if (group < 0) return;
    const u32 members = __shfl_sync(~0u, mask, group);
    #pragma unroll
    for (int t = 0; t < MAX_TOKENS; t++)
        if (t == group / 4 && (members >> lane & 1)) {
            const int rank = __popc(members & ((1u << lane) - 1));
            const int pair = t * s.top_k + lane / PER;
            m.job.at[rank] = entry[t];
            m.job.row[rank] = DOWN ? pair : (2 * pair + lane % PER) * s.width;
        }
    if (lane == 0) m.job.matrices = __popc(members);
}

// c += a b on tf32 matrix units: a is 16 columns x D inputs, b is D x 8 codewords.
template <int D>
__device__ __forceinline__ void multiply(float (&c)[4], const u32* a, const u32* b) {
    if constexpr (D == 8)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// Both tables of a slice of 64 * D inputs in m.x, by tf32 matrix units: fp16 codewords and half-precision inputs are
// exact in tf32, products are exact, sums fp32. SPLIT: inputs are fp32 and go in as a sum of two tf32 numbers.
template <int D, bool SPLIT>
__device__ __forceinline__ void build_tables(Memory& m, const u16* codebook, bool refined, int warp, int lane) {
    constexpr int K = D / 4;  // registers per operand row
    const int g = lane >> 2, t = lane & 3;
    u32 offset[4];  // lane t starts at the t-th group of 8 columns: 4 t's and 8 g's are 32 banks
    #pragma unroll
    for (int i = 0; i < 4; i++) offset[i] = 8 * ((i + t) & 3) + g;
    #pragma unroll 1
    for (int side = 0; side < 2; side++) {  // 32 columns at a time: fewer registers
        u32 hi[2][2 * K], lo[2][2 * K];
        #pragma unroll
        for (int tile = 0; tile < 2; tile++)
            #pragma unroll
            for (int r = 0; r < 2 * K; r++) {
                const float v = m.x[(32 * side + 16 * tile + g + 8 * (r & 1)) * D + t + 4 * (r >> 1)];
                hi[tile][r] = __float_as_uint(v) & 0xffffe000u;
                lo[tile][r] = __float_as_uint(v - __uint_as_float(hi[tile][r]));
            }
        for (int n = warp; n < (refined ? 34 : 32); n += WARPS) {  // 8 codewords
            const u16* word = codebook + (n * 8 + g) * D + t;
            u32 b[K];
            #pragma unroll
            for (int k = 0; k < K; k++) b[k] = __float_as_uint(half_to_float(word[4 * k]));
            float c[2][4] = {};
            #pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                multiply<D>(c[tile], hi[tile], b);
                if constexpr (SPLIT) multiply<D>(c[tile], lo[tile], b);
            }
            // c[tile][2h + e] is codeword 2t + e, column 16 tile + 8h + g; rotate the groups of 8 columns by t, then store
            #pragma unroll
            for (int e = 0; e < 2; e++) {
                const float v[4] = {c[0][e], c[0][2 + e], c[1][e], c[1][2 + e]};
                float r[4];
                #pragma unroll
                for (int i = 0; i < 4; i++) r[i] = t & 1 ? v[(i + 1) & 3] : v[i];
                float* row = m.table[n * 8 + 2 * t + e] + 32 * side;
                #pragma unroll
                for (int i = 0; i < 4; i++) row[offset[i]] = t & 2 ? r[(i + 2) & 3] : r[i];
            }
        }
    }
}

// A block of 32 rows x 32 codes: per lane 32 bytes of codes, 16 of nibbles, one scale (d = 4) or two (d = 8).
template <int TIER>
struct Record {
    static constexpr bool REFINED = TIER & 1;
    static constexpr int D = TIER < 2 ? 8 : 4;
    uint4 codes[2], nibbles;
    u32 scales;

    // Block `row` of strip `strip` of a matrix of `rows` blocks; `half`: the strip has 16 codes.
    __device__ __forceinline__ void load(const Planes& planes, int4 at, int strip, int row, int rows, bool half, int lane) {
        // In elements of 16 bytes, and of 2 for scales: 32 bits hold them up to 32 and 8 GiB of a layer.
        const uint4* code = (const uint4*)planes.codes + (u32)(at.y * 4 + strip * rows * 64 + lane);
        const u32 nibble = at.z * 4 + strip * rows * 32, scale = at.w * 32 + row * 32 + lane;
        const int upper = lane >> 4;
        if constexpr (D == 4) {
            scales = load_scale(planes.scales + (u32)(scale + strip * rows * 32));
        } else {
            if (half) {  // the columns of the first phase for the lower lanes, of the second for the upper ones
                const uint4 zero = make_uint4(0, 0, 0, 0), some = load_stream(code + row * 32);
                codes[0] = upper ? zero : some;
                codes[1] = upper ? some : zero;
                if constexpr (REFINED) {
                    const uint2 some = load_stream_8((const uint2*)planes.refinements + (u32)(2 * nibble + row * 32 + lane));
                    nibbles = upper ? make_uint4(0, 0, some.x, some.y) : make_uint4(some.x, some.y, 0, 0);
                }
                scales = load_scale(planes.scales + (u32)(scale + 2 * strip * rows * 32)) << 16 * upper;
                return;
            }
            scales = load_scale(planes.scales + (u32)(scale + (2 * strip + upper) * rows * 32)) |
                     load_scale(planes.scales + (u32)(scale + (2 * strip + 1 - upper) * rows * 32)) << 16;
        }
        codes[0] = load_stream(code + row * 64);
        codes[1] = load_stream(code + row * 64 + 32);
        if constexpr (REFINED) nibbles = load_stream((const uint4*)planes.refinements + (u32)(nibble + row * 32 + lane));
    }

    static __device__ __forceinline__ void four(float (&sums)[2], u32 codes, u32 column, u32 nibble, u32 table) {
        sums[0] += look_up(entry<0>(codes, column) + table);
        sums[1] += look_up(entry<1>(codes, column) + table);
        sums[0] += look_up(entry<2>(codes, column) + table);
        sums[1] += look_up(entry<3>(codes, column) + table);
        if constexpr (REFINED) {
            sums[1] += look_up_refinement(entry<0>(nibble, column) + table);
            sums[0] += look_up_refinement(entry<1>(nibble, column) + table);
            sums[1] += look_up_refinement(entry<2>(nibble, column) + table);
            sums[0] += look_up_refinement(entry<3>(nibble, column) + table);
        }
    }

    // `columns`: four columns' byte offsets per register, for the first 16 codes; the others lie 16 columns away.
    __device__ __forceinline__ float sum(u32 table, const u32 (&columns)[4]) const {
        float phase[2];
        #pragma unroll
        for (int q = 0; q < 2; q++) {
            float sums[2] = {0.0f, 0.0f};  // two: shorter chains of additions
            const u32 words[4] = {codes[q].x, codes[q].y, codes[q].z, codes[q].w};
            const u32 packed[2] = {q ? nibbles.z : nibbles.x, q ? nibbles.w : nibbles.y};
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 column = columns[i] ^ (q ? 0x40404040u : 0u);
                const u32 nibble = (i & 1 ? packed[i >> 1] >> 4 : packed[i >> 1]) & 0x0f0f0f0fu;
                four(sums, words[i], column, nibble, table);
            }
            phase[q] = sums[0] + sums[1];
        }
        if constexpr (D == 4) return (phase[0] + phase[1]) * half_to_float((u16)scales);
        return phase[0] * half_to_float((u16)(scales & 0xffff)) + phase[1] * half_to_float((u16)(scales >> 16));
    }
};

__device__ __forceinline__ void add_fixed(i64* to, float value, int* bad) {
    if (!(fabsf(value) < LIMIT)) *bad = 1;
    else atomicAdd((u64*)to, (u64)__float2ll_rn(value * TO_FIXED));
}

// The block's job for one tier: load the first records, build the tables, then look up.
template <int TIER, bool DOWN>
__device__ __forceinline__ void work(Memory& m, const Shape& s, Planes planes, const u16* codebooks, const void* x,
                                     i64 x_stride, int bf16, const float* router, i64* gu, i64* out, int* bad_gu,
                                     int* bad) {
    using R = Record<TIER>;
    constexpr int D = R::D, DEPTH = 2;
    const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
    const Job& job = m.job;
    const int inner = DOWN ? s.width : s.hidden, rows = (DOWN ? s.hidden : s.width) / 32;
    const int halves = (inner + 32 * D - 1) / (32 * D), tables = (halves + 1) / 2;
    const int member = DOWN ? job.table / tables : 0, table = DOWN ? job.table - member * tables : job.table;
    const int here = min(halves - 2 * table, 2), half = here == 2 ? warp & 1 : 0, strip = 2 * table + half;
    const int step = WARPS / here, token = job.group >> 2;
    const bool short_strip = strip * 32 * D + 16 * D == inner;
    const u32 magic = (u32)(0xffffffffu / (u32)rows) + 1;  // block / rows = high word of block * magic

    auto locate = [&](int block, int& which) {
        which = DOWN ? member : (int)__umulhi((u32)block, magic);
        return DOWN ? block : block - which * rows;
    };
    auto load = [&](R& record, int block) {
        int which;
        const int row = locate(block, which);
        record.load(planes, job.at[which], strip, row, rows, short_strip, lane);
    };

    R record[DEPTH];
    int block = job.begin + warp / here;
    #pragma unroll
    for (int z = 0; z < DEPTH; z++)
        if (block + z * step < job.end) load(record[z], block + z * step);

    if constexpr (DOWN) wait_for_inputs();
    const int column = table * 64 * D + threadIdx.x;
    if (threadIdx.x < 64 * D) {
        float v = 0.0f;
        if constexpr (DOWN) {
            const int pair = job.row[member];
            if (column < s.width) {
                const i64* sums = gu + (i64)2 * pair * s.width + column;
                const float gate = __ll2float_rn(__ldcg(sums)) * FROM_FIXED;
                const float up = __ll2float_rn(__ldcg(sums + s.width)) * FROM_FIXED;
                v = router[pair] * (__fdividef(gate, 1.0f + __expf(-gate)) * up);
                if (bad_gu[token]) v = __int_as_float(0x7fffffff);
            }
        } else if (column < s.hidden) {
            v = input(x, token * x_stride + column, bf16);
        }
        m.x[threadIdx.x] = v;
    }
    __syncthreads();
    build_tables<D, DOWN>(m, codebooks + CODEBOOK[TIER], R::REFINED, warp, lane);
    __syncthreads();

    const u32 base = (u32)__cvta_generic_to_shared(m.table) + 128 * half;
    u32 columns[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        columns[i] = 0;
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            const int j = 4 * i + k + lane;
            columns[i] |= (u32)((j & 15) * 4 + (lane & 16) * 4) << 8 * k;
        }
    }
    int* flag = (DOWN ? bad : bad_gu) + token;
    for (; block < job.end; block += step * DEPTH)
        #pragma unroll
        for (int z = 0; z < DEPTH; z++) {
            const int now = block + z * step;
            if (now < job.end) {
                const float total = record[z].sum(base, columns);
                if (now + step * DEPTH < job.end) load(record[z], now + step * DEPTH);
                int which;
                const int row = locate(now, which) * 32 + lane;
                add_fixed(DOWN ? out + (i64)token * s.hidden + row : gu + job.row[which] + row, total, flag);
            }
        }
}

template <bool DOWN>
__device__ __forceinline__ void experts(Planes planes, const int4* where, const u16* codebooks, const void* x,
                                        i64 x_stride, int bf16, const void* ids, int ids64, const int* map,
                                        const float* router, Shape s, i64* gu, i64* out, int* bad_gu, int* bad) {
    extern __shared__ __align__(1024) u8 dynamic[];
    Memory& m = *(Memory*)dynamic;
    const int tid = threadIdx.x;
    if (blockIdx.x < 8 && tid < 100) asm volatile("prefetch.global.L2 [%0];" ::"l"((const u8*)codebooks + 128 * min(tid, 98)));
    constexpr int PER = DOWN ? 1 : 2;
    for (int i = tid; i < PER * s.experts; i += THREADS)
        m.where[i] = where[i / PER * 3 + (DOWN ? 2 : i % PER)];
    // `down` may read the router's ids at once: `gate_up` lets it start only after its own wait for them.
    if constexpr (!DOWN) wait_for_inputs();
    let_next_start();
    if (!DOWN && blockIdx.x == 0 && tid < MAX_TOKENS) bad[tid] = 0;
    __syncthreads();
    if (tid < 32) find_job<DOWN>(m, s, ids, ids64, map, tid);
    __syncthreads();
    if (m.job.group < 0) {
        // `finish` waits for this kernel alone, so no block of it may end before `gate_up` has.
        if constexpr (DOWN) wait_for_inputs();
        return;
    }
    switch (m.job.group & 3) {
        case 0: work<0, DOWN>(m, s, planes, codebooks, x, x_stride, bf16, router, gu, out, bad_gu, bad); break;
        case 1: work<1, DOWN>(m, s, planes, codebooks, x, x_stride, bf16, router, gu, out, bad_gu, bad); break;
        case 2: work<2, DOWN>(m, s, planes, codebooks, x, x_stride, bf16, router, gu, out, bad_gu, bad); break;
        default: work<3, DOWN>(m, s, planes, codebooks, x, x_stride, bf16, router, gu, out, bad_gu, bad);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gate_up(const u8* codes, const u8* refinements, const u16* scales, const int4* where, const u16* codebooks,
        const void* x, i64 x_stride, int bf16, const void* ids, int ids64, const int* map, int tokens, int top_k,
        int hidden, int width, int number, i64* gu, int* flags) {
    const Shape s = {tokens, top_k, hidden, width, number};
    experts<false>({codes, refinements, scales}, where, codebooks, x, x_stride, bf16, ids, ids64, map, nullptr, s, gu,
                   nullptr, flags, flags + MAX_TOKENS);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
down(const u8* codes, const u8* refinements, const u16* scales, const int4* where, const u16* codebooks,
     const void* ids, int ids64, const int* map, const float* router, int tokens, int top_k, int hidden, int width,
     int number, i64* gu, i64* out, int* flags) {
    const Shape s = {tokens, top_k, hidden, width, number};
    experts<true>({codes, refinements, scales}, where, codebooks, nullptr, 0, 0, ids, ids64, map, router, s, gu, out,
                  flags, flags + MAX_TOKENS);
}

// One thread per two outputs or two sums of gu; y is contiguous.
extern "C" __global__ void __launch_bounds__(256)
finish(i64* gu, i64* out, int* flags, void* y, int bf16, int tokens, int top_k, int hidden, int width) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, outputs = (i64)tokens * hidden / 2;
    wait_for_inputs();
    const longlong2 zero = {0, 0};
    if (i < outputs) {
        const longlong2 sums = __ldcg((const longlong2*)out + i);
        float low = __ll2float_rn(sums.x) * FROM_FIXED, high = __ll2float_rn(sums.y) * FROM_FIXED;
        if (flags[MAX_TOKENS + (int)(2 * i) / hidden]) low = high = __int_as_float(0x7fffffff);
        u32 both;
        if (bf16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
        else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
        ((u32*)y)[i] = both;
        ((longlong2*)out)[i] = zero;
    }
    if (i < (i64)tokens * top_k * width) ((longlong2*)gu)[i] = zero;
    if (i < MAX_TOKENS) flags[i] = 0;
}
