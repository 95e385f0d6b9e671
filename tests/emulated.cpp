// Carries src/shearling/kernels/*.cu out on a processor, a thread for every thread, from the words of NVIDIA's PTX
// manual on mma.sp, mma and ldmatrix alone; so that a layout is tested against them and not against itself.
// Compiled with -DSOURCE='"file.cu"' and the file's own macros.
#include <atomic>
#include <barrier>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define EMULATED
#define DEVICE static inline
#define KERNEL static void
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
struct Quad;

struct Lane { u32 a[4], b[4], word, shared; };
struct Warp {
    std::barrier<> meet{32};
    Lane lanes[32];
};
struct Block {
    Block(int threads, size_t bytes) : meet(threads), warps(threads / 32), memory(bytes, char(0xa5)) {}
    std::barrier<> meet;
    std::vector<Warp> warps;
    std::vector<char> memory;
    char* start() { return memory.data() + (16 - (uintptr_t)memory.data() % 16) % 16; }
};
static thread_local u32 here_thread, here_x, here_y;
static thread_local Block* block;
static thread_local std::vector<std::unique_ptr<Block>>* cluster;
static thread_local std::barrier<>* cluster_meet;

#define shared_memory ((Quad*)block->start())
static u32 thread_index() { return here_thread; }
static u32 block_x() { return here_x; }
static u32 block_y() { return here_y; }
static u32 address_of(const void* p) {
    ptrdiff_t at = (const char*)p - block->start();
    assert(at >= 0 && at < (ptrdiff_t)block->memory.size());
    return (u32)at;
}
static void block_sync() { block->meet.arrive_and_wait(); }
static void make_inbox(u64* inbox, u32 bytes) { *inbox = bytes; }
static void cluster_arrive() {}
static void cluster_wait() { cluster_meet->arrive_and_wait(); }
template <class T> static void send(const T* p, const T& value, u64* inbox, u32 rank) {
    assert(address_of(p) % 16 == 0);
    char* there = (*cluster)[rank]->start();
    memcpy(there + address_of(p), &value, 16);
    std::atomic_ref<u64>(*(u64*)(there + address_of(inbox))) -= 16;
}
static void wait_for_inbox(u64* inbox) {
    cluster_meet->arrive_and_wait();
    assert(*inbox == 0);
}
static void wait_for_kernel_before() {}
static void let_next_kernel_start() {}
template <class T> static T load(const T* at) { T v; memcpy(&v, at, sizeof v); return v; }
#define stream16 load
#define stream8 load
#define stream4 load
template <class T> static void copy16(T* shared, const T* at, bool there) {
    if (there) memcpy(shared, at, 16); else memset(shared, 0, 16);
}
static void wait_for_copies() {}
static Warp& warp() { return block->warps[here_thread / 32]; }
static Lane& lane() { return warp().lanes[here_thread % 32]; }
static float bits_as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
static u32 float_as_bits(float f) { u32 b; memcpy(&b, &f, 4); return b; }
static u32 to_bfloat16(float f) {
    u32 bits = float_as_bits(f);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static u32 rounded_pair(float low, float high) { return to_bfloat16(low) | to_bfloat16(high) << 16; }
static u32 minus_136(u32 pair) {
    return rounded_pair(bits_as_float(pair << 16) - 136.f, bits_as_float(pair & 0xffff0000u) - 136.f);
}
static float element(u32 word, int half) { return bits_as_float(half ? word & 0xffff0000u : word << 16); }
static void load_matrices(u32 (&r)[4], u32 shared) {
    assert(shared % 16 == 0);
    lane().shared = shared;
    warp().meet.arrive_and_wait();
    // lane l gives row l % 8 of matrix l / 8, and gets row l / 4, columns 2 (l % 4) and the next, of every matrix
    u32 l = here_thread % 32;
    for (int m = 0; m < 4; ++m) {
        u32 row = warp().lanes[8 * m + l / 4].shared;
        assert(row + 16 <= block->memory.size());
        memcpy(&r[m], block->start() + row + l % 4 * 4, 4);
    }
    warp().meet.arrive_and_wait();
}
static float operand_b(int k, int n) {
    return element(warp().lanes[n * 4 + k % 8 / 2].b[k / 8], k % 2);
}
static float operand_a(int row, int column) {
    return element(warp().lanes[row % 8 * 4 + column % 8 / 2].a[column / 8 * 2 + row / 8], column % 2);
}
template <int SELECTOR>
static void multiply_sparse(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 places) {
    memcpy(lane().a, a, 16), memcpy(lane().b, b, 16), lane().word = places;
    warp().meet.arrive_and_wait();
    int l = here_thread % 32;
    for (int i = 0; i < 4; ++i) {
        int row = l / 4 + i / 2 * 8, n = l % 4 * 2 + i % 2;
        for (int group = 0; group < 8; ++group) {
            u32 word = warp().lanes[row % 8 * 4 + 2 * SELECTOR + group / 4].word;
            u32 field = word >> (row / 8 * 16 + group % 4 * 4) & 15;
            int one = field & 3, two = field >> 2;
            assert(one < two);
            c[i] += operand_a(row, 2 * group) * operand_b(4 * group + one, n);
            c[i] += operand_a(row, 2 * group + 1) * operand_b(4 * group + two, n);
        }
    }
    warp().meet.arrive_and_wait();
}
static void multiply_dense(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    memcpy(lane().a, a, 16), lane().b[0] = b0, lane().b[1] = b1;
    warp().meet.arrive_and_wait();
    int l = here_thread % 32;
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) c[i] += operand_a(l / 4 + i / 2 * 8, k) * operand_b(k, l % 4 * 2 + i % 2);
    warp().meet.arrive_and_wait();
}

#include SOURCE

template <class Work>
static void launch(int grid_x, int ranks, int threads, int bytes, Work work) {
    for (int x = 0; x < grid_x; ++x) {
        std::vector<std::unique_ptr<Block>> blocks;
        for (int y = 0; y < ranks; ++y) blocks.push_back(std::make_unique<Block>(threads, bytes + 32));
        std::barrier<> all(ranks * threads);
        std::vector<std::thread> crowd;
        for (int y = 0; y < ranks; ++y)
            for (int t = 0; t < threads; ++t)
                crowd.emplace_back([&, y, t] {
                    here_thread = t, here_x = x, here_y = y;
                    block = blocks[y].get(), cluster = &blocks, cluster_meet = &all;
                    work();
                });
        for (auto& thread : crowd) thread.join();
        for (auto& b : blocks)
            for (int i = 0; i < 16; ++i) assert(b->start()[bytes + i] == char(0xa5));
    }
}

extern "C" void product(int grid_x, int ranks, int bytes, Weights* w, Branch* branch, const u16* x, const u16* bias,
                        u16* y, int tokens, int outputs, int inputs, int widest, int widest_inner) {
    launch(grid_x, ranks, WARPS * 32, bytes, [=] {
        product24(*w, *branch, x, bias, y, tokens, outputs, inputs, widest, widest_inner);
    });
}
extern "C" void unpack(int grid_x, int grid_y, Weights* w, u16* dense, int outputs, int inputs) {
    launch(grid_x, grid_y, WARPS * 32, 16, [=] { unpack24(*w, dense, outputs, inputs); });
}
