// Products of a few tokens with 2:4 weights on sparse tensor cores: y = W x, and with a branch W x + S t.
//
// Weights lie in memory in the order in which mma.sp takes them (kernels/product24.py packs them), so that every load is
// 16 bytes a thread, neighbours in a warp, and nothing is unpacked: sparse weights are operand A, tokens are the columns
// of operand B. SPREAD warps of a block have ROW_TILES * 16 outputs each; the warps behind each of them share its
// outputs, and take the block's inputs in turn. Blocks of a cluster share outputs too. Sums meet in shared memory, first
// of a block, then of the cluster, always in the same order.
//
// S of a branch is loaded with the first weights and multiplied before them, when no sums need registers yet. What a warp
// has of it beyond that takes turns with the weights, after them.
//
// No header is needed. What is of this machine alone stands first, so that the rest also compiles as plain C++.
//
// Macros: INT4 (0: bfloat16 values; 1: 4-bit codes), GROUP (inputs of a scale), ROW_TILES, WARPS, SPREAD, TOKEN_TILES
// (of 8), STEPS (loads in flight, in steps), RANKS (blocks of a cluster), BLOCKS (a multiprocessor holds at least so
// many), BRANCH (0 none, 1: t is given, 2: t is the sum of every SUM inputs), UP8 (S in 8 bits), EARLY (starts before
// the kernel before it has ended).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
struct __attribute__((aligned(16))) Quad { u32 at[4]; };

#ifndef EMULATED
#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
extern __shared__ Quad shared_memory[];

DEVICE u32 thread_index() { return threadIdx.x; }
DEVICE u32 block_x() { return blockIdx.x; }
DEVICE u32 block_y() { return blockIdx.y; }
DEVICE u32 address_of(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }
DEVICE void block_sync() { __syncthreads(); }
// An inbox of shared memory that blocks of the cluster write to: it is full when so many bytes have come. Neither needs
// a fence, which waits for all of a block's stores. No block may write before all have arrived at the cluster's barrier.
DEVICE void make_inbox(u64* inbox, u32 bytes) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n"
                 "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n"
                 "fence.mbarrier_init.release.cluster;" ::"r"(address_of(inbox)), "r"(bytes) : "memory");
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void send(const Quad* shared, const Quad& q, u64* inbox, u32 rank) {
    u32 there, box;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address_of(shared)), "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(box) : "r"(address_of(inbox)), "r"(rank));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(there), "r"(q.at[0]), "r"(q.at[1]), "r"(q.at[2]), "r"(q.at[3]), "r"(box) : "memory");
}
DEVICE void wait_for_inbox(u64* inbox) {
    u32 full;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(full) : "r"(address_of(inbox)) : "memory");
    } while (!full);
}
DEVICE void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// volatile: they are to be issued before anything waits
DEVICE Quad stream16(const Quad* at) {
    Quad q;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.at[0]), "=r"(q.at[1]), "=r"(q.at[2]), "=r"(q.at[3]) : "l"(at));
    return q;
}
DEVICE u64 stream8(const u64* at) {
    u64 v;
    asm volatile("ld.global.nc.L1::no_allocate.u64 %0, [%1];" : "=l"(v) : "l"(at));
    return v;
}
DEVICE u32 stream4(const u32* at) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}
// to shared memory, in the background; zeros where it is not there
DEVICE void copy16(Quad* shared, const Quad* at, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address_of(shared)), "l"(at), "r"(there ? 16 : 0)
                 : "memory");
}
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE void load_matrices(u32 (&r)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared) : "memory");
}
template <int SELECTOR>
DEVICE void multiply_sparse(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 places) {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places),
          "n"(SELECTOR));
}
DEVICE void multiply_dense(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// both halves minus 136: the codes stand 8 too high in the mantissas of 128
DEVICE u32 minus_136(u32 pair) {
    u32 r;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(pair), "r"(0x43084308u));
    return r;
}
DEVICE u32 rounded_pair(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE float bits_as_float(u32 bits) { return __uint_as_float(bits); }
#endif

DEVICE float low_half(u32 pair) { return bits_as_float(pair << 16); }
DEVICE float high_half(u32 pair) { return bits_as_float(pair & 0xffff0000u); }

#if INT4
constexpr int STEP_INPUTS = 128;
#else
constexpr int STEP_INPUTS = 64;
#endif
constexpr int TILES = STEP_INPUTS / 32;
// a pair of bfloat16 rows must not meet in one bank
constexpr int PAD = 8;
// so much of the rank in a step: what fits where a step's weights are
constexpr int BRANCH_STEP = INT4 && !UP8 ? 16 : 32;
// steps of it that a warp begins with
constexpr int OWN = 32 / BRANCH_STEP;
// two sums in turn where there are few, or products would wait for each other
constexpr int CHAINS = ROW_TILES * TOKEN_TILES >= 4 || INT4 ? 1 : 2;
// warps that share outputs
constexpr int TURNS = WARPS / SPREAD;
// outputs of a block, and how far apart the sums of two tokens stand: those that a warp writes at once meet in no bank
constexpr int ROWS = SPREAD * ROW_TILES * 16, APART = ROWS + 4;

// What a thread holds of ROW_TILES * 16 outputs and STEP_INPUTS inputs.
struct Step {
#if INT4
    Quad codes[ROW_TILES];
    u64 places[ROW_TILES];
    u32 scales[ROW_TILES][STEP_INPUTS / GROUP];
#else
    Quad values[ROW_TILES][2];
    u32 places[ROW_TILES];
#endif
};

struct Weights {  // as in product24.py
    const Quad* values;
    const void* places;
    const u32* scales;
    int row_tiles;
    int steps;
};

DEVICE void fetch(Step& step, const Weights& w, int row_tile, int at, int lane) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
        // the last block may have fewer outputs: it computes some twice
        int tile = row_tile + r < w.row_tiles ? row_tile + r : w.row_tiles - 1;
        u64 place = (u64)tile * w.steps + at;
#if INT4
        step.codes[r] = stream16(w.values + place * 32 + lane);
        step.places[r] = stream8((const u64*)w.places + place * 32 + lane);
#pragma unroll
        for (int g = 0; g < STEP_INPUTS / GROUP; ++g)
            step.scales[r][g] = stream4(w.scales + (place * (STEP_INPUTS / GROUP) + g) * 8 + lane / 4);
#else
        step.values[r][0] = stream16(w.values + place * 64 + lane);
        step.values[r][1] = stream16(w.values + place * 64 + 32 + lane);
        step.places[r] = stream4((const u32*)w.places + place * 32 + lane);
#endif
    }
}

