// Products of few tokens with a 2:4 weight on a CPU with AVX-512 VBMI2, and the dense weight again. See expand24.py for
// the layout: blocks of 64 inputs, of which a mask of 64 bits says which 32 stay; their values lie packed.
//
// Two of every four stay, so a block's values start at a place that no mask needs to be read for.
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

// inputs of a block, outputs that share a load of inputs, most tokens that share a load of weights
enum { BLOCK = 64, ROWS = 4, MOST = 8 };
// vectors of float32 that a block has
enum { PARTS = BLOCK / 16 };
enum kind { FLOAT32, BFLOAT16, INT4 };

typedef struct {
    const uint8_t *values, *masks;
    const float *scales;
    int64_t outputs, inputs, blocks;
    // of values; whether inputs and outputs are bfloat16; inputs that share a scale
    int kind, bfloat16, group;
} Weight;

// of values in a block
INLINE int64_t block_bytes(int kind) { return kind == INT4 ? 16 : kind == BFLOAT16 ? 64 : 128; }

// float32 of the upper and the lower of two bfloat16
INLINE __m512 upper(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
}

INLINE __m512 lower(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

// the weights of a block, as codes without their scales in 4 bits. Of bfloat16 vectors 0 and 2 have the even inputs of
// a half and 1 and 3 the odd ones; as float32 they are multiplied faster than by the instruction for bfloat16
INLINE void expanded(int kind, const uint8_t *values, const uint8_t *masks, __m512 weights[PARTS]) {
    uint64_t mask;
    memcpy(&mask, masks, 8);
    if (kind == FLOAT32) {
        UNROLL for (int p = 0; p < PARTS; p++) {
            __m256 packed = _mm256_loadu_ps((const float *)(values + 32 * p));
            weights[p] = _mm512_maskz_expand_ps((__mmask16)(mask >> 16 * p), _mm512_castps256_ps512(packed));
        }
    } else if (kind == BFLOAT16) {
        UNROLL for (int p = 0; p < PARTS; p += 2) {
            __m256i packed = _mm256_loadu_si256((const __m256i *)(values + 16 * p));
            __m512i w = _mm512_maskz_expand_epi16((__mmask32)(mask >> 16 * p), _mm512_castsi256_si512(packed));
            weights[p] = lower(w);
            weights[p + 1] = upper(w);
        }
    } else {
        // 0 to 7, -8 to -1; four bits of a number are looked up, whatever is above them
        const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
        __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
        __m256i nibbles = _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
        __m512i codes = _mm512_maskz_expand_epi8(mask, _mm512_castsi256_si512(nibbles));
        UNROLL for (int p = 0; p < PARTS; p++)
            weights[p] = _mm512_permutexvar_ps(p ? _mm512_srli_epi32(codes, 8 * p) : codes, table);
    }
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    // to the nearest, to even; what is no number stays none
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// `rows` outputs from `first` of `tokens` tokens; kind, group, rows and tokens are known when this is compiled
INLINE void rows_of(int kind, int group, int rows, int tokens, const Weight *weight, const float *x, float *y,
                    int64_t first) {
    const int64_t value_stride = weight->blocks * block_bytes(kind), mask_stride = weight->blocks * 8;
    const int64_t scale_stride = kind == INT4 ? weight->blocks * BLOCK / group : 0;
    const uint8_t *values = weight->values + first * value_stride, *masks = weight->masks + first * mask_stride;
    const float *scales = kind == INT4 ? weight->scales + first * scale_stride : 0;
    // blocks of a step, and vectors of a scale
    const int step = kind == INT4 && group > BLOCK ? group / BLOCK : 1, shared = group / 16;
    __m512 sums[ROWS][MOST];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < tokens; t++) sums[r][t] = _mm512_setzero_ps();
    for (int64_t block = 0; block < weight->blocks; block += step) {
        UNROLL for (int r = 0; r < rows; r++) {
            __m512 part_sums[MOST];
            UNROLL for (int b = 0; b < step; b++) {
                const uint8_t *v = values + r * value_stride + (block + b) * block_bytes(kind);
                __m512 weights[PARTS];
                expanded(kind, v, masks + r * mask_stride + (block + b) * 8, weights);
                UNROLL for (int p = 0; p < PARTS; p++) {
                    const float *at = x + ((block + b) * PARTS + p) * tokens * 16;
                    if (kind != INT4) {
                        UNROLL for (int t = 0; t < tokens; t++)
                            sums[r][t] = _mm512_fmadd_ps(weights[p], _mm512_load_ps(at + 16 * t), sums[r][t]);
                        continue;
                    }
                    const int part = b * PARTS + p;
                    const __m512 scale = _mm512_set1_ps(scales[r * scale_stride + (block * PARTS + part) / shared]);
                    UNROLL for (int t = 0; t < tokens; t++) {
                        __m512 inputs = _mm512_load_ps(at + 16 * t);
                        part_sums[t] = part % shared ? _mm512_fmadd_ps(weights[p], inputs, part_sums[t])
                                                     : _mm512_mul_ps(weights[p], inputs);
                        if (part % shared == shared - 1) sums[r][t] = _mm512_fmadd_ps(part_sums[t], scale, sums[r][t]);
                    }
                }
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < tokens; t++) y[t * ROWS + r] = _mm512_reduce_add_ps(sums[r][t]);
}

// how many of the tokens left are multiplied at once
INLINE int64_t taken(int64_t left) { return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// y [tokens, ROWS]; after the first tokens the rows' weights are in the nearest cache
INLINE void tokens_of(int kind, int group, int rows, int64_t tokens, const Weight *weight, const float *x, float *y,
                      int64_t first) {
    for (int64_t t = 0; t < tokens; t += taken(tokens - t)) {
        const float *from = x + t * weight->blocks * BLOCK;
        float *to = y + t * ROWS;
        switch (taken(tokens - t)) {
        case 8:
            // as many sums as there are registers for
            for (int r = 0; r < rows; r += 2)
                rows_of(kind, group, rows < 2 ? rows : 2, 8, weight, from, to + r, first + r);
            break;
        case 4: rows_of(kind, group, rows, 4, weight, from, to, first); break;
        case 2: rows_of(kind, group, rows, 2, weight, from, to, first); break;
        default: rows_of(kind, group, rows, 1, weight, from, to, first);
        }
    }
}

typedef void (*Some)(int rows, int64_t tokens, const Weight *, const float *x, float *y, int64_t first);

#define SOME(name, kind, group)                                                                                        \
    static void name(int rows, int64_t tokens, const Weight *weight, const float *x, float *y, int64_t first) {        \
        if (rows == ROWS) tokens_of(kind, group, ROWS, tokens, weight, x, y, first);                                   \
        else                                                                                                           \
            for (int r = 0; r < rows; r++) tokens_of(kind, group, 1, tokens, weight, x, y + r, first + r);             \
    }

SOME(float32, FLOAT32, 0)
SOME(bfloat16, BFLOAT16, 0)
SOME(int4_32, INT4, 32)
SOME(int4_64, INT4, 64)
SOME(int4_128, INT4, 128)

static Some some_of(const Weight *weight) {
    if (weight->kind != INT4) return weight->kind == FLOAT32 ? float32 : bfloat16;
    return weight->group == 32 ? int4_32 : weight->group == 64 ? int4_64 : int4_128;
}

// inputs in float32 in the order of `expanded`, filled up with zeros, vectors of tokens that are multiplied at once
// side by side; null without memory
static float *arranged(const Weight *weight, const void *x, int64_t tokens) {
    const int64_t inputs = weight->inputs;
    float *all = aligned_alloc(64, tokens * weight->blocks * BLOCK * sizeof(float)), *to = all;
    if (!all) return 0;
    for (int64_t t = 0; t < tokens; t += taken(tokens - t)) {
        const int64_t at_once = taken(tokens - t);
        for (int64_t i = 0; i < weight->blocks * BLOCK; i += 32, to += 32 * at_once)
            for (int64_t u = 0; u < at_once; u++) {
                const int64_t left = inputs - i, at = (t + u) * inputs + i;
                const __mmask32 mask = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
                __m512 first, second;
                if (!weight->bfloat16) {
                    first = _mm512_maskz_loadu_ps((__mmask16)mask, (const float *)x + at);
                    second = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), (const float *)x + at + 16);
                } else {
                    const __m512i words = _mm512_maskz_loadu_epi16(mask, (const uint16_t *)x + at);
                    const __m512i half = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(words));
                    const __m512i other = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1));
                    first = lower(weight->kind == INT4 ? half : words);
                    second = weight->kind == INT4 ? lower(other) : upper(words);
                }
                _mm512_store_ps(to + 16 * u, first);
                _mm512_store_ps(to + 16 * (u + at_once), second);
            }
    }
    return all;
}

