// Kernels of the proof forward pass in bfloat16, between the matrix products and attention.
//
// The host compiles this file for one model and one card (NVRTC), with the model's shape as macros:
//
//   HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB   as in config.json; HIDDEN, INNER and VOCAB are multiples of 8,
//                                                     HEAD_DIM of 4
//   EPSILON                                           of the norms, a float
//   HEAD_NORM                                         1 if queries and keys have norms of their own (Qwen3)
//
// Tests compile it for a CPU too, with ON_HOST defined: host.cpp.
//
// Rounding points are those of transformers' modeling code: every value that it stores in bfloat16 is rounded to bfloat16
// here, also where it stays in a register.
//
// Launch: blocks of the *_THREADS below, one block a row unless a kernel says otherwise.

typedef unsigned short bf16;
typedef unsigned int u32;

#define TOP 16
#define VECTOR 8
#define WARP 32
#define ALL_LANES 0xffffffffu
#define ROUND_UP(x, to) (((x) + (to) - 1) / (to) * (to))

__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((u32)x << 16); }

// To the nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ bf16 narrow(float x) {
#ifdef ON_HOST
    return host_narrow(x);
#else
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#endif
}

__device__ __forceinline__ float rounded(float x) { return widen(narrow(x)); }

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ u32 pair_of(float low, float high) { return (u32)narrow(low) | (u32)narrow(high) << 16; }

__device__ __forceinline__ void unpack(uint4 v, float out[VECTOR]) {
    out[0] = low(v.x), out[1] = high(v.x), out[2] = low(v.y), out[3] = high(v.y);
    out[4] = low(v.z), out[5] = high(v.z), out[6] = low(v.w), out[7] = high(v.w);
}

__device__ __forceinline__ uint4 pack(const float in[VECTOR]) {
    return make_uint4(pair_of(in[0], in[1]), pair_of(in[2], in[3]), pair_of(in[4], in[5]), pair_of(in[6], in[7]));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------------
// Residual and norm: x += addend (rounded), out = weight * rounded(x / rms(x)).

#define HIDDEN_VECTORS (HIDDEN / VECTOR)
#define NORM_PER_THREAD 2
#define NORM_WIDE ROUND_UP((HIDDEN_VECTORS + NORM_PER_THREAD - 1) / NORM_PER_THREAD, WARP)
#define NORM_THREADS (NORM_WIDE > 1024 ? 1024 : NORM_WIDE)
#define NORM_ROUNDS ((HIDDEN_VECTORS + NORM_THREADS - 1) / NORM_THREADS)

__device__ __forceinline__ float square(float x) { return x * x; }

// 1 / rms of a row, by the sum of its squares. Rounded behind each operation, as libtorch's are.
__device__ __forceinline__ float norm_scale(float squares, float share) {
    return rsqrtf(__fadd_rn(__fmul_rn(squares, share), EPSILON));
}

// Squares of a row in shared memory, by one warp. They are added in the order of libtorch's mean over rows of float32
// (ATen/native/cuda/Reduce.cuh of 2.11: a lane's four sums take neighbours of 128 columns, or of shorter rows every 32nd), so that
// norms are those of transformers' bit for bit; in another order one value in 10,000 rounds to the other side. Rows of 8,192 and
// more libtorch divides among warps: there they may differ.
__device__ __forceinline__ float sum_of_squares(const uint2 *row, int lane) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (HIDDEN >= 4 * WARP) {
#pragma unroll 8
        for (int at = lane; at < HIDDEN / 4; at += WARP) {
            const uint2 v = row[at];
            sums[0] += square(low(v.x)), sums[1] += square(high(v.x));
            sums[2] += square(low(v.y)), sums[3] += square(high(v.y));
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = i * WARP + lane;
            if (at >= HIDDEN) continue;
            const u32 pair = at % 4 < 2 ? row[at / 4].x : row[at / 4].y;
            sums[i] = square(at % 2 == 0 ? low(pair) : high(pair));
        }
    }
    return warp_sum(sums[0] + sums[1] + sums[2] + sums[3]);
}

