// The feed-forward's first half in one kernel, for Hopper (sm_90a): out = rounded(silu(rounded(gate))) * rounded(up), where
// gate | up = x * weight^T. The product's 2 * INNER columns are never written to memory.
//
// The host compiles this file for one model (NVRTC), with the model's shape as macros:
//
//   HIDDEN, INNER   as in config.json; HIDDEN is a multiple of 64 and at least 576, INNER a multiple of 128
//
// Launch: as many blocks as there are multiprocessors, rounded down to a multiple of CLUSTER (any multiple is right; fewer blocks only
// take longer), of THREADS threads; SHARED_BYTES of dynamic shared memory (cuFuncSetAttribute), and none that is static: the ring has to
// begin on a multiple of 1024 bytes. rows is the number of x's rows.
//
// Maps, bfloat16, 128-byte swizzle, no interleave, what is outside is zero:
//
//   x       sizes (HIDDEN, rows), box (64, 128)
//   weight  sizes (HIDDEN, 2 * INNER), the gate's rows and then those of up; box (64, 128)
//   out     sizes (INNER, rows), box (64, 64)
//
// The results are those of the product and of silu_up in kernels.cu, bit for bit, where the product adds along HIDDEN from the first
// column to the last. Slower on an H100: silu before the next tile begins, one block a cluster, tiles of 4 groups, and hints to L2.
//
// A block computes tiles of 128 rows by 128 columns of out, that is 128 columns of gate and the same 128 of up: both stand one behind
// the other in shared memory, so that one m64n256k16 gives a thread gate and up of the same elements, and what follows the product
// needs no exchange. One warpgroup loads (one thread of it), two multiply, 64 rows each, and go their own pace: while one of them is
// between two tiles, the tensor cores are the other's. What a consumer does with a finished tile is mostly silu, which the unit for
// special functions needs 1000 cycles for: it packs gate and up to bfloat16 and does the rest in slices, one behind each of the next
// tile's first k-blocks, while that block's products are under way.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Blocks that share the weights' tile: one brings the gate's half, the other that of up.
#define CLUSTER 2
// Tiles of rows, counted in clusters, that pass over the weights together.
#define GROUP 8
// Of the ring in shared memory.
#define STAGES 4
#define TILE_ROWS 128
#define TILE_COLUMNS 128
#define BLOCK_K 64
#define K_BLOCKS (HIDDEN / BLOCK_K)
#define STEPS (BLOCK_K / 16)
#define COLUMN_TILES (INNER / TILE_COLUMNS)

// Float accumulators of a thread; the first half are gate. Pairs of neighbours of either.
#define ACCUMULATORS 128
#define PAIRS (ACCUMULATORS / 4)
// Parts in which a consumer hands a tile out, 16 columns each.
#define SLICES (TILE_COLUMNS / 16)

#define WARP 32
#define WARPGROUP 128
#define CONSUMERS 2
#define THREADS ((1 + CONSUMERS) * WARPGROUP)

// Bytes of shared memory: a stage is x's tile, then gate's and up's; behind the stages each consumer's part of out, then barriers.
#define X_BYTES (TILE_ROWS * BLOCK_K * 2)
#define HALF_BYTES (TILE_COLUMNS * BLOCK_K * 2)
#define STAGE_BYTES (X_BYTES + 2 * HALF_BYTES)
#define CONSUMER_ROWS (TILE_ROWS / CONSUMERS)
#define BOX_COLUMNS 64
#define BOX_BYTES (CONSUMER_ROWS * BOX_COLUMNS * 2)
#define OUT_BYTES (TILE_COLUMNS / BOX_COLUMNS * BOX_BYTES)
#define OUT_AT (STAGES * STAGE_BYTES)
#define BARRIERS_AT (OUT_AT + CONSUMERS * OUT_BYTES)
#define SHARED_BYTES (BARRIERS_AT + 2 * STAGES * 8)

// Registers of a thread, of the 168 that 384 threads start with: together the roles have just as many.
#define PRODUCER_REGISTERS 24
#define CONSUMER_REGISTERS 240