// y [tokens, outputs] = x [tokens, inputs] W^T for up to 16 tokens; anything but 0 without memory for the inputs
int product(const Weight *weight, const void *x, void *y, int64_t tokens, int threads) {
    if (!tokens) return 0;
    float *inputs = arranged(weight, x, tokens);
    if (!inputs) return 1;
    const Some some = some_of(weight);
    const int64_t outputs = weight->outputs, tiles = (outputs + ROWS - 1) / ROWS;
    // threads take turns, since others may slow one of them; a small product is done before another thread wakes
    const int64_t chunk = tiles / (16 * threads) + 1;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (outputs * weight->blocks > 1024)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t left = outputs - tile * ROWS, rows = left < ROWS ? left : ROWS;
        float sums[16 * ROWS];
        some(rows, tokens, weight, inputs, sums, tile * ROWS);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t r = 0; r < rows; r++) {
                const int64_t at = t * outputs + tile * ROWS + r;
                if (weight->bfloat16) ((uint16_t *)y)[at] = to_bfloat16(sums[t * ROWS + r]);
                else ((float *)y)[at] = sums[t * ROWS + r];
            }
    }
    free(inputs);
    return 0;
}

// the nearest bfloat16, to even, of numbers that are finite
INLINE __m512i rounded(__m512 numbers) {
    const __m512i bits = _mm512_castps_si512(numbers);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
}