// addend is null for the first norm of the network, which leaves x alone.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    residual_norm(uint4 *x, const uint4 *addend, const uint4 *weight, uint4 *out) {
    const size_t row = (size_t)blockIdx.x * HIDDEN_VECTORS;
    float values[NORM_ROUNDS][VECTOR];
    __shared__ uint2 held[2 * HIDDEN_VECTORS];
    __shared__ float squares;
#pragma unroll
    for (int round = 0; round < NORM_ROUNDS; round++) {
        const int at = round * NORM_THREADS + threadIdx.x;
        if (at >= HIDDEN_VECTORS) continue;
        uint4 sums = x[row + at];
        unpack(sums, values[round]);
        if (addend) {
            float more[VECTOR];
            unpack(addend[row + at], more);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) values[round][i] = rounded(values[round][i] + more[i]);
            sums = pack(values[round]);
            x[row + at] = sums;
        }
        held[2 * at] = make_uint2(sums.x, sums.y);
        held[2 * at + 1] = make_uint2(sums.z, sums.w);
    }
    __syncthreads();
    if (threadIdx.x < WARP) {
        const float sum = sum_of_squares(held, threadIdx.x);
        if (threadIdx.x == 0) squares = sum;
    }
    __syncthreads();
    const float scale = norm_scale(squares, 1.0f / HIDDEN);
#pragma unroll
    for (int round = 0; round < NORM_ROUNDS; round++) {
        const int at = round * NORM_THREADS + threadIdx.x;
        if (at >= HIDDEN_VECTORS) continue;
        float factors[VECTOR];
        unpack(weight[at], factors);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) values[round][i] = factors[i] * rounded(values[round][i] * scale);
        out[row + at] = pack(values[round]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------
// Rotary embedding on the fused projection's rows (queries, keys, values), with the norms of heads before it.

#define HALF (HEAD_DIM / 2)
#define PAIRS (HALF / 2)
#define PAIR_ROUNDS ((PAIRS + WARP - 1) / WARP)
#define QKV_PAIRS ((HEADS + 2 * KV_HEADS) * HEAD_DIM / 2)
#define QUERY_WARPS (HEADS < 4 ? HEADS : 4)
#define QUERY_THREADS (QUERY_WARPS * WARP)
#define KEY_THREADS (KV_HEADS * WARP)

// Pairs of neighbours of one head that a lane holds: of the first half and of the second.
struct HeadPart {
    float first[PAIR_ROUNDS][2];
    float second[PAIR_ROUNDS][2];
};

__device__ __forceinline__ void load_head(HeadPart &part, const u32 *head, int lane) {
#pragma unroll
    for (int round = 0; round < PAIR_ROUNDS; round++) {
        const int at = round * WARP + lane;
        const u32 a = at < PAIRS ? head[at] : 0, b = at < PAIRS ? head[PAIRS + at] : 0;
        part.first[round][0] = low(a), part.first[round][1] = high(a);
        part.second[round][0] = low(b), part.second[round][1] = high(b);
    }
}

#if HEAD_DIM == 128
// The squares of four neighbouring columns, of which this lane holds two and its neighbour the others.
__device__ __forceinline__ float sum_of_four(const float pair[2]) {
    const float own[2] = {square(pair[0]), square(pair[1])};
    const float other[2] = {__shfl_xor_sync(ALL_LANES, own[0], 1), __shfl_xor_sync(ALL_LANES, own[1], 1)};
    return threadIdx.x % 2 == 0 ? own[0] + own[1] + other[0] + other[1] : other[0] + other[1] + own[0] + own[1];
}
#endif

// Squares of a head, in the order of libtorch's mean for 128 columns and for 16, 32 and 64 (see sum_of_squares).
__device__ __forceinline__ float sum_of_head(const HeadPart &part) {
#if HEAD_DIM == 128
    float sum = sum_of_four(part.first[0]) + sum_of_four(part.second[0]);
#pragma unroll
    for (int offset = WARP / 2; offset > 1; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
    return sum;
#else
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int round = 0; round < PAIR_ROUNDS; round++)
#pragma unroll
        for (int i = 0; i < 2; i++) sums[i] += square(part.first[round][i]) + square(part.second[round][i]);
    return warp_sum(sums[0]) + warp_sum(sums[1]);
#endif
}

__device__ __forceinline__ void norm_head(HeadPart &part, const HeadPart &weight) {
    const float scale = norm_scale(sum_of_head(part), 1.0f / HEAD_DIM);
#pragma unroll
    for (int round = 0; round < PAIR_ROUNDS; round++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            part.first[round][i] = rounded(weight.first[round][i] * rounded(part.first[round][i] * scale));
            part.second[round][i] = rounded(weight.second[round][i] * rounded(part.second[round][i] * scale));
        }
}

// cos and sin hold the halves of one position's row, which are equal, in first and second.
__device__ __forceinline__ void rotate_and_store(const HeadPart &part, const HeadPart &cos, const HeadPart &sin, u32 *head,
                                                 int lane) {
#pragma unroll
    for (int round = 0; round < PAIR_ROUNDS; round++) {
        const int at = round * WARP + lane;
        if (at >= PAIRS) continue;
        float a[2], b[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float x = part.first[round][i], y = part.second[round][i];
            a[i] = rounded(x * cos.first[round][i]) + rounded(-y * sin.first[round][i]);
            b[i] = rounded(y * cos.second[round][i]) + rounded(x * sin.second[round][i]);
        }
        head[at] = pair_of(a[0], a[1]);
        head[PAIRS + at] = pair_of(b[0], b[1]);
    }
}

// Queries in place. cos, sin: [rows, HEAD_DIM].
extern "C" __global__ void __launch_bounds__(QUERY_THREADS)
    rotate_queries(u32 *qkv, const u32 *cos, const u32 *sin, const u32 *weight) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const size_t row = blockIdx.x;
    HeadPart c, s, factors;
    load_head(c, cos + row * HALF, lane);
    load_head(s, sin + row * HALF, lane);
    if (HEAD_NORM) load_head(factors, weight, lane);
    u32 *heads = qkv + row * QKV_PAIRS;
#pragma unroll 4
    for (int head = warp; head < HEADS; head += QUERY_WARPS) {
        HeadPart part;
        load_head(part, heads + head * HALF, lane);
        if (HEAD_NORM) norm_head(part, factors);
        rotate_and_store(part, c, s, heads + head * HALF, lane);
    }
}

