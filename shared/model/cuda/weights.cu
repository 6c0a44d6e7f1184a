// Kernels for 16-bit weights where they lie: checksums, and some of their elements changed.
//
// The host compiles this file once for a card (NVRTC), whatever the model. Tests compile it for a CPU too, with ON_HOST defined:
// host.cpp.
//
// Launch: blocks of WEIGHT_THREADS, any number of them; they take turns. Sums are modulo 2^64 and independent of the order.

typedef unsigned short element;
typedef unsigned int position;
typedef unsigned long long wide;

#define WEIGHT_THREADS 256
#define WEIGHT_WARPS (WEIGHT_THREADS / 32)
#define ELEMENTS_OF_A_VECTOR 8

// Adds what each thread of the block brings to *total.
__device__ __forceinline__ void add_to_total(wide own, wide *total) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) own += __shfl_xor_sync(0xffffffffu, own, lanes);
    __shared__ wide parts[WEIGHT_WARPS];
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x > 0) return;
    wide sum = 0;
    for (int warp = 0; warp < WEIGHT_WARPS; warp++) sum += parts[warp];
    atomicAdd(total, sum);
}

// Two elements behind each other, of which the first is the low one: Σ bits, and Σ bits·place from `place` on.
__device__ __forceinline__ void add_pair(unsigned pair, unsigned place, unsigned &plain, unsigned &placed) {
    const unsigned first = pair & 0xffffu, second = pair >> 16;
    plain += first + second;
    placed += first * place + second * (place + 1);
}

// *total += Σ x[index]·(2·index + 1).
extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS) sum_elements(const element *x, wide count, wide *total) {
    const wide thread = (wide)blockIdx.x * WEIGHT_THREADS + threadIdx.x, threads = (wide)gridDim.x * WEIGHT_THREADS;
    // Elements before the first vector: a tensor may begin anywhere in its neighbours' memory.
    const wide unaligned = (16 - (wide)x % 16) % 16 / sizeof(element);
    const wide head = unaligned < count ? unaligned : count;
    const wide vectors = (count - head) / ELEMENTS_OF_A_VECTOR, tail = head + vectors * ELEMENTS_OF_A_VECTOR;
    wide own = 0;
    if (thread < head) own += x[thread] * (2 * thread + 1);
    if (thread < count - tail) own += x[tail + thread] * (2 * (tail + thread) + 1);
    const uint4 *vector = (const uint4 *)(x + head);
#pragma unroll 4
    for (wide at = thread; at < vectors; at += threads) {
        const uint4 v = vector[at];
        unsigned plain = 0, placed = 0;
        add_pair(v.x, 0, plain, placed);
        add_pair(v.y, 2, plain, placed);
        add_pair(v.z, 4, plain, placed);
        add_pair(v.w, 6, plain, placed);
        own += plain * (2 * (head + at * ELEMENTS_OF_A_VECTOR) + 1) + 2 * (wide)placed;
    }
    add_to_total(own, total);
}

// *total += Σ (after[at] − before[at])·(2·positions[at] + 1).
extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS)
    sum_differences(const element *before, const element *after, const position *positions, wide count, wide *total) {
    const wide threads = (wide)gridDim.x * WEIGHT_THREADS;
    wide own = 0;
    for (wide at = (wide)blockIdx.x * WEIGHT_THREADS + threadIdx.x; at < count; at += threads)
        own += ((wide)after[at] - (wide)before[at]) * (2 * (wide)positions[at] + 1);
    add_to_total(own, total);
}

// out[at] = x[positions[at]].
extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS)
    read_elements(const element *x, const position *positions, wide count, element *out) {
    const wide threads = (wide)gridDim.x * WEIGHT_THREADS;
#pragma unroll 4
    for (wide at = (wide)blockIdx.x * WEIGHT_THREADS + threadIdx.x; at < count; at += threads) out[at] = x[positions[at]];
}

// x[positions[at]] = values[at]; no position comes twice.
extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS)
    write_elements(element *x, const position *positions, const element *values, wide count) {
    const wide threads = (wide)gridDim.x * WEIGHT_THREADS;
#pragma unroll 4
    for (wide at = (wide)blockIdx.x * WEIGHT_THREADS + threadIdx.x; at < count; at += threads) x[positions[at]] = values[at];
}

// *differ = 1 if x[positions[at]] is another than values[at] anywhere.
extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS)
    compare_elements(const element *x, const position *positions, const element *values, wide count, int *differ) {
    const wide threads = (wide)gridDim.x * WEIGHT_THREADS;
    int other = 0;
#pragma unroll 4
    for (wide at = (wide)blockIdx.x * WEIGHT_THREADS + threadIdx.x; at < count; at += threads)
        other |= x[positions[at]] != values[at];
    // Whoever finds one writes the same.
    if (other) *differ = 1;
}
