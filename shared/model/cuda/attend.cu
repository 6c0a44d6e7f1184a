// Attention of packed sequences for Hopper (sm_90a): causal, aligned at the bottom right, grouped queries, bfloat16,
// forward.
//
// The host compiles this file for one model (NVRTC), with the model's shape as macros:
//
//   HEADS, KV_HEADS   as in config.json; HEADS is a multiple of KV_HEADS, at most TILE_ROWS times it
//   HEAD_DIM          128
//
// A tile is TILE_ROWS rows: TILE_QUERIES neighbouring queries with all the heads that share one head of keys (row = query ·
// GROUP + head of the group). So all rows of a tile end at nearly the same key: little of the last block of keys is masked,
// little of a sequence's last tile is empty, and keys are fetched once for all heads that read them.
//
// A block of threads stays on its multiprocessor and works on the tiles of its list, one after another. One warpgroup
// fetches (TMA), the others multiply (wgmma), 64 rows each. A multiplying warpgroup's loop goes over the blocks of keys of
// all its tiles as if they were one sequence: it starts the scores of the next block, which may be the next tile's, before
// it needs the results of this one, so the tensor cores work while it is at the softmax, and at a tile's end, too. The two
// multiplying warpgroups take turns in giving them work. Of a tile's last block of keys only 64 are multiplied where no more
// are seen.
//
// Slower on an H100: three warpgroups without such overlap, no turns, whole last blocks, and tiles that are stored while the
// next products run.
//
// Launch: blocks of THREADS threads, as many as there are multiprocessors (one fits); SHARED_BYTES of dynamic shared memory
// (cuFuncSetAttribute). The host lists the tiles of all sequences and heads of keys (struct Tile) and deals them to the
// blocks of threads: block b works on tiles starts[b] to starts[b + 1], in their order. Any dealing gives the same bits. It
// is fast if all get about the same number of blocks of keys, tiles that are worked on at a time read the same keys, and the
// largest come first: list sequences by falling length, of each its heads of keys, of each its tiles from the last; give
// each to the block that has least to do.
//
// Maps, bfloat16, 128-byte swizzle, no interleave, what is outside is zero:
//
//   queries       of the projection's rows: sizes (HEAD_DIM, HEADS, rows), strides in bytes of a head and of a row,
//                 box (64, GROUP, TILE_QUERIES)
//   keys_values   of [key rows, 2, KV_HEADS, HEAD_DIM]: sizes (HEAD_DIM, 2 * KV_HEADS, key rows), strides likewise,
//                 box (64, 1, TILE_KEYS)
//
// out is [rows, HEADS * HEAD_DIM]; rows outside all sequences stay as they are.
//
// A tile reads rows behind the last of its sequence; no result depends on them. Every key that a query sees is its own
// sequence's, and what is not finite in one sequence does not reach another. As in any such kernel, what is not finite in a
// value of the same sequence may reach queries before it.

typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define WARPGROUP 128
// Those that multiply.
#define WARPGROUPS 2
#define ALL_LANES 0xffffffffu
#define GROUP (HEADS / KV_HEADS)
#define TILE_ROWS (64 * WARPGROUPS)
#define TILE_QUERIES (TILE_ROWS / GROUP)
#define TILE_KEYS 128
#define THREADS (WARPGROUP * (1 + WARPGROUPS))
#define STAGES 2
// What the swizzle's pattern needs.
#define ALIGNMENT 1024
// A tile lies in shared memory as two halves of 64 columns, a row of a half in 128 bytes.
#define HALF_COLUMNS 64
#define HALF_ROW 128
#define QUERY_HALF (TILE_ROWS * HALF_ROW)
#define KEY_HALF (TILE_KEYS * HALF_ROW)
#define QUERY_BYTES (2 * QUERY_HALF)
#define KEY_BYTES (2 * KEY_HALF)
#define SHARED_BYTES (ALIGNMENT + STAGES * (QUERY_BYTES + 2 * KEY_BYTES) + 6 * STAGES * 8)
// Registers of a thread: 65536 in all, in steps of 8.
#define FETCH_REGISTERS 24
#define MULTIPLY_REGISTERS 240
// exp(x · HEAD_DIM^-0.5) = exp2(x · SCALE)
#define SCALE (0.08838834764831845f * 1.4426950408889634f)
#define MINUS_INFINITY __int_as_float(0xff800000)

