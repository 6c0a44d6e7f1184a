// Runs one kernel on a CPU, for tests.
//
//   host KERNEL COLUMNS LINES THREADS ARGUMENT…
//
// Kernels for weights take a table of pieces first, in which addresses are written as the argument's number times 2^48 plus an offset.
//
// An argument is bytes:N (memory, whose N bytes are read from standard input), bytes+K:N (the same from byte K of a vector on), null, int:N, or wide:N. Afterwards all memory is written to standard output, in the order of the arguments.
//
// Each thread of a block is a fiber; blocks run one after the other. Threads that exchange values without all of their warp, or wait
// for a block that has left in part, end the program: on a GPU that would be undefined.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#define ON_HOST
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct alignas(8) uint2 {
    unsigned x, y;
};

struct Index {
    unsigned x = 0, y = 0;
};

static Index threadIdx, blockIdx, gridDim;

static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static int min(int a, int b) { return a < b ? a : b; }

template <typename To, typename From>
static To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

static float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
static float __int_as_float(int bits) { return bits_as<float>(bits); }
static float __fmul_rn(float x, float y) { return x * y; }
static float __fadd_rn(float x, float y) { return x + y; }
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

static unsigned short host_narrow(float x) {
    if (std::isnan(x)) return 0x7fff;
    const unsigned bits = bits_as<unsigned>(x);
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Vectors behind all memory, and what they hold.
constexpr size_t GUARD = 8;
constexpr char CANARY = 0x5a;

[[noreturn]] static void fail(const char *text) {
    std::fprintf(stderr, "host kernels: %s\n", text);
    std::exit(1);
}

// ---------------------------------------------------------------------------------------------------------------------------

constexpr unsigned LANES = 32;
constexpr size_t STACK_BYTES = 1 << 16;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    bool is_over = false;
};

// Where threads wait for each other: those of a warp, or of a block.
struct Meeting {
    unsigned members = 0, arrived = 0, times = 0;
};

static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static std::vector<Meeting> warps;
static Meeting block;
static std::vector<uint64_t> exchanged;
static unsigned current;
static bool has_moved;
static std::function<void()> body;

static void meet(Meeting &at) {
    const unsigned before = at.times;
    has_moved = true;
    if (++at.arrived == at.members) {
        at.arrived = 0;
        at.times++;
    }
    while (at.times == before) swapcontext(&fibers[current].context, &scheduler);
    has_moved = true;
}

// The value that lane `from` of this thread's warp brings.
template <typename Value>
static Value exchange(unsigned mask, Value own, unsigned from) {
    if (mask != 0xffffffffu) fail("a mask that is not full");
    const unsigned first = current / LANES * LANES;
    uint64_t bits = 0;
    std::memcpy(&bits, &own, sizeof own);
    exchanged[current] = bits;
    meet(warps[current / LANES]);
    Value theirs;
    std::memcpy(&theirs, &exchanged[first + from], sizeof theirs);
    // Nobody brings the next value before all have taken this one.
    meet(warps[current / LANES]);
    return theirs;
}

template <typename Value>
static Value __shfl_xor_sync(unsigned mask, Value own, int lanes) {
    return exchange(mask, own, current % LANES ^ static_cast<unsigned>(lanes));
}

template <typename Value>
static Value __shfl_up_sync(unsigned mask, Value own, unsigned by) {
    const unsigned lane = current % LANES;
    return exchange(mask, own, lane >= by ? lane - by : lane);
}

template <typename Value>
static Value __shfl_sync(unsigned mask, Value own, unsigned from) {
    return exchange(mask, own, from);
}

static bool __any_sync(unsigned mask, int own) {
    int any = own != 0;
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) any |= __shfl_xor_sync(mask, any, lanes);
    return any != 0;
}

static unsigned long long atomicAdd(unsigned long long *at, unsigned long long by) {
    const unsigned long long before = *at;
    *at += by;
    return before;
}

static void __syncwarp() { meet(warps[current / LANES]); }
static void __syncthreads() { meet(block); }

#include "kernels.cu"
#include "weights.cu"

static void live() {
    body();
    fibers[current].is_over = true;
    has_moved = true;
}

static void run_block(unsigned threads) {
    if (threads == 0 || threads % LANES != 0 || threads > 1024) fail("not a number of whole warps up to 1024 threads");
    fibers.resize(threads);
    exchanged.assign(threads, 0);
    warps.assign(threads / LANES, Meeting{LANES});
    block = Meeting{threads};
    for (Fiber &fiber : fibers) {
        fiber.is_over = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, live, 0);
    }
    for (unsigned over = 0; over < threads;) {
        has_moved = false;
        over = 0;
        for (current = 0; current < threads; current++) {
            if (!fibers[current].is_over) {
                threadIdx.x = current;
                swapcontext(&scheduler, &fibers[current].context);
            }
            over += fibers[current].is_over;
        }
        if (!has_moved && over < threads) fail("threads wait for others that never come");
    }
}

