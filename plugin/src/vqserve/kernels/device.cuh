// What the sources in CUDA C++ share; NVRTC finds it as "device.cuh".

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Tiers a, b, c, d. Codebooks lie behind each other in this order, each base before its refinement.
__device__ __constant__ const int CODEBOOK[4] = {0, 2048, 4224, 5248};

// Six buffers' half: of gate and up, or of down.
struct Planes {
    const u8 *codes, *refinements;
    const u16* scales;
};

// Chips before Hopper run kernels strictly one after the other.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("{.reg .f16 h; mov.b16 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ float input(const void* x, i64 at, int bf16) {
    const u16 bits = ((const u16*)x)[at];
    return bf16 ? __uint_as_float((u32)bits << 16) : half_to_float(bits);
}

__device__ __forceinline__ u32 load_scale(const u16* from) {
    u16 v;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(from));
    return v;
}

// The local number of the expert that a router chose, -1 if there is none here.
__device__ __forceinline__ int local_expert(const void* ids, int ids64, const int* map, int at) {
    const int expert = ids64 ? (int)((const i64*)ids)[at] : ((const int*)ids)[at];
    return map != nullptr && expert >= 0 ? map[expert] : expert;
}