static_assert(HEAD_DIM == 128, "other heads need other tiles");
// What the host launches with.
static_assert(THREADS == 384 && SHARED_BYTES == 197728, "src/cuda/hopper.rs has the same numbers");
static_assert(HEADS % KV_HEADS == 0 && GROUP <= TILE_ROWS, "queries are grouped evenly");

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

// A tile of queries, as the host lists it.
struct alignas(16) Tile {
    int query;  // first row of the projection
    int key;    // first row of the sequence's keys
    int seen;   // keys that its first query sees: at least one; each further query sees one more
    // Its queries (1 to TILE_QUERIES) | its head of keys << 8 | rows of its last block of keys that are the sequence's (1 to
    // TILE_KEYS) << 16.
    int what;
};

__device__ __forceinline__ Tile tile_at(const Tile *tiles, int at) {
    const int4 v = __ldg((const int4 *)tiles + at);
    return {v.x, v.y, v.z, v.w};
}
__device__ __forceinline__ int queries_of(const Tile &tile) { return tile.what & 0xff; }
__device__ __forceinline__ int head_of(const Tile &tile) { return tile.what >> 8 & 0xff; }
__device__ __forceinline__ int own_keys(const Tile &tile) { return tile.what >> 16; }
// Keys that its last query sees.
__device__ __forceinline__ int most_seen(const Tile &tile) { return tile.seen + queries_of(tile) - 1; }
__device__ __forceinline__ int blocks_of(const Tile &tile) { return (most_seen(tile) + TILE_KEYS - 1) / TILE_KEYS; }

// ---------------------------------------------------------------------------------------------------------------------------
// Barriers in shared memory. A ring's place n is its stage n % STAGES; a stage's phase changes each time round.

__device__ __forceinline__ int stage_of(u32 place) { return place % STAGES; }
__device__ __forceinline__ u32 phase_of(u32 place) { return place / STAGES & 1; }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Until the phase is over.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@over bra done;\n"
        "bra again;\n"
        "done:\n"
        "}" ::"r"(barrier),
        "r"(phase)
        : "memory");
}

// Of full barriers: by ring and stage; of empty ones: three rings further.
enum { QUERIES, KEYS, VALUES, RINGS };
__device__ __forceinline__ u32 full(u32 barriers, int ring, u32 place) {
    return barriers + (ring * STAGES + stage_of(place)) * 8;
}
__device__ __forceinline__ u32 empty(u32 barriers, int ring, u32 place) { return full(barriers, RINGS + ring, place); }

// Barriers of the hardware: 1 and 2 are the turns of the multiplying warpgroups, those from 4 on are for each alone.
__device__ __forceinline__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------------
// Fetching.

// A box at (column, head, row) to shared memory; the barrier counts its bytes, those outside the tensor included.
__device__ __forceinline__ void fetch_box(u32 to, const TensorMap &map, u32 barrier, int column, int head, int row) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
        "l"((u64)&map), "r"(barrier), "r"(column), "r"(head), "r"(row)
        : "memory");
}

__device__ __forceinline__ void fetch_halves(u32 to, u32 half, const TensorMap &map, u32 barrier, u32 bytes, int head, int row) {
    barrier_expect(barrier, bytes);
    fetch_box(to, map, barrier, 0, head, row);
    fetch_box(to + half, map, barrier, HALF_COLUMNS, head, row);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Multiplying.

// Of an operand with 128-byte swizzle: eight rows of a half are 1024 bytes. leading: bytes from one half to the other where
// columns are the product's columns (values); it has no meaning where they are summed over (queries, keys).
__device__ __forceinline__ u64 descriptor(u32 address, u32 leading) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// A descriptor further on by bytes.
#define FURTHER(descriptor, bytes) ((descriptor) + ((bytes) >> 4))

__device__ __forceinline__ void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Results of a product may be touched from here on only: the compiler does not know that they come late.
template <int COUNT> __device__ __forceinline__ void arrived(float (&x)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(x[i])::"memory");
}

#define R8(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define R32(x, i) R8(x, i), R8(x, i + 8), R8(x, i + 16), R8(x, i + 24)
#define NAMES_32                                                                                                                  \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                                     \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                                  \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                \
             "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// s (+)= queries · keysᵀ over 16 columns. 64 rows; 128 keys, or 64 in the first half of s.