typedef float Sums[ROW_TILES][TOKEN_TILES][4];

template <int TILE>
DEVICE void multiply_tile(Sums& sums, const Step& step, const u32 (&tokens)[TOKEN_TILES][4]) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#if INT4
        u32 a[4], word = step.codes[r].at[TILE];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = minus_136(((word >> (4 * i)) & 0x000f000fu) | 0x43004300u);
        u32 places = (u32)(step.places[r] >> (TILE / 2 * 32));
#else
        const u32(&a)[4] = step.values[r][TILE].at;
        u32 places = step.places[r];
#endif
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) multiply_sparse<TILE % 2>(sums[r][n], a, tokens[n], places);
    }
}

template <int TILE>
DEVICE void multiply(Sums (&sums)[CHAINS], Sums& part, const Step& step, const u32 (&at)[TOKEN_TILES], const u32 (&move)[TOKEN_TILES], int local) {
    if constexpr (TILE < TILES) {
        u32 tokens[TOKEN_TILES][4];
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) load_matrices(tokens[n], at[n] + (u32)(local * TILES + TILE) * move[n]);
#if INT4
        constexpr int EVERY = GROUP / 32;
        if constexpr (TILE % EVERY == 0) {
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
                for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) part[r][n][i] = 0.f;
        }
        multiply_tile<TILE>(part, step, tokens);
        if constexpr (TILE % EVERY == EVERY - 1) {
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) {
                u32 pair = step.scales[r][TILE / EVERY];
#pragma unroll
                for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        sums[0][r][n][i] += part[r][n][i] * (i < 2 ? low_half(pair) : high_half(pair));
            }
        }
#else
        multiply_tile<TILE>(sums[TILE % CHAINS], step, tokens);
#endif
        multiply<TILE + 1>(sums, part, step, at, move, local);
    }
}

#if BRANCH
// A step of S: values, or codes and, as rows g and g + 8 have them, the scales of outputs.
DEVICE void fetch_up(Step& step, const Quad* up, const u32* scales, int row_tiles, int up_steps, int row_tile, int at, int lane) {
    constexpr int QUADS = UP8 || INT4 ? 1 : 2;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
        int tile = row_tile + r < row_tiles ? row_tile + r : row_tiles - 1;
        const Quad* from = up + ((u64)tile * up_steps + at) * QUADS * 32 + lane;
#if INT4
        step.codes[r] = stream16(from);
#if UP8
        step.scales[r][0] = stream4(scales + tile * 8 + lane / 4);
#endif
#else
        step.values[r][0] = stream16(from);
#if UP8
        step.places[r] = stream4(scales + tile * 8 + lane / 4);
#else
        step.values[r][1] = stream16(from + 32);
#endif
#endif
    }
}