int main(int count, char **words) {
    if (count < 5) fail("host KERNEL COLUMNS LINES THREADS ARGUMENT…");
    const std::string kernel = words[1];
    const unsigned columns = std::strtoul(words[2], nullptr, 10), lines = std::strtoul(words[3], nullptr, 10);
    const unsigned threads = std::strtoul(words[4], nullptr, 10);
    // Vectors of 16 bytes, so that memory is aligned as on a GPU.
    std::vector<std::vector<uint4>> memory(count - 5);
    std::vector<size_t> sizes(count - 5, 0);
    std::vector<void *> pointers(count - 5, nullptr);
    std::vector<unsigned long long> numbers(count - 5, 0);
    for (int at = 0; at < count - 5; at++) {
        const std::string word = words[at + 5];
        if (word.rfind("bytes", 0) == 0) {
            const size_t shift = word[5] == '+' ? std::strtoull(word.c_str() + 6, nullptr, 10) % 16 : 0;
            sizes[at] = std::strtoull(word.c_str() + word.find(':') + 1, nullptr, 10);
            memory[at].resize(sizes[at] / 16 + 2 + GUARD);
            std::memset(static_cast<void *>(memory[at].data()), CANARY, memory[at].size() * sizeof(uint4));
            pointers[at] = reinterpret_cast<char *>(memory[at].data()) + shift;
            if (std::fread(pointers[at], 1, sizes[at], stdin) != sizes[at]) fail("standard input ends early");
        } else if (word.rfind("int:", 0) == 0 || word.rfind("wide:", 0) == 0) {
            numbers[at] = std::strtoull(word.c_str() + word.find(':') + 1, nullptr, 10);
        } else if (word != "null") {
            fail("an argument is bytes:N, bytes+K:N, int:N, wide:N or null");
        }
    }
    const std::map<std::string, size_t> kernels = {
        {"residual_norm", 4}, {"rotate_queries", 4}, {"gather_keys", 6},     {"silu_up", 2},
        {"choose", 5},        {"select_buckets", 3}};
    // Numbers of a row, and how many of them are addresses.
    const std::map<std::string, std::pair<size_t, size_t>> tables = {
        {"sum_elements", {4, 1}},  {"sum_differences", {5, 3}}, {"copy_elements", {3, 2}},
        {"read_elements", {5, 3}}, {"write_elements", {5, 3}},  {"compare_elements", {5, 3}}};
    const auto known = kernels.find(kernel);
    const auto table = tables.find(kernel);
    if (known == kernels.end() && table == tables.end()) fail("there is no such kernel");
    if (known != kernels.end() ? pointers.size() != known->second : pointers.size() < 3) fail("another number of arguments");
    if (table != tables.end()) {
        const auto [width, addresses] = table->second;
        wide *numbers_of_rows = static_cast<wide *>(pointers[0]);
        for (size_t row = 0; row < numbers[1]; row++)
            for (size_t at = row * width; at < row * width + addresses; at++) {
                char *const start = static_cast<char *>(pointers.at(numbers_of_rows[at] >> 48));
                numbers_of_rows[at] = reinterpret_cast<wide>(start + (numbers_of_rows[at] & 0xffffffffffff));
            }
    }
    gridDim.x = columns;
    void **p = pointers.data();
    if (kernel == "residual_norm") {
        body = [=] { residual_norm((uint4 *)p[0], (uint4 *)p[1], (uint4 *)p[2], (uint4 *)p[3]); };
    } else if (kernel == "rotate_queries") {
        body = [=] { rotate_queries((u32 *)p[0], (u32 *)p[1], (u32 *)p[2], (u32 *)p[3]); };
    } else if (kernel == "gather_keys") {
        body = [=] { gather_keys((u32 *)p[0], (int *)p[1], (u32 *)p[2], (u32 *)p[3], (u32 *)p[4], (u32 *)p[5]); };
    } else if (kernel == "silu_up") {
        body = [=] { silu_up((uint4 *)p[0], (uint4 *)p[1]); };
    } else if (kernel == "choose") {
        body = [=] { choose((uint4 *)p[0], (int *)p[1], (int *)p[2], (float *)p[3], (float *)p[4]); };
    } else if (kernel == "select_buckets") {
        const int rows = static_cast<int>(numbers[2]);
        body = [=] { select_buckets((uint4 *)p[0], (signed char *)p[1], rows); };
    } else if (kernel == "sum_elements") {
        body = [=, rows = numbers[1]] { sum_elements((Stretch *)p[0], rows, (wide *)p[2]); };
    } else if (kernel == "sum_differences") {
        body = [=, rows = numbers[1]] { sum_differences((Difference *)p[0], rows, (wide *)p[2]); };
    } else if (kernel == "copy_elements") {
        body = [=, rows = numbers[1]] { copy_elements((Move *)p[0], rows); };
    } else if (kernel == "read_elements") {
        body = [=, rows = numbers[1]] { read_elements((Some *)p[0], rows); };
    } else if (kernel == "write_elements") {
        body = [=, rows = numbers[1]] { write_elements((Some *)p[0], rows); };
    } else if (kernel == "compare_elements") {
        body = [=, rows = numbers[1]] { compare_elements((Some *)p[0], rows, (int *)p[2]); };
    }
    for (blockIdx.y = 0; blockIdx.y < lines; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < columns; blockIdx.x++) run_block(threads);
    for (size_t at = 0; at < pointers.size(); at++) {
        const char *bytes = reinterpret_cast<const char *>(memory[at].data());
        const size_t first = pointers[at] == nullptr ? 0 : static_cast<const char *>(pointers[at]) - bytes;
        for (size_t byte = 0; byte < memory[at].size() * sizeof(uint4); byte++)
            if ((byte < first || byte >= first + sizes[at]) && bytes[byte] != CANARY) fail("a kernel writes outside its memory");
    }
    for (size_t at = 0; at < pointers.size(); at++)
        if (sizes[at] > 0 && std::fwrite(pointers[at], 1, sizes[at], stdout) != sizes[at]) fail("standard output is closed");
    return 0;
}
