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

enum { BLOCK = 64, ROWS = 4, AHEAD = 12 };
enum kind { FLOAT32, BFLOAT16, INT4_FLOAT32, INT4_BFLOAT16 };

typedef struct {
    const uint8_t *values, *masks;
    const float *scales;
    int64_t outputs, inputs, blocks;
    int kind, group;
} Weight;

INLINE int is_bfloat16(int kind) { return kind == BFLOAT16 || kind == INT4_BFLOAT16; }
INLINE int is_int4(int kind) { return kind == INT4_FLOAT32 || kind == INT4_BFLOAT16; }
// of values in a block; of an input or output
INLINE int64_t block_bytes(int kind) { return is_int4(kind) ? 16 : kind == BFLOAT16 ? 64 : 128; }
INLINE int64_t size_of(int kind) { return is_bfloat16(kind) ? 2 : 4; }
// vectors of inputs that a block has
INLINE int parts(int kind) { return is_bfloat16(kind) ? 2 : 4; }

INLINE __m512 high_halves(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
}

INLINE __m512 low_halves(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

// adds up 16 products of float32, or 32 of bfloat16 in pairs
INLINE __m512 added(int kind, __m512 sum, __m512i weights, const uint8_t *x) {
    __m512i inputs = _mm512_loadu_si512(x);
    if (!is_bfloat16(kind)) return _mm512_fmadd_ps(_mm512_castsi512_ps(weights), _mm512_castsi512_ps(inputs), sum);
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)inputs);
#else
    sum = _mm512_fmadd_ps(high_halves(weights), high_halves(inputs), sum);
    return _mm512_fmadd_ps(low_halves(weights), low_halves(inputs), sum);
#endif
}

// what codes stand for: 0 to 7, -8 to -1; in bfloat16 twice, because five bits of a word are looked up and four count
INLINE __m512i code_table(int kind) {
    __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    if (!is_bfloat16(kind)) return _mm512_castps_si512(numbers);
    __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(numbers), 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
}

// a block's codes, one a byte whose higher bits mean nothing, 0 where nothing stays
INLINE __m512i codes_of(const uint8_t *values, const uint8_t *masks) {
    uint64_t mask;
    memcpy(&mask, masks, 8);
    __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
    __m256i nibbles = _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    return _mm512_maskz_expand_epi8(mask, _mm512_castsi256_si512(nibbles));
}

// weights of one of a block's vectors of inputs
INLINE __m512i weights_of(int kind, int part, const uint8_t *values, const uint8_t *masks, __m512i codes, __m512i table) {
    if (kind == FLOAT32) {
        uint16_t mask;
        memcpy(&mask, masks + 2 * part, 2);
        return _mm512_castps_si512(_mm512_maskz_expandloadu_ps(mask, values + 32 * part));
    }
    if (kind == BFLOAT16) {
        uint32_t mask;
        memcpy(&mask, masks + 4 * part, 4);
        __m256i packed = _mm256_loadu_si256((const __m256i *)(values + 32 * part));
        return _mm512_maskz_expand_epi16(mask, _mm512_castsi256_si512(packed));
    }
    if (kind == INT4_BFLOAT16) return _mm512_permutexvar_epi16(part ? _mm512_srli_epi16(codes, 8) : codes, table);
    return _mm512_permutexvar_epi32(part ? _mm512_srli_epi32(codes, 8 * part) : codes, table);
}