static_assert(HIDDEN % BLOCK_K == 0 && INNER % TILE_COLUMNS == 0, "shape");
static_assert(K_BLOCKS > SLICES, "one slice of the tile before behind each k-block");
// What the host launches with.
static_assert(THREADS == 384 && SHARED_BYTES == 229440, "src/cuda/gate_up.rs has the same numbers");

// What cuTensorMapEncodeTiled writes.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

// ---------------------------------------------------------------------------------------------------------------------------
// Barriers in shared memory. Addresses are those of the shared window, 32 bits.

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Until the phase of this parity is over. A fresh barrier counts as if a phase of parity 1 were over.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 over;
    do {
        asm volatile("{\n"
                     ".reg .pred over;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, over;\n"
                     "}"
                     : "=r"(over)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!over);
}

// The one arrival of this phase, and how many bytes belong to it.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// The same address in a block of the cluster.
__device__ __forceinline__ u32 in_block(u32 address, u32 block) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

__device__ __forceinline__ void barrier_arrive(u32 barrier_in_cluster) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier_in_cluster) : "memory");
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive;\n"
                 "barrier.cluster.wait;" ::
                     : "memory");
}

// Named barriers of the hardware; 0 is __syncthreads'.
#define CONSUMER_BARRIER(consumer) (1 + (consumer))

__device__ __forceinline__ void named_sync(u32 name, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------------
// The copy engine.

__device__ __forceinline__ void prefetch(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void load_tile(u32 to, const TensorMap &from, u32 barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
                 "l"(&from), "r"(barrier), "r"(column), "r"(row)
                 : "memory");
}

// To the same place in all blocks of the cluster; each block's own barrier counts the bytes.
__device__ __forceinline__ void load_tile_for_all(u32 to, const TensorMap &from, u32 barrier, int column, int row) {
    const u16 all = (1 << CLUSTER) - 1;
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
                 "l"(&from), "r"(barrier), "r"(column), "r"(row), "h"(all)
                 : "memory");
}

__device__ __forceinline__ void store_tile(const TensorMap &to, u32 from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&to), "r"(from), "r"(column),
                 "r"(row)
                 : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------------
// The tensor cores.

// Descriptor of a matrix in shared memory whose rows are 128 bytes long and swizzled: groups of 8 rows lie 1024 bytes apart.
// 16 columns further is 32 bytes further.
#define DESCRIPTOR (1ull << 62 | (u64)(1024 >> 4) << 32 | 1ull << 16)
#define STEP_OF_DESCRIPTOR (32 >> 4)

__device__ __forceinline__ u64 descriptor(u32 address) { return DESCRIPTOR | (u64)((address & 0x3ffff) >> 4); }

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `pending` of the groups committed last are under way.
template <int pending> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

#define EIGHT(d, i)                                                                                                               \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define THIRTY_TWO(d, i) EIGHT(d, i), EIGHT(d, i + 8), EIGHT(d, i + 16), EIGHT(d, i + 24)

// d = a * b^T, plus d if `more`: 64 x 16 by 256 x 16. Of d, warp w of the group has rows 16 w to 16 w + 15; of these a lane has,
// in d[4 j] to d[4 j + 3], columns 8 j + 2 (lane % 4) and the next of row lane / 4, then the same of the row 8 further down.
__device__ __forceinline__ void product(float (&d)[ACCUMULATORS], u64 a, u64 b, int more) {
    asm volatile("{\n"
                 ".reg .pred more;\n"
                 "setp.ne.b32 more, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
                 "}, %128, %129, more, 1, 1, 0, 0;\n"
                 "}"
                 : THIRTY_TWO(d, 0), THIRTY_TWO(d, 32), THIRTY_TWO(d, 64), THIRTY_TWO(d, 96)
                 : "l"(a), "l"(b), "r"(more));
}

