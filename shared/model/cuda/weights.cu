// Kernels for 16-bit weights where they lie: checksums, copies, and some of their elements changed.
//
// The host compiles this file once for a card (NVRTC), whatever the model. Tests compile it for a CPU too, with ON_HOST defined:
// host.cpp.
//
// A model's hundreds of tensors are one launch: beside proofs, whose products keep all multiprocessors, each launch waits for one of
// them to end. The work comes as a table of pieces, of at most 2^31 elements each, which the blocks share.
//
// Launch: blocks of WEIGHT_THREADS, any number of them. Sums are modulo 2^64 and independent of the order.

typedef unsigned short element;
typedef unsigned int position;
typedef unsigned long long wide;

#define WEIGHT_THREADS 256
#define WEIGHT_WARPS (WEIGHT_THREADS / 32)
#define ELEMENTS_OF_A_VECTOR 8

// Elements one behind the other: of a tensor whose checksum is a total, `first` of them before these.
struct Stretch {
    const element *x;
    wide first, count, total;
};

// Elements one behind the other, and where they go.
struct Move {
    const element *from;
    element *to;
    wide count;
};

// Some elements of a tensor of `length`, and as many values. No position comes twice. One behind the tensor is left alone: positions
// come from a file, which was checked and then read again.
struct Some {
    element *x;
    const position *positions;
    element *values;
    wide count, length;
};

// Elements as they are and as they will be, of a tensor whose checksum is a total.
struct Difference {
    const element *before, *after;
    const position *positions;
    wide count, total;
};

// Adds what each thread of the block brings to *total. All threads of the block have to come here.
__device__ __forceinline__ void add_to_total(wide own, wide *total) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) own += __shfl_xor_sync(0xffffffffu, own, lanes);
    __shared__ wide parts[WEIGHT_WARPS];
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
        wide sum = 0;
        for (int warp = 0; warp < WEIGHT_WARPS; warp++) sum += parts[warp];
        atomicAdd(total, sum);
    }
    // The next piece's parts take the place of these.
    __syncthreads();
}

// Two elements behind each other, of which the first is the low one: Σ bits, and Σ bits·place from `place` on.
__device__ __forceinline__ void add_pair(unsigned pair, unsigned place, unsigned &plain, unsigned &placed) {
    const unsigned first = pair & 0xffffu, second = pair >> 16;
    plain += first + second;
    placed += first * place + second * (place + 1);
}

// totals[total] += Σ bits·(2·index + 1).
extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS) sum_elements(const Stretch *pieces, wide count, wide *totals) {
    for (wide at = blockIdx.x; at < count; at += gridDim.x) {
        const Stretch piece = pieces[at];
        // Elements before the first vector: a tensor may begin anywhere in its neighbours' memory.
        const wide unaligned = (16 - (wide)piece.x % 16) % 16 / sizeof(element);
        const wide head = unaligned < piece.count ? unaligned : piece.count;
        const wide vectors = (piece.count - head) / ELEMENTS_OF_A_VECTOR, tail = head + vectors * ELEMENTS_OF_A_VECTOR;
        wide own = 0;
        if (threadIdx.x < head) own += piece.x[threadIdx.x] * (2 * (piece.first + threadIdx.x) + 1);
        const wide last = tail + threadIdx.x;
        if (last < piece.count) own += piece.x[last] * (2 * (piece.first + last) + 1);
        const uint4 *vector = (const uint4 *)(piece.x + head);
#pragma unroll 4
        for (wide v = threadIdx.x; v < vectors; v += WEIGHT_THREADS) {
            const uint4 bits = vector[v];
            unsigned plain = 0, placed = 0;
            add_pair(bits.x, 0, plain, placed);
            add_pair(bits.y, 2, plain, placed);
            add_pair(bits.z, 4, plain, placed);
            add_pair(bits.w, 6, plain, placed);
            own += plain * (2 * (piece.first + head + v * ELEMENTS_OF_A_VECTOR) + 1) + 2 * (wide)placed;
        }
        add_to_total(own, &totals[piece.total]);
    }
}

// totals[total] += Σ (after − before)·(2·position + 1).
extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS)
    sum_differences(const Difference *pieces, wide count, wide *totals) {
    for (wide at = blockIdx.x; at < count; at += gridDim.x) {
        const Difference piece = pieces[at];
        wide own = 0;
        for (wide i = threadIdx.x; i < piece.count; i += WEIGHT_THREADS)
            own += ((wide)piece.after[i] - (wide)piece.before[i]) * (2 * (wide)piece.positions[i] + 1);
        add_to_total(own, &totals[piece.total]);
    }
}

extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS) copy_elements(const Move *pieces, wide count) {
    for (wide at = blockIdx.x; at < count; at += gridDim.x) {
        const Move piece = pieces[at];
        wide copied = 0;
        if (((wide)piece.from | (wide)piece.to) % 16 == 0) {
            const wide vectors = piece.count / ELEMENTS_OF_A_VECTOR;
            const uint4 *from = (const uint4 *)piece.from;
            uint4 *to = (uint4 *)piece.to;
#pragma unroll 4
            for (wide v = threadIdx.x; v < vectors; v += WEIGHT_THREADS) to[v] = from[v];
            copied = vectors * ELEMENTS_OF_A_VECTOR;
        }
        for (wide i = copied + threadIdx.x; i < piece.count; i += WEIGHT_THREADS) piece.to[i] = piece.from[i];
    }
}

// values[i] = x[positions[i]].
extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS) read_elements(const Some *pieces, wide count) {
    for (wide at = blockIdx.x; at < count; at += gridDim.x) {
        const Some piece = pieces[at];
#pragma unroll 4
        for (wide i = threadIdx.x; i < piece.count; i += WEIGHT_THREADS) {
            const position place = piece.positions[i];
            if (place < piece.length) piece.values[i] = piece.x[place];
        }
    }
}

// x[positions[i]] = values[i].
extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS) write_elements(const Some *pieces, wide count) {
    for (wide at = blockIdx.x; at < count; at += gridDim.x) {
        const Some piece = pieces[at];
#pragma unroll 4
        for (wide i = threadIdx.x; i < piece.count; i += WEIGHT_THREADS) {
            const position place = piece.positions[i];
            if (place < piece.length) piece.x[place] = piece.values[i];
        }
    }
}

// *differ = 1 if an x[positions[i]] is another than values[i], or behind the tensor.
extern "C" __global__ void __launch_bounds__(WEIGHT_THREADS) compare_elements(const Some *pieces, wide count, int *differ) {
    int other = 0;
    for (wide at = blockIdx.x; at < count; at += gridDim.x) {
        const Some piece = pieces[at];
#pragma unroll 4
        for (wide i = threadIdx.x; i < piece.count; i += WEIGHT_THREADS) {
            const position place = piece.positions[i];
            other |= place >= piece.length || piece.x[place] != piece.values[i];
        }
    }
    // Whoever finds one writes the same.
    if (other) *differ = 1;
}