INLINE void stored(int kind, uint8_t *y, int64_t at, float value) {
    if (!is_bfloat16(kind)) {
        ((float *)y)[at] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    // to the nearest, to even; what is no number stays none
    ((uint16_t *)y)[at] = value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// `rows` outputs from `first` of `tokens` tokens; all but the weight and places is known when this is compiled
INLINE void rows_of(int kind, int group, int rows, int tokens, const Weight *weight, const uint8_t *x, int64_t x_stride,
                    uint8_t *y, int64_t first) {
    const int64_t value_stride = weight->blocks * block_bytes(kind), mask_stride = weight->blocks * 8;
    const int64_t scale_stride = is_int4(kind) ? weight->blocks * BLOCK / group : 0;
    const uint8_t *values = weight->values + first * value_stride, *masks = weight->masks + first * mask_stride;
    const float *scales = is_int4(kind) ? weight->scales + first * scale_stride : 0;
    const __m512i table = code_table(kind);
    // blocks between scales, and scales in a block
    const int step = is_int4(kind) && group == 2 * BLOCK ? 2 : 1;
    const int in_scale = is_int4(kind) && group < BLOCK ? parts(kind) / 2 : parts(kind);
    __m512 sums[ROWS][8];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < tokens; t++) sums[r][t] = _mm512_setzero_ps();
    for (int64_t block = 0; block < weight->blocks; block += step) {
        UNROLL for (int r = 0; r < rows; r++) {
            const uint8_t *v = values + r * value_stride + block * block_bytes(kind);
            const uint8_t *m = masks + r * mask_stride + block * 8;
            for (int64_t line = 0; line < step * block_bytes(kind); line += 64)
                _mm_prefetch((const char *)v + 64 * AHEAD + line, _MM_HINT_T0);
            if (!is_int4(kind)) {
                UNROLL for (int p = 0; p < parts(kind); p++) {
                    __m512i w = weights_of(kind, p, v, m, table, table);
                    UNROLL for (int t = 0; t < tokens; t++)
                        sums[r][t] = added(kind, sums[r][t], w, x + t * x_stride + block * BLOCK * size_of(kind) + 64 * p);
                }
                continue;
            }
            __m512 part_sums[8];
            UNROLL for (int b = 0; b < step; b++) {
                __m512i codes = codes_of(v + 16 * b, m + 8 * b);
                UNROLL for (int p = 0; p < parts(kind); p++) {
                    __m512i w = weights_of(kind, p, v, m, codes, table);
                    int begins = p % in_scale == 0 && b == 0, ends = p % in_scale == in_scale - 1 && b == step - 1;
                    __m512 scale = _mm512_set1_ps(scales[r * scale_stride + (block * BLOCK + BLOCK / parts(kind) * p) / group]);
                    UNROLL for (int t = 0; t < tokens; t++) {
                        const uint8_t *at = x + t * x_stride + (block + b) * BLOCK * size_of(kind) + 64 * p;
                        part_sums[t] = added(kind, begins ? _mm512_setzero_ps() : part_sums[t], w, at);
                        if (ends) sums[r][t] = _mm512_fmadd_ps(part_sums[t], scale, sums[r][t]);
                    }
                }
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int t = 0; t < tokens; t++)
            stored(kind, y, t * weight->outputs + first + r, _mm512_reduce_add_ps(sums[r][t]));
}

// the tokens in eights, fours, twos and ones: after the first of them the rows' weights are in the nearest cache
INLINE void tokens_of(int kind, int group, int rows, int64_t tokens, const Weight *weight, const uint8_t *x,
                      int64_t x_stride, uint8_t *y, int64_t first) {
    const int64_t y_stride = weight->outputs * size_of(kind);
    for (int64_t t = 0; t < tokens;) {
        const uint8_t *from = x + t * x_stride;
        uint8_t *to = y + t * y_stride;
        if (tokens - t >= 8) rows_of(kind, group, rows, 8, weight, from, x_stride, to, first), t += 8;
        else if (tokens - t >= 4) rows_of(kind, group, rows, 4, weight, from, x_stride, to, first), t += 4;
        else if (tokens - t >= 2) rows_of(kind, group, rows, 2, weight, from, x_stride, to, first), t += 2;
        else rows_of(kind, group, rows, 1, weight, from, x_stride, to, first), t += 1;
    }
}

typedef void (*Some)(int rows, int64_t tokens, const Weight *, const uint8_t *, int64_t, uint8_t *, int64_t);

#define SOME(name, kind, group)                                                                                        \
    static void name(int rows, int64_t tokens, const Weight *weight, const uint8_t *x, int64_t x_stride, uint8_t *y,   \
                     int64_t first) {                                                                                  \
        if (rows == ROWS) tokens_of(kind, group, ROWS, tokens, weight, x, x_stride, y, first);                         \
        else                                                                                                           \
            for (int r = 0; r < rows; r++) tokens_of(kind, group, 1, tokens, weight, x, x_stride, y, first + r);       \
    }

SOME(float32, FLOAT32, 0)
SOME(bfloat16, BFLOAT16, 0)
SOME(int4_32_float32, INT4_FLOAT32, 32)
SOME(int4_64_float32, INT4_FLOAT32, 64)
SOME(int4_128_float32, INT4_FLOAT32, 128)
SOME(int4_32_bfloat16, INT4_BFLOAT16, 32)
SOME(int4_64_bfloat16, INT4_BFLOAT16, 64)
SOME(int4_128_bfloat16, INT4_BFLOAT16, 128)

static Some some_of(const Weight *weight) {
    int which = weight->group == 32 ? 0 : weight->group == 64 ? 1 : 2;
    switch (weight->kind) {
    case FLOAT32: return float32;
    case BFLOAT16: return bfloat16;
    case INT4_FLOAT32: return (Some[]){int4_32_float32, int4_64_float32, int4_128_float32}[which];
    default: return (Some[]){int4_32_bfloat16, int4_64_bfloat16, int4_128_bfloat16}[which];
    }
}

// y [tokens, outputs] = x [tokens, inputs] W^T; anything but 0 where there is no memory for inputs that are filled up
int product(const Weight *weight, const uint8_t *x, uint8_t *y, int64_t tokens, int threads) {
    const int64_t row = weight->inputs * size_of(weight->kind), stride = weight->blocks * BLOCK * size_of(weight->kind);
    uint8_t *filled = 0;
    if (row != stride) {
        if (!(filled = calloc(tokens, stride))) return 1;
        for (int64_t t = 0; t < tokens; t++) memcpy(filled + t * stride, x + t * row, row);
        x = filled;
    }
    const Some some = some_of(weight);
    const int64_t tiles = (weight->outputs + ROWS - 1) / ROWS;
    // threads take turns, since others may slow one of them; a small product is done before another thread wakes
    const int64_t chunk = tiles / (16 * threads) + 1;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (weight->outputs * weight->blocks > 1024)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t left = weight->outputs - tile * ROWS;
        some(left < ROWS ? left : ROWS, tokens, weight, x, stride, y, tile * ROWS);
    }
    free(filled);
    return 0;
}

// `size` bytes of a dense row from one of a block's vectors, multiplied by the scale
INLINE void dense_part(int kind, int part, const Weight *weight, int64_t row, int64_t block, uint8_t *to, int64_t size) {
    const int64_t at = row * weight->blocks + block;
    const uint8_t *values = weight->values + at * block_bytes(kind), *masks = weight->masks + at * 8;
    __m512i w;
    if (is_int4(kind)) {
        w = weights_of(kind, part, values, masks, codes_of(values, masks), code_table(kind));
        __m512 scale = _mm512_set1_ps(weight->scales[(at * BLOCK + BLOCK / parts(kind) * part) / weight->group]);
        if (is_bfloat16(kind)) {
            __m512i low = _mm512_castps_si512(_mm512_mul_ps(low_halves(w), scale));
            __m512i high = _mm512_castps_si512(_mm512_mul_ps(high_halves(w), scale));
            // to the nearest, to even
            const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
            low = _mm512_add_epi32(low, _mm512_add_epi32(half, _mm512_and_si512(_mm512_srli_epi32(low, 16), one)));
            high = _mm512_add_epi32(high, _mm512_add_epi32(half, _mm512_and_si512(_mm512_srli_epi32(high, 16), one)));
            w = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(low, 16), high);
        } else {
            w = _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(w), scale));
        }
    } else {
        w = weights_of(kind, part, values, masks, _mm512_setzero_si512(), _mm512_setzero_si512());
    }
    if (size >= 64) _mm512_storeu_si512(to, w);
    else if (size > 0) _mm512_mask_storeu_epi8(to, (1ull << size) - 1, w);
}

INLINE void dense_row(int kind, const Weight *weight, int64_t row, uint8_t *dense) {
    const int64_t size = weight->inputs * size_of(kind);
    for (int64_t block = 0; block < weight->blocks; block++)
        UNROLL for (int part = 0; part < parts(kind); part++) {
            const int64_t at = (block * parts(kind) + part) * 64;
            dense_part(kind, part, weight, row, block, dense + row * size + at, size - at);
        }
}

// the dense weight [outputs, inputs]
void inflate(const Weight *weight, uint8_t *dense, int threads) {
#pragma omp parallel for num_threads(threads) if (weight->outputs * weight->blocks > 1024)
    for (int64_t row = 0; row < weight->outputs; row++) switch (weight->kind) {
        case FLOAT32: dense_row(FLOAT32, weight, row, dense); break;
        case BFLOAT16: dense_row(BFLOAT16, weight, row, dense); break;
        case INT4_FLOAT32: dense_row(INT4_FLOAT32, weight, row, dense); break;
        default: dense_row(INT4_BFLOAT16, weight, row, dense);
        }
}