// Keys and values of the row that source names to the row of the block: out is [key rows, 2, KV_HEADS, HEAD_DIM], keys first.
// A shared prompt's rows are copied for each sequence that continues it.
extern "C" __global__ void __launch_bounds__(KEY_THREADS)
    gather_keys(const u32 *qkv, const int *source, const u32 *cos, const u32 *sin, const u32 *weight, u32 *out) {
    const int lane = threadIdx.x % WARP, head = threadIdx.x / WARP;
    const size_t row = source[blockIdx.x];
    const u32 *key = qkv + row * QKV_PAIRS + (HEADS + head) * HALF;
    const u32 *value = key + KV_HEADS * HALF;
    u32 *to = out + ((size_t)blockIdx.x * 2 * KV_HEADS + head) * HALF;
    HeadPart part, c, s;
    load_head(part, key, lane);
    load_head(c, cos + row * HALF, lane);
    load_head(s, sin + row * HALF, lane);
    if (HEAD_NORM) {
        HeadPart factors;
        load_head(factors, weight, lane);
        norm_head(part, factors);
    }
    rotate_and_store(part, c, s, to, lane);
    for (int at = lane; at < HALF; at += WARP) to[KV_HEADS * HALF + at] = value[at];
}

// ---------------------------------------------------------------------------------------------------------------------------
// out = rounded(silu(gate)) * up. Blocks: (rows, ceil(INNER / 8 / SILU_THREADS)).