__device__ __forceinline__ void multiply_scores(float (&s)[64], u64 queries, u64 keys, int add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64 "}, %64, %65, add, 1, 1, 0, 0;\n}"
                 : R32(s, 0), R32(s, 32)
                 : "l"(queries), "l"(keys), "r"(add));
}
__device__ __forceinline__ void multiply_half_scores(float (&s)[64], u64 queries, u64 keys, int add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32 "}, %32, %33, add, 1, 1, 0, 0;\n}"
                 : R32(s, 0)
                 : "l"(queries), "l"(keys), "r"(add));
}
// o (+)= p · values over 16 keys; p in registers, values with their columns side by side (transposed, as wgmma calls it).
__device__ __forceinline__ void multiply_values(float (&o)[64], const u32 *p, u64 values, int add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64 "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;\n}"
                 : R32(o, 0), R32(o, 32)
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(values), "r"(add));
}

// Starts the product of the warpgroup's queries and of all keys of a block, or of its first 64 (then the first half of s is
// the result, and the second, which is masked, keeps what it has). Whether it is short is known to the compiler: products in
// flight across a branch would be waited for there.
template <bool IS_SHORT> __device__ __forceinline__ void start_scores(float (&s)[64], u64 queries, u64 keys) {
    multiply_fence();
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; step++) {
        const u64 left = FURTHER(queries, step / 4 * QUERY_HALF + step % 4 * 32);
        const u64 right = FURTHER(keys, step / 4 * KEY_HALF + step % 4 * 32);
        if (IS_SHORT) multiply_half_scores(s, left, right, step > 0);
        else multiply_scores(s, left, right, step > 0);
    }
    multiply_commit();
}

template <bool IS_SHORT> __device__ __forceinline__ void start_values(float (&o)[64], const u32 (&p)[32], u64 values, bool add) {
    multiply_fence();
#pragma unroll
    for (int step = 0; step < TILE_KEYS / (IS_SHORT ? 32 : 16); step++)
        multiply_values(o, p + 4 * step, FURTHER(values, step * 16 * HALF_ROW), step > 0 || add);
    multiply_commit();
}

// Zeroes rows of values behind the sequence's last: their weight is zero, but zero times infinity is no number. Each
// multiplying warpgroup does it for itself; that both write the same zeros does no harm.
__device__ __forceinline__ void clear_behind(u32 values, int own, int thread, int warpgroup) {
    const u32 bytes = (TILE_KEYS - own) * HALF_ROW;
    for (u32 at = thread * 16; at < 2 * bytes; at += WARPGROUP * 16) {
        const u32 to = values + own * HALF_ROW + (at < bytes ? at : at - bytes + KEY_HALF);
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
    }
    // The tensor cores read past the caches' usual order.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    named_sync(4 + warpgroup, WARPGROUP);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Softmax. Of a product of 64 rows and 8 n columns thread t holds, for each eight columns, two neighbours in row t / 32 * 16
// + t % 32 / 4 (elements 0 and 1 of four) and two in the row eight further (2 and 3); the columns are t % 4 * 2 and the
// next.

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 pair_of(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

struct Softmax {
    // Of the thread's two rows: the largest score, the same in the four lanes of a row; the sum of the lane's own weights.
    float largest[2];
    float total[2];
};

// Scores become weights. seen: by row, keys of this block that it sees, less the lane's first column. factor: what all
// weights before must be multiplied by.
__device__ __forceinline__ void weigh(float (&s)[64], Softmax &softmax, float (&factor)[2], bool is_masked, const int (&seen)[2]) {
    if (is_masked) {
#pragma unroll
        for (int i = 0; i < 64; i++)
            if (i / 4 * 8 + i % 2 >= seen[i / 2 % 2]) s[i] = MINUS_INFINITY;
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
        // Two chains, for the latency.
        float largest = fmaxf(softmax.largest[row], s[2 * row]), other = s[2 * row + 1];
#pragma unroll
        for (int i = 1; i < 16; i++) {
            largest = fmaxf(largest, s[4 * i + 2 * row]);
            other = fmaxf(other, s[4 * i + 2 * row + 1]);
        }
        largest = fmaxf(largest, other);
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
        const float shift = largest * SCALE;
        // A tile's first block holds a key that every row sees, so from there on there is a largest.
        factor[row] = exp2_of(fmaf(softmax.largest[row], SCALE, -shift));
        softmax.largest[row] = largest;
        float total = 0.0f, more = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float &a = s[4 * i + 2 * row], &b = s[4 * i + 2 * row + 1];
            a = exp2_of(fmaf(a, SCALE, -shift));
            b = exp2_of(fmaf(b, SCALE, -shift));
            total += a;
            more += b;
        }
        softmax.total[row] = fmaf(softmax.total[row], factor[row], total + more);
    }
}

// The weights as the left operand of the next product, which has the layout of this one's results.
__device__ __forceinline__ void narrow_weights(u32 (&p)[32], const float (&s)[64]) {
#pragma unroll
    for (int i = 0; i < 32; i++) p[i] = pair_of(s[2 * i], s[2 * i + 1]);
}

__device__ __forceinline__ void rescale(float (&o)[64], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] *= factor[i / 2 % 2];
}