// The compiler does not know that the accumulators change until the wait: it must not read them before this.
__device__ __forceinline__ void products_done(float (&d)[ACCUMULATORS]) {
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// ---------------------------------------------------------------------------------------------------------------------------
// Silu and what it is multiplied with, by pairs of neighbours: the lower half of a word is the first.

__device__ __forceinline__ u32 pair_of(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// x / (1 + exp(-x)) within a few units of float's last place. Far below zero exp is infinite and the result -0.
__device__ __forceinline__ float silu(float x) {
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
    return x * inverse;
}

// rounded(silu(gate)) * up. A product of two bfloat16 is exact in float, so rounding it once here is what rounding the float is.
__device__ __forceinline__ u32 silu_times(u32 gate, u32 up) {
    const u32 activated = pair_of(silu(__uint_as_float(gate << 16)), silu(__uint_as_float(gate & 0xffff0000u)));
    u32 out;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(activated), "r"(up));
    return out;
}

// ---------------------------------------------------------------------------------------------------------------------------

// Tiles of a cluster in their order: CLUSTER tiles of rows, one of columns. GROUP of them, 8 times 256 rows, go through all columns
// before the next rows come. With 66 clusters at work on a square of about 8 by 8 tiles, a moment's working set is as small as it can
// be (30 MB of 50 in L2 for HIDDEN = 3584), the group's x stays in L2 for its whole pass, and the weights are read from memory once a
// group and not once a tile of rows.
struct Tiles {
    int row_groups, count;

    __device__ __forceinline__ explicit Tiles(int rows) {
        row_groups = (rows + CLUSTER * TILE_ROWS - 1) / (CLUSTER * TILE_ROWS);
        count = row_groups * COLUMN_TILES;
    }

    // First row of the cluster and first column of out.
    __device__ __forceinline__ void place(int tile, int &row, int &column) const {
        const int group = tile / (GROUP * COLUMN_TILES), within = tile % (GROUP * COLUMN_TILES);
        const int left = row_groups - group * GROUP, size = left < GROUP ? left : GROUP;
        row = (group * GROUP + within % size) * (CLUSTER * TILE_ROWS);
        column = within / size * TILE_COLUMNS;
    }
};

// One thread loads for the block.
__device__ __forceinline__ void produce(const TensorMap &x, const TensorMap &weight, const Tiles &tiles, int first, int clusters,
                                        u32 base, u32 rank) {
    const u32 full = base + BARRIERS_AT, empty = full + STAGES * 8;
    u32 stage = 0, phase = 0;
    for (int tile = first; tile < tiles.count; tile += clusters) {
        int row, column;
        tiles.place(tile, row, column);
        row += rank * TILE_ROWS;
        for (int k = 0; k < HIDDEN; k += BLOCK_K) {
            const u32 to = base + stage * STAGE_BYTES, barrier = full + stage * 8;
            barrier_wait(empty + stage * 8, phase ^ 1);
            // Also what the other block sends; that may come before this.
            barrier_expect(barrier, STAGE_BYTES);
            load_tile(to, x, barrier, k, row);
            load_tile_for_all(to + X_BYTES + rank * HALF_BYTES, weight, barrier, k, rank * INNER + column);
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }
}

// A warpgroup that multiplies.
__device__ __forceinline__ void consume(const TensorMap &out, const Tiles &tiles, int first, int clusters, u32 base, int consumer,
                                        u32 rank, int rows) {
    const int thread = threadIdx.x % WARPGROUP, lane = thread % WARP, warp = thread / WARP;
    const u32 full = base + BARRIERS_AT, empty = full + STAGES * 8, staging = base + OUT_AT + consumer * OUT_BYTES;
    const u32 x_at = base + consumer * (CONSUMER_ROWS * BLOCK_K * 2), weight_at = base + X_BYTES;
    // One thread for each block of the cluster tells it that a stage is free.
    const bool releases = thread < CLUSTER;
    const u32 empty_there = in_block(empty, releases ? thread : 0);
    // stmatrix takes four 8 x 8 matrices: rows 0 to 7 and 8 to 15 of the warp, of 8 columns, then of the next 8. A lane gives the
    // address of one row of one of them; the swizzle exchanges the 16-byte pieces of a row by the row's number.
    const u32 lane_to = staging + (warp * 16 + lane % 16) * (BOX_COLUMNS * 2) + ((lane / 16) ^ (lane % 8)) * 16;

    float d[ACCUMULATORS];
    u32 gate[PAIRS], up[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) gate[i] = up[i] = 0;
    u32 stage = 0, phase = 0, before = 0;

    const auto multiply = [&](int k) {
        const u64 a = descriptor(x_at + stage * STAGE_BYTES), b = descriptor(weight_at + stage * STAGE_BYTES);
        barrier_wait(full + stage * 8, phase);
        products_begin();
        product(d, a, b, k > 0);
        products_commit();
        // The block before has been read when its products are done; this one keeps the tensor cores busy meanwhile.
        products_wait<1>();
        if (k > 0 && releases) barrier_arrive(empty_there + before * 8);
#pragma unroll
        for (int step = 1; step < STEPS; step++) product(d, a + step * STEP_OF_DESCRIPTOR, b + step * STEP_OF_DESCRIPTOR, 1);
        products_commit();
        before = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
    };
    // The tile before is out of this consumer's staging once the copy engine has read it.
    const auto hand_out_begin = [&] {
        if (thread == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        named_sync(CONSUMER_BARRIER(consumer), WARPGROUP);
    };
    const auto hand_out = [&](int slice) {
        u32 part[4];
#pragma unroll
        for (int i = 0; i < 4; i++) part[i] = silu_times(gate[4 * slice + i], up[4 * slice + i]);
        const u32 to = (lane_to ^ (slice * 32 % 128)) + slice * 16 / BOX_COLUMNS * BOX_BYTES;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(part[0]), "r"(part[1]),
                     "r"(part[2]), "r"(part[3])
                     : "memory");
    };
    const auto hand_out_end = [&](int tile) {
        // What threads wrote is for the copy engine to read.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        named_sync(CONSUMER_BARRIER(consumer), WARPGROUP);
        if (thread == 0 && tile >= 0) {
            int row, column;
            tiles.place(tile, row, column);
            row += rank * TILE_ROWS + consumer * CONSUMER_ROWS;
            // The copy engine leaves out rows beyond the last.
            if (row < rows) {
                for (int box = 0; box < TILE_COLUMNS / BOX_COLUMNS; box++)
                    store_tile(out, staging + box * BOX_BYTES, column + box * BOX_COLUMNS, row);
            }
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
    };

    int tile = first;
    for (; tile < tiles.count; tile += clusters) {
        // Of the first tile's zeros nothing is stored.
#pragma unroll
        for (int k = 0; k < SLICES; k++) {
            multiply(k);
            if (k == 0) hand_out_begin();
            hand_out(k);
            if (k == SLICES - 1) hand_out_end(tile == first ? -1 : tile - clusters);
        }
#pragma unroll 1
        for (int k = SLICES; k < K_BLOCKS; k++) multiply(k);
        products_done(d);
        if (releases) barrier_arrive(empty_there + before * 8);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            gate[i] = pair_of(d[2 * i], d[2 * i + 1]);
            up[i] = pair_of(d[ACCUMULATORS / 2 + 2 * i], d[ACCUMULATORS / 2 + 2 * i + 1]);
        }
    }
    if (tile > first) {
        hand_out_begin();
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) hand_out(slice);
        hand_out_end(tile - clusters);
    }
    // Shared memory has to live until the last tile is out.
    if (thread == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    gate_up_silu(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                 const __grid_constant__ TensorMap out, int rows) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    const u32 full = base + BARRIERS_AT, empty = full + STAGES * 8;
    // One value for a warp, which the compiler can only see from the shuffle.
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    const u32 rank = blockIdx.x % CLUSTER;
    const int first = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    const Tiles tiles(rows);

    if (threadIdx.x == 0) {
        if (base % 1024 != 0) __trap();
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(full + stage * 8, 1);
            // The weights of all blocks come at once, so a stage is free when it is free in all of them.
            barrier_init(empty + stage * 8, CONSUMERS * CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (threadIdx.x == WARPGROUP) prefetch(x), prefetch(weight), prefetch(out);
    // No block may load into another, or arrive there, before its barriers are.
    cluster_sync();

    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (threadIdx.x == 0) produce(x, weight, tiles, first, clusters, base, rank);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        consume(out, tiles, first, clusters, base, warpgroup - 1, rank, rows);
    }
    // And until the other block has made its last arrivals here.
    cluster_sync();
}