DEVICE void multiply_up(Sums& sums, const Step& step, const u32 (&at)[TOKEN_TILES], const u32 (&move)[TOKEN_TILES], int local) {
    u32 tokens[TOKEN_TILES][4];
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
        load_matrices(tokens[n], at[n] + (u32)(local * BRANCH_STEP / 32) * move[n]);
        // of four matrices a step of 16 has two
        if (BRANCH_STEP == 16 && local % 2) tokens[n][0] = tokens[n][2], tokens[n][1] = tokens[n][3];
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < BRANCH_STEP / 16; ++half) {
#if INT4
            const Quad& quad = step.codes[r];
#else
            const Quad& quad = step.values[r][UP8 ? 0 : half];
#endif
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#if UP8
#if INT4
                const u32 scales = step.scales[r][0];
#else
                const u32 scales = step.places[r];
#endif
                const u32 pair = quad.at[half * 2 + i / 2] >> (16 * (i % 2));
                const float scale = i % 2 ? high_half(scales) : low_half(scales);
                a[i] = rounded_pair((bits_as_float(0x4b000000u | (pair & 255u)) - 8388736.f) * scale,
                                    (bits_as_float(0x4b000000u | (pair >> 8 & 255u)) - 8388736.f) * scale);
#else
                a[i] = quad.at[i];
#endif
            }
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) multiply_dense(sums[r][n], a, tokens[n][half * 2], tokens[n][half * 2 + 1]);
        }
}
#endif

struct Branch {
    const Quad* up;
    const u32* up_scales;
    const u16* inner;
    int rank;
    int steps;
};

// Where a thread finds the tokens of operand B in shared memory, and how far it goes from tile to tile: tokens that are
// not there are read from one place that holds zeros.
DEVICE void operand_places(u32 (&at)[TOKEN_TILES], u32 (&move)[TOKEN_TILES], const u16* rows, int stride, const Quad* zeros, int tokens, int lane) {
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
        int token = n * 8 + lane % 8;
        bool there = token < tokens;
        at[n] = there ? address_of(rows + (u64)token * stride + lane / 8 * 8) : address_of(zeros);
        move[n] = there ? 64 : 0;
    }
}