#define SILU_THREADS 256
#define INNER_VECTORS (INNER / VECTOR)

extern "C" __global__ void __launch_bounds__(SILU_THREADS) silu_up(const uint4 *gate_up, uint4 *out) {
    const int at = blockIdx.y * SILU_THREADS + threadIdx.x;
    if (at >= INNER_VECTORS) return;
    const uint4 *row = gate_up + (size_t)blockIdx.x * 2 * INNER_VECTORS;
    float gate[VECTOR], up[VECTOR];
    unpack(row[at], gate);
    unpack(row[INNER_VECTORS + at], up);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) gate[i] = rounded(gate[i] / (1.0f + expf(-gate[i]))) * up[i];
    out[(size_t)blockIdx.x * INNER_VECTORS + at] = pack(gate);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Log-softmax of the chosen token and probability of EOS, one pass over the logits of a row.

#define CHOOSE_THREADS 512
#define VOCAB_VECTORS (VOCAB / VECTOR)

struct Softmax {
    float largest;
    float total;
};

__device__ __forceinline__ Softmax merged(Softmax a, Softmax b) {
    const float largest = fmaxf(a.largest, b.largest);
    // Both may be empty: -inf - -inf is no number. What poisons one of them must stay.
    if (largest == __int_as_float(0xff800000)) return {largest, a.total + b.total};
    return {largest, a.total * expf(a.largest - largest) + b.total * expf(b.largest - largest)};
}

// logits: [rows, VOCAB]. eos: token or -1 by row. logprobs and eos_probabilities by row; the latter rounded to bfloat16, and
// untouched where there is no token.
extern "C" __global__ void __launch_bounds__(CHOOSE_THREADS)
    choose(const uint4 *logits, const int *targets, const int *eos, float *logprobs, float *eos_probabilities) {
    const uint4 *row = logits + (size_t)blockIdx.x * VOCAB_VECTORS;
    Softmax own = {__int_as_float(0xff800000), 0.0f};
    float poison = 0.0f;
#pragma unroll 4
    for (int at = threadIdx.x; at < VOCAB_VECTORS; at += CHOOSE_THREADS) {
        float values[VECTOR];
        unpack(row[at], values);
        float largest = own.largest;
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            largest = fmaxf(largest, values[i]);
            // fmaxf drops NaN; this keeps it, and makes one of infinity.
            poison += values[i] * 0.0f;
        }
        float total = own.total * expf(own.largest - largest);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) total += expf(values[i] - largest);
        own = {largest, total};
    }
    own.total += poison;
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const Softmax other = {__shfl_xor_sync(ALL_LANES, own.largest, offset), __shfl_xor_sync(ALL_LANES, own.total, offset)};
        own = merged(own, other);
    }
    __shared__ Softmax parts[CHOOSE_THREADS / WARP];
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = own;
    __syncthreads();
    if (threadIdx.x > 0) return;
    Softmax all = parts[0];
    for (int warp = 1; warp < CHOOSE_THREADS / WARP; warp++) all = merged(all, parts[warp]);
    const bf16 *values = (const bf16 *)row;
    logprobs[blockIdx.x] = widen(values[targets[blockIdx.x]]) - all.largest - logf(all.total);
    const int token = eos[blockIdx.x];
    if (token >= 0) eos_probabilities[blockIdx.x] = rounded(expf(widen(values[token]) - all.largest) / all.total);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Buckets of the sixteen largest activations of each row, in order of index; of equal magnitudes the lowest index is taken.
// One warp a row, SELECT_WARPS rows a block.

#define SELECT_FIT (49152 / (HIDDEN * 2 + 64))
#define SELECT_WARPS (SELECT_FIT > 4 ? 4 : SELECT_FIT)
#define SELECT_THREADS (SELECT_WARPS * WARP)
#define SELECT_ROUNDS ((HIDDEN_VECTORS + WARP - 1) / WARP)
#define MAGNITUDE 0x7fffu
#define INFINITE 0x7f80u