// a row of `inflate`, a block at a time
INLINE void dense_row(int kind, const Weight *weight, int64_t row, void *dense) {
    for (int64_t block = 0; block < weight->blocks; block++) {
        const int64_t at = row * weight->blocks + block, left = weight->inputs - block * BLOCK;
        const int64_t to = row * weight->inputs + block * BLOCK;
        const __mmask64 mask = left >= BLOCK ? ~0ull : (1ull << left) - 1;
        __m512 weights[PARTS];
        expanded(kind, weight->values + at * block_bytes(kind), weight->masks + at * 8, weights);
        if (kind == INT4)
            UNROLL for (int p = 0; p < PARTS; p++) {
                const float scale = weight->scales[(at * BLOCK + 16 * p) / weight->group];
                weights[p] = _mm512_mul_ps(weights[p], _mm512_set1_ps(scale));
            }
        UNROLL for (int p = 0; p < PARTS; p++) {
            uint16_t *words = (uint16_t *)dense + to + 16 * p;
            if (!weight->bfloat16)
                _mm512_mask_storeu_ps((float *)dense + to + 16 * p, (__mmask16)(mask >> 16 * p), weights[p]);
            else if (kind == INT4)
                _mm512_mask_cvtepi32_storeu_epi16(words, (__mmask16)(mask >> 16 * p), rounded(weights[p]));
            else if (p % 2 == 0) {
                const __m512i even = _mm512_srli_epi32(_mm512_castps_si512(weights[p]), 16);
                const __m512i odd = _mm512_castps_si512(weights[p + 1]);
                _mm512_mask_storeu_epi16(words, (__mmask32)(mask >> 16 * p), _mm512_or_si512(even, odd));
            }
        }
    }
}

// the dense weight [outputs, inputs]
void inflate(const Weight *weight, void *dense, int threads) {
#pragma omp parallel for num_threads(threads) if (weight->outputs * weight->blocks > 1024)
    for (int64_t row = 0; row < weight->outputs; row++) {
        if (weight->kind == FLOAT32) dense_row(FLOAT32, weight, row, dense);
        else if (weight->kind == BFLOAT16) dense_row(BFLOAT16, weight, row, dense);
        else dense_row(INT4, weight, row, dense);
    }
}