// widest: the inputs of the rank that has most; widest_inner: likewise of what its branch reads. x [tokens, inputs],
// y [tokens, outputs], bias [outputs] or null.
KERNEL product24(Weights w, Branch branch, const u16* x, const u16* bias, u16* y, int tokens, int outputs, int inputs, int widest, int widest_inner) {
    const int lane = thread_index() % 32, thread = thread_index();
    const int beside = thread / 32 % SPREAD, turn = thread / 32 / SPREAD;
    const int row_tile = (block_x() * SPREAD + beside) * ROW_TILES;
    const int rank = block_y();
    const int begin = rank * w.steps / RANKS, end = (rank + 1) * w.steps / RANKS;

    // zeros, the inbox' barrier, tokens (later the sums of each turn), the branch's tokens (later the block's sums), the inbox
    Quad* zeros = shared_memory;
    u64* inbox = (u64*)(shared_memory + 1);
    u16* rows = (u16*)(shared_memory + 2);
    const int stride = widest + PAD;
    const int of_tokens = tokens * stride * 2, of_turns = TURNS > 1 ? TURNS * tokens * APART * 4 : 0;
    float* total = (float*)((char*)rows + (of_tokens > of_turns ? of_tokens : of_turns));
    u16* inner = (u16*)total;
    const int inner_stride = widest_inner + PAD;
    const int of_total = tokens * APART * 4, of_inner = BRANCH ? tokens * inner_stride * 2 : 0;
    Quad* came = (Quad*)((char*)total + (of_total > of_inner ? of_total : of_inner));
    // four outputs at a time, of which every rank adds up a part
    const int fours = tokens * (ROWS / 4), share = (fours + RANKS - 1) / RANKS;
    const int own_first = rank * share, own_end = own_first + share < fours ? own_first + share : fours;
    if (RANKS > 1) {
        if (thread == 0) make_inbox(inbox, own_end > own_first ? (own_end - own_first) * RANKS * 16 : 0);
        cluster_arrive();
    }

    const int from = begin * STEP_INPUTS, width = (end - begin) * STEP_INPUTS;
    const int of_inputs = end - begin;
#if BRANCH
    // of sums, all that its inputs have a part in
    const int up_begin = BRANCH == 2 ? from / (SUM * BRANCH_STEP) : rank * branch.steps / RANKS;
    const int up_last = BRANCH == 2 ? (from + width + SUM * BRANCH_STEP - 1) / (SUM * BRANCH_STEP) : (rank + 1) * branch.steps / RANKS;
    const int ups = (up_last < branch.steps ? up_last : branch.steps) - up_begin;
    const int all = of_inputs + (ups > OWN * TURNS ? ups - OWN * TURNS : 0);
    const auto fetch_up_step = [&](Step& step, int up) {
        fetch_up(step, branch.up, branch.up_scales, w.row_tiles, branch.steps, row_tile, up_begin + up, lane);
    };
    Step own[OWN];
    // from the last turn on, which has the fewest steps of inputs
    const int up_turn = TURNS - 1 - turn;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
        if (up_turn + i * TURNS < ups) fetch_up_step(own[i], up_turn + i * TURNS);
#else
    const int all = of_inputs;
#endif
    const auto fetch_any = [&](Step& step, int now) {
#if BRANCH
        if (now >= of_inputs)
            fetch_up_step(step, OWN * TURNS + now - of_inputs);
        else
#endif
            fetch(step, w, row_tile, begin + now, lane);
    };
    Step steps[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
        if (turn + i * TURNS < all) fetch_any(steps[i], turn + i * TURNS);
    if (EARLY) {
        let_next_kernel_start();
        wait_for_kernel_before();
    }

    if (thread == 0) *zeros = Quad{{0, 0, 0, 0}};
    for (int i = thread; i < tokens * (width / 8); i += WARPS * 32) {
        const int m = i / (width / 8), c = i % (width / 8) * 8;
        const bool there = from + c < inputs;
        copy16((Quad*)(rows + m * stride + c), (const Quad*)(x + (there ? (u64)m * inputs + from + c : 0)), there);
    }
#if BRANCH
    const int inner_width = ups * BRANCH_STEP;
#endif
#if BRANCH == 1
    for (int i = thread; i < tokens * (inner_width / 8); i += WARPS * 32) {
        const int m = i / (inner_width / 8), c = i % (inner_width / 8) * 8, at = up_begin * BRANCH_STEP + c;
        const bool there = at < branch.rank;
        copy16((Quad*)(inner + m * inner_stride + c), (const Quad*)(branch.inner + (there ? (u64)m * branch.rank + at : 0)), there);
    }
#endif
    wait_for_copies();
    block_sync();
#if BRANCH == 2
    for (int i = thread; i < tokens * inner_width; i += WARPS * 32) {
        const int m = i / inner_width, c = i % inner_width, start = (up_begin * BRANCH_STEP + c) * SUM - from;
        float sum = 0.f;
        // steps of inputs hold whole sums
        if (start >= 0 && start < width)
#pragma unroll
            for (int k = 0; k < SUM / 8; ++k) {
                Quad q = ((const Quad*)(rows + m * stride + start))[k];
#pragma unroll
                for (int j = 0; j < 4; ++j) sum += low_half(q.at[j]) + high_half(q.at[j]);
            }
        inner[m * inner_stride + c] = (u16)rounded_pair(sum, 0.f);
    }
    block_sync();
#endif

    Sums sums[CHAINS] = {}, part;
    u32 at[TOKEN_TILES], move[TOKEN_TILES];
#if BRANCH
    const auto multiply_up_step = [&](const Step& step, int up) {
        operand_places(at, move, inner, inner_stride, zeros, tokens, lane);
        multiply_up(sums[0], step, at, move, up);
    };
#pragma unroll
    for (int i = 0; i < OWN; ++i)
        if (up_turn + i * TURNS < ups) multiply_up_step(own[i], up_turn + i * TURNS);
#endif
    operand_places(at, move, rows, stride, zeros, tokens, lane);
    for (int base = turn; base < all; base += STEPS * TURNS) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const int now = base + i * TURNS;
#if BRANCH
            // after the last of the inputs: their places are no longer needed
            if (now >= of_inputs && now < all)
                multiply_up_step(steps[i], OWN * TURNS + now - of_inputs);
            else
#endif
            if (now < all) multiply<0>(sums, part, steps[i], at, move, now);
            if (now + STEPS * TURNS < all) fetch_any(steps[i], now + STEPS * TURNS);
        }
    }