// What a row's weights are divided by, or rather multiplied with.
__device__ __forceinline__ float share_of(float total) {
    total += __shfl_xor_sync(ALL_LANES, total, 1);
    total += __shfl_xor_sync(ALL_LANES, total, 2);
    return reciprocal(total);
}

// Of the thread's first or second row, four words that lie eight columns apart.
__device__ __forceinline__ void narrow_part(u32 (&w)[4], const float (&o)[64], int second, int part, float share) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int from = (part * 4 + i) * 4 + 2 * second;
        w[i] = pair_of(o[from] * share, o[from + 1] * share);
    }
}

// Stores them if the row is a query of the tile. row: the thread's first of the tile.
__device__ __forceinline__ void store_part(u32 (&w)[4], int second, int part, const Tile &tile, int row, uint4 *out) {
    const int lane = threadIdx.x % 4;
    // Four lanes hold a word each of four times eight columns; after two exchanges each holds eight columns.
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 got = __shfl_xor_sync(ALL_LANES, lane & 1 ? w[i] : w[i + 1], 1);
        if (lane & 1) w[i] = got;
        else w[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 got = __shfl_xor_sync(ALL_LANES, lane & 2 ? w[i] : w[i + 2], 2);
        if (lane & 2) w[i] = got;
        else w[i + 2] = got;
    }
    int at = row + 8 * second;
    // Where GROUP is a power of two these numbers are cheap, and the compiler would hold them in registers throughout: too many for
    // products in flight, which it would then wait for one by one (C7511).
    if (TILE_ROWS % GROUP == 0) asm volatile("" : "+r"(at));
    const int query = at / GROUP, head = at % GROUP;
    if (query >= queries_of(tile)) return;
    uint4 *to = out + ((size_t)(tile.query + query) * HEADS + head_of(tile) * GROUP + head) * (HEAD_DIM / 8) + lane;
    to[part * 4] = make_uint4(w[0], w[1], w[2], w[3]);
}