__device__ __forceinline__ signed char bucket_of(bf16 value) {
    // First binary32 value of buckets 1 to 7, as bits.
    const u32 bits[7] = {0x3fb06fe1, 0x409504f4, 0x414744fd, 0x41f80000, 0x429637f1, 0x433404f4, 0x43d6c4fd};
    int bucket = 0;
#pragma unroll
    for (int i = 0; i < 7; i++) bucket += ((value & MAGNITUDE) << 16) >= bits[i];
    return (value & 0x8000u) ? -bucket : bucket;
}

// How many of the eight magnitudes reach least.
__device__ __forceinline__ int reaching(uint4 v, u32 least) {
    int count = 0;
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) count += ((words[i] & MAGNITUDE) >= least) + (((words[i] >> 16) & MAGNITUDE) >= least);
    return count;
}

// hidden: [rows, HIDDEN]. buckets: [rows, TOP]; the first of a row with NaN or infinity is NOT_FINITE, which is no bucket.
#define NOT_FINITE -128

extern "C" __global__ void __launch_bounds__(SELECT_THREADS)
    select_buckets(const uint4 *hidden, signed char *buckets, int rows) {
    __shared__ uint4 held[SELECT_WARPS][HIDDEN_VECTORS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int row = blockIdx.x * SELECT_WARPS + warp;
    if (row >= rows) return;
    for (int at = lane; at < HIDDEN_VECTORS; at += WARP) held[warp][at] = hidden[(size_t)row * HIDDEN_VECTORS + at];
    __syncwarp();
    // The magnitude of rank sixteen: the largest that sixteen values reach, found bit by bit.
    u32 least = 0;
    for (int bit = 14; bit >= 0; bit--) {
        const u32 tried = least | 1u << bit;
        int count = 0;
        for (int at = lane; at < HIDDEN_VECTORS; at += WARP) count += reaching(held[warp][at], tried);
        if (warp_sum(count) >= TOP) least = tried;
    }
    int above = 0, infinite = 0;
    for (int at = lane; at < HIDDEN_VECTORS; at += WARP) {
        above += reaching(held[warp][at], least + 1);
        infinite += reaching(held[warp][at], INFINITE);
    }
    int equal_left = TOP - warp_sum(above);
    if (warp_sum(infinite) > 0) {
        if (lane == 0) buckets[(size_t)row * TOP] = NOT_FINITE;
        return;
    }
    int taken = 0;
    for (int round = 0; round < SELECT_ROUNDS; round++) {
        const int at = round * WARP + lane;
        const uint4 v = at < HIDDEN_VECTORS ? held[warp][at] : make_uint4(0, 0, 0, 0);
        const int is_there = at < HIDDEN_VECTORS;
        const int larger = is_there ? reaching(v, least + 1) : 0;
        const int equal = is_there ? reaching(v, least) - larger : 0;
        if (!__any_sync(ALL_LANES, larger + equal)) continue;
        // Counts before this lane: larger ones in the low half, equal ones in the high half.
        int before = larger | equal << 16;
#pragma unroll
        for (int offset = 1; offset < WARP; offset *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, before, offset);
            if (lane >= offset) before += other;
        }
        const int all = __shfl_sync(ALL_LANES, before, WARP - 1);
        before -= larger | equal << 16;
        int larger_before = before & 0xffff, equal_before = before >> 16;
        if (larger + equal > 0) {
            const bf16 *values = (const bf16 *)&held[warp][at];
            for (int i = 0; i < VECTOR; i++) {
                const u32 magnitude = values[i] & MAGNITUDE;
                if (magnitude < least) continue;
                const int place = taken + larger_before + min(equal_before, equal_left);
                if (magnitude > least) {
                    larger_before++;
                } else if (equal_before++ >= equal_left) {
                    continue;
                }
                buckets[(size_t)row * TOP + place] = bucket_of(values[i]);
            }
        }
        const int equal_taken = min(all >> 16, equal_left);
        taken += (all & 0xffff) + equal_taken;
        equal_left -= equal_taken;
    }
}