#pragma unroll
    for (int chain = 1; chain < CHAINS; ++chain)
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[0][r][n][i] += sums[chain][r][n][i];

    // tokens in shared memory are no longer read where sums meet
    if (TURNS > 1 || BRANCH) block_sync();
    float* meet = TURNS > 1 ? (float*)rows + turn * tokens * APART : total;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = (beside * ROW_TILES + r) * 16 + lane / 4 + i / 2 * 8, token = n * 8 + lane % 4 * 2 + i % 2;
                if (token < tokens) meet[token * APART + row] = sums[0][r][n][i];
            }
    if (TURNS > 1) {
        block_sync();
        for (int i = thread; i < tokens * ROWS; i += WARPS * 32) {
            const int o = i / ROWS * APART + i % ROWS;
            float sum = 0.f;
#pragma unroll
            for (int k = 0; k < TURNS; ++k) sum += ((const float*)rows)[k * tokens * APART + o];
            total[o] = sum;
        }
    }
    block_sync();
    if (RANKS > 1) {
        cluster_wait();
        for (int i = thread; i < fours; i += WARPS * 32) {
            const Quad* four = (const Quad*)(total + i / (ROWS / 4) * APART) + i % (ROWS / 4);
            send(came + own_first + i % share, *four, inbox, i / share);
        }
        wait_for_inbox(inbox);
    }
    for (int i = own_first + thread; i < own_end; i += WARPS * 32) {
        const int token = i / (ROWS / 4), o = i % (ROWS / 4), row = block_x() * ROWS + o * 4;
        Quad found[RANKS];
#pragma unroll
        for (int k = 0; k < RANKS; ++k)
            found[k] = RANKS > 1 ? came[k * share + i - own_first] : ((const Quad*)(total + token * APART))[o];
        float sum[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int k = 0; k < RANKS; ++k) sum[j] += bits_as_float(found[k].at[j]);
            if (bias && row + j < outputs) sum[j] += low_half(bias[row + j]);
        }
        u16* at = y + (u64)token * outputs + row;
        if (outputs % 4 == 0 && row < outputs)
            *(u64*)at = (u64)rounded_pair(sum[2], sum[3]) << 32 | rounded_pair(sum[0], sum[1]);
        else
            for (int j = 0; j < 4; ++j)
                if (row + j < outputs) at[j] = (u16)rounded_pair(sum[j], 0.f);
    }
}

// The dense weight [outputs, inputs] again, for products of many tokens; a warp for ROW_TILES * 16 outputs and a step.
KERNEL unpack24(Weights w, u16* dense, int outputs, int inputs) {
    const int lane = thread_index() % 32, at = block_y() * WARPS + thread_index() / 32;
    if (at >= w.steps) return;
    Step step;
    fetch(step, w, block_x() * ROW_TILES, at, lane);
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
        const int row_tile = block_x() * ROW_TILES + r;
        const u64 place = ((u64)row_tile * w.steps + at) * 32 + lane / 4 * 4;
        if (row_tile >= w.row_tiles) return;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                // register i holds a group's two values: of one column of eight, and of one row of two
                const int side = i / 2, half = i % 2;
                const int row = row_tile * 16 + lane / 4 + 8 * half;
                const int from = at * STEP_INPUTS + tile * 32 + side * 16 + lane % 4 * 4;
#if INT4
                const u32 word = (u32)(((const u64*)w.places)[place + tile % 2 * 2 + side] >> (tile / 2 * 32));
                const u32 scales = step.scales[r][tile * 32 / GROUP];
                const u32 codes = minus_136(((step.codes[r].at[tile] >> (4 * i)) & 0x000f000fu) | 0x43004300u);
                const float scale = half ? high_half(scales) : low_half(scales);
                const u32 pair = rounded_pair(low_half(codes) * scale, high_half(codes) * scale);
#else
                const u32 word = ((const u32*)w.places)[place + tile % 2 * 2 + side];
                const u32 pair = step.values[r][tile].at[i];
#endif
                const u32 field = word >> (16 * half + lane % 4 * 4) & 15u;
                u64 four = (u64)(pair & 0xffffu) << (16 * (field & 3u)) | (u64)(pair >> 16) << (16 * (field >> 2));
                if (row < outputs && from < inputs) *(u64*)(dense + (u64)row * inputs + from) = four;
            }
    }
}