// Divides by the sums and stores.
__device__ __forceinline__ void store(const float (&o)[64], const float (&totals)[2], const Tile &tile, int row, uint4 *out) {
#pragma unroll
    for (int second = 0; second < 2; second++) {
        const float share = share_of(totals[second]);
#pragma unroll
        for (int part = 0; part < 4; part++) {
            u32 w[4];
            narrow_part(w, o, second, part, share);
            store_part(w, second, part, tile, row, out);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------

// The thread that fetches: for each block of keys the keys, and the values of the block before, which are needed later.
__device__ __forceinline__ void fetch(const TensorMap &queries, const TensorMap &keys_values, const Tile *tiles, int at, int end,
                                      u32 query_tiles, u32 key_tiles, u32 value_tiles, u32 barriers) {
    u32 query_place = 0, key_place = 0, value_place = 0;
    int value_head = 0, value_row = -1;
    const auto fetch_values = [&] {
        barrier_wait(empty(barriers, VALUES, value_place), phase_of(value_place) ^ 1);
        fetch_halves(value_tiles + stage_of(value_place) * KEY_BYTES, KEY_HALF, keys_values, full(barriers, VALUES, value_place),
                     KEY_BYTES, value_head, value_row);
        value_place++;
    };
    Tile upcoming = tile_at(tiles, at);
    for (; at < end; at++) {
        const Tile tile = upcoming;
        if (at + 1 < end) upcoming = tile_at(tiles, at + 1);
        const int head = head_of(tile);
        barrier_wait(empty(barriers, QUERIES, query_place), phase_of(query_place) ^ 1);
        fetch_halves(query_tiles + stage_of(query_place) * QUERY_BYTES, QUERY_HALF, queries, full(barriers, QUERIES, query_place),
                     2 * GROUP * TILE_QUERIES * HALF_ROW, head * GROUP, tile.query);
        query_place++;
        const int blocks = blocks_of(tile);
        for (int block = 0; block < blocks; block++) {
            const int row = tile.key + block * TILE_KEYS;
            barrier_wait(empty(barriers, KEYS, key_place), phase_of(key_place) ^ 1);
            fetch_halves(key_tiles + stage_of(key_place) * KEY_BYTES, KEY_HALF, keys_values, full(barriers, KEYS, key_place),
                         KEY_BYTES, head, row);
            key_place++;
            if (value_row >= 0) fetch_values();
            value_head = KV_HEADS + head, value_row = row;
        }
    }
    fetch_values();
}

// A multiplying warpgroup: what a thread of it holds, and where it is in its list of tiles.
struct Multiplier {
    const Tile *tiles;
    int at, end;
    uint4 *out;
    u32 barriers, value_tiles;
    u64 own_queries, all_keys, all_values;
    int warpgroup, row, further[2];
    bool is_first_lane;

    Tile tile, upcoming;
    int block, blocks;
    u32 query_place, key_place, value_place;
    Softmax softmax;
    float factor[2];
    float s[64], o[64];
    u32 p[32];

    __device__ __forceinline__ Multiplier(const Tile *tiles, int at, int end, uint4 *out, u32 query_tiles, u32 key_tiles,
                                          u32 value_tiles, u32 barriers, int warpgroup)
        : tiles(tiles), at(at), end(end), out(out), barriers(barriers), value_tiles(value_tiles), warpgroup(warpgroup), query_place(0),
          key_place(0), value_place(0) {
        const int thread = threadIdx.x % WARPGROUP;
        is_first_lane = thread % WARP == 0;
        row = warpgroup * 64 + thread / WARP * 16 + thread % WARP / 4;
        // Keys that the thread's rows see more than the tile's first query, less the lane's first column.
        further[0] = row / GROUP - thread % 4 * 2;
        further[1] = (row + 8) / GROUP - thread % 4 * 2;
        own_queries = descriptor(query_tiles + warpgroup * 64 * HALF_ROW, 16);
        all_keys = descriptor(key_tiles, 16);
        all_values = descriptor(value_tiles, KEY_HALF);
        upcoming = tile_at(tiles, at);
        take_upcoming();
        // Each tile's first product sets it; this is for the compiler.
#pragma unroll
        for (int i = 0; i < 64; i++) o[i] = 0.0f;
    }

    __device__ __forceinline__ void take_upcoming() {
        tile = upcoming;
        if (at + 1 < end) upcoming = tile_at(tiles, at + 1);
        block = 0;
        blocks = blocks_of(tile);
        softmax = {{MINUS_INFINITY, MINUS_INFINITY}, {0.0f, 0.0f}};
    }

    __device__ __forceinline__ u64 queries() const { return FURTHER(own_queries, stage_of(query_place) * QUERY_BYTES); }
    __device__ __forceinline__ u64 keys() const { return FURTHER(all_keys, stage_of(key_place) * KEY_BYTES); }
    __device__ __forceinline__ u64 values() const { return FURTHER(all_values, stage_of(value_place) * KEY_BYTES); }
    __device__ __forceinline__ void wait_for(int ring, u32 place) const { barrier_wait(full(barriers, ring, place), phase_of(place)); }
    __device__ __forceinline__ void release(int ring, u32 place) const {
        if (is_first_lane) barrier_arrive(empty(barriers, ring, place));
    }
    // Whether the tile's last block is short.
    __device__ __forceinline__ bool ends_short() const {
        return most_seen(tile) - (blocks - 1) * TILE_KEYS <= TILE_KEYS / 2;
    }

    __device__ __forceinline__ void weigh_block() {
        const int seen = tile.seen - block * TILE_KEYS, by_row[2] = {seen + further[0], seen + further[1]};
        weigh(s, softmax, factor, seen < TILE_KEYS, by_row);
    }
    __device__ __forceinline__ void clear_values() const {
        if (block + 1 < blocks || own_keys(tile) == TILE_KEYS) return;
        wait_for(VALUES, value_place);
        clear_behind(value_tiles + stage_of(value_place) * KEY_BYTES, own_keys(tile), threadIdx.x % WARPGROUP, warpgroup);
    }
    // Values of this block and scores of the next. p holds the weights of this block, o what the tile's blocks before it
    // gave. ENDS_TILE: this block is the tile's last. IS_SHORT: its last block, which is this one if it ends the tile and
    // the next if not. A tile's first block counts as long for its scores.
    template <bool ENDS_TILE, bool IS_SHORT> __device__ __forceinline__ void step() {
        constexpr bool SCORES_SHORT = IS_SHORT && !ENDS_TILE, VALUES_SHORT = IS_SHORT && ENDS_TILE;
        if (ENDS_TILE) {
            clear_values();
            query_place++;
            wait_for(QUERIES, query_place);
        }
        wait_for(KEYS, key_place);
        named_sync(1 + warpgroup, 2 * WARPGROUP);
        start_scores<SCORES_SHORT>(s, queries(), keys());
        wait_for(VALUES, value_place);
        start_values<VALUES_SHORT>(o, p, values(), block > 0);
        named_arrive(2 - warpgroup, 2 * WARPGROUP);
        multiply_wait<1>();
        arrived(s);
        release(KEYS, key_place++);

        // On to the block whose scores these are.
        const Tile finished = tile;
        const float totals[2] = {softmax.total[0], softmax.total[1]};
        if (ENDS_TILE) {
            at++;
            take_upcoming();
        } else {
            block++;
        }
        if (block + 1 == blocks) release(QUERIES, query_place);
        weigh_block();
        // Here, while the product runs, and not behind it. ptxas would draw the wait up to the softmax's start, but not over
        // a branch; this one is never taken.
        wait_for(VALUES, value_place);
        arrived(s);

        multiply_wait<0>();
        arrived(o);
        release(VALUES, value_place++);
        if (ENDS_TILE) store(o, totals, finished, row, out);
        else rescale(o, factor);
        narrow_weights(p, s);
    }

    __device__ __forceinline__ void work() {
        // The first block's scores have nothing beside them.
        wait_for(QUERIES, query_place);
        wait_for(KEYS, key_place);
        start_scores<false>(s, queries(), keys());
        multiply_wait<0>();
        arrived(s);
        if (warpgroup == 1) named_arrive(1, 2 * WARPGROUP);
        release(KEYS, key_place++);
        if (blocks == 1) release(QUERIES, query_place);
        weigh_block();
        narrow_weights(p, s);
        for (;;) {
            if (block + 1 < blocks) {
                if (block + 2 == blocks && ends_short()) step<false, true>();
                else step<false, false>();
            } else {
                if (at + 1 == end) break;
                if (ends_short()) step<true, true>();
                else step<true, false>();
            }
        }
        clear_values();
        wait_for(VALUES, value_place);
        start_values<false>(o, p, values(), block > 0);
        multiply_wait<0>();
        arrived(o);
        store(o, softmax.total, tile, row, out);
        // The other's last arrival.
        if (warpgroup == 0) named_sync(1, 2 * WARPGROUP);
    }
};

// starts: by block of threads, and one more: where its part of tiles begins.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys_values, const int *starts,
           const Tile *tiles, uint4 *out) {
    extern __shared__ unsigned char shared[];
    const int at = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    if (at >= end) return;

    const u32 query_tiles = ((u32)__cvta_generic_to_shared(shared) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const u32 key_tiles = query_tiles + STAGES * QUERY_BYTES;
    const u32 value_tiles = key_tiles + STAGES * KEY_BYTES;
    const u32 barriers = value_tiles + STAGES * KEY_BYTES;
    if (threadIdx.x == 0) {
        for (int ring = 0; ring < RINGS; ring++)
            for (u32 stage = 0; stage < STAGES; stage++) {
                barrier_init(full(barriers, ring, stage), 1);
                // A lane of each multiplying warp.
                barrier_init(empty(barriers, ring, stage), WARPGROUPS * (WARPGROUP / WARP));
            }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    // The same for all lanes, and the compiler is to know it.
    const int role = __shfl_sync(ALL_LANES, (int)threadIdx.x / WARPGROUP, 0);
    if (role == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FETCH_REGISTERS));
        if (threadIdx.x == 0) fetch(queries, keys_values, tiles, at, end, query_tiles, key_tiles, value_tiles, barriers);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLY_REGISTERS));
        Multiplier multiplier(tiles, at, end, out, query_tiles, key_tiles, value_tiles, barriers, role - 1);
        multiplier.work();
    }
}
